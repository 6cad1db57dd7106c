"""Every chat template that TRL ships, 18 conversations each: nothing wrong, and next to nothing lost."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from data.made import NAMES, byte_level_backend, save
from data.template_sweep import CONVERSATIONS, Ends, Outcome, sweep

FOLDER = Path((find_spec("trl").submodule_search_locations or [""])[0]) / "chat_templates"  # type: ignore[union-attr]
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
