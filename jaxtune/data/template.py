"""Conversation -> spans: the one place that decides what is trained.

Every template is jinja (ours come from `wording`) and is rendered as transformers renders it. What
is trained is derived from the rendered text, the same way for all of them, by asking the template
what the model will see: for the assistant's message i

    prompt = render(messages[:i], generation prompt)        what inference feeds
    whole  = render(messages[:i+1])                         what must come out of it
    answer = whole[len(prompt):], up to and including the first end of turn

so the answer holds whatever the template itself puts behind the generation prompt. It is checked:
it holds the message's content, thinking and tool calls, ends with one end of turn, and holds no
other message's content. Where each `prompt + answer` is a prefix of the full conversation, the
conversation is one row. Where it is not (the template rewrites earlier turns, or ends only the last
one), it becomes one row per trained answer, each as inference will show it. What cannot be shown is
`Dropped`.

`{% generation %}` in a template is its author's word on the same question. The derived answer is
trained either way (marks often leave out the end of turn, or take in the header that inference
feeds); an answer that the marks leave out, or whose marks take in more than header, answer and
blanks, is dropped.

Control tokens that a message holds as text stay text (`typed`). Documents of format `text` are the
exception: they bring their own template, and their control tokens are meant.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtune.config import ConfigError, nearest
from jaxtune.data import jinja, wording
from jaxtune.data.presence import appears, as_object, as_text, shows_calls, squeeze, with_calls
from jaxtune.data.schema import Conversation, Document, Dropped, Message, Span
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.data.typed import Said, Unlocated, mask, take_apart, unmask

TrainOn = Literal["assistant", "last", "all"]
Row = tuple[Span, ...]

# What `strftime_now` tells: the date Llama 3.1's template falls back to. Only that it never moves
# matters; a template that asks for today would otherwise make other tokens every day.
DATE = datetime.date(2024, 7, 26)


class Asked(NamedTuple):
    """What a template was resolved from."""

    template: str
    system_prompt: str | None
    stop: str | None
    no_input: str | None


@dataclass(frozen=True)
class Template:
    """A chat template and how its answers end. `jinja` is what export writes."""

    name: str
    jinja: str
    stop: str  # text of the end of turn
    stop_id: int
    ours: bool  # reads message.input; brings the system prompt itself
    system_prompt: str
    opening: str  # before a `Document`: bos where the tokenizer puts one before plain text
    closing: str  # after a `Document`: eos
    named: Mapping[str, str]  # bos_token, eos_token, ... as the template's variables
    control: re.Pattern[str]  # what is a control token where the template writes it
    asked: Asked
    date: datetime.date = DATE

    @property
    def chat_template(self) -> str:
        return self.jinja

    @property
    def fingerprint(self) -> str:
        parts = [self.jinja, self.stop, self.system_prompt, self.opening, self.closing]
        parts += [str(self.date), str(sorted(self.named.items()))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def resolve(
    template: str,
    tokenizer: Tokenizer,
    *,
    system_prompt: str | None = None,
    stop: str | None = None,
    no_input: str | None = None,
    date: datetime.date = DATE,
) -> Template:
    """`auto`, `chat`, a name, a string with placeholders, a .jinja file or jinja itself.

    `no_input` is what a string with {input} becomes where a record has none. Raises `ConfigError`
    when the template is unknown, the tokenizer lacks a token it needs, or an answer would not end
    with exactly one token of the tokenizer.
    """
    asked = Asked(template, system_prompt, stop, no_input)
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "alpaca"
    if no_input is not None and (template in wording.NAMED or "{input}" not in template):
        raise ConfigError("template_no_input: the template is no string with {input}. Unset it.")
    bos = tokenizer.bos_token if tokenizer.begins_with_bos else None
    system = system_prompt or ""
    ours = True
    if template in wording.NAMED:
        name, choice = template, wording.NAMED[template]
        missing = [
            token for token in needed_tokens(name, stop=stop) if token not in tokenizer.control
        ]
        if missing:
            raise ConfigError(
                f"template '{name}' needs control tokens that this tokenizer lacks: "
                f"{', '.join(missing)}. Set add_tokens: true to add them (the embedding grows "
                "where it has no rows left for them), or choose a template written in plain text, "
                "such as alpaca or llama2."
            )
        end = _stop_token(stop or choice.stop or tokenizer.eos_token, tokenizer)
        source = choice.source(wording.Setting(bos or "", end, system))
    elif _is_jinja(template) or template == "chat":
        name, source = _foreign(template, tokenizer)
        end, ours = "", False
    elif "{" in template:
        name, parts = "custom", wording.parse(template)
        if system and "system" not in parts.names:
            raise ConfigError("system_prompt: the template has no {system}. Add it, or unset.")
        lead_out, end, rest = _end_of_answer(parts.after, stop, tokenizer)
        setting = wording.Setting(bos or "", end, system)
        source = wording.from_placeholders(
            parts,
            setting,
            lead_out=lead_out,
            rest=rest,
            without_input=_without_input(parts, no_input),
        )
    else:
        names = ["auto", "chat", *wording.NAMED]
        raise ConfigError(
            f"template: '{template}' is not known.{nearest(template, names)} There are: "
            f"{', '.join(names)}, a .jinja file, or a string with {{instruction}} and {{output}}."
        )
    resolved = Template(
        name=name,
        jinja=source,
        stop=end,
        stop_id=tokenizer.control.get(end, -1),
        ours=ours,
        system_prompt=system,
        opening=bos or "",
        closing=tokenizer.eos_token or end,
        named=tokenizer.named,
        control=tokenizer.control_pattern,
        asked=asked,
        date=date,
    )
    return resolved if ours else _probed(resolved, tokenizer, stop)


def variant(
    base: Template, tokenizer: Tokenizer, *, template: str | None, system_prompt: str | None
) -> Template:
    """`base` with what one dataset has instead: another template, another system prompt."""
    if template is None and system_prompt is None:
        return base
    asked = base.asked
    return resolve(
        asked.template if template is None else template,
        tokenizer,
        system_prompt=asked.system_prompt if system_prompt is None else system_prompt,
        stop=asked.stop,
        no_input=asked.no_input if template is None else None,
        date=base.date,
    )


def needed_tokens(template: str, *, stop: str | None = None) -> tuple[str, ...]:
    """The control tokens that a named template writes; none where it is another kind."""
    if template not in wording.NAMED:
        return ()
    choice = wording.NAMED[template]
    end = choice.stop if choice.stop and not stop else None
    return tuple(dict.fromkeys((*choice.needs, *([end] if end else []))))


def tokens_to_add(
    wanted: bool | Sequence[str], templates: Iterable[str], *, stop: str | None = None
) -> tuple[str, ...]:
    """The control tokens that `add_tokens` asks for: those of the named templates, or a list."""
    if not isinstance(wanted, bool):
        return tuple(wanted)
    needed = [token for name in templates for token in needed_tokens(name, stop=stop)]
    return tuple(dict.fromkeys(needed)) if wanted else ()


def _without_input(
    parts: wording.Placeholders, no_input: str | None
) -> wording.Placeholders | None:
    if no_input is None:
        return None
    other = wording.parse(no_input)
    if "input" in other.names:
        raise ConfigError("template_no_input: holds {input}, but is for records without one.")
    if other.after != parts.after:
        raise ConfigError(
            f"template_no_input: ends with {other.after!r} behind {{output}}, the template with "
            f"{parts.after!r}; answers must end the same way."
        )
    return other


def render(
    template: Template, noun: Conversation | Document, *, train_on: TrainOn = "assistant"
) -> tuple[Row | Dropped, ...]:
    """The rows of one record: mostly one; one per answer where the template rewrites history.

    Joined, the spans of a row are the text as `apply_chat_template` renders it.
    """
    if isinstance(noun, Document):
        return ((Span(_document(template, noun.text), 1.0, answer=True),),)
    weights = _weights(noun.messages, train_on)
    if isinstance(weights, Dropped):
        return (weights,)
    said = _said(template, noun)
    try:
        full = _text(template, said)
        # A tool's name may stand in a message too: that the template shows tools is seen without.
        if said.tools and full == _rendered(template, said.messages):
            return (Dropped("the template does not show the tools", "it reads none"),)
    except jinja.TemplateFailed as error:
        return (Dropped(error.reason, str(error)),)
    turns = {i: _turn(template, said, i, full) for i in weights}
    background = 1.0 if train_on == "all" else 0.0
    whole = _cut(full, turns, weights, background)
    if whole is not None:
        return (_hidden(said, full) or take_apart(whole, said.typed, template.control),)
    trained = [max(weights)] if train_on == "all" else [i for i in weights if weights[i] > 0]
    return tuple(_alone(template, said, i, turns[i], weights[i], background) for i in trained)


def render_prompt(
    template: Template, messages: Sequence[Message], *, tools: tuple[Any, ...] | None = None
) -> Row:
    """What inference feeds for `messages`, the generation prompt included; all weights 0.

    Its spans are cut exactly where those of a trained row are. Raises `ConfigError` when the
    template refuses the messages.
    """
    said = _said(template, Conversation(tuple(messages), tools))
    try:
        masked = _prompt_spans(template, said, 0.0)
    except jinja.TemplateFailed as error:
        raise ConfigError(f"template '{template.name}': {error.reason}: {error}") from None
    row = take_apart(masked, said.typed, template.control)
    if isinstance(row, Dropped):
        raise ConfigError(f"template '{template.name}': {row.reason}: {row.detail}")
    return row


class _Turn(NamedTuple):
    prompt: str
    answer: str
    tail: str  # what `whole` holds behind the end of turn


def _document(template: Template, text: str) -> str:
    """What stands before and behind plain text, unless the text has brought it."""
    opening = "" if text.startswith(template.opening) else template.opening
    closing = "" if text.endswith(template.closing) else template.closing
    return opening + text + closing


def _said(template: Template, noun: Conversation) -> Said:
    """The conversation in the form that shows its tool calls, with typed control tokens masked.

    Arguments are given as they came; where the template cannot show them so (it joins strings, or
    would quote a string twice), as objects or as JSON text.
    """
    said = mask(template.control, noun.messages, noun.tools)
    if not any(message.extra.get("tool_calls") for message in noun.messages):
        return said
    for convert in (as_object, as_text):
        try:
            text = squeeze(_text(template, said))
            if all(shows_calls(message, text) for message in said.messages):
                return said
        except jinja.TemplateFailed:
            pass
        said = mask(template.control, [with_calls(m, convert) for m in noun.messages], noun.tools)
    return said


def _weights(messages: Sequence[Message], train_on: TrainOn) -> dict[int, float] | Dropped:
    """Weight of each assistant message, by its index."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        return Dropped("no answer to train", "the conversation has no assistant message")
    default = {i: float(train_on != "last" or i == answers[-1]) for i in answers}
    weights = {i: default[i] if (w := messages[i].weight) is None else w for i in answers}
    for i, message in enumerate(messages):
        if i in weights:
            empty = not message.content.strip() and not message.extra.get("tool_calls")
            if weights[i] > 0 and empty:
                return Dropped("empty answer", f"message {i + 1}")
        elif message.weight and train_on != "all":
            return Dropped("weight on a message that is no answer", f"message {i + 1}")
    if not any(weights.values()):
        return Dropped("no answer to train", "every answer has weight 0")
    return weights


