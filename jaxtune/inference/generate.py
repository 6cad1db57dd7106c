"""A model asked: tokens in, text out, ended where an answer ends.

answer(model, words, prompts, ...)     many answers, in order
stream(model, words, messages, ...)    one, piece by piece
Answering(model, words, slots=8)       any number at any time, which both of them use
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from jaxtune.config import ConfigError

if TYPE_CHECKING:
    from jaxtune.data.schema import Conversation, Message
    from jaxtune.data.templating.answer_text import Around
    from jaxtune.data.templating.template import Template
    from jaxtune.data.tokenizer import Tokenizer
    from jaxtune.inference.load import Model, Words
    from jaxtune.inference.sampling import Sampling

_ROWS = 32  # answered at a time


class Answer(NamedTuple):
    """`text` is the content of a message, without what the template writes around that (see
    `data.content`). `stopped`: the model ended it, or a stop string did; `tokens`: how many were
    made for it, without the stop id, with a stop string's."""

    text: str
    stopped: bool
    tokens: int


class Piece(NamedTuple):
    """More text of a request; with the last piece of it the whole `answer`."""

    request: int
    text: str
    answer: Answer | None


def prompt_ids(model: Model, words: Words, asked: Conversation) -> list[int]:
    """What is fed for a conversation: the beginning of the row that training would make of it."""
    from jaxtune.data.tokenize import encode_prompt
    from jaxtune.training.initial_weights import check_ids

    ids = encode_prompt(words.template, words.tokenizer, asked.messages, tools=asked.tools)
    check_ids(max(ids, default=0), model.name, model.spec, words.tokenizer)
    return ids


