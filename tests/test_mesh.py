"""Who holds which slice: sizes, specs, the weight at use, host -> device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtune.config import ConfigError
from jaxtune.mesh import (
    gathered,
    local,
    make_mesh,
    partition_spec,
    put_batch,
    row_shards,
    shardings,
    spread,
)

ONES = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def test_minus_one_takes_what_is_left() -> None:
    mesh = make_mesh({**ONES, "fsdp": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    assert row_shards(mesh) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 4, "tensor": 4}, "8 devices cannot be data=1 x fsdp=4 x tensor=4 x context=1 (="),
        ({"fsdp": -1, "tensor": 3}, "8 devices cannot be data=1 x fsdp=-1 x tensor=3 x context=1."),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_mesh({**ONES, **sizes})
    assert message in str(error.value)


def test_specs_follow_the_table_and_what_does_not_divide_is_replicated() -> None:
    mesh = make_mesh({**ONES, "fsdp": 4, "tensor": 2})
    assert partition_spec(("vocab", "embed"), (64, 16), mesh) == P("tensor", "fsdp")
    assert partition_spec(("vocab", "embed"), (63, 16), mesh) == P(None, "fsdp")
    assert partition_spec(("vocab", "embed"), (64, 16), mesh, without="fsdp") == P("tensor", None)
    assert partition_spec(("batch", "length"), (8, 3), mesh) == P("fsdp", None)
    two = make_mesh({**ONES, "data": 2, "fsdp": 4})
    assert partition_spec(("batch", None), (8, 3), two) == P(("data", "fsdp"), None)
    assert partition_spec(("batch", None), (6, 3), two) == P("data", None)
    with pytest.raises(ValueError, match="1 logical axes"):
        partition_spec(("embed",), (4, 4), mesh)


def test_a_gathered_weight_is_whole_and_its_gradient_is_scattered() -> None:
    mesh = make_mesh({**ONES, "fsdp": 8})
    axes = {"w": ("embed", "mlp")}
    w = {"w": jnp.ones((16, 4), jnp.float32)}
    placed = jax.device_put(w, shardings(axes, w, mesh))
    x = jnp.arange(32, dtype=jnp.float32).reshape(2, 16)

    @functools.partial(jax.jit, out_shardings=None)
    def f(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        use = lambda w: jnp.sum(x @ gathered(w, ("embed", "mlp"), jnp.bfloat16))  # noqa: E731
        return gathered(w, ("embed", "mlp"), jnp.bfloat16), jax.grad(use)(w)

    with jax.set_mesh(mesh):
        whole, gradient = f(placed["w"])
    assert whole.dtype == jnp.bfloat16
    assert whole.sharding.is_fully_replicated
    assert gradient.dtype == jnp.float32
    assert gradient.sharding.spec == P("fsdp", None)
    np.testing.assert_allclose(gradient, np.tile(x.sum(0)[:, None], (1, 4)), rtol=1e-2)


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

    def squares(x_BTD: jax.Array, w_DF: jax.Array | None) -> jax.Array:
        cut = spread("mlp", width)
        y_BTD = jnp.einsum("BTF,DF->BTD", jnp.square(jnp.einsum("BTD,DF->BTF", x_BTD, w_DF)), w_DF)
        return jax.lax.psum(y_BTD, cut) if cut else y_BTD

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        token = ("batch", "length", None)
        return jnp.sum(jnp.sin(local(squares, (x, w), (token, (None, "mlp")), token)))

    expected = jax.value_and_grad(loss, argnums=(0, 1))(x, w)
    assert spread("mlp", width) == ()
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 1, "tensor": 4, "context": 1})):
        assert spread("mlp", width) == (("tensor",) if width == 8 else ())
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
