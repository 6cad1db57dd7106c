"""What the decoder promises whoever packs, shards, stacks or saves memory."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.conftest import FANCY, ODD, PLAIN, SPEC, Rows

from jaxtune.config import ConfigError
from jaxtune.model import decoder
from jaxtune.model.decoder import ForwardConfig, Params, forward
from jaxtune.parallel import mesh
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack, parameter_count
from jaxtune.tree import named


def hidden(params: Params, rows: Rows, spec: ModelSpec = SPEC, **options: Any) -> jax.Array:
    options = {"dtype": jnp.float32} | options
    return forward(spec, {"params": params}, rows, ForwardConfig(**options)).hidden


def loss(params: Params, rows: Rows, spec: ModelSpec = SPEC, **options: Any) -> jax.Array:
    """Any scalar that every hidden state of a real token moves."""
    real_BT1 = (rows.segment_ids != 0)[..., None]
    return jnp.sum(jnp.where(real_BT1, jnp.sin(hidden(params, rows, spec, **options)), 0.0))


@pytest.fixture(scope="session")
def value_and_gradient(params: Params, packed: Rows) -> tuple[jax.Array, Params]:
    return jax.jit(jax.value_and_grad(loss))(params, packed)


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of its largest element: sums lose places by their terms."""
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        largest = np.max(np.abs(theirs[name]))
        np.testing.assert_allclose(
            ours[name], theirs[name], rtol=0, atol=tolerance * largest, err_msg=name
        )


# --- what a parameter is called, how it is shaped, what it starts as


def test_every_parameter_by_name_and_shape() -> None:
    stacks = (Stack((PLAIN,), 3), Stack((FANCY, ODD), 1))
    tied = ModelSpec(64, 16, stacks, 1e-5, True, 64)
    block = {
        "attention/k/kernel": (16, 2, 8),
        "attention/o/kernel": (4, 8, 16),
        "attention/q/kernel": (16, 4, 8),
        "attention/v/kernel": (16, 2, 8),
        "attention_norm/scale": (16,),
        "mlp/down/kernel": (32, 16),
        "mlp/gate/kernel": (16, 32),
        "mlp/up/kernel": (16, 32),
        "mlp_norm/scale": (16,),
    }
    fancy_block = {
        "attention/k/bias": (4, 8),
        "attention/k/kernel": (16, 4, 8),
        "attention/k_norm/scale": (8,),
        "attention/o/bias": (16,),
        "attention/o/kernel": (4, 8, 16),
        "attention/q/bias": (4, 8),
        "attention/q/kernel": (16, 4, 8),
        "attention/q_norm/scale": (8,),
        "attention/sinks": (4,),
        "attention/v/bias": (4, 8),
        "attention/v/kernel": (16, 4, 8),
        "attention_norm/scale": (16,),
        "attention_post_norm/scale": (16,),
        "mlp/down/bias": (16,),
        "mlp/down/kernel": (48, 16),
        "mlp/gate/bias": (48,),
        "mlp/gate/kernel": (16, 48),
        "mlp/up/bias": (48,),
        "mlp/up/kernel": (16, 48),
        "mlp_norm/scale": (16,),
        "mlp_post_norm/scale": (16,),
    }
    odd_block = {
        "attention/k/kernel": (16, 2, 8),
        "attention/k_norm/scale": (2, 8),
        "attention/o/kernel": (4, 8, 16),
        "attention/q/kernel": (16, 4, 8),
        "attention/q_norm/scale": (4, 8),
        "attention/v/kernel": (16, 2, 8),
        "attention_post_norm/scale": (16,),
        "mlp/down/kernel": (40, 16),
        "mlp/up/kernel": (16, 40),
        "mlp_post_norm/scale": (16,),
    }
    expected = {"embed/table": (64, 16), "final_norm/scale": (16,)}
    expected |= {f"stack_0/layer_0/{name}": (3, *shape) for name, shape in block.items()}
    expected |= {f"stack_1/layer_0/{name}": (1, *shape) for name, shape in fancy_block.items()}
    expected |= {f"stack_1/layer_1/{name}": (1, *shape) for name, shape in odd_block.items()}
    shapes = {name: leaf.shape for name, leaf in named(decoder.abstract(tied, jnp.float32)).items()}
    assert shapes == expected
    untied = ModelSpec(64, 16, tied.stacks, 1e-5, False, 64)
    assert named(decoder.abstract(untied, jnp.float32))["head/kernel"].shape == (16, 64)
    biases = {
        name.removesuffix("bias")
        for name in named(decoder.abstract(replace(tied, norm="layer"), jnp.float32))
        if name.endswith("norm/bias")
    }
    norms = {name.removesuffix("scale") for name in expected if name.endswith("/scale")}
    assert biases == {name for name in norms if "/q_norm/" not in name and "/k_norm/" not in name}


