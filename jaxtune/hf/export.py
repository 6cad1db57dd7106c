"""Parameters -> a folder in Hugging Face format that transformers, vLLM and we load alike.

The folder is written beside its place, read back from the disk, compared by checksum with what the
parameters gave, and only then renamed into it: whatever kills an export leaves the previous folder
or none, never half of one. Host memory holds a few blocks of tensors at a time. What the model
stops at is one list of ids, the same in `config.json`, `generation_config.json` and the tokenizer.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.config import ConfigError
from jaxtune.data.templating.template import Template
from jaxtune.data.tokenizer import (
    CHAT_TEMPLATE,
    MORE_TEMPLATES,
    Tokenizer,
    chat_template_files,
)
from jaxtune.hf.folders import MODEL, TOKENIZER, check_replaceable
from jaxtune.hf.layout import Index, Placed
from jaxtune.hf.load import HfModel
from jaxtune.hf.tensors import (
    CODES,
    INDEX,
    ShardPlan,
    ShardWriter,
    WrittenRun,
    damaged,
    flush,
    index_of,
    open_tensors,
    plan_shards,
)
from jaxtune.hf.transpose import Scratch, once, run_ahead
from jaxtune.storage.safe_read import MAX_TABLE, read_bytes, read_object
from jaxtune.tree import named

_BEHIND = 1 << 28  # bytes that are written before they are read back together


class WeightFormat(NamedTuple):
    """The dtype of exported weights, a name or `source`, and the size of their files."""

    save_dtype: str = "source"
    max_shard_bytes: int = 5_000_000_000


_AS_SOURCE = WeightFormat()


class Exported(NamedTuple):
    """A written export: every tensor was read back from the disk as its parameter gave it."""

    folder: Path
    files: tuple[str, ...]
    tensors: int
    size: int  # bytes of tensor values


def export_model(
    out: Path,
    *,
    model: HfModel,
    params: Any,
    weights: WeightFormat = _AS_SOURCE,
    tokenizer: Tokenizer | None,
    template: Template | None,
    stop_ids: Sequence[int] = (),
    card: str,
) -> Exported:
    """Write `params` (sharded or not) as `out`, replacing an earlier export there.

    `weights.save_dtype` is float32, bfloat16, float16, or source: each tensor as the checkpoint it
    came from had it, else what `config.json` states. `stop_ids` are the trained ends of turn;
    the tokenizer's eos joins them. Without a tokenizer the source folder's files and ids are taken
    over as they are. Every host calls this; the first one writes.
    Raises: `ConfigError` if the folder cannot be written or a value does not fit the dtype.
    """
    check_target(out, model)
    dtypes = _dtypes(model, weights.save_dtype)
    plans = plan_shards(
        {
            name: (dtypes[name], placed.tensor_shape)
            for name, placed in _in_file_order(model).items()
        },
        weights.max_shard_bytes,
    )
    size = index_of(plans)["metadata"]["total_size"]
    try:
        if jax.process_index() != 0:
            for plan in plans:
                for _ in _blocks(plan.tensors, model, params):
                    pass
        else:
            with replacing(out, size) as folder:
                _write_tensors(folder, plans, dtypes, model, params)
                _write_configs(folder, model, weights.save_dtype, tokenizer, stop_ids)
                write_tokenizer(folder, model, tokenizer, template)
                write(folder / "README.md", card.encode())
        multihost_utils.sync_global_devices("export")
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot write the model ({size / 1e6:,.1f} MB): {error.strerror or error}. "
            "Free some space or choose another folder; an earlier export there is untouched."
        ) from None
    return Exported(out, tuple(plan.file for plan in plans), len(dtypes), size)


def check_target(out: Path, model: HfModel) -> None:
    """Refuse, before any work, to replace what is not an export or what is being read."""
    if model.tensors and out.resolve() == model.folder.resolve():
        raise ConfigError(
            f"{out}: is the model being read; an export there would destroy it. "
            "Choose another folder."
        )
    check_replaceable(out, marker=MODEL, kind="exported model", export="an export")


def _dtypes(model: HfModel, save_dtype: str) -> dict[str, np.dtype]:
    names = _in_file_order(model)
    if save_dtype == "source":
        default = _dtype(model.dtype)
        return {name: model.tensors[name].dtype if model.tensors else default for name in names}
    return dict.fromkeys(names, _dtype(save_dtype))


def _dtype(name: str) -> np.dtype:
    known = {str(dtype): dtype for dtype in CODES}
    if name not in known:
        raise ConfigError(f"save_dtype '{name}'; expected source, {', '.join(known)}.")
    return known[name]


def _in_file_order(model: HfModel) -> dict[str, Placed]:
    """Tensor name -> its parameter: as the source has them, else layer by layer."""
    tensors = {piece.name: placed for placed in model.placed.values() for piece in placed.pieces()}
    order = model.tensors or sorted(tensors, key=_natural)
    return {name: tensors[name] for name in order if name in tensors}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort `layers.10` after `layers.9`."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]


class TensorBlock(NamedTuple):
    """Rows of a tensor, from `first` on, that `fill` writes into an array of `shape`. Its values
    are of `dtypes` now, those of its parts."""

    name: str
    first: int
    shape: tuple[int, ...]
    dtypes: frozenset[np.dtype | None]  # None: not known before they are made
    fill: Callable[[np.ndarray], None]


def _blocks(names: Iterable[str], model: HfModel, params: Any) -> Iterator[TensorBlock]:
    """Tensors by rows. On several hosts each block is gathered here, in the same order."""
    leaves = named(params)
    if leaves.keys() != model.placed.keys():
        raise ValueError(f"not the model's parameters: {sorted(leaves.keys() ^ model.placed)[:4]}")
    parts: dict[str, list[TensorPart]] = {}
    for parameter, placed in model.placed.items():
        for index in placed.blocks(step=max(placed.shape)):
            (piece,) = placed.pieces(index)
            leaf = leaves[parameter]
            dtype = None if callable(leaf) else np.dtype(leaf.dtype)
            part = TensorPart(placed, index, dtype, _getter(leaf, piece.place, placed))
            parts.setdefault(piece.name, []).append(part)
    for name in names:
        for together in _with_common_rows(parts.pop(name)):
            step = min(part.placed.step(part.where) for part in together)
            block_indices = [part.placed.blocks(part.where, step) for part in together]
            for at in zip(*block_indices, strict=True):
                yield _block(name, together, at)


# Parts of a block: where each lies in the parameter, and its values.
Shards = Iterable[tuple[Index, np.ndarray]]


class TensorPart(NamedTuple):
    """The part of a parameter that one tensor holds; `get` gives blocks of it when called twice:
    first where hosts must act together, then wherever the values are wanted.
    """

    placed: Placed
    where: Index
    dtype: np.dtype | None
    get: Callable[[Index], Callable[[], Shards]]


def _with_common_rows(parts: list[TensorPart]) -> list[list[TensorPart]]:
    """Parts one behind another have rows of their own; parts side by side are written at once."""
    one_behind_another = parts[0].placed.row.shared == 0 and not parts[0].placed.row.takes_turns
    return [[part] for part in parts] if one_behind_another else [parts]


def _block(name: str, parts: list[TensorPart], indices: Sequence[Index]) -> TensorBlock:
    rows = [part.placed.rows(index) for part, index in zip(parts, indices, strict=True)]
    first, stop = min(r.start for r in rows), max(r.stop for r in rows)
    values = [part.get(index) for part, index in zip(parts, indices, strict=True)]

    def fill(target: np.ndarray) -> None:
        for part, get in zip(parts, values, strict=True):
            for index, shard in get():
                own = part.placed.rows(index)
                part.placed.fill(target[own.start - first : own.stop - first], shard, index)

    shape = (stop - first, *parts[0].placed.tensor_shape[1:])
    return TensorBlock(name, first, shape, frozenset(part.dtype for part in parts), fill)


def _getter(
    leaf: Any, place: Mapping[str, int], placed: Placed
) -> Callable[[Index], Callable[[], Shards]]:
    """Return a getter of blocks of one tensor's part of a parameter, whole, on this host."""
    if callable(leaf):  # made when asked for, as merged weights are: a tensor's part at once
        at = {placed.row.axes.index(axis): where for axis, where in place.items()}
        made = once(lambda: np.expand_dims(leaf(at), tuple(at)))

        def cut(index: Index) -> Callable[[], Shards]:
            inside = tuple(slice(0, 1) if n in at else part for n, part in enumerate(index))
            return lambda: [(index, made()[inside])]

        return cut
    if leaf.is_fully_addressable:
        return lambda index: lambda: _from_shards(leaf, index)

    def gather(index: Index) -> Callable[[], Shards]:
        gathered = np.asarray(multihost_utils.process_allgather(_cut(leaf, index), tiled=True))
        return lambda: [(index, gathered)]

    return gather


