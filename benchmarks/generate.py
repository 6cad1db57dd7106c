"""Decoding beside transformers on a CPU: time to the first token, and tokens a second.

    python benchmarks/generate.py
    taskset -c 0 python benchmarks/generate.py --rounds 2 --tokens 32       on one core

Both get the same folder, a Llama of random weights, and the same prompts of 24 to 56 random ids;
both are greedy, in float32, on all cores, and write the same number of tokens to each prompt. That
they write the same tokens is checked (`same`: the share of tokens up to the first difference; of
random weights the two likeliest are at times equal to the last bit).

- `first, ms`: prompts in, first token of every prompt out.
- `tokens/s`: of all prompts, from there to the last.
- `CPU, ms`: processor time of all of a tool's threads for one step of decoding. On one core it is
  what other work on the machine changes least; on more, OpenMP's threads wait busily.
- `compiling, s`: the first call less a later one; jaxtune's alone, once for each shape.

transformers is `generate` as it comes (sdpa, dynamic cache), with left padding. The two take turns
for `--rounds`, each in its own process, warm; given is the best round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def cores() -> int:
    """That this process may use (`taskset`)."""
    return len(os.sched_getaffinity(0))


def write(folder: Path, options: argparse.Namespace) -> None:
    import numpy as np
    import transformers

    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.width, num_hidden_layers=options.layers,
        intermediate_size=options.width * 8 // 3, num_attention_heads=options.width // 64,
        num_key_value_heads=max(1, options.width // 192), max_position_embeddings=2048,
        initializer_range=0.05, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    print(f"{model.num_parameters() / 1e6:.0f}M parameters", file=sys.stderr)
    model.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    prompts = [
        random.integers(3, options.vocab, size).tolist()
        for size in np.linspace(24, 56, max(options.prompts)).astype(int)
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))


class Jaxtune:
    def __init__(self, folder: Path) -> None:
        import jax.numpy as jnp

        from jaxtune.hf.load import load_params, open_model
        from jaxtune.inference.unstack import unstack

        model = open_model(str(folder / "model"))
        variables = {"params": load_params(model, None, jnp.float32)}
        # As `inference.load_model` does it.
        self.spec, self.variables = unstack(model.spec, variables, platform="cpu", consume=True)

    def __call__(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        """The answers, and when the last of their first tokens was there."""
        from jaxtune.inference.engine import Engine

        engine = Engine(self.spec, self.variables, dtype="float32", slots=len(prompts))
        start = time.perf_counter()
        requests = [engine.submit(prompt, max_new_tokens=count) for prompt in prompts]
        found: dict[int, list[int]] = {request: [] for request in requests}
        first = None
        while engine.busy:
            for event in engine.step():
                found[event.request] += event.tokens
            if first is None and all(found.values()):
                first = time.perf_counter() - start
        assert first is not None
        return list(found.values()), first


class Transformers:
    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(cores())
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.model.eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def __call__(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        )
        watch = Watch()
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count,
                do_sample=False, streamer=watch if len(prompts) == 1 else None,
                stopping_criteria=[watch],
            )  # fmt: skip
        return out[:, longest:].tolist(), watch.first


class Watch:
    """Notes when the first token was chosen."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first = 0.0

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self.first = self.first or time.perf_counter() - self.start
        return torch.zeros(len(ids), dtype=torch.bool)

    def put(self, _: Any) -> None: ...

    def end(self) -> None: ...


SIDES = {"jaxtune": Jaxtune, "transformers": Transformers}


def side(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Answers a line of JSON on stdin, the number of prompts, with a line of JSON."""
    prompts = json.loads((folder / "prompts.json").read_text())
    ask = SIDES[name](folder)
    for line in sys.stdin:
        batch = int(line)
        start, cpu = time.perf_counter(), time.process_time()
        _, first = ask(prompts[:batch], 1)
        cpu_first = time.process_time() - cpu
        once = time.perf_counter() - start
        start, cpu = time.perf_counter(), time.process_time()
        tokens, first = ask(prompts[:batch], options.tokens)
        whole, cpu = time.perf_counter() - start, time.process_time() - cpu
        found = {
            "first": first, "whole": whole, "cpu": cpu - cpu_first, "tokens": tokens, "once": once,
        }  # fmt: skip
        print(json.dumps(found), flush=True)


def ask(process: subprocess.Popen[str], batch: int) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{batch}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def same(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that come before the first difference of a row."""
    alike = 0
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        pairs = zip(a, b, strict=True)
        alike += next((n for n, (x, y) in enumerate(pairs) if x != y), len(a))
    return alike / sum(map(len, ours))


def measure(folder: Path, options: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--side"]
    sides = {
        name: subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in SIDES
    }
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for batch in options.prompts:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for _ in range(options.rounds + 1):  # the first is to warm up
            for name, process in sides.items():
                rounds[name].append(ask(process, batch))
                print(batch, name, {**rounds[name][-1], "tokens": ...}, file=sys.stderr)
        for name, (cold, *warm) in rounds.items():
            least = {key: min(each[key] for each in warm) for key in ("first", "whole", "cpu")}
            steps = options.tokens - 1
            least["rate"] = batch * steps / min(each["whole"] - each["first"] for each in warm)
            least["step"] = least["cpu"] / steps
            least["compiling"] = (
                cold["once"] + cold["whole"] - min(each["once"] + each["whole"] for each in warm)
            )
            best[name, batch] = {**least, "tokens": warm[-1]["tokens"]}
    for process in sides.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return best


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=64, help="written to each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16], help="at a time")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = arguments()
    if options.side:
        side(options.side, options.folder, options)
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options)
        found = measure(Path(name), options)
    size = f"width {options.width}, {options.layers} layers, {options.tokens} tokens"
    where = f"{cores()} cores {platform.machine()}"
    print(f"{time.strftime('%Y-%m-%d')}, {where}, load {os.getloadavg()[0]:.1f}, {size}\n")
    print("| prompts | tool | first, ms | tokens/s | CPU, ms | compiling, s | same |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for batch in options.prompts:
        theirs = found["transformers", batch]["tokens"]
        for tool in SIDES:
            each = found[tool, batch]
            compiling = f"{each['compiling']:.1f}" if tool == "jaxtune" else ""
            alike = f"{same(each['tokens'], theirs):.1%}" if tool == "jaxtune" else ""
            cells = (
                batch, tool, f"{each['first'] * 1e3:.0f}", f"{each['rate']:.1f}",
                f"{each['step'] * 1e3:.1f}", compiling, alike,
            )  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
