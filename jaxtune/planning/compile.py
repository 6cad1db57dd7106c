"""The real step handed to the TPU compiler, and what the compiled program says of itself.

The answer is stored on disk under a hash of the lowered program, its devices, the compiler and its
flags: whatever changes the step changes the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from pydantic import TypeAdapter

from jaxtune.data.schema import Batch
from jaxtune.parallel.mesh import partition_spec
from jaxtune.planning import hlo_cost
from jaxtune.planning.hlo_cost import Cost
from jaxtune.storage.atomic_write import write_whole
from jaxtune.training.program import Program
from jaxtune.tree import split

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompiledStep(NamedTuple):
    """Figures of a device. `needed` is all the memory the program wants, `limit` what the
    compiler has where that is too much; then there are no other figures."""

    needed: int
    limit: int | None = None
    arguments: int = 0
    code: int = 0
    host: int = 0
    cost: Cost = Cost()
    seconds: float = 0.0  # that the compiler took

    @property
    def fits(self) -> bool:
        return self.limit is None


_ANSWER = TypeAdapter(CompiledStep)


def arguments(program: Program, *, rows: int, length: int) -> tuple[Any, Any, Any]:
    """Make (state, frozen, batch) as shapes with shardings, for which the step is lowered."""

    def placed(leaf: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    state = jax.tree.map(placed, program.abstract, program.shardings)
    variables = jax.tree.map(placed, program.variables, program.placed)
    _, frozen = split(variables, program.is_trained)
    spec = partition_spec(("batch", "length"), (rows, length), program.mesh)
    where = NamedSharding(program.mesh, spec)
    kinds = {"weights": np.float32}
    leaves: list[Any] = [
        jax.ShapeDtypeStruct((rows, length), kinds.get(name, np.int32), sharding=where)
        for name in Batch._fields
    ]
    batch = Batch(*leaves)
    return state, frozen, batch


def compile_step(
    program: Program,
    *,
    rows: int,
    length: int,
    topology: str,
    folder: Path | None,
    note: Callable[[str], None],
) -> CompiledStep:
    """Compile the train step for batches of `[rows length]`, or reads an earlier answer.

    `folder` keeps the answers; None keeps none. Raises what the compiler raises, but for a program
    that is too large, which is an answer.
    """
    with jax.set_mesh(program.mesh):
        step: Any = program.train_step  # a jitted function
        lowered = step.lower(*arguments(program, rows=rows, length=length))
        name = f"{key(lowered.as_text(), topology, program.mesh)}.json"
        if folder is not None and (known := _stored(folder / name)):
            return known
        note(f"compiling the step for {topology}; a minute or a few")
        began = time.monotonic()
        try:
            made = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            compiled = too_large(str(error))
            if compiled is None:
                raise
        else:
            compiled = _figures(made, program.mesh)
        compiled = compiled._replace(seconds=time.monotonic() - began)
    if folder is not None:
        _store(folder / name, compiled)
    return compiled


def too_large(message: str) -> CompiledStep | None:
    """Read the compiler's message on a program beyond the device's memory; None for others.

    >>> too_large("RESOURCE_EXHAUSTED: ... temporaries (16.75G) exceeds available HBM (15.75G).")
    CompiledStep(needed=17985175552, limit=16911433728, ...)
    """
    forms = (
        r"\(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM \(([\d.]+)([KMGT]?)i?B?\)",
        r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm",
    )
    for form in forms:
        if "RESOURCE_EXHAUSTED" in message and (match := re.search(form, message)):
            needed, unit, limit, other = match.groups()
            return CompiledStep(
                round(float(needed) * _UNITS[unit]), limit=round(float(limit) * _UNITS[other])
            )
    return None


def _figures(made: Any, mesh: Mesh) -> CompiledStep:
    memory = made.memory_analysis()
    shape = {str(name): int(size) for name, size in mesh.shape.items()}
    cost = hlo_cost.cost(made.as_text(), int(mesh.size), shape)
    return CompiledStep(
        needed=_needed(memory),
        arguments=memory.argument_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        cost=replace(cost, axes=_by_axis(cost.axes)),
    )


def _needed(memory: Any) -> int:
    """Return the bytes of a device's memory that the program needs, its code included.

    A compiler that says what it allocates is believed: with libtpu 0.0.50 the parts of a program
    that fits add up to more than the chip has (17.5 GiB of 15.75, where 14.1 are allocated).
    """
    allocated: int = getattr(memory, "total_allocation_bytes", 0)
    if allocated > 0:
        return allocated
    # Outputs that are not donated arguments lie beside them.
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = memory.argument_size_in_bytes, beside, memory.temp_size_in_bytes
    return int(sum(parts)) + int(memory.generated_code_size_in_bytes)


def _by_axis(by_dimension: Mapping[str, float]) -> dict[str, float]:
    """Sum bytes by the config's axes: the mesh lays an axis over several dimensions."""
    axes: dict[str, float] = {}
    for along, sent in by_dimension.items():
        name = "+".join(dict.fromkeys(part.partition("_")[0] for part in along.split("+")))
        axes[name] = axes.get(name, 0.0) + sent
    return axes


# -- on disk -------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions of what compiles."""
    installed = {}
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def key(program: str, topology: str, mesh: Mesh) -> str:
    """Hash all that an answer depends on: program, devices, compiler and flags."""
    parts = {
        "program": hashlib.sha256(program.encode()).hexdigest(),
        "topology": topology,
        "mesh": [int(device.id) for device in mesh.devices.flat],
        "versions": versions(),
        "flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "reader": hashlib.sha256(
            b"\0".join(Path(file).read_bytes() for file in (hlo_cost.__file__, __file__))
        ).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _stored(file: Path) -> CompiledStep | None:
    try:
        return _ANSWER.validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def _store(file: Path, compiled: CompiledStep) -> None:
    """Write an answer; a cache that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, _ANSWER.dump_json(compiled).decode())
