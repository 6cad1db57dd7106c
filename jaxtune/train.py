"""Hugging Face model in, fine-tuned Hugging Face model out.

    python -m jaxtune.train --model_name_or_path MODEL --dataset FILE --output_dir OUT

The story in chapters: the data, the model, where to begin, the loop, the export. Everything slow
to import is imported inside `run`'s chapters, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import cli
from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, HostsConfig, dump, shard_bytes
from jaxtune.parallel import heartbeat, memory, processes
from jaxtune.parallel.chips import set_compiler_flags
from jaxtune.storage import object_store
from jaxtune.training import build as assemble
from jaxtune.training import resume
from jaxtune.training import run_dir as rundir

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtune.data.dataset import Batches, Dataset
    from jaxtune.data.templating.template import Template
    from jaxtune.data.tokenizer import Tokenizer
    from jaxtune.hf.load import HfModel
    from jaxtune.inference.sample_prompts import SamplePrompts
    from jaxtune.training.checkpoint.remote import Mirror
    from jaxtune.training.initial_weights import Adapters
    from jaxtune.training.program import Program
    from jaxtune.training.state import TrainState
    from jaxtune.training.subject import Subject


class TrainOptions(cli.Options):
    replay_step: int | None = Field(
        None,
        ge=1,
        description="go to this step once more, from the checkpoint before it, and write its "
        "loss by row and gradient norms into OUT/step-N.json; trains and saves nothing",
    )


class Result(NamedTuple):
    """`model_dir` is the exported folder (None with `export: false`); `step` the last step;
    `metrics` the last train and eval rows of metrics.jsonl, by kind; `adapter_dir` the adapter's
    folder, where there is one.
    """

    output_dir: Path
    model_dir: Path | None
    step: int
    metrics: Mapping[str, Mapping[str, Any]]
    adapter_dir: Path | None = None


class Material(NamedTuple):
    """What a run learns from, all numpy."""

    tokenizer: Tokenizer
    template: Template
    train: Dataset
    held_out: Dataset | None


def run(config: Config, options: TrainOptions | None = None) -> Result:
    """Trains, checkpoints and exports. Raises `ConfigError`, `DataError`, `ModelError`,
    `Diverged`, and `command.Stopped` after saving on SIGTERM or SIGINT.
    """
    try:
        with heartbeat.ended_by_signals():
            return _joined(config, options or TrainOptions())
    except heartbeat.StopSignal as signal:
        raise cli.Stopped(
            f"stopped by {signal} where there was nothing to save. The same command goes on from "
            "what is saved."
        ) from None


def _joined(config: Config, options: TrainOptions) -> Result:
    """The run, once its hosts have found each other and its place is proven."""
    from jaxtune.hf.folders import refuse_adapter

    model_name = _required(config)
    refuse_adapter(model_name)
    set_compiler_flags()
    heartbeat.join(config.hosts)
    reading = options.replay_step is not None
    run_dir = rundir.place_of(str(config.output_dir), reading=reading)
    limit = config.hang_timeout_seconds
    with (
        heartbeat.Heartbeat(hang_seconds=limit, folder=run_dir) as watching,
        memory.explained(_smaller(config)),
        contextlib.ExitStack() as end,
    ):
        mirror = rundir.claim(str(config.output_dir), run_dir, end, reading=reading)
        return _run(config, options, model_name, run_dir, mirror, watching)


def _run(
    config: Config,
    options: TrainOptions,
    model_name: str,
    run_dir: Path,
    mirror: Mirror | None,
    watching: heartbeat.Heartbeat,
) -> Result:
    # How this run was launched is not what it is: its config can be used again anywhere.
    config = config.model_copy(update={"hosts": HostsConfig()})

    # 1. The data: everything that can be wrong with it is said before a device is touched.
    material = _open_data(config, model_name)

    # 2. The model and the program for these devices.
    from jaxtune.data.progress import largest_id
    from jaxtune.hf.export import check_target
    from jaxtune.hf.peft.write import check_adapter_target
    from jaxtune.training.subject import open_subject
    from jaxtune.training.trainable import share

    held_out = [material.held_out] if material.held_out is not None else []
    largest = max(largest_id(data) for data in (material.train, *held_out))
    subject = open_subject(config, material.tokenizer, largest_id=largest)
    model, adapters = subject.model, subject.adapters
    if config.export:
        check_target(run_dir / "hf", model)
        if adapters is not None:
            check_adapter_target(run_dir / "adapter")
    mesh, batches = _plan(config, material.train)
    total_steps = batches.total_steps(config.num_train_epochs, config.max_steps)
    if processes.count() > 1:
        from jaxtune.training.host_consistency import check_same, parts_of

        check_same(parts_of(config, subject, batches, material.held_out, total_steps))
    if (replayed := options.replay_step) is not None and replayed > total_steps:
        raise ConfigError(
            f"flags: --replay_step {replayed}: this run has {total_steps} steps. Give one of them."
        )
    report = _announce(config, material, batches, mesh, total_steps)
    program = assemble.build(config, subject, mesh, total_steps)
    note(f"trained: {share(program.abstract.trained, program.variables)}")
    kind, why = assemble.attention_of(config, model.spec, mesh, batches.row_length)
    note(f"attention: {kind} ({why})")

    # 3. Where to begin.
    import jax

    from jaxtune.training.checkpoint.checkpoints import Checkpoints, place

    assemble.keep_compiled(config.compilation_cache_dir)
    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        if mirror is None:
            processes.check_shared(run_dir)
        wanted = place(program.abstract, program.shardings)
        checkpoints = Checkpoints(
            run_dir,
            keep=config.save_total_limit,
            mirror=mirror,
            wanted=wanted,
            reading=options.replay_step is not None,
        )
        closing.callback(checkpoints.close)
        start = resume.first_step(
            config,
            checkpoints,
            batches,
            subject,
            total_steps,
            before=options.replay_step,
        )
        state, frozen = resume.first_state(config, subject, program, checkpoints, start)
        if options.replay_step is not None:
            _replay(options.replay_step, run_dir, program, batches, start, state, frozen, mirror)
            return Result(run_dir, None, options.replay_step, {})
        if processes.is_first():
            rundir.write_config(run_dir / "config.yaml", config)
            _record_start(run_dir, start, mesh, batches, total_steps)

        # 4. The loop.
        from jaxtune.data.progress import fingerprint
        from jaxtune.spec import flops_per_token
        from jaxtune.storage.jsonl import last_rows
        from jaxtune.training.loop import Loop, Plan, Standing
        from jaxtune.training.metrics import MetricsWriter
        from jaxtune.training.trainable import backward

        evaluated = material.held_out.fingerprint if material.held_out is not None else ""
        past = resume.past_of(config, checkpoints, start, evaluated)
        due = Standing.of(past).due
        writer = MetricsWriter(
            run_dir,
            resumed_at=start,
            due=due,
            report_to=config.report_to,
            quiet=not processes.is_first(),
            settings=config.model_dump(mode="json"),
        )
        closing.callback(writer.close)
        meta = {
            "fingerprint": fingerprint(batches),
            "total_steps": total_steps,
            "held_out": evaluated,
        }
        meta.update(subject.meta)
        back = backward(model.spec, program.abstract.trained)
        flops = flops_per_token(model.spec, batches.row_length, back)
        answer = _samples(config, run_dir, material, subject, mesh, start, due)
        plan = Plan(batches, meta, total_steps, material.held_out, flops, answer)
        loop = Loop(
            config,
            program,
            plan,
            checkpoints,
            writer,
            watching,
            run_dir=run_dir,
            start=start,
            past=past,
        )
        state, done = loop.run(state, frozen)
        watching.at(done, "saving")
        checkpoints.wait()
        best = loop.standing.best_step
        if not config.load_best_model_at_end:
            best = None
        if best not in (None, done):
            del state
            trained = checkpoints.restore_trained(best, program.abstract, program.shardings)
            note(f"best: step {best}, eval_loss {loop.standing.best_loss:.4f}; it is exported")
        else:
            trained = state.trained

        # 5. The export.
        from jaxtune.hf.peft.merge import merged
        from jaxtune.tree import merge

        model_dir = adapter_dir = None
        with watching.unlimited("exporting"):
            if config.export:
                variables = merge(trained, frozen)
                if adapters is not None:
                    adapter_dir = _export_adapter(run_dir, model, adapters, variables, material)
                    variables = {"params": merged(model, adapters.lora, variables["lora"])}
                rows = last_rows(writer.path, done if best is None else best, best=best)
                model_dir = _export(config, run_dir, model, variables, material, report, rows)
    if processes.is_first():
        _draw_report(config, run_dir, material, report)
    if mirror is not None:
        with watching.unlimited(f"copying to {mirror.url}"):
            mirror.finish()
    metrics = {**last_rows(writer.path, done), **loop.last}
    return Result(run_dir, model_dir, done, metrics, adapter_dir)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return cli.execute("train", description, TrainOptions, run, argv)


# -- before the devices ------------------------------------------------------------------------


def _required(config: Config) -> str:
    for name in ("model_name_or_path", "datasets", "output_dir"):
        if not getattr(config, name):
            flag = "dataset FILE" if name == "datasets" else name
            raise ConfigError(
                f"{name} is not set. Give --{flag}, or a --config that has it; "
                "configs/quickstart/quickstart.yaml is one that runs as it is."
            )
    assert config.model_name_or_path is not None
    return config.model_name_or_path


def _smaller(config: Config) -> str:
    """What to do where a device's memory does not hold a step."""
    return (
        f"Set a smaller per_device_train_batch_size (now {config.per_device_train_batch_size}), "
        f"gradient_checkpointing full (now {config.gradient_checkpointing}), or more devices along "
        f"mesh.fsdp (now {config.mesh.fsdp}; -1 is all there are). jaxtune plan says what fits."
    )


