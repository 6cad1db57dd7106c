"""The costs of a run on hardware that is not here, as a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxtune.cli import note, shows_notes
from jaxtune.config import Config, ConfigError, ConfigSource, load_config, parse_model
from jaxtune.data.dataset import Batches
from jaxtune.data.open import open_sides, open_template, open_tokenizer
from jaxtune.hf.load import HfModel, with_tokens
from jaxtune.parallel.chips import parse_slice
from jaxtune.parallel.mesh import make_mesh
from jaxtune.planning.advice import changed, faster, reason, remedies
from jaxtune.planning.environment import set_environment
from jaxtune.planning.evaluate_config import PlannedRun, StepEstimate, evaluate_config, figures
from jaxtune.planning.hardware import Hardware, make_hardware
from jaxtune.planning.options import PlanOptions
from jaxtune.planning.search import (
    Candidate,
    Progress,
    candidates,
    compile_all,
    estimate_candidate,
    frontier,
)
from jaxtune.planning.text import frontier_text, header, plan_text, rate
from jaxtune.spec import parameter_count
from jaxtune.storage.object_store import default_folder
from jaxtune.terminal.progress import SearchProgress, TokenizeProgress
from jaxtune.training.build import rows_per_step
from jaxtune.training.subject import open_base


class PlanResult(NamedTuple):
    """The object of `plan --json`, and the config it is of: after a search the fastest that fits,
    with the others of `plan["frontier"]`."""

    plan: Mapping[str, Any]
    config: Config

    def text(self) -> str:
        """Return the plan as a page for the terminal."""
        page = plan_text(self.plan)
        if "frontier" in self.plan:
            page = f"{frontier_text(self.plan['frontier'])}\n\n{page}"
        return page


def plan(
    config: ConfigSource,
    *,
    topology: str,
    compile: bool = True,
    verify: bool = False,
    search: bool = False,
    search_minutes: float = 20.0,
    price_per_chip_hour: float | None = None,
    cache: bool = True,
) -> PlanResult:
    """Plan the run of `config` on `topology`, such as "v5e-16", "h100-8" or "cpu".

    `compile` asks the TPU compiler, which takes minutes; GPUs and the CPU are planned by
    arithmetic. `search` walks mesh, batch and gradient_checkpointing for the fastest that fits.
    Raises `ConfigError`, `DataError` and `ModelError`.

    >>> plan(config, topology="v5e-16", compile=False).plan["fits"]  # doctest: +SKIP
    True
    """
    values = {
        "topology": topology,
        "compile": compile,
        "verify": verify,
        "search": search,
        "search_minutes": search_minutes,
        "search_output": None,
        "price_per_chip_hour": price_per_chip_hour,
        "cache": cache,
    }
    options = parse_model(PlanOptions, values, where="plan")
    set_environment()
    return run_plan(load_config(config), options)


def run_plan(config: Config, options: PlanOptions) -> PlanResult:
    """Make the plan; a search writes its choice to `search_output`."""
    if not config.model_name_or_path:
        raise ConfigError(
            "model_name_or_path is not set. Give --model_name_or_path DIR, whose config.json is "
            "enough, or a --config that has it."
        )
    if options.topology is None:
        raise ConfigError("topology is not set. Give --topology v5e-16, h100-8 or cpu.")
    hardware = make_hardware(parse_slice(options.topology), compiles=options.compile)
    model = open_base(config, weights=False, note=note)
    run, notes = _planned_run(config, model, hardware)
    if options.search:
        config, described = _search(config, run, hardware, options)
    else:
        estimate = evaluate_config(config, run, hardware, folder=_folder(options), note=note)
        described = _described(estimate, options)
    described["notes"] = [*notes, *described["notes"]]
    return PlanResult(described, config)


def _folder(options: PlanOptions) -> Path | None:
    """Return the folder of the compiler's cached answers, None for no cache."""
    return default_folder() / "plan" if options.cache else None


# -- what is planned -----------------------------------------------------------------------------


def _planned_run(
    config: Config, model: HfModel, hardware: Hardware
) -> tuple[PlannedRun, list[str]]:
    """Return the model with the data's rows and steps, where data is given, and notes on them."""
    if not config.datasets:
        steps = config.max_steps if config.max_steps > 0 else None
        hint = "" if steps else " Give --dataset for the time of the whole run."
        notes = [f"rows of max_length, {config.max_length}, taken to be full.{hint}"]
        return PlannedRun(model, config.max_length, steps), notes
    tokenizer = open_tokenizer(config, config.tokenizer_name or model.name, note=note)
    template = open_template(config, tokenizer, note=note)
    with TokenizeProgress(quiet=not shows_notes()) as progress:
        train, _ = open_sides(config, tokenizer, template, progress=progress)
    added = tokenizer.added.values()
    model = with_tokens(model, added, trained=tokenizer.size - len(added))
    rows = rows_per_step(config, make_mesh(config.mesh.model_dump(), hardware.devices))
    batches = Batches(train, batch_size=rows, seed=config.seed, packing=config.packing)
    steps = batches.total_steps(config.num_train_epochs, config.max_steps)
    notes = [
        f"{len(train):,} examples in {batches.rows:,} rows of {batches.row_length:,} tokens, "
        f"{batches.fill:.1%} full; {batches.steps_per_epoch:,} steps an epoch of {rows:,} rows"
    ]
    return PlannedRun(model, batches.row_length, steps, batches.fill), notes


