"""Rope settings between config.json and RopeSpec, in the key styles of transformers 4 and 5.

Version 4 has `rope_theta` and `rope_scaling`, version 5 `rope_parameters`, for some families one
for each type of layer. A file may have both styles, as ours do; they are merged as transformers
merges them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtune.hf.family.config_keys import Config, number, optional_number, size
from jaxtune.spec import RopeSpec

ALL = ""  # the type of layer of a family whose layers share one rope
_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeKeys:
    """A description of how a family's config states its rope.

    `thetas`: for each type of layer, version 4's key of its base and the base where it is absent.
    Version 5 nests by the same types, and settings beside these, of no type, do nothing there.
    `rope_scaling` stretches full attention only.
    `aliases` are other names of rope types. `type_key` is version 4's key for the type, and
    `beside` what it wants beside `rope_scaling` rather than in it. `partial` says that
    `partial_rotary_factor` is obeyed. `interleaved` is the family's way to pair features,
    and `grows` says that `llama_4_scaling_beta` is obeyed.
    """

    thetas: Mapping[str, tuple[str, float]] = field(
        default_factory=lambda: {ALL: ("rope_theta", 10_000.0)}
    )
    aliases: Mapping[str, str] = field(default_factory=dict)
    type_key: str = "rope_type"
    beside: tuple[str, ...] = ()
    partial: bool = False
    interleaved: bool = False
    grows: bool = False

    def read(self, config: Config) -> dict[str, dict[str, Any]]:
        """Settings of each type of layer in the style of version 5. `config` has its defaults."""
        if self.thetas.keys() == {ALL}:
            return {ALL: self._settings(ALL, config.get("rope_parameters") or {}, config)}
        nested = config.get("rope_parameters") or {}
        by_type = {kind for kind, value in nested.items() if isinstance(value, Mapping)}
        if unknown := by_type - self.thetas.keys():
            known = ", ".join(self.thetas)
            raise ValueError(f"rope_parameters has '{min(unknown)}'; expected settings of {known}")
        return {kind: self._settings(kind, nested.get(kind) or {}, config) for kind in self.thetas}

    def _settings(self, kind: str, stated: Config, config: Config) -> dict[str, Any]:
        scaling = config.get("rope_scaling") or {}
        if kind == ALL:
            rope = dict(scaling or stated)
        else:
            rope = {**stated, **scaling} if kind == "full_attention" else dict(stated)
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise ValueError("rope settings that differ by layer type are unknown in this family")
        older_name = rope.pop("type", None)
        name = rope.get("rope_type") or older_name or "default"
        rope["rope_type"] = self.aliases.get(name, name)
        key, default = self.thetas[kind]
        theta = config.get(key)
        rope.setdefault("rope_theta", default if theta is None else theta)
        partial = config.get("partial_rotary_factor")
        if partial is not None:
            rope.setdefault("partial_rotary_factor", partial)
        if rope["rope_type"] in ("llama3", "yarn", "longrope"):
            outer = config.get(_ORIGINAL) if kind == ALL else None
            rope[_ORIGINAL] = outer or rope.get(_ORIGINAL) or config["max_position_embeddings"]
        return rope

    def specs(self, config: Config) -> dict[str, RopeSpec]:
        """The RopeSpec of each type of layer. ValueError for what cannot be represented."""
        return {kind: self._whole(rope, config) for kind, rope in self.read(config).items()}

    def _whole(self, rope: Config, config: Config) -> RopeSpec:
        growth = optional_number(rope, "llama_4_scaling_beta") if self.grows else None
        spec = replace(self._spec(rope, config), interleaved=self.interleaved)
        if not growth:
            return spec
        return replace(spec, growth=growth, original_max_positions=size(rope, _ORIGINAL))

    def _spec(self, rope: Config, config: Config) -> RopeSpec:
        kind, theta = rope["rope_type"], number(rope, "rope_theta")
        if kind not in _KINDS:
            raise ValueError(
                f"rope type '{kind}' is not supported; supported are {', '.join(_KINDS)}"
            )
        fraction = rope.get("partial_rotary_factor", 1.0)
        if fraction != 1 and not self.partial:
            raise ValueError(f"partial_rotary_factor {fraction} is not supported; expected 1")
        if kind == "default":
            return RopeSpec(theta, fraction=fraction)
        if kind == "linear":
            return RopeSpec(theta, "linear", number(rope, "factor"), fraction=fraction)
        original = size(rope, _ORIGINAL)
        if kind == "llama3":
            return RopeSpec(
                theta,
                "llama3",
                number(rope, "factor"),
                low_freq_factor=number(rope, "low_freq_factor"),
                high_freq_factor=number(rope, "high_freq_factor"),
                original_max_positions=original,
                fraction=fraction,
            )
        factor = optional_number(rope, "factor")
        if factor is None:
            factor = size(config, "max_position_embeddings") / original
        if kind == "yarn":
            return RopeSpec(
                theta,
                "yarn",
                factor,
                original_max_positions=original,
                beta_fast=optional_number(rope, "beta_fast") or 32.0,
                beta_slow=optional_number(rope, "beta_slow") or 1.0,
                truncate=bool(rope.get("truncate", True)),
                attention_factor=_yarn_attention(rope, factor),
                fraction=fraction,
            )
        return RopeSpec(
            theta,
            "longrope",
            original_max_positions=original,
            short_factors=_numbers(rope, "short_factor"),
            long_factors=_numbers(rope, "long_factor"),
            attention_factor=_longrope_attention(rope, factor, original),
            fraction=fraction,
        )

    def write(self, config: Config) -> dict[str, Any]:
        """The keys of both styles; a file with either alone means the same."""
        ropes = self.read(config)
        nested = ropes.keys() != {ALL}
        main = ropes["full_attention" if nested else ALL]
        keys: dict[str, Any] = {"rope_parameters": ropes if nested else main}
        for kind, (key, _) in self.thetas.items():
            keys.setdefault(key, ropes[kind]["rope_theta"])
        if "partial_rotary_factor" in main:
            keys["partial_rotary_factor"] = main["partial_rotary_factor"]
        keys["rope_scaling"] = None
        if main["rope_type"] != "default":
            keys |= {key: main[key] for key in self.beside if key in main}
            outside = {"rope_theta", "rope_type", "partial_rotary_factor", *self.beside}
            inner = {key: value for key, value in main.items() if key not in outside}
            stated = config.get("rope_scaling") or {}
            keys["rope_scaling"] = {**stated, **inner, self.type_key: main["rope_type"]}
        return keys


def _yarn_attention(rope: Config, factor: float) -> float:
    """YaRN's softmax temperature as a factor of cosines and sines; arXiv 2309.00071, section 3.4,
    and DeepSeek's variant of it with two weights."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    stated = optional_number(rope, "attention_factor")
    if stated is not None:
        return stated
    over, under = optional_number(rope, "mscale"), optional_number(rope, "mscale_all_dim")
    return magnitude(over) / magnitude(under) if over and under else magnitude(1.0)


def _longrope_attention(rope: Config, factor: float, original: int) -> float:
    """arXiv 2402.13753: what keeps the entropy of attention as texts grow by `factor`."""
    stated = optional_number(rope, "attention_factor")
    if stated is not None:
        return stated
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _numbers(rope: Config, key: str) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
        raise ValueError(f"'{key}' is {values!r}; expected a list of numbers")
    return tuple(float(value) for value in values)
