"""A training run in chapters: open the data and the subject, build the program, resume, loop,
export, report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxtune import cli
from jaxtune.api.answer_metrics import AnswerMetrics, held_out_questions
from jaxtune.api.callbacks import FAILED, Callback, CallbackError, Callbacks, Metric, RunInfo
from jaxtune.api.results import TrainResult
from jaxtune.cli import note
from jaxtune.config import (
    Config,
    ConfigError,
    ConfigSource,
    HostsConfig,
    dump,
    load_config,
    shard_bytes,
)
from jaxtune.data.dataset import Batches, Dataset
from jaxtune.data.in_memory import dataset_file
from jaxtune.data.open import open_sides, preprocess_config, stop_ids
from jaxtune.data.progress import fingerprint, largest_id
from jaxtune.data.report.data_report import refuse
from jaxtune.data.report.data_report import report as data_report
from jaxtune.hf.export import WeightFormat, check_target, export_model
from jaxtune.hf.folders import refuse_adapter
from jaxtune.hf.peft.merge import merged
from jaxtune.hf.peft.write import check_adapter_target, write_adapter
from jaxtune.inference.load import GenerationModel, TextCodec, open_codec
from jaxtune.inference.load import stop_ids as inference_stop_ids
from jaxtune.inference.sample_prompts import SamplePrompts
from jaxtune.model.lora import Lora
from jaxtune.parallel import heartbeat, memory, processes
from jaxtune.parallel.chips import set_compiler_flags
from jaxtune.parallel.mesh import make_mesh, platform_of, sizes_of
from jaxtune.reporting.data import held_out_report
from jaxtune.reporting.model_card import model_card, trained_text
from jaxtune.reporting.starts import record_start
from jaxtune.reporting.write import after_training
from jaxtune.spec import flops_per_token
from jaxtune.storage import object_store
from jaxtune.storage.jsonl import last_rows
from jaxtune.terminal.progress import TokenizeProgress
from jaxtune.terminal.text import lost_lines, show_report
from jaxtune.training import build as assemble
from jaxtune.training import debug_step, resume
from jaxtune.training import run_dir as run_dirs
from jaxtune.training.checkpoint.checkpoints import Checkpoints, place
from jaxtune.training.checkpoint.remote import RemoteSync
from jaxtune.training.host_consistency import check_same, run_fingerprints
from jaxtune.training.loop import EvalHistory, Hooks, Loop, Outputs, RunPlan
from jaxtune.training.metrics import MetricsWriter
from jaxtune.training.program import Program, compute_dtype
from jaxtune.training.subject import Subject, open_subject
from jaxtune.training.trainable import backward, share
from jaxtune.tree import merge, named


class RunData(NamedTuple):
    """The data of a run, all numpy, and what tokenized it."""

    codec: TextCodec
    train: Dataset
    held_out: Dataset | None


class Workplace(NamedTuple):
    """The claimed run directory, its copy in a store if it has one, and the thread that watches."""

    run_dir: Path
    sync: RemoteSync | None
    watch: heartbeat.Heartbeat


class Run(NamedTuple):
    """A run before its first step: everything that does not change any more."""

    config: Config
    workplace: Workplace
    data: RunData
    subject: Subject
    mesh: Mesh
    batches: Batches
    total_steps: int

    @property
    def run_dir(self) -> Path:
        return self.workplace.run_dir


class Trained(NamedTuple):
    """The variables to export: those of step `best`, else of `step`, which was the last."""

    variables: dict[str, Any]
    step: int
    best: int | None
    last_rows: Mapping[str, Mapping[str, Any]]  # by kind


def train(
    config: ConfigSource,
    data: Any = None,
    eval_data: Any = None,
    callbacks: Sequence[Callback] = (),
    metrics: Mapping[str, Metric] | None = None,
) -> TrainResult:
    """Train, checkpoint and export, as `jaxtune train` does; the same call resumes.

    `config` may be a mapping or a YAML file. `data` and `eval_data` replace the config's data: a
    list of dicts, a `datasets.Dataset`, a pandas or polars frame, or a path. `metrics` are columns
    of the eval rows: name -> f(prompts, references, responses), of generated answers.

    Raises: ConfigError, DataError, ModelError, Diverged, CallbackError; `cli.Stopped` after saving
    on SIGTERM or SIGINT.
    """
    config, calls = _with_data(config, data, eval_data), Callbacks(callbacks, metrics)
    with _workplace(config, reading=False) as workplace:
        run, report = _open_run(config, workplace)
        program = _build(run)
        with jax.set_mesh(run.mesh), contextlib.ExitStack() as closing:
            checkpoints = _open_checkpoints(run, program, closing)
            start = resume.first_step(
                run.config, checkpoints, run.batches, run.subject, run.total_steps
            )
            if processes.is_first():
                run_dirs.write_config(run.run_dir / "config.yaml", run.config)
                _record_start(run, start)
            trained = _loop(run, program, checkpoints, start, calls, closing)
            with workplace.watch.unlimited("exporting"):
                model_dir, adapter_dir = _export(run, trained, report)
        if processes.is_first():
            _write_report(run, report)
        if workplace.sync is not None:
            with workplace.watch.unlimited(f"copying to {workplace.sync.url}"):
                workplace.sync.finish()
        rows = {**last_rows(run.run_dir / "metrics.jsonl", trained.step), **trained.last_rows}
        result = TrainResult(run.run_dir, model_dir, trained.step, rows, adapter_dir)
        calls.end(result)
        _raise_errors(calls)
    return result


def replay(config: Config, step: int) -> TrainResult:
    """Go to a step once more, from the checkpoint before it, and write what it was beside the run.

    Raises: ConfigError, DataError, ModelError.
    """
    with _workplace(config, reading=True) as workplace:
        run, _ = _open_run(config, workplace, replay_step=step)
        program = _build(run)
        with jax.set_mesh(run.mesh), contextlib.ExitStack() as closing:
            checkpoints = _open_checkpoints(run, program, closing, reading=True)
            start = resume.first_step(
                run.config, checkpoints, run.batches, run.subject, run.total_steps, before=step
            )
            summary = _replay(run, program, checkpoints, start, step)
            return TrainResult(run.run_dir, None, step, {}, replay_summary=summary)


# -- open ------------------------------------------------------------------------------------------


def _with_data(config: ConfigSource, data: Any, eval_data: Any) -> Config:
    """Put data that came as values into the config, as files."""
    sides = (("datasets", data, "data"), ("eval_datasets", eval_data, "eval_data"))
    entries = {
        field: [{"path": dataset_file(value, name=name)}]
        for field, value, name in sides
        if value is not None
    }
    return load_config(config, **entries)


@contextlib.contextmanager
def _workplace(config: Config, *, reading: bool) -> Iterator[Workplace]:
    """Join the hosts and claim the run directory, until the run has ended."""
    try:
        with heartbeat.ended_by_signals():
            refuse_adapter(_required(config))
            set_compiler_flags()
            heartbeat.join(config.hosts)
            run_dir = run_dirs.place_of(str(config.output_dir), reading=reading)
            limit = config.hang_timeout_seconds
            with (
                heartbeat.Heartbeat(hang_seconds=limit, folder=run_dir) as watch,
                memory.explained(_smaller(config)),
                contextlib.ExitStack() as end,
            ):
                sync = run_dirs.claim(str(config.output_dir), run_dir, end, reading=reading)
                yield Workplace(run_dir, sync, watch)
    except heartbeat.StopSignal as signal:
        raise cli.Stopped(
            f"stopped by {signal} where there was nothing to save. The same command goes on from "
            "what is saved."
        ) from None


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
    """Tell what to change where a device's memory does not hold a step."""
    return (
        f"Set a smaller per_device_train_batch_size (now {config.per_device_train_batch_size}), "
        f"gradient_checkpointing full (now {config.gradient_checkpointing}), or more devices along "
        f"mesh.fsdp (now {config.mesh.fsdp}; -1 is all there are). jaxtune plan says what fits."
    )


