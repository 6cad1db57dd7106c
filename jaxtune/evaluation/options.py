"""The options of an evaluation: flags of the command, keyword arguments of `jaxtune.evaluate`."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from jaxtune import cli


class EvaluateOptions(cli.Options):
    """A choice of what to measure, and with whom beside the model."""

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
    few_shot: int = Field(
        0,
        ge=0,
        description="examples of the training data before each question, drawn by the seed: also "
        "measures the base (without one the model) with them, and the difference to that",
    )
    label: str | None = Field(
        None,
        description="regex whose first match (or first group) is an answer's label, e.g. "
        "'^(Yes|No)': adds label accuracy, the share of answers with the label of the reference",
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

    @field_validator("label")
    @classmethod
    def _regex(cls, label: str | None) -> str | None:
        try:
            re.compile(label or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return label
