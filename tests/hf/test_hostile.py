"""Damaged and malicious model folders: exit 2 and one message; no crash, no read outside them."""

import contextlib
import json
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import tensors, write_folder, write_tokenizer
from safetensors.numpy import save_file

from jaxtune import convert
from jaxtune.config import ConfigError, ModelError
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load_params, open_model
from jaxtune.hf.tensors import INDEX, fetch, open_tensors
from jaxtune.storage import safe_read

CASE = "llama"
SECRET = b"the reader's own"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder; beside it lie files of its reader: a secret, and weights that would fit."""
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "outside").mkdir()
    write_folder(CASE, tmp_path / "outside")
    return write_tokenizer(write_folder(CASE, tmp_path / "model"))


_opened: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


@contextlib.contextmanager
def _reads() -> Iterator[list[str]]:
    """The files that are opened meanwhile, as the interpreter reports them."""
    global _opened
    if not getattr(_listen, "installed", False):
        sys.addaudithook(_listen)  # cannot be taken off again
        _listen.installed = True  # type: ignore[attr-defined]
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


# -- ways to spoil a folder ----------------------------------------------------------------------

Spoil = Callable[[Path], None]
CASES: dict[str, tuple[Spoil, str]] = {}


def case(name: str, message: str) -> Callable[[Spoil], Spoil]:
    def add(spoil: Spoil) -> Spoil:
        CASES[name] = (spoil, message)
        return spoil

    return add


def _header(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _put(folder: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + text + data)


def header_case(name: str, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    def spoil(folder: Path) -> None:
        header, data = _header(folder)
        changed = change(header)
        _put(folder, header if changed is None else changed, data)

    CASES[name] = (spoil, message)


def _norm(header: dict[str, Any], **keys: Any) -> None:
    header["model.norm.weight"].update(keys)


def _shift(header: dict[str, Any], by: int) -> None:
    last = max(header.values(), key=lambda entry: entry.get("data_offsets", [0])[0])
    last["data_offsets"] = [n + by for n in last["data_offsets"]]


header_case("overlap", lambda h: _shift(h, -4), "overlaps another tensor")
header_case("gap", lambda h: _shift(h, 4), "comes after 4 bytes that belong to no tensor")
header_case("wrong size", lambda h: _norm(h, shape=[31]), r"has 128 bytes, which is not F32 \[31\]")
header_case("product overflows", lambda h: _norm(h, shape=[2**62, 2**62]), "which is not F32")
header_case("many dimensions", lambda h: _norm(h, shape=[1] * 1000 + [32]), "of another shape")
header_case("zero size", lambda h: _norm(h, shape=[0, 10**12]), "which is not F32")
header_case("negative size", lambda h: _norm(h, shape=[-32]), "non-negative integers")
header_case("fraction", lambda h: _norm(h, shape=[32.0]), "non-negative integers")
header_case("true", lambda h: _norm(h, shape=[32, True]), "non-negative integers")
header_case("backwards", lambda h: _norm(h, dtype="X", data_offsets=[128, 0]), "ends before it")
header_case("dtype a list", lambda h: _norm(h, dtype=["F32"]), "unreadable safetensors header")
header_case("no entry", lambda h: h.update(extra=None), "unreadable safetensors header")
header_case("a list", lambda h: list(h), "unreadable safetensors header")
header_case("not json", lambda h: b"{'a': 1}", "unreadable safetensors header")
header_case("not utf-8", lambda h: b'{"\xff": 1}', "not UTF-8 at byte 2")
header_case("deep", lambda h: b'{"a":' * 100_000, "nested too deeply")
header_case("a key twice", lambda h: b'{"a": {}, "a": {}}', "key 'a' stands there twice")
header_case("NaN", lambda h: b'{"a": {"dtype": "F32", "shape": [NaN]}}', "unreadable safetensors")
header_case("huge integer", lambda h: b'{"a": ' + b"9" * 5000 + b"}", "unreadable safetensors")
header_case(
    "steering name",
    lambda h: h.update({"\x1b[2Jgone": h.pop("model.norm.weight")}),
    r"1 tensor without a row in family 'llama': '\\x1b\[2Jgone'",
)
for _code, _width in {"F64": 8, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}.items():
    header_case(
        _code,
        lambda h, code=_code, width=_width: _norm(h, dtype=code, shape=[128 // width]),
        rf"holds {_code} values; this version reads F32, BF16, F16|of another shape",
    )


@case("a 10 GB header", "claims a header of 10000000000 bytes in a file of")
def _(folder: Path) -> None:
    header, data = _header(folder)
    _put(folder, header, data, length=10_000_000_000)
    os.truncate(folder / "model.safetensors", 20_000_000_000)  # a hole: takes no disk


@case("a header beyond the file", "claims a header of")
def _(folder: Path) -> None:
    header, data = _header(folder)
    _put(folder, header, data, length=len(data) + 100_000)


@case("truncated", "ends after the file")
def _(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


@case("cut to nothing", "claims a header of 0 bytes in a file of 0")
def _(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 0)


@case("bytes behind the last", "16 bytes after the last tensor belong to none")
def _(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(bytes(16))


@case("pickled", r"pickled \(pytorch_model.bin\).*never read")
def _(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_case(name: str, file: Any, message: str) -> None:
    def spoil(folder: Path) -> None:
        weight_map = dict.fromkeys(tensors(CASE), "model.safetensors")
        (folder / INDEX).write_text(
            json.dumps({"weight_map": {**weight_map, "model.norm.weight": file}})
        )

    CASES[f"index: {name}"] = (spoil, message)


index_case("up", "../outside/model.safetensors", "only safetensors beside it are read")
index_case("missing", "two.safetensors", "two.safetensors is missing, though the index")
index_case("no text", 7, "no weight_map of names to files")
index_case("not safetensors", "../secret", "names '../secret'; only safetensors beside it")
index_case("with a NUL", "a\x00.safetensors", r"cannot be opened|is missing")


@case("index: absolute", "only safetensors beside it are read")
def _(folder: Path) -> None:
    file = str(folder.parent / "outside" / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(CASE), file)}))


@case("index: a list", "expected a JSON object; got a list")
def _(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


@case("index: a shard that is a link out", "is a link that leaves its folder")
def _(folder: Path) -> None:
    (folder / "one.safetensors").symlink_to("../outside/model.safetensors")
    weight_map = dict.fromkeys(tensors(CASE), "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def link_case(file: str, target: str, message: str) -> None:
    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    CASES[f"link: {file} -> {target}"] = (spoil, message)


for _file in ("model.safetensors", INDEX, "config.json", "generation_config.json"):
    link_case(_file, "../secret", "is a link that leaves its folder, to .*secret; such links are")
link_case("tokenizer.json", "../secret", "is a link that leaves its folder")
link_case("chat_template.jinja", "../secret", "is a link that leaves its folder")
link_case("README.md", "../secret", "is a link that leaves its folder")
link_case("config.json", "/dev/zero", "is a link that leaves its folder")
link_case("config.json", "config.json", "cannot be opened")
link_case("config.json", "gone.json", "cannot be opened: No such file")


def replaced(name: str, file: str, make: Callable[[Path], Any], message: str) -> None:
    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    CASES[f"{file}: {name}"] = (spoil, message)


for _file in ("config.json", "model.safetensors", "generation_config.json"):
    replaced("a pipe", _file, os.mkfifo, "expected a file; it is a folder, a pipe or a device")
    replaced("a folder", _file, os.mkdir, "expected a file; it is a folder|cannot be opened")
for _text, _message in {
    b"": "not readable as JSON",
    b"[]": "expected a JSON object; got a list",
    b"{": "not readable as JSON",
    b'{"a": "\xff"}': "not UTF-8 at byte 7",
    b"[" * 200_000: "nested too deeply",
    b'{"model_type": "llama", "model_type": "qwen2"}': "key 'model_type' stands there twice",
    b'{"vocab_size": ' + b"9" * 5000 + b"}": "not readable as JSON",
    b'{"model_type": ["llama"]}': "malformed|is unknown",
    b'{"model_type": "\\u001b[2J"}': r"model_type '\\x1b\[2J' is unknown",
}.items():
    replaced(repr(_text[:40]), "config.json", lambda f, t=_text: f.write_bytes(t), _message)
replaced(
    "20 GB",
    "config.json",
    lambda f: (f.touch(), os.truncate(f, 20_000_000_000)),
    "has 20,000,000,000 bytes; at most 16,000,000 are read",
)


def config_case(message: str, **keys: Any) -> None:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))

    CASES[f"config: {str(keys)[:60]}"] = (spoil, message)


config_case(r"of 8e\+24 parameters, which none has", vocab_size=10**12, hidden_size=10**12)
config_case("config.json and the weights do not belong together", vocab_size=10**9)
config_case("num_hidden_layers is 1000000000; at most 512", num_hidden_layers=10**9)
config_case("'vocab_size' is -1; expected a positive integer", vocab_size=-1)
config_case("'rms_norm_eps' is nan; expected a finite number", rms_norm_eps=float("nan"))
config_case("'rope_theta' is inf; expected a finite number", rope_theta=float("inf"))
config_case("config.json", rope_theta=10**400)
config_case("config.json", rope_scaling="linear")
config_case("config.json", rope_scaling=[1, 2])
config_case("config.json", rope_scaling={"type": {"a": 1}})
config_case("config.json", hidden_act=["silu"])
config_case("config.json", num_attention_heads="4")
config_case("dtype 'int4'; expected one of", torch_dtype="int4")
config_case("quantised by gptq are not supported", quantization_config={"quant_method": "gptq"})


@pytest.mark.parametrize("name", CASES)
def test_exit_2_one_message_and_no_read_outside(name, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    spoil, message = CASES[name]
    spoil(folder)
    with _reads() as opened:
        assert convert.main([str(folder), str(folder.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.startswith("jaxtune convert: ")
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert len(said) < 1500
    assert not (folder.parent / "out").exists()
    for outside in ("secret", "outside/model.safetensors"):
        assert str(folder.parent / outside) not in opened
    assert any(str(folder) in file for file in opened) or "link" in said or "cannot" in said


def test_the_same_in_a_process_of_its_own(folder):
    """As it is typed: nothing is left hanging, no traceback, the exit code of bad input."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune.convert", str(folder), str(folder.parent / "out")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxtune convert: ")
    assert "Traceback" not in done.stderr