def _text(template: Template, said: Said, upto: int | None = None, *, prompt: bool = False) -> str:
    """The rendered text of the first `upto` messages; raises `jinja.TemplateFailed`."""
    text = _rendered(template, said.messages[:upto], said.tools, prompt=prompt)
    if said.typed:
        plain = _rendered(template, said.plain[:upto], said.plain_tools, prompt=prompt)
        if unmask(text, said.typed) != plain:
            raise Unlocated(", ".join(said.typed.values()))
    return text


def _rendered(
    template: Template,
    messages: Sequence[Message],
    tools: Any = None,
    *,
    prompt: bool = False,
    marked: bool = False,
) -> str:
    plain: list[dict[str, Any]] = []
    brings_none = bool(messages) and messages[0].role != "system"
    if not template.ours and template.system_prompt and brings_none:
        plain.append({"role": "system", "content": template.system_prompt})
    for message in messages:
        content, given = message.content, message.input
        if given and not template.ours:
            content, given = "\n".join(filter(None, (content, given))), ""
        beside = {"input": given} if given else {}
        plain.append({"role": message.role, "content": content, **beside, **message.extra})
    return jinja.render(
        template.jinja,
        plain,
        tools=tools,
        add_generation_prompt=prompt,
        date=template.date,
        named=template.named,
        marked=marked,
        trusted=template.ours,
    )


