"""Learn what a template does by rendering: how turns end, how calls are taken.

Chat templates are programs. Rather than read them, ask them: each function renders a question that
no data holds and looks at what the template made of it. Knows no tokenizer but its special tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from jaxtune.data.schema import Message
from jaxtune.data.templating import jinja, thinking
from jaxtune.data.templating.rendered_checks import squeeze
from jaxtune.data.templating.tool_calls import CallForm

# Turns that are rendered to see what a template makes of them.
QUESTION, ANSWER = Message("user", "jaxtuneasks"), Message("assistant", "jaxtunesays")
_NEXT = Message("user", "jaxtunegoeson")
_KEY, _VALUE, _NAMES = "jaxtunekey", "jaxtunevalue", ("jaxtuneone", "jaxtunetwo")
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "jaxtune describes",
            "parameters": {
                "type": "object",
                "properties": {_KEY: {"type": "string", "description": "jaxtune describes"}},
                "required": [_KEY],
            },
        },
    }
    for name in _NAMES
)
_IDS = ("jaxtune01", "jaxtune02")  # Mistral's templates want nine letters or digits
_RESULT = Message("tool", "jaxtuneresult", extra={"name": _NAMES[0], "tool_call_id": _IDS[0]})


class Render(Protocol):
    """A template's `text`: renders messages, with tools, with the generation prompt."""

    def __call__(
        self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False
    ) -> str: ...