def test_axes_name_every_dimension_by_its_meaning() -> None:
    axes, shapes = named(decoder.axes(SPEC)), named(decoder.abstract(SPEC, jnp.bfloat16))
    assert axes.keys() == shapes.keys()
    sizes = {"embed": 16, "vocab": 64, "head_dim": 8, "heads": 4}
    for name, leaf in shapes.items():
        assert leaf.dtype == jnp.bfloat16
        assert len(axes[name]) == leaf.ndim, name
        assert (axes[name][0] == "layers") == name.startswith("stack_"), name
        for axis, size in zip(axes[name], leaf.shape, strict=True):
            assert sizes.get(axis, size) == size, name
    assert axes["stack_0/layer_0/attention/k/kernel"] == ("layers", "embed", "kv_heads", "head_dim")
    assert axes["stack_0/layer_1/mlp/down/bias"] == ("layers", "norm")


def test_the_count_is_what_is_allocated(params: Params) -> None:
    assert parameter_count(SPEC) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_start_values(params: Params) -> None:
    for name, leaf in named(params).items():
        if name.endswith("/bias"):
            assert np.all(leaf == 0), name
        elif name.endswith("/scale"):
            assert np.all(leaf == 1 - SPEC.norm_offset), name
        elif not name.endswith("/sinks"):
            # At least 256 numbers: their spread is within a seventh of the true one (3 sigma).
            assert np.std(leaf) == pytest.approx(SPEC.init_scale, rel=1 / 7), name
            assert abs(np.mean(leaf)) < SPEC.init_scale / 5, name
    first, second = params["stack_0"]["layer_0"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(first, second)


def test_start_values_do_not_depend_on_the_mesh(params: Params) -> None:
    devices = mesh.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    shape = decoder.abstract(SPEC, jnp.float32)
    shardings = mesh.shardings(decoder.axes(SPEC), shape, devices)
    make = jax.jit(lambda key: decoder.init(SPEC, key, jnp.float32), out_shardings=shardings)
    spread = make(jax.random.key(0))
    q_kernel = spread["stack_0"]["layer_0"]["attention"]["q"]["kernel"]
    assert q_kernel.addressable_shards[0].data.shape == (2, 4, 2, 8)
    # The same random bits; their transform to a normal may differ in the last place.
    assert_close(spread, params, 1e-6)


def test_any_size_has_a_shape_without_memory() -> None:
    layer = LayerSpec(64, 8, 128, 28672, RopeSpec(5e5, "llama3", 8.0))
    spec = ModelSpec(128256, 8192, (Stack((layer,), 80),), 1e-5, False, 131072)
    leaves = jax.tree.leaves(decoder.abstract(spec, jnp.bfloat16))
    assert sum(leaf.size for leaf in leaves) == parameter_count(spec) == 70_553_706_496


# --- who sees whom


def test_causality_by_gradients() -> None:
    """Each position holds its own token, so the table's gradient says who reached whom."""
    T = 8
    spec = ModelSpec(16, 16, (Stack((PLAIN,), 2),), 1e-5, False, 64, init_scale=0.4)
    params = decoder.init(spec, jax.random.key(0), jnp.float32)
    segments = [1, 1, 1, 2, 2, 2, 2, 0]
    rows = Rows(jnp.arange(T)[None], jnp.array([segments]), jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]))

    def outputs(table: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(hidden(params | {"embed": {"table": table}}, rows, spec)[0]), -1)

    reached_TT = jnp.any(jax.jacrev(outputs)(params["embed"]["table"])[:, :T] != 0, axis=-1)
    expected = [
        [s <= t and segments[s] == segments[t] and (segments[t] != 0 or s == t) for s in range(T)]
        for t in range(T)
    ]
    np.testing.assert_array_equal(reached_TT, expected)


def test_a_text_in_a_pack_is_the_text_alone(params: Params, packed: Rows) -> None:
    together = hidden(params, packed)
    for row, lo, hi in ((0, 0, 5), (0, 5, 9), (1, 0, 7)):
        alone = Rows(*(x[row : row + 1, lo:hi] for x in packed))
        np.testing.assert_allclose(
            hidden(params, alone)[0], together[row, lo:hi], atol=2e-5, err_msg=f"{row} {lo}:{hi}"
        )


