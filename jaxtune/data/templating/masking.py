"""Conversation -> spans: the one place that decides what is trained.

Every template is jinja and is rendered as transformers renders it. What is trained is derived from
the rendered text, the same way for all of them, by asking the template what the model will see: for
the assistant's message i

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

Special tokens that a message holds as text stay text (`literal_special_tokens`). Documents of
format `text` are the exception: they bring their own template, and their special tokens are meant.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxtune.config import ConfigError
from jaxtune.data.schema import Conversation, Document, Dropped, Message, Span
from jaxtune.data.templating import jinja
from jaxtune.data.templating.literal_special_tokens import (
    LiteralTokensNotFound,
    MaskedConversation,
    mask,
    take_apart,
    unmask,
)
from jaxtune.data.templating.rendered_checks import (
    appears,
    as_object,
    as_text,
    shows_calls,
    squeeze,
    with_calls,
)
from jaxtune.data.templating.template import Template

TrainOn = Literal["assistant", "last", "all"]
Row = tuple[Span, ...]


def render(
    template: Template,
    noun: Conversation | Document,
    *,
    train_on: TrainOn = "assistant",
    prompt_weight: float = 0.0,
) -> tuple[Row | Dropped, ...]:
    """Render the rows of one record: mostly one; one per answer if the template rewrites history.

    Joined, the spans of a row are the text as `apply_chat_template` renders it. What is no answer
    to train weighs `prompt_weight`, with `train_on` "all" 1, times the weight of its own message;
    so does an answer that `train_on` does not choose.
    """
    if isinstance(noun, Document):
        return (_document(template, noun.text),)
    background = 1.0 if train_on == "all" else prompt_weight
    weights = _weights(noun, train_on, background)
    if isinstance(weights, Dropped):
        return (weights,)
    try:
        template = template.for_conversation(noun)
        conversation = _masked(template, noun)
        full = _text(template, conversation)
        if conversation.tools and not _reads_tools(template, conversation, full):
            return (Dropped("the template does not show the tools", "it reads none"),)
    except jinja.TemplateFailed as error:
        return (Dropped(error.reason, str(error)),)
    turns = {i: _turn(template, conversation, i, full) for i in weights}
    in_prompt = {i for i, w in weights.items() if not w and noun.messages[i].weight is None}
    whole = _cut(full, turns, weights | dict.fromkeys(in_prompt, background), background)
    if whole is None:
        trained = [max(weights)] if train_on == "all" else [i for i in weights if weights[i] > 0]
        if background and any(_own_weight(m) for m in noun.messages[: trained[-1]]):
            return (_UNPLACED,)
        return tuple(
            _alone(template, conversation, i, turns[i], weights[i], background) for i in trained
        )
    placed = _weighted(template, conversation, full, whole, background) if background else whole
    if isinstance(placed, Dropped):
        return (placed,)
    return (
        _hidden(conversation, full)
        or take_apart(placed, conversation.literals, template.special_pattern),
    )


def _reads_tools(template: Template, conversation: MaskedConversation, full: str) -> bool:
    """Tell whether it writes something else without the tools: a name may stand in messages too."""
    try:
        return full != template.text(conversation.messages)
    except jinja.TemplateFailed:
        return True


def render_prompt(
    template: Template,
    messages: Sequence[Message],
    *,
    tools: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Row:
    """Render what inference feeds for `messages`, the generation prompt included; all weights 0.

    Its spans are cut exactly where those of a trained row are. Raises `ConfigError` when the
    template refuses the messages.
    """
    noun = Conversation(tuple(messages), tools, template_kwargs=kwargs or {})
    try:
        template = template.for_conversation(noun)
        conversation = _masked(template, noun)
        masked = _prompt_spans(template, conversation, 0.0)
    except jinja.TemplateFailed as error:
        raise ConfigError(f"template '{template.name}': {error.reason}: {error}") from None
    row = take_apart(masked, conversation.literals, template.special_pattern)
    if isinstance(row, Dropped):
        raise ConfigError(f"template '{template.name}': {row.reason}: {row.detail}")
    return row


class _RenderedAnswer(NamedTuple):
    prompt: str
    answer: str
    tail: str  # what `whole` holds behind the end of turn


def _document(template: Template, text: str) -> Row:
    """Put bos and eos around plain text, unless the text has brought them."""
    opening = "" if text.startswith(template.opening) else template.opening
    if text.rstrip().endswith(template.closing):
        text = text.rstrip()
    else:
        text += template.closing
    first = (Span(opening, 1.0),) if opening else ()
    return (*first, Span(text, 1.0, answer=True, document=True))


def _masked(template: Template, noun: Conversation) -> MaskedConversation:
    """Mask literal special tokens, in the form of the conversation that shows its tool calls.

    Arguments are given as they came; where the template cannot show them so (it joins strings, or
    would quote a string twice), as objects or as JSON text.
    """
    conversation = mask(template.special_pattern, noun.messages, noun.tools)
    if not any(message.extra.get("tool_calls") for message in noun.messages):
        return conversation
    for convert in (as_object, as_text):
        try:
            text = squeeze(_text(template, conversation))
            if all(shows_calls(message, text) for message in conversation.messages):
                return conversation
        except jinja.TemplateFailed:
            pass
        conversation = mask(
            template.special_pattern, [with_calls(m, convert) for m in noun.messages], noun.tools
        )
    return conversation


def _weights(
    noun: Conversation, train_on: TrainOn, background: float
) -> dict[int, float] | Dropped:
    """Give the weight of each assistant message, by its index; 0 of those that are not chosen."""
    messages = noun.messages
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        return Dropped("no answer to train", "the conversation has no assistant message")
    chosen = {
        "all": answers,
        "assistant": [i for i in answers if i >= noun.context],
        "last": answers[-1:],
    }[train_on]
    default = {i: float(i in chosen) for i in answers}
    weights = {i: default[i] if (w := messages[i].weight) is None else w for i in answers}
    for i, message in enumerate(messages):
        if i in weights:
            empty = not message.content.strip() and not message.extra.get("tool_calls")
            if weights[i] > 0 and empty:
                return Dropped("empty answer", f"message {i + 1}")
        elif message.weight and not background:
            return Dropped("weight on a message that is no answer", f"message {i + 1}")
    if not any(weights.values()):
        return Dropped("no answer to train", "every answer has weight 0")
    return weights


def _text(
    template: Template,
    conversation: MaskedConversation,
    upto: int | None = None,
    *,
    prompt: bool = False,
) -> str:
    """Render the first `upto` messages. Raises `jinja.TemplateFailed`."""
    text = template.text(conversation.messages[:upto], conversation.tools, prompt=prompt)
    if conversation.literals:
        plain = template.text(conversation.plain[:upto], conversation.plain_tools, prompt=prompt)
        if unmask(text, conversation.literals) != plain:
            raise LiteralTokensNotFound(", ".join(conversation.literals.values()))
    return text


def _turn(
    template: Template, conversation: MaskedConversation, i: int, full: str | None = None
) -> _RenderedAnswer | Dropped:
    """Show message i as inference meets it: prompt and answer, or why that cannot be shown."""
    where = f"message {i + 1}"
    try:
        prompt = _text(template, conversation, i, prompt=True)
        is_last = full is not None and i == len(conversation.messages) - 1
        whole = full if full is not None and is_last else _text(template, conversation, i + 1)
    except jinja.TemplateFailed as error:
        return Dropped(error.reason, f"up to {where}: {error}")
    if not whole.startswith(prompt):
        return Dropped(
            "the generation prompt does not begin the answer",
            f"{where}: the template does not write what inference is fed in front of the answer. "
            "Set another template, e.g. mistral or chatml, or a .jinja file whose generation "
            "prompt the answer continues",
        )
    end = whole.find(template.stop, len(prompt))
    if end < 0:
        return Dropped("no end of turn follows the answer", f"{where}: expected {template.stop}")
    wrong = _wrong(template, conversation, i, whole[len(prompt) : end])
    end += len(template.stop)
    wrong = wrong or _marked_otherwise(template, conversation, i, whole, len(prompt), end)
    return wrong or _RenderedAnswer(prompt, whole[len(prompt) : end], whole[end:])


_THINKING = ("reasoning_content", "reasoning", "thinking")


def _wrong(
    template: Template, conversation: MaskedConversation, i: int, text: str
) -> Dropped | None:
    """Explain why `text` is not what message i says; None if it is."""
    message, where = conversation.messages[i], f"message {i + 1}"
    if text == message.content and not message.extra:
        return None
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
    others = (squeeze(other.content) for other in conversation.messages[:i])
    if any(other and (other in before or other in behind) for other in others) and _holds_another(
        template, conversation, i
    ):
        return Dropped("the rendered answer holds another message", where)
    return None


def _holds_another(template: Template, conversation: MaskedConversation, i: int) -> bool:
    """Tell whether the answer changes with the messages before it: each is replaced by a sign."""
    signs = [chr(0x100000 + j) for j in range(i)]
    messages = [
        message._replace(content=sign)
        for message, sign in zip(conversation.messages[:i], signs, strict=True)
    ]
    try:
        prompt = template.text(messages, conversation.tools, prompt=True)
        whole = template.text([*messages, conversation.messages[i]], conversation.tools)
    except jinja.TemplateFailed:
        return True
    if not whole.startswith(prompt):
        return True
    answer = whole[len(prompt) : whole.find(template.stop, len(prompt))]
    return any(sign in answer for sign in signs)


def _marked_otherwise(
    template: Template, conversation: MaskedConversation, i: int, whole: str, start: int, end: int
) -> Dropped | None:
    """Explain why the template's `{% generation %}` contradicts whole[start:end], or None."""
    if not jinja.has_marks(template.jinja):
        return None
    where = f"message {i + 1}"
    try:
        text = template.text(conversation.messages[: i + 1], conversation.tools, marked=True)
    except jinja.TemplateFailed:
        text = ""
    plain, marks = jinja.take_marks(text)
    if plain != whole:
        return Dropped("the template's generation marks cannot be read", where)
    mine = [(a, b) for a, b in marks if whole[max(a, start) : min(b, end)].strip()]
    if not mine:
        return Dropped("the template's generation marks leave the answer out", where)
    first, last = min(a for a, _ in mine), max(b for _, b in mine)
    if whole[end:last].strip() or first < min(start, _header(template, conversation, i)):
        return Dropped("the template's generation marks take in more than the answer", where)
    return None


