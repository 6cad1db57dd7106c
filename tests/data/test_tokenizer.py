"""The tokenizer as the tokenizers library and transformers see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from data.made import NAMES, adds_bos, byte_level_backend, save

from jaxtune.config import ConfigError, ModelError
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["Hello, world!", " leading", "a\n\nb </s> c <|im_end|>\n", "naïve 你好 🎉", "x  y\t z"]


def test_ids_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer.folder)
    for text in TEXTS:
        ids = reference(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.begins_with_bos == (reference("a").input_ids[0] == reference.bos_token_id)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        reference.bos_token_id, reference.eos_token_id, reference.pad_token_id,
    )  # fmt: skip
    assert dict(tokenizer.named) == {
        name: token for name, token in reference.special_tokens_map.items() if name in NAMES
    }


def test_real_tokenizer_equals_transformers(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizers" / "mistral-v3"
    ours, reference = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids
    assert ours.size == len(reference) == 32768
    assert ours.special_tokens["[INST]"] == 3


@pytest.mark.parametrize("wanted", [True, False])
def test_add_bos_token_overrules_the_post_processor(tmp_path: Path, wanted: bool) -> None:
    backend = byte_level_backend() if wanted else adds_bos(byte_level_backend())
    found = save(tmp_path, backend, **NAMES, add_bos_token=wanted)
    assert found.begins_with_bos is wanted


def test_token_as_object_and_special_tokens_map(tmp_path: Path) -> None:
    save(tmp_path, byte_level_backend(), bos_token={"content": "<s>", "lstrip": False})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    found = load_tokenizer(str(tmp_path))
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


def test_chat_template_file_comes_before_the_config(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert save(tmp_path, byte_level_backend(), chat_template=several).chat_templates == {
        "tool_use": "T",
        "default": "D",
    }
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load_tokenizer(str(tmp_path)).chat_templates == {"default": "F"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load_tokenizer(str(tmp_path)).chat_templates == {"default": "F", "rag": "R"}


def test_declared_tokens_are_added(tmp_path: Path) -> None:
    backend = byte_level_backend()
    number = backend.get_vocab_size()
    declared = {str(number): {"content": "<|new|>", "special": True, "normalized": False}}
    found = save(tmp_path, backend, added_tokens_decoder=declared, eos_token="<|new|>")
    assert found.eos_id == number == found.encode("<|new|>")[0] == found.size - 1


@pytest.mark.parametrize("listed", [["<|a|>", {"content": "<|b|>"}], {"x": "<|a|>", "y": "<|b|>"}])
@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_that_only_the_config_calls_special_steer(
    tmp_path: Path, name: str, listed: object
) -> None:
    backend = byte_level_backend()
    backend.add_tokens([tokenizers.AddedToken(t, special=False) for t in ("<|a|>", "<|b|>")])
    found = save(tmp_path, backend, **{name: listed}, **NAMES)
    assert {"<|a|>", "<|b|>"} <= found.special_tokens.keys()
    assert found.encode("x<|a|>")[-1] == found.special_tokens["<|a|>"]
    assert found.size == backend.get_vocab_size()


def test_size_is_the_largest_id_and_not_a_count(tmp_path: Path) -> None:
    found = save(tmp_path, byte_level_backend())
    assert found.size == max(found.backend.get_vocab().values()) + 1


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first = save(tmp_path / "a", byte_level_backend(), **NAMES)
    moved = save(tmp_path / "b", byte_level_backend(), **NAMES)
    other = save(tmp_path / "c", byte_level_backend(), **{**NAMES, "eos_token": "<|im_end|>"})
    bos = save(tmp_path / "d", adds_bos(byte_level_backend()), **NAMES)
    assert first.fingerprint == moved.fingerprint
    assert len({first.fingerprint, other.fingerprint, bos.fingerprint}) == 3


def test_a_run_directory_is_its_model(tmp_path: Path) -> None:
    save(tmp_path / "hf", byte_level_backend(), **NAMES)
    assert load_tokenizer(str(tmp_path)).folder == tmp_path / "hf"


def test_tokens_are_added_behind_all_others(tmp_path: Path, byte_level: Tokenizer) -> None:
    from transformers import AutoTokenizer

    folder = str(byte_level.folder)
    found = load_tokenizer(folder, add=["<|im_end|>", "### End", "<|new|>"])
    assert found.added == {"### End": byte_level.size, "<|new|>": byte_level.size + 1}
    assert found.size == byte_level.size + 2
    assert found.encode("a### End") == [*byte_level.encode("a"), byte_level.size]
    assert found.fingerprint != byte_level.fingerprint
    for name, content in found.changed_files.items():
        (tmp_path / name).write_bytes(content)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert reference("a### End<|new|>", add_special_tokens=False).input_ids == (
        found.encode("a### End<|new|>")
    )
    assert {"### End", "<|new|>"} <= set(reference.all_special_tokens)
    assert reference.decode(found.encode("a<|new|>"), skip_special_tokens=True) == "a"
    again = load_tokenizer(str(tmp_path), add=["### End"])
    assert (again.added, again.changed_files) == ({}, {})
    assert load_tokenizer(folder, add=["<|im_end|>"]).changed_files == {}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer.json.*Set tokenizer_name"):
        load_tokenizer(str(tmp_path))
    for broken in (b"", b"\x0a\xff", b"not a model", b"\x0a\x02\x18\x01"):
        (tmp_path / "tokenizer.model").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"tokenizer\.model: not a SentencePiece model"):
            load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json: not a tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match=r"./nowhere: no such folder, and not a hub id"):
        load_tokenizer("./nowhere")
    with pytest.raises(ConfigError, match=r"got a file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"eos_token is '<gone>', which tokenizer.json does not"):
        save(tmp_path / "e", byte_level_backend(), eos_token="<gone>")
    (tmp_path / "e" / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="expected a JSON object; got a list"):
        load_tokenizer(str(tmp_path / "e"))


def test_half_a_surrogate_pair_is_no_token(tmp_path: Path) -> None:
    save(tmp_path, byte_level_backend())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\udcff"}')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: malformed: .*surrogates"):
        load_tokenizer(str(tmp_path))
