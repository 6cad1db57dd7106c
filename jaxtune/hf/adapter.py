"""Adapters in PEFT's format: a folder `peft` loads unchanged, and folders of `peft` read back.

    adapter_config.json          what is adapted and how; the base by name
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight [R in], lora_B [out R], ...

Modules have the names of the family's rows. Several projections in one tensor (q, k and v in
qkv_proj) are one module there: their adapters stand side by side in it, A stacked and B block by
block, at a rank as many times larger, which is the same function. Merged weights are computed from
the model folder's own tensors, in float32, one tensor at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from jaxtune import __version__, hub
from jaxtune.config import ConfigError, ModelError, nearest
from jaxtune.hf.export import Template, Tokenizer, replacing, write, write_json, write_tokenizer
from jaxtune.hf.folders import ADAPTER as CONFIG
from jaxtune.hf.folders import check_replaceable
from jaxtune.hf.layout import Placed
from jaxtune.hf.load import HfModel, load_params, read_part, with_tokens
from jaxtune.hf.tensors import fetch, read_header
from jaxtune.model import decoder
from jaxtune.model.lora import Lora, merged_kernel
from jaxtune.tree import map_named, named, unnamed
from jaxtune.untrusted import open_inside, plain, read_object, some

WEIGHTS = "adapter_model.safetensors"
ALL = "all-linear"
_PREFIX = "base_model.model."
_FILES = (CONFIG, WEIGHTS, "tokenizer*.json", "special_tokens_map.json", "*.jinja", "README.md")
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_ROWS = ".token_adapter.trainable_tokens_delta"
_SAMPLES, _SAMPLE = 16, 4096  # places of a file that its digest reads, and bytes at each

Leaves = Mapping[str, np.ndarray]  # names in the collection "lora" -> values on this host


# -- which projections ---------------------------------------------------------------------------


def modules_of(model: HfModel) -> dict[str, tuple[str, ...]]:
    """Projection -> the modules of transformers it is or is a part of, one per layer."""
    return {
        name: tuple(_module(piece.name) for piece in model.placed[f"{name}/kernel"].pieces())
        for name in decoder.projections(model.spec)
    }


def resolve_targets(model: HfModel, targets: str | Sequence[str]) -> frozenset[str]:
    """The projections that `targets` means: all-linear (all but the head), names of modules as
    transformers has them (`q_proj`, `self_attn.q_proj`, several with commas), or a regex that
    matches whole names (`.*layers\\.\\d+\\.mlp\\..*`).

    Raises `ConfigError` for what matches nothing, or a part of the layers that are repeated.
    """
    known = modules_of(model)
    if targets == ALL:
        return frozenset(known)
    words = targets.split(",") if isinstance(targets, str) else targets
    chosen: set[str] = set()
    for word in map(str.strip, words if _are_names(words) else [str(targets)]):
        matches = _matcher(word)
        found = {name: [matches(m) for m in modules] for name, modules in known.items()}
        hit = {name for name, hits in found.items() if any(hits)}
        if not hit:
            names = sorted({m.rpartition(".")[2] for each in known.values() for m in each})
            raise ConfigError(
                f"lora.targets: '{word}' matches none of {model.name}'s projections. There are: "
                f"{', '.join(names)}; or {ALL}.{nearest(word, [*names, ALL])}"
            )
        for name in sorted(hit):
            if not all(found[name]):
                raise ConfigError(
                    f"lora.targets: '{word}' matches {sum(found[name])} of the {len(known[name])} "
                    f"layers that are repeated with {known[name][0]}. They are adapted together; "
                    "choose projections, not layers."
                )
        chosen |= hit
    return frozenset(chosen)


def _are_names(words: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\s*[\w.]+\s*", word) for word in words)


def _matcher(word: str) -> Callable[[str], bool]:
    if _are_names([word]):
        return lambda module: module == word or module.endswith(f".{word}")
    try:
        pattern = re.compile(word)
    except re.error as error:
        raise ConfigError(f"lora.targets: '{word}' is no regex: {error}.") from None
    return lambda module: pattern.fullmatch(module) is not None


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


# -- the base ------------------------------------------------------------------------------------


def digests(model: HfModel) -> dict[str, str]:
    """File -> sha256 of its size, its header and samples of its values: cheap, and another
    fine-tuning of the same architecture has others."""
    return {
        file.name: _digest(file, model.folder)
        for file in sorted({tensor.file for tensor in model.tensors.values()})
    }


def _digest(file: Path, folder: Path) -> str:
    now = file.stat()
    return _digest_now(file, folder, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _digest_now(file: Path, folder: Path, identity: tuple[int, ...]) -> str:
    """Read once a run for checkpoint, card and comparison; a changed file has another identity."""
    with open(open_inside(file, folder), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        found = hashlib.sha256(str(size).encode() + start)
        found.update(stream.read(int.from_bytes(start, "little")))
        begin = stream.tell()
        for place in np.linspace(begin, max(begin, size - _SAMPLE), _SAMPLES).astype(int):
            stream.seek(int(place))
            found.update(stream.read(_SAMPLE))
    return found.hexdigest()


# -- writing -------------------------------------------------------------------------------------


class WrittenAdapter(NamedTuple):
    """`tensors` were read back and equal what was given."""

    folder: Path
    tensors: int
    size: int  # bytes


def on_host(adapters: Any) -> Leaves:
    """The collection as whole numpy arrays by name, on every host."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return {name: whole(leaf) for name, leaf in named(adapters).items()}


