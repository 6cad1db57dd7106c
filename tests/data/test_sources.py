"""Files -> records with lines; every broken file names its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from jaxtune.config import ConfigError, DataError
from jaxtune.data import sources

ROWS = [{"text": "a"}, {"text": "b\u2028c"}, {"text": "d", "more": [None, {"x": 1}]}]


def read(path: Path) -> list[sources.Record]:
    return list(sources.read(sources.check(str(path))))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("layout", ["lines", "list", "pretty"])
def test_every_layout_under_every_suffix(tmp_path: Path, suffix: str, layout: str) -> None:
    if layout == "lines":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    else:
        text = json.dumps(ROWS, ensure_ascii=False, indent=1 if layout == "pretty" else None)
    path = tmp_path / f"data{suffix}"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    found = read(path)
    assert [record.fields for record in found] == ROWS  # no invented keys, no lost nulls
    lines = [record.line for record in found]
    assert lines == {"lines": [1, 2, 3], "list": [1, 1, 1], "pretty": [2, 5, 8]}[layout]


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n\n{"text": "a"}\r\n')
    assert read(path) == [(3, {"text": "a"})]


def broken_list(line: int, text: str) -> str:
    rows = [json.dumps({"text": str(i)}) for i in range(30)]
    rows[line - 2] = text  # line 1 is the bracket
    return "[\n" + ",\n".join(rows) + "\n]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "open', "17: not valid JSON"),
        ('{"text" 1}', "17: not valid JSON: Expecting ':' delimiter"),
        ("{'text': 1}", "17: not valid JSON"),
        ("5", "17: expected a JSON object"),
        ("null", "17: expected a JSON object {...}; got a NoneType"),
    ],
)
def test_broken_at_line_17(tmp_path: Path, text: str, message: str) -> None:
    lines = tmp_path / "data.jsonl"
    rows = [json.dumps({"text": str(i)}) for i in range(30)]
    rows[16] = text
    lines.write_text("\n".join(rows))
    whole = tmp_path / "data.json"
    whole.write_text(broken_list(17, text))
    for path in (lines, whole):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:{message}")


def test_list_without_comma_or_end_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[\n{"text": "a"}\n{"text": "b"}\n]')
    with pytest.raises(DataError, match=r"data.json:3: not valid JSON: Expecting ',' or ']'"):
        read(path)
    path.write_text('[\n{"text": "a"},\n')
    with pytest.raises(DataError, match=r"data.json:3: not valid JSON: Expecting value"):
        read(path)
    path.write_text('[{"text": "a"}]\n\nmore')
    with pytest.raises(DataError, match=r"data.json:3: text after the end of the list"):
        read(path)


def test_pretty_printed_object_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{\n "text": "a"\n}')
    with pytest.raises(DataError, match=r"data.json:1: .*Expected one object per line"):
        read(path)


def test_files_that_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: no such file \(looked in "):
        read(tmp_path / "gone.jsonl")
    empty = tmp_path / "empty.jsonl"
    for text in ("", " \n\n"):
        empty.write_text(text)
        with pytest.raises(DataError, match=r"empty.jsonl: the file is empty"):
            read(empty)
    empty.write_text("[ ]")
    with pytest.raises(DataError, match="the list is empty"):
        read(empty)
    with pytest.raises(ConfigError, match=r"cannot read '.csv'.*\.json .*\.jsonl"):
        sources.check(str(tmp_path / "a.csv"))
    with pytest.raises(ConfigError, match="a data source is one file"):
        sources.check(str(tmp_path))
    with pytest.raises(ConfigError, match="a data source is one file"):
        sources.check("data/*.jsonl")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl:2: not UTF-8 text"):
        read(latin)
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"torn.jsonl.gz: cannot be read"):
        read(torn)
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"deep.jsonl:1: "):
        read(deep)
    huge = tmp_path / "huge.jsonl"
    huge.write_text('{"n": ' + "9" * 5000 + "}")
    with pytest.raises(DataError, match=r"huge.jsonl:1: "):
        read(huge)
