"""Figures of programs whose cost is known in closed form, compiled here for eight CPU devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.planning.hlo_cost import cost, parse

MESH = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def placed(shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(*spec))
    )


def hlo(f: Any, *args: Any, out: PartitionSpec | None = None) -> str:
    sharding = None if out is None else NamedSharding(MESH, out)
    return jax.jit(f, out_shardings=sharding).lower(*args).compile().as_text()


def test_loops_count_as_often_as_they_turn() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def outer(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            x = jax.lax.fori_loop(2, 5, lambda _, x: jnp.tanh(x @ w), x)
            return x @ w, None

        return jax.lax.scan(outer, x, None, length=7)[0]

    found = cost(hlo(f, jnp.ones((16, 32)), jnp.ones((32, 32))), 1)
    assert found.loops_unread == 0
    assert found.matmul_flops == 7 * (3 + 1) * 2 * 16 * 32 * 32


def test_a_loop_without_a_known_end_is_said_to_be_unread() -> None:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x * 2, x)

    assert cost(hlo(f, jnp.ones(4)), 1).loops_unread == 1


def test_a_loop_may_say_how_often_it_is_expected_to_turn() -> None:
    def f(x: jax.Array, n: jax.Array) -> jax.Array:
        with jax.named_scope("turns_4"):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x @ x), x)

    for function in (f, jax.vmap(f, in_axes=(0, None))):
        x = jnp.ones((3, 8, 8)) if function is not f else jnp.ones((8, 8))
        found = cost(hlo(function, x, jnp.int32(3)), 1)
        rows = x.size // 64
        assert (found.matmul_flops, found.loops_unread) == (4 * 2 * 8**3 * rows, 0)


def test_bytes_on_the_wire_are_those_of_a_ring() -> None:
    rows, inner, columns = 64, 128, 32

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    # Rows stay where they are, the weight's slices come together: 7 slices pass every device.
    found = cost(hlo(f, placed((rows, inner), "fsdp"), placed((inner, columns), "fsdp")), 8)
    assert found.wire.keys() == {"all-gather"}
    assert found.wire["all-gather"].bytes == 7 * (inner // 8) * columns * 4
    assert found.matmul_flops == 2 * (rows // 8) * inner * columns
    # A sum over a divided dimension, wanted everywhere: 2 x 7/8 of the result.
    args = placed((rows, inner), None, "fsdp"), placed((inner, columns), "fsdp")
    found = cost(hlo(f, *args, out=PartitionSpec()), 8)
    assert found.wire["all-reduce"].bytes == pytest.approx(2 * 7 / 8 * rows * columns * 4)
    assert found.exposed_bytes == found.wire_bytes


def test_convolutions_count_the_pairs_that_meet_data() -> None:
    x, w = jnp.ones((1, 3, 10)), jnp.ones((5, 3, 4))
    text = """HloModule m
ENTRY %main (x: f32[1,3,10], w: f32[5,3,4]) -> f32[1,5,10] {
  %x = f32[1,3,10]{2,1,0} parameter(0)
  %w = f32[5,3,4]{2,1,0} parameter(1)
  ROOT %c = f32[1,5,10]{2,1,0} convolution(%x, %w), window={size=4 pad=1_2}, dim_labels=bf0_oi0->bf0
}
"""
    ones = jax.lax.conv_general_dilated(x, w, (1,), [(1, 2)])
    # Each output of ones is the number of its products.
    assert cost(text, 1).matmul_flops == 2 * float(np.sum(ones))


def test_kernels_are_counted_by_their_shapes() -> None:
    text = """HloModule m
ENTRY %main (q: bf16[2,8,512,64]) -> bf16[2,8,512,64] {
  %q = bf16[2,8,512,64]{3,2,1,0} parameter(0)
  %k = bf16[2,2,512,64]{3,2,1,0} parameter(1)
  ROOT %splash_mha_fwd.3 = bf16[2,8,512,64]{3,2,1,0} custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", backend_config={"estimated_cycles":"17"}
}
"""
    found = cost(text, 1)
    # Two products, 2 FLOPs for each pair of numbers, half of the pairs.
    assert found.kernel_flops == 2 * 2 * (2 * 8 * 512 * 512 * 64) / 2
    assert found.cycles == 17
    assert parse(text).entry.root.operands == ("q", "k", "k")


def test_cycles_that_the_compiler_does_not_know_are_not_counted() -> None:
    text = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%x, %x), backend_config={"estimated_cycles":"120"}
  ROOT %g = f32[8]{0} negate(%a), backend_config={"estimated_cycles":"9223372036854775807"}
}
"""
    assert cost(text, 1).cycles == 120
