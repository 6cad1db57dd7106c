"""Spoilt configs, data, tokenizers, models, adapters, checkpoints and run directories.

    python tests/faults/fuzz.py --inputs 10000

Each input is a valid one, spoilt by `mutations` from a seed of its own. Whatever reads it must
succeed or raise an error of exit 2, within a time limit, and write nothing outside its folder; an
audit hook listens. What else happens is a finding: it is printed, and `--only KIND --first N
--inputs 1` goes there again. At the end some inputs go through real processes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROOT = Path(__file__).resolve().parents[2]

from faults import mutations as m  # noqa: E402

SECONDS = 30  # that an input may take; the machine may be busy
ROWS = [
    {"instruction": f"Where is {i}?", "input": "", "output": f"In Rome {i}."} for i in range(6)
] + [{"instruction": "Say é.", "input": "now", "output": "é 💥\n"}]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Where is {i}?"},
            {"role": "assistant", "content": "In Rome.", "weight": 1},
        ]
    }
    for i in range(4)
]
CONFIG = {
    "model_name_or_path": "m", "dataset": "d.jsonl", "output_dir": "o", "learning_rate": 1e-4,
    "max_length": 64, "template": "chatml", "lora": {"r": 4, "targets": ["q_proj"]}, "seed": 3,
    "mesh": {"fsdp": -1}, "report_to": [], "warmup_steps": 0.1, "save_steps": 5, "eval_split": 0.1,
    "packing": True, "optim": "adamw", "system_prompt": None, "sample_prompts": ["Hi"],
    "max_steps": 10, "lr_scheduler_type": "cosine", "dtype": "auto", "add_tokens": False,
}  # fmt: skip
DATASETS = [
    {"path": "d.jsonl", "weight": 2, "columns": {"output": "answer"}, "limit": 5},
    {"path": "e.csv", "proportions": {"column": "c", "target": {"a": 0.5, "b": 0.5}}},
]


class Kind(NamedTuple):
    """`share` of all inputs. `spoil(good, folder, dice)` makes the input in `folder` from the good
    material; `read(folder, good, dice)` is what must answer."""

    share: int
    spoil: Callable[[Path, Path, random.Random], None]
    read: Callable[[Path, Path, random.Random], object]


# -- what is good ----------------------------------------------------------------------------------


def make_good(folder: Path) -> Path:
    """One valid input of each kind."""
    import jax
    import pyarrow as pa
    import pyarrow.parquet as pq
    from golden.cases import write_folder, write_tokenizer
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxtune.hf.load import load_params, open_model
    from jaxtune.parallel.mesh import make_mesh
    from jaxtune.training.checkpoint.checkpoints import Checkpoints
    from jaxtune.training.state import TrainState

    model = write_tokenizer(write_folder("llama", folder / "model"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    _sentencepiece(folder / "spm.model")
    _sharded(model, folder / "sharded")
    data = folder / "data"
    data.mkdir()
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    chats = b"".join(json.dumps(row).encode() + b"\n" for row in CHATS)
    (data / "alpaca.jsonl").write_bytes(lines)
    (data / "chats.jsonl").write_bytes(chats)
    (data / "list.json").write_text(json.dumps(ROWS, indent=1))
    (data / "text.txt").write_text("One.\n\nTwo\nthree.\n\n\nFour.\n")
    cells = "".join(f'"{row["instruction"]}","{row["output"]}"\n' for row in ROWS[:6])
    (data / "table.csv").write_text("instruction,output\n" + cells)
    (data / "packed.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    pq.write_table(pa.Table.from_pylist(ROWS), data / "table.parquet")
    pq.write_table(pa.Table.from_pylist(CHATS), data / "chats.parquet")

    opened = open_model(model)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    params = {"params": load_params(opened, None, "float32")}
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    run = folder / "run"
    run.mkdir()
    state = TrainState(jax.numpy.asarray(4, jax.numpy.int32), params, {"count": params["params"]})
    checkpoints = Checkpoints(run)
    checkpoints.save(state, {"fingerprint": "a" * 40, "total_steps": 9}, step=4)
    checkpoints.close()
    rows = [
        {"kind": "train", "step": i, "loss": 2.5, "learning_rate": 1e-4, "grad_norm": 1.0}
        for i in range(1, 5)
    ] + [{"kind": "eval", "step": 4, "eval_loss": 2.0, "by_dataset": {"a": {"eval_loss": 2.0}}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 4, "prompt": "Hi", "response": "Ho", "stopped": True}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    start = {"step": 0, "versions": {"jax": "1"}, "device": "cpu", "devices": 1, "hosts": 1}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (run / "config.yaml").write_text(
        json.dumps({**CONFIG, "model_name_or_path": str(model), "lora": {}, "init": "pretrained"})
    )
    score = {"eval_loss": 1.0, "generations": [{"prompt": "a", "reference": "b", "response": "c"}]}
    (run / "evaluation.json").write_text(json.dumps({**score, "by_dataset": {"x": score}}))
    _adapter(folder / "adapter", opened)
    return folder


def _sentencepiece(out: Path) -> None:
    import sentencepiece

    written = io.BytesIO()
    words = ["where is rome", "in rome", "a prime is seven", "be kind"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=written, vocab_size=60, model_type="bpe",
        byte_fallback=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    out.write_bytes(written.getvalue())


def _sharded(model: Path, out: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, out / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter(out: Path, model: Any) -> None:
    import jax

    from jaxtune.hf.peft.targets import resolve_targets
    from jaxtune.hf.peft.write import write_adapter
    from jaxtune.model import decoder
    from jaxtune.model.lora import Lora

    lora = Lora(r=2, alpha=4.0, targets=resolve_targets(model, ("q_proj", "down_proj")))
    shapes = decoder.abstract_adapters(model.spec, lora)
    leaves = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), shapes)
    write_adapter(out, model=model, lora=lora, adapters=leaves, tokenizer=None, template=None)


# -- how it is spoilt, and read --------------------------------------------------------------------


def spoil_config(good: Path, folder: Path, dice: random.Random) -> None:
    values: dict[str, Any] = dict(CONFIG)
    if dice.random() < 0.4:
        del values["dataset"]
        values["datasets"] = DATASETS
    (folder / "config.yaml").write_bytes(m.spoilt_yaml(values, dice))


def read_config(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune.config import dump, load

    dump(load(folder / "config.yaml"))


def spoil_flags(good: Path, folder: Path, dice: random.Random) -> None:
    words = []
    for name, value in dice.sample([*CONFIG.items()], 3):
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            words.append(f"--{name}.{key}" if key else f"--{name}")
            given = m.odd_value(dice) if dice.random() < 0.5 else inner
            text = given if isinstance(given, str) else m.dumped(given)
            if dice.random() < 0.9:
                words.append(text[:100_000].replace("\0", "0"))
    if dice.random() < 0.3:
        spot = dice.randrange(len(words))
        words[spot] = m.spoilt_bytes(words[spot].encode(errors="replace"), dice).decode(
            errors="surrogateescape"
        )
    (folder / "flags.json").write_text(json.dumps(words))


def read_flags(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune import cli as command
    from jaxtune.train import TrainOptions

    words = json.loads((folder / "flags.json").read_text())
    if not {"--help", "-h"} & set(words):
        command.parse(words, "train", "", TrainOptions)


DATA: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "alpaca.jsonl": m.spoilt_lines, "chats.jsonl": m.spoilt_lines, "list.json": m.spoilt_json,
    "text.txt": m.spoilt_bytes, "table.csv": m.spoilt_bytes, "table.parquet": m.spoilt_bytes,
    "chats.parquet": m.spoilt_bytes,
}  # fmt: skip


def spoil_data(good: Path, folder: Path, dice: random.Random) -> None:
    name = dice.choice([*DATA, "packed.jsonl.gz"])
    if name == "packed.jsonl.gz":
        spoilt = m.spoilt_gz((good / "data" / "alpaca.jsonl").read_bytes(), dice)
    else:
        spoilt = DATA[name]((good / "data" / name).read_bytes(), dice)
    (folder / name).write_bytes(spoilt)


def read_data(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune.config import DatasetConfig
    from jaxtune.data.preprocess import preprocess

    entry = DatasetConfig(path=str(folder))
    for row in preprocess(entry, _settings(good)):
        json.dumps(row.text)


_SETTINGS: dict[Path, Any] = {}


def _settings(good: Path) -> Any:
    from jaxtune.data.preprocess import PreprocessConfig
    from jaxtune.data.templating.template import resolve
    from jaxtune.data.tokenizer import load_tokenizer

    if good not in _SETTINGS:
        tokenizer = load_tokenizer(str(good / "model"))
        template = resolve("auto", tokenizer, system_prompt=None, stop=None)
        _SETTINGS[good] = PreprocessConfig(tokenizer, template, "assistant", 64, "truncate")
    return _SETTINGS[good]


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def spoil_tokenizer(good: Path, folder: Path, dice: random.Random) -> None:
    for name in (*TOKENIZER, "chat_template.jinja"):
        shutil.copy(good / "model" / name, folder / name)
    for name in dice.sample([*TOKENIZER, "chat_template.jinja", "model"], dice.choice([1, 1, 2])):
        if name == "model":
            (folder / "tokenizer.json").unlink(missing_ok=True)
            spoilt = m.spoilt_bytes((good / "spm.model").read_bytes(), dice)
            (folder / "tokenizer.model").write_bytes(spoilt)
        elif (folder / name).exists():
            spoil = m.spoilt_bytes if name.endswith("jinja") else m.spoilt_json
            (folder / name).write_bytes(spoil((folder / name).read_bytes(), dice))


def read_tokenizer(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune.config import DatasetConfig
    from jaxtune.data.preprocess import PreprocessConfig, preprocess
    from jaxtune.data.templating.template import resolve
    from jaxtune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    template = resolve("auto", tokenizer, system_prompt=None, stop=None)
    settings = PreprocessConfig(tokenizer, template, "assistant", 64, "truncate")
    for row in preprocess(DatasetConfig(path=str(good / "data" / "chats.jsonl")), settings):
        json.dumps(row.text)


def spoil_model(good: Path, folder: Path, dice: random.Random) -> None:
    source = good / dice.choice(["model", "sharded"])
    for file in source.iterdir():
        shutil.copy(file, folder / file.name)
    names = [
        f.name for f in source.iterdir() if not f.name.startswith(("token", "chat", "special"))
    ]
    for name in dice.sample(sorted(names), dice.choice([1, 1, 2])):
        spoil = m.spoilt_safetensors if name.endswith("safetensors") else m.spoilt_json
        if dice.random() < 0.05:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(spoil((folder / name).read_bytes(), dice))


def read_model(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune.hf.load import load_params, open_model

    model = open_model(folder)
    model.eos_ids  # noqa: B018 (it reads)
    if sum(tensor.size for tensor in _abstract(model)) < 10**7:
        load_params(model, None, "float32")


def _abstract(model: Any) -> list[Any]:
    import jax

    from jaxtune.model import decoder

    return jax.tree.leaves(decoder.abstract(model.spec, "float32"))


def spoil_adapter(good: Path, folder: Path, dice: random.Random) -> None:
    for file in (good / "adapter").iterdir():
        shutil.copy(file, folder / file.name)
    name = dice.choice(["adapter_config.json", "adapter_model.safetensors"])
    spoil = m.spoilt_safetensors if name.endswith("safetensors") else m.spoilt_json
    (folder / name).write_bytes(spoil((folder / name).read_bytes(), dice))


def read_adapter(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune.hf.load import open_model
    from jaxtune.hf.peft.read import on_model, open_adapter

    on_model(open_adapter(str(folder)), open_model(good / "model"))


def spoil_checkpoint(good: Path, folder: Path, dice: random.Random) -> None:
    """With digests that no longer fit; or sealed again, so that Orbax meets it."""
    from jaxtune.training.checkpoint import integrity

    shutil.copytree(good / "run", folder, dirs_exist_ok=True)
    step = folder / "checkpoints" / "4"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    if dice.random() < 0.4:  # what says what it is, rather than the arrays
        files = [f for f in files if f.name[0] == "_" or f.suffix == ".json" or "meta" in str(f)]
    file = dice.choice(files)
    sealed = dice.random() < 0.6 and not file.name.startswith("digests-")
    data = file.read_bytes()
    try:
        json.loads(data)
    except ValueError:
        file.write_bytes(m.spoilt_bytes(data, dice))
    else:
        file.write_bytes(m.spoilt_json(data, dice))
    if sealed:
        integrity.write(step)


def read_checkpoint(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune.hf.load import open_model
    from jaxtune.training.checkpoint.checkpoints import Checkpoints
    from jaxtune.training.initial_weights import restore

    restore(open_model(good / "model"), folder, None, dtype="float32")
    checkpoints = Checkpoints(folder)
    try:
        if (step := checkpoints.newest_good(lambda text: None)) is not None:
            checkpoints.meta(step)
    finally:
        checkpoints.close()


RUN = ("metrics.jsonl", "samples.jsonl", "starts.jsonl", "evaluation.json", "config.yaml")


def spoil_run(good: Path, folder: Path, dice: random.Random) -> None:
    for name in RUN:
        shutil.copy(good / "run" / name, folder / name)
    name = dice.choice(RUN)
    spoil = m.spoilt_lines if name.endswith("jsonl") else m.spoilt_json
    (folder / name).write_bytes(spoil((folder / name).read_bytes(), dice))


def read_run(folder: Path, good: Path, dice: random.Random) -> None:
    from jaxtune.reporting.files import read_evaluation, read_run
    from jaxtune.reporting.write import write_page
    from jaxtune.training.metrics import keep_rows_up_to

    found = read_run(folder)
    score = read_evaluation(folder / "evaluation.json")
    write_page(folder / "report.html", found, data="none", evaluations=[("e.json", score)])
    for name in RUN[:3]:
        keep_rows_up_to(folder / name, 2)


KINDS = {
    "config": Kind(20, spoil_config, read_config),
    "flags": Kind(6, spoil_flags, read_flags),
    "data": Kind(26, spoil_data, read_data),
    "tokenizer": Kind(12, spoil_tokenizer, read_tokenizer),
    "model": Kind(16, spoil_model, read_model),
    "adapter": Kind(6, spoil_adapter, read_adapter),
    "checkpoint": Kind(8, spoil_checkpoint, read_checkpoint),
    "run": Kind(6, spoil_run, read_run),
}

# -- one input -------------------------------------------------------------------------------------

_allowed: list[str] | None = None
_outside: list[str] = []
_WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
           "os.chmod", "os.chown", "shutil.rmtree", "shutil.move"}  # fmt: skip


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _allowed is None or (event != "open" and event not in _WRITES):
        return
    path, *more = arguments
    if event == "open":
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if not isinstance(path, str | bytes) or not (more[1] or 0) & writing:
            return
    if isinstance(path, str | bytes | os.PathLike):
        place = os.path.realpath(os.fsdecode(path))
        if not any(place == root or place.startswith(f"{root}/") for root in _allowed):
            _outside.append(f"{event} {place}")


class Late(BaseException):
    """An input that took too long."""


def _late(number: int, frame: object) -> None:
    raise Late


@contextlib.contextmanager
def limits(folder: Path) -> Iterator[None]:
    """Time, and the folders that may be written."""
    global _allowed
    if not getattr(_listen, "installed", False):
        sys.addaudithook(_listen)  # cannot be taken off again
        _listen.installed = True  # type: ignore[attr-defined]
    cache = os.environ.get("JAXTUNE_CACHE", "")
    kept = [
        str(folder),
        cache,
        os.environ.get("JAX_COMPILATION_CACHE_DIR", ""),
        str(ROOT / ".jax_cache"),
    ]
    before = signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # for what Python cannot interrupt
    _outside.clear()
    _allowed = [os.path.realpath(place) for place in kept if place] + ["/dev"]
    try:
        yield
    finally:
        _allowed = None
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one(kind: Kind, good: Path, folder: Path, dice: random.Random) -> tuple[str, str]:
    """("read" | "refused" | "finding", what was said)."""
    from jaxtune.config import Diverged, JaxtuneError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kind.spoil(good, folder, dice)
    said = io.StringIO()
    try:
        with limits(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            kind.read(folder, good, dice)
        answer = "read", ""
    except (JaxtuneError, Diverged) as error:
        answer = "refused", str(error)
        if not str(error).strip():
            answer = "finding", "a refusal without a word"
    except SystemExit as error:  # a flag that argparse itself cannot take apart: it has said why
        fine = error.code == 2 and said.getvalue().strip()
        answer = ("refused", "") if fine else ("finding", f"exit {error.code} without a word")
    except Late:
        answer = "finding", f"took longer than {SECONDS} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        answer = "finding", _short(error)
    if _outside:
        answer = "finding", f"written outside: {_outside[:3]}"
    return answer


def _short(error: BaseException) -> str:
    """The error, and the last places of ours and of all that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/jaxtune/" in frame.filename][-3:]
    places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in (*ours, frames[-1])]
    first = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first!r} at {', '.join(places)}"


