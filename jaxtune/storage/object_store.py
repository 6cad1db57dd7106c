"""Object stores: what lies at gs:// and s3:// URLs, listed, fetched and put. fsspec underneath.

The one place that speaks to them. An object appears whole or not at all, in the store as here: what
is fetched lies under another name until it has the size that the store states. What fails on the
way is tried again, and what cannot be done is a `StoreError` that names the URL and the reason.
Knows no model and no run.
"""

from __future__ import annotations

import base64
import concurrent.futures
import errno
import filecmp
import fnmatch
import functools
import hashlib
import importlib
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxtune.config import ConfigError
from jaxtune.storage import cache_eviction
from jaxtune.storage.safe_read import reason

# Scheme -> (the package that fsspec needs, our extra). `memory` is fsspec's own, within a process.
_SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "memory": ("fsspec", "s3")}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PAUSES = (1.0, 4.0)  # seconds; the libraries try each request several times themselves
_PART = 50 * 2**20  # bytes that gcsfs sends at once
_THREADS = 8
IN_MEMORY = "in_memory"  # folder of the cache for rows that a caller had in memory
# Words of answers that no second try changes, whichever class of error they come in.
_REFUSED = re.compile(r"Forbidden|Access Denied|Unauthorized|credential|Invalid bucket", re.I)

T = TypeVar("T")


class StoreError(ConfigError):
    """A store does not have it, refuses it, or cannot be reached."""


class Item(NamedTuple):
    """An object as the store describes it. `tag` is another one after every change; `md5` is hex,
    None where the store states none."""

    url: str
    size: int
    tag: str
    md5: str | None


def is_url(name: str) -> bool:
    """Test if `name` is a URL, of a known store or not, and no path or hub id."""
    return _URL.match(name) is not None


def join(url: str, *names: str | int) -> str:
    return "/".join([url.rstrip("/"), *map(str, names)])


def name_of(url: str) -> str:
    """Return the name of an object or folder within its own.

    >>> name_of("gs://bucket/run/hf/")
    'hf'
    """
    return url.rstrip("/").rpartition("/")[2]


def default_folder() -> Path:
    """Return the folder of what can be fetched again: JAXTUNE_CACHE, else ~/.cache/jaxtune."""
    return Path(os.environ.get("JAXTUNE_CACHE") or Path.home() / ".cache" / "jaxtune")


# -- one object ------------------------------------------------------------------------------------


def find(url: str) -> Item | None:
    """Find the object at `url`; None where nothing is."""
    system, path = _opened(url)

    def ask() -> Item | None:
        try:
            info = system.info(path)
        except FileNotFoundError:
            return None
        return _item(url, info) if info["type"] == "file" else None

    return _tried(url, "read", ask)


def listed(url: str) -> list[Item]:
    """List every object below the folder `url`, however deep, by name."""
    system, path = _opened(url)

    def ask() -> dict[str, Any]:
        try:
            return dict(system.find(path, detail=True))
        except FileNotFoundError:
            return {}

    below = f"{path.rstrip('/')}/"
    entries = _tried(url, "listed", ask)
    # A name that ends with a slash is how some tools show a folder.
    names = (name for name in sorted(entries) if name.startswith(below) and name[-1] != "/")
    return [_item(url, entries[name]) for name in names if entries[name]["type"] == "file"]


def matching(pattern: str) -> list[Item]:
    """List the objects that a glob names, by name; `**` reaches into folders."""
    system, path = _opened(pattern)
    entries = _tried(pattern, "listed", lambda: dict(system.glob(path, detail=True)))
    items = [entries[name] for name in sorted(entries) if entries[name]["type"] == "file"]
    return [_item(pattern, item) for item in items]


def read(url: str) -> bytes:
    """A small object's bytes."""
    system, path = _opened(url)
    return _tried(url, "read", lambda: bytes(system.cat_file(path)))


def put_bytes(data: bytes, url: str) -> None:
    system, path = _opened(url)
    # gcsfs sends what is small between lines that begin with a line feed alone, and a carriage
    # return before one is taken for a part of it: the object is a byte short. Such data go alone.
    alone = url.startswith("gs:") and data.endswith(b"\r")
    how = {"chunksize": min(len(data), _PART)} if alone else {}
    _tried(url, "written", lambda: system.pipe_file(path, data, **how))


def put(file: Path, url: str) -> None:
    if url.startswith("gs:") and file.stat().st_size < _PART and _ends_in_return(file):
        return put_bytes(file.read_bytes(), url)
    system, path = _opened(url)
    _tried(url, "written", lambda: system.put_file(str(file), path))