def _header(template: Template, conversation: MaskedConversation, i: int) -> int:
    """Find the beginning of what the template writes for message i, its header included."""
    try:
        return len(_text(template, conversation, i)) if i else 0
    except jinja.TemplateFailed:
        return sys.maxsize


def _cut(
    full: str,
    turns: Mapping[int, _RenderedAnswer | Dropped],
    weights: Mapping[int, float],
    background: float,
) -> Row | None:
    """Cut `full` in spans; None if it does not show a turn as inference would."""
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


_UNPLACED = Dropped(
    "a message has a weight of its own, but the template does not show where it stands",
    "use train_on: assistant without prompt_loss_weight, or a template that leaves earlier turns "
    "as they were",
)


def _own_weight(message: Message) -> bool:
    return message.weight not in (None, 1.0)


def _weighted(
    template: Template, conversation: MaskedConversation, full: str, row: Row, background: float
) -> Row | Dropped:
    """Scale messages in `row` (all of `full`) that are no answers by the weights they bring."""
    for i, message in enumerate(conversation.messages):
        weight = message.weight
        if message.role == "assistant" or weight is None or not _own_weight(message):
            continue
        try:
            before = _text(template, conversation, i) if i else ""
            behind = _text(template, conversation, i + 1)
        except jinja.TemplateFailed:
            return _UNPLACED
        if not (full.startswith(behind) and behind.startswith(before)):
            return _UNPLACED
        row = _between(row, len(before), len(behind), weight * background)
    return row


