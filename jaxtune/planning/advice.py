"""Changes that make a step fit, the cheapest first, and those that make a mixture faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune.config import Config, ConfigError, load
from jaxtune.parallel.chips import larger
from jaxtune.planning.evaluate_config import StepEstimate, evaluate_config
from jaxtune.planning.hardware import make_hardware

GAIN = 0.88  # of the time, or less, is worth telling: arithmetic is wrong by as much
_MOST = 3  # remedies that are proposed
_PEERS = (4, 2, 8)  # that share experts: at most about one dimension of the network


class Remedy(NamedTuple):
    """A change as flags, its costs in words, and the bytes that a device needs then."""

    what: str
    costs: str
    needed: int
    verified: str  # how it is known: "arithmetic" or "compiled"
    config: Config
    topology: str


def remedies(
    estimate: StepEstimate, *, compile: Callable[[Config], StepEstimate] | None = None
) -> list[Remedy]:
    """List up to three changes after which `estimate` fits, cheapest first.

    With `compile` the first is one that the compiler agrees with; the others are arithmetic, scaled
    by how far the arithmetic was from the compiler in `estimate`.
    """
    limit = estimate.limit
    assert limit is not None
    fitting: list[Remedy] = []
    for what, costs, config, topology in _changes(estimate):
        try:
            other = _estimated(estimate, config, topology)
        except ConfigError:  # a mesh or a batch that does not divide
            continue
        needed = scaled(estimate, other)
        ceiling = limit if topology == estimate.hardware.slice.name else other.limit or limit
        if needed <= ceiling:
            remedy = Remedy(what, costs, needed, "arithmetic", config, topology)
            if compile is not None and topology == estimate.hardware.slice.name and not fitting:
                read = compile(config)
                if not read.fits:
                    continue
                remedy = remedy._replace(needed=read.needed, verified="compiled")
            fitting.append(remedy)
        if len(fitting) == _MOST:
            break
    return fitting


def scaled(estimate: StepEstimate, other: StepEstimate) -> int:
    """Scale the inexact part of what `other` needs by arithmetic.

    The factor is the compiler's answer to `estimate` over the arithmetic of it.
    """
    if estimate.read is None:
        return other.needed
    exact = estimate.held["parameters"] + estimate.held["optimiser"]
    counted = sum(estimate.counted.values()) - exact
    factor = max(0.5, (estimate.needed - exact) / max(1, counted))
    of_other = other.held["parameters"] + other.held["optimiser"]
    return round(of_other + factor * (sum(other.counted.values()) - of_other))


def reason(estimate: StepEstimate) -> str:
    """Say in a line what takes the memory."""
    kinds = {name: size for name, size in estimate.counted.items() if size}
    first, second, *_ = sorted(kinds, key=lambda name: -kinds[name])
    limit = estimate.limit or 0
    source = "the compiler needs" if estimate.read is not None else "by arithmetic it needs"
    state = estimate.held["parameters"] + estimate.held["optimiser"]
    text = f"{source} {_gib(estimate.needed)} of {_gib(limit)} GiB"
    if state > limit:
        return f"{text}: parameters and optimiser state alone are {_gib(state)} GiB"
    return f"{text}; most is {first} ({_gib(kinds[first])}) and {second} ({_gib(kinds[second])})"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _estimated(estimate: StepEstimate, config: Config, topology: str) -> StepEstimate:
    hardware = estimate.hardware
    if topology != hardware.slice.name:
        hardware = make_hardware(larger(hardware.slice) or hardware.slice, compiles=False)
    return evaluate_config(config, estimate.run, hardware, compiles=False)


def _changes(estimate: StepEstimate) -> Iterator[tuple[str, str, Config, str]]:
    """Yield (flags, cost, config, topology), cheapest first.

    Each change stands alone, but for those whose flags it names.
    """
    config, here = estimate.config, estimate.hardware.slice.name

    def change(costs: str, fields: Mapping[str, Any]) -> tuple[str, str, Config, str]:
        return flags_of(fields), costs, changed(config, **fields), here

    def in_parts(rows: int, microbatches: int) -> dict[str, Any]:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": microbatches}
        return {**sizes, **full, "global_batch_size": None}

    full = {"gradient_checkpointing": "full"} if config.gradient_checkpointing != "full" else {}
    rows, microbatches = config.per_device_train_batch_size, estimate.work.microbatches
    if estimate.work.sizes["data"] > 1 and estimate.hardware.slice.slices == 1:
        yield change("gathers weights more widely", {"mesh.data": 1, "mesh.fsdp": -1})
    if full and config.gradient_checkpointing != "offload":
        yield change("about a fifth more time", full)
    if peers := _peers(estimate):
        mesh = _mesh(estimate, "expert", peers[0])
        yield change("tokens travel to their experts and back", mesh)
    while rows % 2 == 0:
        rows, microbatches = rows // 2, microbatches * 2
        costs = "the same batch in more parts: weights are gathered for each"
        yield change(costs, in_parts(rows, microbatches))
    smallest = in_parts(rows, microbatches)
    if (
        config.optim == "adamw"
        and config.optim_state_dtype == "float32"
        and not config.has_adapters
    ):
        yield change("rounds the momentum", {"optim_state_dtype": "bfloat16", **smallest})
    if not config.has_adapters and not config.optim_offload:
        costs = "moments cross to the host and back in every step"
        yield change(costs, {"optim_offload": "true", **smallest})
    for devices in (2, 4, 8):
        mesh = _mesh(estimate, "tensor", devices)
        yield change("activations are exchanged in every layer", {**mesh, **smallest})
    if (next_size := larger(estimate.hardware.slice)) is not None:
        yield f"--topology {next_size.name}", "more chips", config, next_size.name
    if not config.has_adapters:
        yield change("trains adapters, not the model", {"lora.r": 16, **smallest})
        nf4 = {"lora.r": 16, "lora.base": "nf4"}
        yield change("and reads the base in 4 bits", {**nf4, **smallest})


def _peers(estimate: StepEstimate) -> list[int]:
    """List sizes of `mesh.expert` to propose; none where it is used or no experts are shared."""
    experts, sizes = estimate.run.model.spec.experts, estimate.work.sizes
    if sizes["expert"] > 1:
        return []
    return [n for n in _PEERS if experts and experts % n == 0 and sizes["fsdp"] % n == 0]


def _mesh(estimate: StepEstimate, axis: str, devices: int) -> dict[str, int]:
    """Return fields that give `axis` some devices of `fsdp`, which takes the rest."""
    fields = {f"mesh.{axis}": devices}
    for name, size in estimate.config.mesh.model_dump().items():
        if name == "fsdp" and size != -1:
            fields["mesh.fsdp"] = -1
        elif name not in (axis, "fsdp") and size == -1:
            fields[f"mesh.{name}"] = estimate.work.sizes[name]
    return fields


def faster(estimate: StepEstimate) -> str | None:
    """Propose experts on devices of their own where a mixture's step is then shorter; else None.

    By arithmetic: gathering the experts takes its time.
    """
    peers = _peers(estimate) if estimate.fits and estimate.hardware.slice.chip.flops else []
    if not peers:
        return None
    before = evaluate_config(estimate.config, estimate.run, estimate.hardware, compiles=False).time
    assert before is not None
    best, fastest = GAIN * before.step, ""
    for devices in peers:
        mesh = _mesh(estimate, "expert", devices)
        other = _estimated(estimate, changed(estimate.config, **mesh), estimate.hardware.slice.name)
        if other.fits and other.time is not None and other.time.step < best:
            best, fastest = other.time.step, flags_of(mesh)
    if not fastest:
        return None
    return (
        f"by arithmetic a step takes {best:.2f} s with {fastest}, {before.step:.2f} s without: "
        "experts stay where they are and tokens travel"
    )


def flags_of(fields: Mapping[str, Any]) -> str:
    """Write fields as flags; None, which unsets a field that others replace, is left out."""
    return " ".join(f"--{name} {value}" for name, value in fields.items() if value is not None)


def changed(config: Config, **fields: object) -> Config:
    """Return `config` with other fields, by dotted names, validated as from a file."""
    values = config.model_dump(mode="json", exclude={"dataset"}, exclude_unset=True)
    return load(overrides={**values, **fields})
