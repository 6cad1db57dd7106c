"""A checkpoint of a run, or a model folder, written out in Hugging Face format.

    python -m jaxtune.convert RUN_OR_CHECKPOINT OUT_DIR [--step N] [--save_dtype bfloat16]

RUN is a run directory (its newest checkpoint, or that of `--step`), RUN/checkpoints/STEP, or a
folder in Hugging Face format, which is saved anew. Flags overrule the run's own config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import command
from jaxtune.command import note
from jaxtune.config import Config, ConfigError, dump, load

if TYPE_CHECKING:
    from jaxtune.hf.export import Exported
    from jaxtune.hf.load import HfModel


class ConvertOptions(command.Options):
    run_or_checkpoint: str = Field(description="run directory, checkpoint or model folder")
    out_dir: str = Field(description="folder to write; an earlier export there is replaced")
    step: int | None = Field(None, ge=1, description="checkpoint to take; default: the newest")
    merge_lora: bool = Field(True, description="adapters into the weights, where the run has any")

    @classmethod
    def positional(cls) -> tuple[str, ...]:
        return ("run_or_checkpoint", "out_dir")


class Result(NamedTuple):
    """`step` is the checkpoint's, None for a model folder."""

    model_dir: Path
    step: int | None


def run(config: Config, options: ConvertOptions) -> Result:
    """Raises `ConfigError` and `ModelError`; what stood in `out_dir` before stays on failure."""
    source, step = _checkpoint(Path(options.run_or_checkpoint), options.step)
    out = Path(options.out_dir)
    if (source / "checkpoints").is_dir():
        exported, step = _export_run(source, step, out, config)
    elif step is not None:
        raise ConfigError(f"{source}: --step {step}, but there are no checkpoints in it.")
    else:
        exported = _export_folder(options.run_or_checkpoint, out, config)
    of_step = "" if step is None else f"step {step}, "
    note(
        f"model: {exported.folder} ({of_step}{exported.tensors} tensors, "
        f"{exported.size / 1e6:.1f} MB, read back and equal to the parameters)"
    )
    return Result(exported.folder, step)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return command.execute("convert", description, ConvertOptions, run, argv)


def _checkpoint(source: Path, step: int | None) -> tuple[Path, int | None]:
    """RUN/checkpoints/STEP -> RUN and STEP; anything else as it is."""
    if source.parent.name != "checkpoints" or not source.name.isdigit():
        return source, step
    if step not in (None, int(source.name)):
        raise ConfigError(f"{source}: is step {source.name}, but --step is {step}. Drop one.")
    return source.parent.parent, int(source.name)


def _export_run(run_dir: Path, step: int | None, out: Path, flags: Config) -> tuple[Exported, int]:
    from jaxtune.data.asked import open_template, open_tokenizer, stop_ids
    from jaxtune.draw.card import model_card
    from jaxtune.hf.export import check_target, export_model
    from jaxtune.hf.load import open_model, with_tokens

    config = _overruled(load(run_dir / "config.yaml"), flags)
    name = config.model_name_or_path
    if name is None:
        raise ConfigError(f"{run_dir / 'config.yaml'}: has no model_name_or_path.")
    pretrained = config.init == "pretrained"
    model = open_model(name, revision=config.revision, weights=pretrained, note=note)
    check_target(out, model)
    tokenizer = open_tokenizer(config, config.tokenizer_name or name, note=note)
    template = open_template(config, tokenizer, note=note)
    added = tokenizer.added.values()
    model = with_tokens(model, added, trained=tokenizer.size - len(added))
    params, step = _restore(run_dir, step, model, config.param_dtype)
    exported = export_model(
        out,
        model=model,
        params=params,
        save_dtype=config.save_dtype,
        tokenizer=tokenizer,
        template=template,
        stop_ids=stop_ids(config, tokenizer, template),
        card=model_card(
            base=model.name,
            random_start=config.init == "random",
            template=template.name,
            metrics=_metrics(run_dir / "metrics.jsonl", step),
            data={"step": step, "datasets": [entry.path for entry in config.datasets]},
            config=dump(config),
        ),
    )
    return exported, step


def _export_folder(source: str, out: Path, config: Config) -> Exported:
    from jaxtune.hf.export import check_target, export_model
    from jaxtune.hf.load import load_params, open_model
    from jaxtune.untrusted import read_text

    model = open_model(source, revision=config.revision, note=note)
    check_target(out, model)
    card = model.folder / "README.md"
    return export_model(
        out,
        model=model,
        params=load_params(model, _shardings(model, "float32"), "float32"),
        save_dtype=config.save_dtype,
        tokenizer=None,
        template=None,
        card=read_text(card, model.folder) if card.exists() else f"# {Path(source).name}\n",
    )


def _overruled(config: Config, flags: Config) -> Config:
    """The run's config with the fields that were given as flags."""
    return config.model_copy(update={name: getattr(flags, name) for name in flags.model_fields_set})


def _restore(run_dir: Path, step: int | None, model: HfModel, dtype: str) -> tuple[Any, int]:
    from jaxtune.learn.checkpoint import restore_trained
    from jaxtune.model import decoder

    abstract = {"params": decoder.abstract(model.spec, dtype)}
    shardings = {"params": _shardings(model, dtype)}
    trained, meta = restore_trained(run_dir, abstract, shardings, step=step)
    return trained["params"], int(meta["step"])


def _shardings(model: HfModel, dtype: str) -> Any:
    """Spread over the devices that are here, whatever mesh the run had."""
    from jaxtune.mesh import make_mesh, shardings
    from jaxtune.model import decoder

    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})
    return shardings(decoder.axes(model.spec), decoder.abstract(model.spec, dtype), mesh)


def _metrics(file: Path, step: int) -> dict[str, Mapping[str, Any]]:
    """The last train and eval rows up to `step`."""
    rows: dict[str, Mapping[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["step"] <= step:
                rows[row["kind"]] = row
    return rows


if __name__ == "__main__":
    sys.exit(main())
