"""Conversation -> spans: the one place that decides what is trained.

Every template is jinja and is rendered as transformers renders it. What is trained is derived from
the rendered text, the same way for all of them, by asking the template what the model will see
(`turns`): for the assistant's message i

    prompt = render(messages[:i], generation prompt)        what inference feeds
    answer = what it writes for message i behind that, up to where generation stops

The rules:

1. An answer is proven: it holds the message's content, thinking and tool calls, in its own text,
   ends with one end of turn, and holds no other message's content.
2. Where each `prompt + answer` begins the full conversation, the conversation is one row. Where one
   does not (the template rewrites earlier turns, or ends only the last one), it becomes one row per
   trained answer, each as inference will show it.
3. An answer that cannot be proven is context, and its reason stands in `Span.untrained`. A
   conversation of which none can, or that hides a question, a result or the tools, is `Dropped`;
   so is one with calls if the template knows neither tools nor calls.

`{% generation %}` in a template is its author's word on the same question. The derived answer is
trained either way (marks often leave out the end of turn, or take in the header that inference
feeds); an answer that the marks leave out, or whose marks take in more than header, answer and
blanks, is dropped.

Special tokens that a message holds as text stay text (`literal_special_tokens`). Documents of
format `text` are the exception: they bring their own template, and their special tokens are meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtune.config import ConfigError
from jaxtune.data.schema import Conversation, Document, Dropped, Message, Span
from jaxtune.data.templating import jinja, tool_calls
from jaxtune.data.templating.literal_special_tokens import MaskedConversation, mask, take_apart
from jaxtune.data.templating.rendered_checks import appears, squeeze
from jaxtune.data.templating.template import Template
from jaxtune.data.templating.turns import RenderedAnswer, rendered_answer, rendered_text

TrainOn = Literal["assistant", "last", "all"]
Row = tuple[Span, ...]


def render(
    template: Template,
    noun: Conversation | Document,
    *,
    train_on: TrainOn = "assistant",
    prompt_weight: float = 0.0,
) -> tuple[Row | Dropped, ...]:
    """Render a record: one row, or one per answer if the template rewrites history, or `Dropped`.

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
    except jinja.TemplateFailed as error:
        return (Dropped(error.reason, str(error)),)
    if isinstance(conversation, Dropped):
        return (conversation,)
    return _rows(template, conversation, weights, background, last_alone=train_on == "all")


def _rows(
    template: Template,
    conversation: MaskedConversation,
    weights: Mapping[int, float],
    background: float,
    *,
    last_alone: bool,
) -> tuple[Row | Dropped, ...]:
    """Make rows that train each answer with weight that can be shown; others are context.

    With `last_alone`, what cannot be one row is the last such answer's alone.
    """
    full = _full(template, conversation)
    if isinstance(full, str) and not template.reads_tools:
        if conversation.tools:
            return (Dropped("the template does not show the tools", "it reads none"),)
        calling = _calling(conversation)
        if calling is not None and not template.call_form.shown:
            return (Dropped("the template does not show the tool calls", f"message {calling + 1}"),)
    whole = full if isinstance(full, str) else None
    turns = {i: rendered_answer(template, conversation, i, whole) for i in weights}
    shown = [i for i, turn in turns.items() if weights[i] and not isinstance(turn, Dropped)]
    lost = [turn for i, turn in turns.items() if weights[i] and isinstance(turn, Dropped)]
    if not shown:
        return (full if isinstance(full, Dropped) else lost[0],)
    row = _one_row(template, conversation, whole, turns, weights, background)
    if row is not None:
        return (row if isinstance(row, Dropped) else _noting(row, lost),)
    shown = shown[-1:] if last_alone else shown
    if background and any(_own_weight(m) for m in conversation.messages[: shown[-1]]):
        return (_UNPLACED,)
    rows = []
    for i in shown:
        made = _row_of(template, conversation, i, turns, weights[i], background)
        if isinstance(made, Dropped):
            lost.append(made)
        else:
            rows.append(made)
    return (_noting(rows[0], lost), *rows[1:]) if rows else (lost[0],)


def _calling(conversation: MaskedConversation) -> int | None:
    """Return the index of the first message with tool calls."""
    messages = enumerate(conversation.messages)
    return next((i for i, message in messages if message.extra.get("tool_calls")), None)


def _full(template: Template, conversation: MaskedConversation) -> str | Dropped:
    try:
        return rendered_text(template, conversation)
    except jinja.TemplateFailed as error:
        return Dropped(error.reason, str(error))


def _noting(row: Row, lost: Sequence[Dropped]) -> Row:
    """Note on the first span of a row which answers are context against the data's will."""
    return (row[0]._replace(untrained=tuple(lost)), *row[1:]) if lost else row


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
        if isinstance(conversation, Dropped):
            raise ConfigError(f"messages: {conversation.text}")
        prompt = rendered_text(template, conversation, prompt=True)
        turns = {
            i: rendered_answer(template, conversation, i)
            for i, message in enumerate(messages)
            if message.role == "assistant"
        }
        masked = _prompt_spans(prompt, turns, 0.0)
    except jinja.TemplateFailed as error:
        raise ConfigError(f"template '{template.name}': {error.reason}: {error}") from None
    row = take_apart(masked, conversation.literals, template.special_pattern)
    if isinstance(row, Dropped):
        raise ConfigError(f"template '{template.name}': {row.text}")
    return row


