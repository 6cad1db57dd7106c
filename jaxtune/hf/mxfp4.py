"""MXFP4 checkpoints: pairs of tensors read as the bfloat16 tensor they stand for.

    X_blocks [E R G 16] uint8 and X_scales [E R G] uint8   ->   X [E C R], C = 32 G

OCP Microscaling formats 1.0: 32 neighbouring values share a scale 2 ** (s - 127); a value is 4
bits (1 sign, 2 exponent, 1 mantissa), the first of two in the low half of its byte. Every value is
exact in bfloat16. Reading goes by slices, one expert at a time. This format is read, never written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.config import ModelError
from jaxtune.hf import tensors as plain
from jaxtune.hf.layout import Index
from jaxtune.hf.tensors import DTYPES, Tensor, fetch_bytes

METHOD = "mxfp4"  # quantization_config.quant_method
_BLOCK, _BYTES = 32, 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
_PAIRS = np.array([(_VALUES[byte & 15], _VALUES[byte >> 4]) for byte in range(256)])


class Packed(NamedTuple):
    """A tensor in two pieces; to who only asks what it is, a bfloat16 `Tensor`."""

    blocks: Tensor
    scales: Tensor

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def code(self) -> str:
        return "BF16"

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.code]

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups = self.scales.shape
        return experts, groups * _BLOCK, rows


Source = Tensor | Packed  # where values come from


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """The tensors with each pair `X_blocks`, `X_scales` as one `X`, in the place of its blocks.

    Raises `ModelError` for a piece whose other one is absent or does not fit it.
    """
    sources: dict[str, Source] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition("_")
        if kind not in ("blocks", "scales"):
            sources[name] = tensor
            continue
        other = f"{stem}_{'scales' if kind == 'blocks' else 'blocks'}"
        if other not in tensors:
            raise ModelError(f"{tensor.file}: {name} has no {other}; {METHOD} tensors are pairs.")
        if stem in tensors:
            raise ModelError(f"{tensor.file}: {name} and {stem} are the same weights twice.")
        if kind == "blocks":
            sources[stem] = _paired(stem, tensor, tensors[other])
    return sources


def _paired(name: str, blocks: Tensor, scales: Tensor) -> Packed:
    fits = len(scales.shape) == 3 and blocks.shape == (*scales.shape, _BYTES)
    if not fits or {blocks.code, scales.code} != {"U8"}:
        raise ModelError(
            f"{blocks.file}: {name}_blocks is {blocks.code} {list(blocks.shape)} and _scales "
            f"{scales.code} {list(scales.shape)}; expected U8 [E, R, G, {_BYTES}] and U8 [E, R, G]."
        )
    return Packed(blocks, scales)


def fetch(tensor: Source, index: Index) -> np.ndarray:
    """The values in `index` (unit steps) of either kind of tensor."""
    if isinstance(tensor, Tensor):
        return plain.fetch(tensor, index)
    experts, columns, rows = (
        range(*cut.indices(n)) for cut, n in zip(index, tensor.shape, strict=True)
    )
    out = np.empty((len(experts), len(columns), len(rows)), tensor.dtype)
    first, last = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
    inside = slice(columns.start - first * _BLOCK, columns.stop - first * _BLOCK)
    for place, expert in enumerate(experts):
        at = (slice(expert, expert + 1), slice(rows.start, rows.stop), slice(first, last))
        blocks = fetch_bytes(tensor.blocks, (*at, slice(0, _BYTES)))[0]
        exponents = fetch_bytes(tensor.scales, at)[0].astype(np.int32) - 127
        values = _PAIRS[blocks].reshape(len(rows), last - first, _BLOCK)
        values *= np.exp2(exponents.astype(np.float64)).astype(np.float32)[..., None]
        out[place] = values.reshape(len(rows), -1)[:, inside].T
    return out
