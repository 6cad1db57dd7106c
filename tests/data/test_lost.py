"""How many rows may be dropped, and whether what is advised then keeps as many as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data.chat_templates import SYSTEM_IGNORING

from jaxtune.config import DataError, DatasetConfig
from jaxtune.data.dataset import Dataset, open_dataset
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.data.report.data_report import report
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.terminal.text import lost_lines

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]}
EMPTY = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}
LONG = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so " * 90}]
}
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *GOOD["messages"]]}
# Shows a thought only where it is asked for; without, that is not what the message says.
THINKS_IF_ASKED = (
    "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}\nA: {% else %}"
    "{% if enable_thinking and m.reasoning_content %}({{ m.reasoning_content }}) {% endif %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
)
THOUGHT = {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "reasoning_content": "hm so"}]}


def write(path: Path, rows: list[Any]) -> DatasetConfig:
    path.write_text("\n".join(map(json.dumps, rows)))
    return DatasetConfig(path=str(path))


def settings(tokenizer: Tokenizer, template: str = "mistral", **options: Any) -> PreprocessConfig:
    fields = {name: options.pop(name, None) for name in ("system_prompt", "kwargs")}
    return PreprocessConfig(tokenizer, resolve(template, tokenizer, **fields), **options)


def refusal(entry: DatasetConfig, config: PreprocessConfig, max_dropped: float = 0.5) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset([entry], config, max_dropped=max_dropped)
    return str(caught.value)


def dropped(data: Dataset) -> int:
    return int(report(data)["dropped"])


@pytest.mark.parametrize(
    ("bad", "max_dropped", "refused"),
    [(5, 0.5, False), (6, 0.5, True), (1, 0.0, True), (0, 0.0, False), (9, 1.0, False),
     (10, 1.0, True), (3, 0.3, False)],
)  # fmt: skip
def test_the_limit_is_a_share_of_the_rows(
    tmp_path: Path, byte_level: Tokenizer, bad: int, max_dropped: float, refused: bool
) -> None:
    entry = write(tmp_path / "rows.jsonl", [EMPTY] * bad + [GOOD] * (10 - bad))
    config = settings(byte_level)
    if refused:
        assert refusal(entry, config, max_dropped).startswith(f"{entry.path}:1: ")
    else:
        data = open_dataset([entry], config, max_dropped=max_dropped)
        assert (len(data), dropped(data)) == (10 - bad, bad)
    looked_at = open_dataset([entry], config, max_dropped=None)
    assert (len(looked_at), dropped(looked_at)) == (10 - bad, bad)


def test_the_message(tmp_path: Path, byte_level: Tokenizer) -> None:
    rows = [GOOD] * 3 + [LONG] * 4 + [EMPTY] * 2 + [{"messages": 5}]
    entry = write(tmp_path / "rows.jsonl", rows)
    assert re.fullmatch(
        rf"{entry.path}:4: 7 of 10 rows are dropped \(70.0%\), more than max_dropped \(0.5\), 4 "
        r"because: longer than max_length: \d+ tokens, max_length 64; 2 because: empty answer; 1 "
        r"because: messages is not a list of messages. Tried on 7 of them: max_length \d+ keeps 4, "
        r"truncation truncate keeps 4. Or set max_dropped 0.7 to go on without them. `preview` "
        r"shows every row.",
        refusal(entry, settings(byte_level, max_length=64)),
    )
    entry = write(tmp_path / "none.jsonl", [EMPTY])
    assert refusal(entry, settings(byte_level), 1.0) == (
        f"{entry.path}:1: nothing to train: all 1 rows are dropped, 1 because: empty answer: "
        "message 2. No built-in template and no other setting keeps any of the 1 that were tried: "
        "mend the data. `preview` shows every row."
    )


@pytest.mark.parametrize(
    ("row", "template", "options"),
    [
        (LONG, "mistral", {"max_length": 64}),
        (SYSTEM, SYSTEM_IGNORING, {}),
        (THOUGHT, THINKS_IF_ASKED, {}),
        (THOUGHT, THINKS_IF_ASKED, {"kwargs": {"enable_thinking": False}}),
    ],
)
def test_what_is_advised_keeps_what_it_says(
    tmp_path: Path, byte_level: Tokenizer, row: Any, template: str, options: dict[str, Any]
) -> None:
    """Every setting of the message, set: so many of the rows that were dropped are trained."""
    entry = write(tmp_path / "rows.jsonl", [row] * 4 + [EMPTY] * 2)
    message = refusal(entry, settings(byte_level, template, **options))
    advised = re.findall(r"(?:: |, )(\S+) (\S+) keeps (\d+)", message)
    assert advised, message
    for name, value, count in advised:
        changed = dict(options)
        chosen = template
        if name == "template":
            chosen = value
        elif name == "max_length":
            changed[name] = int(value)
        elif name == "chat_template_kwargs.enable_thinking":
            changed["kwargs"] = {"enable_thinking": value == "true"}
        else:
            changed[name] = value
        data = open_dataset([entry], settings(byte_level, chosen, **changed), max_dropped=None)
        assert len(data) == int(count) == 4, (name, value)


def test_a_system_prompt_that_costs_the_rows_is_named(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    long = settings(byte_level, system_prompt="Be brief. " * 60, max_length=200)
    entry = write(tmp_path / "rows.jsonl", [GOOD] * 4)
    assert "system_prompt none keeps 4" in refusal(entry, long)


def test_what_is_tried_is_spread_over_the_rows(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Of a file that is sorted, too: half of what is tried can be helped, as half of all can."""
    entry = write(tmp_path / "rows.jsonl", [EMPTY] * 300 + [GOOD] * 10 + [LONG] * 300)
    message = refusal(entry, settings(byte_level, max_length=64))
    assert (
        "Tried on 200 of them: max_length 512 keeps 100, truncation truncate keeps 100" in message
    )


