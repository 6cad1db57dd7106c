"""Spans -> tokens with weights, and the one shift to (inputs, targets, weights).

The policy at the edge of a span: the prompt is encoded as inference would encode it, alone; what
follows is encoded as its continuation. Where the joint tokenisation of both begins with the
prompt's own tokens, the row is the joint tokenisation. Where a token would reach over the edge (or
the tokens before it change), the row is split there, so that the prompt ids that `chat` and
`evaluate` feed are always a prefix of the trained row; the doctor counts such rows.

    "A:" + "yes"       "A:" alone [A :]    jointly [A:yes]    ->  [A :] [yes]     split

A special token that a message holds as text is cut in two the same way (`Span.breaks`), so that no
tokenizer sees it whole: it stays text, and decodes to what the message holds.

Token ids are compared rather than character offsets: tokenizers report offsets that leave out
blanks (`trim_offsets`) or cover several byte tokens at once; ids cannot mislead. Every answer is
decoded again and compared with its text; an answer that does not come back is dropped.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import DataError
from jaxtune.data.schema import Dropped, Example, Message, Span, WeightedTokens
from jaxtune.data.templating.masking import render_prompt
from jaxtune.data.templating.template import Template
from jaxtune.data.tokenizer import Tokenizer

# What to put before a piece so that it is encoded as a continuation and not as a beginning of text
# (SentencePiece puts a blank there). Tried in order until one comes off whole.
ANCHORS = ("\n", ":", ".", "a", "1", ">", "]")

_LETTER = 8  # tokens that one letter may be spread over; bytes that are none stand for themselves

Row = tuple[Span, ...]


class TokenizedRow(NamedTuple):
    tokens: WeightedTokens
    split: bool  # a token would have reached over an edge
    inexact: bool  # the tokenizer does not keep the answer's blanks or Unicode form


def tokenize_rows(rows: Sequence[Row], tokenizer: Tokenizer) -> list[TokenizedRow | Dropped]:
    """Tokenise rows of spans to whole examples, in the same order.

    Every answer span with weight ends with exactly one end-of-turn token and decodes to its text
    (blanks and Unicode form aside, which is counted); else the row is dropped with its reason.
    """
    pieces, split = _pieces(rows, tokenizer)
    decoded = _decode_answers(rows, pieces, tokenizer)
    results: list[TokenizedRow | Dropped] = []
    for number, row in enumerate(rows):
        results.append(_checked(row, pieces[number], decoded, number, tokenizer, split[number]))
    return results


def tokenize_prompt(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Tokenise what inference feeds for `messages`: a prefix of every row trained on them."""
    row = render_prompt(template, messages, tools=tools, kwargs=kwargs)
    pieces, _ = _pieces([row], tokenizer)
    found = pieces[0]
    if found is None:
        raise DataError(
            f"the prompt cannot be cut into tokens at an answer's edge: {row[0].text!r}"
        )
    return [token for piece in found for token in piece]


def shift(tokens: WeightedTokens) -> Example:
    """Shift [n] to inputs, targets, weights [n - 1]: position i predicts token i + 1. Only here."""
    ids, weights = tokens
    return Example(inputs=ids[:-1], targets=ids[1:], weights=weights[1:])


def truncate(tokens: WeightedTokens, max_length: int) -> WeightedTokens:
    """Keep the first `max_length` tokens; no end of turn is put where the text went on."""
    return WeightedTokens(tokens.ids[:max_length], tokens.weights[:max_length])