def test_a_neighbour_in_the_pack_changes_not_one_bit(params: Params, packed: Rows) -> None:
    run = jax.jit(hidden)
    first = packed.segment_ids[0] == 1
    inputs = packed.inputs.at[0].set(
        jnp.where(first, (packed.inputs[0] + 1) % 64, packed.inputs[0])
    )
    before, after = run(params, packed), run(params, packed._replace(inputs=inputs))
    assert not np.array_equal(before[0, first], after[0, first])
    assert np.array_equal(before[0, ~first], after[0, ~first])
    assert np.array_equal(before[1:], after[1:])


def test_padding_is_finite_and_teaches_nothing(params: Params, packed: Rows) -> None:
    assert np.all(np.isfinite(hidden(params, packed)))
    empty = Rows(*(x[3:] for x in packed))  # a row of padding only
    value, gradients = jax.value_and_grad(loss)(params, empty)
    assert value == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients))


def test_window_hides_what_is_older() -> None:
    """One layer, window 3: a token is moved by itself and the two before it."""
    layer = LayerSpec(4, 2, 8, 32, RopeSpec(10_000.0), window=3)
    spec = ModelSpec(16, 16, (Stack((layer,), 1),), 1e-5, False, 64, init_scale=0.4)
    params = decoder.init(spec, jax.random.key(0), jnp.float32)
    T = 7
    rows = Rows(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32), jnp.arange(T)[None])
    before = hidden(params, rows, spec)[0]
    after = hidden(params, rows._replace(inputs=rows.inputs.at[0, 2].set(15)), spec)[0]
    moved = np.any(np.asarray(before != after), axis=-1)
    np.testing.assert_array_equal(moved, [False, False, True, True, True, False, False])


# --- one function, however it is computed


@pytest.mark.parametrize("remat", ["dots"])
def test_recomputation_changes_no_number(
    remat: str, params: Params, packed: Rows, value_and_gradient: tuple[jax.Array, Params]
) -> None:
    def f(params: Params, rows: Rows) -> jax.Array:
        return loss(params, rows, remat=remat)

    value, gradient = jax.jit(jax.value_and_grad(f))(params, packed)
    assert float(value) == pytest.approx(float(value_and_gradient[0]), rel=1e-6)
    assert_close(gradient, value_and_gradient[1], 1e-5)  # the same operations, fused differently