class Ends(NamedTuple):
    """A template's ways to end the assistant's turn.

    `final` are the special tokens that complete a turn, that of a plain answer first. `closing` is
    all text behind a plain answer up to that, and `earlier` are tokens in it at which generation
    may stop as well. Where the template ends no turn, `next_turn` names the special token that
    opens the one behind: behind a plain answer, and behind one with calls.
    """

    final: tuple[str, ...] = ()
    closing: str = ""
    earlier: tuple[str, ...] = ()
    next_turn: tuple[str, str] = ("", "")

    @property
    def expected(self) -> str:
        """Name the tokens that complete a turn, for messages."""
        return " or ".join(self.final or filter(None, self.next_turn))

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the tokens at which generation stops, that of a plain answer first."""
        plain = self.final[:1] if self.closing else self.next_turn[:1]
        every = (*plain, *self.final, *self.earlier, *self.next_turn)
        return tuple(dict.fromkeys(filter(None, every)))


def calling(form: CallForm, count: int = 1) -> Message:
    """Make an answer that calls the first `count` tools."""
    arguments = {_KEY: _VALUE} if form.objects else f'{{"{_KEY}": "{_VALUE}"}}'
    calls = [
        {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, number in zip(_NAMES[:count], _IDS, strict=False)
    ]
    return form.given(Message("assistant", "", extra={"tool_calls": calls}))


def call_form(text: Render) -> CallForm:
    """Learn in which form a template shows the arguments of calls."""
    for null_content in (False, True):
        forms = {}
        for objects in (True, False):
            form = CallForm(objects, not objects, null_content)
            shown = squeeze(_behind(text, (QUESTION, calling(form))))
            named = _NAMES[0] in shown and _KEY in shown and _VALUE in shown
            verbatim = f'{{"{_KEY}":"{_VALUE}"}}' in shown
            # An object joined to a string is Python's repr, which no model is to write.
            forms[objects] = named and (f"'{_KEY}'" not in shown if objects else verbatim)
        if any(forms.values()):
            form = CallForm(forms[True], forms[False], null_content)
            two = _behind(text, (QUESTION, calling(form, 2)))
            return form._replace(single=bool(two) and _NAMES[1] not in two)
    return CallForm()


def reads_tools(text: Render) -> bool:
    """Tell whether the template shows the model which tools there are."""
    try:
        return _NAMES[0] in text((QUESTION,), TOOLS)
    except jinja.TemplateFailed:
        return False


def prompt_only(text: Render) -> str:
    """Return what ends the generation prompt and does not begin a plain answer: "<think>\\n".

    Only blanks and blocks of thinking are such an end.
    """
    prompt, whole = _text(text, (QUESTION,), prompt=True), _text(text, (QUESTION, ANSWER))
    pairs = enumerate(zip(prompt, whole, strict=False))
    rest = prompt[next((at for at, (a, b) in pairs if a != b), len(whole)) :]
    return rest if not rest.strip() or thinking.opened(rest) or thinking.closed(rest) else ""


def steers_thinking(text: Render) -> bool:
    """Tell whether a generation prompt, of a question or a result, opens or closes a block."""
    asked = ((QUESTION,), (QUESTION, calling(call_form(text)), _RESULT))
    prompts = [_text(text, messages, prompt=True) for messages in asked]
    return any(thinking.opened(prompt) or thinking.closed(prompt) for prompt in prompts)


def ends(text: Render, special: re.Pattern[str], stop: str | None = None) -> Ends:
    """Learn how a template ends turns; `stop` is the end of a plain answer where the user sets it.

    No `stops` if a plain answer ends with no special token, or not with `stop`.
    """
    alone = _behind(text, (QUESTION, ANSWER)).partition(ANSWER.content)[2]
    followed = _behind(text, (QUESTION, ANSWER, _NEXT)).partition(ANSWER.content)[2]
    run = _tokens_at_end(alone, special) or _tokens_at_start(alone, special)
    run = _of_the_turn(text, special, run, alone, followed)
    opening = "" if run else _opening(alone, followed, special)
    if stop:
        run = [part for part in special.finditer(alone) if part[0] == stop][:1]
        opening = opening if opening == stop else ""
    if not run and not opening:
        return Ends()
    whole = _text(text, (QUESTION, ANSWER))
    final, opening_behind_call = _ends_of_calls(text, special)
    return Ends(
        final=tuple(dict.fromkeys((*(part[0] for part in run[-1:]), *final))),
        closing=alone[: run[-1].end()] if run else "",
        earlier=tuple(part[0] for part in run[:-1] if whole.count(part[0]) == 1),
        next_turn=(opening, opening_behind_call or opening),
    )


def _ends_of_calls(text: Render, special: re.Pattern[str]) -> tuple[list[str], str]:
    """Learn the tokens that complete a turn with calls, and what opens the next if none does."""
    form = call_form(text)
    if not form.shown:
        return [], ""
    one, two = (_behind(text, (QUESTION, calling(form, count))) for count in (1, 2))
    followed = _behind(text, (QUESTION, calling(form), _RESULT))
    run = _of_the_turn(text, special, _tokens_at_end(one, special), one, followed)
    final = [part[0] for part in run[-1:]]
    opening = ""
    if _NAMES[1] in two:
        # A token that is there once for each call closes the call, not the turn.
        final = [token for token in final if two.count(token) <= one.count(token)]
        last = [part[0] for part in _tokens_at_end(two, special)[-1:]]
        final += [token for token in last if two.count(token) == 1]
    if not any(token in one for token in final):
        opening = _opening(one, followed, special)
    return final, opening


def _of_the_turn(
    text: Render,
    special: re.Pattern[str],
    run: Sequence[re.Match[str]],
    alone: str,
    followed: str,
) -> list[re.Match[str]]:
    """List the tokens of a `run` in `alone` that are of the turn, not of the next or of the end.

    `followed` is the same where more follows: what is not in both is no part of the turn, unless it
    is all. Nor is what conversations begin with; some templates write the generation prompt always.
    """
    shared = [part for part in run if followed.startswith(alone[: part.end()])] or run[:1]
    opening = {part[0] for part in _tokens_at_start(_text(text, (QUESTION,)), special)}
    of_turn = itertools.takewhile(lambda part: part[0] not in opening, shared[1:])
    return [*shared[:1], *of_turn]


def _behind(text: Render, messages: Sequence[Message]) -> str:
    return _text(text, messages).partition(QUESTION.content)[2]


def _text(text: Render, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """Render messages, with tools if they call one or the template needs some; "" if it refuses."""
    calls = any("tool_calls" in message.extra for message in messages)
    for tools in (TOOLS,) if calls else (None, TOOLS):
        with contextlib.suppress(jinja.TemplateFailed):
            return text(messages, tools, prompt=prompt)
    return ""


def _tokens_at_start(text: str, special: re.Pattern[str]) -> list[re.Match[str]]:
    """List the special tokens that `text` begins with, blanks aside."""
    found: list[re.Match[str]] = []
    at = 0
    for part in special.finditer(text):
        if text[at : part.start()].strip():
            break
        found.append(part)
        at = part.end()
    return found


def _tokens_at_end(text: str, special: re.Pattern[str]) -> list[re.Match[str]]:
    """List the special tokens that `text` ends with, blanks aside."""
    found: list[re.Match[str]] = []
    at = len(text)
    for part in reversed(list(special.finditer(text))):
        if text[part.end() : at].strip():
            break
        found.insert(0, part)
        at = part.start()
    return found


def _opening(alone: str, followed: str, special: re.Pattern[str]) -> str:
    """Return the special token that stands behind `alone` where more follows."""
    behind = followed.removeprefix(alone) if followed.startswith(alone) else ""
    return next((part[0] for part in _tokens_at_start(behind, special)), "")
