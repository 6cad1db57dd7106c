"""Pairs of answers judged in both orders, so that a judge who likes the first one decides nothing.

order 1   A = base    B = tuned        VERDICT: B      tuned
order 2   A = tuned   B = base         VERDICT: A      tuned      -> win
                                       VERDICT: B      base       -> tie, inconsistent
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import NamedTuple

from jaxtune.config import ConfigError
from jaxtune.evaluation.judge.client import Endpoint, RequestFailed, ask
from jaxtune.evaluation.judge.verdict import Verdict, filled, parse


class Pair(NamedTuple):
    question: str
    reference: str
    base: str
    tuned: str


class Outcome(NamedTuple):
    """A verdict on one pair: `points` of tuned, 1 for a win, 0.5 for a tie, 0 for a loss.

    `points` is None without a verdict; `why` is then "unparseable" or what went wrong. `agreed`:
    both orders gave the same verdict.
    """

    points: float | None
    agreed: bool = True
    why: str = ""


def check(endpoint: Endpoint, rubric: str) -> None:
    """Send one request before any work is done. Raises `ConfigError` where it is refused or
    fails."""
    try:
        ask(endpoint, _prompt(rubric, Pair("What is 1 + 1?", "2", "2", "3")))
    except RequestFailed as error:
        raise ConfigError(
            f"judge: {error}. Nothing was evaluated. Mend judge, judge_model or the key, or leave "
            "judge out."
        ) from None


def judge(
    endpoint: Endpoint, rubric: str, pairs: Sequence[Pair], *, concurrency: int
) -> list[Outcome]:
    """Judge the pairs in order, `concurrency` requests at a time.

    Raises nothing: the verdicts so far are worth more than one request that failed. When
    interrupted it sends nothing more.
    """
    prompts = [
        _prompt(rubric, order)
        for pair in pairs
        for order in (pair, pair._replace(base=pair.tuned, tuned=pair.base))
    ]
    same = [pair.base.strip() == pair.tuned.strip() for pair in pairs]
    pool = concurrent.futures.ThreadPoolExecutor(concurrency)
    try:
        futures = [
            None if same[number // 2] else pool.submit(_verdict, endpoint, prompt)
            for number, prompt in enumerate(prompts)
        ]
        verdicts = [None if future is None else future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [
        Outcome(0.5) if same[i] else outcome(verdicts[2 * i], verdicts[2 * i + 1])
        for i in range(len(pairs))
    ]


def outcome(
    first: Verdict | RequestFailed | None, swapped: Verdict | RequestFailed | None
) -> Outcome:
    """Combine two verdicts: `first` with base as A, `swapped` with tuned as A."""
    for verdict in (first, swapped):
        if isinstance(verdict, RequestFailed):
            return Outcome(None, why=str(verdict))
    if first is None or swapped is None:
        return Outcome(None, why="unparseable")
    points = {"A": 0.0, "B": 1.0, "TIE": 0.5}[str(first)]
    again = {"A": 1.0, "B": 0.0, "TIE": 0.5}[str(swapped)]
    return Outcome(points) if points == again else Outcome(0.5, agreed=False)


def _verdict(endpoint: Endpoint, prompt: str) -> Verdict | RequestFailed | None:
    try:
        return parse(ask(endpoint, prompt))
    except RequestFailed as error:
        return error


def _prompt(rubric: str, pair: Pair) -> str:
    return filled(
        rubric,
        question=pair.question,
        reference=pair.reference,
        answer_a=pair.base,
        answer_b=pair.tuned,
    )