def test_the_good_folder_is_read_and_leaves_the_secret_alone(folder):
    """What the test above listens with does hear a read, and the folder is good before."""
    with _reads() as opened:
        assert convert.main([str(folder), str(folder.parent / "out")]) == 0
        (folder.parent / "secret").read_bytes()
    assert str(folder / "model.safetensors") in opened
    assert str(folder / "config.json") in opened
    assert str(folder.parent / "secret") in opened


def test_random_weights_of_an_impossible_size_are_refused(folder):
    CASES[next(name for name in CASES if "10000000000" in name and "config" in name)][0](folder)
    with pytest.raises(ModelError, match="parameters, which none has"):
        open_model(folder, weights=False)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_tokenizer_is_read_with_the_same_care(file, folder):
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to("../secret")
    with pytest.raises(ModelError, match="is a link that leaves its folder"):
        load_tokenizer(str(folder))
    (folder / file).unlink()
    (folder / file).write_bytes(b"[" * 200_000)
    with pytest.raises((ModelError, ConfigError), match=r"nested too deeply|not a tokenizer"):
        load_tokenizer(str(folder))
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(
        (ModelError, ConfigError), match=r"it is a folder, a pipe|no tokenizer.json"
    ):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("declared", [[1], {"x": {}}, {"999": 2}, {"999": {}}])
