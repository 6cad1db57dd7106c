"""A checkpoint's record of its adapters and of their base, and the check that it still holds."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import ConfigError
from jaxtune.hf.load import HfModel
from jaxtune.model.lora import Lora
from jaxtune.storage.safe_read import open_inside

_SAMPLES, _SAMPLE = 16, 4096  # places of a file that its digest reads, and bytes at each


def digests(model: HfModel) -> dict[str, str]:
    """File -> sha256 of its size, its header and samples of its values: cheap, and another
    fine-tuning of the same architecture has others."""
    return {
        file.name: _digest(file, model.folder)
        for file in sorted({tensor.file for tensor in model.tensors.values()})
    }


def _digest(file: Path, folder: Path) -> str:
    now = file.stat()
    return _digest_now(file, folder, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _digest_now(file: Path, folder: Path, identity: tuple[int, ...]) -> str:
    """Read once a run for checkpoint, card and comparison; a changed file has another identity."""
    with open(open_inside(file, folder), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        digest = hashlib.sha256(str(size).encode() + start)
        digest.update(stream.read(int.from_bytes(start, "little")))
        begin = stream.tell()
        for place in np.linspace(begin, max(begin, size - _SAMPLE), _SAMPLES).astype(int):
            stream.seek(int(place))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def base_meta(model: HfModel) -> dict[str, Any]:
    """Return a checkpoint's record of the base of its adapters: name and digests."""
    return {"name": model.name, "digests": digests(model)}


def check_base(meta: Mapping[str, Any], model: HfModel, *, where: str) -> None:
    """Refuse adapters that were trained beside other weights. Raises `ConfigError`."""
    before = meta.get("base") or {}
    if before.get("digests") != digests(model):
        raise ConfigError(
            f"{where}: was trained beside {before.get('name')}, whose weights are not those of "
            f"{model.name} now. Restore the base model, or choose another output_dir."
        )


def lora_meta(lora: Lora) -> dict[str, Any]:
    """Return a checkpoint's record of its adapters; `lora_from_meta` reads it."""
    targets = sorted(lora.targets) if lora.targets is not None else None
    return {**lora.__dict__, "targets": targets, "tokens": list(lora.tokens)}


def lora_from_meta(meta: Mapping[str, Any]) -> Lora:
    targets = None if meta["targets"] is None else frozenset(meta["targets"])
    return Lora(**{**meta, "targets": targets, "tokens": tuple(meta["tokens"])})
