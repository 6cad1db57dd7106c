"""Text generation: token ids of prompts in, text out, ended where an answer ends.

generate(model, codec, prompts, ...)        many prompts, in order
stream(model, codec, messages, ...)         one conversation, text as it comes
TextGenerator(model, codec, slots=8)        any number of requests at any time; both use it
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtune.config import ConfigError
from jaxtune.data.schema import Conversation, Message
from jaxtune.data.templating.answer_text import Affixes, affixes, text_of
from jaxtune.data.templating.template import Template
from jaxtune.data.tokenize import tokenize_prompt
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.inference.decode_step import MOST_STEPS
from jaxtune.inference.engine import Engine, by_length
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.inference.sampling import GREEDY, Sampling
from jaxtune.training.initial_weights import check_ids

_ROWS = 32  # prompts decoded at a time


class Generation(NamedTuple):
    """A generated answer: its text without what the template writes around an answer.

    `stopped`: a stop id or a stop string ended it. `tokens` counts those that were decoded for it,
    without the stop id, with those of a stop string.
    """

    text: str
    stopped: bool
    tokens: int


class TextEvent(NamedTuple):
    """A piece of new text of a request; its last event has the whole `generation`."""

    request: int
    text: str
    generation: Generation | None


def prompt_ids(model: GenerationModel, codec: TextCodec, conversation: Conversation) -> list[int]:
    """Tokenize a conversation as training does: the first tokens of the row it would make."""
    ids = tokenize_prompt(
        codec.template,
        codec.tokenizer,
        conversation.messages,
        tools=conversation.tools,
        kwargs=conversation.template_kwargs,
    )
    check_ids(max(ids, default=0), model.name, model.spec, codec.tokenizer)
    return ids


def generate(
    model: GenerationModel,
    codec: TextCodec,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    templates: Sequence[Template] | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Generation]:
    """Generate an answer to each of `prompt_ids`, in order; prompt i has its own random numbers.

    `templates` are those of the prompts, if not all have that of `codec`. `between` is called
    between steps, as often on every host; what it raises ends the generation.
    Raises: DataError for a prompt that is too long.
    """
    if not prompts:
        return []
    generator = TextGenerator(model, codec, slots=min(_ROWS, len(prompts)))
    requests = {
        generator.submit(
            prompts[i],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            template=codec.template if templates is None else templates[i],
            number=i,
        ): i
        for i in by_length(prompts)
    }
    generations: dict[int, Generation] = {}
    while generator.busy:
        between()
        for event in generator.step():
            if event.generation is not None:
                generations[requests[event.request]] = event.generation
    return [generations[i] for i in range(len(prompts))]


def stream(
    model: GenerationModel,
    codec: TextCodec,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> Generator[str, None, Generation]:
    """Generate one answer, yielding text as it comes; the pieces make up the answer.

    Raises: DataError, before the first piece is asked for.
    """
    prompt = prompt_ids(model, codec, Conversation(tuple(messages)))
    generator = TextGenerator(model, codec, slots=1)
    generator.submit(
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        template=codec.template,
    )
    return _pieces(generator)


def _pieces(generator: TextGenerator) -> Generator[str, None, Generation]:
    while True:
        for event in generator.step(1):
            if event.text:
                yield event.text
            if event.generation is not None:
                return event.generation


class TextGenerator:
    """An `Engine` for text: any number of requests, `slots` of them decoded at a time, first come,
    first served; an answer depends on no other request.

        request = generator.submit(prompt_ids(model, codec, conversation), max_new_tokens=256)
        while generator.busy:
            for event in generator.step():   # TextEvent(request, "text", None), the last with all
                ...

    An answer ends before the first of its `stop` strings, wherever tokens begin and end; text that
    may turn out to be part of one, or the template's, is held back. To be used by one thread.
    """

    def __init__(
        self,
        model: GenerationModel,
        codec: TextCodec,
        *,
        slots: int = 8,
        max_length: int | None = None,
    ) -> None:
        self._engine = Engine(
            model.spec,
            model.variables,
            dtype=model.dtype,
            slots=slots,
            mesh=model.mesh,
            lora=model.lora,
            max_length=max_length,
        )
        self._stop_ids, self._codec = model.stop_ids, codec
        self._texts: dict[int, Detokenizer] = {}

    @property
    def busy(self) -> bool:
        """Return True if any request has a slot or waits."""
        return self._engine.busy

    @property
    def waiting(self) -> int:
        """The number of requests that have no slot yet."""
        return self._engine.waiting

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        template: Template | None = None,
        number: int = 0,
    ) -> int:
        """Queue a prompt and return the number of the request.

        `template` is that of the prompt: its text around an answer is left out and its ends of turn
        end the answer; without one the text continues the prompt. Random numbers depend on
        `sampling.seed` and `number` alone; see `Engine.submit`. Raises: ConfigError, DataError.
        """
        if any(not text for text in stop):
            raise ConfigError("stop: has an empty string, which every answer begins with. Drop it.")
        request = self._engine.submit(
            prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids if template is None else {*self._stop_ids, *template.stop_ids},
            sampling=sampling,
            number=number,
        )
        tokenizer, own = self._codec.tokenizer, template or self._codec.template
        left_out = Affixes() if template is None else affixes(template, tokenizer)
        self._texts[request] = Detokenizer(tokenizer, own.stop_id, tuple(stop), left_out)
        return request

    def cancel(self, request: int) -> None:
        """End a request, which has no event after this; one that ended is ignored."""
        self._engine.cancel(request)
        self._texts.pop(request, None)

    def give_up(self) -> int:
        """End one request after a `step` that ran out of memory; see `Engine.give_up`."""
        request = self._engine.give_up()
        del self._texts[request]
        return request

    def step(self, most: int = MOST_STEPS) -> list[TextEvent]:
        """Prefill prompts, or decode up to `most` tokens of each answer; see `Engine.step`."""
        events = []
        for event in self._engine.step(most):
            text, generation = self._texts[event.request].add(event.tokens, event.reason)
            if generation is not None:
                self.cancel(event.request)
            events.append(TextEvent(event.request, text, generation))
        return events


@dataclass
class Detokenizer:
    """The text of one answer while its tokens come, without what is `around` it."""

    tokenizer: Tokenizer
    behind: int  # a token to be decoded behind
    stop: tuple[str, ...]
    around: Affixes
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def add(self, ids: Sequence[int], reason: str | None) -> tuple[str, Generation | None]:
        """Add tokens; returns the text that is certain now, and the whole at its end."""
        self.ids += ids
        text = self._text(len(self.ids))
        if _first(self.stop, text) is not None:
            # However many tokens came at once, the answer has those that the stop string took.
            before = len(self.ids) - len(ids)
            for count in range(before + 1, len(self.ids) + 1):
                whole = self._text(count)
                if (end := _first(self.stop, whole)) is not None:
                    return self._show(whole[:end]), Generation(whole[:end], True, count)
        if reason is not None:
            if reason == "stop":
                text = text.removesuffix(self.around.behind)
            return self._show(text), Generation(text, reason == "stop", len(self.ids))
        # A character of several tokens decodes to U+FFFD until its last one is there.
        if not text.startswith(self.shown) or text.endswith("\ufffd"):
            return "", None
        # All of what stands behind an answer may be its end, a stop string would have ended it.
        ends = (*self.stop, self.around.behind + "\0")
        return self._show(text[: len(text) - _partial_stop(ends, text)]), None

    def _text(self, count: int) -> str:
        """Decode the first `count` tokens; empty while that may be what precedes an answer."""
        text = text_of(self.tokenizer, self.ids[:count], behind=self.behind)
        before = self.around.before
        return "" if before.startswith(text) else text.removeprefix(before)

    def _show(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown += new
        return new


def _first(stop: Sequence[str], text: str) -> int | None:
    """Find where the first of the stop strings begins, None without one."""
    return min((at for each in stop if (at := text.find(each)) >= 0), default=None)


def _partial_stop(stop: Sequence[str], text: str) -> int:
    """Count the characters at the end of `text` that may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    for size in range(longest, 0, -1):
        if any(each.startswith(text[-size:]) for each in stop):
            return size
    return 0
