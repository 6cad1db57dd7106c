"""A record in, a noun out; what is no use is dropped with its reason."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import ConfigError, DataError
from jaxtune.data import sources
from jaxtune.data.formats import FORMATS, detect, resolve, to_noun
from jaxtune.data.schema import Conversation, Document, Dropped, Message, WeightedTokens
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import resolve as template_of
from jaxtune.data.tokenizer import Tokenizer

U, A, S = "user", "assistant", "system"


def read(name: str, record: dict[str, Any], columns: dict[str, str] | None = None) -> Any:
    return to_noun(name, record, columns or {}, "f.jsonl:17")


@pytest.mark.parametrize(
    ("name", "record", "messages"),
    [
        ("alpaca", {"instruction": "q", "input": "x", "output": "a"},
         [Message(U, "q", "x"), Message(A, "a")]),
        ("alpaca", {"instruction": "q", "input": None, "output": "a", "other": 3},
         [Message(U, "q"), Message(A, "a")]),
        ("alpaca", {"instruction": "q", "output": "a", "system": "s", "history": [["h", "i"]]},
         [Message(S, "s"), Message(U, "h"), Message(A, "i"), Message(U, "q"), Message(A, "a")]),
        ("prompt_completion", {"prompt": "q", "completion": "a"},
         [Message(U, "q"), Message(A, "a")]),
        ("prompt_completion",
         {"prompt": [{"role": U, "content": "q"}, {"role": A, "content": "old"}],
          "completion": [{"role": U, "content": "r"}, {"role": A, "content": "a"}]},
         [Message(U, "q"), Message(A, "old"), Message(U, "r"), Message(A, "a")]),
        ("messages", {"messages": [{"role": "human", "content": "q"},
                                   {"from": "gpt", "value": "a"}]},
         [Message(U, "q"), Message(A, "a")]),
        ("sharegpt", {"conversations": [{"from": "Human", "value": "q"},
                                        {"from": "model", "value": "a"}], "tools": "[]"},
         [Message(U, "q"), Message(A, "a")]),
        ("messages", {"messages": [{"role": U, "content": [{"type": "text", "text": "q"}]},
                                   {"role": A, "content": "a"}], "system": "s"},
         [Message(S, "s"), Message(U, "q"), Message(A, "a")]),
    ],
)  # fmt: skip
def test_records(name: str, record: dict[str, Any], messages: list[Message]) -> None:
    found = read(name, record)
    assert isinstance(found, Conversation)
    assert found.messages == tuple(messages)
    before = len(record["prompt"]) if isinstance(record.get("prompt"), list) else 1
    assert found.context == (before if name == "prompt_completion" else 0)
    assert detect(record) == name


def test_tools_and_calls_pass_through_as_they_are() -> None:
    """Arguments as dict or as text, nulls inside them, other keys: nothing changed, none invented
    (P19)."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}
    calls = [{"id": "1", "function": {"name": "f", "arguments": '{"x": null}'}},
             {"id": "2", "function": {"name": "f", "arguments": {"x": None}}}]  # fmt: skip
    record = {
        "messages": [
            {"role": U, "content": "q", "name": None},
            {"role": A, "content": None, "tool_calls": calls, "reasoning_content": "hm"},
            {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f", "weight": 0},
            {"role": A, "content": "a", "tool_calls": []},
        ],
        "tools": [tool],
    }
    assert read("messages", record) == Conversation(
        (
            Message(U, "q"),
            Message(A, "", extra={"tool_calls": calls, "reasoning_content": "hm"}),
            Message("tool", "42", weight=0.0, extra={"tool_call_id": "1", "name": "f"}),
            Message(A, "a"),
        ),
        (tool,),
    )
    as_text = {"messages": json.dumps(record["messages"]), "tools": json.dumps([tool])}
    assert read("messages", as_text) == read("messages", record)


def test_sharegpt_calls_and_bare_functions() -> None:
    bare = {"name": "f", "parameters": {}}
    call = {"name": "f", "arguments": {"x": 1}}
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "42"},
            {"from": "function_call", "value": json.dumps([call, {"name": "g"}])},
        ],
        "tools": json.dumps([bare]),
    }
    wrapped = {"type": "function", "function": call}
    other = {"type": "function", "function": {"name": "g", "arguments": {}}}
    assert read("sharegpt", record) == Conversation(
        (
            Message(U, "q"),
            Message(A, "", extra={"tool_calls": [wrapped]}),
            Message("tool", "42"),
            Message(A, "", extra={"tool_calls": [wrapped, other]}),
        ),
        ({"type": "function", "function": bare},),
    )


