"""A model card says all of a run, and no name in it becomes markup."""

import json
import re

import pytest
import yaml

from jaxtune.config import Config
from jaxtune.reporting.model_card import model_card, trained_text, with_evaluation

CARD = {
    "random_start": False,
    "template": "chatml",
    "template_kwargs": {},
    "trained": "was taken on the answers only, their end of turn included",
    "metrics": {"train": {"step": 7, "loss": 0.5, "by_dataset": {}}, "eval": {"eval_loss": 0.25}},
    "data": {"examples": 3},
    "config": "seed: 0",
}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"train_on": "all"}, "was taken on every token"),
        ({"prompt_loss_weight": 0.1, "loss_type": "dft"}, "was taken on the answers, their end of "
         "turn included, and on prompts with a weight of 0.1 (dft)"),
    ],
)  # fmt: skip
def test_what_the_loss_was_taken_on_is_what_the_config_says(fields, text):
    assert trained_text(Config(**fields)) == text


def _header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_base_data_metrics_and_config_are_there():
    card = model_card(base="acme/tiny", **CARD)
    assert _header(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxtune", "sft"],
        "base_model": "acme/tiny",
    }
    assert "# tiny, instruction-tuned" in card
    assert "The loss was taken on the answers only, their end of turn included." in card
    assert "the weights of\n`acme/tiny`, with the prompt template `chatml`" in card
    assert "| loss | 0.5 |\n| eval_loss | 0.25 |" in card
    assert '```json\n{\n "examples": 3\n}\n```' in card
    assert "```yaml\nseed: 0\n```" in card
    thinking = model_card(base="a", **{**CARD, "template_kwargs": {"enable_thinking": False}})
    assert '.jinja`, with `{"enable_thinking": false}` as `chat_template_kwargs`)' in thinking
    random = model_card(base="acme/tiny", **{**CARD, "random_start": True})
    assert "base_model" not in _header(random)
    assert "random weights of the architecture" in random
    assert "base_model" not in _header(model_card(base="/home/me/tiny", **CARD))


def test_what_is_lost_of_the_data_stands_above_its_numbers():
    part = {
        "dropped": 3,
        "dropped_share": 0.3,
        "rows": 10,
        "dropped_by_reason": {"<b>": 3},
        "untrained": 0,
    }
    data = {"by_dataset": {"x": part, "y": {**part, "dropped": 0}},
            "evaluation": {"by_dataset": {"e": part}}}  # fmt: skip
    card = model_card(base="acme/tiny", **{**CARD, "data": data})
    lost = "30.0% of 10 rows dropped: 3 \\<b\\>\n"
    assert f"## Data\n\n- dataset x: {lost}- evaluation dataset e: {lost}\n```json" in card


def test_hostile_names_stay_text():
    name = "a/x\n---\nlicense: mit\n---\n<script>alert(1)</script> [now](http://b) `` | # *y*"
    template = "USER: {x}\n```\n# not a heading\n<img src=x>"
    data = {"dataset": "```\n# no heading", "text": "</code>"}
    config = yaml.safe_dump({"template": template, "more": "````"})
    card = model_card(base=name, **{**CARD, "template": template, "data": data, "config": config})
    assert set(_header(card)) <= {"library_name", "pipeline_tag", "tags", "base_model"}
    lines = card.split("\n")
    headings = [line for line in lines if re.match(r" {0,3}#", line)]
    begins = [n for n, line in enumerate(lines) if re.match(r" {0,3}`{3,}(json|yaml)$", line)]
    assert len(begins) == 2
    for begin in begins:
        ticks = lines[begin].rstrip("jsonyaml")
        closing = rf" {{0,3}}`{{{len(ticks)},}}\s*$"  # as long at least, and nothing else
        end = next(n for n in range(begin + 1, len(lines)) if re.match(closing, lines[n]))
        inside = "\n".join(lines[begin + 1 : end])
        if "json" in lines[begin]:
            assert json.loads(inside) == data
        else:
            assert yaml.safe_load(inside) == yaml.safe_load(config)
        headings = [line for line in headings if line not in lines[begin:end]]
    assert [line.split(",")[0] for line in headings[1:]] == ["## Result", "## Data", "## Config"]
    assert headings[0].startswith("# ")
    assert headings[0].endswith(", instruction-tuned")
    outside = re.sub(r"(`+) .*? \1(?!`)", "", card.split("## Data")[0].split("---\n", 2)[2])
    assert not re.search(r"(?<!\\)[<\[](script|now|img)", outside)


FOUND = {
    "eval_loss": 0.5,
    "exact_match": 0.25,
    "intervals": {"eval_loss": [0.25, 0.75]},
    "examples": 1234,
    "by_column": {"a|b": {"x*y": {"eval_loss": 0.5, "examples": 7}}},
}


def test_an_evaluation_stands_before_the_data_and_once():
    card = model_card(base="acme/tiny", **CARD)
    once = with_evaluation(card, FOUND)
    assert "| loss | 0.5000 | 0.2500 to 0.7500 |" in once
    assert "| examples | 1,234 |  |" in once
    assert r"| by a\|b | examples | loss |" in once
    assert r"| x\*y | 7 | 0.5000 |" in once
    assert once.index("## Result") < once.index("## Evaluation") < once.index("## Data")
    assert once.replace(once[once.index("<!-- eval") : once.index("## Data")], "") == card
    change = {"eval_loss": {"value": -0.5, "interval": [-0.75, -0.25], "clear": True}}
    again = with_evaluation(once, {**FOUND, "base": {"eval_loss": 1.0}, "difference": change})
    assert again.count("## Evaluation") == 1
    row = "| loss | 1.0000 | 0.5000 | \u22120.5000 | better | \u22120.7500 to \u22120.2500 |"
    assert row in again
    assert "only where its 95% interval excludes 0" in again
    assert again.split("## Data")[1] == card.split("## Data")[1]
    foreign = with_evaluation("# A card\n", FOUND)
    assert foreign.startswith("# A card\n\n<!-- evaluation -->\n\n## Evaluation")
    assert with_evaluation(foreign, FOUND) == foreign
