"""A model as a run trains it, opened by one function: the folder and its layout, new tokens,
adapters, the trainable subset.

Opening reads no weights but those of an adapter that is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtune.cli import note as cli_note
from jaxtune.config import Config, ConfigError
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.hf.load import HfModel, open_model, with_tokens
from jaxtune.hf.peft.base_identity import base_meta, check_base, lora_from_meta, lora_meta
from jaxtune.hf.peft.read import on_model, open_adapter
from jaxtune.hf.peft.targets import resolve_targets
from jaxtune.model.lora import Lora
from jaxtune.spec import ModelSpec
from jaxtune.training.initial_weights import Adapters, check_ids
from jaxtune.training.trainable import TrainableSubset, trainable_subset

Note = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model with what of it is trained: `adapters` beside a frozen base, else the parameters of
    `subset`, else all. `model.spec` is already cut for the subset and has rows for new tokens.
    """

    model: HfModel
    adapters: Adapters | None = None
    subset: TrainableSubset | None = None

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def lora(self) -> Lora | None:
        return None if self.adapters is None else self.adapters.lora

    @property
    def meta(self) -> dict[str, Any]:
        """The entries of a checkpoint's meta that identify adapters, subset and base."""
        if self.adapters is not None:
            return {"lora": lora_meta(self.adapters.lora), "base": base_meta(self.model)}
        if self.subset is not None:
            return {"part": dict(self.subset.fields), "base": base_meta(self.model)}
        return {}

    def check_resumed(self, meta: Mapping[str, Any], *, where: str) -> None:
        """Refuse a checkpoint with other adapters, another subset or another base.

        Raises: ConfigError.
        """
        before = lora_from_meta(meta["lora"]) if "lora" in meta else None
        if before != self.lora:
            names = [] if before is None or self.lora is None else _different(before, self.lora)
            change = ", ".join(names) or ("none before" if before is None else "none now")
            raise ConfigError(
                f"{where}: was trained with other adapters ({change}). Restore lora's settings, or "
                "choose another output_dir to start anew."
            )
        fields = meta.get("part")
        if fields != (None if self.subset is None else dict(self.subset.fields)):
            trained = "all parameters" if fields is None else " and ".join(
                f"{name} {value!r}" for name, value in fields.items() if value is not None
            )  # fmt: skip
            raise ConfigError(
                f"{where}: was trained with {trained}. Restore trainable and train_last_layers, or "
                "choose another output_dir to start anew."
            )
        if self.lora is not None or self.subset is not None:
            check_base(meta, self.model, where=where)


def open_base(
    config: Config,
    tokenizer: Tokenizer | None = None,
    *,
    weights: bool = True,
    note: Note | None = cli_note,
) -> HfModel:
    """Open `model_name_or_path` with rows for the tokens that `tokenizer` adds.

    `weights=False` needs only `config.json`, as `init: random` does. Raises: ModelError.
    """
    assert config.model_name_or_path is not None
    weights = weights and config.init == "pretrained"
    revision = config.revision
    model = open_model(config.model_name_or_path, revision=revision, weights=weights, note=note)
    if tokenizer is None:
        return model
    added = tokenizer.added.values()
    return with_tokens(model, added, trained=tokenizer.size - len(added))


def open_subject(
    config: Config, tokenizer: Tokenizer, *, largest_id: int = 0, note: Note = cli_note
) -> Subject:
    """Open the model, its new tokens, its adapters and its trainable subset.

    `largest_id` is the largest token id in the data. Raises: ConfigError, ModelError.
    """
    model = open_base(config, tokenizer, note=note)
    check_ids(largest_id, model.name, model.spec, tokenizer)
    return subject_of(config, model, note=note)


def subject_of(config: Config, model: HfModel, *, note: Note = cli_note) -> Subject:
    """Add the config's adapters and trainable subset to an open model.

    Raises: ConfigError, ModelError.
    """
    model, adapters = _open_adapters(config, model, note)
    fields = ("trainable", "train_last_layers")
    subset = trainable_subset(model.spec, **{name: getattr(config, name) for name in fields})
    if subset is None:
        return Subject(model, adapters)
    if model.new is not None and "embed/table" not in subset.names:
        raise ConfigError(
            f"add_tokens: the rows of {len(model.new.ids)} new tokens would stay as they begin, "
            "since embed/table is frozen. Add 'embed' (and 'head') to trainable."
        )
    return Subject(replace(model, spec=subset.spec), adapters, subset)


def _open_adapters(config: Config, model: HfModel, note: Note) -> tuple[HfModel, Adapters | None]:
    """Open the adapters that `lora` and `adapter_name_or_path` ask for, and give the model rows.

    New tokens (`with_tokens`) get trained rows.
    """
    fields = config.lora
    new = tuple(sorted(model.new.ids)) if model.new is not None else ()
    if config.adapter_name_or_path is None:
        if fields.r == 0:
            return model, None
        lora = Lora(
            r=fields.r,
            alpha=2.0 * fields.r if fields.alpha is None else fields.alpha,
            targets=resolve_targets(model, fields.targets),
            dropout=fields.dropout,
            rslora=fields.rslora,
            dora=fields.dora,
            tokens=new,
            base=fields.base,
            double_quant=fields.double_quant,
        )
        note(f"lora: {_described(lora)}")
        return model, Adapters(lora, None)

    name = config.adapter_name_or_path
    adapter = open_adapter(name)
    model, lora, start = on_model(adapter, model)
    if fields.r not in (0, lora.r):
        raise ConfigError(
            f"lora.r: {fields.r}, but adapter {name} has rank {lora.r}, which it keeps. Drop "
            "lora.r."
        )
    if not set(new) <= set(lora.tokens):
        raise ConfigError(
            f"adapter_name_or_path {name}: has no rows for {len(set(new) - set(lora.tokens))} "
            "tokens of add_tokens. Give its own tokenizer as tokenizer_name, or drop add_tokens."
        )
    lora = replace(lora, dropout=fields.dropout, base=fields.base, double_quant=fields.double_quant)
    if adapter.base != model.name:
        note(f"{name}: was trained beside {adapter.base}; it goes on beside {model.name}")
    note(f"lora: going on from {name}, {_described(lora)}")
    return model, Adapters(lora, start)


def _described(lora: Lora) -> str:
    kind = ("rsLoRA" if lora.rslora else "LoRA") + (" with DoRA" if lora.dora else "")
    tokens = f" and the rows of {len(lora.tokens)} tokens" if lora.tokens else ""
    base = "" if lora.base == "none" else f"; base in {lora.base}"
    base += ", its scales in 8 bits" if lora.double_quant else ""
    return f"{kind} of rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}{tokens}{base}"


def _different(before: Lora, now: Lora) -> list[str]:
    pairs = zip(before.__dict__.items(), now.__dict__.values(), strict=True)
    return [f"lora.{name}" for (name, old), new in pairs if old != new]
