"""The names and values that people type elsewhere, as fields of the config.

A name that is a field itself may be listed too: its values are then translated
(`gradient_checkpointing: true`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtune.config import defaults


class Alias(NamedTuple):
    """The field that is meant, and what is made of the value."""

    name: str
    convert: Callable[[Any], Any] = lambda value: value


def _remat(value: Any) -> Any:
    return {"true": "full", "false": "none"}.get(str(value).lower(), value)


def _train_on(value: Any) -> Any:
    return {"true": "all", "false": "assistant"}.get(str(value).lower(), value)


def _add_tokens(value: Any) -> Any:
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    return {"true": True, "false": False}.get(str(word).lower(), value)


def _resume(value: Any) -> Any:
    return {"true": "must", "false": "never"}.get(str(value).lower(), value)


def _one_dataset(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


def _optimiser(value: Any) -> Any:
    return defaults.SAME.get(str(value), value)


def _scheduler(value: Any) -> Any:
    return {"wsd": "warmup_stable_decay", "cosine_with_hard_restarts": "cosine_with_restarts"}.get(
        str(value), value
    )


ALIASES: Mapping[str, Alias] = {
    **dict.fromkeys(("model", "base_model"), Alias("model_name_or_path")),
    "tokenizer": Alias("tokenizer_name"),
    "train_file": Alias("dataset"),
    "datasets": Alias("datasets", _one_dataset),
    **dict.fromkeys(
        ("eval_file", "eval_dataset", "eval_datasets"), Alias("eval_datasets", _one_dataset)
    ),
    **dict.fromkeys(("val_set_size", "val_size"), Alias("eval_split")),
    **dict.fromkeys(("prompt_template", "chat_template"), Alias("template")),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"), Alias("max_length")
    ),
    "add_tokens": Alias("add_tokens", _add_tokens),
    "sample_packing": Alias("packing"),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_processes"), Alias("dataset_num_proc")),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), Alias("train_on", _train_on)),
    "lr": Alias("learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs"), Alias("num_train_epochs")),
    "max_train_steps": Alias("max_steps"),
    **dict.fromkeys(("micro_batch_size", "batch_size"), Alias("per_device_train_batch_size")),
    "eval_batch_size": Alias("per_device_eval_batch_size"),
    "optimizer": Alias("optim", _optimiser),
    "optim": Alias("optim", _optimiser),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), Alias("lr_scheduler_type", _scheduler)),
    "neftune_alpha": Alias("neftune_noise_alpha"),
    "freeze_trainable_layers": Alias("train_last_layers"),
    **dict.fromkeys(("warmup_ratio", "num_warmup_steps"), Alias("warmup_steps")),
    **dict.fromkeys(("clip_grad_norm", "gradient_clipping"), Alias("max_grad_norm")),
    **dict.fromkeys(
        ("activation_checkpointing", "enable_activation_checkpointing", "gradient_checkpointing"),
        Alias("gradient_checkpointing", _remat),
    ),
    "gradient_accumulation": Alias("gradient_accumulation_steps"),
    **dict.fromkeys(("lora_r", "lora_rank"), Alias("lora.r")),
    "lora_alpha": Alias("lora.alpha"),
    "lora_dropout": Alias("lora.dropout"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), Alias("lora.targets")),
    "use_rslora": Alias("lora.rslora"),
    "use_dora": Alias("lora.dora"),
    **dict.fromkeys(("adapter", "adapter_path"), Alias("adapter_name_or_path")),
    **dict.fromkeys(("resume_from_checkpoint", "resume"), Alias("resume", _resume)),
    "log_interval": Alias("logging_steps"),
    "out_dir": Alias("output_dir"),
    **{
        name: Alias(f"hosts.{name}")
        for name in ("coordinator_address", "num_processes", "process_id")
    },
}
