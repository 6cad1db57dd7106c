"""Updates and schedules against torch, transformers and closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.learn import optim
from jaxtune.learn.state import abstract_state, init_opt_state


def rates(kind: str, steps: int, *, warmup: int, total: int, lr: float = 0.2) -> list[float]:
    at = optim.schedule(kind, learning_rate=lr, warmup_steps=warmup, total_steps=total)
    return [float(at(jnp.asarray(step))) for step in range(steps)]


def test_linear_and_cosine_points() -> None:
    linear = rates("linear", 101, warmup=10, total=100)
    assert linear[0] == 0.0
    assert linear[5] == pytest.approx(0.1)
    assert linear[10] == pytest.approx(0.2)
    assert linear[55] == pytest.approx(0.1)
    assert linear[100] == 0.0
    cosine = rates("cosine", 101, warmup=10, total=100)
    assert cosine[55] == pytest.approx(0.1)
    assert cosine[32] == pytest.approx(0.1 * (1 + math.cos(math.pi * 22 / 90)), rel=1e-5)
    assert cosine[100] == pytest.approx(0.0, abs=1e-8)


def test_constant_has_no_warmup_but_its_sister_has() -> None:
    assert rates("constant", 3, warmup=2, total=9) == pytest.approx([0.2] * 3)
    assert rates("constant_with_warmup", 4, warmup=2, total=9) == pytest.approx([0, 0.1, 0.2, 0.2])


def test_no_warmup_starts_at_the_peak_and_past_the_end_stays_at_zero() -> None:
    assert rates("linear", 7, warmup=0, total=4) == pytest.approx([0.2, 0.15, 0.1, 0.05, 0, 0, 0])


def test_warmup_is_a_share_below_one_and_a_number_above() -> None:
    assert optim.warmup_length(0.03, 100) == 3
    assert optim.warmup_length(0.03, 101) == 4  # rounded up, as transformers does
    assert optim.warmup_length(0, 100) == 0
    assert optim.warmup_length(1, 100) == 1
    assert optim.warmup_length(50, 100) == 50


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 13), (5, 20), (20, 20)])
def test_schedules_equal_those_of_transformers(kind: str, warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    theirs = get_scheduler(kind, optimiser, num_warmup_steps=warmup, num_training_steps=total)
    expected = []
    for _ in range(total):  # after the last step theirs differ (cosine rises again)
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    ours = rates(kind, total, warmup=warmup, total=total)
    np.testing.assert_allclose(ours, expected, atol=1e-7)


PARAMS = {
    "stack_0": {"layer_0": {"attention_norm": {"scale": (2, 3)}, "q": {"kernel": (2, 3, 4)}}},
    "embed": {"table": (5, 3)},
}


def random_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.torch
def test_adamw_with_clipping_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    params = random_tree(0)
    hyper = optim.AdamW(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
    tx = optim.transform(hyper)
    opt_state = init_opt_state(tx, params)
    leaves, structure = jax.tree.flatten(params)
    theirs = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in leaves]
    names = [
        "/".join(str(k.key) for k in path) for path, _ in jax.tree.flatten_with_path(params)[0]
    ]
    groups = [
        {"params": [p], "weight_decay": 0.1 if optim.is_decayed(name) else 0.0}
        for name, p in zip(names, theirs, strict=True)
    ]
    optimiser = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for step in range(5):
        grads = random_tree(step + 1)
        norm = optim.global_norm(grads)
        updates, opt_state = tx.update(optim.clip(grads, norm, 1.0), opt_state, params)
        params = jax.tree.map(lambda p, u: p + 0.01 * u, params, updates)
        for p, g in zip(theirs, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(np.array(g))
        their_norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert float(norm) == pytest.approx(float(their_norm), rel=1e-6)
        optimiser.step()
    for ours, p in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), atol=2e-7)
    assert structure == jax.tree.structure(params)


def test_weight_decay_skips_norms_where_layers_are_stacked() -> None:
    params = random_tree(0)
    tx = optim.transform(optim.AdamW(weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, init_opt_state(tx, params), params)
    layer, kept = updates["stack_0"]["layer_0"], params["stack_0"]["layer_0"]
    np.testing.assert_array_equal(layer["attention_norm"]["scale"], 0.0)
    np.testing.assert_allclose(layer["q"]["kernel"], -0.5 * kept["q"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(
        updates["embed"]["table"], -0.5 * params["embed"]["table"], rtol=1e-6
    )


def test_the_decay_rule_is_total() -> None:
    with pytest.raises(ValueError, match="no weight decay rule covers parameter 'router/gain'"):
        optim.is_decayed("router/gain")


def test_moments_are_f32_for_bfloat16_parameters() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), random_tree(0))
    tx = optim.transform(optim.AdamW())
    state = init_opt_state(tx, params)
    shapes = abstract_state(jax.eval_shape(lambda: params), tx).opt_state
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert leaf.dtype == shape.dtype
        assert leaf.dtype in (jnp.float32, jnp.int32)


def test_clip_off_and_below_the_limit_change_nothing() -> None:
    grads = random_tree(3)
    norm = optim.global_norm(grads)
    assert float(norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    for limit in (0.0, float(norm) * 2):
        same = optim.clip(grads, norm, limit)
        jax.tree.map(np.testing.assert_array_equal, same, grads)