def _turn(template: Template, said: Said, i: int, full: str | None = None) -> _Turn | Dropped:
    """Message i as inference meets it: its prompt and its answer, or why that cannot be shown."""
    where = f"message {i + 1}"
    try:
        prompt = _text(template, said, i, prompt=True)
        is_last = full is not None and i == len(said.messages) - 1
        whole = full if full is not None and is_last else _text(template, said, i + 1)
    except jinja.TemplateFailed as error:
        return Dropped(error.reason, f"up to {where}: {error}")
    if not whole.startswith(prompt):
        return Dropped("the generation prompt does not begin the answer", where)
    end = whole.find(template.stop, len(prompt))
    if end < 0:
        return Dropped("no end of turn follows the answer", f"{where}: expected {template.stop}")
    wrong = _wrong(template, said, i, whole[len(prompt) : end])
    end += len(template.stop)
    wrong = wrong or _marked_otherwise(template, said, i, whole, len(prompt), end)
    return wrong or _Turn(prompt, whole[len(prompt) : end], whole[end:])


_THINKING = ("reasoning_content", "reasoning", "thinking")


def _wrong(template: Template, said: Said, i: int, text: str) -> Dropped | None:
    """Why `text` is not what message i says."""
    message, where = said.messages[i], f"message {i + 1}"
    words, content = squeeze(text), squeeze(message.content)
    calls = message.extra.get("tool_calls")
    if not (content in words if calls else words.endswith(content)):
        return Dropped("the rendered answer is not the message", f"{where}: {words[:60]!r}")
    thoughts = [message.extra.get(key) for key in _THINKING]
    if any(isinstance(t, str) and squeeze(t) not in words for t in thoughts):
        return Dropped("the template does not show the thinking of the answer", where)
    if not shows_calls(message, words):
        return Dropped("the template does not show the tool calls", where)
    before, _, behind = words.rpartition(content) if content else (words, "", "")
    others = (squeeze(other.content) for other in said.messages[:i])
    if any(other and (other in before or other in behind) for other in others) and _holds_another(
        template, said, i
    ):
        return Dropped("the rendered answer holds another message", where)
    return None