def check_adapter_target(out: Path) -> None:
    """Refuses, before any work, to replace what is no adapter."""
    check_replaceable(out, marker=CONFIG, kind="adapter", export="an adapter")


def write_adapter(
    out: Path,
    *,
    model: HfModel,
    lora: Lora,
    adapters: Any,
    tokenizer: Tokenizer | None,
    template: Template | None,
    revision: str | None = None,
) -> WrittenAdapter:
    """Writes the adapters of `model` as `out`, in place of an earlier adapter there.

    With a tokenizer its files lie there too: tokens may have been added to it, and
    `AutoPeftModelForCausalLM` grows the base for them by that. Raises `ConfigError`.
    """
    check_adapter_target(out)
    leaves = on_host(adapters)
    tensors, patterns = _as_peft(model, lora, leaves)
    size = sum(values.nbytes for values in tensors.values())
    try:
        if jax.process_index() == 0:
            with replacing(out, size) as folder:
                config = {**_config(model, lora, revision), **patterns}
                write_json(folder / CONFIG, config)
                text = safetensors.numpy.save(dict(tensors), metadata={"format": "pt"})
                write(folder / WEIGHTS, text)
                if tokenizer is not None:
                    write_tokenizer(folder, model, tokenizer, template)
                write(folder / "README.md", _card(model, lora, config).encode())
                _verify(folder / WEIGHTS, tensors)
        multihost_utils.sync_global_devices("adapter")
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot write the adapter ({size / 1e6:,.1f} MB): {error.strerror or error}."
        ) from None
    return WrittenAdapter(out, len(tensors), size)


def _verify(file: Path, tensors: Leaves) -> None:
    written = read_header(file)
    for name, values in tensors.items():
        found = fetch(written[name], tuple(slice(0, n) for n in values.shape))
        if found.tobytes() != np.ascontiguousarray(values).tobytes():
            raise ConfigError(f"{file}: {name} reads back other than written. Check the disk.")


