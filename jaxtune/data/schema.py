"""The nouns of the data package, in the order in which a record passes through them.

    Conversation | Document  ->  Span, Span, ...  ->  WeightedTokens  ->  Example  ->  Batch

At every arrow a row may become `Dropped` instead, with its reason. What carries loss is said by
`weights` alone: nobody reads meaning from a token's value. Numpy only; nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SYSTEM_ROLES = ("system", "developer")  # of the message before all turns
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class Message(NamedTuple):
    """A turn. `input` is Alpaca's second field, kept apart so that a template can place it.

    `weight` None = what `train_on` says; 0 = context only; otherwise the loss is scaled by it.
    `extra` holds what else a chat template may read (tool_calls, tool_call_id, name, thinking, ...)
    exactly as the record has it: arguments stay a dict or a string, nested nulls stay nulls.
    """

    role: str
    content: str
    input: str = ""
    weight: float | None = None
    extra: Mapping[str, Any] = {}


class Conversation(NamedTuple):
    """A list of turns. `tools` are declarations for the template's variable; None = it is not set.

    The first `context` messages are a prompt: answers among them are trained only where all is.
    `template_kwargs` are arguments of the chat template, above those of the run.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    context: int = 0
    template_kwargs: Mapping[str, Any] = {}


class Document(NamedTuple):
    """A plain text: no template, every token is trained, the tokenizer's eos ends it."""

    text: str


class Dropped(NamedTuple):
    """A row that is not trained. `reason` is counted, `detail` is shown for the first few."""

    reason: str
    detail: str = ""

    @property
    def text(self) -> str:
        """Join both for a message."""
        return ": ".join(filter(None, self))


class Span(NamedTuple):
    """A piece of the rendered text. Tokens never reach over the edge of a span.

    `answer` marks what the model must produce: it ends with exactly one end of turn. `breaks` are
    places inside special tokens that a message holds as text: cut there, they stay text. A
    `document` is encoded as the beginning of a text, and may hold any number of ends of turn.
    `untrained`, on the first span of a conversation's first row, says why answers that were to be
    trained are context only.
    """

    text: str
    weight: float
    answer: bool = False
    breaks: tuple[int, ...] = ()
    document: bool = False
    untrained: tuple[Dropped, ...] = ()


class WeightedTokens(NamedTuple):
    """A whole example, unshifted: `weights[i]` is the loss weight of `ids[i]` as a target."""

    ids: Ints  # [n]
    weights: Floats  # [n], weights[0] == 0: nothing predicts the first token


class Example(NamedTuple):
    """An example after its one and only shift (`tokenize.shift`); all [n - 1]."""

    inputs: Ints
    targets: Ints
    weights: Floats


class Batch(NamedTuple):
    """A set of fixed rows, all [B T]. Segments count from 1 in each row, positions from 0 in each
    segment.

    Padding has segment 0, weight 0 and token 0.
    """

    inputs: Ints
    targets: Ints
    weights: Floats
    segment_ids: Ints
    positions: Ints
