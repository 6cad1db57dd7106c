"""Optimisers against other people's (stored, and live where installed), stacked against apart,
eight devices against one, and what their state holds."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import optimisers as golden

from jaxtune.config import defaults
from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.parallel.mesh import make_mesh, shardings
from jaxtune.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec, Stack
from jaxtune.training.optim import muon, optim
from jaxtune.training.optim.matrices import Dims, dims, is_hidden, is_matrix
from jaxtune.training.state import abstract_state, init_opt_state, state_shardings
from jaxtune.tree import named, unnamed

STORED = np.load(golden.FILE)
AXES = {name: leaf[1] for name, leaf in golden.LEAVES.items()}


def hyper_of(key: str, **changes: Any) -> optim.Hyper:
    case = golden.CASES[key]
    beta1, beta2 = golden.BETAS.get(case.method, (0.8, 0.95))
    hyper = optim.Hyper(
        case.method, beta1, beta2, epsilon=golden.EPSILON, weight_decay=golden.DECAY,
        **case.options,
    )  # fmt: skip
    return hyper._replace(**changes)


def arrays(leaves: dict[str, np.ndarray]) -> Any:
    return unnamed({name: jnp.asarray(value) for name, value in leaves.items()})


@functools.cache
def stepper(hyper: optim.Hyper, names: tuple[tuple[str, tuple], ...]) -> tuple[Any, Any]:
    made = optim.optimiser(hyper, unnamed(dict(names)))

    @jax.jit
    def step(params: Any, state: Any, grads: Any, norm: jax.Array, rate: jax.Array) -> Any:
        deltas, state = made.update(
            optim.clip(grads, norm, golden.MAX_GRAD_NORM), state, params, rate
        )
        return jax.tree.map(lambda p, d: (p + d).astype(p.dtype), params, deltas), state

    return made, step


def trained(
    key: str, cut: Any = lambda leaves: leaves, place: Any = lambda tree: tree, **changes: Any
) -> tuple[dict[str, np.ndarray], Any]:
    """(parameters, state) after the golden problem; `cut` renames and splits its leaves."""
    made, step = stepper(hyper_of(key, **changes), tuple(cut_axes_of(cut).items()))
    params = place(arrays(cut(golden.start())))
    state = jax.jit(made.init)(params)
    for number in range(golden.STEPS):
        grads = arrays(golden.gradients(number))
        norm = optim.norm_of(optim.squares(grads))
        grads = place(arrays(cut(golden.gradients(number))))
        rate = jnp.float32(golden.rate(golden.CASES[key], number))
        params, state = step(params, state, grads, norm, rate)
    return jax.device_get(named(params)), state


def apart(leaves: dict[str, Any]) -> dict[str, Any]:
    """Every layer and expert a parameter of its own."""
    cut = {}
    for name, value in leaves.items():
        group, _, last = name.rpartition("/")
        for part in golden.parts(name):
            number = "".join(f"_{i}" for i in part)
            cut[f"{group}{number}/{last}"] = value[part]
    return cut


def cut_axes_of(cut: Any) -> dict[str, tuple]:
    if cut is not apart:
        return AXES
    return {
        name: AXES[whole][golden.LEAVES[whole][2] :]
        for whole in AXES
        for name in apart({whole: golden.start()[whole]})
    }


@pytest.mark.parametrize("key", golden.CASES)
def test_six_steps_equal_those_of_the_library_people_use(key: str) -> None:
    """Warmup from 0, clipping, weight decay; 1e-6 is a few roundings of parameters near 3."""
    found, _ = trained(key)
    for name, value in found.items():
        moved = np.abs(STORED[f"{key}:{name}"] - golden.start()[name]).max()
        assert moved > 0.01, name
        np.testing.assert_allclose(value, STORED[f"{key}:{name}"], atol=1e-6, err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize("key", golden.CASES)
def test_the_stored_values_are_those_of_the_library(key: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip({"lion": "lion_pytorch", "schedule_free": "schedulefree"}.get(key, "torch"))
    for name, value in golden.reference(key).items():
        np.testing.assert_allclose(value, STORED[f"{key}:{name}"], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("key", golden.CASES)
def test_a_stack_is_exactly_its_layers_and_experts_apart(key: str) -> None:
    whole, _ = trained(key)
    cut, _ = trained(key, cut=apart)
    for name, value in apart(whole).items():
        # Newton-Schulz multiplies alone what it multiplies in a batch: another order of sums.
        tolerance = 1e-6 if golden.CASES[key].method == "muon" else 0.0
        np.testing.assert_allclose(cut[name], value, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("key", ["adafactor", "muon", "schedule_free"])
def test_eight_devices_equal_one_and_state_lies_with_its_parameter(key: str) -> None:
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "context": 2})
    params = arrays(golden.start())
    known = {name: tuple(None if a == "expert" else a for a in AXES[name]) for name in AXES}
    where = shardings(unnamed(known), params, mesh)
    one, _ = trained(key)
    with jax.set_mesh(mesh):
        many, state = trained(key, place=lambda tree: jax.device_put(tree, where))
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, atol=2e-6, err_msg=name)
    made = optim.optimiser(hyper_of(key), unnamed(AXES))
    abstract = abstract_state(jax.eval_shape(lambda: params), made)
    placed = state_shardings(abstract, where, mesh)
    assert jax.tree.structure(placed.opt_state) == jax.tree.structure(state)
    held = [
        (path, leaf, sharding)
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(abstract.opt_state), jax.tree.leaves(placed.opt_state),
            strict=True,
        )
        if jax.tree_util.keystr(path).endswith("['q']['kernel']")
    ]  # fmt: skip
    assert held
    for _, leaf, sharding in held:
        spec = where["stack_0"]["layer_0"]["attention"]["q"]["kernel"].spec
        expected = [s if n == full else None
                    for s, n, full in zip(spec, leaf.shape, (2, 6, 2, 4), strict=True)]  # fmt: skip
        assert list(sharding.spec) == expected


@pytest.mark.parametrize(
    ("key", "bytes_each"),
    [("adamw", 6), ("lion", 2), ("sgd_momentum", 2), ("muon", None)],
)
def test_bfloat16_state_holds_first_moments_alone(key: str, bytes_each: int | None) -> None:
    found, state = trained(key, state_dtype="bfloat16")
    sizes = {leaf.dtype: 0 for leaf in jax.tree.leaves(state)}
    for leaf in jax.tree.leaves(state):
        sizes[leaf.dtype] += leaf.nbytes if leaf.ndim else 0
    count = sum(value.size for value in golden.start().values())
    assert sizes[jnp.dtype("bfloat16")] == 2 * count
    if bytes_each is not None:
        assert sum(sizes.values()) == bytes_each * count
    exact, _ = trained(key)
    start = golden.start()
    moved = np.concatenate([(exact[n] - start[n]).ravel() for n in exact])
    other = np.concatenate([(found[n] - start[n]).ravel() for n in exact])
    assert np.abs(moved - other).max() > 0
    assert np.linalg.norm(moved - other) < 0.1 * np.linalg.norm(moved)


def test_state_is_float32_for_bfloat16_parameters() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), arrays(golden.start()))
    for method in defaults.METHODS:
        made = optim.optimiser(optim.Hyper(method, momentum=0.9), unnamed(AXES))
        state = jax.jit(lambda p, made=made: init_opt_state(made, p))(params)
        shapes = abstract_state(jax.eval_shape(lambda: params), made).opt_state
        for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
            assert leaf.dtype == shape.dtype
            assert leaf.dtype in (jnp.float32, jnp.int32), method


def test_weight_decay_skips_norms_and_biases_where_layers_are_stacked() -> None:
    start, none = arrays(golden.start()), jax.tree.map(jnp.zeros_like, arrays(golden.start()))
    for method in defaults.METHODS:
        made = optim.optimiser(optim.Hyper(method, weight_decay=0.5), unnamed(AXES))
        update = jax.jit(
            lambda p, made=made: made.update(none, made.init(p), p, jnp.float32(0.1))[0]
        )
        deltas = update(start)
        for name, delta in named(deltas).items():
            expected = -0.05 * named(start)[name] if is_matrix(name) else 0.0 * delta
            np.testing.assert_allclose(delta, expected, atol=1e-6, err_msg=f"{method} {name}")


def test_schedule_free_trains_at_y_and_keeps_the_average() -> None:
    """x is the mean of z weighted by squared rates; y lies between x and z."""
    made = optim.optimiser(
        optim.Hyper("schedule_free", beta1=0.7), {"w": {"kernel": ("embed",) * 2}}
    )
    params = {"w": {"kernel": jnp.ones((2, 2))}}
    state, seen = made.init(params), []
    for number, rate in enumerate((0.0, 0.1, 0.2, 0.2)):
        grads = {"w": {"kernel": jnp.full((2, 2), 1.0 + number)}}
        deltas, state = made.update(grads, state, params, jnp.float32(rate))
        params = jax.tree.map(jnp.add, params, deltas)
        seen.append((rate**2, state.z["w"]["kernel"]))
    mean = sum(weight * z for weight, z in seen) / sum(weight for weight, _ in seen)
    np.testing.assert_allclose(params["w"]["kernel"], mean, rtol=1e-6)
    y = made.point(params, state)["w"]["kernel"]
    np.testing.assert_allclose(y, 0.7 * mean + 0.3 * seen[-1][1], rtol=1e-6)
    assert np.abs(y - mean).max() > 1e-3


def test_muon_makes_singular_values_near_one_of_each_matrix() -> None:
    x = (
        jax.random.normal(jax.random.key(0), (2, 3, 8, 4))
        * jnp.array([1e-6, 1e3])[:, None, None, None]
    )
    found = muon.orthogonalised(x, Dims((0, 1), (2,), (3,)))
    values = np.linalg.svd(np.asarray(found), compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.3
    np.testing.assert_array_equal(muon.orthogonalised(0.0 * x, Dims((0, 1), (2,), (3,))), 0.0)


def test_the_rules_are_total() -> None:
    with pytest.raises(ValueError, match="no rule says whether parameter 'router/gain' is"):
        is_matrix("router/gain")
    with pytest.raises(ValueError, match=r"which matrix parameter 'x/kernel' with axes \('mlp'"):
        dims("x/kernel", ("mlp", "heads", "head_dim"))
    with pytest.raises(ValueError, match="optim 'adam'; there are: adamw, adafactor"):
        optim.optimiser(optim.Hyper("adam"), {})
    assert set(optim.METHODS) == set(defaults.METHODS)
    assert dims("router/kernel", ("layers", "embed", "expert")) == Dims((0,), (1,), (2,))
    assert dims("q/b", ("layers", None, "heads", "head_dim")) == Dims((0,), (1,), (2, 3))
    assert dims("o/a", ("layers", "heads", "head_dim", None)) == Dims((0,), (1, 2), (3,))


def test_the_rules_cover_every_parameter_and_adapter_there_is() -> None:
    layer = LayerSpec(4, 2, 8, 32, RopeSpec(100.0), qkv_bias=True, mlp_bias=True, qk_norm="head")
    moe = MoeSpec(experts=4, per_token=2, router_bias=True, shared_width=16)
    mixture = replace(layer, moe=moe, sinks=True)
    spec = ModelSpec(64, 16, (Stack((layer, mixture), 2),), 1e-6, False, 128)
    lora = Lora(r=4, alpha=8.0, dora=True, tokens=(3, 4))
    hidden, seen = set(), set()
    for axes in (decoder.axes(spec), decoder.adapter_axes(spec, lora)):
        for name, logical in named(axes).items():
            place = dims(name, logical)
            seen.add(name.rpartition("/")[2])
            experts = "expert" in logical[:2] and is_matrix(name)
            stack = (0, 1) if experts else (0,) if name.startswith("stack_") else ()
            assert place.stack == stack or not is_matrix(name), name
            assert bool(place.columns) == is_matrix(name)
            if is_hidden(name, logical):
                hidden.add(name.rpartition("/")[2])
    assert hidden == {"kernel", "a", "b"}
    assert seen == {"kernel", "table", "scale", "bias", "sinks", "a", "b", "magnitude", "rows"}


def test_clip_off_and_below_the_limit_change_nothing() -> None:
    grads = arrays(golden.gradients(0))
    norm = optim.norm_of(optim.squares(grads))
    assert float(norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    for limit in (0.0, float(norm) * 2):
        same = optim.clip(grads, norm, limit)
        jax.tree.map(np.testing.assert_array_equal, same, grads)
