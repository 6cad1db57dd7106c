"""A model folder or hub id -> its spec, then its parameters, each device reading its own slices.

Opening reads `config.json` and the headers of the weights and accounts for every tensor both ways,
so that a folder that cannot be loaded says so before anything is compiled. There is no converter
step: the safetensors on disk are the source of every slice.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.config import ModelError
from jaxtune.hf.families import Family, config_dtype, family_of
from jaxtune.hf.layout import Index, Placed, place
from jaxtune.hf.tensors import DTYPES, Tensor, fetch, open_tensors
from jaxtune.model import decoder
from jaxtune.spec import ModelSpec
from jaxtune.tree import map_named, named

# What a model folder may need; weights come on top, and only as safetensors.
_HUB_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
_HUB_WEIGHTS = ("model*.safetensors",)
# Derived values that old versions of transformers stored: recomputed here, never read.
_DERIVED = ("rotary_emb.inv_freq",)


class NewTokens(NamedTuple):
    """Ids that the model was never trained on, and how many rows from 0 on it was."""

    ids: frozenset[int]
    trained: int


@dataclass(frozen=True)
class HfModel:
    """A folder understood. `name` is what the user called it; `dtype` what it is stored in.

    `tensors` is empty when it was opened without weights (`init: random`). `new` are tokens that
    `with_tokens` gave it; `spec.vocab` may then be more rows than the tensors have.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]  # generation_config.json, empty where there is none
    family: Family
    spec: ModelSpec
    dtype: str
    tensors: Mapping[str, Tensor]
    new: NewTokens | None = None

    @cached_property
    def mean_rows(self) -> dict[str, np.ndarray]:
        """Tensor name -> the mean over the trained rows, f32 [D], of those with a row per token."""
        assert self.new is not None
        return {
            piece.name: _mean_row(self.tensors[piece.name], self.new.trained)
            for placed in self.placed.values()
            for piece in placed.pieces()
            if placed.row.groups[0] == ("V",)
        }

    @cached_property
    def placed(self) -> dict[str, Placed]:
        """Parameter name -> the tensors it is made of."""
        shapes = {name: leaf.shape for name, leaf in named(_abstract(self.spec)).items()}
        return place(self.family.rows, shapes, layer_numbers(self.spec))


def open_model(
    path_or_id: str | Path, *, revision: str | None = None, weights: bool = True
) -> HfModel:
    """Reads what a model is. `weights=False` needs only `config.json` (also given as the file).

    `path_or_id` is a folder in HF format, a run directory (its `hf/` is meant), or a hub id.
    Raises `ModelError`: not found, no config.json, unknown or unsupported family, no weights, or
    tensors missing, left over or of another shape.
    """
    folder, file = _locate(str(path_or_id), revision, weights)
    config = _read_config(file)
    family = family_of(config, where=str(file))
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(f"{file}: weights quantised by {method} are not supported.")
    spec = family.to_spec(config, where=str(file))
    tensors = open_tensors(folder) if weights else {}
    dtype = config_dtype(config) or _widest_use(tensors)
    beside = file.with_name("generation_config.json")
    generation = _read_config(beside) if beside.is_file() else {}
    model = HfModel(str(path_or_id), folder, config, generation, family, spec, dtype, tensors)
    if weights:
        _account(model)
    return model


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