def test_lists_that_datasets_has_turned_into_an_object_of_lists(tmp_path: Path) -> None:
    """`Sequence({...})` of the datasets library, in a file that it has written itself."""
    datasets = pytest.importorskip("datasets")
    names = ["f", "g"]
    call = {"type": datasets.Value("string"), "function": {"name": datasets.Value("string")}}
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(
        {
            "messages": datasets.Sequence({**message, "tool_calls": datasets.Sequence(call)}),
            "tools": datasets.Sequence({"name": datasets.Value("string")}),
        }
    )
    calls = {"type": ["function"] * 2, "function": [{"name": name} for name in names]}
    messages = {
        "role": [U, A, "tool", A],
        "content": ["q", None, "42", "a"],
        "tool_calls": [None, calls, {"type": [], "function": []}, None],
    }
    row = {"messages": messages, "tools": {"name": names}}
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list([row], features=features).to_parquet(path)
    (record,) = sources.read(sources.find(str(path)))
    assert isinstance(record.fields["messages"], dict)  # else this tests nothing
    as_list = [{"role": U, "content": "q"},
               {"role": A, "tool_calls": [{"type": "function", "function": {"name": name}}
                                          for name in names]},
               {"role": "tool", "content": "42"}, {"role": A, "content": "a"}]  # fmt: skip
    tools = [{"name": name} for name in names]
    expected = read("messages", {"messages": as_list, "tools": tools})
    assert read("messages", record.fields) == expected
    pair = {
        "prompt": {"role": [U], "content": ["q"]},
        "completion": {"role": [A], "content": ["a"]},
    }
    assert read("prompt_completion", pair).messages == (Message(U, "q"), Message(A, "a"))


def test_every_row_of_real_tool_calls_becomes_a_conversation(shared_data: Path) -> None:
    records = json.loads((shared_data / "glaive_toolcall_en_demo.json").read_text())
    for record in records:
        noun = read("sharegpt", record)
        assert isinstance(noun, Conversation)
        assert len(noun.messages) == len(record["conversations"])
        for message, turn in zip(noun.messages, record["conversations"], strict=True):
            if turn["from"] == "function_call":
                (call,) = message.extra["tool_calls"]
                assert call["function"] == json.loads(turn["value"])
                assert (message.role, message.content) == ("assistant", "")
            else:
                assert message.content == turn["value"]
        declared = json.loads(record["tools"] or "[]")
        assert [tool["function"] for tool in noun.tools or ()] == declared


def test_text_is_a_document() -> None:
    assert read("text", {"text": "all of it"}) == Document("all of it")


