"""Every kind of tokenizer as a fixture."""

from __future__ import annotations

from typing import Any

import pytest
from data.made import NAMES, adds_bos, byte_level_backend, save, sentencepiece_backend

from jaxtune.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE that puts no bos before plain text."""
    return save(tmp_path_factory.mktemp("byte"), byte_level_backend(), **NAMES)


@pytest.fixture(scope="session")
def byte_level_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same, with a post-processor that puts bos."""
    return save(tmp_path_factory.mktemp("byte_bos"), adds_bos(byte_level_backend()), **NAMES)


@pytest.fixture(scope="session", params=["first", "always", "legacy"])
def sentencepiece(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece-like, in each way of putting the blank; puts bos before plain text."""
    backend = adds_bos(sentencepiece_backend(request.param))
    return save(tmp_path_factory.mktemp("sp"), backend, **NAMES)


@pytest.fixture(
    scope="session", params=["byte_level", "byte_level_bos", "first", "always", "legacy"]
)
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every one of them in turn."""
    kind = request.param
    if kind == "byte_level":
        backend = byte_level_backend()
    elif kind == "byte_level_bos":
        backend = adds_bos(byte_level_backend())
    else:
        backend = adds_bos(sentencepiece_backend(kind))
    return save(tmp_path_factory.mktemp(kind), backend, **NAMES)