def _as_peft(
    model: HfModel, lora: Lora, leaves: Leaves
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PEFT's tensors, and the entries of its config for modules of another rank."""
    parts: dict[str, list[tuple[str, int]]] = {}  # module -> its projections and their layer
    modules = modules_of(model)
    for name in _adapted(leaves):
        for index, module in enumerate(modules[name]):
            parts.setdefault(module, []).append((name, index))
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, made_of in parts.items():
        made_of.sort(key=lambda part: _start(model, part[0]))
        count = len(made_of)
        whole = _rows_in(model, made_of[0][0])
        a = np.concatenate([_a(model, leaves, *part) for part in made_of])
        b = np.zeros((whole, lora.r * count), np.float32)
        for n, part in enumerate(made_of):
            start, block = _start(model, part[0]), _b(model, leaves, *part)
            b[start : start + len(block), n * lora.r : (n + 1) * lora.r] = block
        tensors[f"{_PREFIX}{module}{_A}"] = np.ascontiguousarray(a)
        tensors[f"{_PREFIX}{module}{_B}"] = b
        if lora.dora:
            lengths = [_magnitude(model, leaves, *part) for part in made_of]
            tensors[f"{_PREFIX}{module}{_MAGNITUDE}"] = np.concatenate(lengths)
        if count > 1:
            key = module.rpartition(".")[2]
            ranks[key] = lora.r * count
            alphas[key] = lora.alpha * (math.sqrt(count) if lora.rslora else count)
    for table in ("embed/table", "head/kernel"):
        rows = leaves.get(f"{table.split('/')[0]}/rows")
        if rows is not None:
            tensors[f"{_PREFIX}{_table_module(model, table)}{_ROWS}"] = rows
    return tensors, {"rank_pattern": ranks, "alpha_pattern": alphas}


def _adapted(leaves: Leaves) -> list[str]:
    return [name.removesuffix("/a") for name in leaves if name.endswith("/a")]


def _a(model: HfModel, leaves: Leaves, name: str, layer: int) -> np.ndarray:
    """[R in] of one layer."""
    placed = model.placed[f"{name}/kernel"]
    a = leaves[f"{name}/a"][layer]
    shared = [axis for axis in placed.row.axes if axis in placed.row.groups[1]]
    order = [shared.index(axis) for axis in placed.row.groups[1]]
    return np.ascontiguousarray(a.transpose(len(shared), *order)).reshape(a.shape[-1], -1)


def _b(model: HfModel, leaves: Leaves, name: str, layer: int) -> np.ndarray:
    """[out R] of one layer, the rows of this projection alone."""
    placed = model.placed[f"{name}/kernel"]
    b = leaves[f"{name}/b"][layer]
    added = [axis for axis in placed.row.axes if axis in placed.row.groups[0]]
    order = [1 + added.index(axis) for axis in placed.row.groups[0]]
    return np.ascontiguousarray(b.transpose(*order, 0)).reshape(-1, b.shape[0])


def _magnitude(model: HfModel, leaves: Leaves, name: str, layer: int) -> np.ndarray:
    placed = model.placed[f"{name}/kernel"]
    values = leaves[f"{name}/magnitude"][layer]
    added = [axis for axis in placed.row.axes if axis in placed.row.groups[0]]
    return values.transpose([added.index(axis) for axis in placed.row.groups[0]]).reshape(-1)


def _start(model: HfModel, name: str) -> int:
    """The first row of a projection in its tensor."""
    part = model.placed[f"{name}/kernel"].part
    if part is not None and part.step != 1:
        raise ModelError(f"{model.name}: {name} takes turns with others; it has no PEFT adapter.")
    return 0 if part is None else part.start


def _rows_in(model: HfModel, name: str) -> int:
    return model.placed[f"{name}/kernel"].tensor_shape[0]


def _table_module(model: HfModel, parameter: str) -> str:
    return _module(next(model.placed[parameter].pieces()).name)


def _config(model: HfModel, lora: Lora, revision: str | None) -> dict[str, Any]:
    """What `peft.LoraConfig` reads; keys that are absent have its defaults."""
    tables = ["embed/table", *(() if model.spec.tie_head else ("head/kernel",))]
    tokens = {_table_module(model, table).rpartition(".")[2]: list(lora.tokens) for table in tables}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "revision": revision,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": _target_modules(model, lora),
        "trainable_token_indices": tokens if lora.tokens else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _target_modules(model: HfModel, lora: Lora) -> list[str]:
    """Short names where they mean the adapted modules and no others, else full ones."""
    modules = modules_of(model)
    wanted = {m for name in lora.targets or modules for m in modules[name]}
    every = {_module(piece.name) for placed in model.placed.values() for piece in placed.pieces()}
    short = {module.rpartition(".")[2] for module in wanted}
    meant = {module for module in every if module.rpartition(".")[2] in short}
    return sorted(short if meant == wanted else wanted)


def _card(model: HfModel, lora: Lora, config: Mapping[str, Any]) -> str:
    header = ["library_name: peft", "tags: [jaxtune, sft, lora]"]
    if hub.is_id(model.name) and not Path(model.name).exists():
        header.append(f"base_model: {model.name}")
    kind = " + ".join(("rsLoRA" if lora.rslora else "LoRA", *(("DoRA",) if lora.dora else ())))
    files = "\n".join(f"| `{file}` | `{found}` |" for file, found in digests(model).items())
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# Adapter of {Path(model.name).name}",
            "",
            f"{kind} of rank {lora.r}, alpha {lora.alpha:g}, on "
            f"{', '.join(config['target_modules'])}; trained with "
            f"[jaxtune](https://pypi.org/project/jaxtune/) {__version__}. It belongs to "
            f"`{model.name}`, with these files",
            "(sha256 of size, header and samples of the values):",
            "",
            "| file | digest |",
            "|---|---|",
            files,
            "",
        ]
    )


