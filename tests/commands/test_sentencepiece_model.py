"""A model whose only tokenizer file is SentencePiece's, from training to transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from jaxtune import chat, evaluate, train
from jaxtune.config import Config, load

sentencepiece = pytest.importorskip("sentencepiece")

PLACES = ["Rome", "Oslo", "Paris", "Lima", "Kyiv", "Bern", "Doha", "Cork"]
ROWS = [
    {"instruction": f"Where is number {i}?", "output": f"In {p}."} for i, p in enumerate(PLACES)
]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320,
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def settings(folder: Path, **more: object) -> Config:
    return load(
        overrides={
            "model_name_or_path": str(folder / "start"), "dataset": str(folder / "data.jsonl"),
            "init": "random", "max_length": 256, "max_steps": 2, "mesh.fsdp": 1, "mesh.data": -1,
            "per_device_train_batch_size": 1, "packing": False, "template": "alpaca",
            "gradient_checkpointing": "none", "output_dir": str(folder / "out"), **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.jsonl, start/ with config.json and tokenizer.model alone, out/ of two steps."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "start").mkdir()
    (folder / "start" / "config.json").write_text(json.dumps(CONFIG))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{r['instruction']} {r['output']}" for r in ROWS] * 9),
        model_writer=model, model_type="bpe", vocab_size=320, byte_fallback=True,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "start" / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train.run(settings(folder))
    return folder


def test_transformers_gives_the_exported_tokenizer_the_ids_of_sentencepiece(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "out" / "hf")
    source = sentencepiece.SentencePieceProcessor(str(folder / "start" / "tokenizer.model"))
    for row in ROWS:
        text = f"{row['instruction']}\n{row['output']} é"
        assert theirs(text, add_special_tokens=False).input_ids == source.encode(text)
        asked = [{"role": "user", "content": row["instruction"]}]
        said = [*asked, {"role": "assistant", "content": row["output"]}]
        ids = theirs.apply_chat_template(said, return_dict=False)
        assert ids[0] == source.bos_id()
        assert ids[-1] == source.eos_id()
        assert ids.count(source.eos_id()) == 1


def test_the_exported_model_is_evaluated_and_answers(folder: Path) -> None:
    tuned = settings(folder, model_name_or_path=str(folder / "out" / "hf"), init="pretrained")
    found = evaluate.run(tuned).scores
    assert found["examples"] == len(ROWS)
    assert 0 < found["eval_loss"] < 7
    asked = chat.ChatOptions(prompt="Where is number 3?", max_new_tokens=4)
    assert 1 <= chat.run(tuned, asked).answers[0]["tokens"] <= 4
