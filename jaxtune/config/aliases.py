"""The names and values that people type elsewhere, as fields of the config.

A name that is a field itself may be listed too: its values are then translated
(`gradient_checkpointing: true`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.config import defaults


class Alias(NamedTuple):
    """The field that is meant, and the values that are spelt otherwise there."""

    name: str
    values: Mapping[str, Any] = {}

    def convert(self, value: Any) -> Any:
        """Translate a value; true and false may be written in any case."""
        text = str(value)
        return self.values.get(text.lower() if text.lower() in ("true", "false") else text, value)


_REMAT = {"true": "full", "false": "none"}
_SCHEDULES = {"wsd": "warmup_stable_decay", "cosine_with_hard_restarts": "cosine_with_restarts"}
_TRAIN_ON = {"true": "all", "false": "assistant"}
_RESUME = {"true": "must", "false": "never"}
ALIASES: Mapping[str, Alias] = {
    **dict.fromkeys(("model", "base_model"), Alias("model_name_or_path")),
    "tokenizer": Alias("tokenizer_name"),
    "train_file": Alias("dataset"),
    **dict.fromkeys(("eval_file", "eval_dataset"), Alias("eval_datasets")),
    **dict.fromkeys(("val_set_size", "val_size"), Alias("eval_split")),
    **dict.fromkeys(("prompt_template", "chat_template"), Alias("template")),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"), Alias("max_length")
    ),
    "sample_packing": Alias("packing"),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_processes"), Alias("dataset_num_proc")),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), Alias("train_on", _TRAIN_ON)),
    "lr": Alias("learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs"), Alias("num_train_epochs")),
    "max_train_steps": Alias("max_steps"),
    **dict.fromkeys(("micro_batch_size", "batch_size"), Alias("per_device_train_batch_size")),
    "eval_batch_size": Alias("per_device_eval_batch_size"),
    "optimizer": Alias("optim", defaults.SAME),
    "optim": Alias("optim", defaults.SAME),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), Alias("lr_scheduler_type", _SCHEDULES)),
    "neftune_alpha": Alias("neftune_noise_alpha"),
    "freeze_trainable_layers": Alias("train_last_layers"),
    **dict.fromkeys(("warmup_ratio", "num_warmup_steps"), Alias("warmup_steps")),
    **dict.fromkeys(("clip_grad_norm", "gradient_clipping"), Alias("max_grad_norm")),
    **dict.fromkeys(
        ("activation_checkpointing", "enable_activation_checkpointing", "gradient_checkpointing"),
        Alias("gradient_checkpointing", _REMAT),
    ),
    "gradient_accumulation": Alias("gradient_accumulation_steps"),
    **dict.fromkeys(("lora_r", "lora_rank"), Alias("lora.r")),
    "lora_alpha": Alias("lora.alpha"),
    "lora_dropout": Alias("lora.dropout"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), Alias("lora.targets")),
    "use_rslora": Alias("lora.rslora"),
    "use_dora": Alias("lora.dora"),
    **dict.fromkeys(("adapter", "adapter_path"), Alias("adapter_name_or_path")),
    **dict.fromkeys(("resume_from_checkpoint", "resume"), Alias("resume", _RESUME)),
    "log_interval": Alias("logging_steps"),
    "out_dir": Alias("output_dir"),
    **{
        name: Alias(f"hosts.{name}")
        for name in ("coordinator_address", "num_processes", "process_id")
    },
}
