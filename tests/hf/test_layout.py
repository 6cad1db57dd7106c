"""Rows read by slices and written back, against a brute-force reading of the pattern."""

import itertools
import math
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.hf import export
from jaxtune.hf.family.registry import FAMILIES
from jaxtune.hf.layout import Placed, Row, place

PATTERNS = sorted(
    {row.layout for family in FAMILIES.values() for row in family.rows if row.shared is None}
)
# Shapes no family of today uses, which the mechanism still has to get right.
PATTERNS += ["(A B C) D -> D C A B", "A (B C) -> C A B", "(A B) (C D) -> B D A C", "A -> A"]


def _row(layout: str) -> Row:
    left, right = (set(re.findall(r"\w", side)) for side in layout.split("->"))
    spread = [axis for axis in ("L", "E") if axis in right - left]
    return Row("t" + "".join(f".{{{axis}}}" for axis in spread), "p", layout)


def _placed(row: Row, rng: np.random.Generator) -> Placed:
    shape = tuple(int(rng.integers(1, 5)) for _ in row.axes)
    sizes = dict(zip(row.axes, shape, strict=True))
    numbers = {axis: tuple(range(3, 3 + 2 * sizes[axis], 2)) for axis in row.spread}
    return Placed(row, "p", shape, numbers)


