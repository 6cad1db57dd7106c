"""stores: objects by URL, over the real protocols, and what is done when the wire breaks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxtune.config import ConfigError, DataError, ModelError
from jaxtune.data import sources
from jaxtune.hf.folders import is_adapter, refuse_adapter
from jaxtune.storage import object_store
from jaxtune.storage.object_store import StoreError, join

ROWS = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def put_files(place: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        object_store.put_bytes(data, join(place, name))


def test_what_is_put_is_found_listed_and_fetched(place: str, tmp_path: Path) -> None:
    big = bytes(range(256)) * 40_000  # more than the libraries send at once without parts
    (tmp_path / "big").write_bytes(big)
    object_store.put(tmp_path / "big", join(place, "deep", "er", "big"))
    put_files(place, {"a.txt": b"a", "empty": b""})
    names = [item.url.removeprefix(place) for item in object_store.listed(place)]
    assert names == ["/a.txt", "/deep/er/big", "/empty"]
    found = object_store.find(join(place, "deep/er/big"))
    assert found is not None
    assert found.size == len(big)
    object_store.fetch(found, tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == big
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back"]
    assert object_store.read(join(place, "a.txt")) == b"a"
    assert object_store.find(join(place, "none")) is None
    assert object_store.find(join(place, "deep")) is None
    assert object_store.listed(join(place, "none")) == []
    object_store.remove([join(place, "a.txt"), join(place, "never-was")])
    assert object_store.find(join(place, "a.txt")) is None


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\n\r", b"\0"])
def test_the_last_byte_is_there(place: str, tmp_path: Path, end: bytes) -> None:
    object_store.put_bytes(b"x" + end, join(place, "bytes"))
    (tmp_path / "file").write_bytes(end)
    object_store.put(tmp_path / "file", join(place, "file"))
    assert object_store.read(join(place, "bytes")) == b"x" + end
    assert object_store.read(join(place, "file")) == end


def test_a_listing_does_not_take_a_neighbour_for_a_child(place: str) -> None:
    put_files(place, {"run/a": b"1", "run-2/b": b"2"})
    assert [item.url for item in object_store.listed(join(place, "run"))] == [join(place, "run/a")]


def test_another_content_has_another_tag(place: str) -> None:
    url = join(place, "x")
    object_store.put_bytes(b"one", url)
    first = object_store.find(url)
    object_store.put_bytes(b"two", url)
    second = object_store.find(url)
    assert first is not None
    assert second is not None
    assert first.tag != second.tag


@pytest.mark.parametrize("name", ["a.bin", "b.bin"])
def test_what_is_not_as_it_was_put_is_named(place: str, tmp_path: Path, name: str) -> None:
    for file in ("a.bin", "b.bin"):
        (tmp_path / file).write_bytes(file.encode() * 1000)
    object_store.put_all(tmp_path, ["a.bin", "b.bin"], place)
    names = ["a.bin", "b.bin"]
    assert object_store.unequal(tmp_path, names, place, contents=True) == ""
    data = bytearray((tmp_path / name).read_bytes())
    data[500] ^= 1
    object_store.put_bytes(bytes(data), join(place, name))
    assert object_store.unequal(tmp_path, names, place, contents=False) == ""
    assert f"{name}: its bytes are not those" in object_store.unequal(
        tmp_path, names, place, contents=True
    )
    object_store.put_bytes(bytes(data[:-1]), join(place, name))
    assert "bytes instead of 5,000" in object_store.unequal(tmp_path, names, place, contents=False)
    object_store.remove([join(place, name)])
    assert "is not there" in object_store.unequal(tmp_path, names, place, contents=False)


# -- the wire breaks -------------------------------------------------------------------------------

SCHEMES = pytest.mark.parametrize("scheme", ["s3", "gs"])


@pytest.fixture
def far(scheme: str, request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(scheme)
    return found


@SCHEMES
def test_half_an_object_is_never_taken_for_whole(
    scheme: str, far: str, wire: Any, tmp_path: Path
) -> None:
    url = join(far, "data.jsonl")
    object_store.put_bytes(LINES * 2000, url)
    item = object_store.find(url)
    assert item is not None
    cut = [0]

    def fault(method: str, path: str) -> object:
        if method == "GET" and "data.jsonl" in path and ("alt=media" in path or scheme == "s3"):
            cut[0] += 1
            return "cut"
        return None

    wire[scheme].fault = fault
    with pytest.raises(StoreError, match=r"data\.jsonl: cannot be read"):
        object_store.fetch(item, tmp_path / "data.jsonl")
    assert cut[0] >= 3  # it was tried again
    assert list(tmp_path.iterdir()) == []
    wire[scheme].fault = lambda method, path: None
    object_store.fetch(item, tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_bytes() == LINES * 2000


@SCHEMES
def test_a_fault_that_passes_is_not_noticed(scheme: str, far: str, wire: Any) -> None:
    left = [2]

    def fault(method: str, path: str) -> object:
        left[0] -= 1
        return 503 if left[0] >= 0 else None

    wire[scheme].fault = fault
    object_store.put_bytes(b"x", join(far, "x"))
    assert left[0] < 0
    wire[scheme].fault = lambda method, path: None
    assert object_store.read(join(far, "x")) == b"x"


@SCHEMES
def test_what_is_refused_is_said_at_once(scheme: str, far: str, wire: Any) -> None:
    wire[scheme].fault = lambda method, path: 403
    began, asked = time.monotonic(), len(wire[scheme].asked)
    with pytest.raises(StoreError, match=r"/x: cannot be written: .* asks for credentials"):
        object_store.put_bytes(b"x", join(far, "x"))
    assert len(wire[scheme].asked) - asked <= 3
    assert time.monotonic() - began < 10


@SCHEMES
def test_a_bucket_that_is_not_there(scheme: str, wire: Any) -> None:
    with pytest.raises(StoreError, match="cannot be written: no such object, or no such bucket"):
        object_store.put_bytes(b"x", f"{scheme}://not-a-bucket-of-ours/x")
    assert object_store.listed(f"{scheme}://not-a-bucket-of-ours/x") == []


@pytest.mark.slow
def test_a_store_that_is_gone_fails_once_for_many(s3: str, wire: Any, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / str(number)).write_bytes(b"x")
    wire["s3"].fault = lambda method, path: "gone"
    began = time.monotonic()
    with pytest.raises(StoreError, match="cannot be written"):
        object_store.put_all(tmp_path, map(str, range(60)), s3)
    assert time.monotonic() - began < 60
    assert len({path for _, path in wire["s3"].asked if path.startswith(f"/{s3[5:]}/")}) < 20


def test_an_object_that_changes_while_it_is_read_is_refused(place: str, tmp_path: Path) -> None:
    object_store.put_bytes(b"old", join(place, "x"))
    before = object_store.find(join(place, "x"))
    object_store.put_bytes(b"new", join(place, "x"))
    assert before is not None
    with pytest.raises(StoreError, match="was changed while it was read"):
        object_store.fetch(before, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("az://container/x", r"az://container/x: az:// is none of the stores .* gs://BUCKET/PATH"),
        ("https://host/x.jsonl", "https:// is none of the stores"),
        ("s3://", "s3://: names no bucket. Expected s3://BUCKET/PATH"),
        ("gs:///", "names no bucket"),
    ],
)
def test_urls_that_name_nothing(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        object_store.find(url)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    object_store._system.cache_clear()
    extra = {"gs": "gcs", "s3": "s3"}[scheme]
    with pytest.raises(ConfigError, match=rf"{scheme}:// needs {package}.*'jaxtune\[{extra}\]'"):
        object_store.find(f"{scheme}://bucket/x")
    object_store._system.cache_clear()


@pytest.mark.parametrize("name", ["../out", "a/../../b", "a//b", "", "a\0b", "./a"])
def test_a_name_that_would_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="is no name for a file"):
        object_store.inside(f"gs://b/run/{name}", "gs://b/run")


@pytest.mark.parametrize("name", ["run", "/abs/run", "owner/model", "C:/x", "a:b", "./x://y"])
def test_paths_and_ids_are_no_urls(name: str) -> None:
    assert not object_store.is_url(name)


# -- data ------------------------------------------------------------------------------------------


def test_data_is_read_by_name_by_glob_and_by_folder(place: str) -> None:
    put_files(
        place,
        {
            "d/a.jsonl": LINES, "d/b.jsonl": LINES, "d/README.md": b"no data", "d/.hidden.jsonl":
            b"{}", "d/deeper/c.jsonl": LINES, "d/dataset_info.json": b"{}",
        },
    )  # fmt: skip
    one = sources.find(join(place, "d/a.jsonl"))
    assert [file.name for file in one] == [join(place, "d/a.jsonl")]
    assert [record.fields for record in sources.read(one)] == ROWS
    assert next(iter(sources.read(one))).where == f"{join(place, 'd/a.jsonl')}:1"
    both = [join(place, "d/a.jsonl"), join(place, "d/b.jsonl")]
    assert [file.name for file in sources.find(join(place, "d"))] == both
    assert [file.name for file in sources.find(join(place, "d/*.jsonl"))][-2:] == both
    deep = [file.name for file in sources.find(join(place, "d/**/c.jsonl"))]
    assert deep == [join(place, "d/deeper/c.jsonl")]


def test_the_same_rows_have_the_same_digest_wherever_they_lie(place: str, tmp_path: Path) -> None:
    object_store.put_bytes(LINES, join(place, "t.jsonl"))
    (tmp_path / "t.jsonl").write_bytes(LINES)
    there, here = sources.find(join(place, "t.jsonl")), sources.find(str(tmp_path / "t.jsonl"))
    assert sources.digest(there) == sources.digest(here)


def test_data_that_has_changed_is_fetched_anew_and_other_data_is_not(s3: str, wire: Any) -> None:
    put_files(s3, {"d/a.jsonl": LINES, "d/b.jsonl": LINES})
    sources.find(join(s3, "d"))
    object_store.put_bytes(LINES[: LINES.index(b"\n") + 1], join(s3, "d/b.jsonl"))
    sources._of_store.cache_clear()
    asked = len(wire["s3"].asked)
    files = sources.find(join(s3, "d"))
    assert len(list(sources.read(files))) == len(ROWS) + 1
    got = [path for method, path in wire["s3"].asked[asked:] if method == "GET" and "?" not in path]
    assert got == [f"/{s3[5:]}/d/b.jsonl"]


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("none.jsonl", {}, DataError, r"none\.jsonl: no data file \(\.json, .* in the store"),
        ("none/*.jsonl", {}, DataError, "no data file"),
        ("x.exe", {}, ConfigError, r"x\.exe: cannot read '\.exe'"),
        ("x.exe", {"split": "train"}, ConfigError, r"datasets\[\]\.split: .* is in a store"),
        ("x.exe", {"revision": "main"}, ConfigError, r"datasets\[\]\.revision: .* is in a store"),
    ],
)
def test_data_that_cannot_be_had(
    place: str, name: str, options: dict[str, str], error: type[Exception], text: str
) -> None:
    object_store.put_bytes(b"MZ", join(place, "x.exe"))
    with pytest.raises(error, match=text):
        sources.find(join(place, name), **options)


# -- models ----------------------------------------------------------------------------------------

MODEL = {
    "config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(1000),
    "pytorch_model.bin": b"a pickle", "modeling.py": b"code", "nested/config.json": b"{}",
    "tokenizer.json": b"{}",
}  # fmt: skip


def test_of_a_model_only_what_is_read_is_fetched(place: str) -> None:
    put_files(place, MODEL)
    folder = object_store.download(place, ("*.json", "model*.safetensors"))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert object_store.download(place, ("*.json", "model*.safetensors")) == folder
    folder = object_store.download(place, ("tokenizer.json", "nested/*.json"))
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))
    assert names == ["nested/config.json", "tokenizer.json"]


def test_of_a_run_its_model_is_meant(place: str) -> None:
    put_files(place, {f"hf/{name}": data for name, data in MODEL.items()})
    put_files(place, {"config.yaml": b"", "step-3.json": b"{}", "wandb-run-id.txt": b"x"})
    names = {path.name for path in object_store.download(place, ("*.json", "*.txt")).iterdir()}
    assert names == {"config.json", "tokenizer.json"}


def test_a_file_that_came_whole_is_not_fetched_again(s3: str, wire: Any) -> None:
    put_files(s3, MODEL)
    wire["s3"].fault = lambda method, path: 500 if "model.safetensors" in path else None
    with pytest.raises(StoreError, match=r"model\.safetensors: cannot be read"):
        object_store.download(s3, ("*.json", "*.safetensors"))
    wire["s3"].fault = lambda method, path: None
    asked = len(wire["s3"].asked)
    folder = object_store.download(s3, ("*.json", "*.safetensors"))
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    got = [path for method, path in wire["s3"].asked[asked:] if method == "GET" and "?" not in path]
    assert got == [f"/{s3[5:]}/model.safetensors"]


def test_a_model_that_is_not_there(place: str) -> None:
    from jaxtune.data.tokenizer import load_tokenizer
    from jaxtune.hf.load import open_model

    for ask in (open_model, load_tokenizer):
        with pytest.raises((ConfigError, ModelError), match="no model there: expected"):
            ask(place)
    with pytest.raises(ConfigError, match=r"revision: .* is not on the hub"):
        open_model(place, revision="main")


def test_an_adapter_in_a_store_is_known_as_one(place: str) -> None:
    put_files(place, {"adapter_config.json": b'{"base_model_name_or_path": "gs://b/base"}'})
    assert is_adapter(place)
    with pytest.raises(ConfigError, match=r"is an adapter, not a model.* its base, gs://b/base"):
        refuse_adapter(place)
