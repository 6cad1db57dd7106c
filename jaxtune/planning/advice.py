"""What would make a step fit that does not, the cheapest changes first, and a mixture's faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxtune.config import Config, ConfigError, load
from jaxtune.parallel.chips import larger
from jaxtune.planning.evaluate_config import Study, study
from jaxtune.planning.hardware import hardware

GAIN = 0.88  # of the time, or less, is worth telling: arithmetic is wrong by as much
_PEERS = (4, 2, 8)  # that share experts: at most about one dimension of the network


class Way(NamedTuple):
    """`what` to change, as flags; `costs` what that costs; `needed` bytes of a device then."""

    what: str
    costs: str
    needed: int
    verified: str  # how it is known: "arithmetic" or "compiled"
    config: Config
    topology: str


def ways(
    found: Study, *, most: int = 3, compile: Callable[[Config], Study] | None = None
) -> list[Way]:
    """Changes after which `found` fits, cheapest first. With `compile` the first of them that the
    compiler agrees with stands first; the others are arithmetic, scaled by how far the arithmetic
    was from the compiler in `found`."""
    limit = found.limit
    assert limit is not None
    fitting: list[Way] = []
    for what, costs, config, topology in _changes(found):
        try:
            other = _estimated(found, config, topology)
        except ConfigError:  # a mesh or a batch that does not divide
            continue
        needed = scaled(found, other)
        ceiling = limit if topology == found.hardware.slice.name else other.limit or limit
        if needed <= ceiling:
            way = Way(what, costs, needed, "arithmetic", config, topology)
            if compile is not None and topology == found.hardware.slice.name and not fitting:
                read = compile(config)
                if not read.fits:
                    continue
                way = way._replace(needed=read.needed, verified="compiled")
            fitting.append(way)
        if len(fitting) == most:
            break
    return fitting


def scaled(found: Study, other: Study) -> int:
    """What `other` needs by arithmetic, its inexact part scaled as the compiler's answer to
    `found` was to the arithmetic of it."""
    if found.read is None:
        return other.needed
    exact = found.held["parameters"] + found.held["optimiser"]
    counted = sum(found.counted.values()) - exact
    factor = max(0.5, (found.needed - exact) / max(1, counted))
    of_other = other.held["parameters"] + other.held["optimiser"]
    return round(of_other + factor * (sum(other.counted.values()) - of_other))


def reason(found: Study) -> str:
    """One line: what takes the memory."""
    kinds = {name: size for name, size in found.counted.items() if size}
    first, second, *_ = sorted(kinds, key=lambda name: -kinds[name])
    limit = found.limit or 0
    said = "the compiler needs" if found.read is not None else "by arithmetic it needs"
    state = found.held["parameters"] + found.held["optimiser"]
    text = f"{said} {_gib(found.needed)} of {_gib(limit)} GiB"
    if state > limit:
        return f"{text}: parameters and optimiser state alone are {_gib(state)} GiB"
    return f"{text}; most is {first} ({_gib(kinds[first])}) and {second} ({_gib(kinds[second])})"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _estimated(found: Study, config: Config, topology: str) -> Study:
    there = found.hardware
    if topology != there.slice.name:
        there = hardware(larger(there.slice) or there.slice, compiles=False)
    return study(config, found.subject, there, compiles=False)


def _changes(found: Study) -> Iterator[tuple[str, str, Config, str]]:
    """(flags, cost, config, topology), cheapest first; each on top of none of the others but for
    those whose flags it names."""
    config, here = found.config, found.hardware.slice.name

    def change(what: str, costs: str, **fields: object) -> tuple[str, str, Config, str]:
        return what, costs, changed(config, **fields), here

    rows, again = config.per_device_train_batch_size, found.work.microbatches
    if found.work.sizes["data"] > 1 and found.hardware.slice.slices == 1:
        mesh = {"mesh.data": 1, "mesh.fsdp": -1}
        yield change("--mesh.data 1 --mesh.fsdp -1", "gathers weights more widely", **mesh)
    if config.gradient_checkpointing not in ("full", "offload"):
        what = "--gradient_checkpointing full"
        yield change(what, "about a fifth more time", gradient_checkpointing="full")
    least = {"gradient_checkpointing": "full", "global_batch_size": None}
    full = "" if config.gradient_checkpointing == "full" else " --gradient_checkpointing full"
    if peers := _peers(found):
        words, mesh = _mesh(found, "expert", peers[0])
        yield change(words, "tokens travel to their experts and back", **mesh)
    while rows % 2 == 0:
        rows, again = rows // 2, again * 2
        parts = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": again}
        yield change(
            f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {again}{full}",
            "the same batch in more parts: weights are gathered for each",
            **least, **parts,
        )  # fmt: skip
    smallest = {**least, "per_device_train_batch_size": rows, "gradient_accumulation_steps": again}
    small = f" --per_device_train_batch_size {rows} --gradient_accumulation_steps {again}{full}"
    adapted = config.lora.r > 0 or config.adapter_name_or_path is not None
    if config.optim == "adamw" and config.optim_state_dtype == "float32" and not adapted:
        yield change(
            f"--optim_state_dtype bfloat16{small}", "rounds the momentum",
            **smallest, optim_state_dtype="bfloat16",
        )  # fmt: skip
    if not adapted and not config.optim_offload:
        yield change(
            f"--optim_offload true{small}", "moments cross to the host and back in every step",
            **smallest, optim_offload=True,
        )  # fmt: skip
    for ways in (2, 4, 8):
        words, mesh = _mesh(found, "tensor", ways)
        yield change(
            f"{words}{small}", "activations are exchanged in every layer", **smallest, **mesh
        )
    if (next_size := larger(found.hardware.slice)) is not None:
        yield f"--topology {next_size.name}", "more chips", config, next_size.name
    if not adapted:
        lora = {**smallest, "lora.r": 16}
        yield change(f"--lora.r 16{small}", "trains adapters, not the model", **lora)
        nf4 = {**lora, "lora.base": "nf4"}
        yield change(f"--lora.r 16 --lora.base nf4{small}", "and reads the base in 4 bits", **nf4)


def _peers(found: Study) -> list[int]:
    """Sizes of `mesh.expert` to propose; none where it is used, or nothing is there to share."""
    experts, sizes = found.subject.model.spec.experts, found.work.sizes
    if sizes["expert"] > 1:
        return []
    return [n for n in _PEERS if experts and experts % n == 0 and sizes["fsdp"] % n == 0]


def _mesh(found: Study, axis: str, ways: int) -> tuple[str, dict[str, int]]:
    """(flags, fields) that give `axis` so many devices of `fsdp`, which takes what is left."""
    fields = {f"mesh.{axis}": ways}
    for name, size in found.config.mesh.model_dump().items():
        if name == "fsdp" and size != -1:
            fields["mesh.fsdp"] = -1
        elif name not in (axis, "fsdp") and size == -1:
            fields[f"mesh.{name}"] = found.work.sizes[name]
    return " ".join(f"--{name} {size}" for name, size in fields.items()), fields


def faster(found: Study) -> str | None:
    """A line where a mixture's step is shorter by arithmetic with experts on devices of their own,
    for gathering them takes its time; else None."""
    peers = _peers(found) if found.fits and found.hardware.slice.chip.flops else []
    if not peers:
        return None
    before = study(found.config, found.subject, found.hardware, compiles=False).time
    assert before is not None
    best, words = GAIN * before.step, ""
    for ways in peers:
        said, mesh = _mesh(found, "expert", ways)
        other = _estimated(found, changed(found.config, **mesh), found.hardware.slice.name)
        if other.fits and other.time is not None and other.time.step < best:
            best, words = other.time.step, said
    if not words:
        return None
    return (
        f"by arithmetic a step takes {best:.2f} s with {words}, {before.step:.2f} s without: "
        "experts stay where they are and tokens travel"
    )


def changed(config: Config, **fields: object) -> Config:
    """`config` with other fields, by their dotted names, validated as from a file."""
    given = config.model_dump(mode="json", exclude={"dataset"}, exclude_unset=True)
    return load(overrides={**given, **dict(fields.items())})
