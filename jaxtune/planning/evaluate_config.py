"""A config on some hardware: arithmetic always, the compiler if it is to be compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.config import Config
from jaxtune.hf.load import HfModel
from jaxtune.parallel.mesh import make_mesh, platform_of, sizes_of
from jaxtune.planning import compile as compiling
from jaxtune.planning import memory_model, time_model
from jaxtune.planning.hardware import Hardware
from jaxtune.planning.memory_model import Work
from jaxtune.training import build
from jaxtune.training.program import Program, compute_dtype
from jaxtune.training.subject import subject_of
from jaxtune.training.trainable import backward

_STEPS = 1000  # of a run whose length is not known; only the schedule's constants depend on it
# Beside the state in a training process: Python, JAX, the compiler and its programs; measured
# for the TPU compiler at 1.2 to 1.5 GB.
_PROCESS_BYTES = 3 * 2**30


class PlannedRun(NamedTuple):
    """A model with the length of a row and of its run.

    `steps` is None where not known; `fill` is the share of a row that is no padding.
    """

    model: HfModel
    length: int
    steps: int | None = None
    fill: float | None = None


class StepEstimate(NamedTuple):
    """A config's memory and time: `counted` by arithmetic, `read` from the compiler, per device."""

    config: Config
    run: PlannedRun
    hardware: Hardware
    work: Work
    held: Mapping[str, int]
    counted: Mapping[str, int]
    trained: int  # parameters
    read: compiling.CompiledStep | None
    time: time_model.Time | None

    @property
    def needed(self) -> int:
        """Bytes of memory on one device."""
        return sum(self.counted.values()) if self.read is None else self.read.needed

    @property
    def limit(self) -> int | None:
        if self.read is not None and self.read.limit is not None:
            return self.read.limit
        return self.hardware.limit

    @property
    def fits(self) -> bool:
        if self.read is not None:
            return self.read.fits
        return self.limit is None or self.needed <= self.limit

    @property
    def tokens_per_second(self) -> float | None:
        """Of one chip."""
        if self.time is None:
            return None
        return self.work.tokens_per_step / self.time.step / self.hardware.slice.chips


def evaluate_config(
    config: Config,
    run: PlannedRun,
    hardware: Hardware,
    *,
    folder: Path | None = None,
    note: Callable[[str], None] = lambda message: None,
    compiles: bool | None = None,
) -> StepEstimate:
    """Estimate a step of `config` on `hardware`.

    `compiles` overrules what the hardware can; `folder` caches the compiler's answers. Raises
    `ConfigError` for a mesh or a batch that does not match the devices.
    """
    program, work, held = _built(config, run, hardware)
    counted = memory_model.memory(work, held, hardware.limit)
    trained = sum(leaf.size for leaf in jax.tree.leaves(program.abstract.trained))
    slice, per_chip = hardware.slice, hardware.per_chip
    read, time = None, None
    if hardware.compiles if compiles is None else compiles:
        read = compiling.compile_step(
            program,
            rows=build.rows_per_step(config, program.mesh),
            length=run.length,
            topology=f"{slice.slices}x{slice.topology}",
            folder=folder,
            note=note,
        )
    if read is not None and read.fits:
        time = time_model.of_compiled(read, slice, per_chip)
    elif slice.chip.flops:
        time = time_model.of_estimate(work, held, slice, per_chip)
    return StepEstimate(config, run, hardware, work, held, counted, trained, read, time)


def _built(
    config: Config, run: PlannedRun, hardware: Hardware
) -> tuple[Program, Work, dict[str, int]]:
    trained = subject_of(config, run.model, note=lambda message: None)
    mesh = make_mesh(config.mesh.model_dump(), hardware.devices)
    build.rows_per_step(config, mesh)  # what `train` refuses is refused here too
    steps = run.steps or _STEPS
    # A stand-in for a device has no memories that state could be placed in.
    placed = config if hardware.compiles else config.model_copy(update={"optim_offload": False})
    program = build.build(placed, trained, mesh, steps)
    dtype = compute_dtype(config.dtype, platform_of(mesh))
    kind, _ = build.attention_of(config, trained.spec, mesh, run.length)
    held = memory_model.held(program, offload=config.optim_offload)
    work = Work(
        spec=trained.spec,
        sizes=sizes_of(mesh),
        rows=config.per_device_train_batch_size,
        length=run.length,
        microbatches=build.microbatches(config, mesh),
        remat=config.gradient_checkpointing,
        item=jnp.dtype(dtype).itemsize,
        stored=jnp.dtype(dtype if trained.lora is not None else config.param_dtype).itemsize,
        trained=held["trained"],
        lora=trained.lora is not None,
        attention=kind,
        block=config.loss_block,
        z_loss=config.z_loss,
        back=backward(trained.spec, program.abstract.trained),
    )
    return program, work, held


