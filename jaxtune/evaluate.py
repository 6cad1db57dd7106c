"""How good a model is on a data set: loss, perplexity, token accuracy, and its answers.

    python -m jaxtune.evaluate --model_name_or_path DIR --dataset FILE [--generate N] [--base DIR]

Evaluates on `--dataset`, else on the config's eval_datasets, its eval_split, or its datasets.
`--generate N` answers the first N questions of each data set and compares with the answers there;
`--base` does everything with a second model and says which differences are more than chance;
`--judge` asks a third one which answers are better. docs/evaluate.md says what each figure means.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import cli
from jaxtune.cli import note
from jaxtune.config import Config, ConfigError
from jaxtune.parallel import heartbeat, memory, processes

if TYPE_CHECKING:
    from jaxtune.data.dataset import Dataset
    from jaxtune.evaluation.general import General
    from jaxtune.evaluation.judge.client import Endpoint
    from jaxtune.evaluation.measured import Measured
    from jaxtune.evaluation.questions import Question

_SHOWN = 5  # questions, spread over all


class EvaluateOptions(cli.Options):
    dataset: str | None = Field(
        None, description="what to evaluate on; overrules the data of the config"
    )
    generate: int = Field(
        0,
        ge=0,
        description="answers to generate for each data set; adds exact match, ROUGE-L, chrF, BLEU, "
        "stop rate, length, refusals, variety",
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer, in tokens")
    temperature: float = Field(
        0.0, ge=0, description="0 is greedy; above, answers are drawn, by the config's seed"
    )
    top_k: int = Field(0, ge=0, description="draws among the N likeliest tokens; 0 is all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draws among the likeliest tokens that make up this share"
    )
    base: str | None = Field(
        None, description="a second model, put beside the first, each difference with its interval"
    )
    by: str | None = Field(
        None, description="column of the data, e.g. category: every score for each of its values"
    )
    general: str | None = Field(
        None, description="file of plain text: the loss on what the model was not tuned on"
    )
    resamples: int = Field(
        2000, ge=100, description="of the examples, for the intervals; more = steadier ends"
    )
    judge: str | None = Field(
        None,
        description="address of an OpenAI-compatible endpoint, e.g. https://api.openai.com/v1: "
        "which answer is better, base's or tuned's; sends your questions and answers there",
    )
    judge_model: str | None = Field(None, description="the judging model, as the endpoint names it")
    judge_key_env: str | None = Field(
        None, description="environment variable with the key; default OPENAI_API_KEY, if set"
    )
    judge_prompt: str | None = Field(
        None, description="file with {question} {answer_a} {answer_b}; default: the built-in rubric"
    )
    judge_concurrency: int = Field(4, ge=1, le=256, description="requests at a time")
    judge_timeout: float = Field(60.0, gt=0, description="seconds for one request")
    judge_temperature: float | None = Field(
        0.0, ge=0, description="of the judge; none = as the endpoint has it"
    )
    harness: tuple[str, ...] = Field(
        (),
        description="tasks of lm-evaluation-harness, run on the exported folder as a process of "
        "its own; needs pip install 'jaxtune[harness]'",
    )
    harness_args: tuple[str, ...] = Field(
        (), description="YAML list of more flags for it, e.g. '[--limit, \"100\"]'"
    )
    as_json: bool = Field(False, alias="json", description="one object on stdout")


class Result(NamedTuple):
    """What `--json` prints: the scores of the model, under "base" those of the base."""

    scores: Mapping[str, Any]


def run(config: Config, options: EvaluateOptions | None = None) -> Result:
    """Prints to stdout. Raises `ConfigError`, `DataError` and `ModelError`."""
    options = options or EvaluateOptions()
    heartbeat.join(config.hosts)
    if options.judge and processes.count() > 1:
        raise ConfigError("judge: is asked by one host. Evaluate there, or without it.")
    if options.harness and processes.count() > 1:
        raise ConfigError("harness: runs on one host. Evaluate there, or without it.")
    smaller = (
        f"Set a smaller per_device_eval_batch_size (now {config.per_device_eval_batch_size}) or "
        f"max_length (now {config.max_length}), dtype bfloat16, or more devices along "
        f"mesh.fsdp (now {config.mesh.fsdp}; -1 is all there are)."
    )
    with heartbeat.Watch(hang_seconds=0), memory.explained(smaller):
        return _run(config, options)


def _run(config: Config, options: EvaluateOptions) -> Result:
    # 1. What both models are asked.
    import numpy as np

    from jaxtune.evaluation.general import open_general
    from jaxtune.evaluation.measured import measure
    from jaxtune.evaluation.questions import (
        entries_of,
        open_column,
        open_data,
        questions_of,
        that_fit,
    )
    from jaxtune.evaluation.scores.bootstrap import Bootstrap
    from jaxtune.evaluation.summary import Groups, summaries
    from jaxtune.inference.load import (
        check_base,
        load_model,
        open_mesh,
        open_words,
        positions,
        resolved,
    )
    from jaxtune.inference.sampling import Sampling
    from jaxtune.training.initial_weights import fetched

    sampling = Sampling(options.temperature, options.top_k, options.top_p, seed=config.seed)
    judge = _open_judge(options)
    config = resolved(config)
    if options.base is not None and "/checkpoints/" in options.base:
        options = options.model_copy(update={"base": fetched(options.base)})
    words = open_words(config)
    if options.base is not None:
        check_base(options.base, words)
    entries = entries_of(config, options.dataset)
    dataset = open_data(config, entries, words)
    column = None if options.by is None else open_column(dataset, entries, options.by)
    general = None if options.general is None else open_general(config, options.general, words)
    assert config.model_name_or_path is not None
    names = {"tuned" if options.base else "model": config.model_name_or_path}
    if options.base is not None:
        names = {"base": options.base, **names}
    every = questions = questions_of(entries, dataset, words, options.generate)
    if every:  # of both models the same
        questions = that_fit(every, min(positions(name, config) for name in names.values()))
    if processes.count() > 1:
        _check_same(config, options, names, dataset, general, questions)
    note(f"evaluation: {len(dataset)} examples of {', '.join(dict.fromkeys(dataset.names))}")

    # 2. Public benchmarks, while no device is taken.
    benchmarks = _benchmarks(names, options)

    # 3. One model after the other, so that only one is in memory.
    mesh = open_mesh(config)
    found = {
        column_name: measure(
            load_model(name, config, words, mesh),
            words,
            config,
            dataset,
            general,
            questions,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
        )
        for column_name, name in names.items()
    }
    if judge is not None:
        found["tuned"] = _judged(found, questions, judge, options)

    # 4. What it comes to, over all and by group, and how sure that is.
    datasets = np.array(dataset.names, object)[dataset.source_of]
    groups = Groups(datasets, np.array([q.example for q in questions], np.int64), column)
    how = Bootstrap(resamples=options.resamples, seed=config.seed)
    scores = summaries(found, groups, how)
    for name, rows in benchmarks.items():
        scores[name]["harness"] = rows
    if every:
        for part in scores.values():
            part["questions_left_out"] = len(every) - len(questions)

    # 5. The answer.
    *base, result = scores.values()
    if base:
        result["base"] = base[0]
    if not processes.is_first():
        return Result(result)
    if options.as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        _show(scores, questions, config.model_name_or_path)
    return Result(result)


def _check_same(
    config: Config,
    options: EvaluateOptions,
    names: Mapping[str, str],
    dataset: Dataset,
    general: General | None,
    questions: Sequence[Question],
) -> None:
    """Whether all hosts evaluate the same. Raises `ConfigError`."""
    from jaxtune.data.tokenize import encode_prompt
    from jaxtune.training.host_consistency import asked_parts, check_same

    given = options.model_dump(mode="json", exclude={"dataset", "base", "general", "as_json"})
    prompts = [
        encode_prompt(q.words.template, q.words.tokenizer, q.asked.messages, tools=q.asked.tools)
        for q in questions
    ]
    datasets = [dataset] if general is None else [dataset, general.texts]
    check_same(asked_parts(config, given, list(names.values()), datasets, prompts))


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return cli.execute("evaluate", description, EvaluateOptions, run, argv)


# -- others who are asked ------------------------------------------------------------------------


class _Judge(NamedTuple):
    endpoint: Endpoint
    rubric: str


def _open_judge(options: EvaluateOptions) -> _Judge | None:
    """Asks it once: what is wrong there is said before a model is loaded."""
    if options.judge is None:
        return None
    from jaxtune.evaluation.judge.client import open_endpoint
    from jaxtune.evaluation.judge.pairwise import check
    from jaxtune.evaluation.judge.verdict import rubric

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
    check(endpoint, text)
    return _Judge(endpoint, text)


def _judged(
    found: Mapping[str, Measured],
    questions: Sequence[Question],
    judge: _Judge,
    options: EvaluateOptions,
) -> Measured:
    """What was measured of tuned, with its win rate against base."""
    from jaxtune.evaluation.judge.pairwise import Pair
    from jaxtune.evaluation.judge.pairwise import judge as ask
    from jaxtune.evaluation.measured import with_verdicts

    note(f"judge: {judge.endpoint.model} compares {len(questions)} pairs of answers, twice each")
    sides = (found["base"].generations, found["tuned"].generations)
    pairs = [
        Pair(q.conversation, *map(q.spoken, (q.reference, base["response"], tuned["response"])))
        for q, base, tuned in zip(questions, *sides, strict=True)
    ]
    outcomes = ask(judge.endpoint, judge.rubric, pairs, concurrency=options.judge_concurrency)
    failed = [outcome.why for outcome in outcomes if outcome.why not in ("", "unparseable")]
    if failed:
        note(f"judge: {len(failed)} pairs have no verdict; the first: {failed[0]}")
    return with_verdicts(found["tuned"], outcomes, judge.endpoint.model)


def _benchmarks(names: Mapping[str, str], options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    if not options.harness:
        return {}
    from jaxtune.evaluation import harness

    folders = {column: harness.folder_of(name) for column, name in names.items()}
    return {
        column: harness.run(folder, options.harness, options.harness_args)
        for column, folder in folders.items()
    }


# -- the terminal --------------------------------------------------------------------------------


def _show(
    scores: Mapping[str, Mapping[str, Any]], questions: Sequence[Question], model: str
) -> None:
    from jaxtune.evaluation.text import answers_text, scores_text

    for number in range(0, len(questions), max(1, len(questions) // _SHOWN)):
        question = questions[number]
        rows = {column: part["generations"][number] for column, part in scores.items()}
        said = {
            column: (question.spoken(row["response"]), row["stopped"])
            for column, row in rows.items()
        }
        asked = " ".join(f"{m.content} {m.input}" for m in question.asked.messages[-1:])
        print(answers_text(asked, question.spoken(question.reference), said), end="\n\n")
    print(scores_text(scores))
    *_, tuned = scores.values()
    generated = f"; {len(questions):,} questions answered" if questions else ""
    print(
        f"\nover {tuned['examples']:,} examples with {tuned['eval_tokens_trained']:,} tokens of "
        f"answers{generated}\nmodel: {model}"
    )


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
