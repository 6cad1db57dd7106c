"""Conversation -> spans: the one place that decides what is trained.

Every template is jinja (ours come from `wording`) and is rendered as transformers renders it. What
is trained is derived from the rendered text, the same way for all of them, by asking the template
what the model will see: for the assistant's message i

    prompt = render(messages[:i], generation prompt)        what inference feeds
    whole  = render(messages[:i+1])                         what must come out of it
    answer = whole[len(prompt):], up to and including the first end of turn

so the answer holds whatever the template itself puts behind the generation prompt. It is checked:
it ends with the message's content and one end of turn, and holds no other message's content. Where
each `prompt + answer` is a prefix of the full conversation, the conversation is one row. Where it
is not (the template rewrites earlier turns, or ends only the last one), it becomes one row per
trained answer, each as inference will show it. What cannot be shown is `Dropped`.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtune.config import ConfigError, nearest
from jaxtune.data import jinja, wording
from jaxtune.data.schema import Conversation, Document, Dropped, Message, Span
from jaxtune.data.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last", "all"]
Row = tuple[Span, ...]

# What `strftime_now` tells: the date Llama 3.1's template falls back to. Only that it never moves
# matters; a template that asks for today would otherwise make other tokens every day.
DATE = datetime.date(2024, 7, 26)


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
    date: datetime.date = DATE,
) -> Template:
    """`auto`, `chat`, a name, a string with placeholders, a .jinja file or jinja itself.

    Raises `ConfigError` when the template is unknown, the tokenizer lacks a token it needs, or an
    answer would not end with exactly one token of the tokenizer.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "alpaca"
    bos = tokenizer.bos_token if tokenizer.begins_with_bos else None
    system = system_prompt or ""
    ours = True
    if template in wording.NAMED:
        name, choice = template, wording.NAMED[template]
        missing = [token for token in choice.needs if token not in tokenizer.control]
        if missing:
            raise ConfigError(
                f"template '{name}' needs control tokens that this tokenizer lacks: "
                f"{', '.join(missing)}. Choose one written in plain text, such as alpaca or "
                "llama2, or a tokenizer that has them."
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
        source = wording.from_placeholders(parts, setting, lead_out=lead_out, rest=rest)
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
        date=date,
    )
    return resolved if ours else _probed(resolved, tokenizer, stop)


def render(
    template: Template, noun: Conversation | Document, *, train_on: TrainOn = "assistant"
) -> tuple[Row | Dropped, ...]:
    """The rows of one record: mostly one; one per answer where the template rewrites history.

    Joined, the spans of a row are the text as `apply_chat_template` renders it.
    """
    if isinstance(noun, Document):
        text = template.opening + noun.text + template.closing
        return ((Span(text, 1.0, answer=True),),)
    messages = noun.messages
    if noun.tools or any("tool_calls" in message.extra for message in messages):
        return (Dropped("tools are not rendered", "the row declares or calls tools"),)
    weights = _weights(messages, train_on)
    if isinstance(weights, Dropped):
        return (weights,)
    try:
        full = _text(template, messages)
    except jinja.TemplateFailed as error:
        return (Dropped("the template refuses the conversation", str(error)),)
    turns = {i: _turn(template, messages, i, full) for i in weights}
    background = 1.0 if train_on == "all" else 0.0
    whole = _cut(full, turns, weights, background)
    if whole is not None:
        return (_shown(messages, full) or whole,)
    trained = [max(weights)] if train_on == "all" else [i for i in weights if weights[i] > 0]
    return tuple(_alone(template, messages, i, turns[i], weights[i], background) for i in trained)


def render_prompt(template: Template, messages: Sequence[Message]) -> Row:
    """What inference feeds for `messages`, the generation prompt included; all weights 0.

    Its spans are cut exactly where those of a trained row are. Raises `ConfigError` when the
    template refuses the messages.
    """
    try:
        return _prompt_spans(template, messages, 0.0)
    except jinja.TemplateFailed as error:
        raise ConfigError(f"template '{template.name}' refuses the conversation: {error}") from None


class _Turn(NamedTuple):
    prompt: str
    answer: str
    tail: str  # what `whole` holds behind the end of turn