def _holds_another(template: Template, said: Said, i: int) -> bool:
    """Whether the answer changes with the messages before it: each is replaced by a sign."""
    signs = [chr(0x100000 + j) for j in range(i)]
    messages = [
        message._replace(content=sign)
        for message, sign in zip(said.messages[:i], signs, strict=True)
    ]
    try:
        prompt = _rendered(template, messages, said.tools, prompt=True)
        whole = _rendered(template, [*messages, said.messages[i]], said.tools)
    except jinja.TemplateFailed:
        return True
    if not whole.startswith(prompt):
        return True
    answer = whole[len(prompt) : whole.find(template.stop, len(prompt))]
    return any(sign in answer for sign in signs)


def _marked_otherwise(
    template: Template, said: Said, i: int, whole: str, start: int, end: int
) -> Dropped | None:
    """Why the template's own `{% generation %}` contradicts whole[start:end]; None without any."""
    if not jinja.has_marks(template.jinja):
        return None
    where = f"message {i + 1}"
    try:
        text = _rendered(template, said.messages[: i + 1], said.tools, marked=True)
    except jinja.TemplateFailed:
        text = ""
    plain, marks = jinja.take_marks(text)
    if plain != whole:
        return Dropped("the template's generation marks cannot be read", where)
    mine = [(a, b) for a, b in marks if whole[max(a, start) : min(b, end)].strip()]
    if not mine:
        return Dropped("the template's generation marks leave the answer out", where)
    first, last = min(a for a, _ in mine), max(b for _, b in mine)
    if whole[end:last].strip() or first < min(start, _header(template, said, i)):
        return Dropped("the template's generation marks take in more than the answer", where)
    return None


