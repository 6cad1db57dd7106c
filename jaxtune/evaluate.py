"""How good a model is on a data set: loss, perplexity, token accuracy, and its answers.

    python -m jaxtune.evaluate --model_name_or_path DIR --dataset FILE [--generate N] [--base DIR]

Evaluates on `--dataset`, else on the config's eval_datasets, its eval_split, or its datasets.
`--generate N` answers the first N questions of each data set greedily and compares with the
answers there; `--base` does everything with a second model and puts both side by side.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import command, hosts, watch
from jaxtune.command import note
from jaxtune.config import Config, ConfigError, DataError, DatasetConfig

if TYPE_CHECKING:
    from jaxtune.data.pipeline import Dataset
    from jaxtune.data.schema import Conversation
    from jaxtune.inference import Model, Words

_SHOWN = 5  # questions, spread over all


class EvaluateOptions(command.Options):
    dataset: str | None = Field(
        None, description="what to evaluate on; overrules the data of the config"
    )
    generate: int = Field(
        0, ge=0, description="answers to generate for each data set; adds exact match, ROUGE-L"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer, in tokens")
    base: str | None = Field(None, description="a second model, put beside the first")
    as_json: bool = Field(False, alias="json", description="one object on stdout")


class Result(NamedTuple):
    """What `--json` prints: the scores of the model, under "base" those of the base."""

    scores: Mapping[str, Any]


class Question(NamedTuple):
    """What inference is asked, and the answer that the data has for it."""

    dataset: str
    words: Words  # with the data set's own template where it has one
    asked: Conversation
    reference: str


def run(config: Config, options: EvaluateOptions | None = None) -> Result:
    """Prints to stdout. Raises `ConfigError`, `DataError` and `ModelError`."""
    options = options or EvaluateOptions()
    watch.join(config.hosts)
    if options.generate and hosts.count() > 1:
        raise ConfigError("generate: answers are made on one host. Evaluate there, or without it.")
    with watch.Watch(hang_seconds=0):
        return _run(config, options)


def _run(config: Config, options: EvaluateOptions) -> Result:
    # 1. What both models are asked.
    from jaxtune.inference import check_base, load_model, open_mesh, open_words, resolved
    from jaxtune.weights import fetched

    config = resolved(config)
    if options.base is not None and "/checkpoints/" in options.base:
        options = options.model_copy(update={"base": fetched(options.base)})
    words = open_words(config)
    if options.base is not None:
        check_base(options.base, words)
    entries = _entries(config, options)
    dataset = _open_data(config, entries, words)
    questions = _questions(entries, dataset, words, options.generate)
    note(f"evaluation: {len(dataset)} examples of {', '.join(dict.fromkeys(dataset.names))}")

    # 2. One model after the other, so that only one is in memory.
    assert config.model_name_or_path is not None
    names = {"tuned" if options.base else "model": config.model_name_or_path}
    if options.base is not None:
        names = {"base": options.base, **names}
    mesh = open_mesh(config)
    scores = {
        column: _score(
            load_model(name, config, words, mesh), words, config, dataset, questions, options
        )
        for column, name in names.items()
    }

    # 3. The answer.
    *base, result = scores.values()
    if base:
        result["base"] = base[0]
    if not hosts.is_first():
        return Result(result)
    if options.as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        _show(scores, questions, config.model_name_or_path)
    return Result(result)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return command.execute("evaluate", description, EvaluateOptions, run, argv)


def compare(references: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """`exact_match`, blanks at the ends aside, and `rougeL`, both means over answers.

    ROUGE-L is the f-measure of the rouge-score package without stemming. It sees Latin letters and
    digits only: answers in other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = list(zip(references, responses, strict=True))
    equal = sum(reference.strip() == response.strip() for reference, response in pairs)
    overlap = math.fsum(scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs)
    return {"exact_match": equal / len(pairs), "rougeL": overlap / len(pairs)}


# -- the data ------------------------------------------------------------------------------------


def _entries(config: Config, options: EvaluateOptions) -> Sequence[DatasetConfig]:
    if options.dataset is not None:
        return (DatasetConfig(path=options.dataset),)
    entries = config.eval_datasets or config.datasets
    if not entries:
        raise ConfigError("dataset is not set. Give --dataset FILE, or a --config that has data.")
    return entries


def _open_data(config: Config, entries: Sequence[DatasetConfig], words: Words) -> Dataset:
    from jaxtune.data.asked import open_entries
    from jaxtune.data.pipeline import split
    from jaxtune.draw.progress import Tokenising

    with Tokenising() as progress:
        dataset = open_entries(config, entries, words.tokenizer, words.template, progress=progress)
    if entries is config.datasets and config.eval_split:
        _, dataset = split(dataset, config.eval_split, seed=config.seed)
    for source in dataset.sources:
        for reason, dropped in source.stored.summary["dropped"].items():
            note(f"{source.path}: {dropped['count']} rows left out: {reason}")
    return dataset


