"""The bound on what was fetched: what goes, in which order, and what stays because it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxtune.config import ConfigError
from jaxtune.storage import cache_eviction, object_store

ANOTHER = """
import sys
from pathlib import Path
from jaxtune.storage import cache_eviction
cache_eviction.use(Path(sys.argv[1]))
print("used", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place, of which this process uses nothing; 1,000 bytes may be kept."""
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("JAXTUNE_CACHE_GB", "1e-6")
    monkeypatch.setattr(cache_eviction, "_held", {})
    (tmp_path / "stores").mkdir()
    yield tmp_path / "stores"
    forget()


def forget() -> None:
    """As if this process had ended."""
    for file in cache_eviction._held.values():
        os.close(file)
    cache_eviction._held.clear()


def make(place: Path, name: str, size: int, used: float) -> Path:
    folder = place / name
    folder.mkdir()
    (folder / "file").write_bytes(bytes(size))
    cache_eviction.use(folder)
    forget()
    os.utime(place / f"{name}.used", (used, used))
    return folder


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir())


def test_what_was_used_longest_ago_goes_first(place: Path) -> None:
    for name, used in (("a", 300), ("b", 100), ("c", 200)):
        make(place, name, 300, used)
    cache_eviction.evict(100, [place])
    assert names(place) == ["a", "b", "c"]
    cache_eviction.evict(101, [place])
    assert names(place) == ["a", "c"]
    assert not (place / "b.used").exists()
    cache_eviction.evict(5000, [place])
    assert names(place) == []


def test_what_a_process_uses_stays(place: Path) -> None:
    for name, used in (("a", 100), ("b", 200), ("c", 300)):
        make(place, name, 300, used)
    command = [sys.executable, "-c", ANOTHER, str(place / "a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen(command, **pipes)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "used\n"
        os.utime(place / "a.used", (100, 100))  # the oldest, and yet in use
        cache_eviction.use(place / "c")
        cache_eviction.evict(5000, [place])
        assert names(place) == ["a", "c"]
    finally:
        other.kill()
        other.wait()
    cache_eviction.evict(5000, [place])
    assert names(place) == ["c"]


def test_what_a_killed_removal_left_goes(place: Path) -> None:
    (place / ".going-7-a").mkdir()
    cache_eviction.evict(1, [place])
    assert list(place.iterdir()) == []


def test_what_is_fetched_makes_room(place: Path) -> None:
    items = []
    for name in ("one", "two"):
        object_store.put_bytes(bytes(600), f"memory://kept/{name}")
        item = object_store.find(f"memory://kept/{name}")
        assert item is not None
        items.append(item)
    first = object_store.cached([items[0]])
    forget()
    second = object_store.cached([items[1]])
    assert not first.exists()
    assert (second / "two").stat().st_size == 600
    assert object_store.cached([items[1]]) == second
    assert object_store.cached([items[0]]) == first  # in use, the second stays all the same
    assert (second / "two").exists()


@pytest.mark.parametrize("given", ["much", "-1", "nan"])
def test_a_bound_that_is_none(place: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXTUNE_CACHE_GB", given)
    with pytest.raises(ConfigError, match=f"JAXTUNE_CACHE_GB is '{given}'; expected gigabytes"):
        cache_eviction.limit(place)


def test_half_of_the_disk_without_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.delenv("JAXTUNE_CACHE_GB")
    assert cache_eviction.limit(place) == shutil.disk_usage(place).total / 2
