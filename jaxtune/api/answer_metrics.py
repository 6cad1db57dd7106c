"""A user's metrics over the answers that a model in training generates to held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtune.api.callbacks import Callbacks
from jaxtune.config import Config, ConfigError
from jaxtune.data.dataset import Dataset
from jaxtune.evaluation.questions import Question, questions_of, that_fit
from jaxtune.inference.generate import generate, prompt_ids
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.inference.sample_prompts import with_trained
from jaxtune.spec import ModelSpec
from jaxtune.training.subject import Subject

_QUESTIONS = 100  # of each dataset, at every evaluation
_LONGEST = 256  # tokens of an answer


def held_out_questions(
    config: Config, held_out: Dataset | None, codec: TextCodec, spec: ModelSpec
) -> tuple[Question, ...]:
    """List the first questions of each held-out dataset.

    Raises: ConfigError if nothing is held out, DataError if no row has an answer in words.
    """
    if held_out is None:
        raise ConfigError("metrics: need held-out data. Give eval_data, or set eval_split.")
    entries = config.eval_datasets or config.datasets
    return that_fit(questions_of(entries, held_out, codec, _QUESTIONS), spec.max_positions)


class AnswerMetrics:
    """A function of the weights in training that returns the metrics; every host calls it, since
    none has the whole model.
    """

    def __init__(
        self,
        calls: Callbacks,
        questions: Sequence[Question],
        codec: TextCodec,
        subject: Subject,
        model: GenerationModel,
    ) -> None:
        self._calls, self._questions = calls, questions
        self._codec, self._subject, self._model = codec, subject, model
        self._ids = [prompt_ids(model, each.codec, each.conversation) for each in questions]

    def __call__(
        self, trained: Any, frozen: Any, step: int, between: Callable[[], None]
    ) -> dict[str, float]:
        answers = generate(
            with_trained(self._model, self._subject, trained, frozen),
            self._codec,
            self._ids,
            max_new_tokens=_LONGEST,
            templates=[each.codec.template for each in self._questions],
            between=between,
        )
        return self._calls.measure(
            [each.transcript for each in self._questions],
            [each.reference for each in self._questions],
            [answer.text for answer in answers],
        )
