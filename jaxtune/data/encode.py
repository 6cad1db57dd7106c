"""Spans -> tokens with weights, and the one shift to (inputs, targets, weights).

The policy at the edge of a span: the prompt is encoded as inference would encode it, alone; what
follows is encoded as its continuation. Where the joint tokenisation of both begins with the
prompt's own tokens, the row is the joint tokenisation. Where a token would reach over the edge (or
the tokens before it change), the row is split there, so that the prompt ids that `chat` and
`evaluate` feed are always a prefix of the trained row; the doctor counts such rows.

    "A:" + "yes"       "A:" alone [A :]    jointly [A:yes]    ->  [A :] [yes]     split

Token ids are compared rather than character offsets: tokenizers report offsets that leave out
blanks (`trim_offsets`) or cover several byte tokens at once; ids cannot mislead. Every answer is
decoded again and compared with its text; an answer that does not come back is dropped.
"""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.config import DataError
from jaxtune.data.schema import Dropped, Example, Message, Span, Tokens
from jaxtune.data.template import Template, render_prompt
from jaxtune.data.tokenizer import Tokenizer

# What to put before a piece so that it is encoded as a continuation and not as a beginning of text
# (SentencePiece puts a blank there). Tried in order until one comes off whole.
ANCHORS = ("\n", ":", ".", "a", "1", ">", "]")

Row = tuple[Span, ...]


class Encoded(NamedTuple):
    tokens: Tokens
    split: bool  # a token would have reached over an edge
    inexact: bool  # the tokenizer does not keep the answer's blanks or Unicode form


def encode(rows: Sequence[Row], tokenizer: Tokenizer) -> list[Encoded | Dropped]:
    """Rows of spans -> whole examples, in the same order.

    Every answer span with weight ends with exactly one end-of-turn token and decodes to its text
    (blanks and Unicode form aside, which is counted); else the row is dropped with its reason.
    """
    pieces, split = _pieces([tuple(span.text for span in row) for row in rows], tokenizer)
    decoded = _decode_answers(rows, pieces, tokenizer)
    control = set(tokenizer.control.values())
    results: list[Encoded | Dropped] = []
    for number, row in enumerate(rows):
        results.append(_checked(row, pieces[number], decoded, number, control, split[number]))
    return results


def encode_prompt(
    template: Template, tokenizer: Tokenizer, messages: Sequence[Message]
) -> list[int]:
    """The ids that inference feeds for `messages`: a prefix of every row trained on them."""
    row = render_prompt(template, messages)
    pieces, _ = _pieces([tuple(span.text for span in row)], tokenizer)
    found = pieces[0]
    if found is None:
        raise DataError(
            f"the prompt cannot be cut into tokens at an answer's edge: {row[0].text!r}"
        )
    return [token for piece in found for token in piece]


def shift(tokens: Tokens) -> Example:
    """[n] -> inputs, targets, weights [n - 1]: position i predicts token i + 1. Only here."""
    ids, weights = tokens
    return Example(inputs=ids[:-1], targets=ids[1:], weights=weights[1:])


def truncate(tokens: Tokens, max_length: int) -> Tokens:
    """The first `max_length` tokens; no end of turn is put where the text went on."""
    return Tokens(tokens.ids[:max_length], tokens.weights[:max_length])


