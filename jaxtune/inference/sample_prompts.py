"""Answers to the sample prompts during training: OUT/samples.jsonl.

Tokenizer, template and stop ids are those of the training, so `chat` will answer alike. Greedy, so
that two steps differ only by what was learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtune.data.schema import Conversation, Message
from jaxtune.hf.peft.merge import merged_params
from jaxtune.inference.generate import generate, prompt_ids
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.parallel import processes
from jaxtune.storage.jsonl import keep_rows_up_to
from jaxtune.training.initial_weights import param_shardings
from jaxtune.training.subject import Subject
from jaxtune.tree import merge

_LONGEST = 256  # tokens of an answer


class SamplePrompts:
    """A function of the weights that appends a row for each prompt to samples.jsonl.

    `model` is the one in training, without its weights. Rows after `resumed_at` are dropped, with
    `due` those of that step too, as those of metrics are. Every host calls it: none has the whole
    model, and the first one writes.
    """

    def __init__(
        self,
        run_dir: Path,
        prompts: Sequence[str],
        codec: TextCodec,
        subject: Subject,
        model: GenerationModel,
        *,
        resumed_at: int,
        due: bool = False,
    ) -> None:
        self.path = run_dir / "samples.jsonl"
        self._prompts, self._codec = prompts, codec
        self._subject, self._model = subject, model
        chats = (Conversation((Message("user", prompt),)) for prompt in prompts)
        self._ids = [prompt_ids(model, codec, chat) for chat in chats]
        if processes.is_first():
            keep_rows_up_to(self.path, resumed_at, due=due)

    def __call__(
        self, trained: Any, frozen: Any, step: int, between: Callable[[], None] = lambda: None
    ) -> None:
        """Generate and write; what `between` raises ends that, and nothing is written."""
        model = with_trained(self._model, self._subject, trained, frozen)
        generations = generate(
            model, self._codec, self._ids, max_new_tokens=_LONGEST, between=between
        )
        if not processes.is_first():
            return
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, answer in zip(self._prompts, generations, strict=True):
                row = {"step": step, "prompt": prompt, "response": answer.text}
                row["stopped"] = answer.stopped
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def with_trained(
    model: GenerationModel, subject: Subject, trained: Any, frozen: Any
) -> GenerationModel:
    """Give `model` the weights in training; adapters are merged into the unquantised base, which
    is read once more.
    """
    variables = merge(trained, frozen)
    if subject.lora is None:
        return model._replace(params=variables["params"])
    placed = param_shardings(subject.spec, model.mesh, model.dtype)
    params = merged_params(subject.model, subject.lora, variables["lora"], placed, model.dtype)
    return model._replace(params=params)