def _open_run(
    config: Config, workplace: Workplace, *, replay_step: int | None = None
) -> tuple[Run, dict[str, Any]]:
    """Open data and subject and lay out the batches; returns the data report too.

    Everything that can be wrong with the data is said before a device is touched.
    """
    # How this run was launched is not what it is: its config can be used again anywhere.
    config = config.model_copy(update={"hosts": HostsConfig()})
    data = _open_data(config)
    sides = [side for side in (data.train, data.held_out) if side is not None]
    subject = open_subject(config, data.codec.tokenizer, largest_id=max(map(largest_id, sides)))
    if config.export:
        check_target(workplace.run_dir / "hf", subject.model)
        if subject.adapters is not None:
            check_adapter_target(workplace.run_dir / "adapter")
    mesh = make_mesh(config.mesh.model_dump())
    rows = assemble.rows_per_step(config, mesh)
    batches = Batches(data.train, batch_size=rows, seed=config.seed, packing=config.packing)
    total_steps = batches.total_steps(config.num_train_epochs, config.max_steps)
    if processes.count() > 1:
        check_same(run_fingerprints(config, subject, batches, data.held_out, total_steps))
    if replay_step is not None and replay_step > total_steps:
        raise ConfigError(
            f"flags: --replay_step {replay_step}: this run has {total_steps} steps. Give one of "
            "them."
        )
    run = Run(config, workplace, data, subject, mesh, batches, total_steps)
    return run, _announce(run)