def _brute_force(placed: Placed, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Every element by hand: its axes' indices folded into the tensor's."""
    sizes = dict(zip(placed.row.axes, placed.shape, strict=True))
    left = placed.row.layout.split("->")[0]
    groups = [(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\w+)", left)]
    out = np.empty(placed.shape, np.float32)
    for where in itertools.product(*(range(n) for n in placed.shape)):
        at = dict(zip(placed.row.axes, where, strict=True))
        name = "t" + "".join(f".{placed.numbers[axis][at[axis]]}" for axis in placed.row.spread)
        flat = []
        for group in groups:
            position = 0
            for axis in group:
                position = position * sizes[axis] + at[axis]
            flat.append(position)
        out[where] = tensors[name][tuple(flat)]
    return out


def _tensors(placed: Placed, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        piece.name: rng.normal(size=placed.tensor_shape).astype(np.float32)
        for piece in placed.pieces()
    }


@pytest.mark.parametrize("layout", [*PATTERNS, "F D -> L E D F"])
def test_read_any_slice_and_write_back(layout, monkeypatch):
    rng = np.random.default_rng(PATTERNS.index(layout) if layout in PATTERNS else 99)
    for trial in range(20):
        monkeypatch.setattr("jaxtune.hf.layout.BLOCK", 5 if trial % 2 else 1 << 20)
        placed = _placed(_row(layout), rng)
        tensors = _tensors(placed, rng)
        whole = _brute_force(placed, tensors)

        bounds = [sorted(rng.integers(0, n + 1, 2)) for n in placed.shape]
        index = tuple(
            slice(int(a), int(max(b, a + 1))) if a < n else slice(n - 1, n)
            for (a, b), n in zip(bounds, placed.shape, strict=True)
        )
        got = placed.read(lambda name, at, t=tensors: t[name][at], index, np.dtype(np.float32))
        np.testing.assert_array_equal(got, whole[index])

        for piece in placed.pieces():
            at = tuple(piece.place.get(axis, slice(None)) for axis in placed.row.axes)
            np.testing.assert_array_equal(placed.write(whole[at]), tensors[piece.name])


# Rows of one tensor, with the sizes of their axes: q, k and v; gate and up, stacked over experts.
SHARED = {
    "one behind another": ("(* H K) D -> L D H K", "(* G K) D -> L D G K", "(* G K) D -> L G K D"),
    "in turns": ("E D (F *) -> L E D F", "E D (F *) -> L F E D"),
    "three in turns": ("(G F *) -> L G F", "(G F *) -> L F G", "(G F *) -> L G F"),
    "columns": ("D (* F) -> L F D", "D (* G) -> L D G"),
}


def _part_by_hand(layout: str, rows: tuple[str, ...], index: int, sizes: dict[str, int]):
    """Per element of a parameter: where it stands in the tensor, and the tensor's shape."""
    groups = [
        [(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\w+)", row.split("->")[0])]
        for row in rows
    ]
    (at,) = [n for n, group in enumerate(groups[0]) if "*" in group]
    widths = [math.prod(sizes[a] for a in group[at] if a != "*") for group in groups]
    shape = [math.prod(sizes[a] for a in group) for group in groups[0][:at]]
    shape += [sum(widths)]
    shape += [math.prod(sizes[a] for a in group) for group in groups[0][at + 1 :]]
    axes = layout.split("->")[1].split()[1:]  # without L
    places = {}
    for where in itertools.product(*(range(sizes[axis]) for axis in axes)):
        position = dict(zip(axes, where, strict=True))
        flat = []
        for n, group in enumerate(groups[index]):
            here = 0
            for axis in group:
                here = here if axis == "*" else here * sizes[axis] + position[axis]
            if n == at and group[-1] == "*":
                here = here * len(rows) + index
            elif n == at:
                here += sum(widths[:index])
            flat.append(here)
        places[where] = tuple(flat)
    return places, tuple(shape)


@pytest.mark.parametrize("kind", SHARED)
def test_parts_of_a_tensor_are_read_by_slices_and_fill_it_again(kind):
    rng = np.random.default_rng(3)
    layouts = SHARED[kind]
    rows = [Row("t.{L}", f"p{n}_{{i}}_{{j}}", layout) for n, layout in enumerate(layouts)]
    for _ in range(10):
        sizes = {axis: int(rng.integers(1, 5)) for axis in "DEFGHK"} | {"L": 2}
        shapes = {f"p{n}_0_1": tuple(sizes[a] for a in row.axes) for n, row in enumerate(rows)}
        placed = place(rows, shapes, {(0, 1): (3, 5)})
        by_hand = [_part_by_hand(row, layouts, n, sizes) for n, row in enumerate(layouts)]
        tensors = {name: rng.normal(size=by_hand[0][1]) for name in ("t.3", "t.5")}
        rebuilt: dict[str, np.ndarray] = {}
        for part, (places, shape) in zip(placed.values(), by_hand, strict=True):
            assert part.tensor_shape == shape
            whole = np.empty(part.shape)
            for layer, name in enumerate(tensors):
                for where, position in places.items():
                    whole[(layer, *where)] = tensors[name][position]
            low = [int(rng.integers(0, n)) for n in part.shape]
            index = tuple(
                slice(a, int(rng.integers(a + 1, n + 1)))
                for a, n in zip(low, part.shape, strict=True)
            )
            got = part.read(lambda name, at, t=tensors: t[name][at], index, np.dtype(float))
            np.testing.assert_array_equal(got, whole[index])
            for piece in part.pieces():
                mine = whole[piece.place["L"]]
                rebuilt[piece.name] = part.write(mine, rebuilt.get(piece.name))
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(rebuilt[name], tensor)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("block", [1, 7, 40])
def test_blocks_cover_each_tensor_once_and_together(kind, block, monkeypatch):
    """What the export writes, a few rows at a time, is what is written at once."""
    monkeypatch.setattr("jaxtune.hf.layout.BLOCK", block)
    rng = np.random.default_rng(block)
    rows = [Row("t.{L}", f"p{n}_{{i}}_{{j}}", text) for n, text in enumerate(SHARED[kind])]
    sizes = {"D": 5, "E": 3, "F": 4, "G": 2, "H": 3, "K": 4, "L": 2}
    shapes = {f"p{n}_0_0": tuple(sizes[a] for a in row.axes) for n, row in enumerate(rows)}
    placed = place(rows, shapes, {(0, 0): (0, 1)})
    params = {name: jnp.asarray(rng.normal(size=shape), "f4") for name, shape in shapes.items()}
    expected: dict[str, np.ndarray] = {}
    for name, part in placed.items():
        for piece in part.pieces():
            values = np.asarray(params[name][piece.place["L"]])
            expected[piece.name] = part.write(values, expected.get(piece.name))
    found = {name: np.full_like(tensor, np.nan) for name, tensor in expected.items()}
    count = 0
    for each in export._blocks(found, SimpleNamespace(placed=placed), params):
        values = np.full(each.shape, np.nan, np.float32)
        each.fill(values)
        assert np.isfinite(values).all()
        target = found[each.name][each.first : each.first + len(values)]
        assert np.isnan(target).all()
        target[...] = values
        count += 1
    assert count > len(found) or block == 40
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_a_part_reads_only_its_range():
    rows = [Row("qkv", "q", "(* H K) D -> D H K"), Row("qkv", "k", "(* G K) D -> D G K")]
    placed = place(rows, {"q": (6, 4, 3), "k": (6, 2, 3)}, {})
    seen = []

    def fetch(name, index):
        seen.append(index)
        return np.zeros([len(range(n)[cut]) for cut, n in zip(index, (18, 6), strict=True)])

    placed["k"].read(fetch, (slice(2, 6), slice(1, 2), slice(0, 3)), np.dtype(np.float32))
    assert seen == [(slice(15, 18), slice(2, 6))]


def test_parts_that_cannot_make_a_tensor():
    rows = [Row("t", "a", "(* F) -> F"), Row("t", "b", "(* F) -> F")]
    with pytest.raises(ValueError, match="t: no parameter b for one of its parts"):
        place(rows, {"a": (3,)}, {})
    with pytest.raises(ValueError, match=r"'\(F \*\) -> F' do not share"):
        place([rows[0], Row("t", "b", "(F *) -> F")], {"a": (3,), "b": (3,)}, {})
    turns = [Row("t", "a", "(F *) -> F"), Row("t", "b", "(F *) -> F")]
    with pytest.raises(ValueError, match=r"parts of \[3, 4\] cannot take turns"):
        place(turns, {"a": (3,), "b": (4,)}, {})
    with pytest.raises(ValueError, match="t: is the whole of 2 parameters"):
        place([Row("t", "a", "F -> F"), Row("t", "b", "F -> F")], {"a": (3,), "b": (3,)}, {})
    with pytest.raises(ValueError, match="a star is first or last in a bracket"):
        Row("t", "a", "(F * K) -> F K")
    with pytest.raises(ValueError, match="with part None"):
        Placed(rows[0], "a", (3,), {})


def test_a_slice_reads_only_its_range():
    row = Row("q.{L}", "q", "(H K) D -> L D H K")
    placed = Placed(row, "q", (4, 6, 8, 10), {"L": (0, 1, 2, 3)})
    seen: list[tuple[str, tuple[slice, ...]]] = []

    def fetch(name, index):
        seen.append((name, index))
        return np.zeros([len(range(n)[cut]) for cut, n in zip(index, (80, 6), strict=True)])

    index = (slice(1, 3), slice(2, 4), slice(4, 6), slice(0, 10))
    assert placed.read(fetch, index, np.dtype(np.float32)).shape == (2, 2, 2, 10)
    assert seen == [(f"q.{n}", (slice(40, 60), slice(2, 4))) for n in (1, 2)]

    seen.clear()
    part_of_one_head = (slice(0, 1), slice(0, 6), slice(3, 4), slice(2, 5))
    placed.read(fetch, part_of_one_head, np.dtype(np.float32))
    assert seen == [("q.0", (slice(32, 35), slice(0, 6)))]

    seen.clear()
    part_of_two_heads = (slice(0, 1), slice(0, 6), slice(3, 5), slice(2, 5))
    placed.read(fetch, part_of_two_heads, np.dtype(np.float32))
    assert seen == [("q.0", (slice(30, 50), slice(0, 6)))]  # the covering range


def test_layers_are_numbered_over_stacks_and_patterns():
    row = Row("m.{L}.w", "stack_{i}/layer_{j}/w", "D -> L D")
    layers = {(0, 0): (0, 2), (0, 1): (1, 3), (1, 0): (4,)}
    shapes = {"stack_0/layer_1/w": (2, 5), "stack_1/layer_0/w": (1, 5)}
    placed = place([row], shapes, layers)
    assert [p.name for p in placed["stack_0/layer_1/w"].pieces()] == ["m.1.w", "m.3.w"]
    assert [p.name for p in placed["stack_1/layer_0/w"].pieces()] == ["m.4.w"]


def test_the_table_is_total():
    row = Row("a", "a", "D -> D")
    with pytest.raises(ValueError, match="0 rows for parameter b"):
        place([row], {"b": (2,)}, {})
    with pytest.raises(ValueError, match="2 rows for parameter a"):
        place([row, row], {"a": (2,)}, {})
    with pytest.raises(ValueError, match="does not use each axis once"):
        Row("a.{L}", "a", "D F -> D F")
    with pytest.raises(ValueError, match="does not use each axis once"):
        Row("a", "a", "D D -> D F")


def test_values_are_cast_on_the_way():
    row = Row("a", "a", "V D -> D V")
    placed = Placed(row, "a", (2, 3), {})
    source = np.arange(6, dtype=np.float16).reshape(3, 2)
    got = placed.read(lambda _, at: source[at], (slice(0, 2), slice(0, 3)), np.dtype(np.float32))
    assert got.dtype == np.float32
    assert math.isclose(got[1, 2], 5.0)
