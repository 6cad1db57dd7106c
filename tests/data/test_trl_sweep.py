"""Every chat template that TRL ships, 18 conversations each: nothing wrong, hardly any lost."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from data.made import NAMES, byte_level_backend, save
from data.template_sweep import CONVERSATIONS, Ends, Outcome, sweep

_TRL = find_spec("trl")
if _TRL is None:
    pytest.skip("its templates are those of trl: make test installs it", allow_module_level=True)
FOLDER = Path((_TRL.submodule_search_locations or [""])[0]) / "chat_templates"
ORIGINALS = sorted(file.stem for file in FOLDER.glob("*.jinja") if "_training" not in file.stem)
_SPECIAL = r"<\|[\w|]+\|?>|<[a-z_]+\|>|<(?:start|end)_of_\w+>|<｜[^｜<>]+｜>|\[gMASK\]|<sop>"
# By the beginning of a template's name; the longest wins.
ENDS = {
    "": Ends("<|im_end|>", "<|im_end|>"),
    "cohere": Ends("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": Ends("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": Ends("<turn|>", "<|tool_response>"),
    "gemma": Ends("<end_of_turn>", "<end_of_turn>"),
    "gemma4": Ends("<turn|>", "<|tool_response>"),
    "glm": Ends("<|user|>", "<|observation|>", written=False),
    "gptoss": Ends("<|return|>", "<|call|>"),
    "idefics": Ends("<end_of_utterance>", "<end_of_utterance>"),
    "llama": Ends("<|eot_id|>", "<|eot_id|>"),
    "llava": Ends("</s>", "</s>"),
    "muse": Ends("<|eot|>", "<|eot|>"),
    "phi": Ends("<|end|>", "<|end|>"),
    "smol": Ends("<end_of_utterance>", "<end_of_utterance>"),
}


pytestmark = pytest.mark.xdist_group("trl_sweep")  # one fixture of 8 CPU seconds


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    from transformers import AutoTokenizer

    texts = {file.stem: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.jinja")}
    special = sorted({token for text in texts.values() for token in re.findall(_SPECIAL, text)})
    backend = byte_level_backend()
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    )
    ours = save(tmp_path_factory.mktemp("trl"), backend, **NAMES)
    reference = AutoTokenizer.from_pretrained(ours.folder)
    found: list[Outcome] = []
    for name in ORIGINALS:
        ends = ENDS[max((begin for begin in ENDS if name.startswith(begin)), key=len)]
        twin = texts.get(f"{name}_training")
        found += sweep(name, texts[name], twin, ends, ours, reference)
    return found


def test_nothing_is_trained_wrongly(outcomes: list[Outcome]) -> None:
    assert [outcome for outcome in outcomes if outcome.wrong] == []


def test_answers_that_can_be_checked_are_trained(outcomes: list[Outcome]) -> None:
    assert len(ORIGINALS) == 41
    assert len(CONVERSATIONS) == 18
    exact = [outcome for outcome in outcomes if not outcome.reason]
    assert len(exact) >= 0.98 * len(outcomes)


def test_the_page_has_what_is_not_trained(outcomes: list[Outcome]) -> None:
    lost = Counter((outcome.template, outcome.reason) for outcome in outcomes if outcome.reason)
    lines = [f"| all {len(ORIGINALS)} | {lost.total()} of {len(outcomes)} | 0 wrong |"]
    lines += [f"| {name} | {count} | {reason} |" for (name, reason), count in lost.items()]
    page = Path(__file__).parents[2] / "docs" / "templates.md"
    assert "|---|---|---|\n" + "\n".join(lines) + "\n\n" in page.read_text(encoding="utf-8")