def runs(tokens: Tokens, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """The example's tokens as text, cut where the weight changes: [(text, weight), ...]."""
    edges = [*(np.flatnonzero(np.diff(tokens.weights)) + 1).tolist(), len(tokens.ids)]
    found: list[tuple[str, float]] = []
    before = ""
    for edge in edges:
        text = tokenizer.decode(tokens.ids[:edge].tolist())
        found.append((text[len(before) :], float(tokens.weights[edge - 1])))
        before = text
    return found


def _pieces(
    rows: Sequence[tuple[str, ...]], tokenizer: Tokenizer
) -> tuple[list[list[list[int]] | None], list[bool]]:
    """Token ids of each text of each row (None: no way to cut), and whether a row was split."""
    contexts = [_contexts(row, tokenizer) for row in rows]
    wanted: set[str] = set()
    for row, before in zip(rows, contexts, strict=True):
        wanted.update(before, map(operator.add, before, row))
    ordered = sorted(wanted)
    joint = dict(zip(ordered, tokenizer.encode_batch(ordered), strict=True))
    found: list[list[list[int]]] = []  # an empty part is one to be cut
    to_cut: set[str] = set()
    for row, before in zip(rows, contexts, strict=True):
        parts: list[list[int]] = []
        for text, context in zip(row, before, strict=True):
            prefix, whole = joint[context], joint[context + text]
            fits = whole[: len(prefix)] == prefix and len(whole) > len(prefix)
            parts.append(whole[len(prefix) :] if fits else [])
            if not fits:
                to_cut.add(text)
        found.append(parts)
    cut = _continuations(to_cut, tokenizer)
    split = [not all(parts) for parts in found]
    return [_completed(row, parts, cut) for row, parts in zip(rows, found, strict=True)], split


def _completed(
    row: tuple[str, ...], parts: list[list[int]], cut: dict[str, list[int] | None]
) -> list[list[int]] | None:
    """`parts` with what was left empty taken from `cut`; None where that has nothing either."""
    complete: list[list[int]] = []
    for text, part in zip(row, parts, strict=True):
        ids = part or cut[text]
        if ids is None:
            return None
        complete.append(ids)
    return complete


def _contexts(row: tuple[str, ...], tokenizer: Tokenizer) -> list[str]:
    """For each text what must stand before it: nothing, a control token, or the text before.

    Control tokens separate: what follows one is encoded the same whatever came before it.
    """
    contexts: list[str] = []
    before = ""
    for text in row:
        contexts.append(before)
        before = tokenizer.control_at_end(text) or before + text
    return contexts


def _continuations(texts: set[str], tokenizer: Tokenizer) -> dict[str, list[int] | None]:
    """Ids of each text as it is encoded behind other text, or None where no anchor comes off."""
    done: dict[str, list[int] | None] = dict.fromkeys(texts)
    # A control token is the cleanest anchor, where the tokenizer puts no blank behind it.
    anchors = (*([tokenizer.eos_token] if tokenizer.eos_token else []), *ANCHORS)
    left = sorted(texts)
    for anchor in anchors:
        if not left:
            break
        prefix = tokenizer.encode(anchor)
        wholes = tokenizer.encode_batch([anchor + text for text in left])
        back = tokenizer.decode_batch(wholes)
        alone = tokenizer.decode(prefix)
        for text, whole, decoded in zip(left, wholes, back, strict=True):
            kept = whole[len(prefix) :]
            if whole[: len(prefix)] == prefix and kept and decoded == alone + text:
                done[text] = kept
        left = [text for text in left if done[text] is None]
    return done


def _decode_answers(
    rows: Sequence[Row], pieces: Sequence[list[list[int]] | None], tokenizer: Tokenizer
) -> dict[tuple[int, int], str]:
    """(row, span) -> what the tokens of each trained answer decode to, in place."""
    asked = {
        (number, index): found[index]
        for number, (row, found) in enumerate(zip(rows, pieces, strict=True))
        for index, span in enumerate(row)
        if span.answer and span.weight > 0 and found is not None
    }
    # Decoders drop a blank where a text begins, so each answer stands behind its own last token.
    texts = tokenizer.decode_batch([[ids[-1], *ids] for ids in asked.values()])
    alone = {token: tokenizer.decode([token]) for token in {ids[-1] for ids in asked.values()}}
    return {
        key: text.removeprefix(alone[ids[-1]])
        for (key, ids), text in zip(asked.items(), texts, strict=True)
    }


def _checked(
    row: Row,
    parts: list[list[int]] | None,
    decoded: dict[tuple[int, int], str],
    number: int,
    control: set[int],
    split: bool,
) -> Encoded | Dropped:
    if parts is None:
        return Dropped(
            "no token boundary at the answer", "no way to cut the text before the answer"
        )
    inexact = False
    for index, span in enumerate(row):
        if not (span.answer and span.weight > 0):
            continue
        end = parts[index][-1]
        if end not in control or parts[index].count(end) != 1:
            return Dropped(
                "not exactly one end of turn", f"{parts[index].count(end)} in {span.text[-40:]!r}"
            )
        back = decoded[number, index]
        if back != span.text:
            if _essence(back) != _essence(span.text):
                return Dropped(
                    "the tokenizer cannot write the answer", f"{back[:40]!r} for {span.text[:40]!r}"
                )
            inexact = True
    ids = np.array([token for part in parts for token in part], np.int32)
    lengths = [len(part) for part in parts]
    weights = np.repeat(np.array([span.weight for span in row], np.float32), lengths)
    weights[:1] = 0.0  # nothing predicts the first token
    if not weights.any():
        return Dropped("nothing to train", f"{len(ids)} token{'s' if len(ids) != 1 else ''}")
    return Encoded(Tokens(ids, weights), split, inexact)


def _essence(text: str) -> str:
    """The text without blanks, in one Unicode form: what every tokenizer must keep."""
    return "".join(unicodedata.normalize("NFKC", text).split())
