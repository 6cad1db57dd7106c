"""Real chat templates x conversations against two oracles that share nothing with jaxtune.

The prefix difference of transformers: what `apply_chat_template` writes for messages[:i+1] behind
what it writes for messages[:i] with the generation prompt, up to where generation stops (by hand,
`ends`). And TRL's training twins: what is between their `{% generation %}` marks. An answer that
neither can place is not counted; nor is one whose thinking or calls the template leaves out, since
no oracle can be asked about what is not there.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from jaxtune.config import ConfigError
from jaxtune.data import formats
from jaxtune.data.schema import Conversation, Dropped
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import Template, resolve
from jaxtune.data.tokenize import TokenizedRow, tokenize_rows
from jaxtune.data.tokenizer import Tokenizer

Chat = dict[str, Any]  # {"messages": [...], "tools": [...]}


def _tool(name: str, about: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": key} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": schema},
    }


TOOLS = [
    _tool("find_train", "Finds a train", station="string", hour="integer"),
    _tool("multiply", "Multiplies", left="number", right="number"),
]


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _says(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"abcdefg{number:02d}", "type": "function", "function": function}


def _result(number: int, name: str, content: str) -> dict[str, Any]:
    return {
        "role": "tool",
        "content": content,
        "tool_call_id": f"abcdefg{number:02d}",
        "name": name,
    }


TRAIN = {"station": "Ghent", "hour": 9}
PRODUCT = {"left": 6, "right": 7}


def _trip(first: Mapping[str, Any], last: str = "It leaves at ten.", **more: Any) -> Chat:
    """One call of a tool, its result and an answer."""
    messages = [
        _user("When does a train leave Ghent?"),
        {**first, "tool_calls": [_call(1, "find_train", TRAIN)]},
        _result(1, "find_train", '{"leaves": "10:04"}'),
        _says(last, **more),
    ]
    return {"messages": messages, "tools": TOOLS}


def _two_trips(argument: Any = lambda value: value, **thought: str) -> Chat:
    first = _trip(_says("", **thought))
    messages = [
        *first["messages"],
        _user("And six times seven?"),
        _says("", tool_calls=[_call(2, "multiply", PRODUCT)], **thought),
        _result(2, "multiply", "42"),
        _says("That makes forty-two."),
    ]
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = argument(call["function"]["arguments"])
    return {"messages": messages, "tools": TOOLS}


def _two_turns(*thoughts: str, field: str = "reasoning_content") -> Chat:
    named = [{field: thought} if thought else {} for thought in thoughts or ("", "")]
    messages = [
        _user("Which metal is liquid?"),
        _says("Mercury is liquid.", **named[0]),
        _user("Name a second one!"),
        _says("Gallium melts in the hand.", **named[1]),
    ]
    return {"messages": messages}


_THOUGHTS = ("Thermometers held it.", "It melts near thirty degrees.")
_INLINE = {
    "messages": [
        message if message["role"] == "user" else
        _says(f"<think>\n{thought}\n</think>\n\n{message['content']}")
        for message, thought in zip(
            _two_turns()["messages"], ("", _THOUGHTS[0], "", _THOUGHTS[1]), strict=True
        )
    ]
}  # fmt: skip
_PARALLEL = {
    "messages": [
        _user("The train from Ghent, and six times seven?"),
        _says("", tool_calls=[_call(1, "find_train", TRAIN), _call(2, "multiply", PRODUCT)]),
        _result(1, "find_train", '{"leaves": "10:04"}'),
        _result(2, "multiply", "42"),
        _says("At ten, and forty-two."),
    ],
    "tools": TOOLS,
}
_END = _two_trips()
CONVERSATIONS: dict[str, Chat] = {
    "one turn": {"messages": _two_turns()["messages"][:2]},
    "two turns": _two_turns(),
    "system": {
        "messages": [{"role": "system", "content": "Use short words."}, *_two_turns()["messages"]]
    },
    "consecutive": {"messages": [*_two_turns()["messages"][:2], _says("It is a metal.")]},
    "thinking inline": _INLINE,
    "thinking in the last": _two_turns("", _THOUGHTS[1]),
    "reasoning_content": _two_turns(*_THOUGHTS),
    "reasoning": _two_turns(*_THOUGHTS, field="reasoning"),
    "thinking": _two_turns(*_THOUGHTS, field="thinking"),
    "calls": _two_trips(),
    "calls as text": _two_trips(json.dumps),
    "call at the end": {**_END, "messages": _END["messages"][:2]},
    "call with content": _trip(_says("I will look.")),
    "call, null content": _trip(_says(None)),
    "calls in parallel": _PARALLEL,
    "calls, thinking": _two_trips(thinking=_THOUGHTS[0]),
    "calls, reasoning_content": _two_trips(reasoning_content=_THOUGHTS[0]),
    "call, content, reasoning": _trip(
        _says("I will look.", reasoning_content=_THOUGHTS[0]), reasoning_content=_THOUGHTS[1]
    ),
}


class Ends(NamedTuple):
    """Where generation stops behind an answer and behind a call; `written` by the template."""

    answer: str
    call: str
    written: bool = True


class Outcome(NamedTuple):
    """An answer that an oracle can place; `reason` is empty if it is trained exactly."""

    template: str
    conversation: str
    message: int
    oracle: str
    reason: str
    wrong: bool = False  # trained, but not what the oracle says


class Trained(NamedTuple):
    """What jaxtune makes of a conversation: answers by the text before them, and reasons."""

    answers: Mapping[str, str]
    reasons: Mapping[int, str]


def sweep(
    name: str, source: str, twin: str | None, ends: Ends | None, ours: Tokenizer, reference: Any
) -> Iterator[Outcome]:
    """Yield every answer of every conversation that an oracle can place.

    `reference` is transformers' tokenizer of the same folder as `ours`. Without `ends` they are the
    special tokens that stand at the end.
    """
    try:
        template = resolve(source, ours, date=datetime.date.today())  # as transformers takes it
    except ConfigError as error:
        template, refused = None, f"refused: {error}"
    for title, chat in CONVERSATIONS.items():
        known = _expected(source, twin, chat, ends, ours, reference)
        if not known:
            continue
        trained = Trained({}, {}) if template is None else _trained(template, chat, ours, reference)
        for number, oracle, before, answer in known:
            found = trained.answers.get(before)
            if found and not ends and answer.startswith(found):
                # Not by hand: tokens may follow that the template writes at the end of all.
                rest = ours.special_pattern.sub("", answer.removeprefix(found))
                answer = answer if rest.strip() else found
            outcome = Outcome(name, title, number, oracle, "")
            if template is None:
                yield outcome._replace(reason=refused)
            elif found is None:
                default = trained.reasons.get(0, "no reason")
                yield outcome._replace(reason=trained.reasons.get(number, default))
            elif found != answer:
                reason = f"trained {found!r}, expected {answer!r}"
                yield outcome._replace(reason=reason, wrong=True)
            else:
                yield outcome


def _trained(template: Template, chat: Chat, ours: Tokenizer, reference: Any) -> Trained:
    """Render and tokenise a conversation; read from the ids what is trained behind what."""
    noun = formats.to_noun("messages", copy.deepcopy(chat), {}, "here")
    assert isinstance(noun, Conversation), noun
    tokens = (*template.ends.final, *template.ends.next_turn)
    final = {ours.special_tokens[token] for token in tokens if token}
    answers: dict[str, str] = {}
    reasons: dict[int, str] = {}
    rows = render(template, noun)
    whole = [row for row in rows if not isinstance(row, Dropped)]
    results: Sequence[Any] = tokenize_rows(whole, ours)
    lost = [row for row in (*rows, *results) if isinstance(row, Dropped)]
    lost += [reason for row in whole for reason in row[0].untrained]
    for reason in lost:
        message = reason.detail.partition("message ")[2].partition(":")[0]
        reasons[int(message) - 1 if message.isdigit() else 0] = reason.reason
    for result in results:
        if isinstance(result, TokenizedRow):
            ids, weights = result.tokens
            answers.update(_runs(ids.tolist(), weights > 0, reference, final))
    return Trained(answers, reasons)


def _runs(
    ids: list[int], marked: Sequence[bool], reference: Any, final: Collection[int] = ()
) -> Iterator[tuple[str, str]]:
    """Yield (text before, text) of each run of marked tokens; one of `final` ends a run too."""
    start = None
    for at, mark in enumerate((*marked, False)):
        if start is not None and (not mark or ids[at - 1] in final):
            before = reference.decode(ids[:start])
            yield before, reference.decode(ids[:at])[len(before) :]
            start = None
        if mark and start is None:
            start = at


def _expected(
    source: str, twin: str | None, chat: Chat, ends: Ends | None, ours: Tokenizer, reference: Any
) -> list[tuple[int, str, str, str]]:
    """List (message, oracle, text before, answer) that the oracles can place."""
    found = []
    for number, message in enumerate(chat["messages"]):
        if message["role"] != "assistant":
            continue
        for form in _forms(chat):
            shown = _difference(source, form, number, reference)
            if shown is None or not _shows_all(form, number, *shown):
                continue
            before, behind = shown
            answer = _ended(behind, message, ends, ours)
            if answer is not None:
                found.append((number, "transformers", before, answer))
                marked = twin and _marked(twin, form, number, before, reference)
                if marked:  # some leave the end out
                    marked = _ended(marked, message, ends, ours) or marked.rstrip()
                    whole = answer if answer.startswith(marked) else marked
                    found.append((number, "trl", before, whole))
            break
    return found


def _forms(chat: Chat) -> Iterator[Chat]:
    """Yield the conversation as it is, and in the forms that templates want."""
    yield chat
    as_objects = lambda value: json.loads(value) if isinstance(value, str) else value  # noqa: E731
    as_text = lambda value: value if isinstance(value, str) else json.dumps(value)  # noqa: E731
    for arguments in (as_objects, as_text):
        for empty in ("", None):
            yield _converted(chat, arguments, empty, parts=False)
    yield _converted(chat, lambda a: a, "", parts=True)


def _converted(chat: Chat, arguments: Any, empty: str | None, *, parts: bool) -> Chat:
    chat = copy.deepcopy(chat)
    for message in chat["messages"]:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = arguments(call["function"]["arguments"])
            message["content"] = message["content"] or empty
        if parts:
            message["content"] = [{"type": "text", "text": message["content"] or ""}]
    return chat


def _difference(source: str, chat: Chat, number: int, reference: Any) -> tuple[str, str] | None:
    try:
        before = _apply(source, chat, number, reference, add_generation_prompt=True)
        whole = _apply(source, chat, number + 1, reference)
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError):
        return None
    return (before, whole[len(before) :]) if whole.startswith(before) else None


def _apply(source: str, chat: Chat, upto: int, reference: Any, **how: Any) -> Any:
    messages = copy.deepcopy(chat["messages"][:upto])
    return reference.apply_chat_template(
        messages, tools=chat.get("tools"), chat_template=source, **{"tokenize": False, **how}
    )


def _marked(twin: str, chat: Chat, number: int, before: str, reference: Any) -> str | None:
    """Return what TRL trains behind `before`; None if it begins elsewhere."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        encoded = _apply(twin, chat, number + 1, reference, **how)
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError):
        return None
    marked = [bool(mark) for mark in encoded["assistant_masks"]]
    return dict(_runs(list(encoded["input_ids"]), marked, reference)).get(before)


