"""Safetensors read and written, against the safetensors library; damaged files refused."""

import errno
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from jaxtune.config import ModelError
from jaxtune.hf import tensors
from jaxtune.hf.tensors import ShardWriter, fetch, index_of, open_tensors, plan_shards, read_header

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def _values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,), "c": (7, 2, 2), "d": (), "e": (0, 3)}
    return {
        f"{name}.{np.dtype(dtype).name}": rng.normal(size=shape).astype(dtype)
        for name, shape in shapes.items()
        for dtype in DTYPES
    }


def _whole(values: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in values.shape)


def _planned(values: dict[str, np.ndarray], limit: int) -> list[tensors.ShardPlan]:
    return plan_shards({name: (v.dtype, v.shape) for name, v in values.items()}, limit)


def test_reads_what_the_library_wrote(tmp_path):
    values = _values()
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    found = open_tensors(tmp_path)
    assert found.keys() == values.keys()
    for name, expected in values.items():
        got = fetch(found[name], _whole(expected))
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()
    part = fetch(found["c.bfloat16"], (slice(2, 5), slice(1, 2), slice(0, 2)))
    np.testing.assert_array_equal(part, values["c.bfloat16"][2:5, 1:2])


@pytest.mark.parametrize("limit", [10**9, 60])
def test_the_library_reads_what_was_written_in_any_order(tmp_path, limit):
    values = _values()
    plans = _planned(values, limit)
    with ShardWriter(tmp_path, plans) as writer:
        for name in reversed(values):
            writer.write(name, values[name])
    for plan in plans:
        assert sum(values[name].nbytes for name in plan.tensors) <= max(
            limit, 112
        )  # the largest alone
        with safe_open(tmp_path / plan.file, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for name in plan.tensors:
                assert file.get_tensor(name).tobytes() == values[name].tobytes()
    index = index_of(plans)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    assert index["weight_map"].keys() == values.keys()
    if limit == 60:
        count = len(plans)
        assert plans[0].file == f"model-00001-of-{count:05d}.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert open_tensors(tmp_path).keys() == values.keys()
    else:
        assert [plan.file for plan in plans] == ["model.safetensors"]


@pytest.mark.parametrize("size", [1, 4096, 10_000])
def test_a_change_anywhere_changes_the_checksum(size, tmp_path):
    rng = np.random.default_rng(size)
    values = rng.integers(0, 256, size, np.uint8)
    right = tensors.checksum(values)
    assert np.array_equal(right, tensors.checksum(values.copy()))
    for place in {0, size // 2, size - 1}:
        for bit in range(8):
            wrong = values.copy()
            wrong[place] ^= 1 << bit
            assert not np.array_equal(tensors.checksum(wrong), right)
    file = tmp_path / "file"
    file.write_bytes(b"head" + values.tobytes())
    run = tensors.WrittenRun("a", file, 4, size, right)
    assert list(tensors.damaged([run])) == []
    file.write_bytes(b"head" + bytes([values[0] ^ 1]) + values.tobytes()[1:])
    assert list(tensors.damaged([run])) == [run]
    file.write_bytes(b"head" + values.tobytes()[:-1])
    assert list(tensors.damaged([run])) == [run]


@pytest.mark.parametrize("goes_past_the_cache", [True, False])
def test_whole_pages_go_past_the_cache_where_they_can(goes_past_the_cache, tmp_path, monkeypatch):
    """Tensors that begin and end anywhere in a page, in blocks that do, in memory that lies as the
    file does or elsewhere: the file is the same."""
    rng, by_handle = np.random.default_rng(0), {}
    write = tensors._write_at

    def counted(handle, values, start):
        by_handle.setdefault(handle, []).append(len(values))
        write(handle, values, start)

    monkeypatch.setattr(tensors, "_write_at", counted)
    if not goes_past_the_cache:
        monkeypatch.setattr(tensors, "_open_direct", lambda file: None)
    shapes = {"a": (5, 700), "b": (3,), "c": (9000, 2), "d": (1,), "e": (40, 1000)}
    values = {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    scratch = tensors.Scratch()
    with ShardWriter(tmp_path, _planned(values, 10**9)) as writer:
        can = next(iter(writer._direct.values())) is not None
        for name, whole in values.items():
            for first in range(0, len(whole), 1003):
                rows = whole[first : first + 1003]
                past = writer.place(name, first) + (64 if name == "a" else 0)
                block = scratch.empty(rows.shape, rows.dtype, past=past)
                block[...] = rows
                writer.write(name, block, first)
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, expected in values.items():
        assert found[name].tobytes() == expected.tobytes()
    assert list(tensors.damaged(writer.written)) == []
    pages = [n for lengths in by_handle.values() for n in lengths if n and n % tensors.PAGE == 0]
    assert not can or max(pages) == 80_000 - 80_000 % tensors.PAGE  # e, but for its edges
    damaged = bytearray((tmp_path / "model.safetensors").read_bytes())
    damaged[-2] ^= 4
    (tmp_path / "model.safetensors").write_bytes(damaged)
    assert [run.name for run in tensors.damaged(writer.written)] == ["e"]


def test_memory_as_a_file_system_has_no_way_past_it(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").write_bytes(b"12345678")
    run = tensors.WrittenRun(
        "a", tmp_path / "file", 0, 8, tensors.checksum(np.frombuffer(b"12345678", np.uint8))
    )
    with monkeypatch.context() as patch:
        patch.setattr(tensors.os, "preadv", refuse)
        assert tensors._open_direct(tmp_path / "file") is None
    monkeypatch.setattr(tensors, "_open_direct", lambda file: None)
    assert list(tensors.damaged([run])) == []


def test_the_writer_takes_what_was_planned(tmp_path):
    values = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}

    def write_a_transposed_then_only_b() -> None:
        with ShardWriter(tmp_path, _planned(values, 10**9)) as writer:
            with pytest.raises(ValueError, match=r"a: float32\(3, 2\); planned float32\(2, 3\)"):
                writer.write("a", values["a"].T)
            writer.write("b", values["b"])

    with pytest.raises(ValueError, match="never written: a"):
        write_a_transposed_then_only_b()


def _file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, b"", 10**13, "claims a header of 10000000000000 bytes in a file of 10"),
        (b"{broken", b"", None, "unreadable safetensors header"),
        (b"[1]", b"", None, "unreadable safetensors header"),
        ({"a": {"dtype": "F32"}}, b"", None, "unreadable safetensors header"),
        ({"a": _entry(-4, 0, [1])}, b"", None, "non-negative integers"),
        ({"a": _entry(0, 8, [3])}, bytes(8), None, r"a has 8 bytes, which is not F32 \[3\]"),
        ({"a": _entry(0, 8, [2])}, bytes(4), None, "a ends after the file"),
        (
            {"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])},
            bytes(12),
            None,
            "b overlaps another tensor",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, header, data, length, message):
    with pytest.raises(ModelError, match=message):
        read_header(_file(tmp_path / "model.safetensors", header, data, length))


def test_an_unaligned_header_is_read(tmp_path):
    values = np.arange(3, dtype=np.float32)
    text = json.dumps({"a": _entry(0, 12, [3])}).encode()
    text += b" " * ((3 - len(text)) % 8)  # the values begin at an odd byte
    file = _file(tmp_path / "model.safetensors", text, values.tobytes())
    np.testing.assert_array_equal(fetch(read_header(file)["a"], (slice(0, 3),)), values)


def test_other_dtypes_are_refused_only_when_wanted(tmp_path):
    header = {"a": _entry(0, 4, [4], "F8_E4M3"), "b": _entry(4, 12, [2])}
    found = read_header(_file(tmp_path / "model.safetensors", header, bytes(12)))
    assert fetch(found["b"], (slice(0, 2),)).tolist() == [0, 0]
    with pytest.raises(ModelError, match="holds F8_E4M3 values; this version reads F32, BF16, F16"):
        fetch(found["a"], (slice(0, 4),))


def _index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_an_index_is_believed_only_within_its_folder(tmp_path):
    _file(tmp_path / "outside.safetensors", {"a": _entry(0, 4, [1])}, bytes(4))
    folder = tmp_path / "model"
    folder.mkdir()
    _file(folder / "one.safetensors", {"a": _entry(0, 4, [1])}, bytes(4))
    for file in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "weights.bin"):
        _index(folder, {"a": file})
        with pytest.raises(ModelError, match=r"names '.*'; only safetensors beside it are read"):
            open_tensors(folder)
    _index(folder, {"a": "two.safetensors"})
    with pytest.raises(ModelError, match=r"two.safetensors is missing, though the index names it"):
        open_tensors(folder)
    _index(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ModelError, match="b not in the file the index names"):
        open_tensors(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="not a safetensors index"):
        open_tensors(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"no weights: expected .*; found config.json.*init: random"
    ):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model.bin\).*never read"):
        open_tensors(tmp_path)
