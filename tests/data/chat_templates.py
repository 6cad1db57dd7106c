"""Chat templates in the manner of the real ones, written for these tests; how each really differs.

Each takes the special tokens of `conftest.CONTROL`.
"""

HEADERS = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Trims, puts bos, and writes the date of today.
TRIMMING_DATED = """{{- bos_token -}}
{{- 'Today is ' + strftime_now('%d %b %Y') + '.\n' -}}
{% for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{% endfor %}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}"""

# No header for the answer: it follows the bracket; the system message is put into the first turn.
BRACKETS_MERGING = """{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\n\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' -}}{%- set ns.system = '' -%}
{%- else -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endif -%}
{%- endfor -%}"""

# The assistant is called model, the system message is refused, roles must alternate.
RENAMING_REFUSING = """{{- bos_token -}}
{%- if messages and messages[0]['role'] == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>model\n' -}}{%- endif -%}"""

# An empty thinking block before the last answer, none before the earlier ones, and thoughts of
# earlier answers removed.
THINKING = """{%- for message in messages -%}
{%- set text = message['content'].split('</think>')[-1].lstrip('\n') -%}
{%- if message['role'] == 'assistant' and loop.last -%}
{%- set thought = '' -%}
{%- if '</think>' in message['content'] -%}
{%- set thought = message['content'].split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + text + '<|im_end|>\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# eos closes the conversation, not the turn.
EOS_AT_END_ONLY = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] -}}
{%- if message['role'] == 'assistant' and loop.last -%}{{- eos_token -}}{%- else -%}{{- '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# The generation tag around the content alone: by itself the model would never learn to stop.
GENERATION_TAGGED = """{% for message in messages %}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}{% generation %}{{- message['content'] -}}{% endgeneration %}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endif -%}
{% endfor %}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Injects a system message of its own where there is none.
DEFAULT_SYSTEM = (
    """{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}"""
    + HEADERS
)

# Shows nobody but user and assistant, and says nothing about it.
SYSTEM_IGNORING = HEADERS.replace(
    "{%- for message in messages -%}",
    "{%- for message in messages if message['role'] in ('user', 'assistant') -%}",
)

FOREIGN = {
    "headers": HEADERS,
    "trimming_dated": TRIMMING_DATED,
    "brackets_merging": BRACKETS_MERGING,
    "renaming_refusing": RENAMING_REFUSING,
    "thinking": THINKING,
    "eos_at_end_only": EOS_AT_END_ONLY,
    "generation_tagged": GENERATION_TAGGED,
    "default_system": DEFAULT_SYSTEM,
    "system_ignoring": SYSTEM_IGNORING,
}

# Declares tools in a system message of its own, calls them as JSON lines inside the answer, and
# shows their results as a user's turn, several in a row joined into one.
TOOL_CALLING = """{%- set given = messages and messages[0]['role'] == 'system' -%}
{%- if tools or given -%}
{{- '<|im_start|>system\n' + (messages[0]['content'] if given else '') -}}
{%- if tools -%}
{{- '\n# Tools\n' -}}
{%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}
{%- endif -%}
{{- '\n<response>\n' + message.content + '\n</response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- elif not (given and loop.first) -%}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '\n<call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
{{- '</call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Joins the arguments as text (and so needs them as text), writes results as JSON, eos per turn.
TOOL_JOINING = """{{- bos_token -}}
{%- if tools -%}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] in ('user', 'system') -%}{{- '[INST]' + message['content'] + '[/INST]' -}}
{%- elif message['role'] == 'tool' -%}
{{- '[RESULT]' + {'content': message['content']} | tojson + '[/RESULT]' -}}
{%- else -%}
{{- message['content'] -}}
{%- for call in message['tool_calls'] or [] -%}
{{- '[CALL]' + call['function']['name'] + ' ' + call['function']['arguments'] -}}
{%- endfor -%}
{{- eos_token -}}
{%- endif -%}
{%- endfor -%}"""

# The thinking is a key of its own; earlier answers lose it once a user has spoken again.
THINKING_KEY = """{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' -}}
{%- endif -%}
{{- message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"""

# Insists on user, assistant, user, ... behind an optional system message, which it shows alone.
ALTERNATING_RAISING = """{%- set rest = messages -%}
{%- if messages and messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>' -}}{%- set rest = messages[1:] -%}
{%- endif -%}
{%- for message in rest -%}
{%- if message.role != ('user', 'assistant')[loop.index0 % 2] -%}
{{- raise_exception('After the optional system message, roles must alternate') -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Numbers the rounds, and begins every answer with a blank that inference does not feed.
NUMBERED_ROUNDS = """{%- set ns = namespace(round=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set ns.round = ns.round + 1 -%}
{{- '[Round ' ~ ns.round ~ ']\n\nQ: ' + message.content + '\n\nA:' -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content + '</s>\n\n' -}}
{%- else -%}
{{- message.content + '\n\n' -}}
{%- endif -%}
{%- endfor -%}"""

# The template itself says which channel the answer goes to, behind the generation prompt.
CHANNELS = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant<|start_header_id|>final<|end_header_id|>' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '<|end_header_id|>' -}}
{%- endif -%}
{{- message.content + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}"""

# The tag holds header, content and end: more than inference leaves to the model.
GENERATION_WHOLE = """{% for message in messages %}
{%- if message['role'] == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\n' + message['content'] + '<|im_end|>\n' -}}
{% endgeneration %}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endif -%}
{% endfor %}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

FOREIGN.update(
    {
        "tool_calling": TOOL_CALLING,
        "tool_joining": TOOL_JOINING,
        "thinking_key": THINKING_KEY,
        "alternating_raising": ALTERNATING_RAISING,
        "numbered_rounds": NUMBERED_ROUNDS,
        "channels": CHANNELS,
        "generation_whole": GENERATION_WHOLE,
    }
)