def test_answers_that_are_only_context_count_too(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Of 8 answers that should be trained 3 are lost, in rows that are all trained."""
    half = {"messages": [*EMPTY["messages"], *GOOD["messages"]]}
    entry = write(tmp_path / "rows.jsonl", [half] * 3 + [GOOD] * 2)
    data = open_dataset([entry], settings(byte_level), max_dropped=0.375)
    part = report(data)["by_dataset"]["rows"]
    assert (part["dropped"], part["untrained"], part["answers"]) == (0, 3, 8)
    assert list(lost_lines({"rows": part})) == [
        "dataset rows: 37.5% of 8 answers untrained: 3 empty answer"
    ]
    long = {"messages": [*half["messages"], *LONG["messages"]]}  # dropped whole: counted once
    entry = write(tmp_path / "long.jsonl", [half] * 3 + [GOOD] * 2 + [long] * 2)
    config = settings(byte_level, max_length=64)
    part = report(open_dataset([entry], config))["by_dataset"]["long"]
    assert (part["dropped"], part["rows"]) == (2, 7)
    assert (part["untrained"], part["answers"]) == (3, 8)
    assert re.match(
        rf"{entry.path}:1: 3 of 8 answers are untrained \(37.5%\), more than max_dropped \(0.3\), "
        r"3 because: empty answer: message 2. No built-in template and no other setting keeps any "
        r"of the 5 that were tried: mend the data. Or set max_dropped 0.38 to go on without them. ",
        refusal(entry, config, 0.3),
    )


def test_an_evaluation_set_has_the_same_limit_and_its_own_line(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    data = open_dataset(
        [
            write(tmp_path / "one.jsonl", [GOOD, EMPTY, LONG, LONG]),
            write(tmp_path / "b.jsonl", [GOOD]),
        ],
        settings(byte_level, max_length=64),
        max_dropped=0.75,
    )
    parts = report(data)["by_dataset"]
    assert parts["one"]["dropped_by_reason"] == {"longer than max_length": 2, "empty answer": 1}
    assert (parts["one"]["rows"], parts["one"]["dropped_share"]) == (4, 0.75)
    assert (parts["b"]["dropped"], parts["b"]["dropped_share"]) == (0, 0.0)
    assert list(lost_lines(parts)) == [
        "dataset one: 75.0% of 4 rows dropped: 2 longer than max_length, 1 empty answer"
    ]
    many = {f"reason {i}": 9 - i for i in range(7)}
    one = {**parts["one"], "dropped_by_reason": many}
    (line,) = lost_lines({"a\x1b": one}, "evaluation dataset")
    assert line.startswith("evaluation dataset a\u241b: 75.0% of 4 rows dropped: 9 reason 0, ")
    assert line.endswith("5 reason 4, 2 other reasons")
