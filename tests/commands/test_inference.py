"""Answers in codec: stop strings wherever tokens begin and end, many requests at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune.config import ConfigError, DataError, load
from jaxtune.data.schema import Conversation, Message
from jaxtune.data.templating.answer_text import Affixes
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.inference import load as inference
from jaxtune.inference.generate import (
    Detokenizer,
    Generation,
    TextGenerator,
    generate,
    prompt_ids,
    stream,
)
from jaxtune.inference.load import load_model
from jaxtune.inference.sampling import Sampling

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"
SAID = "Yes, you can"
BEHIND = 2  # an id to decode behind


@pytest.fixture(scope="module")
def asked(parrot: Any) -> Any:
    """The parrot with its codec, and the ids of a prompt."""
    config = load(overrides={"model_name_or_path": str(parrot.folder)})
    codec = inference.open_codec(config)
    model = load_model(str(parrot.folder), config, codec, inference.open_mesh(config))
    return model, codec, prompt_ids(model, codec, Conversation((Message("user", "Can I?"),)))


def test_text_in_any_pieces_ends_before_the_first_stop_string() -> None:
    """Against the definition: the whole text, cut; for any tokens, pieces of them and strings."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    text = "Please return né 12 € 日本: Please, please return\nEND"
    ids = tokenizer.encode(text)
    rng = np.random.default_rng(0)
    cuts = 0
    for _ in range(300):
        starts = rng.integers(0, len(text), size=rng.integers(0, 4))
        stop = [text[at : at + rng.integers(1, 12)] for at in starts]
        first = min((at for each in stop if (at := text.find(each)) >= 0), default=None)
        expected = text[:first]
        made = len(ids)
        if first is not None:
            cuts += 1
            made = next(
                n for n in range(1, len(ids) + 1)
                if any(each in tokenizer.decode(ids[:n]) for each in stop)
            )  # fmt: skip
            # What the string that came first in tokens leaves.
            expected = tokenizer.decode(ids[:made])
            expected = expected[: min(at for s in stop if (at := expected.find(s)) >= 0)]
        said = Detokenizer(tokenizer, BEHIND, tuple(stop), Affixes())
        found, shown, at = None, "", 0
        while found is None:
            size = int(rng.integers(1, 6))
            piece, found = said.add(
                ids[at : at + size], "length" if at + size >= len(ids) else None
            )
            at += size
            shown += piece
            assert expected.startswith(shown)
        assert found == Generation(expected, first is not None, made)
        assert shown == expected
    assert 100 < cuts < 300


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["you"], "Yes, "),
        (["s, y"], "Ye"),  # begins and ends inside of tokens
        (["can", "Yes, you can't", ","], "Yes"),
        (["You", "cans"], SAID),
        (["Y"], ""),
    ],
)
def test_answers_and_streams_end_before_a_stop_string(
    asked: Any, stop: list[str], text: str
) -> None:
    model, codec, prompt = asked
    (found,) = generate(model, codec, [prompt], max_new_tokens=20, stop=stop)
    assert (found.text, found.stopped) == (text, True)
    assert found.tokens <= len(codec.tokenizer.encode(SAID))
    pieces = stream(model, codec, [Message("user", "Can I?")], max_new_tokens=20, stop=stop)
    ended = []

    def shown() -> Iterator[str]:
        ended.append((yield from pieces))

    seen = list(itertools.accumulate(shown(), initial=""))
    assert all(text.startswith(part) for part in seen)
    assert (seen[-1], ended) == (text, [found])


def test_many_requests_at_a_time(asked: Any) -> None:
    """More than slots, with settings of their own; one is cancelled, the others do not notice."""
    model, codec, prompt = asked
    generator = TextGenerator(model, codec, slots=2)
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": 20},
        {"max_new_tokens": 2},
        {"max_new_tokens": 20, "stop": ["can"]},
        {"max_new_tokens": 8, "sampling": Sampling(50.0, seed=1)},  # hot enough to say anything
        {"max_new_tokens": 20},
    ]
    requests = [generator.submit(prompt, **each) for each in settings]
    assert generator.waiting == len(requests)
    generator.cancel(requests[4])
    found: dict[int, Generation] = {}
    texts = dict.fromkeys(requests, "")
    while generator.busy:
        for piece in generator.step():
            texts[piece.request] += piece.text
            if piece.generation is not None:
                found[piece.request] = piece.generation
    assert list(found) == sorted(found, key=list(found).index)
    assert set(found) == set(requests[:4])
    assert {request: each.text for request, each in found.items()} == {
        request: texts[request] for request in requests[:4]
    }
    assert found[requests[0]].text == SAID
    assert found[requests[1]] == Generation(codec.tokenizer.decode(
        codec.tokenizer.encode(f"\n{SAID}")[1:3]), False, 2)  # fmt: skip
    assert found[requests[2]].text == "Yes, you "
    assert found[requests[3]].text != SAID
    again = TextGenerator(model, codec, slots=1)
    again.submit(prompt, **settings[3])
    pieces = [piece for _ in range(20) for piece in again.step(1)]
    assert pieces[-1].generation == found[requests[3]]


def test_an_answer_ends_with_the_turn_of_its_template(asked: Any) -> None:
    """Here one that ends answers with what the parrot says last, which is none of its own stops."""
    model, codec, prompt = asked
    end = codec.tokenizer.encode(f"\n{SAID}")[-1]
    template = dataclasses.replace(
        codec.template, ours=True, stop="<end>", special_tokens={"<end>": end}
    )
    (found,) = generate(model, codec, [prompt], max_new_tokens=20, templates=[template])
    assert found == Generation("Yes, you", True, 3)


def test_refusals(asked: Any) -> None:
    model, codec, prompt = asked
    with pytest.raises(ConfigError, match="stop: has an empty string, which every answer begins"):
        generate(model, codec, [prompt], max_new_tokens=1, stop=[""])
    generator = TextGenerator(model, codec, max_length=len(prompt))
    with pytest.raises(DataError, match=f"has {len(prompt)} tokens; here are {len(prompt)} posit"):
        generator.submit(prompt, max_new_tokens=1)
    assert generate(model, codec, [], max_new_tokens=1) == []
