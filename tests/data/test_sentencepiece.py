"""Bare SentencePiece models: ids as sentencepiece itself makes them, exported for transformers."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data.made import CORPUS

from jaxtune.config import ConfigError, ModelError
from jaxtune.data import sentencepiece as ours
from jaxtune.data.schema import Conversation, Document, Message
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenize import TokenizedRow, tokenize_rows
from jaxtune.data.tokenizer import load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [
    "Seven is a prime number.", "What  is\tthe capital?", "naïve 你好 🎉", "a b  c   d",
    "\nA:\n\nB", "instruction [USR] that [USR]", "x", "The capital of France is Paris.",
]  # fmt: skip
KINDS = {
    "bpe": {},
    "bpe without dummy prefix": {"add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "unigram, normalised": {
        "model_type": "unigram", "vocab_size": 330,
        "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True,
    },
    "pad is eos": {"pad_id": -1},
    "no bos": {"bos_id": -1, "eos_id": 1, "pad_id": -1},
}  # fmt: skip


def write(folder: Path, **options: object) -> Path:
    made = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "pad_id": 3,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "control_symbols": ["<|im_start|>", "<|im_end|>"], "user_defined_symbols": ["[USR]"],
        "minloglevel": 2, **options,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=made, **settings
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sp"), **KINDS[request.param])


def test_ids_and_text_are_sentencepieces_own(model: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    found = load_tokenizer(str(model.parent))
    for text in TEXTS:
        ids = reference.encode(text)
        assert found.encode(text) == ids, text
        assert found.decode(ids) == reference.decode(ids)
    assert found.size == reference.get_piece_size()
    wanted = (reference.bos_id(), reference.eos_id(), reference.pad_id(), reference.unk_id())
    mine = (found.bos_id, found.eos_id, found.pad_id, found.unk_id)
    assert tuple(-1 if i is None else i for i in mine) == wanted
    assert found.begins_with_bos == (reference.bos_id() >= 0)
    assert found.special_tokens["<|im_end|>"] == reference.piece_to_id("<|im_end|>")
    assert "[USR]" not in found.special_tokens


def test_fields_are_those_of_the_protocol_buffer(model: Path) -> None:
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    found = ours.read(model)
    assert [(p.text, p.score, p.kind) for p in found.pieces] == [
        (p.piece, p.score, p.type) for p in proto.pieces
    ]
    for name in ("byte_fallback", "unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(found, name) == getattr(proto.trainer_spec, name)
    for name in ("add_dummy_prefix", "remove_extra_whitespaces"):
        assert getattr(found, name) == getattr(proto.normalizer_spec, name)
    assert found.charsmap == proto.normalizer_spec.precompiled_charsmap


def test_exported_files_load_in_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = load_tokenizer(str(model), add=["<|new|>"])
    assert found.added == {"<|new|>": found.size - 1}
    shutil.copy(model, tmp_path)
    for name, content in found.changed_files.items():
        (tmp_path / name).write_bytes(content)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "a<|im_start|>b <|new|> c"]:
        assert reference(text, add_special_tokens=False).input_ids == found.encode(text)
    assert (reference("x").input_ids[0] == found.bos_id) == found.begins_with_bos
    assert reference.eos_token_id == found.eos_id
    assert "<|new|>" in reference.all_special_tokens
    again = load_tokenizer(str(tmp_path))
    assert again.begins_with_bos == found.begins_with_bos
    assert again.encode(TEXTS[0]) == found.encode(TEXTS[0])


def test_bos_once_and_the_end_is_trained(model: Path) -> None:
    found = load_tokenizer(str(model))
    for name in ("alpaca", "chatml", "llama2", "plain"):
        template = resolve(name, found)
        row = render(template, Conversation((Message("user", "Q?"), Message("assistant", "Yes."))))
        (result,) = tokenize_rows(row, found)  # type: ignore[arg-type]
        assert isinstance(result, TokenizedRow), result
        ids, weights = result.tokens
        assert ids.tolist().count(found.bos_id) == found.begins_with_bos
        assert (ids[0] == found.bos_id) == found.begins_with_bos
        assert weights[ids == template.stop_id][-1] == 1
    (row,) = render(resolve("plain", found), Document("some text"))
    (result,) = tokenize_rows([row], found)  # type: ignore[list-item]
    assert isinstance(result, TokenizedRow)
    ids = result.tokens.ids.tolist()
    assert ids.count(found.bos_id) == found.begins_with_bos
    assert ids[-1] == found.eos_id


def test_a_config_beside_it_is_honoured(tmp_path: Path) -> None:
    file = write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": False, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
                    "tokenizer_class": "LlamaTokenizer", "chat_template": "T"})
    )  # fmt: skip
    found = load_tokenizer(str(file))
    assert not found.begins_with_bos
    assert found.eos_id == found.pad_id == found.special_tokens["<|im_end|>"]
    assert found.chat_templates["default"] == "T"


def test_unsupported_kinds_are_refused(tmp_path: Path) -> None:
    options = {"byte_fallback": False, "vocab_size": 40, "hard_vocab_limit": False}
    with pytest.raises(ConfigError, match="of words, of characters"):
        load_tokenizer(str(write(tmp_path, model_type="char", **options)))


def test_real_model_on_a_whole_file(shared_data: Path, tmp_path: Path) -> None:
    """Equal to sentencepiece, and to the makers' tokenizer.json wherever that is."""
    folder = shared_data / "tokenizers" / "mistral-v3"
    shutil.copy(folder / "tokenizer.model", tmp_path)
    bare, fast = load_tokenizer(str(tmp_path)), load_tokenizer(str(folder))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text())
    texts = [text for row in rows for text in row.values() if text]
    ids, theirs = bare.encode_batch(texts), fast.encode_batch(texts)
    for text, mine in zip(texts, ids, strict=True):
        assert mine == reference.encode(text) or text.startswith(" ")
    unlike = [text for text, a, b in zip(texts, ids, theirs, strict=True) if a != b]
    assert len(unlike) < 0.03 * len(texts)
    assert all("  " in text for text in unlike)  # runs of blanks, merged in another order
    template = resolve("mistral", bare)
    for row in rows[:100]:
        asked = Message("user", row["instruction"], row["input"])
        noun = Conversation((asked, Message("assistant", row["output"])))
        (spans,) = render(template, noun)
        text = "".join(span.text for span in spans)  # type: ignore[union-attr]
        if "  " not in text:
            assert bare.encode(text) == fast.encode(text)
    assert bare.special_tokens == fast.special_tokens
    assert (bare.bos_id, bare.eos_id, bare.size) == (fast.bos_id, fast.eos_id, fast.size)


def test_a_normaliser_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, normalization_rule_name="nmt_nfkc")
    proto = sentencepiece_model_pb2().ModelProto()
    proto.ParseFromString(file.read_bytes())
    proto.normalizer_spec.precompiled_charsmap = b"\xff\xff\xff\xff short"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"tokenizer\.model: not a SentencePiece model: Error"):
        load_tokenizer(str(tmp_path))


def sentencepiece_model_pb2() -> Any:
    from sentencepiece import sentencepiece_model_pb2 as found

    return found
