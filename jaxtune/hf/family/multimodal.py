"""Models of text and something else, of which the text half is read: its config, its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtune.config import ModelError
from jaxtune.hf.family.config_keys import Config

T = TypeVar("T")

# What a wrapping config says of both halves, unless the text half says otherwise.
_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
# What it says of the text half itself, whatever stands there.
_OVER = ("tie_word_embeddings", "quantization_config")


@dataclass(frozen=True)
class Wrapper:
    """`family` is the text half's where it does not say itself. `prefixes` are pairs (in the file,
    in a model of text alone), `modules` that of them by which transformers 5 names its modules;
    tensors whose name begins as one of `left_out` are the other half's.
    """

    family: str
    prefixes: tuple[tuple[str, str], ...]
    modules: tuple[str, str]
    left_out: tuple[str, ...]

    def config(self, config: Config, *, where: str) -> dict[str, Any]:
        """The config of the text half alone. Raises `ModelError` where there is none."""
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise ModelError(
                f"{where}: no 'text_config' in a config of model_type '{config['model_type']}'."
            )
        shared = {key: config[key] for key in _SHARED if config.get(key) is not None}
        stated = {key: value for key, value in inner.items() if value is not None}
        over = {key: config[key] for key in _OVER if config.get(key) is not None}
        return {"model_type": self.family, **inner, **shared, **stated, **over}

    def tensors(self, tensors: Mapping[str, T], *, where: str) -> tuple[dict[str, T], list[str]]:
        """Tensors under the names of a model of text alone, and the names of those left out.

        A name that is neither half's is kept as it is, for whoever accounts for tensors.
        """
        text: dict[str, T] = {}
        left_out = []
        for name, tensor in tensors.items():
            if name.startswith(self.left_out):
                left_out.append(name)
                continue
            begins = next((pair for pair in self.prefixes if name.startswith(pair[0])), ("", ""))
            own = begins[1] + name.removeprefix(begins[0])
            if own in text:
                raise ModelError(f"{where}: holds the tensor {own} twice, under two prefixes.")
            text[own] = tensor
        return text, left_out

    def module(self, name: str) -> str:
        """Return transformers 5's name, in the whole model, of a module of the text-only model."""
        whole, alone = self.modules
        return whole + name.removeprefix(alone) if name.startswith(alone) else name

    def names(self, name: str) -> tuple[str, ...]:
        """All that a module of the model of text alone may be called, by itself and in the whole.

        lm_head -> lm_head, language_model.lm_head
        """
        own = f"{name}."
        spellings = [own, *(a + own.removeprefix(b) for a, b in self.prefixes if own.startswith(b))]
        return tuple(each.removesuffix(".") for each in spellings)


def _with_images(family: str) -> Wrapper:
    """The parts under the names that transformers 4 writes, and those of version 5."""
    modules = ("model.language_model.", "model.")
    return Wrapper(
        family=family,
        prefixes=(
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            modules,
        ),
        modules=modules,
        left_out=(
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
    )


WRAPPERS: dict[str, Wrapper] = {
    "gemma3": _with_images("gemma3_text"),
    "mistral3": _with_images("mistral"),  # from 2512 on its text_config says ministral3
}