@pytest.mark.parametrize(
    ("said", "weight"),
    [
        ({}, None), ({"weight": 0}, 0.0), ({"weight": 0.25}, 0.25), ({"train": True}, 1.0),
        ({"train": False}, 0.0), ({"loss": False}, 0.0), ({"loss_weight": 2}, 2.0),
        ({"masked": True}, 0.0), ({"masked": False}, 1.0), ({"weight": None}, None),
    ],
)  # fmt: skip
def test_weight_under_every_name(said: dict[str, Any], weight: float | None) -> None:
    record = {"messages": [{"role": U, "content": "q"}, {"role": A, "content": "a", **said}]}
    assert read("messages", record).messages[1].weight == weight


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": U, "content": "q"}, {"role": A, "content": "a", **fields}]}


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("alpaca", {"instruction": "q", "output": None}, "output is not text"),
        ("alpaca", {"instruction": "q", "output": 42}, "output is not text"),
        ("alpaca", {"instruction": " ", "output": "a"}, "empty instruction"),
        ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, "history is not a list"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "history is not"),
        ("prompt_completion", {"prompt": "", "completion": "a"}, "empty prompt"),
        ("prompt_completion", {"prompt": {"a": 1}, "completion": "a"}, "prompt is not text"),
        ("messages", {"messages": None}, "messages is not a list of messages"),
        ("messages", {"messages": []}, "messages is not a list of messages"),
        ("messages", {"messages": ["hello"]}, "a message is not an object"),
        ("messages", {"messages": [{"role": "narrator", "content": "x"}]}, "role 'narrator'"),
        ("messages", {"messages": [{"content": "x"}]}, "role None is not known"),
        ("messages", turn(content=None), "content is not text"),
        ("messages", turn(content=[{"type": "image"}]), "content holds an image; only text is"),
        ("messages", turn(content=[{"type": "input_audio", "text": "x"}]), "content holds audio"),
        ("messages", turn(content=[{"type": "thinking", "thinking": 3}]), "content holds a part"),
        ("messages", turn(content=[{"type": "thinking", "thinking": "t"}], reasoning="r"),
         "thinking both in content and in a field"),
        ("messages", turn(content=[{"type": "x", "text": "a"}]), "content holds a part that"),
        ("messages", turn(content=["a"]), "content holds a part that is not text"),
        ("messages", turn(content=[{"text": "a", "train": False}]), "a part of a message has"),
        ("messages", turn(tool_calls="f()"), "tool_calls is not a list of objects"),
        ("messages", {"messages": {"role": [U, A], "content": ["q"]}},
         "an object of lists that are not equally long"),
        ("messages", {"messages": {"role": U, "content": "q"}}, "messages is not a list of"),
        ("messages", turn(role="function_call", content="f()"), "a function call is not JSON"),
        ("messages", turn(role="function_call", content="[]"), "a function call has no name"),
        ("messages", turn(weight="much"), "weight is not a number"),
        ("messages", turn(weight=-1), "weight is not a number"),
        ("messages", turn(weight=float("nan")), "weight is not a number"),
        ("messages", turn(weight=1e39), "weight is not a number >= 0 within float32"),
        ("messages", turn(weight=10**400), "weight is not a number >= 0 within float32"),
        ("messages", turn(weight=1, train=True), "a message has two weights"),
        ("sharegpt", {"conversations": [{"from": U, "value": "q"}], "tools": '["f"]'},
         "tools is not a list of objects"),
        ("text", {"text": "\n"}, "empty text"),
    ],
)  # fmt: skip
def test_values_that_are_no_use_drop_the_row(
    name: str, record: dict[str, Any], reason: str
) -> None:
    found = read(name, record)
    assert isinstance(found, Dropped)
    assert found.reason.startswith(reason)


def test_columns_are_renamed() -> None:
    record = {"question": "q", "answer": "a", "output": "not this"}
    found = read("alpaca", record, {"instruction": "question", "output": "answer"})
    assert found.messages == (Message(U, "q"), Message(A, "a"))


def test_absent_column_is_an_error_with_what_is_there() -> None:
    with pytest.raises(DataError) as caught:
        read("alpaca", {"instruction": "q", "input": "", "response": "a"})
    assert str(caught.value) == (
        "f.jsonl:17: format 'alpaca' needs 'output'; the record has: instruction, input, response."
        " Set datasets[].columns, or rename the field. Try --columns.output response"
    )