def plan(inputs: int, only: str | None) -> list[str]:
    """Which kind each input is of."""
    if only is not None:
        return [only] * inputs
    whole = sum(kind.share for kind in KINDS.values())
    counts = {name: -(-inputs * kind.share // whole) for name, kind in KINDS.items()}
    return [name for name, count in counts.items() for _ in range(count)]


DOORS = {
    "config": ["preview", "--config", "{folder}/config.yaml"],
    "data": ["preview", "--dataset", "{folder}", "--tokenizer_name", "{good}/model"],
    "tokenizer": [
        "preview",
        "--dataset",
        "{good}/data/chats.jsonl",
        "--tokenizer_name",
        "{folder}",
    ],
    "model": ["convert", "{folder}", "{place}/out"],
    "adapter": ["convert", "{folder}", "{place}/out", "--model_name_or_path", "{good}/model"],
    "checkpoint": ["convert", "{folder}", "{place}/out"],
    "run": ["report", "{folder}"],
}


def through_a_process(name: str, good: Path, place: Path, dice: random.Random) -> tuple[str, str]:
    """The same input through its door, as a user meets it."""
    folder = place / "input"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    KINDS[name].spoil(good, folder, dice)
    words = [word.format(folder=folder, good=good, place=place) for word in DOORS[name]]
    command = [sys.executable, "-m", "jaxtune", *words]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=env, check=False, cwd=place
        )
    except subprocess.TimeoutExpired:
        return "finding", "the process took longer than 300 s"
    if done.returncode not in (0, 2) or "Traceback" in done.stderr:
        return "finding", f"exit {done.returncode}\n{done.stderr[-1500:]}"
    return ("read" if done.returncode == 0 else "refused"), ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*KINDS])
    parser.add_argument("--first", type=int, default=0, help="number of the first input of a kind")
    parser.add_argument("--processes", type=int, default=0, help="inputs through real processes")
    asked = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    seen: set[str] = set()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as where:
        base = Path(where)
        os.environ["JAXTUNE_CACHE"] = str(base / "cache")
        good = make_good(base / "good")
        numbers: collections.Counter[str] = collections.Counter()
        for name in plan(asked.inputs, asked.only):
            number = asked.first + numbers[name]
            numbers[name] += 1
            dice = random.Random(f"{asked.seed} {name} {number}")
            answer, said = one(KINDS[name], good, base / "input", dice)
            counts[name, answer] += 1
            if answer == "finding" and (where := said.rpartition(" at ")[2]) not in seen:
                seen.add(where)
                print(f"FINDING {name} {number}: {said}", flush=True)
        doors = [name for name in DOORS if asked.only in (None, name)]
        for number in range(asked.processes):
            name = doors[number % len(doors)]
            dice = random.Random(f"{asked.seed} {name} process {number}")
            answer, said = through_a_process(name, good, base / "process", dice)
            counts["processes", answer] += 1
            if answer == "finding":
                print(f"FINDING process {name} {number}: {said}", flush=True)
    for name in dict.fromkeys(kind for kind, _ in counts):
        print(name, {a: counts[name, a] for a in ("read", "refused", "finding")}, flush=True)
    found = sum(count for (_, answer), count in counts.items() if answer == "finding")
    total = sum(counts.values())
    print(f"{total} inputs in {time.monotonic() - began:.0f} s: {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