def load_params(model: HfModel, shardings: Any | None, dtype: Any) -> Any:
    """The parameter tree in `dtype`, every leaf read by slices straight into its sharding.

    `shardings` is a tree of `NamedSharding`, or None for everything on the default device. Host
    memory holds one device's slice of one parameter at a time; a slice that several devices hold
    is read once.
    """
    if not model.tensors:
        raise ModelError(f"{model.folder}: was opened without weights; nothing to load.")
    target = np.dtype(dtype)
    placed = model.placed
    where = named(shardings) if shardings is not None else {}

    def read(name: str, index: Index) -> np.ndarray:
        if model.new is not None and name in model.mean_rows:
            return _read_rows(model, name, index)
        return fetch(model.tensors[name], index)

    def load(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name not in where:
            return jax.device_put(placed[name].read(read, _whole(leaf.shape), target))
        return _assemble(leaf.shape, where[name], lambda at: placed[name].read(read, at, target))

    return map_named(load, _abstract(model.spec))


def _read_rows(model: HfModel, name: str, index: Index) -> np.ndarray:
    """Rows of a tensor [V D] as they begin: from the file, or the mean where they are new."""
    assert model.new is not None
    tensor = model.tensors[name]
    have = tensor.shape[0]
    wanted = range(*index[0].indices(model.spec.vocab))
    inside = slice(min(wanted.start, have), min(wanted.stop, have))
    found = fetch(tensor, (inside, *index[1:]))
    values = np.empty((len(wanted), *found.shape[1:]), found.dtype)
    values[: len(found)] = found
    mean = model.mean_rows[name][index[1:]]
    for row in {*range(max(wanted.start, have), wanted.stop), *model.new.ids}:
        if row in wanted:
            values[row - wanted.start] = mean
    return values


def _mean_row(tensor: Tensor, rows: int, block: int = 8192) -> np.ndarray:
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
    """One global array from the slices this host's devices hold."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cuts = index if index is not None else _whole(shape)
        bounds = tuple(cut.indices(n)[:2] for cut, n in zip(cuts, shape, strict=True))
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
    wanted = {
        piece.name: placed.tensor_shape
        for placed in model.placed.values()
        for piece in placed.pieces()
    }
    missing = [name for name in wanted if name not in model.tensors]
    extra = [name for name in model.tensors if name not in wanted and not _ignored(model, name)]
    wrong = [
        f"{name} is {list(model.tensors[name].shape)}, config.json says {list(shape)}"
        for name, shape in wanted.items()
        if name in model.tensors and model.tensors[name].shape != shape
    ]
    for name in wanted.keys() & model.tensors.keys():
        model.tensors[name].dtype  # noqa: B018  raises when it is none that can be read
    kind = model.config["model_type"]
    faults = [
        _fault(missing, f"missing for family '{kind}'"),
        _fault(extra, f"without a row in family '{kind}'"),
        _fault(wrong, "of another shape"),
    ]
    found = [fault for fault in faults if fault]
    if found:
        raise ModelError(
            f"{model.folder}: {'; '.join(found)}. config.json and the weights do not belong "
            "together, or the model is of another family than config.json says."
        )


def _fault(items: list[str], what: str) -> str:
    if not items:
        return ""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    plural = "tensor" if len(items) == 1 else "tensors"
    return f"{len(items)} {plural} {what}: {', '.join(items[:4])}{more}"


def _ignored(model: HfModel, name: str) -> bool:
    """Known to be derivable: old rope buffers, and the second copy of a tied head."""
    return name.endswith(_DERIVED) or (name == "lm_head.weight" and model.spec.tie_head)


def _widest_use(tensors: Mapping[str, Tensor]) -> str:
    """The dtype most values are stored in; float32 where there are none."""
    values: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.code in DTYPES:
            name = str(tensor.dtype)
            values[name] = values.get(name, 0) + int(np.prod(tensor.shape))
    return max(values, key=lambda name: values[name], default="float32")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: expected a JSON object; got a {type(config).__name__}.")
    return config


def _locate(name: str, revision: str | None, weights: bool) -> tuple[Path, Path]:
    """The folder and its config.json, downloaded first when `name` is no path."""
    path = Path(name).expanduser()
    if path.is_file() and not weights:
        return path.parent, path
    if not path.exists():
        path = _download(name, revision, weights)
    if (path / "config.json").is_file():
        return path, path / "config.json"
    if (path / "hf" / "config.json").is_file():
        return path / "hf", path / "hf" / "config.json"
    if (path / "checkpoints").is_dir():
        raise ModelError(
            f"{name}: a run directory without an exported model. Make one first: "
            f"python -m jaxtune.convert {name} {path / 'hf'}"
        )
    raise ModelError(f"{name}: no config.json there. Expected a folder in Hugging Face format.")


def _download(name: str, revision: str | None, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*_HUB_FILES, *(_HUB_WEIGHTS if weights else ())]
    absent = f"{name}: no such folder"
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except errors.HFValidationError:
        raise ModelError(f"{absent}, and not a hub id (owner/name).") from None
    except errors.GatedRepoError:
        raise ModelError(
            f"{name}: a gated model. Accept its terms at https://huggingface.co/{name} and set "
            "HF_TOKEN."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{absent}, nor is it on the hub (if private, set HF_TOKEN).") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name}: the hub has no revision '{revision}' of it.") from None
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"{absent}, and the hub cannot be reached nor is the model in the local cache. "
            "Give the path of a folder, or try again online."
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f"{absent}, and downloading it from the hub failed: {error}.") from None