# -- reading -------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """A folder of PEFT understood as far as it goes without its base."""

    folder: Path
    base: str
    revision: str | None
    config: Mapping[str, Any]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids whose rows of embedding and head the adapter brings."""
        given = self.config.get("trainable_token_indices")
        lists = list(given.values()) if isinstance(given, Mapping) else [given or []]
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


def open_adapter(path_or_id: str, *, revision: str | None = None) -> Adapter:
    """Reads an adapter's config. Raises `ModelError` for what is none, or is of another kind."""
    folder = Path(path_or_id).expanduser()
    if not folder.exists():
        folder = hub.download(path_or_id, revision=revision, patterns=_FILES)
    if (folder / "adapter" / CONFIG).is_file() and not (folder / CONFIG).is_file():
        folder = folder / "adapter"  # a run directory
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{path_or_id}: no {CONFIG} there. Expected an adapter as PEFT writes it.")
    config = read_object(folder / CONFIG, folder)
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


def read_adapter(adapter: Adapter, model: HfModel) -> tuple[Lora, Any]:
    """How the adapter works on `model`, and its collection "lora" as numpy arrays, f32.

    Modules of one tensor get an adapter each, with the same A where the folder has one for all.
    Where ranks or scales differ by module, smaller ranks are filled up with zeros and B carries the
    difference of scales. Raises `ModelError` for tensors without a place, or places without one.
    """
    file = adapter.folder / WEIGHTS
    header = read_header(file)
    left = set(header)

    def take(name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        key = _PREFIX + name
        if key not in header:
            raise ModelError(f"{file}: {plain(key)} is missing.")
        found = header[key]
        if len(found.shape) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found.shape, strict=True)
        ):
            raise ModelError(
                f"{file}: {plain(key)} is {list(found.shape)}; {model.name} needs "
                f"{['R' if n is None else n for n in shape]}. It is another model's adapter."
            )
        left.discard(key)
        return fetch(found, tuple(slice(0, n) for n in found.shape)).astype(np.float32)

    config = adapter.config
    dora, rslora = bool(config.get("use_dora")), bool(config.get("use_rslora"))
    rank, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    modules = modules_of(model)
    sharing: dict[str, list[str]] = {}
    for name, each in modules.items():
        sharing.setdefault(each[0], []).append(name)
    layers: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for names in sharing.values():
        names.sort(key=lambda name: _start(model, name))
        present = [f"{_PREFIX}{module}{_A}" in header for module in modules[names[0]]]
        if not any(present):
            continue
        if not all(present):
            raise ModelError(
                f"{file}: adapts {sum(present)} of {len(present)} layers as "
                f"{modules[names[0]][0]}; layers that are repeated are adapted together here. "
                "Merge it with peft (merge_and_unload) and start from the merged model."
            )
        for module in modules[names[0]]:
            placed = model.placed[f"{names[0]}/kernel"]
            out, inputs = placed.tensor_shape
            a = take(f"{module}{_A}", (None, inputs))
            b = take(f"{module}{_B}", (out, len(a)))
            length = take(f"{module}{_MAGNITUDE}", (out,)) if dora else None
            own_alpha = float(_pattern(config.get("alpha_pattern"), module, alpha))
            scale = own_alpha / (math.sqrt(len(a)) if rslora else len(a))
            for name, parts in zip(names, _split(model, names, a, b, rank), strict=True):
                rows = slice(_start(model, name), _start(model, name) + len(parts[1]))
                layers.setdefault(name, []).append(
                    (
                        *parts,
                        np.asarray(scale, np.float32),
                        *(() if length is None else (length[rows],)),
                    )
                )
    if not layers:
        raise ModelError(f"{file}: none of its adapters is of a projection of {model.name}.")
    largest = max(len(layer[0]) for each in layers.values() for layer in each)
    lora = Lora(
        r=largest,
        alpha=alpha if largest == rank else alpha * largest / rank,
        targets=frozenset(layers),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=rslora,
        dora=dora,
        tokens=adapter.tokens,
    )
    leaves: dict[str, np.ndarray] = {}
    for name, found in layers.items():
        leaves |= _leaves(model, name, found, lora)
    if lora.tokens:
        leaves |= _read_rows(model, adapter, take)
    if left:
        raise ModelError(f"{file}: {some(sorted(left))} have no place in {model.name}.")
    return lora, unnamed(leaves)


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
    bounds = [_start(model, name) for name in names] + [len(b)]
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
    model: HfModel, name: str, layers: Sequence[tuple[np.ndarray, ...]], lora: Lora
) -> dict[str, np.ndarray]:
    placed = model.placed[f"{name}/kernel"]
    sizes = dict(zip(placed.row.axes, placed.shape, strict=True))
    shared = [axis for axis in placed.row.axes if axis in placed.row.groups[1]]
    added = [axis for axis in placed.row.axes if axis in placed.row.groups[0]]
    found: dict[str, list[np.ndarray]] = {"a": [], "b": [], "magnitude": []}
    for a, b, scale, *length in layers:
        pad = lora.r - len(a)
        a = np.pad(a, ((0, pad), (0, 0)))
        b = np.pad(b * (scale / np.float32(lora.scale)), ((0, 0), (0, pad)))
        inner = a.reshape(lora.r, *(sizes[axis] for axis in placed.row.groups[1]))
        order = [1 + placed.row.groups[1].index(axis) for axis in shared]
        found["a"].append(inner.transpose(*order, 0))
        outer = b.reshape(*(sizes[axis] for axis in placed.row.groups[0]), lora.r)
        order = [placed.row.groups[0].index(axis) for axis in added]
        found["b"].append(outer.transpose(len(added), *order))
        for values in length:
            split = values.reshape([sizes[axis] for axis in placed.row.groups[0]])
            found["magnitude"].append(split.transpose(order))
    return {f"{name}/{leaf}": np.stack(values) for leaf, values in found.items() if values}