def _ends_in_return(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        return stream.read(1) == b"\r"


def fetch(item: Item, file: Path) -> None:
    """Fetch into `file`, whole. Raises `StoreError` where the bytes are not those stated."""
    system, path = _opened(item.url)
    file.parent.mkdir(parents=True, exist_ok=True)

    def get() -> None:
        coming = file.with_name(f".fetching-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            system.get_file(path, str(coming))
            came = coming.stat().st_size
            if came != item.size:
                raise OSError(f"{came:,} bytes came of {item.size:,}")
            if _item(item.url, system.info(path)).tag != item.tag:
                raise ValueError("it was changed while it was read; run the same command again")
            # A tag of S3 may be no MD5 and yet look like one; what Google states is.
            if item.url.startswith("gs:") and item.md5 not in (None, _md5(coming)):
                raise OSError("what came has another MD5 than the store states")
            os.replace(coming, file)
        finally:
            coming.unlink(missing_ok=True)

    _tried(item.url, "read", get)


def remove(urls: Iterable[str]) -> None:
    """Remove objects; one that is not there is removed already."""

    def drop(url: str) -> None:
        system, path = _opened(url)
        try:
            _tried(url, "removed", lambda: system.rm_file(path))
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    _all(drop, urls)


# -- many ------------------------------------------------------------------------------------------


def fetch_all(items: Iterable[Item], below: str, folder: Path) -> None:
    """Fetch `items` below the URL `below` into the same folders of `folder`."""
    pairs = [(item, folder / inside(item.url, below)) for item in items]
    _all(lambda pair: fetch(*pair), pairs)


def put_all(folder: Path, names: Iterable[str], below: str) -> None:
    """Put the files `names` of `folder` below the URL `below`."""
    _all(lambda name: put(folder / name, join(below, name)), names)


def inside(url: str, below: str) -> str:
    """Return the path of `url` below `below`. Raises `StoreError` for one that leads elsewhere."""
    path = url.removeprefix(below.rstrip("/")).lstrip("/")
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{url}: is no name for a file. Rename the object, or remove it.")
    return path


def unequal(folder: Path, names: Sequence[str], below: str, *, contents: bool) -> str:
    """Describe what in the store differs from `folder`; empty where all is equal.

    Sizes always; with `contents` also the bytes: by MD5 where the store states it, else read back.
    """
    there = {inside(item.url, below): item for item in listed(below)}

    def look(name: str) -> str:
        item, size = there.get(name), (folder / name).stat().st_size
        if item is None:
            return f"{join(below, name)}: is not there"
        if item.size != size:
            return f"{item.url}: has {item.size:,} bytes instead of {size:,}"
        if not contents or item.md5 == _md5(folder / name):
            return ""
        with tempfile.TemporaryDirectory(prefix="jaxtune-") as place:
            fetch(item, Path(place) / "back")
            same = filecmp.cmp(Path(place) / "back", folder / name, shallow=False)
        return "" if same else f"{item.url}: its bytes are not those that were written"

    return next(filter(None, _all(look, names)), "")


# -- what is only read, kept in the cache ----------------------------------------------------------


def cached(items: Sequence[Item], below: str | None = None) -> Path:
    """A folder with these objects, by their own names, or as they lie `below`; fetched where it
    lacks them.

    It is called after where they lie, their tags and sizes: an object that has changed is another.
    A file in it is whole, and stays when a later one fails. What was used longest ago makes room.
    """
    key = json.dumps([[item.url, item.tag, item.size] for item in items])
    folder = default_folder() / "stores" / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        cache_eviction.use(folder)
        files = {
            folder / inside(item.url, below or item.url.rpartition("/")[0]): item for item in items
        }
        lacking = [(item, file) for file, item in files.items() if not file.is_file()]
        free_space(sum(item.size for item, _ in lacking))
        _all(lambda pair: fetch(*pair), lacking)
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be written: {error.strerror or error}. JAXTUNE_CACHE names another "
            "folder for what is fetched."
        ) from None
    return folder


def free_space(needed: int) -> None:
    """Evict what was used longest ago until so many more bytes fit; see `cache_eviction`."""
    if needed:
        places = [default_folder() / name for name in ("stores", "read", IN_MEMORY)]
        cache_eviction.evict(needed, places)


def download(url: str, patterns: Sequence[str]) -> Path:
    """Fetch what lies at `url` and matches `patterns`: a model or a tokenizer.

    Of a run directory, its `hf/`. Raises `StoreError` where nothing does.
    """
    for place in (url, join(url, "hf")):
        there = {inside(item.url, place): item for item in listed(place)}
        names = {name for name in there if "/" not in name}
        if place == url and not names & _MODEL_FILES and find(join(url, "hf", "config.json")):
            continue
        files = [item for name, item in there.items() if _matches(name, patterns)]
        if files:
            return cached(files, place)
    raise StoreError(
        f"{url}: no model there: expected {', '.join(patterns)} in that folder of the store. "
        "Check the name and that you may read it."
    )


_MODEL_FILES = {"config.json", "adapter_config.json", "tokenizer.json"}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Test if a pattern names it; a star takes no slash."""
    return any(
        fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


# -- fsspec ----------------------------------------------------------------------------------------


def _opened(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises `ConfigError` for one that we do not know, or
    whose package is missing."""
    match = _URL.match(url)
    scheme = match.group(1) if match else ""
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"{url}: {scheme or 'no'}:// is none of the stores that can be read and written: "
            "gs://BUCKET/PATH and s3://BUCKET/PATH. Give one of these, or a local path."
        )
    if not url[len(scheme) + 3 :].strip("/"):
        raise ConfigError(f"{url}: names no bucket. Expected {scheme}://BUCKET/PATH.")
    system = _system(scheme)
    return system, str(system._strip_protocol(url))


