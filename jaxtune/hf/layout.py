"""Layouts: an invertible row per kind of tensor, from a checkpoint's tensors to a parameter.

    Row("model.layers.{L}.self_attn.q_proj.weight",
        "stack_{i}/layer_{j}/attention/q/kernel", "(H K) D -> L D H K")

Left of the arrow is the tensor in the file, right the parameter. An axis in braces in the tensor's
name is spread over files' tensors: one tensor per index. Reading goes by slices of the parameter,
so that a device fetches only its own part; writing goes by tensors. Both use the row as parsed
here, so a row cannot be right in one direction only. numpy only.

Rows with the same source are parts of one tensor, in the order of the table. A star in each says
where: `(* F) D` parts lie one behind another along that dimension, `E D (F *)` they take turns.

    Row("...qkv_proj.weight", ".../q/kernel", "(* H K) D -> L D H K")      rows   0 ..  H K - 1
    Row("...qkv_proj.weight", ".../k/kernel", "(* G K) D -> L D G K")      rows H K .. (H + G) K - 1
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxtune.hf.transpose import empty, move

BLOCK = 1 << 21  # values read or written at a time: large runs for a disk, little memory
Index = tuple[slice, ...]
Fetch = Callable[[str, Index], np.ndarray]  # (tensor name, slices of it) -> its values there


@dataclass(frozen=True)
class Row:
    """Tensor name, parameter name and layout of one kind of tensor.

    `{i}` and `{j}` in the target are the stack and the place in its pattern. An upper-case axis in
    braces in the source must stand on the right of the layout and not on its left. A star stands
    first or last in one bracket.
    """

    source: str
    target: str
    layout: str

    def __post_init__(self) -> None:
        left = [axis for group in self.groups for axis in group]
        if len({*left, *self.spread}) != len(left) + len(self.spread) or sorted(
            left + self.spread
        ) != sorted(self.axes):
            raise ValueError(f"{self.source}: '{self.layout}' does not use each axis once per side")
        if "*" in self.layout and self.shared is None:
            raise ValueError(
                f"{self.source}: '{self.layout}': a star is first or last in a bracket"
            )

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The tensor's dimensions, each as the axes folded into it: '(H K) D' -> ((H, K), (D,))."""
        return tuple(tuple(axis for axis in axes if axis != "*") for axes in self._left)

    @cached_property
    def shared(self) -> int | None:
        """The dimension along which the tensor has several parts, or None where it is whole."""
        starred = [n for n, axes in enumerate(self._left) if "*" in (axes[0], axes[-1])]
        return starred[0] if len(starred) == self.layout.count("*") == 1 else None

    @cached_property
    def takes_turns(self) -> bool:
        """Return True if the parts alternate along the shared dimension, False if they follow
        each other."""
        return self.shared is not None and self._left[self.shared][-1] == "*"

    @cached_property
    def _left(self) -> tuple[tuple[str, ...], ...]:
        words = re.findall(r"\(([^)]*)\)|(\w+)", self.layout.split("->")[0])
        return tuple(tuple((folded or single).split()) for folded, single in words)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The parameter's dimensions in order."""
        return tuple(self.layout.split("->")[1].split())

    @cached_property
    def spread(self) -> list[str]:
        """Axes of the parameter that are spread over tensors."""
        return re.findall(r"\{(\w+)\}", self.source)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Match parameter names, with groups `i` and `j` where the target has them."""
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", self.target))


class TensorPiece(NamedTuple):
    """A tensor of a parameter: its name in the file and its place, an index per spread axis."""

    name: str
    place: dict[str, int]


class AxisPart(NamedTuple):
    """A parameter's positions of a dimension of `size`: `start`, `start + step`, ..."""

    start: int
    step: int
    size: int


