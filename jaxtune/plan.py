"""What a run costs before it is paid for: the real train step, compiled for hardware not here.

    python -m jaxtune.plan --config C --topology v5e-16 [--dataset FILE] [--search]

Needs `config.json` of the model and no weights. TPUs are planned with the TPU compiler itself
(`pip install 'jaxtune[tpu]'`, no TPU needed), GPUs and the CPU by arithmetic. docs/plan.md says
what each figure means and how far it can be believed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import cli
from jaxtune.cli import note
from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jaxtune.hf.load import HfModel
    from jaxtune.planning.evaluate_config import Study, Subject
    from jaxtune.planning.hardware import Hardware
    from jaxtune.planning.search import Candidate


class PlanOptions(cli.Options):
    topology: str | None = Field(
        None,
        description="v5e-16, v6e-8, v5p-128, v4-8, tpu7x-8, a shape (v5e:4x4), several slices "
        "(2xv5e-256), GPUs of one machine (h100-8), or cpu",
    )
    compile: bool = Field(
        True, description="false = arithmetic alone, in seconds; GPUs and cpu always"
    )
    verify: bool = Field(
        False, description="where it does not fit, compile the changes proposed until one fits"
    )
    search: bool = Field(
        False, description="walk mesh, batch and gradient_checkpointing for the fastest that fits"
    )
    search_minutes: float = Field(20.0, gt=0, description="time for compiling in a search")
    search_output: str = Field("plan.yaml", description="where a search writes what it chose")
    price_per_chip_hour: float | None = Field(
        None, gt=0, le=1e9, description="in any currency; adds the price of the run"
    )
    cache: bool = Field(True, description="keep and reuse what the compiler said")
    as_json: bool = Field(False, alias="json", description="one object on stdout")


class Result(NamedTuple):
    """What `--json` prints; with `search` of the chosen settings, the others under "frontier"."""

    plan: Mapping[str, Any]


def run(config: Config, options: PlanOptions | None = None) -> Result:
    """Prints to stdout. Raises `ConfigError`, `DataError` and `ModelError`."""
    options = options or PlanOptions()
    if not config.model_name_or_path:
        raise ConfigError(
            "model_name_or_path is not set. Give --model_name_or_path DIR, whose config.json is "
            "enough, or a --config that has it."
        )

    # 1. The hardware: said before JAX is imported, whose devices it decides.
    from jaxtune.parallel.chips import parse_slice
    from jaxtune.planning.hardware import hardware, set_environment

    if options.topology is None:
        raise ConfigError("topology is not set. Give --topology v5e-16, h100-8 or cpu.")
    slice = parse_slice(options.topology)
    set_environment()
    there = hardware(slice, compiles=options.compile)

    # 2. The model and the length of its run.
    from jaxtune.training.subject import open_base

    model = open_base(config, weights=False)
    subject, notes = _subject(config, model, there)

    # 3. The answer.
    if options.search:
        plan = _search(config, subject, there, options)
    else:
        from jaxtune.planning.evaluate_config import study

        found = study(config, subject, there, folder=_folder(options), note=note)
        plan = _described(found, options)
    plan["notes"] = [*notes, *plan["notes"]]
    if options.as_json:
        print(json.dumps(plan, ensure_ascii=False, allow_nan=False))
    else:
        from jaxtune.planning.text import frontier_text, plan_text

        if "frontier" in plan:
            print(frontier_text(plan["frontier"]), end="\n\n")
        print(plan_text(plan))
    return Result(plan)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return cli.execute("plan", description, PlanOptions, run, argv)


def _folder(options: PlanOptions) -> Path | None:
    from jaxtune.storage.object_store import default_folder

    return default_folder() / "plan" if options.cache else None


# -- what is planned -----------------------------------------------------------------------------


def _subject(config: Config, model: HfModel, there: Hardware) -> tuple[Subject, list[str]]:
    """The model with the data's rows and steps where data is given, and what to say of that."""
    from jaxtune.planning.evaluate_config import Subject

    if not config.datasets:
        steps = config.max_steps if config.max_steps > 0 else None
        said = "" if steps else " Give --dataset for the time of the whole run."
        told = [f"rows of max_length, {config.max_length}, taken to be full.{said}"]
        return Subject(model, config.max_length, steps), told

    from jaxtune.data.dataset import Batches
    from jaxtune.data.open import open_sides, open_template, open_tokenizer
    from jaxtune.hf.load import with_tokens
    from jaxtune.parallel.mesh import make_mesh
    from jaxtune.terminal.progress import Tokenising
    from jaxtune.training.build import rows_per_step

    tokenizer = open_tokenizer(config, config.tokenizer_name or model.name, note=note)
    template = open_template(config, tokenizer, note=note)
    with Tokenising() as progress:
        train, _ = open_sides(config, tokenizer, template, progress=progress)
    added = tokenizer.added.values()
    model = with_tokens(model, added, trained=tokenizer.size - len(added))
    rows = rows_per_step(config, make_mesh(config.mesh.model_dump(), there.devices))
    batches = Batches(train, batch_size=rows, seed=config.seed, packing=config.packing)
    steps = batches.total_steps(config.num_train_epochs, config.max_steps)
    told = [
        f"{len(train):,} examples in {batches.rows:,} rows of {batches.row_length:,} tokens, "
        f"{batches.fill:.1%} full; {batches.steps_per_epoch:,} steps an epoch of {rows:,} rows"
    ]
    return Subject(model, batches.row_length, steps, batches.fill), told


