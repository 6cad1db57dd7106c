"""Preparing data, jaxtune and TRL side by side: tokens a second from text to packed rows.

    python benchmarks/data.py FILE --tokenizer FOLDER [--processes 2] [--rows 20000] [--repeat 3]

FILE holds Alpaca rows (instruction, input, output). They are written out twice, as `messages` and
as `prompt`/`completion`, repeated to `--rows` rows that all differ. Both sides start from those
rows, with the same tokenizer, chat template (`{% generation %}` included, for TRL's assistant
masks), `max_length` 2048 and number of processes. Timed is

- jaxtune: reading the file, rendering, tokenising, masks, checks, duplicates, writing the cache,
  packing and filling every row of the first epoch; then opening the warm cache;
- TRL: `SFTTrainer._prepare_dataset` (render, tokenise, masks, labels, packing); loading the file
  into Arrow is not counted.

The sides take turns; each figure is the best of `--repeat`. Run it where both are installed
(`pip install jaxtune trl`); without TRL its rows are left out and that is said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAX_LENGTH = 2048
TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
### Instruction:
{{ message['content'] }}

### Response:
{% else -%}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}"""


class Timed(NamedTuple):
    seconds: float
    cpu_seconds: float  # of this process and its helpers: what a busy machine leaves alone
    tokens: int
    trained: int
    packed: int  # rows


def cpu_seconds() -> float:
    """Of this process and of all helpers that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def rows_of(file: Path, count: int) -> Iterator[tuple[str, str]]:
    """(question, answer), `count` of them; a number before each question keeps them different."""
    records = json.loads(file.read_text(encoding="utf-8"))
    for number, record in enumerate(itertools.islice(itertools.cycle(records), count)):
        asked = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        yield f"({number}) {asked}", record["output"]


def write(folder: Path, file: Path, count: int) -> dict[str, Path]:
    places = {name: folder / f"{name}.jsonl" for name in ("messages", "prompt_completion")}
    with places["messages"].open("w") as chats, places["prompt_completion"].open("w") as pairs:
        for asked, answer in rows_of(file, count):
            turns = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
            chats.write(json.dumps({"messages": turns}) + "\n")
            pairs.write(json.dumps({"prompt": asked + "\n", "completion": answer}) + "\n")
    return places


def with_jaxtune(
    name: str, file: Path, tokenizer_folder: str, processes: int, cache: Path
) -> Timed:
    from jaxtune.config import DatasetConfig
    from jaxtune.data.dataset import Batches, open_dataset
    from jaxtune.data.preprocess import PreprocessConfig
    from jaxtune.data.templating.template import resolve
    from jaxtune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    template = TEMPLATE if name == "messages" else "{instruction}\n{output}"
    start, cpu = time.perf_counter(), cpu_seconds()
    dataset = open_dataset(
        [DatasetConfig(path=str(file))],
        PreprocessConfig(tokenizer, resolve(template, tokenizer), max_length=MAX_LENGTH),
        cache_dir=cache,
        processes=processes,
    )
    batches = Batches(dataset, batch_size=8, seed=0)
    for step in range(batches.steps_per_epoch):
        batches.batch(step)
    seconds = time.perf_counter() - start
    totals = int(dataset.token_counts.sum()), int(dataset.trained_counts.sum())
    return Timed(seconds, cpu_seconds() - cpu, *totals, batches.rows)


def warm(file: Path, tokenizer_folder: str, cache: Path) -> float:
    """Seconds to open what is in the cache, the file's digest included."""
    from jaxtune.config import DatasetConfig
    from jaxtune.data.dataset import open_dataset
    from jaxtune.data.preprocess import PreprocessConfig
    from jaxtune.data.templating.template import resolve
    from jaxtune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    template = resolve(TEMPLATE, tokenizer)
    start = time.perf_counter()
    entries = [DatasetConfig(path=str(file))]
    dataset = open_dataset(
        entries, PreprocessConfig(tokenizer, template, max_length=MAX_LENGTH), cache_dir=cache
    )
    assert len(dataset)
    return time.perf_counter() - start


def trl_preparation(tokenizer_folder: str, processes: int) -> Callable[[str, Path], Timed]:
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tiny = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(tiny)

    class Clocked(SFTTrainer):
        seconds, cpu = 0.0, 0.0

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start, cpu = time.perf_counter(), cpu_seconds()
            prepared = super()._prepare_dataset(*args, **kwargs)
            self.seconds, self.cpu = time.perf_counter() - start, cpu_seconds() - cpu
            return prepared

    def timed(name: str, file: Path) -> Timed:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=out)
            chat = name == "messages"
            arguments = SFTConfig(
                output_dir=out, max_length=MAX_LENGTH, packing=True, dataset_num_proc=processes,
                assistant_only_loss=chat, report_to="none", use_cpu=True, bf16=False,
            )  # fmt: skip
            trainer = Clocked(
                model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
            )
            table = trainer.train_dataset.data
            ids, labels = table.column("input_ids"), table.column("labels")
            tokens = sum(len(chunk.flatten()) for chunk in ids.chunks)
            trained = sum(int((c.flatten().to_numpy() != -100).sum()) for c in labels.chunks)
            return Timed(trainer.seconds, trainer.cpu, tokens, trained, len(ids))

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    trl = None
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed here (pip install trl): only jaxtune is timed.")
    else:
        trl = trl_preparation(options.tokenizer, options.processes)
    found: dict[tuple[str, str], list[Timed]] = {}
    opening: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), options.file, options.rows)
        for turn, (name, file) in itertools.product(range(options.repeat), files.items()):
            cache = Path(folder) / f"cache{turn}"
            ours = with_jaxtune(name, file, options.tokenizer, options.processes, cache)
            found.setdefault((name, "jaxtune"), []).append(ours)
            if name == "messages":
                opening.append(warm(file, options.tokenizer, cache))
            if trl is not None:
                found.setdefault((name, "TRL"), []).append(trl(name, file))

    machine = f"{os.cpu_count()} cores {platform.machine()}"
    work = f"{options.rows:,} rows, {options.processes} processes, best of {options.repeat}"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {work}\n")
    print("| data | tool | tokens | trained | packed rows | seconds | tokens/s | CPU seconds |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for (name, tool), runs in found.items():
        best, cpu = min(runs), min(run.cpu_seconds for run in runs)
        print(
            f"| {name} | {tool} | {best.tokens:,} | {best.trained:,} | {best.packed:,} | "
            f"{best.seconds:.1f} | {best.tokens / best.seconds:,.0f} | {cpu:.1f} |"
        )
    for name in files if trl is not None else ():
        ours, theirs = found[name, "jaxtune"], found[name, "TRL"]
        wall = min(theirs).seconds / min(ours).seconds
        cpu = min(run.cpu_seconds for run in theirs) / min(run.cpu_seconds for run in ours)
        print(f"\n{name}: TRL takes {wall:.1f} times as long, and {cpu:.1f} times the CPU time")
    print(f"\nopening the warm cache of `messages`: {min(opening):.2f} s")


if __name__ == "__main__":
    main()