def _document(template: Template, text: str) -> Row:
    """Put bos and eos around plain text, unless the text has brought them."""
    opening = "" if text.startswith(template.opening) else template.opening
    if text.rstrip().endswith(template.closing):
        text = text.rstrip()
    else:
        text += template.closing
    first = (Span(opening, 1.0),) if opening else ()
    return (*first, Span(text, 1.0, answer=True, document=True))


def _masked(template: Template, noun: Conversation) -> MaskedConversation | Dropped:
    """Mask literal special tokens, in the form of the conversation that shows its tool calls."""
    messages = noun.messages
    if any(message.extra.get("tool_calls") for message in messages):
        for i, message in enumerate(messages):
            if broken := tool_calls.broken_arguments(message):
                return Dropped(
                    "the arguments of a tool call are no JSON object", f"message {i + 1}: {broken}"
                )
        messages = tuple(template.call_form.given(message) for message in messages)
    return mask(template.special_pattern, messages, noun.tools)


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
        if i not in weights and message.weight and not background:
            return Dropped("weight on a message that is no answer", f"message {i + 1}")
    if not any(weights.values()):
        return Dropped("no answer to train", "every answer has weight 0")
    return weights


def _one_row(
    template: Template,
    conversation: MaskedConversation,
    full: str | None,
    turns: Mapping[int, RenderedAnswer | Dropped],
    weights: Mapping[int, float],
    background: float,
) -> Row | Dropped | None:
    """Make one row of the conversation; None if it shows an answer otherwise than inference."""
    if full is None:
        return None
    last = turns.get(len(conversation.messages) - 1)
    if isinstance(last, RenderedAnswer) and (last.prompt + last.answer).startswith(full):
        full = last.prompt + last.answer  # with the token that would open the next turn
    in_prompt = [i for i in weights if not weights[i] and conversation.messages[i].weight is None]
    row = _cut(full, turns, {**weights, **dict.fromkeys(in_prompt, background)}, background)
    if row is None or _hidden(conversation, full):
        return None
    placed = _weighted(template, conversation, full, row, background) if background else row
    if isinstance(placed, Dropped):
        return placed
    return take_apart(placed, conversation.literals, template.special_pattern)


def _cut(
    full: str,
    turns: Mapping[int, RenderedAnswer | Dropped],
    weights: Mapping[int, float],
    background: float,
) -> Row | None:
    """Cut `full` at each answer that can be shown; None if inference would show one otherwise."""
    spans: list[Span] = []
    at = 0
    for i, turn in turns.items():
        if isinstance(turn, Dropped):
            continue
        start = len(turn.prompt)
        if start < at or not full.startswith(turn.prompt + turn.answer):
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
            before = rendered_text(template, conversation, i) if i else ""
            behind = rendered_text(template, conversation, i + 1)
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
    prompt: str, turns: Mapping[int, RenderedAnswer | Dropped], background: float
) -> Row:
    """Cut what inference feeds at the answers in it."""
    whole = _cut(prompt, turns, dict.fromkeys(turns, background), background)
    if whole is None:
        return (Span(prompt, background),) if prompt else ()
    return tuple(span._replace(answer=False) for span in whole)


def _row_of(
    template: Template,
    conversation: MaskedConversation,
    i: int,
    turns: Mapping[int, RenderedAnswer | Dropped],
    weight: float,
    background: float,
) -> Row | Dropped:
    """Make one row for answer i: the prompt as inference feeds it, then the answer."""
    turn = turns[i]
    if isinstance(turn, Dropped):
        return turn
    if hidden := _hidden(conversation, turn.prompt, i):
        return hidden
    row = [
        *_prompt_spans(turn.prompt, {j: turns[j] for j in turns if j < i}, background),
        Span(turn.answer, weight, answer=True),
        *([Span(turn.tail, background)] if turn.tail else []),
    ]
    return take_apart(tuple(row), conversation.literals, template.special_pattern)


def _hidden(conversation: MaskedConversation, text: str, upto: int | None = None) -> Dropped | None:
    """Name a message or tool that must appear in the text and does not.

    What the assistant said, thought or called earlier may be left out: that is rewriting history,
    and each answer is held against its own text.
    """
    others = [m for m in conversation.messages[:upto] if m.role != "assistant"]
    if not conversation.tools and all(m.content in text and m.input in text for m in others):
        return None
    words = squeeze(text)
    for i, message in enumerate(conversation.messages[:upto]):
        parts = (message.content, message.input)
        if message.role != "assistant" and not all(appears(part, words) for part in parts):
            return Dropped(
                f"the template does not show the {message.role} message", f"message {i + 1}"
            )
    for tool in conversation.tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        name = function.get("name") if isinstance(function, Mapping) else function
        if isinstance(name, str) and not appears(name, words):
            return Dropped("the template does not show the tools", name)
    return None