def _open_data(config: Config, model_name: str) -> Material:
    from jaxtune.data.open import open_sides, open_template, open_tokenizer
    from jaxtune.data.report.data_report import refuse
    from jaxtune.terminal.progress import TokenizeProgress

    tokenizer = open_tokenizer(config, config.tokenizer_name or model_name, note=note)
    template = open_template(config, tokenizer, note=note)

    with TokenizeProgress() as progress:
        train, held_out = open_sides(config, tokenizer, template, progress=progress)
    refuse(train)
    return Material(tokenizer, template, train, held_out)


def _plan(config: Config, train: Dataset) -> tuple[Mesh, Batches]:
    """The mesh over all devices, and batches of as many rows as it asks for."""
    from jaxtune.data.dataset import Batches
    from jaxtune.parallel.mesh import make_mesh

    mesh = make_mesh(config.mesh.model_dump())
    rows = assemble.rows_per_step(config, mesh)
    return mesh, Batches(train, batch_size=rows, seed=config.seed, packing=config.packing)


def _announce(
    config: Config, material: Material, batches: Batches, mesh: Mesh, total_steps: int
) -> dict[str, Any]:
    """Says what is about to be trained, and returns the data report for the model card."""
    from jaxtune.data.report.data_report import near_overlap, overlap, report
    from jaxtune.parallel.mesh import sizes_of
    from jaxtune.terminal.text import show_report

    found = report(material.train, batches, total_steps=total_steps)
    if processes.is_first():
        show_report(found, short=True)
    if material.held_out is not None:
        common = overlap(material.train, material.held_out)
        alike = near_overlap(material.train, material.held_out)
        held_out = len(material.held_out)
        found["evaluation"] = {
            "examples": held_out, "also_trained": common, "nearly_trained": alike
        }  # fmt: skip
        note(
            f"evaluation: {held_out} examples"
            + (f"; {common} of them are in the training data" if common else "")
            + (f"; {alike} records say nearly the same as a trained one" if alike else "")
        )
    axes = " x ".join(f"{name} {size}" for name, size in sizes_of(mesh).items() if size > 1)
    shared = f" of {processes.count()} hosts" if processes.count() > 1 else ""
    note(
        f"training: {total_steps} steps of {batches.batch_size} rows x {batches.row_length} tokens "
        f"({batches.steps_per_epoch} steps an epoch), on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} device(s){shared}{', ' + axes if axes else ''}; "
        f"learning rate {config.learning_rate:g}"
    )
    return found


