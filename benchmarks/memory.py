"""Memory and time of opening many rows: does it grow with their number?

    python benchmarks/memory.py --tokenizer FOLDER [--rows 1000000] [--processes 2]

Writes that many short rows to a file, prepares them into an empty cache, makes the report, plans an
epoch and fills some batches; then opens the warm cache in a fresh process. Peak memory is that of
the preparing process (its mapped cache pages included) and of its largest helper, as the system
counts resident pages.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write(file: Path, rows: int) -> None:
    with file.open("w") as stream:
        for number in range(rows):
            asked = f"How much is {number} plus {number % 977}, and is it even?"
            total = number + number % 977
            answer = f"It is {total}, which is {'odd' if total % 2 else 'even'}."
            stream.write(json.dumps({"prompt": asked, "completion": answer}) + "\n")


def prepare(file: Path, tokenizer_folder: str, processes: int, cache: Path, *, whole: bool) -> None:
    from jaxtune.config import DatasetConfig
    from jaxtune.data.dataset import Batches, open_dataset
    from jaxtune.data.preprocess import PreprocessConfig
    from jaxtune.data.report.data_report import report
    from jaxtune.data.templating.template import resolve
    from jaxtune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    template = resolve("alpaca", tokenizer)
    start = time.perf_counter()
    dataset = open_dataset(
        [DatasetConfig(path=str(file))],
        PreprocessConfig(tokenizer, template),
        cache_dir=cache,
        processes=processes,
    )
    line = f"{len(dataset):,} rows opened in {time.perf_counter() - start:.1f} s"
    if whole:
        start = time.perf_counter()
        batches = Batches(dataset, batch_size=8, seed=0)
        found = report(dataset, batches)
        line += f", {found['tokens_total']:,} tokens; report and packing {_since(start)}"
        start = time.perf_counter()
        for step in range(100):
            batches.batch(step)
        line += f"; 100 batches {_since(start)}"
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    helper = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{line}; peak {mib:,.0f} MiB here, {helper:,.0f} MiB in a helper", flush=True)


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # the fresh process's part
    options = parser.parse_args()
    if options.file is not None:
        cache = options.file.parent / "cache"
        prepare(options.file, options.tokenizer, options.processes, cache, whole=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write(file, options.rows)
        print(f"{file.stat().st_size / 1e6:,.0f} MB of JSON, {os.cpu_count()} cores", flush=True)
        cache = Path(folder) / "cache"
        prepare(file, options.tokenizer, options.processes, cache, whole=True)
        size = sum(part.stat().st_size for part in cache.rglob("*") if part.is_file())
        print(f"cache {size / 1e6:,.0f} MB; opened again:", flush=True)
        again = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--file", str(file)]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
