"""A SentencePiece `.model` -> the same tokenizer in the tokenizers library.

The file is a protocol buffer, read here by its field numbers, so that neither sentencepiece nor
protobuf has to be installed; the tests hold the ids against sentencepiece itself. One difference is
meant, and is Hugging Face's own: a text that begins with a blank gets no second one before it.
Where Hugging Face's conversions put merges in the order of ids (runs of blanks in Mistral's), these
go by score, as sentencepiece does: those are the ids that the model was trained on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxtune.config import ConfigError


class PieceKind(IntEnum):
    """A piece's kind (`ModelProto.SentencePiece.Type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class VocabularyPiece(NamedTuple):
    text: str
    score: float
    kind: PieceKind


class SentencePieceModel(NamedTuple):
    """A model's fields that decide its ids. The number of a piece is its id; -1 = there is none."""

    pieces: tuple[VocabularyPiece, ...]
    is_unigram: bool  # else byte-pair encoding
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    charsmap: bytes  # precompiled normalisation
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def text(self, number: int) -> str | None:
        return self.pieces[number].text if 0 <= number < len(self.pieces) else None


_BLANK = "▁"
_UNIGRAM, _BPE = 1, 2


def read(file: Path) -> SentencePieceModel:
    """Read a model. Raises `ConfigError` if the file is no SentencePiece model of a known kind."""
    try:
        fields = list(_fields(file.read_bytes()))
        trainer = dict(_fields(b"".join(_bytes(value) for number, value in fields if number == 2)))
        normalizer = dict(
            _fields(b"".join(_bytes(value) for number, value in fields if number == 3))
        )
        pieces = tuple(_piece(_bytes(value)) for number, value in fields if number == 1)
        if not pieces:
            raise ValueError("no pieces")
        model = SentencePieceModel(
            pieces=pieces,
            is_unigram=_int(trainer, 3, _UNIGRAM) == _UNIGRAM,
            byte_fallback=bool(_int(trainer, 35, 0)),
            unk_id=_int(trainer, 40, 0),
            bos_id=_int(trainer, 41, 1),
            eos_id=_int(trainer, 42, 2),
            pad_id=_int(trainer, 43, -1),
            charsmap=_bytes(normalizer.get(2, b"")),
            add_dummy_prefix=bool(_int(normalizer, 3, 1)),
            remove_extra_whitespaces=bool(_int(normalizer, 4, 1)),
        )
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ConfigError(f"{file}: not a SentencePiece model: {error}.") from None
    if _int(trainer, 3, _UNIGRAM) not in (_UNIGRAM, _BPE) or _int(trainer, 24, 0):
        raise ConfigError(
            f"{file}: a SentencePiece model of words, of characters or with blanks as suffixes is "
            "not supported. Use a folder with tokenizer.json."
        )
    return model


def convert(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """Convert to a tokenizer: same pieces, same ids, control pieces as special tokens."""
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    unknown = model.text(model.unk_id)
    backend = tokenizers.Tokenizer(
        models.Unigram(vocabulary, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
        if model.is_unigram
        else models.BPE(
            {text: number for number, (text, _) in enumerate(vocabulary)},
            _merges(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    prefix = "first" if model.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, prepend_scheme=prefix, split=False)
    back = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(back)
    steering = (PieceKind.CONTROL, PieceKind.UNKNOWN)
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(piece.text, special=True, normalized=False)
            for piece in model.pieces
            if piece.kind in steering
        ]
    )
    backend.add_tokens(
        [
            tokenizers.AddedToken(piece.text, normalized=False)
            for piece in model.pieces
            if piece.kind == PieceKind.USER_DEFINED
        ]
    )
    return backend


def named(model: SentencePieceModel) -> dict[str, str]:
    """Name bos_token, eos_token, ... as the model has them."""
    ids = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
    texts = {f"{name}_token": model.text(number) for name, number in ids.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """List every way to make a piece of two others, the likeliest piece first.

    Control pieces are made by no merge: text that spells one stays text.
    """
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    ways: list[tuple[float, int, int, int, str, str]] = []
    for number, piece in enumerate(model.pieces):
        if piece.kind not in (PieceKind.NORMAL, PieceKind.USER_DEFINED):
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in ids and right in ids:
                ways.append((-piece.score, number, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ways)]


def _piece(data: bytes) -> VocabularyPiece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))[0]
    return VocabularyPiece(
        _bytes(fields[1]).decode("utf-8"), score, PieceKind(_int(fields, 3, PieceKind.NORMAL))
    )


def _int(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is not a number")
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a text is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protocol buffer: numbers decoded, all else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError("cut short")
        yield tag >> 3, data[at : at + size]
        at += size