def test_a_malformed_tokenizer_config_is_told(declared, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = declared
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: malformed"):
        load_tokenizer(str(folder))


# -- what is allowed -----------------------------------------------------------------------------


def test_links_within_the_folder_and_of_a_hub_cache_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert open_model(folder).tensors

    cache = tmp_path / "cache"
    snapshot = cache / "models--acme--tiny" / "snapshots" / "0123"
    blobs = cache / "models--acme--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_folder(CASE, blobs)
    for file in ("config.json", "model.safetensors"):
        (blobs / file).rename(blobs / f"e-{file}")
        (snapshot / file).symlink_to(f"../../blobs/e-{file}")
    model = open_model(snapshot)
    assert fetch(model.tensors["model.norm.weight"], (slice(0, 32),)).shape == (32,)

    store = cache / "blobs" / "ab"  # newer caches share files between repositories
    store.mkdir(parents=True)
    (blobs / "e-config.json").rename(store / "abc")
    (blobs / "e-config.json").symlink_to("../../blobs/ab/abc")
    with pytest.raises(ModelError, match="is a link that leaves its folder"):
        open_model(snapshot)  # any folder may be called blobs
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert open_model(snapshot).tensors

    (blobs / "e-config.json").unlink()
    (blobs / "e-config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="is a link that leaves its folder"):
        open_model(snapshot)


def test_code_of_a_stranger_is_never_run_and_this_is_said(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    out = tmp_path / "out"
    assert convert.main([str(folder), str(out)]) == 0
    assert "asks for code of its own (auto_map); it is never run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))


def test_a_link_from_a_run_directory_is_not_followed(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "hf").symlink_to("../outside")
    with pytest.raises(ModelError, match="run/hf: is a link that leaves"):
        open_model(run)


def test_tensors_of_size_zero_are_read_where_they_are_extra_rows(tmp_path):
    """Nothing divides by them and no empty file is mapped."""
    save_file({"a": np.zeros((0, 3), np.float32)}, tmp_path / "model.safetensors")
    assert fetch(open_tensors(tmp_path)["a"], (slice(0, 0), slice(1, 3))).shape == (0, 2)


# -- mutations -----------------------------------------------------------------------------------


def _mutate(data: bytes, rng: random.Random) -> bytes:
    """One change that a broken disk or a patient stranger would make."""
    place = rng.randrange(len(data))
    numbers = list(re.finditer(rb"-?\d+", data))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + data[place + rng.randrange(1, 20) :]
    if kind == 2:
        return data[:place] + rng.choice([b"[", b"{", b'"', b",", b"null", b"-"]) + data[place:]
    if kind == 3 and numbers:
        found = rng.choice(numbers)
        new = rng.choice([b"0", b"-1", b"1e9", b"1e999", b"true", b"[]", b'"x"', b"9" * 30, b"NaN"])
        return data[: found.start()] + new + data[found.end() :]
    if kind == 4:
        other = rng.randrange(len(data))
        return data[:place] + data[other : other + 40] + data[place:]
    return data[:place]


@pytest.mark.parametrize(
    ("part", "times"), [("length and header", 300), ("config.json", 120), (INDEX, 200)]
)
def test_mutated_bytes_give_a_model_or_a_model_error(part, times, folder):
    weight_map = dict.fromkeys(tensors(CASE), "model.safetensors")
    if part == INDEX:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    file = folder / ("model.safetensors" if part == "length and header" else part)
    good = file.read_bytes()
    end = 8 + struct.unpack("<Q", good[:8])[0] if file.suffix == ".safetensors" else len(good)
    rng = random.Random(part)
    refused = longest = 0
    for _ in range(times):
        head = good[:end]
        for _ in range(rng.choice([1, 1, 2, 5])):
            head = _mutate(head, rng) or b"{"
        file.write_bytes(head + good[end:])
        try:
            model = open_model(folder)
            for tensor in model.tensors.values():
                if tensor.code in ("F32", "F16", "BF16"):
                    fetch(tensor, tuple(slice(0, n) for n in tensor.shape))
        except ModelError as error:
            refused += 1
            longest = max(longest, len(str(error)))
    assert longest < 1500
    assert refused > times // 4
    file.write_bytes(good)
    params = load_params(open_model(folder), None, jnp.float32)
    export_model(
        folder.parent / "out", model=open_model(folder), params=params, tokenizer=None,
        template=None, card="",
    )  # fmt: skip


def test_text_is_shown_short_and_plain():
    assert safe_read.shown("a" * 500) == f"'{'a' * 79}...'"
    assert safe_read.plain("model.layers.0") == "model.layers.0"
    assert safe_read.plain("a\nb") == r"'a\nb'"
    assert safe_read.some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize(
    ("pattern", "quick"),
    [
        ("model.layers.3.self_attn.q_proj", True),
        (r"layers\.\d+\.mlp\.(up|down)_proj", True),
        ("(a+)+b", False),
        ("(a|a)*b", False),
        (r"(?:x{1,9}){3}", False),
        (".*a.*b.*c.*d.*e", False),
        ("a" * 1001, False),
    ],
)
def test_a_pattern_of_a_stranger_is_only_searched_for_if_that_ends(pattern, quick):
    assert safe_read.is_quick(pattern) is quick