def _open_data(config: Config) -> RunData:
    codec = open_codec(config)
    with TokenizeProgress(quiet=not cli.shows_notes()) as progress:
        train, held_out = open_sides(config, *codec, progress=progress)
    refuse(train)
    return RunData(codec, train, held_out)


def _announce(run: Run) -> dict[str, Any]:
    """Say what is about to be trained; returns the data report for the model card."""
    data, batches, mesh = run.data, run.batches, run.mesh
    report = data_report(data.train, batches, total_steps=run.total_steps)
    if cli.shows_notes():
        show_report(report, short=True)
    if data.held_out is not None:
        report["evaluation"] = counts = held_out_report(data.train, data.held_out)
        for line in lost_lines(counts.get("by_dataset", {}), "evaluation dataset"):
            note(line)
        common, alike = counts["also_trained"], counts["nearly_trained"]
        note(
            f"evaluation: {counts['examples']} examples"
            + (f"; {common} of them are in the training data" if common else "")
            + (f"; {alike} records say nearly the same as a trained one" if alike else "")
        )
    axes = " x ".join(f"{name} {size}" for name, size in sizes_of(mesh).items() if size > 1)
    shared = f" of {processes.count()} hosts" if processes.count() > 1 else ""
    note(
        f"training: {run.total_steps} steps of {batches.batch_size} rows x {batches.row_length} "
        f"tokens ({batches.steps_per_epoch} steps an epoch), on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} device(s){shared}{', ' + axes if axes else ''}; "
        f"learning rate {run.config.learning_rate:g}"
    )
    return report


# -- build and resume ------------------------------------------------------------------------------


def _build(run: Run) -> Program:
    config, subject = run.config, run.subject
    program = assemble.build(config, subject, run.mesh, run.total_steps)
    note(f"trained: {share(program.abstract.trained, program.variables)}")
    kind, why = assemble.attention_of(config, subject.spec, run.mesh, run.batches.row_length)
    note(f"attention: {kind} ({why})")
    assemble.keep_compiled(config.compilation_cache_dir)
    return program


def _open_checkpoints(
    run: Run, program: Program, closing: contextlib.ExitStack, *, reading: bool = False
) -> Checkpoints:
    sync = run.workplace.sync
    if sync is None:
        processes.check_shared(run.run_dir)
    checkpoints = Checkpoints(
        run.run_dir,
        keep=run.config.save_total_limit,
        sync=sync,
        targets=place(program.abstract, program.shardings),
        reading=reading,
    )
    closing.callback(checkpoints.close)
    return checkpoints


def _record_start(run: Run, start: int) -> None:
    devices = run.mesh.devices.flat
    record_start(
        run.run_dir,
        step=start,
        total_steps=run.total_steps,
        rows_per_step=run.batches.batch_size,
        device=devices[0].device_kind,
        devices=run.mesh.size,
        hosts=len({device.process_index for device in devices}),
    )


# -- loop ------------------------------------------------------------------------------------------


def _loop(
    run: Run,
    program: Program,
    checkpoints: Checkpoints,
    start: int,
    calls: Callbacks,
    closing: contextlib.ExitStack,
) -> Trained:
    """Train from step `start` to the end, and keep the weights that are to be exported."""
    config, watch = run.config, run.workplace.watch
    state, frozen = resume.first_state(config, run.subject, program, checkpoints, start)
    evaluated = run.data.held_out.fingerprint if run.data.held_out is not None else ""
    past = resume.past_of(config, checkpoints, start, evaluated)
    due = EvalHistory.of(past).due
    writer = MetricsWriter(
        run.run_dir,
        resumed_at=start,
        due=due,
        report_to=config.report_to,
        quiet=not processes.is_first(),
        settings=config.model_dump(mode="json"),
    )
    closing.callback(writer.close)
    plan = RunPlan(
        run.batches,
        run.data.held_out,
        run.total_steps,
        meta={
            "fingerprint": fingerprint(run.batches),
            "total_steps": run.total_steps,
            "held_out": evaluated,
            **run.subject.meta,
        },
        flops_per_token=flops_per_token(
            run.subject.spec,
            run.batches.row_length,
            backward(run.subject.spec, program.abstract.trained),
        ),
        run_dir=run.run_dir,
        start=start,
        past=past,
    )
    hooks = _hooks(run, calls, start, due)
    loop = Loop(config, program, plan, Outputs(checkpoints, writer, watch), hooks)
    calls.start(RunInfo(config, run.run_dir, start, run.total_steps))
    _raise_errors(calls)
    state, done = loop.run(state, frozen)
    watch.at(done, "saving")
    checkpoints.wait()
    _raise_errors(calls)
    best = loop.history.best_step if config.load_best_model_at_end else None
    if best in (None, done):
        return Trained(merge(state.trained, frozen), done, best, loop.last)
    del state
    trained = checkpoints.restore_trained(best, program.abstract, program.shardings)
    note(f"best: step {best}, eval_loss {loop.history.best_loss:.4f}; it is exported")
    return Trained(merge(trained, frozen), done, best, loop.last)


