"""Texts that say nearly the same: MinHash over word shingles. Knows text; knows no tokenizer.

The signatures of two texts agree in about that share of places that their sets of three-word runs
have in common (Jaccard; Broder 1997). Rows that could be alike are found by bands: those that agree
in one whole band are compared in full, so the search costs a few sorts and no pairs.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PLACES = 32  # of a signature
ALIKE = 0.8  # share of places that must agree
_BAND = 4  # places of a band: of two texts alike by 0.8, one of the 8 bands agrees in 98.5%
_BLOCK = 1 << 16  # rows compared at once

_CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"  # written without blanks: each is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_RUN = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
# Drawn once; only their being odd and various matters.
_FACTORS = np.random.Philox(1997).random_raw(2 * PLACES).reshape(2, PLACES)


# ASCII without punctuation and capitals, byte for byte: `_WORD` for most texts, four times as fast.
_PLAIN = bytes(
    ord(letter.lower()) if _WORD.fullmatch(letter) else ord(" ") for letter in map(chr, range(128))
).ljust(256)


class _Hashes(dict[bytes, int]):
    """A table word -> number; most words of a text have been seen before."""

    def __missing__(self, word: bytes) -> int:
        self[word] = found = zlib.crc32(word)
        return found


def _words(text: str) -> list[bytes]:
    if text.isascii():
        return text.encode().translate(_PLAIN).split()
    return [word.encode("utf-8", "replace") for word in _WORD.findall(text.lower())]


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Sign texts: [n] texts -> [n PLACES]. Case and punctuation do not count."""
    if not texts:
        return np.zeros((0, PLACES), np.uint32)
    known = _Hashes()
    hashes: list[int] = []
    ends: list[int] = []
    for text in texts:
        words = _words(text)
        hashes += map(known.__getitem__, words)
        hashes += [0] * (len(_RUN) - len(words))  # every text has at least one run
        ends.append(len(hashes))
    words_of = np.array(hashes, np.uint64)
    size = len(words_of) - len(_RUN) + 1
    runs = np.zeros(size, np.uint64)
    for place, factor in enumerate(_RUN):
        runs += words_of[place : place + size] * factor
    runs ^= runs >> np.uint64(29)
    within = np.ones(size, bool)  # a run that begins in the last two words is of two texts
    for back in range(1, len(_RUN)):
        within[np.array(ends[:-1], np.int64) - back] = False
    starts = np.array([0, *ends[:-1]]) - (len(_RUN) - 1) * np.arange(len(texts))
    own_runs = runs[within]
    found = np.empty((len(texts), PLACES), np.uint32)
    for place, (factor, offset) in enumerate(_FACTORS.T):
        mixed = (own_runs * (factor | np.uint64(1)) + offset) >> np.uint64(32)
        found[:, place] = np.minimum.reduceat(mixed, starts)
    return found


def first_near_duplicates(rows: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Find for each of the [n PLACES] signatures an earlier row that is alike, or n if none is.

    A row is compared with the first of each band's group and with its neighbour there.
    """
    count = len(rows)
    found = np.full(count, count)
    for low in range(0, PLACES, _BAND):
        keys = np.zeros(count, np.uint64)  # keys that agree by chance cost a comparison
        for place in range(low, low + _BAND):
            keys = (keys ^ rows[:, place]) * _RUN[0]
            keys ^= keys >> np.uint64(32)
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        places = np.arange(count)
        places[1:][same] = 0
        first = order[np.maximum.accumulate(places)]
        repeated = np.flatnonzero(same) + 1
        for start in range(0, len(repeated), _BLOCK):
            at = repeated[start : start + _BLOCK]
            later = order[at]
            for earlier in (order[at - 1], first[at]):
                agree = (rows[later] == rows[earlier]).mean(axis=1) >= ALIKE
                np.minimum.at(found, later[agree], earlier[agree])
    return found
