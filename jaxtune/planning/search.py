"""The fastest settings that fit: mesh x rows x what the backward pass recomputes x loss block.

The rows of a step, and with them what is learnt, stay those of the config: more rows at once means
fewer microbatches. Arithmetic leaves out what cannot fit and orders the rest; the compiler decides,
in processes beside each other, and every answer corrects the arithmetic of what is left. A setting
with more rows than one that did not fit is not tried, nor one expected to be slower than what is
known; the search ends when the time is up or nothing is left.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import Config, ConfigError, dump
from jaxtune.parallel import memory
from jaxtune.parallel.mesh import make_mesh
from jaxtune.planning import memory_model, time_model
from jaxtune.planning.advice import changed, flags_of
from jaxtune.planning.evaluate_config import PlannedRun, StepEstimate, evaluate_config
from jaxtune.planning.hardware import Hardware
from jaxtune.planning.memory_model import Work
from jaxtune.training import build

SLACK = 1.03  # arithmetic this far above the limit is not worth compiling
NEAR = 1.04  # nor what is this far above it once answers to its like have corrected it
PATIENCE = 1.12  # nor what is expected to take this much longer than the fastest so far
GRACE = 1.25  # of the time, for settings under way when it is up; none is begun then
SMALLEST_BLOCK = 4096  # entries of the vocabulary at a time; below, products are short
PROCESS_BYTES = 2 * 2**30  # of one that compiles: 1.2 to 1.5 GB measured


class Candidate(NamedTuple):
    """Settings, as flags, with `needed` bytes of a device and `seconds` a step, by arithmetic.

    Candidates of a `family` differ in rows alone.
    """

    settings: str
    fields: Mapping[str, Any]
    needed: int
    seconds: float
    tokens: int  # of a step
    rows: int
    family: tuple[Any, ...]


def candidates(config: Config, run: PlannedRun, hardware: Hardware) -> list[Candidate]:
    """Everything that may fit, by arithmetic, fastest first."""
    whole = build.rows_per_step(config, make_mesh(config.mesh.model_dump(), hardware.devices))
    spec = run.model.spec
    heads = math.gcd(*(layer.kv_heads for layer in spec.layers))
    fitting: list[Candidate] = []
    for mesh in meshes(hardware, heads=heads, experts=spec.experts):
        try:
            alone = {"per_device_train_batch_size": 1, "global_batch_size": whole}
            base = evaluate_config(changed(config, **mesh, **alone), run, hardware, compiles=False)
        except ConfigError:  # rows that do not divide, or a mesh this version does not train
            continue
        fitting += [
            candidate
            for candidate in _of_mesh(base, mesh, whole)
            if hardware.limit is None or candidate.needed <= SLACK * hardware.limit
        ]
    return sorted(fitting, key=lambda candidate: (candidate.seconds, candidate.needed))


def meshes(hardware: Hardware, *, heads: int, experts: int = 0) -> Iterator[dict[str, int]]:
    """Yield every mesh of data, fsdp, tensor and context, and of expert where there are experts.

    Heads divide over tensor, experts over expert; slices are joined along data.
    """
    count = len(hardware.devices)
    for data in _divisors(count):
        for tensor in _divisors(count // data):
            for context in _divisors(count // data // tensor):
                if data % hardware.slice.slices or heads % tensor or context > 8:
                    continue
                left = count // data // tensor // context
                for expert in _divisors(math.gcd(left, experts) if experts else 1):
                    sizes = {"mesh.data": data, "mesh.fsdp": left // expert}
                    alone = {"mesh.expert": expert} if experts else {}
                    yield {**sizes, **alone, "mesh.tensor": tensor, "mesh.context": context}


def _of_mesh(base: StepEstimate, mesh: Mapping[str, int], whole: int) -> Iterator[Candidate]:
    shards = base.work.row_shards
    for rows in _divisors(whole // shards):
        for remat in remat_names():
            work = base.work._replace(rows=rows, remat=remat, microbatches=whole // shards // rows)
            fields = {
                **mesh,
                "per_device_train_batch_size": rows,
                "global_batch_size": whole,
                "gradient_checkpointing": remat,
            }
            if (block := _smaller_block(work, base)) is not None:
                work, fields = work._replace(block=block), {**fields, "loss_block": block}
            needed = sum(memory_model.memory(work, base.held, base.hardware.limit).values())
            family = (*mesh.values(), work.block, remat)
            seconds = _seconds(work, base)
            yield Candidate(
                flags_of(fields), fields, needed, seconds, work.tokens_per_step, rows, family
            )


def _smaller_block(work: Work, base: StepEstimate) -> int | None:
    """A block of the vocabulary for the loss with which it fits, where the loss is what does not;
    None where it fits as it is, or does not for other reasons."""
    limit, block = base.limit, memory_model.loss_plan(work).block * work.sizes["tensor"]
    if limit is None or sum(memory_model.memory(work, base.held, limit).values()) <= limit:
        return None
    while block > SMALLEST_BLOCK:
        block = -(-block // 2)
        smaller = work._replace(block=block)
        if sum(memory_model.memory(smaller, base.held, limit).values()) <= limit:
            return block
    return None


def _seconds(work: Work, base: StepEstimate) -> float:
    hardware = base.hardware
    return time_model.of_estimate(work, base.held, hardware.slice, hardware.per_chip).step


def remat_names() -> tuple[str, ...]:
    """The policies that this version has and arithmetic knows."""
    return typing.get_args(Config.model_fields["gradient_checkpointing"].annotation)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# -- compiled, several at a time -----------------------------------------------------------------


class Progress(NamedTuple):
    """A search's progress: settings compiled, their total, and the fastest that fits so far.

    `best` is its object of `plan --json`.
    """

    done: int
    total: int
    best: Mapping[str, Any] | None = None
    settings: str = ""


def compile_all(
    ranked: Sequence[Candidate],
    config: Config,
    run: PlannedRun,
    hardware: Hardware,
    *,
    minutes: float,
    advance: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[Candidate, dict[str, Any]]]:
    """(candidate, the object of `plan --json`) as they come, until the time is up or nothing is
    left that might be faster.

    Each is a `plan` of its own in a process of its own, which keeps and reuses answers on disk. One
    that fails is noted and left out; `ConfigError` where all that were tried did.
    """
    answers = Answers(hardware.limit and hardware.limit * hardware.per_chip, hardware.per_chip)
    left, running = list(ranked), dict[subprocess.Popen[str], Candidate]()
    topology = hardware.slice.name
    began, failed, started = time.monotonic(), "", 0
    ends, last = began + 60 * minutes, began + 60 * GRACE * minutes
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        while (now := time.monotonic()) < (last if running else ends):
            left = [candidate for candidate in left if answers.hopeful(candidate) and now < ends]
            while left and len(running) < workers():
                candidate = min(left, key=answers.expected)
                left.remove(candidate)
                process = _start(candidate, config, run, topology, Path(folder), started)
                closing.callback(_stop, process)
                running[process], started = candidate, started + 1
            for process in [each for each in running if each.poll() is not None]:
                candidate = running.pop(process)
                plan, problem = _answer(process)
                if plan is None:
                    failed = f"search: {candidate.settings}: {problem}"
                    note(failed)
                    continue
                answers.add(candidate, plan)
                yield candidate, plan
            advance(answers.progress(len(left) + len(running)))
            if not running and not left:
                break
            time.sleep(0.2)
    if failed and not answers.known:
        raise ConfigError(failed)


class Answers:
    """A record of the compiler's answers, which corrects the arithmetic of what is left."""

    def __init__(self, limit: int | None, per_chip: int) -> None:
        self.limit, self.per_chip = limit, per_chip
        self.known: list[tuple[Candidate, Mapping[str, Any]]] = []

    def add(self, candidate: Candidate, plan: Mapping[str, Any]) -> None:
        self.known.append((candidate, plan))

    def best(self) -> tuple[Candidate, Mapping[str, Any]] | None:
        fitting = [each for each in self.known if each[1]["fits"]]
        return min(fitting, key=lambda each: each[1]["step_seconds"], default=None)

    def expected(self, candidate: Candidate) -> float:
        """Seconds of a step: the arithmetic, off by as much as it was for the nearest answers."""
        pairs = [
            (plan["step_seconds"] / other.seconds, other)
            for other, plan in self.known
            if plan["fits"]
        ]
        return candidate.seconds * _ratio(candidate, pairs)

    def hopeful(self, candidate: Candidate) -> bool:
        """Test if it may fit and may be faster than the fastest known."""
        alike = [each for each in self.known if each[0].family == candidate.family]
        if any(not plan["fits"] and candidate.rows >= other.rows for other, plan in alike):
            return False
        best = self.best()
        if best and self.expected(candidate) > PATIENCE * best[1]["step_seconds"]:
            return False
        pairs = [
            (plan["hbm_bytes"] / (other.needed * self.per_chip), other) for other, plan in alike
        ]
        if not pairs or self.limit is None:
            return True
        return candidate.needed * self.per_chip * _ratio(candidate, pairs) <= NEAR * self.limit

    def progress(self, waiting: int) -> Progress:
        done, best = len(self.known), self.best()
        if best is None:
            return Progress(done, done + waiting)
        return Progress(done, done + waiting, best[1], best[0].settings)


