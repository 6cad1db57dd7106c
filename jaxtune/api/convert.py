"""A checkpoint of a run, a model folder or an adapter, written out in Hugging Face format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, dump, shard_bytes
from jaxtune.data.open import stop_ids
from jaxtune.data.templating.template import Template
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer
from jaxtune.hf.export import Exported, WeightFormat, check_target, export_model
from jaxtune.hf.folders import is_adapter
from jaxtune.hf.load import HfModel, load_params, open_model
from jaxtune.hf.peft.merge import merged
from jaxtune.hf.peft.read import on_model, open_adapter
from jaxtune.hf.peft.write import WrittenAdapter, write_adapter
from jaxtune.inference.load import open_codec
from jaxtune.parallel.mesh import make_mesh
from jaxtune.reporting.model_card import model_card, trained_text
from jaxtune.storage import object_store
from jaxtune.storage.jsonl import last_rows
from jaxtune.storage.safe_read import read_text
from jaxtune.training.checkpoint.remote import put_export, staging
from jaxtune.training.initial_weights import Restored, param_shardings, restore, to_export
from jaxtune.training.run_dir import checkpoint_of, fetched, run_config
from jaxtune.training.subject import open_base


class ConvertResult(NamedTuple):
    """A folder that was written: a model's, or an adapter's with `merge_lora` false.

    `step` is the checkpoint's, None for a folder.
    """

    model_dir: Path
    step: int | None


def convert(
    config: Config,
    *,
    run_or_checkpoint: str,
    out_dir: str,
    step: int | None = None,
    merge_lora: bool = True,
) -> ConvertResult:
    """Write the folder; on failure an earlier export in `out_dir` stays as it was.

    Raises: ConfigError, ModelError.
    """
    name = fetched(run_or_checkpoint, step)
    source, step = checkpoint_of(Path(name), step)
    _check_one(source)
    with _output_folder(out_dir) as out:
        if (source / "checkpoints").is_dir():
            exported, step = _export_run(source, step, out, config, merge_lora)
        elif step is not None:
            raise ConfigError(f"{source}: --step {step}, but there are no checkpoints in it.")
        elif is_adapter(name):
            exported = _export_adapter(name, out, config, merge_lora)
        else:
            exported = _export_folder(name, out, config)
        kind = "adapter" if isinstance(exported, WrittenAdapter) else "model"
        of_step = "" if step is None else f"step {step}, "
        note(
            f"{kind}: {exported.folder} ({of_step}{exported.tensors} tensors, "
            f"{exported.size / 1e6:.1f} MB, read back and equal to the parameters)"
        )
        return ConvertResult(exported.folder, step)


def _check_one(source: Path) -> None:
    """Refuse RUN/checkpoints, which is no one of them."""
    if source.name != "checkpoints" or not (source.parent / "config.yaml").is_file():
        return
    steps = sorted(int(each.name) for each in source.iterdir() if each.name.isdigit())
    raise ConfigError(
        f"{source}: holds the checkpoints of a run. Give {source.parent}, or one of them: "
        f"{source}/STEP (there are: {', '.join(map(str, steps)) or 'none'})."
    )


@contextlib.contextmanager
def _output_folder(out_dir: str) -> Iterator[Path]:
    """The folder to write; for the URL of a store one here, which is put there at the end."""
    if not object_store.is_url(out_dir):
        yield Path(out_dir)
        return
    folder = staging(out_dir)
    yield folder
    put_export(folder, out_dir)
    note(f"put: {out_dir}, compared with {folder}")


def _export_run(
    run_dir: Path, step: int | None, out: Path, flags: Config, merge: bool
) -> tuple[Exported | WrittenAdapter, int]:
    config = run_config(run_dir, flags)
    if config.model_name_or_path is None:
        raise ConfigError(f"{run_dir / 'config.yaml'}: has no model_name_or_path.")
    tokenizer, template = open_codec(config)
    model = open_base(config, tokenizer)
    if merge:
        check_target(out, model)
    restored = restore(model, run_dir, step, dtype=config.param_dtype)
    model, step = restored.model, restored.step
    if not merge:
        return _write_adapter(out, restored, tokenizer, template), step
    exported = export_model(
        out,
        model=model,
        params=to_export(restored),
        weights=WeightFormat(config.save_dtype, shard_bytes(config.max_shard_size)),
        tokenizer=tokenizer,
        template=template,
        stop_ids=stop_ids(config, tokenizer, template),
        card=model_card(
            base=model.name,
            random_start=config.init == "random",
            template=template.name,
            template_kwargs=config.chat_template_kwargs,
            trained=trained_text(config),
            metrics=last_rows(run_dir / "metrics.jsonl", step),
            data={"step": step, "datasets": [entry.path for entry in config.datasets]},
            config=dump(config),
        ),
    )
    return exported, step


def _write_adapter(
    out: Path, restored: Restored, tokenizer: Tokenizer | None, template: Template | None
) -> WrittenAdapter:
    if restored.lora is None:
        raise ConfigError(
            "merge_lora: false, but the run trained all parameters; it has no adapters. Drop it."
        )
    return write_adapter(
        out,
        model=restored.model,
        lora=restored.lora,
        adapters=restored.trained["lora"],
        tokenizer=tokenizer,
        template=template,
    )


def _export_adapter(
    source: str, out: Path, config: Config, merge: bool
) -> Exported | WrittenAdapter:
    """Of an adapter in PEFT's format, beside its base or the one that `model_name_or_path` says."""
    adapter = open_adapter(source)
    name = config.model_name_or_path or adapter.base
    model = open_model(name, revision=config.revision or adapter.revision, note=note)
    model, lora, leaves = on_model(adapter, model)
    own = (adapter.folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(str(adapter.folder)) if own else None
    if not merge:
        return write_adapter(
            out, model=model, lora=lora, adapters=leaves, tokenizer=tokenizer, template=None
        )
    check_target(out, model)
    return export_model(
        out,
        model=model,
        params=merged(model, lora, leaves),
        weights=WeightFormat(config.save_dtype, shard_bytes(config.max_shard_size)),
        tokenizer=tokenizer,
        template=None,
        stop_ids=model.eos_ids if own else (),
        card=f"# {Path(name).name} with {Path(source).name} merged into it\n",
    )


def _export_folder(source: str, out: Path, config: Config) -> Exported:
    model = open_model(source, revision=config.revision, note=note)
    check_target(out, model)
    card = model.folder / "README.md"
    return export_model(
        out,
        model=model,
        params=load_params(model, _shardings(model, "float32"), "float32"),
        weights=WeightFormat(config.save_dtype, shard_bytes(config.max_shard_size)),
        tokenizer=None,
        template=None,
        card=read_text(card, model.folder) if card.exists() else f"# {Path(source).name}\n",
    )


def _shardings(model: HfModel, dtype: str) -> Any:
    """Spread over the devices that are here, whatever mesh the run had."""
    return param_shardings(model.spec, make_mesh({"fsdp": -1}), dtype)
