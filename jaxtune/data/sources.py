"""A dataset's `path` -> files -> records. Knows folders and the hub; not what a record means.

A path is a file, a glob, a folder, a folder that the `datasets` library has saved, the id of a
dataset on the Hugging Face hub, or a file, glob or folder of a store, which is fetched first. Of
the hub's datasets, that library only says which files hold a split; they are read here like any
other file, so JSON stays JSON.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtune.config import ConfigError, DataError, nearest
from jaxtune.data import readers
from jaxtune.data.readers import READERS, File, Record
from jaxtune.storage import hub, object_store

KINDS = ", ".join(READERS)
_NO_DATA = ("dataset_info.json", "dataset_infos.json")  # the hub's descriptions of a dataset
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find(
    path: str, *, split: str | None = None, revision: str | None = None, config: str | None = None
) -> tuple[File, ...]:
    """Find the files that `path` names, in sorted order; at least one.

    `split`, `revision` and `config` (which of a dataset's configurations, where there are several)
    choose within a dataset of the hub, `split` also within a folder. Raises `ConfigError` and
    `DataError` when nothing is there, or nothing that can be read.
    """
    if object_store.is_url(path):
        for field, value in (("split", split), ("revision", revision)):
            if value is not None:
                raise ConfigError(f"datasets[].{field}: {path} is in a store. Unset it.")
        return _of_store(path)
    place = Path(path).expanduser()
    on_hub = not place.exists() and _is_hub_id(path)
    if revision is not None and not on_hub:
        raise ConfigError(f"datasets[].revision: {path} is not on the hub. Unset it.")
    if on_hub:
        return _of_hub(path, split, revision, config)
    if place.is_dir() and split is not None and not _saved(place):
        return _of_library(path, split, None, config)
    if place.is_dir():
        return _of_saved(place, split) if _saved(place) else _in_folder(place)
    if split is not None:
        raise ConfigError(f"datasets[].split: {path} has no splits; a folder has. Unset it.")
    if not place.exists() and glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        files = tuple(_file(file) for file in found if file.is_file())
        if not files:
            raise DataError(f"{path}: no file matches (looked in {Path.cwd()}).")
        return files
    if not place.exists():
        raise DataError(f"{path}: no such file (looked in {Path.cwd()}).")
    return (_file(place, path),)


def read(files: Iterable[File]) -> Iterator[Record]:
    """Yield the records of all files, one file after the other. Raises `DataError`."""
    for file in files:
        yield from readers.read(file)


def digest(files: Iterable[File]) -> str:
    """Hash what the files hold and of which kind they are; not what they are called."""
    parts = []
    for file in files:
        try:
            with file.path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{file.name}: cannot be read: {error.strerror}.") from None
        parts.append([file.kind, file.zipped, content])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _file(place: Path, name: str | None = None) -> File:
    file = File(place, name or str(place))
    _check_kind(file)
    return file


def _check_kind(file: File) -> None:
    if file.kind not in READERS:
        raise ConfigError(
            f"{file.name}: cannot read {file.kind or 'a name without suffix'!r}. "
            f"Data files are {KINDS}, each also .gz."
        )


@functools.cache  # once: an object may change between two calls
def _of_store(url: str) -> tuple[File, ...]:
    """Fetch each object by itself: one that has changed is fetched again, the others are not."""
    if glob.has_magic(url):
        found = object_store.matching(url)
    else:
        single = object_store.find(url)
        found = _data_in(object_store.listed(url), url) if single is None else [single]
    if not found:
        raise DataError(
            f"{url}: no data file ({KINDS}) is there in the store. Name the object, its folder, or "
            "a glob such as 'gs://bucket/data/*.jsonl'."
        )
    for item in found:
        _check_kind(File(Path(), item.url))
    return tuple(File(object_store.cached([i]) / object_store.name_of(i.url), i.url) for i in found)


def _data_in(items: list[object_store.Item], folder: str) -> list[object_store.Item]:
    """Choose those that lie directly in the folder and are data, as `_in_folder` has it."""
    return [
        item
        for item in items
        if "/" not in object_store.inside(item.url, folder) and _is_data(File(Path(), item.url))
    ]


def _is_data(file: File) -> bool:
    name = object_store.name_of(file.name)
    return file.kind in READERS and name not in _NO_DATA and name[0] != "."


def _in_folder(folder: Path) -> tuple[File, ...]:
    """List the data files that lie directly in the folder; what else lies there is no data."""
    named = (File(place, str(place)) for place in sorted(folder.iterdir()) if place.is_file())
    files = tuple(file for file in named if _is_data(file))
    if not files:
        raise DataError(
            f"{folder}: no data file ({KINDS}) lies in this folder. Name files further down with a "
            f"glob such as '{folder}/**/*.jsonl', or set datasets[].split."
        )
    return files


# -- the datasets library -------------------------------------------------------------------------


def _saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` has made the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _of_saved(folder: Path, split: str | None) -> tuple[File, ...]:
    described = folder / "dataset_dict.json"
    try:
        if described.is_file():
            splits = list(json.loads(described.read_text(encoding="utf-8"))["splits"])
            folder /= _choose(split, splits, str(folder))
        elif split is not None:
            raise ConfigError(f"datasets[].split: {folder} was saved as one split. Unset it.")
        described = folder / "state.json"
        state = json.loads(described.read_text(encoding="utf-8"))
        places = [folder / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{described}: not as the datasets library saves it: {type(error).__name__} {error}."
        ) from None
    return tuple(_file(place) for place in places)


def _choose(split: str | None, splits: list[str], path: str) -> str:
    """Return the split that was named; else `train`, or the only one."""
    if split is None:
        split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
        raise ConfigError(
            f"datasets[].split: {path} has no '{split}'.{nearest(split, splits)} "
            f"There are: {', '.join(splits) or 'none'}."
        )
    return split


def _is_hub_id(path: str) -> bool:
    """Tell whether it is NAME or OWNER/NAME, and does not end like a data file."""
    return bool(_HUB_ID.fullmatch(path)) and File(Path(path), path).kind not in READERS


def _of_library(
    path: str, split: str | None, revision: str | None, config: str | None
) -> tuple[File, ...]:
    library = readers.needed(
        "datasets",
        "hub",
        f"{path}: no such file or folder here (looked in {Path.cwd()}). As a dataset of the hub it"
        if not Path(path).expanduser().is_dir()
        else f"{path}: a split of a folder",
    )
    if not Path(path).expanduser().is_dir() and hub.silent():
        raise DataError(
            f"{path}: no such file or folder here (looked in {Path.cwd()}), and the hub cannot be "
            "reached. Give the path of a file, or set HF_HUB_OFFLINE=1 if the data is in the cache."
        )
    try:
        builder = _builder(library, path, revision, config)
        by_split = {str(name): list(found) for name, found in builder.config.data_files.items()}
        chosen = by_split[_choose(split, list(by_split), path)]
        local = library.DownloadManager().download(chosen)
    except ConfigError:
        raise
    except Exception as error:  # whatever the library, its network or its files bring
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else ""
        raise DataError(
            f"{path}: the datasets library cannot open it (looked in {Path.cwd()} and on the hub): "
            f"{type(error).__name__}: {reason}."
        ) from None
    return tuple(
        _file(Path(place), name.removeprefix("hf://datasets/"))
        for place, name in zip(local, chosen, strict=True)
    )


# Once: a branch of the hub may move between two calls.
_of_hub = functools.cache(_of_library)


def _builder(library: Any, path: str, revision: str | None, config: str | None) -> Any:
    """Choose the configuration `config` if there are several; else that is only a label."""
    known = library.get_dataset_config_names(path, revision=revision)
    name = config if config in known else None
    if name is None and len(known) > 1 and "default" not in known:
        raise ConfigError(
            f"datasets[].name: {path} has several configurations; set it to one of: "
            f"{', '.join(known)}."
        )
    builder = library.load_dataset_builder(path, name=name, revision=revision)
    if not builder.config.data_files:
        raise ConfigError(f"{path}: this dataset has no data files that could be read.")
    return builder