def _ratio(candidate: Candidate, known: Sequence[tuple[float, Candidate]]) -> float:
    """The mean of those of the same family, else of the same policy; 1 of none, so that every
    policy has its chance."""
    *_, remat = candidate.family
    alike = [ratio for ratio, other in known if other.family == candidate.family]
    alike = alike or [ratio for ratio, other in known if other.family[-1] == remat]
    return sum(alike) / len(alike) if alike else 1.0


def workers() -> int:
    """Count the compilers that this machine can run beside each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = memory.available_bytes()
    return 1 if free is None else max(1, min(cores or 1, free // PROCESS_BYTES))


def _start(
    candidate: Candidate,
    config: Config,
    run: PlannedRun,
    topology: str,
    folder: Path,
    number: int,
) -> subprocess.Popen[str]:
    bare = {
        "datasets": [], "eval_datasets": [], "eval_split": 0.0, "add_tokens": False,
        "max_length": run.length, "max_steps": run.steps or -1,
        "model_name_or_path": str(run.model.folder),
    }  # fmt: skip
    file = folder / f"{number}.yaml"
    file.write_text(dump(changed(config, **bare, **candidate.fields)), encoding="utf-8")
    command = (sys.executable, "-m", "jaxtune.plan", "--config", str(file), "--topology", topology)
    with open(folder / f"{number}.json", "w") as out, open(folder / f"{number}.log", "w") as log:
        return subprocess.Popen([*command, "--json"], stdout=out, stderr=log, text=True)


def _answer(process: subprocess.Popen[str]) -> tuple[dict[str, Any] | None, str]:
    """The object of `plan --json`, or None and the last line of its log."""
    args = typing.cast(list[str], process.args)
    file = Path(args[args.index("--config") + 1])
    if process.returncode:
        log = file.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        return None, next(reversed(log.strip().splitlines()), f"exit {process.returncode}")
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8")), ""


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def estimate_candidate(candidate: Candidate, hardware: Hardware) -> dict[str, Any]:
    """Of `plan --json` what a choice needs, by arithmetic."""
    return {
        "fits": hardware.limit is None or candidate.needed <= hardware.limit,
        "hbm_bytes": candidate.needed * hardware.per_chip,
        "tokens_per_second_per_chip": candidate.tokens / candidate.seconds / hardware.slice.chips,
        "method": "arithmetic",
    }


# -- the choice ----------------------------------------------------------------------------------


def frontier(plans: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Keep the plans that fit and that no other beats in memory and speed, fastest first."""
    fitting = [plan for plan in plans if plan["fits"] and plan["tokens_per_second_per_chip"]]
    fastest = sorted(
        fitting, key=lambda plan: (-plan["tokens_per_second_per_chip"], plan["hbm_bytes"])
    )
    best: list[Mapping[str, Any]] = []
    for plan in fastest:
        if not best or plan["hbm_bytes"] < best[-1]["hbm_bytes"]:
            best.append(plan)
    return best
