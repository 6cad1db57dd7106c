"""The work of `evaluate`, as a value: a model, or two, measured on the same examples."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, ConfigSource, load_config, parse_model
from jaxtune.data.dataset import Dataset
from jaxtune.data.in_memory import dataset_file
from jaxtune.evaluation import harness
from jaxtune.evaluation.few_shot import FewShot, open_few_shot
from jaxtune.evaluation.general import open_general
from jaxtune.evaluation.judge import pairwise
from jaxtune.evaluation.judge.client import Endpoint, open_endpoint
from jaxtune.evaluation.judge.verdict import rubric
from jaxtune.evaluation.measured import Inputs, Measured, measure, with_verdicts
from jaxtune.evaluation.options import EvaluateOptions
from jaxtune.evaluation.questions import (
    Column,
    Question,
    entries_of,
    open_column,
    open_data,
    questions_of,
    that_fit,
)
from jaxtune.evaluation.scores.answers import label_of
from jaxtune.evaluation.scores.bootstrap import Bootstrap
from jaxtune.evaluation.summary import Groups, Row, summaries
from jaxtune.evaluation.text import result_text
from jaxtune.inference.load import (
    check_base,
    load_model,
    open_codec,
    open_mesh,
    positions,
    resolved,
)
from jaxtune.inference.sampling import Sampling
from jaxtune.parallel import heartbeat, memory, processes
from jaxtune.training.host_consistency import check_same, evaluation_fingerprints
from jaxtune.training.run_dir import fetched

FEW_SHOT = "few_shot"  # the key of what was measured with examples in the prompt


class EvaluateResult(NamedTuple):
    """A result: `scores` as `evaluate --json` prints it, those of the base under "base";
    `text` is the same for a person, and what `print` shows."""

    scores: Mapping[str, Any]
    text: str

    def __str__(self) -> str:
        return self.text


class _Judge(NamedTuple):
    endpoint: Endpoint
    rubric: str


class _Experiment(NamedTuple):
    """A comparison: all that is equal for both models. `models` are names by column, the last is
    the tuned."""

    config: Config
    options: EvaluateOptions
    models: Mapping[str, str]
    inputs: Inputs
    column: Column | None
    left_out: int | None  # questions too long for a model; None without questions
    few_shot: FewShot | None


def evaluate(config: ConfigSource, data: Any = None, **options: Any) -> EvaluateResult:
    """Measure `config.model_name_or_path` on `data`, else on the data of the config.

    `data` is a list of dicts, a `datasets.Dataset`, a pandas or polars frame, or a path; `options`
    are the flags of the command: `generate=20, base="DIR"`. Prints nothing.

    Raises: `ConfigError`, `DataError`, `ModelError`.
    """
    if data is not None:
        options["dataset"] = dataset_file(data)
    parsed = parse_model(EvaluateOptions, options, where="evaluate")
    return evaluate_model(load_config(config), parsed)


def evaluate_model(config: Config, options: EvaluateOptions) -> EvaluateResult:
    """Measure a model as the command does, on all hosts of a run together."""
    heartbeat.join(config.hosts)
    if options.judge and processes.count() > 1:
        raise ConfigError("judge: runs on one host. Evaluate there, or without it.")
    if options.harness and processes.count() > 1:
        raise ConfigError("harness: runs on one host. Evaluate there, or without it.")
    smaller = (
        f"Set a smaller per_device_eval_batch_size (now {config.per_device_eval_batch_size}) or "
        f"max_length (now {config.max_length}), dtype bfloat16, or more devices along "
        f"mesh.fsdp (now {config.mesh.fsdp}; -1 is all there are)."
    )
    with heartbeat.Heartbeat(hang_seconds=0), memory.explained(smaller):
        judge = _open_judge(options)
        experiment = _prepare(config, options)
        benchmarks = _benchmarks(experiment)  # while no device is taken
        measured = _measure(experiment)
        if judge is not None:
            measured["tuned"] = _judged(measured, experiment, judge)
        return _result(experiment, measured, benchmarks)


def _prepare(config: Config, options: EvaluateOptions) -> _Experiment:
    """Open the data and choose the questions. Raises `ConfigError` where hosts disagree."""
    config = resolved(config)
    base = options.base
    if base is not None and "/checkpoints/" in base:
        base = fetched(base)
    codec = open_codec(config)
    if base is not None:
        check_base(base, codec)
    entries = entries_of(config, options.dataset)
    dataset = open_data(config, entries, codec)
    column = None if options.by is None else open_column(dataset, entries, options.by)
    general = None if options.general is None else open_general(config, options.general, codec)
    assert config.model_name_or_path is not None
    models = {"tuned" if base else "model": config.model_name_or_path}
    if base is not None:
        models = {"base": base, **models}
    shortest = min(positions(name, config) for name in models.values())
    every = questions = questions_of(entries, dataset, codec, options.generate)
    if every:  # the same for both models
        questions = that_fit(every, shortest)
    left_out = len(every) - len(questions) if every else None
    label = None if options.label is None else re.compile(options.label)
    _check_label(label, questions)
    inputs = Inputs(codec, dataset, general, questions, label)
    few_shot = None
    if options.few_shot:
        few_shot = open_few_shot(
            config, entries, inputs, count=options.few_shot, positions=shortest
        )
    experiment = _Experiment(config, options, models, inputs, column, left_out, few_shot)
    if processes.count() > 1:
        _check_same(experiment)
    note(f"evaluation: {len(dataset)} examples of {', '.join(dict.fromkeys(dataset.names))}")
    return experiment


def _check_label(label: re.Pattern[str] | None, questions: Sequence[Question]) -> None:
    """Raise `ConfigError` if no answer of the data has the label that is compared."""
    if label is None:
        return
    if not questions:
        raise ConfigError("label: is of generated answers. Give --generate N as well.")
    if not any(label_of(label, question.spoken(question.reference)) for question in questions):
        raise ConfigError(
            f"label: no answer of the data matches {label.pattern!r}; the first is "
            f"{questions[0].reference[:60]!r}. Mend the regex."
        )


def _check_same(experiment: _Experiment) -> None:
    """Compare the inputs of all hosts. Raises `ConfigError`."""
    config, options, models, inputs, *_, few_shot = experiment
    own = options.model_dump(mode="json", exclude={"dataset", "base", "general", "as_json"})
    prompts = [question.prompt_ids for question in inputs.questions]
    general = inputs.general
    datasets: list[Dataset] = [inputs.dataset, *([] if general is None else [general.texts])]
    datasets += [] if few_shot is None else [few_shot.inputs.dataset]
    check_same(evaluation_fingerprints(config, own, list(models.values()), datasets, prompts))


def _measure(experiment: _Experiment) -> dict[str, Measured]:
    """Measure the models one after the other, so that only one is in memory.

    The first of them also with examples in its prompts, under `FEW_SHOT`.
    """
    config, options, models, inputs, *_, few_shot = experiment
    sampling = Sampling(options.temperature, options.top_k, options.top_p, seed=config.seed)
    mesh = open_mesh(config)
    measured: dict[str, Measured] = {}
    for number, (column, name) in enumerate(models.items()):
        model = load_model(name, config, inputs.codec, mesh)
        how = functools.partial(
            measure, model, config, max_new_tokens=options.max_new_tokens, sampling=sampling
        )
        measured[column] = how(inputs)
        if few_shot is not None and number == 0:
            note(f"{model.name}: once more, with {few_shot.shots} examples in each prompt")
            measured[FEW_SHOT] = how(few_shot.inputs)
    return measured


def _result(
    experiment: _Experiment, measured: Mapping[str, Measured], benchmarks: Mapping[str, Row]
) -> EvaluateResult:
    """Sum up over all and by group, and how sure that is."""
    config, options, models, inputs, column, left_out, few_shot = experiment
    datasets = np.array(inputs.dataset.names, object)[inputs.dataset.source_of]
    examples = np.array([question.example for question in inputs.questions], np.int64)
    bootstrap = Bootstrap(resamples=options.resamples, seed=config.seed)
    groups = Groups(datasets, examples, column)
    columns = {name: measured[name] for name in models}
    scores = summaries(columns, groups, bootstrap)
    for name, rows in benchmarks.items():
        scores[name]["harness"] = rows
    if left_out is not None:
        for row in scores.values():
            row["questions_left_out"] = left_out
    *base, result = scores.values()
    if base:
        result["base"] = base[0]
    if few_shot is not None:
        *_, (last, tuned) = columns.items()
        compared = summaries({FEW_SHOT: measured[FEW_SHOT], last: tuned}, groups, bootstrap)
        result[FEW_SHOT] = {
            "shots": few_shot.shots,
            "shot_rows": [each._asdict() for each in few_shot.rows],
            **compared[FEW_SHOT],
            "difference": compared[last]["difference"],
            **({} if left_out is None else {"questions_left_out": left_out}),
        }
    *_, model = models.values()
    return EvaluateResult(result, result_text(scores, inputs.questions, model))


# -- other judges --------------------------------------------------------------------------------


def _open_judge(options: EvaluateOptions) -> _Judge | None:
    """Send one request, so that an endpoint that refuses is known before a model is loaded."""
    if options.judge is None:
        return None
    if options.base is None or not options.generate:
        raise ConfigError(
            "judge: compares the answers of two models. Give --base DIR and --generate N as well."
        )
    text = rubric(options.judge_prompt)
    endpoint = open_endpoint(
        options.judge,
        options.judge_model,
        key_name=options.judge_key_env,
        temperature=options.judge_temperature,
        timeout=options.judge_timeout,
    )
    pairwise.check(endpoint, text)
    return _Judge(endpoint, text)


def _judged(measured: Mapping[str, Measured], experiment: _Experiment, judge: _Judge) -> Measured:
    """Add the win rate against base to what was measured of tuned."""
    questions: Sequence[Question] = experiment.inputs.questions
    note(f"judge: {judge.endpoint.model} compares {len(questions)} pairs of answers, twice each")
    sides = (measured["base"].generations, measured["tuned"].generations)
    pairs = [
        pairwise.Pair(
            q.transcript, *map(q.spoken, (q.reference, base["response"], tuned["response"]))
        )
        for q, base, tuned in zip(questions, *sides, strict=True)
    ]
    concurrency = experiment.options.judge_concurrency
    outcomes = pairwise.judge(judge.endpoint, judge.rubric, pairs, concurrency=concurrency)
    failed = [outcome.why for outcome in outcomes if outcome.why not in ("", "unparseable")]
    if failed:
        note(f"judge: {len(failed)} pairs have no verdict; the first: {failed[0]}")
    return with_verdicts(measured["tuned"], outcomes, judge.endpoint.model)


def _benchmarks(experiment: _Experiment) -> dict[str, Row]:
    """Run lm-evaluation-harness on the folder of each model, where tasks are named."""
    options, models = experiment.options, experiment.models
    if not options.harness:
        return {}
    folders = {column: harness.folder_of(name) for column, name in models.items()}
    return {
        column: harness.run(folder, options.harness, options.harness_args)
        for column, folder in folders.items()
    }