# -- the answer ----------------------------------------------------------------------------------


def _described(found: Study, options: PlanOptions) -> dict[str, Any]:
    """The object of `--json`."""
    from jaxtune.planning import advice
    from jaxtune.planning.evaluate_config import figures, study
    from jaxtune.spec import parameter_count

    plan = figures(found)
    run, price = plan["run"], options.price_per_chip_hour
    if run is not None and price is not None:
        run["price_per_chip_hour"] = price
        run["price"] = run["chip_hours"] * price
    plan |= {
        "model": found.subject.model.name,
        "parameters": parameter_count(found.subject.model.spec),
        "remat": found.work.remat,
        "attention": found.work.attention,
        "reason": None,
        "ways": [],
        "notes": _notes(found),
    }
    if not found.fits:

        def compiled(config: Config) -> Study:
            folder = _folder(options)
            return study(config, found.subject, found.hardware, folder=folder, note=note)

        verify = options.verify and found.hardware.compiles
        per_chip = found.hardware.per_chip
        plan["reason"] = advice.reason(found)
        plan["ways"] = [
            {
                "change": way.what,
                "costs": way.costs,
                "hbm_bytes": way.needed * per_chip,
                "verified": way.verified,
            }
            for way in advice.ways(found, compile=compiled if verify else None)
        ]
    return plan


def _notes(found: Study) -> list[str]:
    """What the figures rest on."""
    from jaxtune.planning.advice import faster

    there, read = found.hardware, found.read
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
        if read.loops_unread:
            notes.append(f"{read.loops_unread} loops of unknown length are counted as one turn")
    if found.time is not None and read is not None and read.fits:
        notes.append(
            "time: modelled, not measured; within about 10% of published runs, so differences "
            "below 5% mean nothing"
        )
    elif found.time is not None:
        notes.append("time: by arithmetic, from shares of the peak; a rough guide")
    if (shorter := faster(found)) is not None:
        notes.append(shorter)
    if there.slice.platform == "tpu" and there.per_chip > 1:
        notes.append(f"JAX shows {there.per_chip} devices for each chip; mesh and rows count these")
    return notes


def _search(
    config: Config, subject: Subject, there: Hardware, options: PlanOptions
) -> dict[str, Any]:
    """The plan of the fastest settings that fit, which are also written to a file."""
    from jaxtune.planning.advice import changed
    from jaxtune.planning.evaluate_config import study
    from jaxtune.planning.search import candidates, frontier

    if not there.slice.chip.flops:
        raise ConfigError(f"search: the speed of {there.slice.name} is not known; name a chip.")
    ranked = candidates(config, subject, there)
    note(f"search: {len(ranked)} settings may fit on {there.slice.name}, by arithmetic")
    plans = []
    for candidate, plan in _tried(ranked, config, subject, there, options):
        plans.append({**plan, "settings": candidate.settings, "fields": dict(candidate.fields)})
    best = frontier(plans)
    if not best:
        raise ConfigError(
            f"search: none of the {len(plans)} settings tried fits on {there.slice.name}. Give it "
            "more --search_minutes, a larger --topology, or --lora.r 16."
        )
    chosen = changed(config, **best[0]["fields"])
    compiles = best[0]["method"] == "compiled"
    found = study(chosen, subject, there, folder=_folder(options), note=note, compiles=compiles)
    plan = _described(found, options)
    plan["frontier"] = [dict(other) for other in best]
    plan["tried"] = len(plans)
    _write(chosen, plan, Path(options.search_output))
    plan["notes"].append(
        f"search: {len(plans)} of {len(ranked)} settings tried; the fastest is written to "
        f"{options.search_output}"
    )
    return plan


def _tried(
    ranked: Sequence[Candidate],
    config: Config,
    subject: Subject,
    there: Hardware,
    options: PlanOptions,
) -> Iterator[tuple[Candidate, dict[str, Any]]]:
    """Candidates and their plans: compiled as far as the time allows, or all by arithmetic."""
    from jaxtune.planning.search import Progress, compile_all, counted
    from jaxtune.planning.text import rate
    from jaxtune.terminal.progress import Searching

    if not there.compiles:
        yield from ((candidate, counted(candidate, there)) for candidate in ranked)
        return
    with Searching(options.search_minutes) as told:

        def advance(progress: Progress) -> None:
            best = progress.best
            fastest = "" if best is None else f"{rate(best)}: {progress.settings}"
            told(progress.done, progress.total, fastest)

        yield from compile_all(
            ranked,
            config,
            subject,
            there,
            minutes=options.search_minutes,
            advance=advance,
            note=note,
        )


def _write(config: Config, plan: Mapping[str, Any], file: Path) -> None:
    import yaml

    from jaxtune.planning.text import header

    text = yaml.safe_dump(
        config.model_dump(mode="json", exclude={"dataset"}, exclude_unset=True), sort_keys=False
    )
    head = [f"{plan['model']} on {plan['topology']}, found by plan --search:", *header(plan)]
    file.write_text("".join(f"# {line}\n" for line in head) + text, encoding="utf-8")


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
