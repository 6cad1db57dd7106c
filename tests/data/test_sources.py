"""Files, folders, saved datasets -> records with lines; what is broken is named with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tracemalloc
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import ConfigError, DataError
from jaxtune.data import sources
from jaxtune.data.readers import READERS, File

ROWS = [{"text": "a"}, {"text": "b\u2028c"}, {"text": "d", "more": [None, {"x": 1}]}]


def read(path: Path | str, **options: Any) -> list[sources.Record]:
    return list(sources.read(sources.find(str(path), **options)))


def fields(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    return [record.fields for record in read(path, **options)]


def lines(path: Path | str) -> list[int]:
    return [record.line for record in read(path)]


def write(path: Path, data: bytes | str) -> Path:
    """The data under a name; packed where the name ends in .gz."""
    data = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# -- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".JSONL"])
@pytest.mark.parametrize("layout", ["lines", "list", "pretty"])
def test_every_layout_under_every_suffix(tmp_path: Path, suffix: str, layout: str) -> None:
    if layout == "lines":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    else:
        text = json.dumps(ROWS, ensure_ascii=False, indent=1 if layout == "pretty" else None)
    path = write(tmp_path / f"data{suffix}", text)
    assert fields(path) == ROWS  # no invented keys, no lost nulls
    expected = {"lines": [1, 2, 3], "list": [1, 1, 1], "pretty": [2, 5, 8]}[layout]
    assert lines(path) == expected
    assert read(path)[2].where == f"{path}:{expected[2]}"


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", b'\xef\xbb\xbf\n\n{"text": "a"}\r\n')
    assert [(r.line, r.fields) for r in read(path)] == [(3, {"text": "a"})]
    path = write(tmp_path / "data.json", b'\xef\xbb\xbf\n[{"text": "a"}]')
    assert [(r.line, r.fields) for r in read(path)] == [(2, {"text": "a"})]


def test_a_list_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a block, and in memory that does not grow with the file."""
    rows = [
        {"text": '\u00e9\\"\u2028' * i, "n": [-1.5e3, True, None, {"\U0001f600": i}]}
        for i in range(40)
    ]
    for indent in (None, 1):
        path = write(
            tmp_path / "data.json", json.dumps(rows, indent=indent, ensure_ascii=indent == 1)
        )
        with monkeypatch.context() as patched:
            for size in (1, 2, 7, 64, 1000):
                patched.setattr("jaxtune.data.readers._BLOCK", size)
                assert fields(path) == rows
            if indent:
                text = path.read_text().splitlines()
                assert all(text[record.line - 1] == " {" for record in read(path))
    path = write(tmp_path / "large.json", json.dumps([{"text": "word " * 200}] * 10_000))
    tracemalloc.start()
    assert sum(1 for _ in sources.read(sources.find(str(path)))) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < path.stat().st_size / 4


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