@functools.cache
def _system(scheme: str) -> Any:
    package, extra = _SCHEMES[scheme]
    try:
        fsspec = importlib.import_module("fsspec")
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"{scheme}:// needs {package}. Run: pip install 'jaxtune[{extra}]'"
        ) from None
    # They report what they try again, with tracebacks; what they cannot do is raised.
    for name in ("gcsfs", "s3fs", "botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    more: dict[str, Any] = {}
    if scheme == "gs":
        # Without one an answer that stops half way is waited for, for ever.
        timeout = importlib.import_module("aiohttp").ClientTimeout
        more["requests_timeout"] = timeout(total=None, sock_connect=10, sock_read=60)
        if "STORAGE_EMULATOR_HOST" in os.environ:  # gcsfs finds it, and would look for credentials
            more["token"] = "anon"
    try:
        if scheme == "gs":
            # What is registered asks over gRPC for the kind of bucket, for minutes where nobody
            # answers, to rename and remove folders faster, which is not done here.
            plain = importlib.import_module("gcsfs.core").GCSFileSystem
            return plain(use_listings_cache=False, **more)
        return fsspec.filesystem(scheme, use_listings_cache=False, **more)
    except Exception as error:  # credentials are looked for here
        raise StoreError(f"{scheme}://: cannot be opened: {reason(error)}.") from error


def _item(url: str, info: dict[str, Any]) -> Item:
    scheme = _URL.match(url)
    assert scheme is not None
    name = str(info["name"]).lstrip("/")
    etag = str(info.get("ETag") or "").strip('"')
    if "md5Hash" in info:
        md5: str | None = base64.b64decode(str(info["md5Hash"])).hex()
    else:
        md5 = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None
    made = info.get("created")  # in memory: a time, or its seconds
    stamp = info.get("generation") or etag or getattr(made, "timestamp", lambda: made)()
    return Item(f"{scheme.group(0)}{name}", int(info["size"]), str(stamp), md5)


def _tried(url: str, done: str, act: Callable[[], T]) -> T:
    """Call `act()`, again after a pause where it may help. Raises `StoreError`."""
    for pause in (*_PAUSES, None):
        try:
            return act()
        except StoreError:
            raise
        except Exception as error:  # each transport has its own kinds
            final = isinstance(error, FileNotFoundError | PermissionError | ValueError)
            if pause is None or final or _local(error) or _REFUSED.search(str(error)):
                raise _explained(url, done, error) from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def _local(error: Exception) -> bool:
    """A disk that is full here is nothing the store can mend."""
    full = (errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)
    return isinstance(error, OSError) and error.errno in full


def _explained(url: str, done: str, error: Exception) -> StoreError:
    if isinstance(error, FileNotFoundError):
        return StoreError(f"{url}: cannot be {done}: no such object, or no such bucket.")
    why = reason(error).rstrip(".")
    if _local(error):
        return StoreError(f"{url}: cannot be {done}: here, {why}. Free some space.")
    if isinstance(error, PermissionError) or _REFUSED.search(why):
        return StoreError(
            f"{url}: cannot be {done}: {why}. The store asks for credentials that may do that: "
            "gcloud auth application-default login, the VM's service account, or AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY."
        )
    return StoreError(f"{url}: cannot be {done}: {type(error).__name__}: {why}.", passes=True)


def _all(act: Callable[[Any], T], things: Iterable[Any]) -> list[T]:
    """Call `act` of each, several at once; the first error is raised once all have ended."""
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    try:
        return [each.result() for each in [pool.submit(act, thing) for thing in things]]
    finally:  # what has not begun is not begun: a store that is gone fails slowly
        pool.shutdown(cancel_futures=True)


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