def lowered(repeats: int, remat: str) -> jax.stages.Lowered:
    """The gradient of eight layers in `repeats` repeats."""
    layer = LayerSpec(4, 2, 8, 512, RopeSpec(10_000.0))
    spec = ModelSpec(64, 16, (Stack((layer,) * (8 // repeats), repeats),), 1e-5, False, 64)
    rows = Rows(*[jax.ShapeDtypeStruct((4, 64), jnp.int32)] * 3)

    def f(params: Params, rows: Rows) -> jax.Array:
        return loss(params, rows, spec, remat=remat)

    return jax.jit(jax.grad(f)).lower(decoder.abstract(spec, jnp.float32), rows)


def test_full_recomputation_keeps_less() -> None:
    def peak_bytes(remat: str) -> int:
        return lowered(4, remat).compile().memory_analysis().temp_size_in_bytes

    assert peak_bytes("full") < 0.6 * peak_bytes("none")


def test_recomputation_without_a_loop_is_fenced_off() -> None:
    """The CPU compiler drops the fence, so its memory cannot be the judge."""

    def fences(repeats: int, remat: str) -> int:
        return lowered(repeats, remat).as_text().count("optimization_barrier")

    assert fences(1, "full") == fences(1, "none") + 8
    assert fences(4, "full") == fences(4, "none")


def test_unknown_policy_names_the_known_ones(params: Params, packed: Rows) -> None:
    message = (
        "gradient_checkpointing: there is no policy 'half'. "
        "Use one of none, full, attention, projections, dots, offload."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        hidden(params, packed, remat="half")


def test_scanned_layers_are_the_layers_in_a_row(params: Params, packed: Rows) -> None:
    """Two repeats of (plain, fancy) are one repeat of (plain, fancy, plain, fancy)."""
    unrolled_spec = replace(SPEC, stacks=(Stack((PLAIN, FANCY, PLAIN, FANCY), 1), SPEC.stacks[1]))
    unrolled = params | {
        "stack_0": {
            f"layer_{j}": jax.tree.map(
                lambda leaf, repeat=j // 2: leaf[repeat : repeat + 1],
                params["stack_0"][f"layer_{j % 2}"],
            )
            for j in range(4)
        }
    }
    np.testing.assert_allclose(
        hidden(unrolled, packed, unrolled_spec), hidden(params, packed), atol=2e-5
    )


def test_attention_by_blocks_is_the_same_model(params: Params, packed: Rows) -> None:
    np.testing.assert_allclose(
        hidden(params, packed, attention="blocked"), hidden(params, packed), atol=2e-5
    )


def test_attention_that_cannot_be_run_is_an_error(params: Params, packed: Rows) -> None:
    with pytest.raises(ConfigError, match="attention: splash cannot be run: it is for tpu"):
        hidden(params, packed, attention="splash")


def test_half_precision_compute_over_f32_parameters(params: Params, packed: Rows) -> None:
    exact = hidden(params, packed)
    output = forward(
        SPEC,
        {"params": params},
        packed,
        ForwardConfig(jnp.bfloat16),
    )
    assert output.hidden.dtype == jnp.bfloat16
    assert output.head.kernel.dtype == jnp.float32
    error = np.abs(np.asarray(output.hidden, np.float32) - np.asarray(exact))
    assert 0 < error.mean() < 0.05  # hidden states have size one
    gradient = jax.jit(jax.grad(lambda p: loss(p, packed, dtype=jnp.bfloat16)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_embedding_gradient_is_summed_in_f32() -> None:
    """2048 copies of one token add up in its row; bfloat16 would lose them from 256 on."""
    layer = LayerSpec(1, 1, 2, 2, None)
    spec = ModelSpec(4, 2, (Stack((layer,), 1),), 1e-5, False, 4096)
    params = jax.tree.map(jnp.zeros_like, decoder.init(spec, jax.random.key(0), jnp.float32))
    params["embed"]["table"] = jnp.ones((4, 2))
    params["final_norm"]["scale"] = jnp.ones(2)
    T = 2048
    rows = Rows(jnp.ones((1, T), jnp.int32), jnp.ones((1, T), jnp.int32), jnp.arange(T)[None])

    def f(table: jax.Array) -> jax.Array:
        return jnp.sum(
            hidden(params | {"embed": {"table": table}}, rows, spec, dtype=jnp.bfloat16)[..., 0],
            dtype=jnp.float32,
        )

    # The norm of (1, 1) pulls each feature by +-1/2.
    np.testing.assert_allclose(jax.grad(f)(params["embed"]["table"])[1], [T / 2, -T / 2], rtol=1e-2)


def test_tied_head_is_the_table_and_gets_both_gradients() -> None:
    spec = ModelSpec(16, 8, (Stack((LayerSpec(2, 1, 4, 8, RopeSpec(1e4)),), 1),), 1e-5, True, 64)
    untied = ModelSpec(16, 8, spec.stacks, 1e-5, False, 64)
    params = decoder.init(spec, jax.random.key(0), jnp.float32)
    T = 5
    rows = Rows(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32), jnp.arange(T)[None])

    def f(params: Params, spec: ModelSpec) -> jax.Array:
        options = {"segment_ids": rows.segment_ids, "positions": rows.positions}
        values = decoder.logits(spec, {"params": params}, rows.inputs, dtype=jnp.float32, **options)
        return jnp.sum(jnp.sin(values))

    copied = params | {"head": {"kernel": params["embed"]["table"].T}}
    assert float(f(params, spec)) == pytest.approx(float(f(copied, untied)), rel=1e-6)
    gradient = jax.jit(jax.grad(f), static_argnums=1)
    once, apart = gradient(params, spec), gradient(copied, untied)
    np.testing.assert_allclose(
        once["embed"]["table"], apart["embed"]["table"] + apart["head"]["kernel"].T, atol=1e-5
    )


@pytest.mark.parametrize("sizes", [(8, 1), (1, 2), (4, 2)], ids=["fsdp", "tensor", "both"])
def test_many_devices_are_one_device(
    sizes: tuple[int, int],
    params: Params,
    packed: Rows,
    value_and_gradient: tuple[jax.Array, Params],
) -> None:
    fsdp, tensor = sizes
    devices = jax.devices()[: fsdp * tensor]
    if len(devices) < fsdp * tensor:
        pytest.skip(f"needs {fsdp * tensor} devices")
    grid = mesh.make_mesh({"data": 1, "fsdp": fsdp, "tensor": tensor, "context": 1}, devices)
    shardings = mesh.shardings(decoder.axes(SPEC), decoder.abstract(SPEC, jnp.float32), grid)
    spread = jax.device_put(params, shardings)
    rows = Rows(*(jnp.tile(x, (2, 1)) for x in packed))  # eight rows for eight devices
    with jax.set_mesh(grid):
        value, gradient = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(
            spread, rows
        )
    assert float(value) / 2 == pytest.approx(float(value_and_gradient[0]), rel=1e-5)
    halved = jax.tree.map(lambda leaf: leaf / 2, gradient)
    assert_close(halved, value_and_gradient[1], 1e-5)  # sums in another order