@pytest.mark.parametrize("block", [5, 1 << 18])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_under_one_key_is_that_list(
    tmp_path: Path, indent: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxtune.data.readers._BLOCK", block)
    path = write(tmp_path / "data.json", "\ufeff\n" + json.dumps({"data": ROWS}, indent=indent))
    assert fields(path) == ROWS
    assert lines(path) == ([4, 7, 10] if indent else [2, 2, 2])


@pytest.mark.parametrize("indent", [None, 1])
def test_a_conversation_is_a_record_and_no_list_of_them(tmp_path: Path, indent: int | None) -> None:
    """Also alone in its file, where its one key holds a list of objects too."""
    for row in (
        {"messages": [{"role": "user", "content": "q"}]},
        {"conversations": [{"from": "human", "value": "q"}]},
    ):
        path = write(tmp_path / "data.json", json.dumps(row, indent=indent))
        if indent is None:
            assert fields(path) == [row]
            path = write(tmp_path / "data.json", f"{json.dumps(row)}\n{json.dumps(row)}\n")
            assert fields(path) == [row, row]
        else:
            with pytest.raises(DataError, match=r"1: .*Expected one object per line"):
                read(path)
    wrapped = {"messages": [row, row]}
    assert fields(write(tmp_path / "data.json", json.dumps(wrapped, indent=indent))) == [row, row]
    records = [{"data": ROWS}, {"data": ROWS}]  # lines of one key each are no wrapper
    path = write(tmp_path / "data.jsonl", "\n".join(map(json.dumps, records)))
    assert fields(path) == records


@pytest.mark.parametrize(
    ("whole", "indent", "message"),
    [
        ({"train": ROWS, "test": ROWS[:1]}, None, "train (3), test (1). Expected"),
        ({"train": ROWS, "test": ROWS[:1]}, 2, "train (3), test (1). Expected"),
        ({"version": "1.0", "data": ROWS}, 2, "data (3), beside 1 other. Expected"),
    ],
)
def test_several_keys_are_named_with_what_to_do(
    tmp_path: Path, whole: dict[str, Any], indent: int | None, message: str
) -> None:
    path = write(tmp_path / "data.json", json.dumps(whole, indent=indent))
    with pytest.raises(DataError) as caught:
        read(path)
    name = message.partition(" ")[0]
    assert str(caught.value) == (
        f"{path}: one object, whose keys hold lists of records: {message} records, or one list of "
        f"them. Save the list to train on by itself: jq '.{name}' {path} > {name}.json"
    )


def test_an_object_with_other_keys_on_one_line_is_a_record(tmp_path: Path) -> None:
    row = {"question": "q", "choices": [{"text": "a"}, {"text": "b"}]}
    assert fields(write(tmp_path / "data.jsonl", json.dumps(row))) == [row]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [\n{"text": "a"},\n{"text" 1}]}', "3: not valid JSON: Expecting ':' delimiter"),
        ('{"data": [\n{"text": "a"}\n', "3: not valid JSON: Expecting ',' or ']'"),
        ('{"data": [\n{"text": "a"},\n5]}', "3: expected a JSON object {...}; got a int"),
        ('{"data": [\n{"text": "a"}]}\n5', "1: not valid JSON: Expecting value"),
        ('{"text": "a"\n{"text": "b"}\n', "1: not valid JSON: Expecting ',' delimiter"),
    ],
)
def test_broken_wrapper(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "data.json", text)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{message}")


def test_a_mistake_far_down_has_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtune.data.readers._BLOCK", 8)
    path = write(tmp_path / "data.json", '[{"text": "some words"}, {"text" 1}, {"text": "b"}]')
    with pytest.raises(DataError, match=r"data.json:1: .*Expecting ':' delimiter \(column 34\)"):
        read(path)
    path = write(tmp_path / "data.json", '[{"text":\n "some words"},\n{"text": 1}}]')
    with pytest.raises(DataError, match=r"data.json:3: .*Expecting ',' or '\]' \(column 12\)"):
        read(path)


@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.none() | st.floats() | st.text(max_size=6)),
        max_size=4,
    ),
    st.booleans(),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_what_json_reads_is_read_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], pretty: bool, data: Any
) -> None:
    """A list with a piece cut out, in blocks of any size: read as `json` does, or refused."""
    text = json.dumps(rows, indent=1 if pretty else None)
    start = data.draw(st.integers(0, len(text)))
    text = text[:start] + text[data.draw(st.integers(start, len(text))) :]
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_text("[" + text[1:])
    try:
        expected = json.loads("[" + text[1:])
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jaxtune.data.readers._BLOCK", data.draw(st.integers(1, 40)))
        if expected and all(isinstance(row, dict) for row in expected):
            np.testing.assert_equal(fields(path), expected)  # NaN is equal to itself there
        else:
            with pytest.raises(DataError, match=r"cut\.json:"):
                read(path)


