"""The dimensions of a parameter that are its matrix, whatever its layers are stacked into.

A kernel q `[L D H K]` is, in each of its L layers, the matrix of D rows and H*K columns; o
`[L H K D]` has H*K rows. Optimisers that look at matrices (muon, adafactor) ask here, and so
treat a stack of layers or experts exactly as they would treat each of them alone.

Rules go by name and logical axes, never by rank: stacked norms are `[L D]` and would pass for a
matrix. They are total: a parameter that no rule covers is an error.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Axes = tuple[str | None, ...]

MATRIX = re.compile(r"(^|/)(kernel|table|rows|a|b)$")  # a, b: the two factors of an adapter
VECTOR = re.compile(r"(^|/)(scale|bias|sinks|magnitude)$")
STACKED = ("layers", "expert")  # as leading axes they count separate weights
# Alone a side of a matrix (None is an adapter's rank); heads and head_dim are one together.
ONE_SIDE = ("embed", None)
LOOKED_UP = re.compile(r"(^|/)(table|rows)$")


class Dims(NamedTuple):
    """Dimension numbers of one leaf: `stack` counts separate weights, `rows` is what a product
    sums over, `columns` what it makes; a vector has no columns."""

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def is_matrix(name: str) -> bool:
    if MATRIX.search(name):
        return True
    if VECTOR.search(name):
        return False
    raise ValueError(f"no rule says whether parameter '{name}' is a matrix or a vector")


def dims(name: str, axes: Axes) -> Dims:
    """`axes` are the leaf's logical axes, one for each dimension.

    >>> dims("q/kernel", ("layers", "embed", "heads", "head_dim"))
    Dims(stack=(0,), rows=(1,), columns=(2, 3))
    >>> dims("o/kernel", ("layers", "heads", "head_dim", "embed"))
    Dims(stack=(0,), rows=(1, 2), columns=(3,))
    >>> dims("norm/scale", ("layers", "norm"))
    Dims(stack=(0,), rows=(1,), columns=())
    """
    start = 0
    while start < len(axes) - 1 and axes[start] in STACKED:
        start += 1
    stack, rest = tuple(range(start)), tuple(range(start, len(axes)))
    if not is_matrix(name):
        return Dims(stack, rest, ())
    if len(rest) == 2 or (len(rest) > 2 and axes[start] in ONE_SIDE):
        return Dims(stack, rest[:1], rest[1:])
    if len(rest) > 2 and axes[-1] in ONE_SIDE:
        return Dims(stack, rest[:-1], rest[-1:])
    raise ValueError(f"no rule says which matrix parameter '{name}' with axes {axes} is")


def is_hidden(name: str, axes: Axes) -> bool:
    """A matrix between layers: not of the embedding, not of the head."""
    return is_matrix(name) and "vocab" not in axes and not LOOKED_UP.search(name)


def size(shape: tuple[int, ...], where: tuple[int, ...]) -> int:
    """The product of the dimensions `where`."""
    product = 1
    for dimension in where:
        product *= shape[dimension]
    return product
