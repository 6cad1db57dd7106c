"""Importing and exporting a model folder, beside `cp` and transformers: time and memory.

    python benchmarks/convert.py [--billions 1.1] [--dtype float32] [--folder /tmp] [--repeat 2]

Makes a sharded llama checkpoint of random weights (one block of random numbers, from another place
on in each tensor), then takes turns between

    cp            `cp -r` of the folder, and fsync of every file
    jaxtune       open, load onto 8 virtual CPU devices, export; as always, every file is fsynced,
                  read back from the disk and compared
    transformers  `AutoModelForCausalLM.from_pretrained` and `save_pretrained`, and fsync of every
                  file (skipped where torch is not installed)

each in a process of its own, the source in the system's cache. Imports of the libraries are not
timed. Everybody keeps the dtype of the file, unless --param_dtype says otherwise for jaxtune.

Memory is what the process alone holds (RssAnon + RssShmem of /proc/self/status, sampled each 20 ms)
less the bytes of the parameters. Pages of the mapped source are not counted: they are the system's
cache, which it takes back when it needs them. The interpreter and its libraries are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 16, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
SHARD_BYTES = 1_000_000_000


def make(folder: Path, billions: float, dtype: str) -> None:
    import numpy as np

    from jaxtune.hf.family.registry import family_of
    from jaxtune.hf.layout import place
    from jaxtune.hf.load import layer_numbers
    from jaxtune.hf.tensors import INDEX, ShardWriter, index_of, plan_shards
    from jaxtune.model import decoder
    from jaxtune.spec import parameter_count
    from jaxtune.tree import named

    config = {**CONFIG, "dtype": dtype, "torch_dtype": dtype}
    family = family_of(config)
    while (count := parameter_count(family.to_spec(config))) > billions * 1.2e9:
        layers = config["num_hidden_layers"] - 1
        config |= {"num_hidden_layers": layers} if layers else {"hidden_size": 512}
        config |= {} if layers else {"num_hidden_layers": 2, "intermediate_size": 2048}
        if count < 60e6:
            break
    spec = family.to_spec(config)
    shapes = {name: leaf.shape for name, leaf in named(decoder.abstract(spec, "f4")).items()}
    placed = place(family.rows, shapes, layer_numbers(spec))
    shape_of = {p.name: each.tensor_shape for each in placed.values() for p in each.pieces()}
    stored = np.dtype(np.float32) if dtype == "float32" else _bfloat16()
    plans = plan_shards({name: (stored, shape) for name, shape in shape_of.items()}, SHARD_BYTES)
    folder.mkdir()
    noise = np.random.default_rng(0).normal(size=1 << 22, scale=0.02).astype(stored)
    with ShardWriter(folder, plans) as writer:
        for number, (name, shape) in enumerate(shape_of.items()):
            row = int(np.prod(shape[1:]))
            step = max(1, noise.size // row)
            for first in range(0, shape[0], step):
                rows = min(step, shape[0] - first)
                values = np.roll(noise, number + first)[: rows * row]
                writer.write(name, values.reshape(rows, *shape[1:]), first)
    (folder / INDEX).write_text(json.dumps(index_of(plans)))
    (folder / "config.json").write_text(json.dumps(config))
    largest = max(int(np.prod(shape)) for shape in shape_of.values()) * stored.itemsize
    total = index_of(plans)["metadata"]["total_size"]
    print(
        f"{parameter_count(spec):,} parameters in {dtype}, {total / 1e9:.2f} GB in {len(plans)} "
        f"files, largest tensor {largest / 1e6:.0f} MB; {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def _bfloat16():
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16)


# -- the contestants, each in a process of its own -----------------------------------------------


def by_cp(source: Path, out: Path) -> Iterator[str]:
    yield "both"
    subprocess.run(["cp", "-r", source, out], check=True)
    _fsync(out)


def by_jaxtune(source: Path, out: Path, param_dtype: str | None) -> Iterator[str]:
    import jax
    import numpy as np

    from jaxtune.hf.export import WeightFormat, export_model
    from jaxtune.hf.load import load_params, open_model
    from jaxtune.model import decoder
    from jaxtune.parallel import mesh as meshes

    jax.devices()
    yield "import"
    model = open_model(source)
    dtype = np.dtype(param_dtype or model.dtype)
    mesh = meshes.make_mesh({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})
    abstract = decoder.abstract(model.spec, dtype)
    shardings = meshes.shardings(decoder.axes(model.spec), abstract, mesh)
    params = jax.block_until_ready(load_params(model, shardings, dtype))
    yield f"held {sum(leaf.nbytes for leaf in jax.tree.leaves(params))}"
    yield "export"
    export_model(
        out, model=model, params=params, tokenizer=None, template=None, card="# random\n",
        weights=WeightFormat(max_shard_bytes=SHARD_BYTES),
    )  # fmt: skip


def by_transformers(source: Path, out: Path) -> Iterator[str]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    yield "import"
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    yield f"held {sum(p.nbytes for p in model.parameters())}"
    yield "export"
    model.save_pretrained(out, max_shard_size=SHARD_BYTES)
    _fsync(out)


def _fsync(folder: Path) -> None:
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _measured(steps: Iterator[str]) -> dict[str, float]:
    """Seconds of each step, and its peak memory in bytes."""
    found: dict[str, float] = {}
    now, started, peak, done = "start", (time.perf_counter(), _cpu()), 0, False

    def sample() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, _held())
            time.sleep(0.02)

    def close() -> None:
        nonlocal peak
        found[f"{now} seconds"] = time.perf_counter() - started[0]
        found[f"{now} CPU"] = _cpu() - started[1]
        found[f"{now} peak"] = max(peak, _held())
        peak = 0

    watch = threading.Thread(target=sample, daemon=True)
    watch.start()
    for step in steps:
        if step.startswith("held "):
            close()
            found["parameters"] = int(step.removeprefix("held "))
        elif now != "start" and "parameters" not in found:
            close()
        if not step.startswith("held "):
            now, started, peak = step, (time.perf_counter(), _cpu()), 0
    close()
    done = True
    return found


def _cpu() -> float:
    """CPU seconds of this process and its children, the system's on their behalf included."""
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def _held() -> int:
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