@given(st.sampled_from([".json", ".jsonl", ".csv", ".txt"]), st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_records_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    path.write_bytes(data)
    problem = None
    try:
        assert all(isinstance(record.fields, dict) for record in read(path))
    except DataError as error:
        problem = str(error)
    assert problem is None or problem.startswith(f"{path}:")


# -- text and CSV ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_documents_of_a_text_stand_between_blank_lines(tmp_path: Path, suffix: str) -> None:
    text = "\ufeff\n  one\ntwo\u2028three \n\n \t\n\nfour\r\nfive\r\n"
    path = write(tmp_path / f"data{suffix}", text)
    found = [(record.line, record.fields["text"]) for record in read(path)]
    assert found == [(2, "  one\ntwo\u2028three "), (7, "four\r\nfive")]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_cells_are_text(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"instruction": 'say "a, b"\nand c', "output": "", "n": "1"},
        {"instruction": "x" * 200_000, "output": "null", "n": "01"},
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["instruction", "output", "n"])
    writer.writeheader()
    writer.writerows(rows)
    path = write(tmp_path / f"data{suffix}", "\ufeff" + text.getvalue() + "\r\n")
    assert fields(path) == rows
    assert lines(path) == [2, 4]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (
            '\n"the; question";answer\n"a; b";"c, d"\n',
            [{"the; question": "a; b", "answer": "c, d"}],
        ),
        ("question\tanswer\na, b\tc; d\n", [{"question": "a, b", "answer": "c; d"}]),
        ("a;b;c,d\n1;2;3,4\n", [{"a;b;c": "1;2;3", "d": "4"}]),  # a comma first
        ("text\na;b\n", [{"text": "a;b"}]),
        ('text\n"a, b"\n', [{"text": "a, b"}]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz"])
def test_the_header_shows_the_delimiter(
    tmp_path: Path, text: str, rows: list[dict[str, str]], suffix: str
) -> None:
    assert fields(write(tmp_path / f"data{suffix}", text)) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a;b\n1;2\n1;2;3\n",
            '3: 3 cells, but the header names 2. Put "..." around a cell that holds a semicolon.',
        ),
        (
            "a\tb\n1\t2\t3\n",
            '2: 3 cells, but the header names 2. Put "..." around a cell that holds a tab.',
        ),
        ("a,b\n1,2\n1,2,3\n", '3: 3 cells, but the header names 2. Put "..." around'),
        ("a,b\n1,2\n\n1\n", "4: 1 cells, but the header names 2"),
        ('a,b\n1,2\n1,"open\n3,4\n', "3: not valid CSV: unexpected end of data"),
        ('a,b\n1,"x"y\n', "2: not valid CSV: ',' expected after"),
        ("a,b,a\n1,2,3\n", "1: two columns are called 'a'"),
        ("a,b\n", " the file is empty"),
        (
            b"a,b\n1,\xe9\n",
            "2: not UTF-8 text: invalid continuation byte. Save it as UTF-8; of a file in "
            "LATIN1: iconv -f LATIN1 -t UTF-8 ",
        ),
        (
            "a,b\n1,2\n".encode("utf-16"),
            "1: not UTF-8 text: invalid start byte. Save it as UTF-8; of "
            "a file in UTF-16: iconv -f UTF-16 -t UTF-8 ",
        ),
    ],
)
def test_broken_csv(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path / "data.csv", text)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{message}")


# -- tables ---------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = io.BytesIO()
    tables.write_table(arrow.Table.from_pylist(rows), data, row_group_size=3)
    return write(path, data.getvalue())


def test_parquet_nulls_that_fill_up_a_struct_are_not_there(tmp_path: Path) -> None:
    rows = [
        {"tool_calls": [{"name": "add", "arguments": {"a": 2, "b": None}}], "tag": None},
        {"tool_calls": [{"name": "clock", "arguments": {"zone": "UTC", "all": [None, 1]}}],
         "tag": "x"},
        {"tool_calls": [{"name": "now", "arguments": {"zone": None}}], "tag": "x"},
    ]  # fmt: skip
    records = [record.fields for record in read(parquet(tmp_path / "a.parquet", rows))]
    del rows[0]["tool_calls"][0]["arguments"]["b"], rows[2]["tool_calls"][0]["arguments"]["zone"]
    assert records == rows


@pytest.mark.parametrize("suffix", [".parquet", ".parquet.gz"])
def test_parquet(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtune.data.readers._ROWS", 2)
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "n": i} for i in range(7)]
    path = parquet(tmp_path / f"data{suffix}", rows)
    assert fields(path) == rows
    assert lines(path) == [1, 2, 3, 4, 5, 6, 7]


