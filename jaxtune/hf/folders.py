"""Tell, by the files in it, if a local folder is a model or an adapter to one. No jax."""

import fnmatch
import functools
from pathlib import Path

from jaxtune.config import ConfigError
from jaxtune.data.tokenizer import CHAT_TEMPLATE, MORE_TEMPLATES
from jaxtune.storage import hub, object_store
from jaxtune.storage.safe_read import plain, read_object

MODEL = "config.json"
ADAPTER = "adapter_config.json"

# Everything a tokenizer of transformers 4 or 5 may be made of, apart from its chat template.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
# What an export may consist of, and so what it may replace.
_EXPORTED = (
    *(MODEL, ADAPTER, *TOKENIZER, CHAT_TEMPLATE, "README.md", "generation_config.json"),
    *("*.safetensors", "*.safetensors.index.json", ".DS_Store"),
)


def is_adapter(name: str) -> bool:
    """Return True if a folder, here or in a store, is an adapter and not a model."""
    if object_store.is_url(name):
        return _is_adapter_there(name)
    folder = Path(name).expanduser()
    return (folder / ADAPTER).is_file() and not (folder / MODEL).exists()


@functools.cache  # every command asks several times
def _is_adapter_there(url: str) -> bool:
    marks = (object_store.join(url, mark) for mark in (ADAPTER, MODEL))
    adapter, model = (object_store.find(mark) is not None for mark in marks)
    return adapter and not model


def refuse_adapter(name: str) -> None:
    """Raise `ConfigError` for an adapter where a model is to be trained: it goes elsewhere."""
    if not is_adapter(name):
        return
    there = object_store.is_url(name)
    folder = hub.download(name, revision=None, patterns=(ADAPTER,)) if there else Path(name)
    folder = folder.expanduser()
    base = read_object(folder / ADAPTER, folder).get("base_model_name_or_path")
    raise ConfigError(
        f"model_name_or_path {name}: is an adapter, not a model. To go on from it set "
        f"adapter_name_or_path to it and model_name_or_path to its base, "
        f"{plain(str(base)) if base else 'which its config does not name'}."
    )


def check_replaceable(out: Path, *, marker: str, kind: str, export: str) -> None:
    """Refuse, before any work, to replace what is not an earlier `kind`, known by its `marker`, or
    holds anything besides."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; {export} is a folder. Choose another place.")
    there = sorted(out.iterdir()) if out.is_dir() else []
    if not there:
        return
    others = [path for path in there if not _exported(path)]
    if others or not (out / marker).is_file():
        what = f"{others[0].name}, which is no part of one" if others else f"no {marker}"
        raise ConfigError(
            f"{out}: holds files that are no {kind} ({what}), and an export replaces the whole "
            "folder. Choose another folder, or empty this one."
        )


def _exported(path: Path) -> bool:
    if path.is_dir() and path.name == MORE_TEMPLATES:
        return all(file.is_file() and file.suffix == ".jinja" for file in path.iterdir())
    return path.is_file() and any(fnmatch.fnmatchcase(path.name, known) for known in _EXPORTED)
