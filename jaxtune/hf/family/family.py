"""A family of models: config.json -> ModelSpec and back, and a layout row per tensor."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtune.config import ModelError
from jaxtune.hf.family.config_keys import Config, activation, number, optional_size, size
from jaxtune.hf.family.rope import ALL, RopeKeys
from jaxtune.hf.layout import Row
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack

Ropes = Mapping[str, RopeSpec]  # by type of layer, as in RopeKeys

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
}


@dataclass(frozen=True)
class Family:
    """`layers` reads every layer of a config that has been completed with `defaults`.

    `rows` is total: each parameter the spec can ask for has one row, and a tensor without a row
    is refused. `defaults` are transformers' own, for keys that older files leave out. `model` reads
    the fields of ModelSpec that are not the same in every family.
    """

    architecture: str
    rows: tuple[Row, ...]
    defaults: Config
    layers: Callable[[Config, Ropes], Sequence[LayerSpec]]
    model: Callable[[Config], Mapping[str, Any]] = field(default=lambda config: {})
    rope: RopeKeys = field(default_factory=RopeKeys)

    def to_spec(self, config: Config, *, where: str = "config.json") -> ModelSpec:
        """Raise `ModelError`, naming `where`, for what is missing, malformed or unsupported."""
        config = {**_DEFAULTS, **self.defaults, **config}
        try:
            fields: dict[str, Any] = {
                "vocab": size(config, "vocab_size"),
                "width": size(config, "hidden_size"),
                "stacks": stacked(self.layers(config, self.rope.specs(config))),
                "norm_eps": number(config, "rms_norm_eps"),
                "tie_head": bool(config["tie_word_embeddings"]),
                "max_positions": size(config, "max_position_embeddings"),
                "init_scale": number(config, "initializer_range"),
            }
            return ModelSpec(**{**fields, **self.model(config)})
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ModelError(f"{where}: {error}.") from None

    def to_hf_config(self, config: Config, spec: ModelSpec, *, dtype: str) -> dict[str, Any]:
        """`config` as a causal model of `spec`, readable by transformers 4 and 5, no key lost.

        But for `quantization_config`: what is written is not quantised.
        """
        return {
            **{key: value for key, value in config.items() if key != "quantization_config"},
            "architectures": [self.architecture],
            "vocab_size": spec.vocab,
            "tie_word_embeddings": spec.tie_head,
            **self.rope.write({**self.defaults, **config}),
            "dtype": dtype,
            "torch_dtype": dtype,
        }


def layer(config: Config, rope: RopeSpec | None, **fields: Any) -> LayerSpec:
    """A layer of the sizes that all families state alike; `fields` are its own, and overrule."""
    heads = size(config, "num_attention_heads")
    head_dim = optional_size(config, "head_dim")
    sizes: dict[str, Any] = {
        "heads": heads,
        "kv_heads": optional_size(config, "num_key_value_heads") or heads,
        "head_dim": head_dim or size(config, "hidden_size") // heads,
        "mlp_width": size(config, "intermediate_size"),
    }
    if "activation" not in fields:
        sizes["activation"] = activation(str(config["hidden_act"]))
    return LayerSpec(rope=rope, **sizes | fields)


def same_layers(config: Config, ropes: Ropes, **fields: Any) -> list[LayerSpec]:
    """All layers alike; arguments as `layer` has them."""
    return [layer(config, ropes[ALL], **fields)] * size(config, "num_hidden_layers")


def biases(config: Config) -> dict[str, Any]:
    """`attention_bias` is that of all four projections."""
    bias = bool(config["attention_bias"])
    return {"qkv_bias": bias, "out_bias": bias}


def stacked(layers: Sequence[LayerSpec]) -> tuple[Stack, ...]:
    """Group layers into repeated patterns so that the fewest distinct layers are compiled.

    a a a b b -> (a) x 3, (b) x 2        a a b a a b a -> (a a b) x 2, (a) x 1
    """

    @functools.cache
    def best(start: int) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
        """The cheapest split of layers[start:]: cost, then (period, repeats) of each stack."""
        if start == len(layers):
            return (0, 0), ()
        options = []
        for period in range(1, len(layers) - start + 1):
            repeats = 1
            while _repeats(layers, start, period, repeats):
                repeats += 1
            (compiled, stacks), rest = best(start + period * repeats)
            options.append(((compiled + period, stacks + 1), ((period, repeats), *rest)))
        return min(options)

    stacks, start = [], 0
    for period, repeats in best(0)[1]:
        stacks.append(Stack(tuple(layers[start : start + period]), repeats))
        start += period * repeats
    return tuple(stacks)


def _repeats(layers: Sequence[LayerSpec], start: int, period: int, times: int) -> bool:
    at = start + period * times
    return layers[at : at + period] == layers[start : start + period]
