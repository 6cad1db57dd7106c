"""Answers to the sample prompts while a model is trained: OUT/samples.jsonl.

The words and the stop ids are those of the training, so what is answered is what will be chatted
with. Greedy, so that two steps differ by what was learnt alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.data.schema import Conversation, Message
from jaxtune.inference.generate import answer, prompt_ids
from jaxtune.inference.load import Model, Words
from jaxtune.parallel import processes
from jaxtune.storage.jsonl import keep_rows_up_to
from jaxtune.tree import merge

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtune.training.subject import Subject

_LONGEST = 256  # tokens of an answer


class Samples:
    """Call it at an evaluation; rows after `resumed_at` are dropped, with `due` those of that step
    too, as those of metrics are. What `between` raises ends the answers, of which none is written.

    Every host calls: all ask the model, which none of them has whole, and the first one writes.
    """

    def __init__(
        self,
        run_dir: Path,
        prompts: Sequence[str],
        words: Words,
        subject: Subject,
        mesh: Mesh,
        dtype: Any,
        *,
        stop_ids: frozenset[int],
        resumed_at: int,
        due: bool = False,
    ) -> None:
        self.path = run_dir / "samples.jsonl"
        self._prompts, self._words = prompts, words
        self._subject = subject
        self._mesh, self._dtype, self._stop_ids = mesh, dtype, stop_ids
        asked = self._with({})
        chats = (Conversation((Message("user", prompt),)) for prompt in prompts)
        self._ids = [prompt_ids(asked, words, chat) for chat in chats]
        if processes.is_first():
            keep_rows_up_to(self.path, resumed_at, due=due)

    def __call__(
        self, trained: Any, frozen: Any, step: int, between: Callable[[], None] = lambda: None
    ) -> None:
        asked = self._with(self._params(merge(trained, frozen)))
        found = answer(asked, self._words, self._ids, max_new_tokens=_LONGEST, between=between)
        if not processes.is_first():
            return
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, said in zip(self._prompts, found, strict=True):
                row = {"step": step, "prompt": prompt, "response": said.text}
                row["stopped"] = said.stopped
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _with(self, params: Any) -> Model:
        subject = self._subject
        return Model(subject.name, subject.spec, params, self._stop_ids, self._dtype, self._mesh)

    def _params(self, variables: Any) -> Any:
        """Whole parameters; adapters are merged into the unquantised base, read once more."""
        if self._subject.lora is None:
            return variables["params"]
        from jaxtune.hf.peft.merge import merged_params
        from jaxtune.training.initial_weights import param_shardings

        model, lora = self._subject.model, self._subject.lora
        placed = param_shardings(model.spec, self._mesh, self._dtype)
        return merged_params(model, lora, variables["lora"], placed, self._dtype)
