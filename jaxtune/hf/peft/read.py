"""Adapters in: folders of `peft`, read for a model of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ModelError
from jaxtune.hf.load import HfModel, read_part, with_tokens
from jaxtune.hf.peft.names import (
    CONFIG,
    MAGNITUDE,
    PREFIX,
    ROWS,
    WEIGHTS,
    A,
    B,
    first_row,
    in_peft,
    leaf_axes,
    modules_of,
    spellings,
    table_module,
)
from jaxtune.hf.tensors import fetch, read_header
from jaxtune.model.lora import Lora
from jaxtune.storage import hub
from jaxtune.storage.safe_read import is_quick, plain, read_object, shown, some
from jaxtune.tree import unnamed

_FILES = (CONFIG, WEIGHTS, "tokenizer*.json", "special_tokens_map.json", "*.jinja", "README.md")


class Adapter(NamedTuple):
    """A folder of PEFT, read as far as it can be without its base."""

    folder: Path
    base: str
    revision: str | None
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        return int(self.config.get("r", 8))

    @property
    def alpha(self) -> float:
        return float(self.config.get("lora_alpha", 8))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids whose rows of embedding and head the adapter brings."""
        indices = self.config.get("trainable_token_indices")
        lists = list(indices.values()) if isinstance(indices, Mapping) else [indices or []]
        if any(each != lists[0] for each in lists):
            raise ModelError(
                f"{self.folder / CONFIG}: other tokens in each table; expected the same."
            )
        return tuple(int(i) for i in (lists[0] if lists else ()))


# What changes what an adapter computes and is not represented here: key -> values that do not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "lora_ga"),
}


_NUMBERS = {"r": (1, 65_536), "lora_alpha": (-1e9, 1e9), "lora_dropout": (0, 1)}
_MOST_TOKENS = 10_000_000  # far above the vocabulary of any model