# -- the answer ----------------------------------------------------------------------------------


def _described(estimate: StepEstimate, options: PlanOptions) -> dict[str, Any]:
    """Make the object of `--json`."""
    described = figures(estimate)
    run, price = described["run"], options.price_per_chip_hour
    if run is not None and price is not None:
        run["price_per_chip_hour"] = price
        run["price"] = run["chip_hours"] * price
    described |= {
        "model": estimate.run.model.name,
        "parameters": parameter_count(estimate.run.model.spec),
        "remat": estimate.work.remat,
        "attention": estimate.work.attention,
        "reason": None,
        "ways": [],
        "notes": _notes(estimate),
    }
    if not estimate.fits:

        def compiled(config: Config) -> StepEstimate:
            return evaluate_config(
                config, estimate.run, estimate.hardware, folder=_folder(options), note=note
            )

        verify = options.verify and estimate.hardware.compiles
        per_chip = estimate.hardware.per_chip
        described["reason"] = reason(estimate)
        described["ways"] = [
            {
                "change": remedy.what,
                "costs": remedy.costs,
                "hbm_bytes": remedy.needed * per_chip,
                "verified": remedy.verified,
            }
            for remedy in remedies(estimate, compile=compiled if verify else None)
        ]
    return described


def _notes(estimate: StepEstimate) -> list[str]:
    """List what the figures rest on."""
    hardware, read = estimate.hardware, estimate.read
    notes = []
    if read is None:
        notes.append(
            "by arithmetic: parameters and optimiser are exact, the rest is counted by rule; "
            "docs/plan.md says how far from the compiler"
        )
    else:
        notes.append(
            "memory: parameters, optimiser and the sum are exact; gradients, activations and "
            "logits are counted by rule, temporaries are what remains of the compiler's buffers"
        )
        if read.cost.loops_unread:
            notes.append(
                f"{read.cost.loops_unread} loops of unknown length are counted as one turn"
            )
    if estimate.time is not None and read is not None and read.fits:
        notes.append(
            "time: modelled, not measured; within about 10% of published runs, so differences "
            "below 5% mean nothing"
        )
    elif estimate.time is not None:
        notes.append("time: by arithmetic, from shares of the peak; a rough guide")
    if (shorter := faster(estimate)) is not None:
        notes.append(shorter)
    if hardware.slice.platform == "tpu" and hardware.per_chip > 1:
        notes.append(
            f"JAX shows {hardware.per_chip} devices for each chip; mesh and rows count these"
        )
    return notes


# -- a search ------------------------------------------------------------------------------------


def _search(
    config: Config, run: PlannedRun, hardware: Hardware, options: PlanOptions
) -> tuple[Config, dict[str, Any]]:
    """Find the fastest settings that fit, and their plan."""
    if not hardware.slice.chip.flops:
        raise ConfigError(f"search: the speed of {hardware.slice.name} is not known; name a chip.")
    ranked = candidates(config, run, hardware)
    note(f"search: {len(ranked)} settings may fit on {hardware.slice.name}, by arithmetic")
    plans = []
    for candidate, plan in _tried(ranked, config, run, hardware, options.search_minutes):
        plans.append({**plan, "settings": candidate.settings, "fields": dict(candidate.fields)})
    best = frontier(plans)
    if not best:
        raise ConfigError(
            f"search: none of the {len(plans)} settings tried fits on {hardware.slice.name}. Give "
            "it more --search_minutes, a larger --topology, or --lora.r 16."
        )
    chosen = changed(config, **best[0]["fields"])
    compiles = best[0]["method"] == "compiled"
    estimate = evaluate_config(
        chosen, run, hardware, folder=_folder(options), note=note, compiles=compiles
    )
    described = _described(estimate, options)
    described["frontier"] = [dict(other) for other in best]
    described["tried"] = len(plans)
    tried = f"search: {len(plans)} of {len(ranked)} settings tried"
    if options.search_output is not None:
        _write(chosen, described, Path(options.search_output))
        tried += f"; the fastest is written to {options.search_output}"
    described["notes"].append(tried)
    return chosen, described


def _tried(
    ranked: Sequence[Candidate],
    config: Config,
    run: PlannedRun,
    hardware: Hardware,
    minutes: float,
) -> Iterator[tuple[Candidate, dict[str, Any]]]:
    """Yield candidates and their plans, compiled as far as time allows, or all by arithmetic."""
    if not hardware.compiles:
        yield from ((candidate, estimate_candidate(candidate, hardware)) for candidate in ranked)
        return
    with SearchProgress(minutes, quiet=not shows_notes()) as show:

        def advance(progress: Progress) -> None:
            best = progress.best
            fastest = "" if best is None else f"{rate(best)}: {progress.settings}"
            show(progress.done, progress.total, fastest)

        yield from compile_all(
            ranked, config, run, hardware, minutes=minutes, advance=advance, note=note
        )


def _write(config: Config, plan: Mapping[str, Any], file: Path) -> None:
    text = yaml.safe_dump(
        config.model_dump(mode="json", exclude={"dataset"}, exclude_unset=True), sort_keys=False
    )
    head = [f"{plan['model']} on {plan['topology']}, found by plan --search:", *header(plan)]
    file.write_text("".join(f"# {line}\n" for line in head) + text, encoding="utf-8")