def _header(template: Template, said: Said, i: int) -> int:
    """Where what the template writes for message i begins, its header included."""
    try:
        return len(_text(template, said, i)) if i else 0
    except jinja.TemplateFailed:
        return sys.maxsize


def _cut(
    full: str,
    turns: Mapping[int, _Turn | Dropped],
    weights: Mapping[int, float],
    background: float,
) -> Row | None:
    """`full` in spans, or None where it does not show a turn as inference would."""
    spans: list[Span] = []
    at = 0
    for i, turn in turns.items():
        if isinstance(turn, Dropped) or not full.startswith(turn.prompt + turn.answer):
            return None
        start = len(turn.prompt)
        if start < at:
            return None
        spans.append(Span(full[at:start], background))
        spans.append(Span(turn.answer, weights[i], answer=True))
        at = start + len(turn.answer)
    spans.append(Span(full[at:], background))
    return tuple(span for span in spans if span.text)


def _prompt_spans(
    template: Template, said: Said, background: float, upto: int | None = None
) -> Row:
    """What inference feeds for the first `upto` messages, cut at the answers in it."""
    prompt = _text(template, said, upto, prompt=True)
    turns = {
        i: _turn(template, said, i)
        for i, message in enumerate(said.messages[:upto])
        if message.role == "assistant"
    }
    whole = _cut(prompt, turns, dict.fromkeys(turns, background), background)
    if whole is None:
        return (Span(prompt, background),) if prompt else ()
    return tuple(span._replace(answer=False) for span in whole)


def _alone(
    template: Template,
    said: Said,
    i: int,
    turn: _Turn | Dropped,
    weight: float,
    background: float,
) -> Row | Dropped:
    """One row for answer i: the prompt as inference feeds it, then the answer."""
    if isinstance(turn, Dropped):
        return turn
    hidden = _hidden(said, turn.prompt, i)
    if hidden:
        return hidden
    row = [
        *_prompt_spans(template, said, background, i),
        Span(turn.answer, weight, answer=True),
        *([Span(turn.tail, background)] if turn.tail else []),
    ]
    return take_apart(tuple(row), said.typed, template.control)


def _hidden(said: Said, text: str, upto: int | None = None) -> Dropped | None:
    """Every message that is not the assistant's must appear in the text, every tool and call.

    What an assistant said or thought earlier may be left out: that is rewriting history.
    """
    words = squeeze(text)
    for i, message in enumerate(said.messages[:upto]):
        parts = (message.content, message.input)
        if message.role != "assistant" and not all(appears(part, words) for part in parts):
            return Dropped(
                f"the template does not show the {message.role} message", f"message {i + 1}"
            )
        if not shows_calls(message, words):
            return Dropped("the template does not show the tool calls", f"message {i + 1}")
    for tool in said.tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        name = function.get("name") if isinstance(function, Mapping) else function
        if isinstance(name, str) and not appears(name, words):
            return Dropped("the template does not show the tools", name)
    return None