def _alone(name: str, source: Path, out: Path, param_dtype: str | None) -> dict[str, float]:
    _warm(source)
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }  # fmt: skip
    command = [sys.executable, __file__, "--contestant", name, "--folder", str(source.parent)]
    command += ["--param_dtype", param_dtype] if param_dtype else []
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def _warm(source: Path) -> None:
    for file in source.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--billions", type=float, default=1.1, help="parameters")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--param_dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # the part of a process of its own
    options = parser.parse_args()
    contestants: dict[str, Callable[[Path, Path], Iterator[str]]] = {
        "cp": by_cp,
        "jaxtune": lambda source, out: by_jaxtune(source, out, options.param_dtype),
        "transformers": by_transformers,
    }
    if options.contestant:
        source, out = options.folder / "source", options.folder / "out"
        print(json.dumps(_measured(contestants[options.contestant](source, out))))
        return
    try:
        import torch  # noqa: F401
    except ImportError:
        del contestants["transformers"]
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        source, out = Path(work) / "source", Path(work) / "out"
        make(source, options.billions, options.dtype)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
        for _ in range(options.repeat):
            for name in contestants:
                runs[name].append(_alone(name, source, out, options.param_dtype))
    _print(runs)


def _print(runs: dict[str, list[dict[str, float]]]) -> None:
    steps = ("import", "export", "both")
    print(
        "| tool | import, s | export, s | both, s | CPU, s | import holds, MB | export holds, MB |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, found in runs.items():
        for run in found:
            seconds, cpu, peak = (
                {step: run[f"{step} {what}"] for step in steps if f"{step} {what}" in run}
                for what in ("seconds", "CPU", "peak")
            )
            seconds["both"] = sum(seconds.values())
            cells = [f"{seconds[step]:.1f}" if step in seconds else "" for step in steps]
            cells.append(f"{sum(cpu.values()):.1f}")
            for step in steps[:2]:
                more = peak[step] - run["parameters"] if step in peak else None
                cells.append("" if more is None else f"{more / 1e6:,.0f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
