"""Render one answer: what inference feeds, what must come out, the proof that it is the message.

For the assistant's message i

    prompt = render(messages[:i], generation prompt)        what inference feeds
    whole  = render(messages[:i+1])
    answer = what `whole` writes behind `prompt`, up to where generation stops

Where `whole` does not begin with `prompt`, it is one of three things. The prompt opens or closes a
block of thinking that the template leaves out of such an answer (`thinking`). Or the template
rewrites earlier messages in the same render; then the answer is what the template writes for the
message behind a question of ours, if `whole` ends with that. Or it cannot be shown.

Generation stops at the first token that completes a turn of this template (`Template.ends`). Where
the template ends no turn, it stops at the token that opens the next one, which is then the answer's
last.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from jaxtune.data.schema import Dropped, Message
from jaxtune.data.templating import jinja, thinking
from jaxtune.data.templating.literal_special_tokens import (
    LiteralTokensNotFound,
    MaskedConversation,
    unmask,
)
from jaxtune.data.templating.probes import QUESTION
from jaxtune.data.templating.rendered_checks import squeeze
from jaxtune.data.templating.template import Template


class RenderedAnswer(NamedTuple):
    """A message as inference meets it."""

    prompt: str
    answer: str  # its end of turn included
    tail: str  # what the template writes behind that


def rendered_text(
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


def rendered_answer(
    template: Template, conversation: MaskedConversation, i: int, full: str | None = None
) -> RenderedAnswer | Dropped:
    """Show message i as inference meets it, or why that cannot be shown.

    `full` is the whole conversation, if that was rendered.
    """
    message, where = conversation.messages[i], f"message {i + 1}"
    if not message.content.strip() and not message.extra.get("tool_calls"):
        return Dropped("empty answer", where)
    try:
        prompt = rendered_text(template, conversation, i, prompt=True)
        is_last = full is not None and i == len(conversation.messages) - 1
        whole = (
            full if full is not None and is_last else rendered_text(template, conversation, i + 1)
        )
    except jinja.TemplateFailed as error:
        return Dropped(error.reason, f"up to {where}: {error}")
    continued = _continued(template, conversation, i, prompt, whole)
    if isinstance(continued, Dropped):
        return continued
    lead, own = continued
    end = _end(template, message, own)
    if end is None:
        return Dropped(
            "no end of turn follows the answer", f"{where}: expected {template.ends.expected}"
        )
    said, closing, tail = end
    start = len(whole) - len(own)
    wrong = _wrong(template, conversation, i, lead + said, prompt) or _marked_otherwise(
        template, conversation, i, whole, start, len(whole) - len(tail)
    )
    return wrong or RenderedAnswer(prompt, lead + said + closing, tail)


_NOT_BEGUN = "the generation prompt does not begin the answer"
_CLOSED = "the generation prompt has closed the thinking that the answer has"


def _continued(
    template: Template, conversation: MaskedConversation, i: int, prompt: str, whole: str
) -> tuple[str, str] | Dropped:
    """Return what must follow `prompt`: text that no template writes, and the end of `whole`."""
    message, where = conversation.messages[i], f"message {i + 1}"
    if template.steers_thinking and thinking.closed(prompt) and thinking.thought(message):
        return Dropped(_CLOSED, f"{where}: {_enabling(template)}")
    own = _behind(template, prompt, whole)
    if own is None:
        own = _behind_rewritten(template, conversation, i, prompt, whole)
    if own is None:
        return Dropped(
            _NOT_BEGUN,
            f"{where}: the template does not write what inference is fed in front of the answer. "
            "Set another template, e.g. mistral or chatml, or a .jinja file whose generation "
            "prompt the answer continues",
        )
    if not template.steers_thinking or whole.startswith(prompt):
        return "", own
    tags = thinking.opened(prompt)
    return ("", own) if tags is None else thinking.completed(prompt, tags, message, own)


def _enabling(template: Template) -> str:
    switches = ("enable_thinking", "thinking")
    switch = next((name for name in switches if name in jinja.arguments(template.jinja)), None)
    if switch:
        return f"set chat_template_kwargs: {{{switch}: true}}, for inference too"
    return "take the thinking out, or set a template whose generation prompt leaves room for it"


def _behind(template: Template, prompt: str, whole: str) -> str | None:
    """Return what `whole` writes behind `prompt`, or behind all of it that answers begin with."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    header = prompt.removesuffix(template.prompt_only)
    if header != prompt and whole.startswith(header):
        return whole[len(header) :]
    return None


def _behind_rewritten(
    template: Template, conversation: MaskedConversation, i: int, prompt: str, whole: str
) -> str | None:
    """Return what the template writes for message i alone, if `whole` ends with it.

    None if it does not, or where one of both has the generation prompt before it and one has not.
    """
    alone = (QUESTION, conversation.messages[i])
    try:
        bare, fed = (template.text(alone[:1], conversation.tools, prompt=p) for p in (False, True))
        own = _behind(template, fed, template.text(alone, conversation.tools))
    except jinja.TemplateFailed:
        return None
    if not own or not fed.startswith(bare) or not whole.endswith(own):
        return None
    generation = fed[len(bare) :]
    header = generation.removesuffix(template.prompt_only)
    written = whole.removesuffix(own).endswith((generation, header))
    return own if written == prompt.endswith(generation) else None


def _end(template: Template, message: Message, own: str) -> tuple[str, str, str] | None:
    """Split what a template writes for a message: what is said, what ends the turn, the rest."""
    ends = template.ends
    found = [(at, token) for token in ends.final if (at := own.find(token)) >= 0]
    if found:
        at, token = min(found)
        end = at + len(token)
        start = end - len(ends.closing or token) if own[:end].endswith(ends.closing) else at
        return own[:start], own[start:end], own[end:]
    opening = ends.next_turn[bool(message.extra.get("tool_calls"))]
    return (own, opening, "") if opening else None


def _wrong(
    template: Template, conversation: MaskedConversation, i: int, text: str, prompt: str
) -> Dropped | None:
    """Explain why `text` behind `prompt` is not what message i says; None if it is."""
    message, where = conversation.messages[i], f"message {i + 1}"
    if text == message.content and not message.extra:
        return None
    words, content = squeeze(text), squeeze(message.content)
    if template.steers_thinking and (block := thinking.opened(prompt)):
        content = content.removeprefix(squeeze(block.opening))
    calls = message.extra.get("tool_calls")
    if not (content in words if calls else words.endswith(content)):
        return Dropped("the rendered answer is not the message", f"{where}: {words[:60]!r}")
    thought = thinking.field(message)
    if thought and squeeze(thought) not in words:
        return Dropped("the template does not show the thinking of the answer", where)
    if not template.call_form.shows(message, words):
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
    message = conversation.messages[i]
    try:
        prompt = template.text(messages, conversation.tools, prompt=True)
        whole = template.text([*messages, message], conversation.tools)
    except jinja.TemplateFailed:
        return True
    own = _behind(template, prompt, whole)
    end = None if own is None else _end(template, message, own)
    return end is None or any(sign in end[0] for sign in signs)


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
        return len(rendered_text(template, conversation, i)) if i else 0
    except jinja.TemplateFailed:
        return sys.maxsize