def answer(
    model: Model,
    words: Words,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    templates: Sequence[Template] | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answer to each of `prompt_ids`, in order: greedy, or drawn as `sampling` says, prompt i
    with random numbers of its own. `templates` are those of the prompts, where they are not that of
    `words`. `between` is called as it goes, as often on every host. Raises `DataError` for a prompt
    too long, and what `between` raises."""
    from jaxtune.inference.engine import by_length

    if not prompts:
        return []
    desk = Answering(model, words, slots=min(_ROWS, len(prompts)))
    requests = {
        desk.ask(
            prompts[i],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            template=words.template if templates is None else templates[i],
            number=i,
        ): i
        for i in by_length(prompts)
    }
    found: dict[int, Answer] = {}
    while desk.busy:
        between()
        for piece in desk.step():
            if piece.answer is not None:
                found[requests[piece.request]] = piece.answer
    return [found[i] for i in range(len(prompts))]


def stream(
    model: Model,
    words: Words,
    conversation: Sequence[Message],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> Generator[str, None, Answer]:
    """`answer` for one conversation, yielding text as it comes; the pieces make up the answer.

    Raises `DataError` here, before the first piece is asked for.
    """
    from jaxtune.data.schema import Conversation

    prompt = prompt_ids(model, words, Conversation(tuple(conversation)))
    desk = Answering(model, words, slots=1)
    desk.ask(
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        template=words.template,
    )
    return _pieces(desk)


def _pieces(desk: Answering) -> Generator[str, None, Answer]:
    while True:
        for piece in desk.step(1):
            if piece.text:
                yield piece.text
            if piece.answer is not None:
                return piece.answer


class Answering:
    """`model.sample.Engine` in words: any number of requests, `slots` of them answered at a time,
    first come, first served; what a request is answered depends on no other.

        request = desk.ask(prompt_ids(model, words, conversation), max_new_tokens=256)
        while desk.busy:
            for piece in desk.step():        # Piece(request, "text", None), the last with an answer
                ...

    An answer ends before the first of its `stop` strings, wherever tokens begin and end; nothing
    that may turn out to be one, or to be the template's, is shown before it is known. To be used by
    one thread.
    """

    def __init__(
        self, model: Model, words: Words, *, slots: int = 8, max_length: int | None = None
    ) -> None:
        from jaxtune.inference.engine import Engine

        self._engine = Engine(
            model.spec,
            model.variables,
            dtype=model.dtype,
            slots=slots,
            mesh=model.mesh,
            lora=model.lora,
            max_length=max_length,
        )
        self._stop_ids, self._words = model.stop_ids, words
        self._texts: dict[int, _Text] = {}

    @property
    def busy(self) -> bool:
        """Whether any request is being answered or waits."""
        return self._engine.busy

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return self._engine.waiting

    def ask(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        template: Template | None = None,
        number: int = 0,
    ) -> int:
        """The request's number. `template` is that of the prompt: what it writes around content is
        left out, and its end of turn ends the answer; without one the text is what goes on behind
        the prompt. Random numbers follow from `sampling.seed` and `number` alone; see
        `Engine.submit`. Raises `ConfigError` and `DataError`."""
        from jaxtune.data.templating.answer_text import Around, around
        from jaxtune.inference.sampling import GREEDY

        if any(not text for text in stop):
            raise ConfigError("stop: has an empty string, which every answer begins with. Drop it.")
        request = self._engine.submit(
            prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids if template is None else {*self._stop_ids, template.stop_id},
            sampling=sampling or GREEDY,
            number=number,
        )
        tokenizer, own = self._words.tokenizer, template or self._words.template
        left_out = Around() if template is None else around(template, tokenizer)
        self._texts[request] = _Text(tokenizer, own.stop_id, tuple(stop), left_out)
        return request

    def cancel(self, request: int) -> None:
        """Ends a request, which has no piece after this; one that ended is ignored."""
        self._engine.cancel(request)
        self._texts.pop(request, None)

    def give_up(self) -> int:
        """After a `step` that raised for want of memory: the request that is ended, so that the
        others can go on. See `Engine.give_up`."""
        request = self._engine.give_up()
        del self._texts[request]
        return request

    def step(self, most: int | None = None) -> list[Piece]:
        """Some work, with what came of it: prompts read, or up to `most` tokens of each answer."""
        events = self._engine.step() if most is None else self._engine.step(most)
        pieces = []
        for event in events:
            text = self._texts[event.request]
            shown, found = text.add(event.tokens, event.reason)
            if found is not None:
                self.cancel(event.request)
            pieces.append(Piece(event.request, shown, found))
        return pieces


@dataclass
class _Text:
    """The text of one answer while its tokens come, without what is `around` it."""

    tokenizer: Tokenizer
    behind: int  # a token to be decoded behind
    stop: tuple[str, ...]
    around: Around
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def add(self, ids: Sequence[int], reason: str | None) -> tuple[str, Answer | None]:
        """What can be shown now, and the answer, if this ends it: for a reason, or with a stop."""
        self.ids += ids
        text = self._said(len(self.ids))
        at = _first(self.stop, text)
        if at is not None:
            # However many tokens came at once, the answer has those that it took to say the stop.
            before = len(self.ids) - len(ids)
            for count in range(before + 1, len(self.ids) + 1):
                whole = self._said(count)
                if (found := _first(self.stop, whole)) is not None:
                    return self._show(whole[:found]), Answer(whole[:found], True, count)
        if reason is not None:
            if reason == "stop":
                text = text.removesuffix(self.around.behind)
            return self._show(text), Answer(text, reason == "stop", len(self.ids))
        # A character of several tokens decodes to U+FFFD until its last one is there.
        if not text.startswith(self.shown) or text.endswith("\ufffd"):
            return "", None
        # All of what stands behind an answer may be its end, a stop string would have ended it.
        ends = (*self.stop, self.around.behind + "\0")
        return self._show(text[: len(text) - _begun(ends, text)]), None

    def _said(self, count: int) -> str:
        """By the first `count` tokens; nothing while that may be what stands before content."""
        from jaxtune.data.templating.answer_text import text_of

        text = text_of(self.tokenizer, self.ids[:count], behind=self.behind)
        before = self.around.before
        return "" if before.startswith(text) else text.removeprefix(before)

    def _show(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown += new
        return new


def _first(stop: Sequence[str], text: str) -> int | None:
    """Where the first of the stop strings begins, None without one."""
    return min((at for each in stop if (at := text.find(each)) >= 0), default=None)


def _begun(stop: Sequence[str], text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    ends = (size for size in range(longest, 0, -1) if _begins(stop, text[-size:]))
    return next(ends, 0)


def _begins(stop: Sequence[str], end: str) -> bool:
    return any(each.startswith(end) for each in stop)