def open_adapter(path_or_id: str, *, revision: str | None = None) -> Adapter:
    """Read an adapter's config.

    Raises: `ModelError` for what is none, or is of another kind.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.exists():
        folder = hub.download(path_or_id, revision=revision, patterns=_FILES)
    if (folder / "adapter" / CONFIG).is_file() and not (folder / CONFIG).is_file():
        folder = folder / "adapter"  # a run directory
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{path_or_id}: no {CONFIG} there. Expected an adapter as PEFT writes it.")
    config = read_object(folder / CONFIG, folder)
    _check_types(config, folder / CONFIG)
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            raise ModelError(
                f"{folder / CONFIG}: {key} is {plain(str(config[key]))}, which is not supported; "
                f"expected {' or '.join(str(value) for value in allowed[:2])}. Merge it with peft "
                "(merge_and_unload) and start from the merged model."
            )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / CONFIG}: no base_model_name_or_path; set it to the base model."
        )
    if not (folder / WEIGHTS).exists():
        raise ModelError(
            f"{folder}: no {WEIGHTS}. Pickled adapters (adapter_model.bin) are never read; save it "
            "again with safetensors."
        )
    return Adapter(folder, base, config.get("revision"), config)


def _check_types(config: Mapping[str, Any], file: Path) -> None:
    """Check that the values to compute with are of `peft`'s types, and of a size that can be."""

    def wrong(key: str, expected: str) -> ModelError:
        return ModelError(f"{file}: {key} is {shown(config[key])}; expected {expected}.")

    for key, (low, high) in _NUMBERS.items():
        value = config.get(key, high)
        if not _is_number(value) or not low <= value <= high:
            raise wrong(key, f"a number from {low} to {high:g}")
    if not isinstance(config.get("r", 8), int):
        raise wrong("r", "a whole number")
    for key in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(
            _is_number(value) for value in patterns.values()
        ):
            raise wrong(key, "numbers by module")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                raise wrong(key, "patterns of module names as keys") from None
            if not is_quick(pattern):
                raise wrong(key, "patterns with at most four repeats and no repeated group")
    indices = config.get("trainable_token_indices") or []
    for tokens in indices.values() if isinstance(indices, dict) else [indices]:
        if not isinstance(tokens, list) or not all(
            type(token) is int and 0 <= token < _MOST_TOKENS for token in tokens
        ):
            raise wrong("trainable_token_indices", f"token ids below {_MOST_TOKENS:,}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9


class _LayerAdapter(NamedTuple):
    """The adapter of one layer of a projection, as its file has it."""

    a: np.ndarray  # [R in]
    b: np.ndarray  # [out R]
    scale: float
    magnitude: np.ndarray | None  # [out]


class _AdapterFile:
    """The tensors of an adapter's file, by the names of a model's modules."""

    def __init__(self, adapter: Adapter, model: HfModel) -> None:
        self.path, self.model = adapter.folder / WEIGHTS, model
        self._header = read_header(self.path)
        self.keys = _keys(model, self._header, self.path)
        self.unread = set(self._header)

    def take(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """Read a tensor in f32; None in `shape` is any size."""
        key = self.keys.get(name)
        if key is None:
            raise ModelError(
                f"{self.path}: {plain(PREFIX + in_peft(self.model, name))} is missing."
            )
        tensor = self._header[key]
        if len(tensor.shape) != len(shape) or any(
            size not in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
        ):
            raise ModelError(
                f"{self.path}: {plain(key)} is {list(tensor.shape)}; {self.model.name} needs "
                f"{['R' if n is None else n for n in shape]}. It is another model's adapter."
            )
        self.unread.discard(key)
        return fetch(tensor, tuple(slice(0, n) for n in tensor.shape)).astype(np.float32)


def read_adapter(adapter: Adapter, model: HfModel) -> tuple[Lora, Any]:
    """Read how the adapter works on `model`, and its collection "lora" as numpy arrays, f32.

    Modules of one tensor get an adapter each, with the same A if the folder has one for all.
    If ranks or scales differ by module, smaller ranks are filled up with zeros and B carries the
    difference of scales.
    Raises: `ModelError` for tensors without a place, or places without one.
    """
    file = _AdapterFile(adapter, model)
    layers: dict[str, list[_LayerAdapter]] = {}
    modules = modules_of(model)
    for names in _by_shared_tensor(model, modules):
        for module in _adapted_modules(file, modules[names[0]]):
            for name, layer in zip(names, _read_module(adapter, file, names, module), strict=True):
                layers.setdefault(name, []).append(layer)
    if not layers:
        raise ModelError(f"{file.path}: none of its adapters is of a projection of {model.name}.")
    lora = _lora(adapter, layers)
    leaves: dict[str, np.ndarray] = {}
    for name, of_layers in layers.items():
        leaves |= _leaves(model, name, of_layers, lora)
    if lora.tokens:
        leaves |= _read_rows(model, adapter, file.take)
    if file.unread:
        raise ModelError(f"{file.path}: {some(sorted(file.unread))} have no place in {model.name}.")
    return lora, unnamed(leaves)


def _by_shared_tensor(model: HfModel, modules: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """Names of projections together that are rows of one tensor, in the order of their rows."""
    sharing: dict[str, list[str]] = {}
    for name, each in modules.items():
        sharing.setdefault(each[0], []).append(name)
    for names in sharing.values():
        yield sorted(names, key=lambda name: first_row(model, name))


def _adapted_modules(file: _AdapterFile, modules: Sequence[str]) -> Sequence[str]:
    """All of the modules of a projection, one a layer, or none."""
    present = [f"{module}{A}" in file.keys for module in modules]
    if any(present) and not all(present):
        raise ModelError(
            f"{file.path}: adapts {sum(present)} of {len(present)} layers as "
            f"{modules[0]}; layers that are repeated are adapted together here. "
            "Merge it with peft (merge_and_unload) and start from the merged model."
        )
    return modules if all(present) else ()


def _read_module(
    adapter: Adapter, file: _AdapterFile, names: Sequence[str], module: str
) -> Iterator[_LayerAdapter]:
    """Read one module's adapter, for each of the projections `names` that share it."""
    model, config = file.model, adapter.config
    out, inputs = model.placed[f"{names[0]}/kernel"].tensor_shape
    a = file.take(f"{module}{A}", (None, inputs))
    b = file.take(f"{module}{B}", (out, len(a)))
    magnitude = file.take(f"{module}{MAGNITUDE}", (out,)) if config.get("use_dora") else None
    module_key = file.keys[f"{module}{A}"].removeprefix(PREFIX).removesuffix(A)
    alpha = float(_pattern(config.get("alpha_pattern"), module_key, adapter.alpha))
    scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
    for name, (own_a, own_b) in zip(names, _split(model, names, a, b, adapter.rank), strict=True):
        start = first_row(model, name)
        own = None if magnitude is None else magnitude[start : start + len(own_b)]
        yield _LayerAdapter(own_a, own_b, scale, own)


def _lora(adapter: Adapter, layers: Mapping[str, Sequence[_LayerAdapter]]) -> Lora:
    """The one rank and scale for all layers, which `_leaves` brings each of them to."""
    config, rank, alpha = adapter.config, adapter.rank, adapter.alpha
    all_layers = [layer for of_projection in layers.values() for layer in of_projection]
    largest = max(len(layer.a) for layer in all_layers)
    if alpha == 0 and any(layer.scale for layer in all_layers):
        alpha = float(rank)  # B cannot carry what nought is multiplied by
    return Lora(
        r=largest,
        alpha=alpha if largest == rank else alpha * largest / rank,
        targets=frozenset(layers),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        tokens=adapter.tokens,
    )


def _keys(model: HfModel, header: Mapping[str, Any], file: Path) -> dict[str, str]:
    """A tensor's name by the modules of a model of text alone -> its key in the file."""
    keys = {key.removeprefix(PREFIX): key for key in header if key.startswith(PREFIX)}
    if model.wrapper is None:
        return keys
    return model.wrapper.tensors(keys, where=str(file))[0]


def _pattern(patterns: Any, module: str, otherwise: float) -> float:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return otherwise


def _split(
    model: HfModel, names: Sequence[str], a: np.ndarray, b: np.ndarray, rank: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A [R in] and B [rows R] of each projection of a module; its own block where it has one."""
    count = len(names)
    bounds = [first_row(model, name) for name in names] + [len(b)]
    blocks = [slice(n * rank, (n + 1) * rank) for n in range(count)]
    apart = count > 1 and len(a) == count * rank
    for n in range(count):
        rows = b[bounds[n] : bounds[n + 1]]
        others = np.delete(rows, blocks[n], axis=1) if apart else rows
        apart = apart and not others.any()
    for n in range(count):
        rows = b[bounds[n] : bounds[n + 1]]
        yield (a[blocks[n]], rows[:, blocks[n]]) if apart else (a, rows)


def _leaves(
    model: HfModel, name: str, layers: Sequence[_LayerAdapter], lora: Lora
) -> dict[str, np.ndarray]:
    placed = model.placed[f"{name}/kernel"]
    sizes = dict(zip(placed.row.axes, placed.shape, strict=True)) | {"R": lora.r}
    leaves: dict[str, list[np.ndarray]] = {}
    for layer in layers:
        pad = lora.r - len(layer.a)
        rescaled = np.float32(layer.scale / lora.scale if lora.scale else 1)
        tensors = {
            "a": np.pad(layer.a, ((0, pad), (0, 0))),
            "b": np.pad(layer.b * rescaled, ((0, 0), (0, pad))),
            "magnitude": layer.magnitude,
        }
        for leaf, (axes, peft_axes) in leaf_axes(placed).items():
            values = tensors[leaf]
            if values is not None:
                unfolded = values.reshape([sizes[axis] for axis in peft_axes])
                here = np.einsum(f"{peft_axes}->{axes}", unfolded)
                leaves.setdefault(f"{name}/{leaf}", []).append(here)
    return {leaf: np.stack(values) for leaf, values in leaves.items()}


def _read_rows(
    model: HfModel, adapter: Adapter, take: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows of the tables; those of a table that the adapter leaves alone are the base's."""
    indices = adapter.config["trainable_token_indices"]
    shape = (len(adapter.tokens), model.spec.width)
    rows_of_tables = {}
    for table in ("embed/table", *(() if model.spec.tie_head else ("head/kernel",))):
        module = table_module(model, table)
        by_module = isinstance(indices, Mapping)
        if _is_named(model, module, indices) if by_module else table == "embed/table":
            rows = take(f"{module}{ROWS}", shape)
        else:
            placed = model.placed[table]
            axis = placed.row.axes.index("V")
            whole = read_part(model, table, tuple(slice(0, n) for n in placed.shape))
            rows = np.moveaxis(whole, axis, 0)[list(adapter.tokens)]
        rows_of_tables[f"{table.split('/')[0]}/rows"] = rows
    return rows_of_tables


def _is_named(model: HfModel, module: str, names: Mapping[str, Any]) -> bool:
    return any(
        there == name or there.endswith(f".{name}")
        for there in spellings(model, module)
        for name in names
    )


def on_model(adapter: Adapter, model: HfModel) -> tuple[HfModel, Lora, Any]:
    """The model with rows for the tokens the adapter brings, and what `read_adapter` says of it."""
    model = with_token_rows(model, adapter.tokens)
    return model, *read_adapter(adapter, model)


def with_token_rows(model: HfModel, tokens: Sequence[int]) -> HfModel:
    """The model with tables that reach all `tokens`, whose rows are an adapter's."""
    rows = model.spec.vocab
    return with_tokens(model, [token for token in tokens if token >= rows], trained=rows)
