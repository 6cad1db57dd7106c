"""Checkpoints of several hosts in a store: each host writes, hashes, puts and fetches its own part.

No folder is shared. Each array is a folder of chunks, files of their own, so that what the hosts
wrote is one checkpoint once it lies under one URL; what lies beside the arrays (shapes, meta) is
the same on every host, and host 0 puts it. The mark is put when every host has put its part. Of
what is read, a host fetches the chunks that its devices hold and no others, and compares them with
the digests.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxtune.parallel import processes
from jaxtune.storage import object_store
from jaxtune.storage.object_store import StoreError, join
from jaxtune.training.checkpoint import integrity
from jaxtune.training.checkpoint.integrity import FOLDER
from jaxtune.training.checkpoint.remote import RemoteSync

# Restore targets: part of a checkpoint -> its tree of shapes with their shardings.
Targets = Mapping[str, Any]
_SHAPE = ".zarray"  # of an array's folder: what its chunks are


def checkpointer() -> ocp.AsyncCheckpointer:
    """Orbax for hosts that write each into a folder of its own."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None)
    # Made in the background, the folders of one host are taken by another for its own.
    made_first = ocp.options.AsyncOptions(create_directories_asynchronously=False)

    def tree() -> ocp.StandardCheckpointHandler:
        # Its usual format is one data base, which is merged where all files are.
        return ocp.StandardCheckpointHandler(multiprocessing_options=alone, use_ocdbt=False)

    handler = ocp.CompositeCheckpointHandler(
        trained=tree(),
        opt=tree(),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=alone, async_options=made_first
        ),
    )
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=alone, async_options=made_first)


class RemoteShards:
    """A host's part of the steps in `sync`'s store. Every host calls `put` for each step."""

    def __init__(self, sync: RemoteSync) -> None:
        self._sync = sync
        self._puts = 0

    def put(self, step: int, here: Path) -> None:
        """The part of the step that Orbax wrote to `here`; returns once the step counts. From any
        thread. Raises `StoreError`; then the others wait until this host ends them."""
        self._puts += 1
        own, place = processes.index(), join(self._sync.url, FOLDER, step)
        names = _own(here, first=own == 0)
        integrity.write(here, host=own, hosts=processes.count(), names=names)
        mark = integrity.mark_of(own)
        object_store.put_all(here, names if own == 0 else [*names, mark], place)
        if wrong := object_store.unequal(here, names, place, contents=False):
            again = "right after it was written. Run the same command again."
            raise StoreError(f"{wrong}, {again}", passes=True)
        put, counts = f"put-{self._puts}", f"counts-{self._puts}"
        if own == 0:
            self._sync.put_files()  # the rows up to this step
            for other in range(1, processes.count()):
                processes.receive(put, other)
            object_store.put_all(here, [mark], place)
            processes.publish(counts)
        else:
            processes.publish(put)
            processes.receive(counts, 0)
        self._sync.steps.add(step)

    def fetch(self, step: int, here: Path, targets: Targets) -> str:
        """Fetch into `here` the files of a step that this host needs and lacks.

        Returns, in words, what is not as it was written; empty where all is well.
        """
        return _fetch(join(self._sync.url, FOLDER, step), here, targets)


def _own(here: Path, *, first: bool) -> list[str]:
    """The files of a step that this host puts: of the arrays' folders its chunks; the rest is the
    same everywhere, and the first host's.
    """
    names = integrity.files_of(here)
    return [name for name in names if first or len(name.split("/")) > 2]


def _fetch(place: str, here: Path, targets: Targets) -> str:
    there = {object_store.inside(item.url, place): item for item in object_store.listed(place)}
    marks = [name for name in there if integrity.is_mark(name)]
    here.mkdir(parents=True, exist_ok=True)
    for old in here.glob("digests-*"):
        old.unlink()
    object_store.fetch_all((there[name] for name in marks), place, here)
    try:
        known = integrity.known(here)
    except ValueError as error:
        return str(error)
    if wrong := _unlike_listed(known, {name: item.size for name, item in there.items()}):
        return wrong
    for name in set(integrity.files_of(here)) - known.keys():  # of the same step, written otherwise
        (here / name).unlink()

    def bring(names: Sequence[str]) -> str:
        lacking = integrity.unlike(here, names, known)
        object_store.fetch_all((there[name] for name in lacking), place, here)
        wrong = integrity.unlike(here, lacking, known)
        return f"{wrong[0]}: {integrity.OTHER_BYTES}" if wrong else ""

    chunks = _chunks(known)
    if wrong := bring(sorted(known.keys() - chunks.keys())):
        return wrong
    return bring(sorted(_needed(chunks, here, targets)))


def _unlike_listed(known: integrity.Known, sizes: Mapping[str, int]) -> str:
    """Describe the first difference of the store's listing and the digests; empty if none."""
    if not known:
        return integrity.UNFINISHED
    for name in sorted(sizes.keys() - known.keys()):
        if not integrity.is_mark(name):
            return f"{name}: is not one of its files"
    for name, (size, _) in sorted(known.items()):
        if name not in sizes:
            return f"{name}: is not there"
        if sizes[name] != size:
            return f"{name}: has {sizes[name]:,} bytes instead of {size:,}"
    return ""


def _chunks(known: integrity.Known) -> dict[str, str]:
    """Every chunk -> the folder of its array. A checkpoint in one data base has none."""
    arrays = {name.rpartition("/")[0] for name in known if name.endswith(f"/{_SHAPE}")}
    inside = {name: name.rpartition("/")[0] for name in known if not name.endswith(f"/{_SHAPE}")}
    return {name: array for name, array in inside.items() if array in arrays}


def _needed(chunks: Mapping[str, str], here: Path, targets: Targets) -> set[str]:
    """Select the chunks that devices of this host hold a share of."""
    leaves = {
        f"{part}/{name}": leaf
        for part, tree in targets.items()
        for name, leaf in ocp.tree.to_flat_dict(tree, sep=".").items()
    }
    shares = {
        array: set(_held(leaves[array], here / array / _SHAPE))
        for array in set(chunks.values()) & leaves.keys()
    }
    return {
        name
        for name, array in chunks.items()
        if name.removeprefix(f"{array}/") in shares.get(array, ())
    }


def _held(leaf: Any, shape_file: Path) -> Iterator[str]:
    """The names of the chunks that overlap what this host's devices hold of an array.

    An array [8, 6] in chunks [2, 6], of which a device here holds rows 4 to 8: "2.0" and "3.0". A
    scalar is one chunk, "0".
    """
    array = json.loads(shape_file.read_text(encoding="utf-8"))
    sizes, separator = array["chunks"], array.get("dimension_separator", ".")
    if tuple(array["shape"]) != leaf.shape:
        return  # another model's, which a restore refuses
    for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        spans = []
        for cut, size, length in zip(index, sizes, leaf.shape, strict=True):
            start, stop, _ = cut.indices(length)
            spans.append(range(start // size, -(-stop // size)))
        yield from (separator.join(map(str, at)) or "0" for at in itertools.product(*spans))


def drop(folder: Path, steps: set[int]) -> None:
    """Leave of the steps in `folder` those of `steps`, and nothing that is unfinished."""
    for path in folder.iterdir():
        unfinished = path.name.startswith(".") or ".orbax-checkpoint-tmp" in path.name
        if unfinished or (path.name.isdigit() and int(path.name) not in steps):
            shutil.rmtree(path, ignore_errors=True)
