"""A model folder or hub id -> its spec, then its parameters, each device reading its own slices.

Opening reads `config.json` and the headers of the weights and accounts for every tensor both ways,
so that a folder that cannot be loaded says so before anything is compiled. There is no converter
step: the safetensors on disk are the source of every slice.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.config import ModelError
from jaxtune.hf import mxfp4
from jaxtune.hf.family.multimodal import WRAPPERS, Wrapper
from jaxtune.hf.family.registry import Family, config_dtype, family_of
from jaxtune.hf.layout import Index, Placed, place
from jaxtune.hf.mxfp4 import fetch
from jaxtune.hf.tensors import DTYPES, open_tensors
from jaxtune.hf.transpose import run_ahead
from jaxtune.model import decoder
from jaxtune.spec import ModelSpec, parameter_count
from jaxtune.storage import hub
from jaxtune.storage.safe_read import plain, read_object, reason, shown, some
from jaxtune.tree import map_named, named

# What a model folder may need; weights come on top, and only as safetensors.
_HUB_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
_HUB_WEIGHTS = ("model*.safetensors",)
# Derived values that old versions of transformers stored: recomputed here, never read.
_DERIVED = ("rotary_emb.inv_freq",)
# Far above every model there is: a config beyond them is damaged, or made to exhaust the memory.
_MOST_LAYERS = 512
_MOST_PARAMETERS = 10**14


class NewTokens(NamedTuple):
    """Ids that the model was never trained on, and how many rows from 0 on it was."""

    ids: frozenset[int]
    trained: int


@dataclass(frozen=True)
class HfModel:
    """A folder understood. `name` is what the user called it; `dtype` what it is stored in.

    `tensors` is empty when it was opened without weights (`init: random`). `new` are tokens that
    `with_tokens` gave it; `spec.vocab` may then be more rows than the tensors have. `wrapper` is
    what the folder holds the model in, where it is the text half of another; config and tensors
    are those of the text half.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]  # generation_config.json, empty where there is none
    family: Family
    spec: ModelSpec
    dtype: str
    tensors: Mapping[str, mxfp4.Source]
    new: NewTokens | None = None
    wrapper: Wrapper | None = None

    @functools.cached_property
    def mean_rows(self) -> dict[str, np.ndarray]:
        """Tensor name -> the mean over the trained rows, f32 [D], of those with a row per token."""
        assert self.new is not None
        return {
            piece.name: _mean_row(self.tensors[piece.name], self.new.trained)
            for placed in self.placed.values()
            for piece in placed.pieces()
            if placed.row.groups[0] == ("V",)
        }

    @property
    def eos_ids(self) -> list[int]:
        """Return the folder's own end-of-text ids: of generation_config.json, else config.json."""
        eos = self.generation.get("eos_token_id", self.config.get("eos_token_id"))
        ids = [i for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
        if not all(type(i) is int for i in ids):
            raise ModelError(f"{self.folder}: eos_token_id is {eos!r}; expected an id or a list.")
        return ids

    @functools.cached_property
    def placed(self) -> dict[str, Placed]:
        """Parameter name -> the tensors it is made of."""
        shapes = {name: leaf.shape for name, leaf in named(_abstract(self.spec)).items()}
        return place(self.family.rows, shapes, layer_numbers(self.spec))


def open_model(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    note: Callable[[str], None] | None = None,
) -> HfModel:
    """Read what a model is. `weights=False` needs only `config.json` (also given as the file).

    `path_or_id` is a folder in HF format, a run directory (its `hf/` is meant), or a hub id. `note`
    is told of a config that asks for code of its own, which is never run, and of tensors that are
    left out because they are not the text half's.
    Raises `ModelError`: not found, no config.json, unknown or unsupported family, no weights, or
    tensors missing, left over or of another shape.
    """
    folder, file = _locate(str(path_or_id), revision, weights)
    config = read_object(file, folder)
    if "auto_map" in config and note is not None:
        note(
            f"{file}: asks for code of its own (auto_map); it is never run. The model is read as "
            f"family {shown(config.get('model_type'))}."
        )
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is not None:
        config = wrapper.config(config, where=str(file))
    family, spec = _understood(config, file)
    tensors: Mapping[str, mxfp4.Source] = {}
    if weights:
        stored = open_tensors(folder)
        if wrapper is not None:
            stored, left_out = wrapper.tensors(stored, where=str(folder))
            if note is not None and left_out:
                note(
                    f"{folder}: of a model of text and more, the text half is read, as family "
                    f"'{wrapper.family}', and will be exported as such. Left out: "
                    f"{_fault(left_out, 'of the other half')}."
                )
        tensors = mxfp4.unpacked(stored) if config.get("quantization_config") else stored
        _check_size(spec, tensors, file)
    dtype = config_dtype(config) or _widest_use(tensors)
    beside = file.with_name("generation_config.json")
    generation = read_object(beside, folder) if os.path.lexists(beside) else {}
    model = HfModel(
        str(path_or_id), folder, config, generation, family, spec, dtype, tensors, wrapper=wrapper
    )
    if weights:
        _account(model)
    return model


def _understood(config: Mapping[str, Any], file: Path) -> tuple[Family, ModelSpec]:
    """Return the family and the spec of `config`, if they are of a size that can exist."""
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if method != mxfp4.METHOD:
            raise ModelError(
                f"{file}: weights quantised by {plain(str(method))} are not supported; only "
                f"{mxfp4.METHOD} is read. Use a revision in bfloat16."
            )
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelError(f"{file}: num_hidden_layers is {layers}; at most {_MOST_LAYERS}.")
    try:
        family = family_of(config, where=str(file))
        spec = family.to_spec(config, where=str(file))
        count = parameter_count(spec)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ModelError(f"{file}: malformed: {reason(error)}.") from None
    if count > _MOST_PARAMETERS:
        raise ModelError(
            f"{file}: describes a model of {count:.2g} parameters, which none has. Its sizes are "
            "damaged."
        )
    return family, spec


def _check_size(spec: ModelSpec, tensors: Mapping[str, mxfp4.Source], file: Path) -> None:
    """Before anything is made of the spec's size: the weights must be of about that size."""
    stored = sum(math.prod(tensor.shape) for tensor in tensors.values())
    count = parameter_count(spec)
    if count > 1000 * (stored + 1):
        raise ModelError(
            f"{file}: describes a model of {count:,} parameters; the weights have {stored:,} "
            "values. config.json and the weights do not belong together."
        )


def with_tokens(model: HfModel, ids: Iterable[int], *, trained: int) -> HfModel:
    """The model with new tokens. Its tables grow only when an id has no row, and never shrink.

    `trained` is the number of tokens it has been trained on: what its tables hold beyond that is
    padding. Rows of new ids, also those that lie in the padding, are loaded as the mean of the
    trained rows, in the embedding and the head alike.
    """
    new = frozenset(ids)
    if not new:
        return model
    rows = max(model.spec.vocab, max(new) + 1)
    known = NewTokens(new, min(trained, model.spec.vocab))
    return replace(model, spec=replace(model.spec, vocab=rows), new=known)


def load_params(
    model: HfModel,
    shardings: Any | None,
    dtype: Any,
    *,
    read: Callable[[str, Index], np.ndarray] | None = None,
    then: Callable[[str, jax.Array], Any] = lambda name, leaf: leaf,
) -> Any:
    """The parameter tree in `dtype`, every leaf read by slices straight into its sharding.

    `shardings` is a tree of `NamedSharding`, or None for everything on the default device. Host
    memory holds one device's slice of one parameter at a time; a slice that several devices hold
    is read once. `read(name, index)` is what a slice is, in `dtype`; by default what the folder
    has. `then(name, leaf)` is what stands in the tree for a leaf: it is called for one before the
    next is read.
    """
    if not model.tensors:
        raise ModelError(f"{model.folder}: was opened without weights; nothing to load.")
    read = read or functools.partial(read_part, model, dtype=dtype)
    where = named(shardings) if shardings is not None else {}

    def load(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        values = functools.partial(read, name)
        if name not in where:
            return then(name, jax.device_put(values(_whole(leaf.shape))))
        return then(name, _assemble(leaf.shape, where[name], values))

    return map_named(load, _abstract(model.spec))


def read_part(model: HfModel, name: str, index: Index, dtype: Any = np.float32) -> np.ndarray:
    """`index` of parameter `name` in `dtype`, on this host, as `load_params` would give it."""

    def read(tensor: str, cut: Index) -> np.ndarray:
        return _read_tensor(model, tensor, cut)

    return model.placed[name].read(read, index, np.dtype(dtype), run_ahead)


def _read_tensor(model: HfModel, name: str, index: Index) -> np.ndarray:
    if model.new is not None and name in model.mean_rows:
        return _read_rows(model, name, index)
    return fetch(model.tensors[name], index)


def _read_rows(model: HfModel, name: str, index: Index) -> np.ndarray:
    """Rows of a tensor [V D] as they begin: from the file, or the mean where they are new."""
    assert model.new is not None
    tensor = model.tensors[name]
    have = tensor.shape[0]
    rows = range(*index[0].indices(model.spec.vocab))
    inside = slice(min(rows.start, have), min(rows.stop, have))
    stored = fetch(tensor, (inside, *index[1:]))
    values = np.empty((len(rows), *stored.shape[1:]), stored.dtype)
    values[: len(stored)] = stored
    mean = model.mean_rows[name][index[1:]]
    for row in {*range(max(rows.start, have), rows.stop), *model.new.ids}:
        if row in rows:
            values[row - rows.start] = mean
    return values


def _mean_row(tensor: mxfp4.Source, rows: int, block: int = 8192) -> np.ndarray:
    total = np.zeros(tensor.shape[1:], np.float64)
    for start in range(0, rows, block):
        cut = (slice(start, min(start + block, rows)), slice(None))
        total += fetch(tensor, cut).astype(np.float64).sum(axis=0)
    return (total / max(1, rows)).astype(np.float32)


def layer_numbers(spec: ModelSpec) -> dict[tuple[int, int], tuple[int, ...]]:
    """(stack, place in its pattern) -> the numbers its layers have in the file."""
    numbers, first = {}, 0
    for i, stack in enumerate(spec.stacks):
        width = len(stack.pattern)
        for j in range(width):
            numbers[i, j] = tuple(range(first + j, first + width * stack.repeats, width))
        first += width * stack.repeats
    return numbers


def _abstract(spec: ModelSpec) -> Any:
    return decoder.abstract(spec, np.float32)


def _assemble(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """Build one global array from the slices this host's devices hold."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        slices_of_axes = index if index is not None else _whole(shape)
        bounds = tuple(cut.indices(n)[:2] for cut, n in zip(slices_of_axes, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    slices = []
    for bounds, devices in holders.items():
        values = read(tuple(slice(*bound) for bound in bounds))
        slices += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, slices)


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, n) for n in shape)


def _account(model: HfModel) -> None:
    """Every parameter finds its tensors, every tensor its parameter, in the right shape."""
    expected = {
        piece.name: placed.tensor_shape
        for placed in model.placed.values()
        for piece in placed.pieces()
    }
    missing = [name for name in expected if name not in model.tensors]
    extra = [name for name in model.tensors if name not in expected and not _ignored(model, name)]
    wrong = [
        f"{name} is {list(model.tensors[name].shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in model.tensors and model.tensors[name].shape != shape
    ]
    for name in expected.keys() & model.tensors.keys():
        model.tensors[name].dtype  # noqa: B018  raises when it is none that can be read
    kind = model.config["model_type"]
    faults = [
        _fault(missing, f"missing for family '{kind}'"),
        _fault(extra, f"without a row in family '{kind}'"),
        _fault(wrong, "of another shape"),
    ]
    if any(faults):
        raise ModelError(
            f"{model.folder}: {'; '.join(filter(None, faults))}. config.json and the weights do "
            "not belong together, or the model is of another family than config.json says."
        )


def _fault(items: list[str], what: str) -> str:
    if not items:
        return ""
    plural = "tensor" if len(items) == 1 else "tensors"
    return f"{len(items)} {plural} {what}: {some(items, 4)}"


def _ignored(model: HfModel, name: str) -> bool:
    """Known to be derivable: old rope buffers, and the second copy of a tied head."""
    return name.endswith(_DERIVED) or (name == "lm_head.weight" and model.spec.tie_head)


def _widest_use(tensors: Mapping[str, mxfp4.Source]) -> str:
    """The dtype most values are stored in; float32 where there are none."""
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.code in DTYPES:
            values[str(tensor.dtype)] += math.prod(tensor.shape)
    return values.most_common(1)[0][0] if values else "float32"


def _locate(name: str, revision: str | None, weights: bool) -> tuple[Path, Path]:
    """The folder and its config.json, downloaded first when `name` is no path."""
    path = Path(name).expanduser()
    if path.is_file() and not weights:
        return path.parent, path
    if not path.exists():
        patterns = (*_HUB_FILES, *(_HUB_WEIGHTS if weights else ()))
        path = hub.download(name, revision=revision, patterns=patterns)
    if os.path.lexists(path / "config.json"):
        return path, path / "config.json"
    if os.path.lexists(path / "hf" / "config.json"):
        if not (path / "hf").resolve().is_relative_to(path.resolve()):
            raise ModelError(f"{path / 'hf'}: is a link that leaves {path}. Give its target.")
        return path / "hf", path / "hf" / "config.json"
    if (path / "checkpoints").is_dir():
        raise ModelError(
            f"{name}: a run directory without an exported model. Make one first: "
            f"python -m jaxtune.convert {name} {path / 'hf'}"
        )
    raise ModelError(f"{name}: no config.json there. Expected a folder in Hugging Face format.")