# -- before the loop and beside it -----------------------------------------------------------------


def _record_start(
    run_dir: Path, start: int, mesh: Mesh, batches: Batches, total_steps: int
) -> None:
    from jaxtune.reporting.starts import record_start

    devices = mesh.devices.flat
    record_start(
        run_dir,
        step=start,
        total_steps=total_steps,
        rows_per_step=batches.batch_size,
        device=devices[0].device_kind,
        devices=mesh.size,
        hosts=len({device.process_index for device in devices}),
    )


def _samples(
    config: Config,
    run_dir: Path,
    material: Material,
    subject: Subject,
    mesh: Mesh,
    start: int,
    due: bool,
) -> SamplePrompts | None:
    """What answers `sample_prompts` at every evaluation."""
    if not config.sample_prompts:
        return None
    from jaxtune.inference.load import Model, TextCodec, stop_ids
    from jaxtune.inference.sample_prompts import SamplePrompts
    from jaxtune.parallel.mesh import platform_of
    from jaxtune.training.program import compute_dtype

    codec = TextCodec(material.tokenizer, material.template)
    dtype = compute_dtype(config.dtype, platform_of(mesh))
    stops = stop_ids(config, codec, subject.model)
    return SamplePrompts(
        run_dir,
        config.sample_prompts,
        codec,
        subject,
        Model(subject.name, subject.spec, {}, stops, dtype, mesh),
        resumed_at=start,
        due=due,
    )