def _from_shards(leaf: jax.Array, index: Index) -> Shards:
    """Yield each local device's block of part `index` of a parameter, every value once."""
    for shard in leaf.addressable_shards:
        if shard.replica_id != 0:
            continue
        bounds = [cut.indices(n)[:2] for cut, n in zip(shard.index, leaf.shape, strict=True)]
        shared = tuple(
            slice(max(cut.start, start), min(cut.stop, stop))
            for cut, (start, stop) in zip(index, bounds, strict=True)
        )
        if all(cut.start < cut.stop for cut in shared):
            inside = zip(shared, bounds, strict=True)
            local = tuple(slice(cut.start - s, cut.stop - s) for cut, (s, _) in inside)
            yield shared, _cut_shard(shard.data, local)


def _cut_shard(data: jax.Array, index: Index) -> np.ndarray:
    if next(iter(data.devices())).platform == "cpu":
        return np.asarray(data)[index]  # a view of the device's memory
    return np.asarray(_cut(data, index))


def _cut(values: jax.Array, index: Index) -> jax.Array:
    """`values[index]` on the devices; compiled once for a shape, wherever the part begins."""
    part: jax.Array = _slice(
        values,
        np.array([cut.start for cut in index], np.int32),
        sizes=tuple(cut.stop - cut.start for cut in index),
    )
    return part


