"""The projections that `lora.targets` means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jaxtune.config import ConfigError, nearest
from jaxtune.hf.load import HfModel
from jaxtune.hf.peft.names import modules_of, spellings

ALL = "all-linear"


def resolve_targets(model: HfModel, targets: str | Sequence[str]) -> frozenset[str]:
    """The projections that `targets` means: all-linear (all but the head), names of modules as
    transformers has them (`q_proj`, `self_attn.q_proj`, several with commas), or a regex that
    matches whole names (`.*layers\\.\\d+\\.mlp\\..*`).

    Raises `ConfigError` for what matches nothing, or a part of the layers that are repeated.
    """
    known = modules_of(model)
    words = _words(targets)
    if ALL in words:
        return frozenset(known)
    chosen: set[str] = set()
    for word in words:
        matches = _matcher(word)
        matched_layers = {
            name: [any(map(matches, spellings(model, m))) for m in modules]
            for name, modules in known.items()
        }
        matched = {name for name, hits in matched_layers.items() if any(hits)}
        if not matched:
            names = sorted({m.rpartition(".")[2] for each in known.values() for m in each})
            raise ConfigError(
                f"lora.targets: '{word}' matches none of {model.name}'s projections. There are: "
                f"{', '.join(names)}; or {ALL}.{nearest(word, [*names, ALL])}"
            )
        for name in sorted(matched):
            if not all(matched_layers[name]):
                raise ConfigError(
                    f"lora.targets: '{word}' matches {sum(matched_layers[name])} of the "
                    f"{len(known[name])} layers that are repeated with {known[name][0]}. They are "
                    "adapted together; choose projections, not layers."
                )
        chosen |= matched
    return frozenset(chosen)


def _words(targets: str | Sequence[str]) -> list[str]:
    """Names with commas between them are several; a regex may hold commas of its own."""
    if not isinstance(targets, str):
        return [word for each in targets for word in _words(each)]
    parts = targets.split(",")
    return [part.strip() for part in (parts if _are_names(parts) else [targets])]


def _are_names(words: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\s*[\w.-]+\s*", word) for word in words)


def _matcher(word: str) -> Callable[[str], bool]:
    if _are_names([word]):
        return lambda module: module == word or module.endswith(f".{word}")
    try:
        pattern = re.compile(word)
    except re.error as error:
        raise ConfigError(f"lora.targets: '{word}' is no regex: {error}.") from None
    return lambda module: pattern.fullmatch(module) is not None