def _replay(
    step: int,
    run_dir: Path,
    program: Program,
    batches: Batches,
    start: int,
    state: TrainState,
    frozen: Any,
    mirror: Mirror | None,
) -> None:
    """Goes to the step once more, prints what stands out, writes the rest beside the run."""
    from jaxtune.training import debug_step
    from jaxtune.tree import named

    metrics, losses = debug_step.again(step, program, batches, start, state, frozen)
    names = list(named(program.abstract.trained))
    found = debug_step.describe(run_dir, step, metrics, names, batches, start or None)
    found["row_losses"] = losses
    path = debug_step.path_of(run_dir, step)
    if processes.is_first():
        debug_step.write(path, found)
        if mirror is not None:
            mirror.put(path.name)
        print(debug_step.summary(found))
    where = path if mirror is None else object_store.join(mirror.url, path.name)
    note(f"replayed step {step}: {where}")


# -- after the loop ------------------------------------------------------------------------------


def _export_adapter(
    run_dir: Path,
    model: HfModel,
    adapters: Adapters,
    variables: Mapping[str, Any],
    material: Material,
) -> Path:
    from jaxtune.hf.peft.write import write_adapter

    written = write_adapter(
        run_dir / "adapter",
        model=model,
        lora=adapters.lora,
        adapters=variables["lora"],
        tokenizer=material.tokenizer,
        template=material.template,
    )
    note(
        f"adapter: {written.folder} ({written.tensors} tensors, {written.size / 1e6:.1f} MB, in "
        "PEFT's format)"
    )
    return written.folder


def _export(
    config: Config,
    run_dir: Path,
    model: HfModel,
    variables: Mapping[str, Any],
    material: Material,
    report: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
) -> Path:
    from jaxtune.data.open import stop_ids
    from jaxtune.hf.export import export_model
    from jaxtune.reporting.model_card import model_card

    exported = export_model(
        run_dir / "hf",
        model=model,
        params=variables["params"],
        save_dtype=config.save_dtype,
        max_shard_bytes=shard_bytes(config.max_shard_size),
        tokenizer=material.tokenizer,
        template=material.template,
        stop_ids=stop_ids(config, material.tokenizer, material.template),
        card=model_card(
            base=model.name,
            random_start=config.init == "random",
            metrics=metrics,
            data=report,
            template=material.template.name,
            config=dump(config),
        ),
    )
    note(
        f"model: {exported.folder} ({exported.tensors} tensors, {exported.size / 1e6:.1f} MB, "
        "read back and equal to the parameters)"
    )
    return exported.folder


def _draw_report(
    config: Config, run_dir: Path, material: Material, report: Mapping[str, Any]
) -> None:
    from jaxtune.data.preprocess import PreprocessConfig
    from jaxtune.reporting.write import after_training

    settings = PreprocessConfig(
        material.tokenizer, material.template, config.train_on, config.max_length, config.truncation
    )
    after_training(run_dir, config, settings, material.train, report)


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