@functools.partial(jax.jit, static_argnames="sizes")
def _slice(values: jax.Array, starts: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(values, starts, sizes)


def _write_tensors(
    folder: Path,
    plans: Sequence[ShardPlan],
    dtypes: Mapping[str, np.dtype],
    model: HfModel,
    params: Any,
) -> None:
    """Transposed, cast and written by a few threads. Every `_BEHIND` bytes are flushed to the
    disk and read back from it while the next are written.
    """
    scratch = Scratch()

    def write_block(block: TensorBlock) -> WrittenRun:
        past = writer.place(block.name, block.first)
        values = scratch.empty(block.shape, dtypes[block.name], past=past)
        with np.errstate(over="ignore"):
            block.fill(values)
        _check_finite(block, values)
        return writer.write(block.name, values, block.first)

    if len(plans) > 1:
        write_json(folder / INDEX, index_of(plans))
    with concurrent.futures.ThreadPoolExecutor(1) as behind:
        checks = []
        for plan in plans:
            with ShardWriter(folder, [plan]) as writer:
                runs = run_ahead(write_block, _blocks(plan.tensors, model, params))
                checks += [behind.submit(_verify, some) for some in _together(runs)]
        for check in checks:
            check.result()
    _verify_headers(folder, plans)


def _together(runs: Iterable[WrittenRun]) -> Iterator[list[WrittenRun]]:
    """Run by about `_BEHIND` bytes."""
    batch: list[WrittenRun] = []
    size = 0
    for run in runs:
        batch.append(run)
        size += run.size
        if size >= _BEHIND:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_finite(block: TensorBlock, values: np.ndarray) -> None:
    """A finite value that the file's dtype turned into infinity is an error."""
    unchanged = values.dtype == np.float32 or block.dtypes == {values.dtype}
    if unchanged or not np.isinf(values).any():
        return
    exact = np.empty(block.shape, np.float32)
    block.fill(exact)
    lost = np.isinf(values) & np.isfinite(exact)
    if lost.any():
        raise ConfigError(
            f"{block.name}: has a value of {float(np.abs(exact[lost]).max()):.3g}, which "
            f"{values.dtype} cannot hold. Set save_dtype to bfloat16 or float32."
        )


def _verify(written: Sequence[WrittenRun]) -> None:
    for run in damaged(written):
        raise ConfigError(
            f"{run.file}: {run.name} reads back other than it was written. Check the disk."
        )


def _verify_headers(folder: Path, plans: Sequence[ShardPlan]) -> None:
    """Open the folder as anyone will."""
    planned = {name: place for plan in plans for name, place in plan.tensors.items()}
    read_back = {name: (t.dtype, t.shape, t.start) for name, t in open_tensors(folder).items()}
    if read_back != planned:
        raise ConfigError(f"{folder}: its headers read back other than written. Check the disk.")


def _write_configs(
    folder: Path,
    model: HfModel,
    save_dtype: str,
    tokenizer: Tokenizer | None,
    stop_ids: Sequence[int],
) -> None:
    dtype = model.dtype if save_dtype == "source" else save_dtype
    ids = _special_ids(model.config, tokenizer, stop_ids) if tokenizer is not None else {}
    config = model.family.to_hf_config(model.config, model.spec, dtype=dtype)
    config.pop("auto_map", None)  # names code that does not come along, or code of a stranger
    write_json(folder / "config.json", {**config, **ids})
    if model.generation or ids:
        write_json(folder / "generation_config.json", {**model.generation, **ids})


def _special_ids(
    config: Mapping[str, Any], tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """eos = what ends a turn and what ends a text; pad is kept out of it where another is known.

    A pad id that also means "stop" makes batched generation end at the padding.
    """
    eos = list(dict.fromkeys(i for i in (tokenizer.eos_id, *stop_ids) if i is not None))
    pads = [i for i in (tokenizer.pad_id, config.get("pad_token_id")) if i is not None]
    ids = {
        "bos_token_id": config.get("bos_token_id")
        if tokenizer.bos_id is None
        else tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or config.get("eos_token_id"),
        "pad_token_id": next((i for i in pads if i not in eos), pads[0] if pads else None),
    }
    return {key: value for key, value in ids.items() if value is not None or key in config}


def write_tokenizer(
    folder: Path, model: HfModel, tokenizer: Tokenizer | None, template: Template | None
) -> None:
    """The tokenizer's files, byte for byte unless tokens were added to it; its chat template
    replaced by the one trained with.
    """
    source = model.folder if tokenizer is None else tokenizer.folder
    changed = {} if tokenizer is None else tokenizer.changed_files
    for name in TOKENIZER:
        if name in changed:
            write(folder / name, changed[name])
        elif (source / name).exists():
            write(folder / name, read_bytes(source / name, source))
    if template is not None:
        templates = {name: text.encode() for name, text in template.exported.items()}
        _drop_chat_template(folder / "tokenizer_config.json")
    else:
        templates = {
            name: read_bytes(file, source) for name, file in chat_template_files(source).items()
        }
    for name, content in templates.items():
        file = CHAT_TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja"
        (folder / file).parent.mkdir(exist_ok=True)
        write(folder / file, content)
    if tokenizer is not None and not (folder / "tokenizer_config.json").is_file():
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **{key: token for key, token in tokens.items() if token is not None},
            },
        )


def _drop_chat_template(file: Path) -> None:
    """Remove the template of tokenizer_config.json: transformers would find a second one here."""
    if file.is_file():
        config = read_object(file, file.parent, limit=MAX_TABLE)
        if config.pop("chat_template", None) is not None:
            write_json(file, config)


@contextlib.contextmanager
def replacing(out: Path, size: int) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends without an error."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    old = out.parent / f".{out.name}.old"
    if old.is_dir() and not out.exists():  # killed between the two renames below
        old.rename(out)
    for left in [old, *out.parent.glob(f".{out.name}.new-*")]:
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise ConfigError(
            f"{out}: the model needs {size / 1e6:,.1f} MB; the disk has {free / 1e6:,.1f} MB left. "
            "Free some space or choose another folder."
        )
    fresh = out.parent / f".{out.name}.new-{os.getpid()}"
    try:
        fresh.mkdir()
        yield fresh
        flush(fresh)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
        flush(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.is_dir() and not out.exists():
            old.rename(out)
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write(file: Path, content: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
