"""A decoder with mixtures of experts: eight devices give what one gives, and who is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.decoding import decode_all

from jaxtune.model import decoder
from jaxtune.ops.cross_entropy import linear_cross_entropy
from jaxtune.ops.moe import balance
from jaxtune.parallel import mesh as meshes
from jaxtune.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec, Stack, parameter_count
from jaxtune.tree import named

B, T, V = 8, 12, 31
MOE = MoeSpec(6, 2, router_bias=True, clamp=(1.7, 2.0), shared_width=24)
SPARSE = LayerSpec(4, 2, 8, 16, RopeSpec(), mlp_bias=True, moe=MOE)
SPEC = ModelSpec(V, 16, (Stack((SPARSE,), 2),), 1e-6, False, 64)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Two texts in a row and, at the end of each, padding."""
    rng = np.random.default_rng(0)
    segment_ids = np.ones((B, T), np.int32)
    segment_ids[:, 7:] = 2
    segment_ids[:, 10:] = 0
    segment_ids[3] = 0
    return {
        "inputs": rng.integers(0, V, (B, T)).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": np.tile(np.r_[np.arange(7), np.arange(5)], (B, 1)).astype(np.int32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "weights": (rng.random((B, T)) * (segment_ids > 0)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def params():
    """Spread wide enough that the router has opinions and biases are not zero."""
    rng = np.random.default_rng(1)
    shapes = decoder.abstract(SPEC, jnp.float32)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)


def _loss(params, batch, remat="none"):
    output = decoder.forward(
        SPEC,
        {"params": params},
        decoder.TokenRows(batch["inputs"], batch["segment_ids"], batch["positions"]),
        decoder.ForwardConfig(jnp.float32, remat),
    )
    sums = linear_cross_entropy(output.hidden, output.head, batch["targets"], batch["weights"])
    return sums.loss + 10.0 * balance(output.load), output.load


@pytest.fixture(scope="module")
def on_one_device(params, batch):
    return jax.jit(jax.value_and_grad(_loss, has_aux=True))(params, batch)


@pytest.mark.parametrize("third", ["context", "expert"])
def test_eight_devices_are_one(params, batch, on_one_device, third):
    """Rows, the experts' width and tokens, or the experts as they are stored, cut in two each; and
    with all recomputed."""
    mesh = meshes.make_mesh({"fsdp": 2, "tensor": 2, third: 2})
    shardings = meshes.shardings(decoder.axes(SPEC), params, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        rows = {
            name: jax.device_put(
                x,
                jax.sharding.NamedSharding(
                    mesh, meshes.partition_spec(("batch", "length"), x.shape, mesh)
                ),
            )
            for name, x in batch.items()
        }
        step = jax.jit(jax.value_and_grad(lambda p, b: _loss(p, b, "full"), has_aux=True))
        (loss, load), grads = step(placed, rows)
    (expected, expected_load), expected_grads = on_one_device
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(load.chosen, expected_load.chosen)
    np.testing.assert_allclose(load.probability, expected_load.probability, rtol=1e-5)
    for name, want in named(expected_grads).items():
        got = np.asarray(named(grads)[name])
        np.testing.assert_allclose(got, want, 1e-4, 2e-5 * np.abs(want).max(), err_msg=name)
        assert np.abs(want).max() > 0, name


@pytest.mark.slow
def test_experts_spread_over_devices_answer_as_on_one(params):
    mesh = meshes.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    placed = jax.device_put(params, meshes.shardings(decoder.axes(SPEC), params, mesh))
    prompts = [[5, 7, 11], [3] * 9, [8, 2, 4, 6, 1]]
    asked = {"max_new_tokens": 6, "stop_ids": (), "dtype": jnp.float32}
    assert decode_all(SPEC, placed, prompts, mesh=mesh, **asked) == decode_all(
        SPEC, params, prompts, **asked
    )


def test_loads_count_real_tokens_of_all_mixtures(batch, on_one_device):
    load = on_one_device[0][1]
    tokens = int((batch["segment_ids"] > 0).sum())
    assert float(load.tokens) == 2 * tokens
    assert float(load.chosen.sum()) == pytest.approx(2 * tokens * 2)
    assert float(load.probability.sum()) == pytest.approx(2 * tokens, rel=1e-5)


def test_the_parameters_are_counted_exactly():
    leaves = named(decoder.abstract(SPEC, jnp.float32))
    assert sum(leaf.size for leaf in leaves.values()) == parameter_count(SPEC)
    assert leaves["stack_0/layer_0/moe/down/kernel"].shape == (2, 6, 16, 16)
    axes = named(decoder.axes(SPEC))
    assert axes["stack_0/layer_0/moe/gate/kernel"] == ("layers", "expert", "embed", "mlp")
    assert axes["stack_0/layer_0/moe/router/kernel"] == ("layers", "embed", "scores")
    assert axes["stack_0/layer_0/moe/router/bias"] == ("layers", "scores")
