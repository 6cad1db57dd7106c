"""Where the weights of a run come from: a model folder, a seed, an adapter, a checkpoint.

The doors meet here, so that what is evaluated is what was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune import cli
from jaxtune.config import Config, ConfigError, load
from jaxtune.storage import object_store

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtune.data.tokenizer import Tokenizer
    from jaxtune.hf.load import HfModel
    from jaxtune.model.lora import Lora
    from jaxtune.spec import ModelSpec
    from jaxtune.training.trainable import Part


class Adapters(NamedTuple):
    """What a run trains beside a frozen base; `start` is where it goes on from, as numpy arrays, or
    None for new adapters."""

    lora: Lora
    start: Any | None


# -- a run's beginning ---------------------------------------------------------------------------


def base_params(
    model: HfModel, config: Config, placed: Any, dtype: Any, *, lora: Lora | None = None
) -> Any:
    """The model's parameters in `dtype`, each leaf in its sharding of the tree `placed`; the
    kernels of projections and experts as `lora.base` says, made smaller one by one while loading.

    A model opened without weights (`init: random`) is filled from the seed, in `param_dtype` first,
    so that everybody who asks for another `dtype` begins with the same numbers.
    """
    import jax

    from jaxtune.hf.load import load_params
    from jaxtune.model import decoder

    if lora is not None and lora.base != "none":
        return _quantised_params(model, lora, placed, dtype)
    if model.tensors:
        return load_params(model, placed, dtype)

    def first(key: jax.Array) -> Any:
        params = decoder.init(model.spec, key, config.param_dtype)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(first, out_shardings=placed)(jax.random.key(config.seed))


def param_shardings(spec: ModelSpec, mesh: Mesh, dtype: Any) -> Any:
    """Where plain parameters lie on `mesh`."""
    from jaxtune.model import decoder
    from jaxtune.parallel.mesh import shardings

    return shardings(decoder.axes(spec), decoder.abstract(spec, dtype), mesh)


def _quantised_params(model: HfModel, lora: Lora, placed: Any, dtype: Any) -> Any:
    import functools

    import jax

    from jaxtune.hf.load import load_params
    from jaxtune.model import decoder, quantise
    from jaxtune.tree import named

    projections = {f"{name}/kernel" for name in decoder.projections(model.spec)}
    banks = {f"{name}/kernel" for name in decoder.banks(model.spec)}
    where = named(placed)
    whole = param_shardings(model.spec, next(iter(where.values())).mesh, dtype)

    def smaller(name: str, leaf: jax.Array) -> Any:
        if name not in projections | banks:
            return leaf
        inputs = 1 if name in banks else len(model.placed[name].row.groups[1])
        kept = {
            key.rpartition("/")[2]: sharding
            for key, sharding in where.items()
            if key.startswith(f"{name}/")
        }
        of_one = functools.partial(
            quantise.quantise, kind=lora.base, inputs=inputs, double=lora.double_quant
        )
        of_layer = functools.partial(jax.lax.map, of_one) if name in banks else of_one
        # A kernel at a time: in float32 a whole stack would not fit beside the rest.
        every = jax.jit(functools.partial(jax.lax.map, of_layer), out_shardings=kept)
        return jax.block_until_ready(every(leaf))

    return load_params(model, whole, dtype, then=smaller)


def check_ids(largest: int, model: str, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """An id without a row in the embedding never raises on a device: it is refused here."""
    if largest >= spec.vocab:
        raise ConfigError(
            f"{model}: has {spec.vocab} embedding rows, but meets token id {largest} of tokenizer "
            f"{tokenizer.folder}. Use the model's own tokenizer."
        )


def adapters_of(
    config: Config, model: HfModel, *, note: Callable[[str], None]
) -> tuple[HfModel, Adapters | None]:
    """What `lora` and `adapter_name_or_path` ask for on `model`, and the model with rows for it.

    New tokens (`with_tokens`) get trained rows. Raises `ConfigError` and `ModelError`.
    """
    from jaxtune.hf.peft.read import on_model, open_adapter
    from jaxtune.hf.peft.targets import resolve_targets
    from jaxtune.model.lora import Lora

    asked = config.lora
    new = tuple(sorted(model.new.ids)) if model.new is not None else ()
    if config.adapter_name_or_path is None:
        if asked.r == 0:
            return model, None
        lora = Lora(
            r=asked.r,
            alpha=2.0 * asked.r if asked.alpha is None else asked.alpha,
            targets=resolve_targets(model, asked.targets),
            dropout=asked.dropout,
            rslora=asked.rslora,
            dora=asked.dora,
            tokens=new,
            base=asked.base,
            double_quant=asked.double_quant,
        )
        note(f"lora: {_described(lora)}")
        return model, Adapters(lora, None)

    name = config.adapter_name_or_path
    adapter = open_adapter(name)
    model, lora, start = on_model(adapter, model)
    if asked.r not in (0, lora.r):
        raise ConfigError(
            f"lora.r: {asked.r}, but adapter {name} has rank {lora.r}, which it keeps. Drop lora.r."
        )
    if not set(new) <= set(lora.tokens):
        raise ConfigError(
            f"adapter_name_or_path {name}: has no rows for {len(set(new) - set(lora.tokens))} "
            "tokens of add_tokens. Give its own tokenizer as tokenizer_name, or drop add_tokens."
        )
    lora = replace(lora, dropout=asked.dropout, base=asked.base, double_quant=asked.double_quant)
    if adapter.base != model.name:
        note(f"{name}: was trained beside {adapter.base}; it goes on beside {model.name}")
    note(f"lora: going on from {name}, {_described(lora)}")
    return model, Adapters(lora, start)


def part_of(config: Config, model: HfModel) -> tuple[HfModel, Part | None]:
    """What `trainable` and `train_last_layers` choose, and the model cut for it."""
    from jaxtune.training.trainable import part

    fields = ("trainable", "train_last_layers")
    chosen = part(model.spec, **{name: getattr(config, name) for name in fields})
    if chosen is None:
        return model, None
    if model.new is not None and "embed/table" not in chosen.names:
        raise ConfigError(
            f"add_tokens: the rows of {len(model.new.ids)} new tokens would stay as they begin, "
            "since embed/table is frozen. Add 'embed' (and 'head') to trainable."
        )
    return replace(model, spec=chosen.spec), chosen


def _described(lora: Lora) -> str:
    kind = ("rsLoRA" if lora.rslora else "LoRA") + (" with DoRA" if lora.dora else "")
    tokens = f" and the rows of {len(lora.tokens)} tokens" if lora.tokens else ""
    base = "" if lora.base == "none" else f"; base in {lora.base}"
    base += ", its scales in 8 bits" if lora.double_quant else ""
    return f"{kind} of rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}{tokens}{base}"


def first_adapters(
    spec: ModelSpec, adapters: Adapters, params: Any, placed: Any, *, seed: int
) -> Any:
    """The collection "lora" a run begins with, in the shardings `placed`."""
    import functools

    import jax

    from jaxtune.model import decoder
    from jaxtune.parallel.mesh import put

    if adapters.start is not None:
        return jax.tree.map(put, adapters.start, placed)
    make = functools.partial(decoder.init_adapters, spec, adapters.lora)
    # Not the key of the base's random weights, nor of what is drawn while training.
    key = jax.random.fold_in(jax.random.key(seed), 2**31)
    return jax.jit(make, out_shardings=placed)(params, key)


# -- what a checkpoint knows of its base ---------------------------------------------------------


def base_and_part(model: HfModel, adapters: Adapters | None, chosen: Part | None) -> dict[str, Any]:
    """What a checkpoint that holds not all parameters says of itself and of its base."""
    from jaxtune.hf.peft.base_identity import base_meta, lora_meta

    if adapters is not None:
        return {"lora": lora_meta(adapters.lora), "base": base_meta(model)}
    if chosen is not None:
        return {"part": dict(chosen.asked), "base": base_meta(model)}
    return {}


def check_resumed(
    meta: Mapping[str, Any],
    model: HfModel,
    adapters: Adapters | None,
    chosen: Part | None,
    *,
    where: str,
) -> None:
    """Refuses to go on with other adapters, another part of the parameters, or beside another base.
    Raises `ConfigError`."""
    from jaxtune.hf.peft.base_identity import check_base, lora_from_meta

    before = lora_from_meta(meta["lora"]) if "lora" in meta else None
    now = None if adapters is None else adapters.lora
    if before != now:
        names = [] if before is None or now is None else _different(before, now)
        said = ", ".join(names) or ("none before" if before is None else "none now")
        raise ConfigError(
            f"{where}: was trained with other adapters ({said}). Restore lora's settings, or "
            "choose another output_dir to start anew."
        )
    trained = meta.get("part")
    if trained != (None if chosen is None else dict(chosen.asked)):
        said = "all parameters" if trained is None else " and ".join(
            f"{name} {value!r}" for name, value in trained.items() if value is not None
        )  # fmt: skip
        raise ConfigError(
            f"{where}: was trained with {said}. Restore trainable and train_last_layers, or choose "
            "another output_dir to start anew."
        )
    if now is not None or chosen is not None:
        check_base(meta, model, where=where)


def _different(before: Lora, now: Lora) -> list[str]:
    pairs = zip(before.__dict__.items(), now.__dict__.values(), strict=True)
    return [f"lora.{name}" for (name, old), new in pairs if old != new]


# -- trained weights as parameters ---------------------------------------------------------------


class Restored(NamedTuple):
    """A checkpoint's trained variables, for `model`; without `lora` all parameters, those that
    were frozen read from the base."""

    model: HfModel
    trained: Any
    lora: Lora | None
    step: int


def fetched(name: str, step: int | None = None, *, checkpoint: bool = True) -> str:
    """A run in a store, or one of its checkpoints, as a folder here; any other name as it is.

    A model's folder in a store is another name: what opens it fetches it.
    """
    if not object_store.is_url(name):
        return name
    from jaxtune.training.checkpoint.remote import fetch_run

    run, _, number = name.rstrip("/").rpartition("/checkpoints/")
    if run and number.isdigit():
        _, step = checkpoint_of(Path("checkpoints", number), step)
        return str(fetch_run(run, step=step) / "checkpoints" / number)
    if not object_store.find(object_store.join(name, "config.yaml")):
        return name
    return str(fetch_run(name, step=step, checkpoint=checkpoint))


def checkpoint_of(source: Path, step: int | None = None) -> tuple[Path, int | None]:
    """RUN/checkpoints/STEP -> RUN and STEP; anything else as it is."""
    if source.parent.name != "checkpoints" or not source.name.isdigit():
        return source, step
    if step not in (None, int(source.name)):
        raise ConfigError(f"{source}: is step {source.name}, but --step is {step}. Drop one.")
    return source.parent.parent, int(source.name)


def is_checkpoint(name: str) -> bool:
    """Whether `name` is RUN/checkpoints/STEP."""
    run_dir, step = checkpoint_of(Path(name))
    return step is not None and (run_dir / "config.yaml").is_file()


def unexported(name: str) -> bool:
    """Whether `name` is a run directory here that has checkpoints and no exported model."""
    folder = Path(name)
    return (folder / "checkpoints").is_dir() and not (folder / "hf" / "config.json").is_file()


def run_config(run_dir: Path, flags: Config) -> Config:
    """The run's config with the fields that were given as flags."""
    config = load(run_dir / "config.yaml")
    return config.model_copy(update={name: getattr(flags, name) for name in flags.model_fields_set})


