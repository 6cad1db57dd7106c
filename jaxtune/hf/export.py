"""Parameters -> a folder in Hugging Face format that transformers, vLLM and we load alike.

The folder is written beside its place, read back and compared bit for bit with the parameters,
and only then renamed into it: whatever kills an export leaves the previous folder or none, never
half of one. Host memory holds one tensor at a time. What the model stops at is one list of ids,
the same in `config.json`, `generation_config.json` and the tokenizer.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.config import ConfigError
from jaxtune.hf.layout import Piece, Placed
from jaxtune.hf.load import HfModel
from jaxtune.hf.tensors import CODES, INDEX, ShardWriter, fetch, index_of, open_tensors, plan_shards
from jaxtune.tree import named
from jaxtune.untrusted import MAX_TABLE, read_bytes, read_object

# Everything a tokenizer of transformers 4 or 5 may be made of, apart from its chat template.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_CHAT_TEMPLATE = "chat_template.jinja"


class Tokenizer(Protocol):
    """What the export needs of a tokenizer; `data.tokenizer` has it."""

    @property
    def folder(self) -> Path: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def changed_files(self) -> Mapping[str, bytes]: ...


class Template(Protocol):
    """What the export needs of a template: the jinja text `apply_chat_template` will use."""

    @property
    def chat_template(self) -> str | None: ...


class Exported(NamedTuple):
    """What was written: every tensor was read back and equals its parameter bit for bit."""

    folder: Path
    files: tuple[str, ...]
    tensors: int
    size: int  # bytes of tensor values


def export_model(
    out: Path,
    *,
    model: HfModel,
    params: Any,
    save_dtype: str = "source",
    tokenizer: Tokenizer | None,
    template: Template | None,
    stop_ids: Sequence[int] = (),
    card: str,
    max_shard_bytes: int = 5_000_000_000,
) -> Exported:
    """Writes `params` (sharded or not) as `out`, replacing an earlier export there.

    `save_dtype` is float32, bfloat16, float16, or source: each tensor as the checkpoint it came
    from had it, else what `config.json` states. `stop_ids` are the ends of turn that were trained;
    the tokenizer's eos joins them. Without a tokenizer the source folder's files and ids are taken
    over as they are. Every host calls this; the first one writes. Raises `ConfigError` when the
    folder cannot be written or a value does not fit `save_dtype`.
    """
    check_target(out, model)
    dtypes = _dtypes(model, save_dtype)
    plans = plan_shards(
        {
            name: (dtypes[name], placed.tensor_shape)
            for name, placed in _in_file_order(model).items()
        },
        max_shard_bytes,
    )
    size = index_of(plans)["metadata"]["total_size"]
    try:
        if jax.process_index() != 0:
            for _ in range(2):  # once to be written, once to be verified
                for _ in _values(model, params, dtypes):
                    pass
        else:
            with replacing(out, size) as folder:
                with ShardWriter(folder, plans) as writer:
                    for name, values in _values(model, params, dtypes):
                        writer.write(name, values)
                if len(plans) > 1:
                    write_json(folder / INDEX, index_of(plans))
                _write_configs(folder, model, save_dtype, tokenizer, stop_ids)
                write_tokenizer(folder, model, tokenizer, template)
                write(folder / "README.md", card.encode())
                _verify(folder, _values(model, params, dtypes))
        multihost_utils.sync_global_devices("export")
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot write the model ({size / 1e6:,.1f} MB): {error.strerror or error}. "
            "Free some space or choose another folder; an earlier export there is untouched."
        ) from None
    return Exported(out, tuple(plan.file for plan in plans), len(dtypes), size)


def check_target(out: Path, model: HfModel) -> None:
    """Refuses, before any work, to replace what is not an export or what is being read."""
    if model.tensors and out.resolve() == model.folder.resolve():
        raise ConfigError(
            f"{out}: is the model being read; an export there would destroy it. "
            "Choose another folder."
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; an export is a folder. Choose another place.")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ConfigError(
            f"{out}: holds files that are no exported model (no config.json), and an export "
            "replaces the whole folder. Choose another folder, or empty this one."
        )


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
    """Sorts `layers.10` after `layers.9`."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]


def _values(
    model: HfModel, params: Any, dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as it will stand in the file, gathered one at a time on every host."""
    leaves = named(params)
    if leaves.keys() != model.placed.keys():
        raise ValueError(f"not the model's parameters: {sorted(leaves.keys() ^ model.placed)[:4]}")
    parts: dict[str, list[tuple[Placed, Piece]]] = {}
    for placed in model.placed.values():
        for piece in placed.pieces():
            parts.setdefault(piece.name, []).append((placed, piece))
    for name, made_of in parts.items():
        tensor = None
        for placed, piece in made_of:
            at = {placed.row.axes.index(axis): where for axis, where in piece.place.items()}
            tensor = placed.write(_gather(leaves[placed.parameter], at), tensor)
        assert tensor is not None
        yield name, _cast(name, tensor, dtypes[name])


def _gather(leaf: Any, at: Mapping[int, int]) -> np.ndarray:
    """The part of a sharded parameter at `at` (axis -> index), whole, on this host.

    Always a part or a copy: JAX keeps the host's view of an array as long as the array lives.
    """
    if callable(leaf):  # made when asked for, as merged weights are
        return leaf(at)
    part = leaf if at else jax.numpy.copy(leaf)
    for axis in sorted(at, reverse=True):
        part = _take(part, at[axis], axis)
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


@functools.partial(jax.jit, static_argnames="axis")
def _take(values: jax.Array, index: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(values, index, axis, keepdims=False)


def _cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if np.isinf(cast).any() and np.isfinite(values).all():
        raise ConfigError(
            f"{name}: has a value of {float(np.abs(values).max()):.3g}, which {dtype} cannot hold. "
            "Set save_dtype to bfloat16 or float32."
        )
    return cast


def _verify(folder: Path, values: Iterator[tuple[str, np.ndarray]]) -> None:
    written = open_tensors(folder)
    count = 0
    for name, expected in values:
        found = fetch(written[name], tuple(slice(0, n) for n in expected.shape))
        if found.dtype != expected.dtype or not _same_bytes(found, expected):
            raise ConfigError(
                f"{folder}: {name} reads back other than it was written. Check the disk."
            )
        count += 1
    if count != len(written):
        raise ValueError(f"{len(written)} tensors written, {count} verified")


def _same_bytes(a: np.ndarray, b: np.ndarray, block: int = 1 << 24) -> bool:
    """Bit for bit, a block at a time: comparing floats would call two NaNs different."""
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    cuts = (slice(start, start + block) for start in range(0, a.size, block))
    return a.size == b.size and all(np.array_equal(a[cut], b[cut]) for cut in cuts)


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
    for name in _TOKENIZER_FILES:
        if name in changed:
            write(folder / name, changed[name])
        elif (source / name).exists():
            write(folder / name, read_bytes(source / name, source))
    text = None if template is None else template.chat_template
    if text is not None:
        write(folder / _CHAT_TEMPLATE, text.encode())
        _drop_chat_template(folder / "tokenizer_config.json")
    elif (source / _CHAT_TEMPLATE).exists():
        write(folder / _CHAT_TEMPLATE, read_bytes(source / _CHAT_TEMPLATE, source))
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
    """One template only: transformers would find a second one here."""
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
        _sync(fresh)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
        _sync(out.parent)
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


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