def _between(row: Row, start: int, end: int, weight: float) -> Row:
    """Set `weight` from `start` to `end` of the text of `row`, answers aside."""
    spans: list[Span] = []
    at = 0
    for span in row:
        edges = sorted({0, len(span.text), *(e - at for e in (start, end) if e - at > 0)})
        for a, b in itertools.pairwise(e for e in edges if e <= len(span.text)):
            inside = start <= at + a < end and not span.answer
            part = span._replace(text=span.text[a:b], weight=weight if inside else span.weight)
            spans.append(span if span.answer else part)
            if span.answer:
                break
        at += len(span.text)
    return tuple(spans)


def _prompt_spans(
    template: Template, conversation: MaskedConversation, background: float, upto: int | None = None
) -> Row:
    """Cut what inference feeds for the first `upto` messages at the answers in it."""
    prompt = _text(template, conversation, upto, prompt=True)
    turns = {
        i: _turn(template, conversation, i)
        for i, message in enumerate(conversation.messages[:upto])
        if message.role == "assistant"
    }
    whole = _cut(prompt, turns, dict.fromkeys(turns, background), background)
    if whole is None:
        return (Span(prompt, background),) if prompt else ()
    return tuple(span._replace(answer=False) for span in whole)


def _alone(
    template: Template,
    conversation: MaskedConversation,
    i: int,
    turn: _RenderedAnswer | Dropped,
    weight: float,
    background: float,
) -> Row | Dropped:
    """Make one row for answer i: the prompt as inference feeds it, then the answer."""
    if isinstance(turn, Dropped):
        return turn
    hidden = _hidden(conversation, turn.prompt, i)
    if hidden:
        return hidden
    row = [
        *_prompt_spans(template, conversation, background, i),
        Span(turn.answer, weight, answer=True),
        *([Span(turn.tail, background)] if turn.tail else []),
    ]
    return take_apart(tuple(row), conversation.literals, template.special_pattern)


def _hidden(conversation: MaskedConversation, text: str, upto: int | None = None) -> Dropped | None:
    """Name a message, tool or call that must appear in the text and does not.

    What an assistant conversation or thought earlier may be left out: that is rewriting history.
    """
    others = [m for m in conversation.messages[:upto] if m.role != "assistant"]
    calling = conversation.tools or any(
        m.extra.get("tool_calls") for m in conversation.messages[:upto]
    )
    if not calling and all(m.content in text and m.input in text for m in others):
        return None
    words = squeeze(text)
    for i, message in enumerate(conversation.messages[:upto]):
        parts = (message.content, message.input)
        if message.role != "assistant" and not all(appears(part, words) for part in parts):
            return Dropped(
                f"the template does not show the {message.role} message", f"message {i + 1}"
            )
        if not shows_calls(message, words):
            return Dropped("the template does not show the tool calls", f"message {i + 1}")
    for tool in conversation.tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        name = function.get("name") if isinstance(function, Mapping) else function
        if isinstance(name, str) and not appears(name, words):
            return Dropped("the template does not show the tools", name)
    return None
