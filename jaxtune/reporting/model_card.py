"""The model card of an export: its base, its data, its result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from jaxtune import __version__
from jaxtune.config import Config
from jaxtune.evaluation.tables import LEGEND, Sheet, judge_lines, sheets_of
from jaxtune.terminal.text import lost_lines

_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def model_card(
    *,
    base: str,
    random_start: bool,
    template: str,
    template_kwargs: Mapping[str, Any],
    trained: str,
    metrics: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Any],
    config: str,
) -> str:
    """Write Markdown with the YAML header that the Hugging Face hub reads.

    `template_kwargs` are the run's arguments of the template; `trained` is of `trained_text`;
    `metrics` holds the last "train" and "eval" rows; `data` is the data report; `config` the
    resolved config as YAML, which repeats the run.
    """
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxtune", "sft"],
    }
    if not random_start and not PurePath(base).is_absolute() and base.count("/") == 1:
        header["base_model"] = base
    kwargs = json.dumps(template_kwargs, ensure_ascii=False)
    saved = "saved as `chat_template.jinja`"
    if template_kwargs:
        saved += f", with {_code(kwargs)} as `chat_template_kwargs`"
    start = "random weights of the architecture" if random_start else "the weights"
    rows = "\n".join(
        f"| {name} | {value:.6g} |"
        for kind in ("train", "eval")
        for name, value in metrics.get(kind, {}).items()
        if isinstance(value, int | float) and name != "step"
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {_plain(PurePath(base).name)}, instruction-tuned

Trained with [jaxtune](https://pypi.org/project/jaxtune/) {__version__} from {start} of
{_code(base)}, with the prompt template {_code(template)} ({saved}).
The loss {trained}.

## Result

| | |
|---|---|
{rows}

## Data

{_lost(data)}{_fenced("json", json.dumps(data, indent=1, ensure_ascii=False))}

## Config

{_fenced("yaml", config.strip())}
"""


def _lost(data: Mapping[str, Any]) -> str:
    """Say which share of each dataset is not trained, and why."""
    evaluated = (data.get("evaluation") or {}).get("by_dataset", {})
    lines = [*lost_lines(data.get("by_dataset", {})), *lost_lines(evaluated, "evaluation dataset")]
    return "".join(f"- {_plain(line)}\n" for line in lines) + "\n" * bool(lines)


def trained_text(config: Config) -> str:
    """Say of which tokens the loss was, and of which kind, as the end of a sentence."""
    answers = {
        "all": "every token",
        "last": "the last answer of each conversation, its end of turn included",
        "assistant": "the answers only, their end of turn included",
    }[config.train_on]
    if config.prompt_loss_weight:
        answers = answers.replace(" only", "")
        answers += f", and on prompts with a weight of {config.prompt_loss_weight:g}"
    kind = "" if config.loss_type == "nll" else f" ({config.loss_type})"
    return f"was taken on {answers}{kind}"


def with_evaluation(card: str, evaluation: Mapping[str, Any]) -> str:
    """Put an evaluation into a card, in place of an earlier one.

    It stands before the data, or last where the card has no such heading.
    """
    parts = [_markdown(sheet) for sheet in sheets_of(evaluation)]
    parts += [_plain(line) for line in judge_lines(evaluation)]
    parts += [LEGEND] * ("difference" in evaluation)
    section = "\n\n".join([_BEGIN, "## Evaluation", *parts, _END])
    before, begin, rest = card.partition(_BEGIN)
    if begin and _END in rest:
        return before + section + rest.partition(_END)[2]
    before, heading, rest = card.partition("\n## Data\n")
    if heading:
        return f"{before}\n{section}\n{heading}{rest}"
    return f"{card.rstrip()}\n\n{section}\n"


def _markdown(sheet: Sheet) -> str:
    words = len(sheet.header) - 1 - sheet.numbers
    head, *rows = (map(_plain, row) for row in ((sheet.caption, *sheet.header[1:]), *sheet.rows))
    rule = ["---", *["---:"] * sheet.numbers, *["---"] * words]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def _plain(text: str) -> str:
    """Escape text for Markdown, on one line: names come from paths, hubs and users."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!&~$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Make a code span, which ends only where more backticks stand than anywhere in the text."""
    ticks = "`" * (_longest_run(text) + 1)
    text = " ".join(text.split())
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _fenced(language: str, text: str) -> str:
    """Make a block that no line of the text can close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