def _hooks(run: Run, calls: Callbacks, start: int, due: bool) -> Hooks:
    codec, subject, prompts = run.data.codec, run.subject, run.config.sample_prompts
    model = GenerationModel(  # as inference takes it, still without weights
        subject.name,
        subject.spec,
        {},
        inference_stop_ids(run.config, codec, subject.model),
        compute_dtype(run.config.dtype, platform_of(run.mesh)),
        run.mesh,
    )
    sample = measure = None
    if prompts:
        sample = SamplePrompts(
            run.run_dir, prompts, codec, subject, model, resumed_at=start, due=due
        )
    if calls.metrics:
        questions = held_out_questions(run.config, run.data.held_out, codec, subject.spec)
        measure = AnswerMetrics(calls, questions, codec, subject, model)
    return Hooks(
        sample,
        measure,
        row=calls.row,
        saved=calls.saved if calls.watches_saves else None,
        stop_reason=(lambda: calls.stop_reason) if calls else None,
    )


def _raise_errors(calls: Callbacks) -> None:
    """Raise on every host what a callback raised on the first. All hosts call."""
    stop_reason = max(processes.gather_texts(calls.stop_reason)) if calls else ""
    if calls.error is not None:
        raise calls.error
    if stop_reason.startswith(FAILED):
        raise CallbackError(f"on the first host: {stop_reason}")


def _replay(run: Run, program: Program, checkpoints: Checkpoints, start: int, step: int) -> str:
    """Go through the step again and write it beside the run; returns a summary."""
    sync, batches, path = run.workplace.sync, run.batches, debug_step.path_of(run.run_dir, step)
    state, frozen = resume.first_state(run.config, run.subject, program, checkpoints, start)
    metrics, losses = debug_step.replay(step, program, batches, start, state, frozen)
    names = list(named(program.abstract.trained))
    facts = debug_step.describe(run.run_dir, step, metrics, names, batches, start or None)
    facts["row_losses"] = losses
    if processes.is_first():
        debug_step.write(path, facts)
        if sync is not None:
            sync.put(path.name)
    where = path if sync is None else object_store.join(sync.url, path.name)
    note(f"replayed step {step}: {where}")
    return debug_step.summary(facts) if processes.is_first() else ""


# -- export and report -----------------------------------------------------------------------------


def _export(
    run: Run, trained: Trained, report: Mapping[str, Any]
) -> tuple[Path | None, Path | None]:
    """Write the model, and the adapter if there is one; returns their folders."""
    if not run.config.export:
        return None, None
    params, lora, adapter_dir = trained.variables["params"], run.subject.lora, None
    if lora is not None:
        adapter_dir = _export_adapter(run, lora, trained.variables["lora"])
        params = merged(run.subject.model, lora, trained.variables["lora"])
    config, best = run.config, trained.best
    tokenizer, template = run.data.codec
    step = trained.step if best is None else best
    exported = export_model(
        run.run_dir / "hf",
        model=run.subject.model,
        params=params,
        weights=WeightFormat(config.save_dtype, shard_bytes(config.max_shard_size)),
        tokenizer=tokenizer,
        template=template,
        stop_ids=stop_ids(config, tokenizer, template),
        card=model_card(
            base=run.subject.name,
            random_start=config.init == "random",
            metrics=last_rows(run.run_dir / "metrics.jsonl", step, best=best),
            data=report,
            template=template.name,
            template_kwargs=config.chat_template_kwargs,
            trained=trained_text(config),
            config=dump(config),
        ),
    )
    note(
        f"model: {exported.folder} ({exported.tensors} tensors, {exported.size / 1e6:.1f} MB, "
        "read back and equal to the parameters)"
    )
    return exported.folder, adapter_dir


def _export_adapter(run: Run, lora: Lora, adapters: Any) -> Path:
    written = write_adapter(
        run.run_dir / "adapter",
        model=run.subject.model,
        lora=lora,
        adapters=adapters,
        **run.data.codec._asdict(),
    )
    note(
        f"adapter: {written.folder} ({written.tensors} tensors, {written.size / 1e6:.1f} MB, in "
        "PEFT's format)"
    )
    return written.folder


def _write_report(run: Run, report: Mapping[str, Any]) -> None:
    config, data = run.config, run.data
    settings = preprocess_config(config, *data.codec)
    after_training(run.run_dir, config, settings, data.train, report)
