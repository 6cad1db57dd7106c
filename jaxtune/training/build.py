"""A config, a model and a mesh -> the program that trains it.

`train` gives the devices that are there and `plan` those of a topology: both ask here, so that what
is planned is what runs.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.config import Config, ConfigError
from jaxtune.model.decoder import attention_for
from jaxtune.parallel.mesh import check_experts, platform_of, row_shards
from jaxtune.spec import ModelSpec
from jaxtune.storage.object_store import default_folder
from jaxtune.training import program, schedules
from jaxtune.training.optim.optim import Hyper
from jaxtune.training.program import Program, compute_dtype
from jaxtune.training.subject import Subject


def keep_compiled(folder: str | None) -> None:
    """Keep compiled programs in `folder` for the next run; "auto" = where JAX was told to, else in
    the user's cache; None = nowhere. Programs that compile within a second are not kept.
    """
    if folder == "auto":
        configured: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        folder = configured or str(default_folder() / "compiled")
    used = None if folder in (None, "none") else folder
    jax.config.update("jax_compilation_cache_dir", used)


def microbatches(config: Config, mesh: Mesh) -> int:
    """In a step. Raises `ConfigError` for a global_batch_size that does not divide."""
    if config.global_batch_size is None:
        return config.gradient_accumulation_steps
    each = row_shards(mesh) * config.per_device_train_batch_size
    if config.global_batch_size % each:
        raise ConfigError(
            f"global_batch_size: {config.global_batch_size} rows do not divide into microbatches "
            f"of {row_shards(mesh)} devices x per_device_train_batch_size="
            f"{config.per_device_train_batch_size} (={each}). Choose a multiple of {each}, or a "
            "smaller per_device_train_batch_size."
        )
    return config.global_batch_size // each


def rows_per_step(config: Config, mesh: Mesh) -> int:
    """Of the whole batch, all devices and microbatches together.

    Raises `ConfigError` for rows that cannot be cut over `mesh.context`.
    """
    parts = mesh.shape["context"]
    if parts > 1 and not config.packing:
        raise ConfigError(
            f"mesh.context: {parts} devices share a row of max_length tokens, but packing is off "
            "and rows are as long as their examples. Set packing: true, or mesh.context: 1."
        )
    if config.max_length % parts:
        raise ConfigError(
            f"max_length: {config.max_length} tokens cannot be cut over mesh.context={parts} "
            f"devices. Choose a multiple of {2 * parts}, for which they also have equal work."
        )
    return row_shards(mesh) * config.per_device_train_batch_size * microbatches(config, mesh)


def hyper(config: Config) -> Hyper:
    """Read the optimiser's hyperparameters from the config."""
    return Hyper(
        config.optim,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        momentum=config.momentum or 0.0,
        adjust=config.muon_adjust_lr or "match_rms_adamw",
        state_dtype=config.optim_state_dtype,
    )


def attention_of(config: Config, spec: ModelSpec, mesh: Mesh, length: int) -> tuple[str, str]:
    """The implementation that rows of `length` tokens are attended by, and why it and no other."""
    return attention_for(
        spec,
        platform_of(mesh),
        length,
        devices=mesh.shape["context"],
        dtype=compute_dtype(config.dtype, platform_of(mesh)),
        requested=config.attention,
    )


def build(config: Config, subject: Subject, mesh: Mesh, total_steps: int) -> Program:
    """The program of a run of `total_steps`, for the devices of `mesh`. Raises `ConfigError` as
    `check_experts` does."""
    check_experts(subject.spec.experts, mesh)
    dtype: Any = program.compute_dtype(config.dtype, platform_of(mesh))
    warmup = schedules.warmup_length(config.warmup_steps, total_steps)
    return program.build(
        subject.spec,
        mesh,
        program.StepConfig(
            hyper=hyper(config),
            learning_rate=schedules.schedule(
                config.lr_scheduler_type,
                learning_rate=config.learning_rate,
                warmup_steps=warmup,
                total_steps=total_steps,
                **config.lr_scheduler_kwargs.model_dump(),
            ),
            max_grad_norm=config.max_grad_norm,
            microbatches=microbatches(config, mesh),
            dtype=dtype,
            # A frozen base is only read: kept as it is computed with, it takes half the memory.
            param_dtype=config.param_dtype if subject.lora is None else dtype,
            remat=config.gradient_checkpointing,
            seed=config.seed,
            noise_alpha=config.neftune_noise_alpha,
            attention=config.attention,
            loss_block=config.loss_block,
            z_loss=config.z_loss,
            loss_type=config.loss_type,
            optim_offload=config.optim_offload,
            lora=subject.lora,
            is_trained=None if subject.subset is None else subject.subset.is_trained,
        ),
    )
