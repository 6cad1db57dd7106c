"""Tokenizers of different nature, made in milliseconds, each saved as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxtune.data.tokenizer import Tokenizer, load_tokenizer

CONTROL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
CORPUS = [
    "Below is an instruction that describes a task. Write a response that completes it.",
    "### Instruction:\nName a prime.\n\n### Response:\nSeven is a prime number.",
    "USER: What is the capital of France?\nASSISTANT: The capital of France is Paris.",
    "system user assistant You are a helpful assistant. Hello! How can I help you today?",
]


def save(folder: Path, backend: tokenizers.Tokenizer, **config: Any) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder))


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_backend(scheme: str = "always") -> tokenizers.Tokenizer:
    """As converted from SentencePiece: a blank before text and, "always", behind special tokens.

    `legacy` is the oldest form of it, with the blank put by a normalizer (Llama 2).
    """
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *CONTROL, *alphabet], show_progress=False
    )
    trained.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(learned["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens(CONTROL)
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def character_backend(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Every printable character a token, no pre-tokeniser, and `merges` across anything."""
    pieces = ["\n", *(chr(code) for code in range(32, 127)), *(a + b for a, b in merges)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def adds_bos(backend: tokenizers.Tokenizer, bos: str = "<s>") -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def nasty_backend() -> tokenizers.Tokenizer:
    """Bytes merged across blanks, line ends and words: nothing keeps to the edge of a message."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    said = ("user\nName a prime.", "assistant\nSeven.", "A: Seven.", "[INST]Another?[/INST]Eleven.")
    backend.train_from_iterator([*CORPUS, *said, *said], trainer)
    return backend