# -- figures -----------------------------------------------------------------------------------


def by_kind(estimate: StepEstimate) -> dict[str, int]:
    """Split the bytes of a device by kind.

    Parameters and optimiser are exact. Of a compiled step the program's own size is, and what
    remains of its buffers is shared out: gradients, activations and logits as counted by rule as
    far as it reaches, the rest is temporaries.
    """
    if estimate.read is None:
        return dict(estimate.counted)
    left = (
        estimate.needed
        - estimate.held["parameters"]
        - estimate.held["optimiser"]
        - estimate.read.code
    )
    kinds = {name: estimate.held[name] for name in ("parameters", "optimiser")}
    for name in ("gradients", "activations", "logits"):
        kinds[name] = min(estimate.counted[name], max(0, left))
        left -= kinds[name]
    return {**kinds, "temporaries": max(0, left), "program": estimate.read.code}


def figures(estimate: StepEstimate) -> dict[str, Any]:
    """Make the object of `plan --json`; bytes, FLOPs and rates are of one chip."""
    per_chip, read, work = estimate.hardware.per_chip, estimate.read, estimate.work
    compiled = read.cost if read is not None and read.fits else None
    kinds = {name: size * per_chip for name, size in by_kind(estimate).items()}
    flops = sum(memory_model.all_flops(work))
    axes: Mapping[str, float] = memory_model.wire(work)
    sent, wire = sum(axes.values()), None
    if compiled is not None:
        flops = compiled.matmul_flops + compiled.kernel_flops
        axes, sent = compiled.axes, compiled.wire_bytes
        wire = {kind: of.bytes * per_chip for kind, of in compiled.wire.items()}
    model = memory_model.model_flops(work) * per_chip
    time, chip = estimate.time, estimate.hardware.slice.chip
    return {
        "topology": estimate.hardware.slice.name,
        "chips": estimate.hardware.slice.chips,
        "fits": estimate.fits,
        "hbm_bytes": sum(kinds.values()),
        "hbm_limit_bytes": None if estimate.limit is None else estimate.limit * per_chip,
        "hbm_by_kind": kinds,
        "flops": flops * per_chip,
        "flops_without_recomputation": model,
        "matmul_flops": None if compiled is None else compiled.matmul_flops * per_chip,
        "attention_flops": None if compiled is None else compiled.kernel_flops * per_chip,
        "collective_bytes": sent * per_chip,
        "collective_bytes_by_kind": wire,
        "collective_bytes_by_axis": {name: size * per_chip for name, size in axes.items()},
        "collective_bytes_exposed": None if compiled is None else compiled.exposed_bytes * per_chip,
        "step_seconds": None if time is None else time.step,
        "seconds_by_term": None if time is None else time._asdict(),
        "tokens_per_second_per_chip": estimate.tokens_per_second,
        "mfu": None if time is None else model / (time.step * chip.flops),
        "host_bytes": _host_bytes(estimate),
        "method": "arithmetic" if read is None else "compiled",
        "versions": None if read is None else compiling.versions(),
        "mesh": dict(work.sizes),
        "rows_per_device": work.rows,
        "microbatches": work.microbatches,
        "row_length": work.length,
        "tokens_per_step": work.tokens_per_step,
        "trained_parameters": estimate.trained,
        "run": _run(estimate),
    }


def _host_bytes(estimate: StepEstimate) -> int:
    """Bound the bytes of a host: the process, a copy for a checkpoint, what is offloaded.

    The copy is of its devices' trained state.
    """
    devices = len(estimate.hardware.devices) / estimate.hardware.hosts
    trained = estimate.held["trained"] / 4 * (4 if estimate.config.param_dtype == "float32" else 2)
    offloaded = estimate.held["host"] + memory_model.offloaded(estimate.work)
    copied = trained + (estimate.held["host"] or estimate.held["optimiser"])
    return round(devices * (copied + offloaded)) + _PROCESS_BYTES


def _run(estimate: StepEstimate) -> dict[str, Any] | None:
    """Make the figures of the whole run; None where its length is not known."""
    run, time = estimate.run, estimate.time
    if run.steps is None or time is None:
        return None
    seconds = run.steps * time.step
    return {
        "steps": run.steps,
        "fill": run.fill,
        "seconds": seconds,
        "chip_hours": seconds * estimate.hardware.slice.chips / 3600,
    }