def _questions(
    entries: Sequence[DatasetConfig], dataset: Dataset, words: Words, limit: int
) -> tuple[Question, ...]:
    """The first `limit` conversations of each entry that are among the examples of `dataset`."""
    if not limit:
        return ()
    rows = dataset.gather("rows")
    found = [
        question
        for number, entry in enumerate(entries)
        for question in itertools.islice(
            _conversations(entry, set(rows[dataset.source_of == number].tolist()), words), limit
        )
    ]
    if not found:
        raise DataError(
            f"{entries[0].path}: has no question to answer: its rows are plain text. Set generate "
            "0, or give conversations."
        )
    return tuple(found)


def _conversations(entry: DatasetConfig, rows: set[int], words: Words) -> Iterator[Question]:
    from jaxtune.data.formats import to_noun
    from jaxtune.data.prepare import dataset_name, format_of, read
    from jaxtune.data.schema import Conversation
    from jaxtune.data.template import variant

    own = variant(
        words.template, words.tokenizer, template=entry.template, system_prompt=entry.system_prompt
    )
    format_name = format_of(entry)
    for row, record in read(entry):
        if row not in rows:
            continue
        noun = to_noun(format_name, record.fields, entry.columns, record.where)
        if isinstance(noun, Conversation):
            last = max(i for i, m in enumerate(noun.messages) if m.role == "assistant")
            asked, reference = noun._replace(messages=noun.messages[:last]), noun.messages[last]
            if reference.content.strip():  # not a tool call alone: there is no text to compare
                words_here = words._replace(template=own)
                yield Question(dataset_name(entry), words_here, asked, reference.content)


# -- the scores ----------------------------------------------------------------------------------


def _score(
    model: Model,
    words: Words,
    config: Config,
    dataset: Dataset,
    questions: Sequence[Question],
    options: EvaluateOptions,
) -> dict[str, Any]:
    """One model's part of the JSON object."""
    from jaxtune.data.position import largest_id
    from jaxtune.weights import check_ids

    check_ids(largest_id(dataset), model.name, model.spec, words.tokenizer)
    scores = _losses(model, config, dataset)
    if questions:
        note(f"{model.name}: answering {len(questions)} questions")
        scores |= _answers(model, words, questions, options.max_new_tokens)
    return scores


def _losses(model: Model, config: Config, dataset: Dataset) -> dict[str, Any]:
    import jax

    from jaxtune.data.pipeline import eval_batches
    from jaxtune.learn.evaluation import Totals, evaluate
    from jaxtune.learn.program import build_eval
    from jaxtune.mesh import row_shards

    step = build_eval(model.spec, model.mesh, dtype=model.dtype)
    rows = config.per_device_eval_batch_size * row_shards(model.mesh)
    total, by_dataset = Totals(), {}
    with jax.set_mesh(model.mesh):
        for name in dict.fromkeys(dataset.names):
            part = dataset.only(name)
            batches = eval_batches(part, rows, packing=config.packing)
            sums = evaluate(step, {}, {"params": model.params}, batches, mesh=model.mesh)
            total += sums
            by_dataset[name] = {**_finite(sums.row()), "examples": len(part)}
    return {**_finite(total.row()), "examples": len(dataset), "by_dataset": by_dataset}


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity and no NaN: they are null."""
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def _answers(
    model: Model, words: Words, questions: Sequence[Question], max_new_tokens: int
) -> dict[str, Any]:
    from jaxtune.inference import answer, prompt_ids

    prompts = [prompt_ids(model, question.words, question.asked) for question in questions]
    answers = answer(model, words, prompts, max_new_tokens=max_new_tokens)
    references = [question.reference for question in questions]
    generations = [
        {
            "dataset": question.dataset,
            "prompt": _prompt_text(question),
            "reference": question.reference,
            "response": found.text,
            "stopped": found.stopped,
        }
        for question, found in zip(questions, answers, strict=True)
    ]
    return {
        **compare(references, [found.text for found in answers]),
        "stop_rate": sum(found.stopped for found in answers) / len(answers),
        "generations": generations,
    }


def _prompt_text(question: Question) -> str:
    from jaxtune.data.spans import render_prompt

    asked = question.asked
    spans = render_prompt(question.words.template, asked.messages, tools=asked.tools)
    return "".join(span.text for span in spans)


# -- the terminal --------------------------------------------------------------------------------


def _show(
    scores: Mapping[str, Mapping[str, Any]], questions: Sequence[Question], model: str
) -> None:
    from jaxtune.draw.scores import answers_text, scores_text

    for number in range(0, len(questions), max(1, len(questions) // _SHOWN)):
        question = questions[number]
        rows = {column: part["generations"][number] for column, part in scores.items()}
        said = {column: (row["response"], row["stopped"]) for column, row in rows.items()}
        asked = " ".join(f"{m.content} {m.input}" for m in question.asked.messages[-1:])
        print(answers_text(asked, question.reference, said), end="\n\n")
    print(scores_text(scores))
    *_, tuned = scores.values()
    generated = f"; {len(questions):,} questions answered" if questions else ""
    print(
        f"\nover {tuned['examples']:,} examples with {tuned['eval_tokens_trained']:,} tokens of "
        f"answers{generated}\nmodel: {model}"
    )


if __name__ == "__main__":
    sys.exit(main())
