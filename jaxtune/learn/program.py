"""The whole compiled thing from (spec, numbers, mesh), and nothing else.

`train` builds it on real devices; planning builds the same program on a topology's devices and
reads what the compiler says. No weights, no data, no files pass through here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.learn import optim
from jaxtune.learn.objectives import next_token
from jaxtune.learn.state import TrainState, abstract_state, init_opt_state, state_shardings
from jaxtune.learn.step import Evaluate, Train, eval_step, train_step
from jaxtune.mesh import replicated, shardings
from jaxtune.model import decoder
from jaxtune.spec import ModelSpec


class Program(NamedTuple):
    """Compiled on first use. Call inside `jax.set_mesh(mesh)`.

    `train_step(state, batch) -> (state, metrics)` donates its state; `eval_step(params, batch)`
    gives `Sums`; `init_opt_state(params)` starts the optimiser where the parameters are.
    """

    mesh: Mesh
    abstract: TrainState
    shardings: TrainState
    train_step: Train
    eval_step: Evaluate
    init_opt_state: Any


def build(
    spec: ModelSpec,
    mesh: Mesh,
    *,
    hyper: optim.AdamW,
    learning_rate: optim.Schedule,
    max_grad_norm: float,
    microbatches: int,
    dtype: Any,
    param_dtype: Any,
    remat: str,
) -> Program:
    """`dtype` is of the computation, `param_dtype` of what is stored; moments are f32."""
    tx = optim.transform(hyper)
    axes = decoder.axes(spec)
    params = decoder.abstract(spec, param_dtype)
    abstract = abstract_state(params, tx)
    placed = state_shardings(abstract, shardings(axes, params, mesh), tx, mesh)
    everywhere = replicated(mesh)
    step = functools.partial(
        train_step,
        objective=next_token(spec, dtype=dtype, remat=remat),
        tx=tx,
        learning_rate=learning_rate,
        max_grad_norm=max_grad_norm,
        microbatches=microbatches,
        param_axes=axes,
    )
    evaluate = functools.partial(eval_step, objective=next_token(spec, dtype=dtype, remat="none"))
    return Program(
        mesh=mesh,
        abstract=abstract,
        shardings=placed,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere)),
        eval_step=jax.jit(evaluate, out_shardings=everywhere),
        init_opt_state=jax.jit(
            functools.partial(init_opt_state, tx), out_shardings=placed.opt_state
        ),
    )


def build_eval(spec: ModelSpec, mesh: Mesh, *, dtype: Any) -> Evaluate:
    """The evaluation half alone, for those who train nothing."""
    evaluate = functools.partial(eval_step, objective=next_token(spec, dtype=dtype, remat="none"))
    return jax.jit(evaluate, out_shardings=replicated(mesh))


def first_step(opt_state: Any, params: Any, mesh: Mesh) -> TrainState:
    """The state before the first step."""
    step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return TrainState(step=step, params=params, opt_state=opt_state)


def compute_dtype(name: str) -> Any:
    """`auto` is bfloat16 on TPU and GPU, float32 on CPU, where bfloat16 is slower."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)
