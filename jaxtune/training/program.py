"""The whole compiled thing from (spec, numbers, mesh), and nothing else.

`train` builds it on real devices; planning builds the same program on a topology's devices and
reads what the compiler says. No weights, no data, no files pass through here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune.model import decoder
from jaxtune.model.decoder import ForwardConfig
from jaxtune.model.lora import COLLECTION, Lora
from jaxtune.ops.loss_plan import LossType
from jaxtune.parallel.collectives import EVERYWHERE, shard_map_step, slices, tokens
from jaxtune.parallel.mesh import platform_of, put, replicated, shardings
from jaxtune.spec import ModelSpec
from jaxtune.training.objectives import Objective, each_token, next_token
from jaxtune.training.optim import optim
from jaxtune.training.schedules import Schedule
from jaxtune.training.state import TrainState, abstract_state, init_opt_state, state_shardings
from jaxtune.training.step import (
    EachToken,
    Evaluate,
    GradientConfig,
    Train,
    eval_step,
    gradient,
    train_step,
)
from jaxtune.tree import split


class Program(NamedTuple):
    """Compiled on first use. Call inside `jax.set_mesh(mesh)`.

    `train_step(state, frozen, batch) -> (state, metrics)` donates its state and only reads
    `frozen`; `eval_step(trained, frozen, batch)` gives `Sums`; `init_opt_state(trained)` starts the
    optimiser where the parameters are. `variables` and `placed` are shapes and shardings of all
    variables, `abstract` and `shardings` those of the state, which holds the trained ones.
    """

    mesh: Mesh
    variables: Any
    placed: Any
    is_trained: Callable[[str], bool]
    abstract: TrainState
    shardings: TrainState
    train_step: Train
    eval_step: Evaluate
    init_opt_state: Any

    def first_state(self, variables: Any) -> tuple[TrainState, Any]:
        """The state before the first step, and what is frozen beside it."""
        trained, frozen = split(variables, self.is_trained)
        step = put(np.zeros((), np.int32), replicated(self.mesh))
        return TrainState(step, trained, self.init_opt_state(trained)), frozen


class StepConfig(NamedTuple):
    """The choices that make up a step, beside model and mesh.

    `dtype` is of the computation, `param_dtype` of what is stored. `is_trained` decides by the
    names of variables, `params/embed/table`; None trains everything, or with `lora` its adapters.
    `seed` and `noise_alpha` (NEFTune) are of what is random; `loss_block`, `z_loss` and `loss_type`
    of the loss, the last two in training alone; `attention` names an implementation, None or "auto"
    chooses.
    `optim_offload` keeps moments in the host's memory between steps.
    """

    hyper: optim.Hyper
    learning_rate: Schedule
    max_grad_norm: float
    microbatches: int
    dtype: Any
    param_dtype: Any
    remat: str
    seed: int = 0
    noise_alpha: float | None = None
    is_trained: Callable[[str], bool] | None = None
    lora: Lora | None = None
    loss_block: int | None = None
    z_loss: float = 0.0
    loss_type: LossType = "nll"
    attention: str | None = None
    optim_offload: bool = False


def build(spec: ModelSpec, mesh: Mesh, config: StepConfig) -> Program:
    """Build the program that trains `spec` on the devices of `mesh`."""
    lora, is_trained = config.lora, config.is_trained
    axes = _axes(spec, lora)
    variables = {"params": decoder.abstract(spec, config.param_dtype, lora)}
    if lora is not None:
        variables[COLLECTION] = decoder.abstract_adapters(spec, lora)
    if is_trained is None:
        is_trained = _everything if lora is None else is_adapter
    trained_axes, _ = split(axes, is_trained)
    trained, _ = split(variables, is_trained)
    optimiser = optim.optimiser(config.hyper, trained_axes)
    abstract = abstract_state(trained, optimiser)
    trained_placed = shardings(trained_axes, trained, mesh)
    state_placed = state_shardings(abstract, trained_placed, mesh, offload=config.optim_offload)
    beside = state_shardings(abstract, trained_placed, mesh).opt_state  # the parameters, on devices
    everywhere = replicated(mesh)
    objective, evaluated = _objectives(spec, mesh, config)

    def gradient_of(trained: Any, frozen: Any, batch: Any, step: Any) -> Any:
        here = functools.partial(
            gradient,
            config=GradientConfig(objective, config.microbatches, config.seed, config.dtype),
            axes=trained_axes,
            shapes=trained,
        )
        own, others = slices(axes, trained, mesh), slices(axes, frozen, mesh)
        specs = own, others, tokens(batch.inputs.shape, mesh), EVERYWHERE
        return shard_map_step(here, mesh, specs, (own, EVERYWHERE))(trained, frozen, batch, step)

    def step(state: TrainState, frozen: Any, batch: Any) -> Any:
        if config.optim_offload:
            state = state._replace(opt_state=jax.device_put(state.opt_state, beside))
        return train_step(
            state,
            frozen,
            batch,
            gradient=gradient_of,
            optimiser=optimiser,
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
        )

    return Program(
        mesh=mesh,
        variables=variables,
        placed=shardings(axes, variables, mesh),
        is_trained=is_trained,
        abstract=abstract,
        shardings=state_placed,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(state_placed, everywhere)),
        eval_step=_evaluation(axes, mesh, evaluated),
        init_opt_state=jax.jit(
            functools.partial(init_opt_state, optimiser), out_shardings=state_placed.opt_state
        ),
    )


def _objectives(spec: ModelSpec, mesh: Mesh, config: StepConfig) -> tuple[Objective, Objective]:
    """Make what is minimised, and what an evaluation sums up: the cross-entropy alone."""
    forward = ForwardConfig(
        config.dtype, config.remat, config.attention, platform_of(mesh), config.lora
    )
    losses = functools.partial(next_token, spec, loss_block=config.loss_block)
    minimised = losses(
        forward,
        noise_alpha=config.noise_alpha,
        z_loss=config.z_loss,
        loss_type=config.loss_type,
    )
    return minimised, losses(forward._replace(remat="none"))


def is_adapter(name: str) -> bool:
    """Return True if a variable belongs to the adapters, by its name."""
    return name.startswith(f"{COLLECTION}/")


def _everything(name: str) -> bool:
    return True


def build_token_losses(spec: ModelSpec, mesh: Mesh, *, dtype: Any) -> EachToken:
    """Build the losses that `eval_step` adds up, token by token, for callers that train nothing.

    `(variables, batch) -> TokenLosses` `[B T]`, on every device, so that every host can read all
    of it.
    """
    here = each_token(spec, ForwardConfig(dtype, "none", platform=platform_of(mesh)))
    axes = _axes(spec, None)

    def losses(variables: Any, batch: Any) -> Any:
        rows = tokens(batch.inputs.shape, mesh)
        specs = (slices(axes, variables, mesh), rows)
        return shard_map_step(here, mesh, specs, type(rows)(rows[0]))(variables, batch)

    return jax.jit(losses, out_shardings=replicated(mesh))


def _axes(spec: ModelSpec, lora: Lora | None) -> dict[str, Any]:
    axes = {"params": decoder.axes(spec, lora)}
    if lora is not None:
        axes[COLLECTION] = decoder.adapter_axes(spec, lora)
    return axes


def _evaluation(axes: Any, mesh: Mesh, objective: Objective) -> Evaluate:
    here = functools.partial(eval_step, objective=objective)

    def evaluate(trained: Any, frozen: Any, batch: Any) -> Any:
        specs = (
            *(slices(axes, tree, mesh) for tree in (trained, frozen)),
            tokens(batch.inputs.shape, mesh),
        )
        return shard_map_step(here, mesh, specs, EVERYWHERE)(trained, frozen, batch)

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def compute_dtype(name: str, platform: str | None = None) -> Any:
    """`auto` is bfloat16 on TPU and GPU, float32 on CPU, where bfloat16 is slower; without a
    `platform` of the devices that are here."""
    if name == "auto":
        return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16
    return jnp.dtype(name)