@dataclass(frozen=True)
class Placed:
    """A row with every number known: one parameter of `shape` and the tensors it is made of.

    `numbers` gives, for each spread axis, the number that stands in the tensor's name at each
    index: layer 1 of a stack may be layer 7 of the file. `part` is None unless the row has a star.
    """

    row: Row
    parameter: str
    shape: tuple[int, ...]
    numbers: Mapping[str, tuple[int, ...]]
    part: AxisPart | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.row.axes):
            raise ValueError(f"{self.parameter}: {self.shape} does not fit '{self.row.layout}'")
        if (self.part is None) is not (self.row.shared is None):
            raise ValueError(f"{self.parameter}: '{self.row.layout}' with part {self.part}")
        for axis in self.row.spread:
            if len(self.numbers[axis]) != self._sizes[axis]:
                raise ValueError(f"{self.parameter}: {axis} has {len(self.numbers[axis])} numbers")

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(self.row.axes, self.shape, strict=True))

    @cached_property
    def _tensor_axes(self) -> tuple[str, ...]:
        """The parameter's axes that one tensor holds, in the parameter's order."""
        return tuple(axis for axis in self.row.axes if axis not in self.row.spread)

    @cached_property
    def _file_axes(self) -> tuple[str, ...]:
        """The same axes in the tensor's order."""
        return tuple(axis for group in self.row.groups for axis in group)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape in the file; the same for each tensor of the parameter, all parts included."""
        shape = list(self._own_shape)
        if self.part is not None and self.row.shared is not None:
            shape[self.row.shared] = self.part.size
        return tuple(shape)

    @cached_property
    def _own_shape(self) -> tuple[int, ...]:
        """The tensor's shape without other parameters' parts."""
        return tuple(math.prod(self._sizes[a] for a in group) for group in self.row.groups)

    def pieces(self, index: Index | None = None) -> Iterator[TensorPiece]:
        """The tensors that `index` of the parameter touches (None = all), in order."""
        ranges = self._ranges(index)
        for place in itertools.product(*(ranges[axis] for axis in self.row.spread)):
            at = dict(zip(self.row.spread, place, strict=True))
            number = {axis: self.numbers[axis][where] for axis, where in at.items()}
            yield TensorPiece(self.row.source.format(**number), at)

    def step(self, index: Index | None = None) -> int:
        """Of how many indices of the tensor's first axis a block has about `BLOCK` values."""
        ranges = self._ranges(index)
        lengths = [len(ranges[axis]) for axis in self._tensor_axes if axis != self._file_axes[0]]
        return max(1, BLOCK // max(1, math.prod(lengths)))

    def blocks(self, index: Index | None = None, step: int | None = None) -> Iterator[Index]:
        """Cut `index` of the parameter into parts of one tensor each, whole rows of it.

        A block has `step` indices of the tensor's first axis, so that it lies together in the file
        where its other axes are whole.
        """
        ranges = self._ranges(index)
        first = self._file_axes[0]
        steps = {first: step or self.step(index), **dict.fromkeys(self.row.spread, 1)}
        axis_slices = []
        for axis, of in ranges.items():
            by = steps.get(axis, max(1, len(of)))
            axis_slices.append(
                [slice(n, min(n + by, of.stop)) for n in range(of.start, of.stop, by)]
            )
        yield from itertools.product(*axis_slices)

    def read(
        self, fetch: Fetch, index: Index, dtype: np.dtype, run: Callable[..., Iterable[Any]] = map
    ) -> np.ndarray:
        """`index` of the parameter (unit steps) in `dtype`, through the fewest contiguous slices.

        What a slice of a folded dimension cannot express (part of K in several H, one of two parts
        that take turns) is read as the covering range and cut. `run` may be the `map` of a pool.
        """
        out = empty([len(of) for of in self._ranges(index).values()], np.dtype(dtype))
        origin = [of.start for of in self._ranges(index).values()]

        def read_block(at: Index) -> None:
            (piece,) = self.pieces(at)
            own, unfolded, cut = self._source_slices(self._ranges(at))
            source, every = self._in_tensor(own)
            values = fetch(piece.name, source)[every].reshape(unfolded)[cut]
            here = tuple(slice(c.start - o, c.stop - o) for c, o in zip(at, origin, strict=True))
            move(self._unspread(out[here]), values.transpose(self._permutation))

        blocks = list(self.blocks(index))
        for _ in run(read_block, blocks) if len(blocks) > 1 else map(read_block, blocks):
            pass
        return out

    def rows(self, index: Index) -> slice:
        """The rows of its tensor that a block of the parameter lies in, or takes turns in."""
        own, _, _ = self._source_slices(self._ranges(index))
        return self._in_tensor(own)[0][0]

    def fill(self, rows: np.ndarray, values: np.ndarray, index: Index) -> None:
        """Write `values`, block `index` of the parameter, into the `rows(index)` of its tensor.

        Of a tensor in parts, only this one is touched.
        """
        own, unfolded, cut = self._source_slices(self._ranges(index))
        source, every = self._in_tensor(own)
        first = slice(0, source[0].stop - source[0].start)
        place = rows[(first, *source[1:])][every].reshape(unfolded)
        if not np.may_share_memory(place, rows):
            raise ValueError(f"{self.parameter}: its values do not lie in rows as blocks")
        move(place[cut].transpose(self._permutation), self._unspread(values))

    def write(self, values: np.ndarray, tensor: np.ndarray | None = None) -> np.ndarray:
        """Return one whole tensor in the file's layout, from the parameter's values at its place.

        `values` has the parameter's axes without the spread ones, in the parameter's order. Of a
        tensor in parts, this one is filled in: in `tensor`, or in a new one, which is returned.
        """
        tensor = np.empty(self.tensor_shape, values.dtype) if tensor is None else tensor
        spread = [n for n, axis in enumerate(self.row.axes) if axis in self.row.spread]
        index = tuple(slice(0, 1 if n in spread else size) for n, size in enumerate(self.shape))
        self.fill(tensor[self.rows(index)], np.expand_dims(values, tuple(spread)), index)
        return tensor

    def _unspread(self, values: np.ndarray) -> np.ndarray:
        """Without the axes that are spread over tensors, of which a block has one index each."""
        spread = [n for n, axis in enumerate(self.row.axes) if axis in self.row.spread]
        return values.squeeze(tuple(spread))

    def _in_tensor(self, own: Index) -> tuple[Index, Index]:
        """Slices of this part alone -> unit-step slices of the tensor, and the cut to make then."""
        every = [slice(None)] * len(own)
        if self.part is None or self.row.shared is None:
            return own, tuple(every)
        (start, step, _), at = self.part, self.row.shared
        first, last = start + step * own[at].start, start + step * (own[at].stop - 1)
        every[at] = slice(None, None, step)
        return (*own[:at], slice(first, last + 1), *own[at + 1 :]), tuple(every)

    @cached_property
    def _permutation(self) -> tuple[int, ...]:
        return tuple(self._file_axes.index(axis) for axis in self._tensor_axes)

    def _ranges(self, index: Index | None) -> dict[str, range]:
        slices = index if index is not None else (slice(None),) * len(self.shape)
        bounds = zip(self.row.axes, slices, self.shape, strict=True)
        return {axis: range(size)[cut] for axis, cut, size in bounds}

    def _source_slices(self, ranges: Mapping[str, range]) -> tuple[Index, list[int], Index]:
        """Slices of the tensor; the shape they unfold to; and the cut to make after unfolding."""
        slices, unfolded, inner_slices = [], [], []
        for group in self.row.groups:
            start, split = 0, 0
            while split < len(group) - 1 and len(ranges[group[split]]) == 1:
                start = (start + ranges[group[split]].start) * self._sizes[group[split + 1]]
                split += 1
            # Axes before `split` are one index, `group[split]` is a range, the rest is read whole.
            rest = [self._sizes[axis] for axis in group[split + 1 :]]
            whole, run = math.prod(rest), ranges[group[split]]
            begin = (start + run.start) * whole
            slices.append(slice(begin, begin + len(run) * whole))
            unfolded += [1] * split + [len(run), *rest]
            inner_slices += [slice(None)] * (split + 1)
            inner_slices += [slice(ranges[a].start, ranges[a].stop) for a in group[split + 1 :]]
        return tuple(slices), unfolded, tuple(inner_slices)


def place(
    rows: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[tuple[int, int], tuple[int, ...]],
) -> dict[str, Placed]:
    """Find each parameter's row; a parameter with none, or with two, is a ValueError.

    So is a tensor that two parameters claim, or one in parts of which one has no parameter.
    `layers[i, j]` numbers the layers in the file that stack i holds at place j of its pattern.
    """
    placed = {}
    for parameter, shape in shapes.items():
        matches = [(row, m) for row in rows if (m := row.pattern.fullmatch(parameter))]
        if len(matches) != 1:
            raise ValueError(f"{len(matches)} rows for parameter {parameter}; expected one")
        row, match = matches[0]
        where = match.groupdict()
        sizes = dict(zip(row.axes, shape, strict=True))
        numbers = {axis: tuple(range(sizes[axis])) for axis in row.spread}
        if "L" in numbers:
            numbers["L"] = layers[int(where["i"]), int(where["j"])]
        part = _part(row, rows, shapes, where)
        placed[parameter] = Placed(row, parameter, tuple(shape), numbers, part)
    whole = Counter(p.name for each in placed.values() if not each.part for p in each.pieces())
    if doubled := [name for name, count in whole.items() if count > 1]:
        raise ValueError(f"{doubled[0]}: is the whole of {whole[doubled[0]]} parameters")
    return placed


def _part(
    row: Row,
    rows: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    where: Mapping[str, str],
) -> AxisPart | None:
    """The row's share of the dimension it shares with the other rows of its source."""
    family = [other for other in rows if other.source == row.source]
    if row.shared is None:
        return None
    sizes = []
    for other in family:
        name = other.target.format(**where)
        if (other.shared, other.takes_turns) != (row.shared, row.takes_turns):
            raise ValueError(f"{row.source}: '{row.layout}' and '{other.layout}' do not share it")
        if name not in shapes:
            raise ValueError(f"{row.source}: no parameter {name} for one of its parts")
        size = dict(zip(other.axes, shapes[name], strict=True))
        sizes.append(math.prod(size[axis] for axis in other.groups[row.shared]))
    index = family.index(row)
    if not row.takes_turns:
        return AxisPart(sum(sizes[:index]), 1, sum(sizes))
    if len(set(sizes)) > 1:
        raise ValueError(f"{row.source}: parts of {sizes} cannot take turns; expected equal sizes")
    return AxisPart(index, len(sizes), sum(sizes))