def runs(tokens: WeightedTokens, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Decode the example, cut where the weight changes: [(text, weight), ...]."""
    edges = [*(np.flatnonzero(np.diff(tokens.weights)) + 1).tolist(), len(tokens.ids)]
    found: list[tuple[str, float]] = []
    before = ""
    for edge in edges:
        text = tokenizer.decode(tokens.ids[:edge].tolist())
        found.append((text[len(before) :], float(tokens.weights[edge - 1])))
        before = text
    return found


def token_texts(tokens: WeightedTokens, tokenizer: Tokenizer) -> list[tuple[str, list[int], float]]:
    """Decode the example token by token: [(text, ids, weight), ...].

    Several ids stand together where a letter is spread over them. Each is decoded behind those
    before it, so blanks come out as in the whole text.
    """
    ids, weights = tokens.ids.tolist(), tokens.weights.tolist()
    found: list[tuple[str, list[int], float]] = []
    behind, start, before = 0, 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[behind:end])
        whole = not text.endswith("\ufffd") or end - start > _LETTER
        edge = end == len(ids) or weights[end] != weights[start]
        if whole or edge:
            found.append((text[len(before) :], ids[start:end], weights[start]))
            behind, start = start, end
            before = tokenizer.decode(ids[behind:end])
    return found


class _SpanPart(NamedTuple):
    """A text that is encoded at once: a span, or what lies between its breaks."""

    text: str
    apart: bool  # with what stands before it, it would be a special token
    begins: bool  # a text, whatever stands before it
    answer: bool

    @classmethod
    def of(cls, span: Span) -> list[_SpanPart]:
        edges = [0, *span.breaks, len(span.text)]
        texts = (span.text[a:b] for a, b in itertools.pairwise(edges))
        return [cls(text, i > 0, span.document, span.answer) for i, text in enumerate(texts)]


def _pieces(
    rows: Sequence[Row], tokenizer: Tokenizer
) -> tuple[list[list[list[int]] | None], list[bool]]:
    """Tokenise each span of each row (None: no way to cut), and tell whether a row was split."""
    parts = [[part for span in row for part in _SpanPart.of(span)] for row in rows]
    contexts = [_contexts(row, tokenizer) for row in parts]
    wanted: set[str] = set()
    for row, before in zip(parts, contexts, strict=True):
        for part, context in zip(row, before, strict=True):
            wanted.update(() if part.apart else (context, context + part.text))
    ordered = sorted(wanted)
    joint = dict(zip(ordered, tokenizer.encode_batch(ordered), strict=True))
    found: list[list[list[int] | None]] = []  # None is one to be cut
    to_cut: set[str] = set()
    for row, before in zip(parts, contexts, strict=True):
        found.append([])
        for part, context in zip(row, before, strict=True):
            ids = None
            if not part.apart:
                prefix, whole = joint[context], joint[context + part.text]
                ids = whole[len(prefix) :] if whole[: len(prefix)] == prefix else None
                # Blanks may belong to the special token before them.
                ids = None if not ids and (part.answer or part.text.strip()) else ids
            found[-1].append(ids)
            if ids is None:
                to_cut.add(part.text)
    cut = _continuations(to_cut, tokenizer)
    split = [
        any(ids is None and not part.apart for part, ids in zip(row, of_row, strict=True))
        for row, of_row in zip(parts, found, strict=True)
    ]
    return [
        _joined(row, _completed(texts, of_row, cut))
        for row, texts, of_row in zip(rows, parts, found, strict=True)
    ], split


def _completed(
    row: Sequence[_SpanPart], found: list[list[int] | None], cut: dict[str, list[int] | None]
) -> list[list[int]] | None:
    """Complete `found` with what it lacks from `cut`; None if that has nothing either."""
    complete: list[list[int]] = []
    for part, known in zip(row, found, strict=True):
        ids = cut[part.text] if known is None else known
        if ids is None:
            return None
        complete.append(ids)
    return complete


def _joined(row: Row, parts: list[list[int]] | None) -> list[list[int]] | None:
    """Join the ids per part to ids per span."""
    if parts is None:
        return None
    rest = iter(parts)
    return [
        [token for ids in itertools.islice(rest, len(span.breaks) + 1) for token in ids]
        for span in row
    ]


def _contexts(row: Sequence[_SpanPart], tokenizer: Tokenizer) -> list[str]:
    """Give for each part what must stand before it: the text from its last special token on.

    Special tokens separate: what follows one is encoded the same whatever came before it.
    """
    contexts: list[str] = []
    before = ""
    for part in row:
        before = "" if part.begins and not part.apart else before
        contexts.append(before)
        before = tokenizer.from_last_special(("" if part.apart else before) + part.text)
    return contexts


def _continuations(texts: set[str], tokenizer: Tokenizer) -> dict[str, list[int] | None]:
    """Encode each text as behind other text; None if no anchor comes off.

    Only what stands before the first special token needs an anchor.
    """
    heads: dict[str, tuple[str, str]] = {}
    for text in sorted(texts):
        control = tokenizer.special_pattern.search(text)
        at = control.start() if control else len(text)
        heads[text] = text[:at], text[at:]
    anchored = _anchored({head for head, _ in heads.values() if head}, tokenizer)
    rests = tokenizer.encode_batch([rest for _, rest in heads.values()])
    done: dict[str, list[int] | None] = {}
    for (text, (head, _)), rest in zip(heads.items(), rests, strict=True):
        ids = anchored[head] if head else []
        done[text] = None if ids is None else ids + rest
    return done


def _anchored(texts: set[str], tokenizer: Tokenizer) -> dict[str, list[int] | None]:
    """Encode texts without special tokens behind an anchor that comes off whole."""
    done: dict[str, list[int] | None] = dict.fromkeys(texts)
    # A special token is the cleanest anchor, where the tokenizer puts no blank behind it.
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
            continuation = whole[len(prefix) :]
            if whole[: len(prefix)] == prefix and continuation and decoded == alone + text:
                done[text] = continuation
        left = [text for text in left if done[text] is None]
    return done


def _decode_answers(
    rows: Sequence[Row], pieces: Sequence[list[list[int]] | None], tokenizer: Tokenizer
) -> dict[tuple[int, int], str]:
    """Decode the tokens of trained answers, and of what was cut, by (row, span)."""
    to_decode = {
        (number, index): found[index]
        for number, (row, found) in enumerate(zip(rows, pieces, strict=True))
        for index, span in enumerate(row)
        if found is not None and (span.breaks or (span.answer and span.weight > 0))
    }
    # Token by token first: ten times as fast, and all there is where no letter is spread over
    # several tokens and nothing is rewritten.
    found = {key: tokenizer.decode_each(ids) for key, ids in to_decode.items()}
    left = [
        (key, to_decode[key]) for key, text in found.items() if text != rows[key[0]][key[1]].text
    ]
    # Decoders drop a blank where a text begins, so each answer stands behind its own last token; a
    # document is where a text begins.
    begins = [rows[number][index].document for (number, index), _ in left]
    texts = tokenizer.decode_batch(
        [ids if alone else [ids[-1], *ids] for (_, ids), alone in zip(left, begins, strict=True)]
    )
    last = {token: tokenizer.decode([token]) for token in {ids[-1] for _, ids in left}}
    for (key, ids), text, alone in zip(left, texts, begins, strict=True):
        found[key] = text if alone else text.removeprefix(last[ids[-1]])
    return found


def _checked(
    row: Row,
    parts: list[list[int]] | None,
    decoded: dict[tuple[int, int], str],
    number: int,
    tokenizer: Tokenizer,
    split: bool,
) -> TokenizedRow | Dropped:
    if parts is None:
        return Dropped(
            "no token boundary at the answer", "no way to cut the text before the answer"
        )
    inexact = False
    for index, span in enumerate(row):
        trained = span.answer and span.weight > 0
        if trained and not _ends(parts[index], tokenizer, once=not span.document):
            return Dropped("not exactly one end of turn", f"behind {span.text[-40:]!r}")
        if span.breaks and not _literal_as_text(span, parts[index], tokenizer):
            return Dropped("a literal special token would steer", f"{span.text[:60]!r}")
        back = decoded.get((number, index), span.text)
        if back != span.text:
            if _essence(back) != _essence(span.text):
                return Dropped(
                    "the tokenizer cannot write the answer"
                    if trained
                    else "the tokenizer cannot write a literal special token as text",
                    f"{back[:40]!r} for {span.text[:40]!r}",
                )
            inexact = inexact or trained
    ids = np.array([token for part in parts for token in part], np.int32)
    lengths = [len(part) for part in parts]
    weights = np.repeat(np.array([span.weight for span in row], np.float32), lengths)
    weights[:1] = 0.0  # nothing predicts the first token
    if not weights.any():
        return Dropped("nothing to train", f"{len(ids)} token{'s' if len(ids) != 1 else ''}")
    return TokenizedRow(WeightedTokens(ids, weights), split, inexact)


def _ends(ids: Sequence[int], tokenizer: Tokenizer, *, once: bool) -> bool:
    end = ids[-1]
    return end in tokenizer.special_ids and (not once or ids.count(end) == 1)


def _literal_as_text(span: Span, ids: list[int], tokenizer: Tokenizer) -> bool:
    """Tell whether the special tokens among `ids` are those that the template wrote."""
    texts = [part.text for part in _SpanPart.of(span)]
    written = [
        tokenizer.special_tokens[t]
        for text in texts
        for t in tokenizer.special_pattern.findall(text)
    ]
    return written == [i for i in ids if i in tokenizer.special_ids and i != tokenizer.unk_id]


def _essence(text: str) -> str:
    """Strip blanks, in one Unicode form: what is left every tokenizer must keep."""
    return "".join(unicodedata.normalize("NFKC", text).split())
