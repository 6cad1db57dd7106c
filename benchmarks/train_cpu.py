"""The same small Llama trained on a CPU by jaxtune and by TRL: time, trained tokens a second, loss.

    python benchmarks/train_cpu.py FILE --tokenizer FOLDER [--epochs 2] [--trl plain packed]

FILE holds Alpaca rows (instruction, input, output); the last tenth is held out. A Llama of random
weights is written once, and both sides begin from that folder, in float32, with the same text, the
same trained tokens (answers alone), AdamW, linear schedule, clipping, number of epochs, and nearly
the same tokens and so the same number of steps. Each side runs in a process of its own:

- jaxtune: rows of `--length` tokens, packed, examples isolated;
- TRL `plain`: unpacked, as many examples a step as make up those rows, sorted by length so that
  little is padding;
- TRL `packed`: `packing=True`, the same rows as jaxtune's;
- TRL `compiled`: as `plain`, with `torch_compile=True`.

`all, s` is the whole process: imports, tokenising, compiling, training, writing the model.
`training, s` is the loop alone, compiling included (`trainer.train()`; `Loop.run`), and the trained
tokens a second are over it; `CPU, s` is its processor time, which other work on the machine leaves
nearly alone. `eval loss` is of the exported models, each measured by `jaxtune
evaluate`. Run it where both are installed (`pip install jaxtune trl`).
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

from data import TEMPLATE

LEARNING_RATE, WARMUP, SEED = 1e-3, 0.1, 0


def write(folder: Path, file: Path, tokenizer_folder: str, options: argparse.Namespace) -> None:
    """`model`, a Llama of random weights with its tokenizer, and `train.jsonl`, `eval.jsonl`."""
    import transformers

    records = json.loads(file.read_text(encoding="utf-8"))
    if options.rows:
        records = records[: options.rows]
    held_out = len(records) // 10
    for name, part in (("train", records[:-held_out]), ("eval", records[-held_out:])):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for record in part:
                asked = "\n".join(filter(None, (record["instruction"], record.get("input"))))
                turns = [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": record["output"]},
                ]
                out.write(json.dumps({"messages": turns}) + "\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    transformers.set_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, num_hidden_layers=options.layers,
        intermediate_size=options.width * 11 // 4, num_attention_heads=options.width // 64,
        num_key_value_heads=max(1, options.width // 128), max_position_embeddings=options.length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def train_jaxtune(folder: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    from jaxtune import config, train
    from jaxtune.training.loop import Loop

    spent, run = {}, Loop.run

    def timed(self: Loop, *state: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        done = run(self, *state)
        spent["training"] = time.perf_counter() - start
        spent["cpu"] = time.process_time() - cpu
        return done

    Loop.run = timed  # type: ignore[method-assign]
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset": str(folder / "train.jsonl"),
        "template": "chat",
        "output_dir": str(out),
        "max_length": options.length,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP,
        "gradient_checkpointing": "none",
        "save_steps": 10**6,
    }
    result = train.run(config.load(overrides=settings))
    row = result.metrics["train"]
    return {
        **spent,
        "steps": row["step"],
        "trained": row["tokens_trained"],
        "model": str(result.model_dir),
    }


def train_trl(folder: Path, out: Path, options: argparse.Namespace, kind: str) -> dict[str, Any]:
    import datasets
    import torch
    import transformers
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(out / "cache")
    )
    packed = kind == "packed"
    arguments = SFTConfig(
        output_dir=str(out), max_length=options.length, packing=packed, assistant_only_loss=True,
        per_device_train_batch_size=options.batch if packed else options.examples,
        num_train_epochs=options.epochs, learning_rate=LEARNING_RATE, warmup_steps=WARMUP,
        lr_scheduler_type="linear", optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
        train_sampling_strategy="random" if packed else "group_by_length",
        gradient_checkpointing=False, use_cpu=True, bf16=kind == "bf16", seed=SEED,
        torch_compile=kind == "compiled", dataset_num_proc=os.cpu_count(), report_to="none",
        save_strategy="no", logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    labels = trainer.train_dataset["labels"]
    trained = sum(sum(label != -100 for label in row) for row in labels)
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    training, cpu = time.perf_counter() - start, time.process_time() - cpu
    trainer.save_model(str(out / "hf"))
    return {
        "training": training,
        "cpu": cpu,
        "steps": trainer.state.global_step,
        "trained": int(trained * options.epochs),
        "model": str(out / "hf"),
    }


def alone(kind: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own: what it reports, and the seconds of all of it."""
    out = folder / kind
    out.mkdir()
    start = time.perf_counter()
    command = [sys.executable, __file__, *sys.argv[1:], "--side", kind, "--folder", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    found = json.loads((out / "found.json").read_text()) | {"all": seconds}
    print(kind, found, file=sys.stderr)
    return found


def eval_loss(model: str, folder: Path) -> float:
    from jaxtune import config, evaluate

    settings = {
        "model_name_or_path": model,
        "dataset": str(folder / "eval.jsonl"),
        "template": "chat",
        "tokenizer_name": str(folder / "model"),
    }
    return evaluate.run(config.load(overrides=settings)).scores["eval_loss"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=0, help="of the file; 0: all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--batch", type=int, default=4, help="packed rows in a step")
    parser.add_argument("--examples", type=int, default=20, help="in a step, where unpacked")
    parser.add_argument("--trl", nargs="*", default=["plain"], help="plain packed compiled bf16")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.side:
        out = options.folder / options.side
        if options.side == "jaxtune":
            found = train_jaxtune(options.folder, out, options)
        else:
            found = train_trl(options.folder, out, options, options.side)
        (out / "found.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.file, options.tokenizer, options)
        found = {kind: alone(kind, folder) for kind in ("jaxtune", *options.trl)}
        losses = {kind: eval_loss(each["model"], folder) for kind, each in found.items()}
    work = f"width {options.width}, {options.layers} layers, {options.epochs} epochs"
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, {work}\n")
    print(
        "| tool | steps | trained tokens | training, s | CPU, s | all, s | tokens/s | eval loss |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for kind, each in found.items():
        tool = kind if kind == "jaxtune" else f"TRL, {kind}"
        cells = (
            tool, each["steps"], f"{each['trained']:,}", f"{each['training']:.1f}",
            f"{each['cpu']:.1f}", f"{each['all']:.1f}",
            f"{each['trained'] / each['training']:,.0f}", f"{losses[kind]:.3f}",
        )  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