def _shows_all(chat: Chat, number: int, before: str, behind: str) -> bool:
    """Tell whether the tools are shown, and what the answer says, thinks and calls first.

    No if arguments are quoted once more or are Python's repr, also in earlier calls.
    """
    message = chat["messages"][number]
    squeezed = "".join(behind.split())
    content = message["content"] or ""
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    thoughts = [message.get(field) for field in ("reasoning_content", "reasoning", "thinking")]
    wanted = [content.removeprefix("<think>"), *filter(None, thoughts)]
    for call in message.get("tool_calls", ())[:1]:
        arguments = call["function"]["arguments"]
        loaded = json.loads(arguments) if isinstance(arguments, str) else arguments
        wanted += [call["function"]["name"], *loaded]
        wanted += [value for value in loaded.values() if isinstance(value, str)]
    whole = before + behind
    quoted = any(f'\\"{key}' in whole or f"'{key}'" in whole for key in (*TRAIN, *PRODUCT))
    declared = all(tool["function"]["name"] in before for tool in chat.get("tools", ()))
    return declared and not quoted and all("".join(text.split()) in squeezed for text in wanted)


def _ended(
    behind: str, message: Mapping[str, Any], ends: Ends | None, ours: Tokenizer
) -> str | None:
    """Cut what follows a prompt where generation stops; None if it does not stop."""
    if ends is None:
        stripped = behind.rstrip()
        stops = any(stripped.endswith(token) for token in ours.special_tokens)
        return stripped if stops else None
    end = ends.call if message.get("tool_calls") else ends.answer
    if not ends.written:
        return behind if behind.endswith(end) else behind + end
    return behind[: behind.index(end) + len(end)] if end in behind else None