def _read_rows(
    model: HfModel, adapter: Adapter, take: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows of the tables; those of a table that the adapter leaves alone are the base's."""
    given = adapter.config["trainable_token_indices"]
    shape = (len(adapter.tokens), model.spec.width)
    found = {}
    for table in ("embed/table", *(() if model.spec.tie_head else ("head/kernel",))):
        module = _table_module(model, table)
        named_here = not isinstance(given, Mapping) and table == "embed/table"
        if named_here or (isinstance(given, Mapping) and _is_named(module, given)):
            rows = take(f"{module}{_ROWS}", shape)
        else:
            placed = model.placed[table]
            axis = placed.row.axes.index("V")
            whole = read_part(model, table, tuple(slice(0, n) for n in placed.shape))
            rows = np.moveaxis(whole, axis, 0)[list(adapter.tokens)]
        found[f"{table.split('/')[0]}/rows"] = rows
    return found


def _is_named(module: str, names: Mapping[str, Any]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def on_model(adapter: Adapter, model: HfModel) -> tuple[HfModel, Lora, Any]:
    """The model with rows for the tokens the adapter brings, and what `read_adapter` says of it."""
    model = with_token_rows(model, adapter.tokens)
    return model, *read_adapter(adapter, model)


def with_token_rows(model: HfModel, tokens: Sequence[int]) -> HfModel:
    """The model with tables that reach all `tokens`, whose rows are an adapter's."""
    rows = model.spec.vocab
    return with_tokens(model, [token for token in tokens if token >= rows], trained=rows)


# -- merging -------------------------------------------------------------------------------------


def merged(model: HfModel, lora: Lora, adapters: Any) -> Any:
    """A tree for `export_model`: each leaf a function that gives a part of the merged parameter.

    The base is read anew from the model folder, in float32, whatever was trained on: merging into
    quantised or rounded weights would keep their error.
    """
    leaves = on_host(adapters)
    projections = set(_adapted(leaves))

    def part_of(name: str, placed: Placed) -> Callable[[Mapping[int, int]], np.ndarray]:
        def part(at: Mapping[int, int]) -> np.ndarray:
            index = tuple(
                slice(at[axis], at[axis] + 1) if axis in at else slice(0, size)
                for axis, size in enumerate(placed.shape)
            )
            values = read_part(model, name, index).squeeze(tuple(at))
            module, _, leaf = name.rpartition("/")
            if leaf == "kernel" and module in projections:
                own = {
                    key: leaves[f"{module}/{key}"][at[0]]
                    for key in ("a", "b", "magnitude")
                    if f"{module}/{key}" in leaves
                }
                letters = "".join(placed.row.axes[1:])
                shared = "".join(x for x in letters if x in placed.row.groups[1])
                return merged_kernel(own, values, letters, shared, lora)
            if f"{module}/rows" in leaves and leaf in ("table", "kernel"):
                by_token = np.moveaxis(values, placed.row.axes.index("V"), 0)
                by_token[list(lora.tokens)] = leaves[f"{module}/rows"]
            return values

        return part

    return unnamed({name: part_of(name, placed) for name, placed in model.placed.items()})


def merged_params(model: HfModel, lora: Lora, adapters: Any, placed: Any, dtype: Any) -> Any:
    """The merged parameters in `dtype`, each leaf in its sharding of the tree `placed`; one
    adapted parameter at a time stands whole on the host."""
    names = {f"{name}/kernel" for name in _adapted(on_host(adapters))}
    names |= {"embed/table", "head/kernel"} if lora.tokens else set()
    parts = named(merged(model, lora, adapters))
    where = named(placed)

    def replace(name: str, leaf: jax.Array) -> jax.Array:
        if name not in names:
            return leaf
        layers = range(leaf.shape[0]) if "L" in model.placed[name].row.spread else None
        part = parts[name]
        whole = part({}) if layers is None else np.stack([part({0: at}) for at in layers])
        return jax.device_put(whole.astype(np.dtype(dtype)), where[name])

    return map_named(replace, load_params(model, placed, dtype))


def base_meta(model: HfModel) -> dict[str, Any]:
    """What a checkpoint of adapters says of its base."""
    return {"name": model.name, "digests": digests(model)}


def check_base(meta: Mapping[str, Any], model: HfModel, *, where: str) -> None:
    """Refuses adapters that were trained beside other weights. Raises `ConfigError`."""
    before = meta.get("base") or {}
    if before.get("digests") != digests(model):
        raise ConfigError(
            f"{where}: was trained beside {before.get('name')}, whose weights are not those of "
            f"{model.name} now. Restore the base model, or choose another output_dir."
        )


def lora_meta(lora: Lora) -> dict[str, Any]:
    """What a checkpoint says of its adapters; `lora_from_meta` reads it."""
    targets = sorted(lora.targets) if lora.targets is not None else None
    return {**lora.__dict__, "targets": targets, "tokens": list(lora.tokens)}


def lora_from_meta(meta: Mapping[str, Any]) -> Lora:
    values = json.loads(json.dumps(meta))
    targets = values["targets"]
    return Lora(
        **{
            **values,
            "targets": None if targets is None else frozenset(targets),
            "tokens": tuple(values["tokens"]),
        }
    )