def test_broken_tables(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "data.parquet", [{"text": "a"}]).read_bytes()
    for name, data in (("torn", whole[:-9]), ("other", b"text"), ("none", b"")):
        path = write(tmp_path / f"{name}.parquet", data)
        with pytest.raises(DataError, match=rf"{name}.parquet: (not a readable|cannot be read)"):
            read(path)
    (tmp_path / "torn.parquet.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(DataError, match=r"torn.parquet.gz: cannot be read"):
        read(tmp_path / "torn.parquet.gz")
    empty = parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(DataError, match=r"empty.parquet: the file is empty"):
        read(empty)


def test_an_optional_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow. Run: pip install 'jaxtune\[parquet\]'"):
        read(path)
    message = r"owner/data: no such file .*needs datasets. Run: pip install 'jaxtune\[hub\]'"
    with pytest.raises(ConfigError, match=message):
        sources.find("owner/data")


# -- many files -----------------------------------------------------------------------------------


def test_folders_and_globs_read_their_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    write(tmp_path / "d.txt", "d.txt")
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json"):
        write(tmp_path / name, "no data")
    assert [r["text"] for r in fields(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "d.txt"]
    assert [r["text"] for r in fields(f"{tmp_path}/*.jsonl*")] == ["a.jsonl.gz", "b.jsonl"]
    assert [r["text"] for r in fields(f"{tmp_path}/**/?.jsonl")] == ["b.jsonl", "deep/c.jsonl"]
    assert [r.where for r in read(f"{tmp_path}/[bx].jsonl")] == [f"{tmp_path}/b.jsonl:1"]
    literal = write(tmp_path / "x[1].jsonl", '{"text": "x"}')
    assert fields(literal) == [{"text": "x"}]
    write(tmp_path / "e.jsonl", "{")
    with pytest.raises(DataError, match=r"e.jsonl:1: not valid JSON"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no file matches"):
        read(tmp_path / "z*.jsonl")
    with pytest.raises(ConfigError, match=r"README.md: cannot read '.md'"):
        read(tmp_path / "*.md")
    with pytest.raises(DataError, match=r"no data file \(.json, .*\) lies in this folder"):
        read(write(tmp_path / "none" / "README.md", "").parent)


def test_digest_is_of_contents_kind_and_order(tmp_path: Path) -> None:
    def digest(*names: str) -> str:
        return sources.digest(File(tmp_path / name, name) for name in names)

    for name in ("a.jsonl", "moved.jsonl", "a.txt", "b.jsonl"):
        write(tmp_path / name, "b" if name[0] == "b" else "a")
    assert digest("a.jsonl") == digest("moved.jsonl")
    different = [("a.jsonl",), ("a.txt",), ("b.jsonl",), ("a.jsonl", "b.jsonl")]
    different += [("b.jsonl", "a.jsonl"), ("a.jsonl", "a.jsonl")]
    assert len({digest(*names) for names in different}) == len(different)


# -- the datasets library -------------------------------------------------------------------------


def test_saved_to_disk(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    rows = [{"instruction": str(i), "output": "o"} for i in range(5)]
    data = library.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    assert fields(tmp_path / "one") == rows
    parts = library.DatasetDict({"train": data, "test": data.select([3, 1])})
    parts.save_to_disk(tmp_path / "two")
    assert fields(tmp_path / "two") == rows
    assert fields(tmp_path / "two", split="test") == [rows[3], rows[1]]
    with pytest.raises(
        ConfigError, match=r"two has no 'tset'. Did you mean 'test'\? There are: tr"
    ):
        read(tmp_path / "two", split="tset")
    with pytest.raises(ConfigError, match=r"one was saved as one split"):
        read(tmp_path / "one", split="train")
    write(tmp_path / "one" / "state.json", "{}")
    with pytest.raises(DataError, match=r"state.json: not as the datasets library saves it"):
        read(tmp_path / "one")


def test_splits_of_a_folder_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    calls = [{"arguments": {"x": 1}}, {"arguments": {"y": None}}]
    for name in ("train", "test"):
        rows = [{"split": name, "calls": call} for call in calls]
        write(tmp_path / "a" / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
        parquet(tmp_path / "b" / "data" / f"{name}-00000-of-00001.parquet", [{"split": name}])
    expected = [{"split": "test", "calls": call} for call in calls]
    assert fields(tmp_path / "a", split="test") == expected  # no nulls invented (P19)
    assert fields(tmp_path / "b", split="train") == [{"split": "train"}]
    with pytest.raises(ConfigError, match=r"no 'validation'. There are: train, test"):
        read(tmp_path / "a", split="validation")


def test_configurations_are_chosen_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    write(tmp_path / "b.jsonl", '{"text": "b"}')
    described = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}.jsonl"}]}
        for name in "ab"
    ]
    write(tmp_path / "README.md", f"---\nconfigs: {json.dumps(described)}\n---\n")
    assert fields(tmp_path, split="train", config="b") == [{"text": "b"}]
    with pytest.raises(ConfigError, match=r"several configurations; set it to one of: a, b"):
        read(tmp_path, split="train")


def test_files_of_the_hub_are_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library says which files, at which commit, and fetches them; it is asked once."""
    library = pytest.importorskip("datasets")
    blob = tmp_path / "3f2a"
    blob.write_bytes(gzip.compress(b'{"text": "a"}\n{'))
    name = "hf://datasets/owner/data@abc/part.jsonl.gz"
    asked: list[Any] = []

    class Builder:
        class config:
            data_files: typing.ClassVar = {"train": [], "test": [name]}

    class Downloads:
        def download(self, names: list[str]) -> list[str]:
            assert names == [name]
            return [str(blob)]

    def builder(path: str, **options: Any) -> type[Builder]:
        asked.append((path, options))
        return Builder

    monkeypatch.setattr(library, "get_dataset_config_names", lambda path, revision: ["default"])
    monkeypatch.setattr(library, "load_dataset_builder", builder)
    monkeypatch.setattr(library, "DownloadManager", Downloads)
    for _ in range(2):
        found = sources.find("owner/data", split="test", revision="main", config="label")
        assert found == (File(blob, "owner/data@abc/part.jsonl.gz"),)
    assert asked == [("owner/data", {"name": None, "revision": "main"})]
    records = sources.read(found)
    assert next(records).fields == {"text": "a"}
    with pytest.raises(DataError, match=r"owner/data@abc/part.jsonl.gz:2: not valid JSON"):
        next(records)


def test_a_dataset_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("datasets")

    def offline(path: str, **options: Any) -> list[str]:
        raise ConnectionError(f"Couldn't reach '{path}'\non the Hub")

    monkeypatch.setattr(library, "get_dataset_config_names", offline)
    with pytest.raises(DataError, match=r"owner/data: .*ConnectionError: Couldn't reach 'owner/d"):
        read("owner/data")


# -- what is no source ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_garbage_under_every_suffix_is_one_error(tmp_path: Path, kind: str, packed: str) -> None:
    path = tmp_path / f"data{kind}{packed}"
    for data in (b"", b"\x1f\x8b\x08garbage", b"\xff\xfe\x00 \n\x80"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"data\."):
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
    with pytest.raises(ConfigError, match=r"cannot read '.xls'.*\.json, .*\.jsonl, .*also \.gz"):
        read(write(tmp_path / "a.xls", ""))
    with pytest.raises(DataError, match=r"here/there/x: no such file"):
        read("./here/there/x")
    with pytest.raises(ConfigError, match=r"split: .*a.jsonl has no splits"):
        read(write(tmp_path / "a.jsonl", "{}"), split="train")
    with pytest.raises(ConfigError, match=r"revision: .*a.jsonl is not on the hub"):
        read(tmp_path / "a.jsonl", revision="main")
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


def test_text_in_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    odd = pa.array([b"\xea\xff"], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": odd}), tmp_path / "odd.parquet")
    with pytest.raises(DataError, match=r"odd\.parquet: not a readable parquet file: 'utf-8'"):
        list(sources.read(sources.find(str(tmp_path / "odd.parquet"))))