def _stop_token(stop: str | None, tokenizer: Tokenizer) -> str:
    """`stop`, proven to be one control token of the tokenizer."""
    if not stop:
        raise ConfigError(
            "stop: the tokenizer names no eos_token, so nothing would end an answer. Set stop to "
            f"one of its control tokens: {_some(tokenizer.control)}."
        )
    if stop not in tokenizer.control:
        pieces = len(tokenizer.encode(stop))
        raise ConfigError(
            f"stop: {stop!r} is not a control token of the tokenizer (as text it is {pieces} "
            f"token{'s' if pieces != 1 else ''}), so generation could not stop at it exactly. Set "
            f"stop to one of: {_some(tokenizer.control)}."
        )
    return stop


def _some(tokens: Mapping[str, int]) -> str:
    shown = sorted(tokens, key=lambda token: tokens[token])[:8]
    return (", ".join(shown) or "(it has none)") + (", ..." if len(tokens) > len(shown) else "")


def _end_of_answer(after: str, stop: str | None, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Text behind {output} -> (blanks, end of turn, rest). Exactly one end of turn comes of it."""
    blanks = after[: len(after) - len(after.lstrip())]
    written = tokenizer.control_pattern.match(after, len(blanks))
    if stop and after.startswith(stop, len(blanks)):
        end = _stop_token(stop, tokenizer)
    elif written and not stop and written[0] != tokenizer.bos_token:
        end = written[0]
    else:
        return "", _stop_token(stop or tokenizer.eos_token, tokenizer), after
    return blanks, end, after[len(blanks) + len(end) :]


def _is_jinja(template: str) -> bool:
    return template.endswith(".jinja") or bool(re.search(r"\{%|\{\{.*\bmessages?\b", template))


def _foreign(template: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Name and source of a template that is not ours."""
    if template == "chat":
        if not tokenizer.chat_template:
            raise ConfigError(
                f"template 'chat': the tokenizer in {tokenizer.folder} has no chat template. "
                f"Choose one of: {', '.join(wording.NAMED)}."
            )
        return "chat", tokenizer.chat_template
    if not template.endswith(".jinja"):
        return "custom", template
    try:
        return Path(template).name, Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template: {template}: cannot be read: {error}.") from None


def _probed(template: Template, tokenizer: Tokenizer, stop: str | None) -> Template:
    """Learns how a foreign template ends an answer, by rendering one."""
    asked, said = Message("user", "jaxtuneasks"), Message("assistant", "jaxtunesays")
    try:
        text = _rendered(dataclasses.replace(template, system_prompt=""), (asked, said))
    except jinja.TemplateFailed as error:
        raise ConfigError(f"template '{template.name}' cannot be rendered: {error}") from None
    head, found, tail = text.rpartition(said.content)
    if not found or asked.content not in head:
        raise ConfigError(
            f"template '{template.name}' does not show a question and its answer; "
            f"it renders them as {text[:80]!r}."
        )
    behind = tail.lstrip()
    written = tokenizer.control_pattern.match(behind)
    end = stop if stop and behind.startswith(stop) else (written[0] if written else None)
    if end is None or (stop and end != stop):
        raise ConfigError(
            f"template '{template.name}' puts {behind[:20]!r} after an answer; expected "
            f"{repr(stop) if stop else 'a control token of the tokenizer'}, so that the model "
            "learns to stop. Set stop to what the template writes there, or choose another."
        )
    if template.system_prompt:
        try:
            shown = _rendered(template, (asked,), prompt=True)
        except jinja.TemplateFailed as error:
            raise ConfigError(
                f"system_prompt: template '{template.name}' refuses it: {error}"
            ) from None
        if squeeze(template.system_prompt) not in squeeze(shown):
            raise ConfigError(f"system_prompt: template '{template.name}' does not show it. Unset.")
    _stop_token(end, tokenizer)
    return dataclasses.replace(template, stop=end, stop_id=tokenizer.control[end])