def _weights(messages: Sequence[Message], train_on: TrainOn) -> dict[int, float] | Dropped:
    """Weight of each assistant message, by its index."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        return Dropped("no answer to train", "the conversation has no assistant message")
    default = {i: float(train_on != "last" or i == answers[-1]) for i in answers}
    weights = {i: default[i] if (w := messages[i].weight) is None else w for i in answers}
    for i, message in enumerate(messages):
        if i in weights:
            if weights[i] > 0 and not message.content.strip():
                return Dropped("empty answer", f"message {i + 1}")
        elif message.weight and train_on != "all":
            return Dropped("weight on a message that is no answer", f"message {i + 1}")
    if not any(weights.values()):
        return Dropped("no answer to train", "every answer has weight 0")
    return weights


def _text(template: Template, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The rendered text; raises `jinja.TemplateFailed`."""
    plain: list[dict[str, str]] = []
    brings_none = bool(messages) and messages[0].role != "system"
    if not template.ours and template.system_prompt and brings_none:
        plain.append({"role": "system", "content": template.system_prompt})
    for message in messages:
        if template.ours:
            extra = {"input": message.input} if message.input else {}
            plain.append({"role": message.role, "content": message.content, **extra})
        else:
            content = "\n".join(filter(None, (message.content, message.input)))
            plain.append({"role": message.role, "content": content})
    return jinja.render(
        template.jinja,
        plain,
        add_generation_prompt=prompt,
        date=template.date,
        named=template.named,
    )


def _turn(
    template: Template, messages: Sequence[Message], i: int, full: str | None = None
) -> _Turn | Dropped:
    """Message i as inference meets it: its prompt and its answer, or why that cannot be shown."""
    content = messages[i].content
    where = f"message {i + 1}"
    if template.stop in content:
        return Dropped("the answer contains the end of turn", f"{where}: {template.stop}")
    try:
        prompt = _text(template, messages[:i], prompt=True)
        is_last = full is not None and i == len(messages) - 1
        whole = full if full is not None and is_last else _text(template, messages[: i + 1])
    except jinja.TemplateFailed as error:
        return Dropped("the template refuses the conversation", f"up to {where}: {error}")
    if not whole.startswith(prompt):
        return Dropped("the generation prompt does not begin the answer", where)
    end = whole.find(template.stop, len(prompt))
    if end < 0:
        return Dropped("no end of turn follows the answer", f"{where}: expected {template.stop}")
    said = _squeeze(whole[len(prompt) : end])
    if not said.endswith(_squeeze(content)):
        return Dropped("the rendered answer is not the message", f"{where}: {said[:60]!r}")
    head = said[: len(said) - len(_squeeze(content))]
    others = (_squeeze(m.content) for j, m in enumerate(messages[:i]) if j != i)
    if head and any(other and other in head for other in others):
        return Dropped("the rendered answer holds another message", where)
    end += len(template.stop)
    return _Turn(prompt, whole[len(prompt) : end], whole[end:])


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


def _prompt_spans(template: Template, messages: Sequence[Message], background: float) -> Row:
    prompt = _text(template, messages, prompt=True)
    turns = {
        i: _turn(template, messages, i)
        for i, message in enumerate(messages)
        if message.role == "assistant"
    }
    whole = _cut(prompt, turns, dict.fromkeys(turns, background), background)
    if whole is None:
        return (Span(prompt, background),) if prompt else ()
    return tuple(span._replace(answer=False) for span in whole)


def _alone(
    template: Template,
    messages: Sequence[Message],
    i: int,
    turn: _Turn | Dropped,
    weight: float,
    background: float,
) -> Row | Dropped:
    """One row for answer i: the prompt as inference feeds it, then the answer."""
    if isinstance(turn, Dropped):
        return turn
    hidden = _shown(messages[:i], turn.prompt)
    if hidden:
        return hidden
    answer = (Span(turn.answer, weight, answer=True), Span(turn.tail, background))
    return _prompt_spans(template, messages[:i], background) + answer[: 2 if turn.tail else 1]


def _shown(messages: Sequence[Message], text: str) -> Dropped | None:
    """Every message that is not the assistant's must appear in the text."""
    seen = _squeeze(text)
    for i, message in enumerate(messages):
        parts = (message.content, message.input)
        if message.role != "assistant" and not all(_squeeze(part) in seen for part in parts):
            return Dropped(
                f"the template does not show the {message.role} message", f"message {i + 1}"
            )
    return None


def _squeeze(text: str) -> str:
    """Templates trim and join; what counts is that nothing else is lost."""
    return "".join(text.split())


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
        text = _text(dataclasses.replace(template, system_prompt=""), (asked, said))
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
            shown = _text(template, (asked,), prompt=True)
        except jinja.TemplateFailed as error:
            raise ConfigError(
                f"system_prompt: template '{template.name}' refuses it: {error}"
            ) from None
        if _squeeze(template.system_prompt) not in _squeeze(shown):
            raise ConfigError(f"system_prompt: template '{template.name}' does not show it. Unset.")
    _stop_token(end, tokenizer)
    return dataclasses.replace(template, stop=end, stop_id=tokenizer.control[end])
