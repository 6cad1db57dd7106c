"""Chat templates in the manner of the real ones, written for these tests; how each really differs.

Each takes the control tokens of `conftest.CONTROL`.
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
