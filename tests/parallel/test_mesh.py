"""Who holds which slice: sizes, specs, the weight at use, host -> device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtune.config import ConfigError
from jaxtune.parallel import mesh as meshes
from jaxtune.parallel.collectives import (
    EVERYWHERE,
    all_gathered,
    bits,
    row_positions,
    shard_map_step,
    sharded_lookup,
    slices,
    summed,
    tokens,
    total,
    whole_rows,
    zigzag_positions,
    zigzag_split,
)
from jaxtune.parallel.mesh import (
    local,
    make_mesh,
    partition_spec,
    put_batch,
    row_shards,
    shardings,
    sizes_of,
    spread,
)

ONES = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def test_minus_one_takes_what_is_left() -> None:
    mesh = make_mesh({**ONES, "fsdp": -1, "tensor": 2})
    assert sizes_of(mesh) == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "context": 1}
    assert row_shards(mesh) == 4
    mesh = make_mesh({"fsdp": -1, "expert": 2, "tensor": 2})  # what is not given is 1
    assert sizes_of(mesh) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2, "context": 1}
    assert row_shards(mesh) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 4, "tensor": 4}, "data=1 x fsdp=4 x expert=1 x tensor=4 x context=1 (="),
        ({"fsdp": -1, "tensor": 3}, "8 devices cannot be data=1 x fsdp=-1 x expert=1 x tensor=3 x"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_mesh({**ONES, **sizes})
    assert message in str(error.value)


def test_slices_that_would_end_inside_a_tile_are_cut_along_the_width() -> None:
    mesh = make_mesh({"fsdp": 8})
    for names, shape in ((("embed", "mlp"), (168, 512)), (("mlp", "embed"), (512, 168))):
        swapped = ["fsdp" if name == "mlp" else None for name in names]
        assert partition_spec(names, shape, mesh) == P(*swapped)  # 168 / 8 = 21 rows
        whole = tuple(256 if size == 168 else size for size in shape)  # 32 rows: two tiles
        kept = ["fsdp" if name == "embed" else None for name in names]
        assert partition_spec(names, whole, mesh) == P(*kept)
    assert partition_spec(("embed", "mlp"), (168, 520), mesh) == P("fsdp", None)  # 65 of a width
    assert partition_spec(("embed", "heads"), (168, 512), mesh) == P("fsdp", None)
    beside = make_mesh({"fsdp": 4, "tensor": 2})
    assert partition_spec(("embed", "mlp"), (168, 512), beside) == P("fsdp", "tensor")


def test_specs_follow_the_table_and_what_does_not_divide_is_replicated() -> None:
    mesh = make_mesh({**ONES, "fsdp": 4, "tensor": 2})
    assert partition_spec(("vocab", "embed"), (64, 16), mesh) == P("tensor", "fsdp")
    assert partition_spec(("vocab", "embed"), (63, 16), mesh) == P(None, "fsdp")
    assert partition_spec(("vocab", "embed"), (64, 16), mesh, only=("tensor",)) == P("tensor", None)
    plane = make_mesh({**ONES, "fsdp": 4, "context": 2}, torus=(2, 2))
    assert partition_spec(("embed",), (16,), plane) == P(("fsdp", "fsdp_y", "context"))
    assert partition_spec(("embed",), (12,), plane) == P(("fsdp", "fsdp_y"))
    assert partition_spec(("batch", "length"), (8, 3), mesh) == P("fsdp", None)
    two = make_mesh({**ONES, "data": 2, "fsdp": 4})
    assert partition_spec(("batch", None), (8, 3), two) == P(("data", "fsdp"), None)
    assert partition_spec(("batch", None), (6, 3), two) == P("data", None)
    experts = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    bank, own = ("layers", "expert", "embed", "mlp"), P(None, "expert", "fsdp", "tensor")
    assert partition_spec(bank, (3, 4, 8, 6), experts) == own  # one mesh axis cuts one dimension
    assert partition_spec(bank, (3, 5, 8, 6), experts) == P(
        None, None, ("fsdp", "expert"), "tensor"
    )
    assert partition_spec(("embed", "scores"), (8, 4), experts) == P(("fsdp", "expert"), None)
    with pytest.raises(ValueError, match="1 logical axes"):
        partition_spec(("embed",), (4, 4), mesh)


class Chip(NamedTuple):
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0


@pytest.mark.parametrize(
    ("places", "torus"),
    [
        ([(x, y, 0) for y in range(4) for x in range(4)], (4, 4)),
        ([(x, y, z) for z in range(2) for y in range(4) for x in range(2)], (2, 4, 2)),
        ([(x, 0, 0) for x in range(8)], (8,)),
        ([(0, 0, 0)], ()),
        ([(0, 0, 0), (0, 0, 0)], (2,)),
        ([(0, 0, 0), (1, 1, 0), (2, 0, 0), (3, 1, 0)], (4,)),
    ],
)
def test_a_line_of_devices_knows_the_dimensions_of_its_network(
    places: list[tuple[int, ...]], torus: tuple[int, ...]
) -> None:
    assert meshes._torus([Chip(place) for place in places]) == torus


def test_devices_are_laid_out_as_the_network_is() -> None:
    """Rows of the grid one after the other, both cores of a chip, and slices along data."""
    sizes = [(x, y, 0) for y in (1, 0) for x in (1, 0)]
    chips = [Chip(at, core, number) for number in (1, 0) for at in sizes for core in (1, 0)]
    grid = meshes._grid([2, 4, 1, 2, 1], chips)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data=1 over 2 slices\. .* choose data=2"):
        meshes._grid([1, 8, 1, 2, 1], chips)  # type: ignore[arg-type]
    assert [grid[n, 0, 0, 0, 0].slice_index for n in range(2)] == [0, 1]
    assert [chip.coords[:2] for chip in grid[0, :, 0, 0, 0]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [chip.core_on_chip for chip in grid[0, 0, 0, :, 0]] == [0, 1]
    assert meshes._torus(grid[0, :, 0, 0, 0]) == (2, 2)
    chips = [Chip((n // 16, n // 4 % 4, n % 4), core) for n in range(64) for core in range(2)]
    cube = meshes._grid([1, 128, 1, 1, 1], chips)  # type: ignore[arg-type]
    assert meshes._torus(cube[0, :, 0, 0, 0]) == (4, 4, 8)


MESHES = [({"fsdp": 8}, (8,)), ({"fsdp": 8}, (2, 4)), ({"data": 2, "fsdp": 4}, (2, 2)),
          ({"fsdp": 2, "tensor": 2, "context": 2}, (2,)),
          ({"fsdp": 4, "expert": 2}, (2, 2))]  # fmt: skip


@pytest.mark.parametrize(("sizes", "torus"), MESHES, ids=str)
def test_a_gathered_weight_is_whole_and_its_gradient_is_reduce_scattered(
    sizes: dict[str, int], torus: tuple[int, ...]
) -> None:
    """sum(x @ w) over the rows and tokens of all devices, against the same on one."""
    mesh = make_mesh({**ONES, **sizes}, torus=torus)
    names = ("mlp", "embed")  # the cut dimension is not the first
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(8, 2, 4)), jnp.float32)

    def gradient(w: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        def use(w: dict[str, jax.Array]) -> jax.Array:
            whole = all_gathered(w["w"], names, (4, 16), jnp.bfloat16)
            assert (whole.shape, whole.dtype) == ((4, 16), jnp.bfloat16)
            return jnp.sum(jnp.sin(x @ whole.astype(jnp.float32)))

        value, found = jax.value_and_grad(use)(w)
        return summed(found, {"w": names}, {"w": np.zeros((4, 16))}), total(value)

    own = slices({"w": names}, w, mesh)
    f = shard_map_step(gradient, mesh, (own, tokens(x.shape, mesh)), (own, EVERYWHERE))
    with jax.set_mesh(mesh):
        placed = jax.device_put(w, shardings({"w": names}, w, mesh))
        compiled = jax.jit(f).lower(placed, x).compile()
        found, value = compiled(placed, x)
    rounded = w["w"].astype(jnp.bfloat16).astype(jnp.float32)
    expected, of_w = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(x @ w)))(rounded)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(found["w"], of_w, atol=0.02 * float(jnp.abs(of_w).max()))
    assert found["w"].dtype == jnp.float32
    assert found["w"].sharding == placed["w"].sharding
    scatters = compiled.as_text().count(" reduce-scatter(")
    along = sum(size > 1 for size in (*torus, sizes.get("context", 1), sizes.get("expert", 1)))
    assert scatters == along  # one for each dimension of the network


@pytest.mark.parametrize(("sizes", "torus"), MESHES, ids=str)
@pytest.mark.parametrize("width", [16, 1024, 6])
def test_rows_of_a_table_that_is_cut_along_them(
    sizes: dict[str, int], torus: tuple[int, ...], width: int
) -> None:
    """Exchanged whole, exchanged along a dimension and gathered along the other, and not cut."""
    mesh = make_mesh({**ONES, **sizes}, torus=torus)
    names = ("vocab", "embed")
    rng = np.random.default_rng(0)
    table = {"t": jnp.asarray(rng.normal(size=(10, width)), jnp.float32)}
    ids = jnp.asarray(rng.integers(0, 10, (8, 4)))
    factor = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)

    def gradient(table: Any, ids: jax.Array, factor: jax.Array) -> tuple[Any, jax.Array]:
        def use(table: Any) -> tuple[jax.Array, jax.Array]:
            rows = sharded_lookup(table["t"], ids, width, jnp.float32)
            return jnp.sum(factor[..., None] * jnp.sin(rows)), rows

        found, rows = jax.grad(use, has_aux=True)(table)
        return summed(found, {"t": names}, {"t": np.zeros((10, width))}), rows

    own, here = slices({"t": names}, table, mesh), tokens(ids.shape, mesh)
    f = shard_map_step(gradient, mesh, (own, here, here), (own, here))
    with jax.set_mesh(mesh):
        found, rows = jax.jit(f)(
            jax.device_put(table, shardings({"t": names}, table, mesh)), ids, factor
        )
    np.testing.assert_array_equal(rows, table["t"][ids])
    expected = jax.grad(lambda t: jnp.sum(factor[..., None] * jnp.sin(t[ids])))(table["t"])
    np.testing.assert_allclose(found["t"], expected, rtol=1e-5, atol=1e-6)


def test_what_is_drawn_for_a_token_does_not_depend_on_the_devices() -> None:
    shape = (8, 6, 5)  # not in pairs of stretches over two devices: zigzag_split as placed

    def draw(ids: jax.Array) -> jax.Array:
        return bits(jax.random.key(3), (*ids.shape, 5))

    alone = draw(jnp.zeros(shape[:2]))
    assert len(np.unique(alone)) == alone.size
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}):
        mesh = make_mesh({**ONES, **sizes})
        here = tokens(shape[:2], mesh)
        with jax.set_mesh(mesh):
            spread_out = jax.jit(shard_map_step(draw, mesh, (here,), here))(jnp.zeros(shape[:2]))
        np.testing.assert_array_equal(spread_out, alone)


def test_bits_are_even_and_their_own_for_each_number_wherever_tokens_lie() -> None:
    def draw(ids: jax.Array, key: int = 3) -> jax.Array:
        return bits(jax.random.key(key), (*ids.shape, 3, 50))

    ids = jnp.zeros((8, 14))  # 14 over two devices: plain stretches
    alone = np.asarray(draw(ids))
    assert alone.dtype == np.uint32
    for bit in range(29):  # four bits in a row: 16,800 numbers in 16 boxes
        counts = np.bincount((alone.ravel() >> bit) & 15, minlength=16)
        assert np.square(counts - 1050).sum() / 1050 < 50  # chi square, 15 degrees: p = 1e-5
    of_tokens = np.corrcoef(alone.reshape(8 * 14, 150).astype(np.float64)) - np.eye(8 * 14)
    assert np.abs(of_tokens).max() < 0.42  # 5 sigma of 150 numbers
    of_places = np.corrcoef(alone.reshape(8 * 14, 150).T.astype(np.float64)) - np.eye(150)
    assert np.abs(of_places).max() < 0.52  # 5.5 sigma of 112
    assert (draw(ids, key=4) != alone).mean() > 0.99
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}):
        mesh = make_mesh({**ONES, **sizes})
        here = tokens(ids.shape, mesh)
        with jax.set_mesh(mesh):
            shared = jax.jit(shard_map_step(draw, mesh, (here,), here))(ids)
        np.testing.assert_array_equal(shared, alone)


@pytest.mark.parametrize("length", [16, 12])
def test_tokens_are_dealt_in_pairs_and_rows_come_back_in_order(length: int) -> None:
    """8 tokens over 2 devices: 0 1 6 7 and 2 3 4 5; plain stretches where there are no pairs."""
    assert zigzag_positions(8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert zigzag_positions(6, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    mesh = make_mesh({**ONES, "fsdp": 2, "context": 4})
    rows = jnp.arange(4 * length).reshape(4, length)

    def f(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mine = zigzag_split(x)
        slope = jax.grad(lambda m: jnp.sum(jnp.square(whole_rows(m))))(mine.astype(jnp.float32))
        return mine, whole_rows(mine)[:, row_positions(length)], slope

    here = tokens(rows.shape, mesh)
    with jax.set_mesh(mesh):
        mine, again, slope = jax.jit(shard_map_step(f, mesh, (here,), (here, here, here)))(rows)
    np.testing.assert_array_equal(mine, rows[:, zigzag_positions(length, 4).reshape(-1)])
    np.testing.assert_array_equal(again, mine)
    # Each of the four devices of a row adds its share to the sum of what all return.
    np.testing.assert_array_equal(slope, 4 * 2.0 * mine)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    mesh = make_mesh({**ONES, "fsdp": 4, "context": 2})
    assert tokens((8, 6), mesh) == P(("data", "fsdp", "fsdp_y", "fsdp_z", "expert"), "context")
    for shape in ((6, 6), (8, 5)):
        with pytest.raises(ValueError, match="does not divide over 4"):
            tokens(shape, mesh)


class Pair(NamedTuple):
    a: np.ndarray
    b: np.ndarray


def test_put_batch_asks_only_for_what_it_holds_and_places_rows() -> None:
    mesh = make_mesh({**ONES, "data": 2, "fsdp": 2, "tensor": 2})
    whole = Pair(np.arange(24).reshape(8, 3), np.arange(24).reshape(8, 3) * 2.0)
    asked = []

    def rows(lo: int, hi: int) -> Pair:
        asked.append((lo, hi))
        return Pair(whole.a[lo:hi], whole.b[lo:hi])

    placed = put_batch(rows, batch_size=8, length=3, mesh=mesh)
    assert asked == [(0, 8)]  # one process holds all rows
    assert isinstance(placed, Pair)
    for ours, theirs in zip(placed, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert {s.data.shape for s in ours.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize("rows", [8, 3])
@pytest.mark.parametrize("width", [8, 6])
def test_local_work_adds_up_what_is_cut(rows: int, width: int) -> None:
    """Rows over data and fsdp, a summed width over tensor; what does not divide is on all."""
    rng = np.random.default_rng(0)
    x, w = 0.3 * rng.normal(size=(rows, 4, 5)), 0.3 * rng.normal(size=(5, width))
    x, w = (jnp.asarray(values, jnp.float32) for values in (x, w))

    def squares(cut: tuple[str, ...], x_BTD: jax.Array, w_DF: jax.Array | None) -> jax.Array:
        y_BTD = jnp.einsum("BTF,DF->BTD", jnp.square(jnp.einsum("BTD,DF->BTF", x_BTD, w_DF)), w_DF)
        return jax.lax.psum(y_BTD, cut) if cut else y_BTD

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        token = ("batch", "length", None)
        here = functools.partial(squares, spread("mlp", width))
        return jnp.sum(jnp.sin(local(here, (x, w), (token, (None, "mlp")), token)))

    expected = jax.value_and_grad(loss, argnums=(0, 1))(x, w)
    assert spread("mlp", width) == ()
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 1, "tensor": 4, "context": 1})):
        assert spread("mlp", width) == (("tensor",) if width == 8 else ())
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