TURNS = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"question": "q", "answer": "a"},
         "--columns.instruction question --columns.output answer"),
        ({"instruction": "q", "context": "c", "response": "a", "category": "k"},
         "--columns.output response --columns.input context"),
        ({"Instruction": "q", "Outputs": "a"},
         "--columns.instruction Instruction --columns.output Outputs"),
        ({"id": "7", "title": "a title", "my abstract": "a longer text"},
         "--columns.instruction title --columns.output 'my abstract'"),
        ({"id": 7, "dialog": TURNS}, "--columns.messages dialog"),
        ({"dialog": json.dumps(TURNS)}, "--columns.messages dialog"),
        ({"body": "a text", "id": 7}, "--columns.text body"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "--columns.completion chosen"),
        ({"prompt": TURNS, "chosen": TURNS, "rejected": TURNS}, "--columns.completion chosen"),
        ({"chosen": TURNS, "rejected": TURNS}, "--columns.messages chosen"),
    ],
)  # fmt: skip
def test_unknown_columns_get_the_line_to_type(record: dict[str, Any], line: str) -> None:
    """It works: with these columns the record has a format and can be read."""
    with pytest.raises(DataError, match=rf"no known format has these columns: .* Try {line}$"):
        resolve("auto", {}, record, "f:1")
    words = shlex.split(line)
    columns = {
        flag.removeprefix("--columns."): column
        for flag, column in zip(words[::2], words[1::2], strict=True)
    }
    name = resolve("auto", columns, record, "f:1")
    assert isinstance(read(name, record, columns), Conversation | Document)


def test_a_list_of_records_in_a_record_is_named() -> None:
    record = {"version": "1.0", "data": [{"instruction": "q"}, {}]}
    with pytest.raises(DataError) as caught:
        resolve("auto", {}, record, "f:1")
    assert str(caught.value).endswith(
        " 'data' holds a list of 2 objects: if those are the records, save that list as a file of "
        "its own"
    )


def test_an_absent_column_gets_the_line_to_type() -> None:
    for name, record, line in (
        ("alpaca", {"instruction": "q", "reply": "a"}, "--columns.output reply"),
        ("prompt_completion", {"question": "q", "answer": "a"},
         "--columns.prompt question --columns.completion answer"),
        ("sharegpt", {"dialog": TURNS}, "--columns.conversations dialog"),
        ("text", {"title": "t", "content": "a text"}, "--columns.text content"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"Try {line}$"):
            read(name, record)
    for record in ({"n": 1}, {}, {"instruction": "q"}, {"id": None, "chosen": [1]}):
        with pytest.raises(DataError) as caught:
            read("alpaca", record)
        assert "Try" not in str(caught.value)


def test_columns_are_checked_both_ways() -> None:
    first = {"instruction": "q", "answer": "a"}
    assert resolve("auto", {"output": "answer"}, first, "f:1") == "alpaca"
    with pytest.raises(ConfigError, match=r"'alpaca' has no 'ouput'. Did you mean 'output'"):
        resolve("alpaca", {"ouput": "answer"}, first, "f:1")
    with pytest.raises(DataError, match=r"f:1: columns maps output to 'reply'; the record has: in"):
        resolve("alpaca", {"output": "reply"}, first, "f:1")
    with_input = {"instruction": "q", "input": "ctx", "output": "a"}
    assert resolve("auto", with_input, {"q": "Q", "a": "A"}, "f:1") == "alpaca"  # later, perhaps
    with pytest.raises(DataError, match=r"f:1: no known format has these columns: a, b\..*alpaca"):
        resolve("auto", {}, {"a": 1, "b": 2}, "f:1")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "from",
                    "content",
                    "value",
                    "weight",
                    "train",
                    "text",
                    "tool_calls",
                    "name",
                ]
            ),
            inner | st.sampled_from(["user", "assistant", "function_call", '{"name": "f"}']),
            max_size=4,
        )
    ),
    max_leaves=8,
)
COLUMNS = sorted({c for f in FORMATS.values() for c in (*f.required, *f.optional)})


@given(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6))
@settings(max_examples=400, deadline=None)
def test_any_json_is_a_row_or_a_reason(byte_level: Tokenizer, record: dict[str, Any]) -> None:
    template = template_of("alpaca", byte_level)
    name = detect(record)
    if name is None:
        return
    noun = read(name, record)
    if isinstance(noun, Dropped):
        assert noun.reason
        return
    if isinstance(noun, WeightedTokens):
        assert noun.weights.any()
        return
    for row in render(template, noun):
        assert isinstance(row, Dropped) or any(span.weight > 0 for span in row)