def restore(model: HfModel, run_dir: Path, step: int | None, *, dtype: str) -> Restored:
    """What a run's checkpoint trained, spread over the devices that are here."""
    from jaxtune.hf.load import load_params
    from jaxtune.hf.peft.base_identity import check_base, lora_from_meta
    from jaxtune.hf.peft.read import with_token_rows
    from jaxtune.model import decoder
    from jaxtune.parallel.mesh import make_mesh, shardings
    from jaxtune.training.checkpoint.checkpoints import read_meta, restore_trained
    from jaxtune.training.trainable import part
    from jaxtune.tree import merge, split

    meta = read_meta(run_dir, step, note=cli.note)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})
    lora = lora_from_meta(meta["lora"]) if "lora" in meta else None
    chosen = part(model.spec, **meta["part"]) if "part" in meta else None
    if chosen is not None:
        check_base(meta, model, where=str(run_dir))
        model = replace(model, spec=chosen.spec)
    if lora is None:
        axes = {"params": decoder.axes(model.spec)}
        abstract = {"params": decoder.abstract(model.spec, dtype)}
    else:
        check_base(meta, model, where=str(run_dir))
        model = with_token_rows(model, lora.tokens)
        axes = {"lora": decoder.adapter_axes(model.spec, lora)}
        abstract = {"lora": decoder.abstract_adapters(model.spec, lora)}
    step, placed = int(meta["step"]), shardings(axes, abstract, mesh)
    if chosen is None:
        trained, _ = restore_trained(run_dir, abstract, placed, step=step)
        return Restored(model, trained, lora, step)
    abstract, _ = split(abstract, chosen.is_trained)
    moved, _ = restore_trained(run_dir, abstract, split(placed, chosen.is_trained)[0], step=step)
    base = {"params": load_params(model, placed["params"], dtype)}
    return Restored(model, merge(moved, split(base, chosen.is_trained)[1]), None, step)


def to_export(restored: Restored) -> Any:
    """The whole parameters as `export_model` takes them, adapters merged."""
    from jaxtune.hf.peft.merge import merged

    if restored.lora is None:
        return restored.trained["params"]
    return merged(restored.model, restored.lora, restored.trained["lora"])
