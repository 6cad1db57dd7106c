"""Read the keys of a config.json: strictly, with an error that names the key."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.config import ModelError

Config = Mapping[str, Any]

DTYPES = ("float32", "bfloat16", "float16")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def size(config: Config, key: str) -> int:
    """A positive integer; ValueError otherwise."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"'{key}' is {value!r}; expected a positive integer")
    return value


def number(config: Config, key: str) -> float:
    """A finite number; ValueError otherwise."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'{key}' is {value!r}; expected a number")
    if not math.isfinite(value):
        raise ValueError(f"'{key}' is {value}; expected a finite number")
    return float(value)


def optional_size(config: Config, key: str) -> int | None:
    return None if config.get(key) is None else size(config, key)


def optional_number(config: Config, key: str) -> float | None:
    return None if config.get(key) is None else number(config, key)


def activation(name: str) -> str:
    """The name in `LayerSpec` of transformers' name; ValueError for one that is not built."""
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"hidden_act '{name}' is not supported; supported are {known}")
    return _ACTIVATIONS[name]


def layer_types(config: Config, *, full_every: int | None = None) -> list[str]:
    """Each layer's type: `layer_types` where stated, else every `full_every`-th one is full.

    Without `full_every` all are full. Types are full_attention and sliding_attention.
    """
    count = size(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        every = 1 if full_every is None else full_every
        return [_LAYER_TYPES[(n + 1) % every != 0] for n in range(count)]
    if len(kinds) != count:
        raise ValueError(f"layer_types names {len(kinds)} layers; num_hidden_layers is {count}")
    unknown = sorted({*kinds} - {*_LAYER_TYPES})
    if unknown:
        raise ValueError(f"layer_types has '{unknown[0]}'; known: full_ and sliding_attention")
    return list(kinds)


def refuse(config: Config, *keys: str) -> None:
    """ValueError for a switch that is on and means something no part of the decoder does."""
    for key in keys:
        if config.get(key):
            raise ValueError(f"'{key}' is {config[key]!r}, which is not supported")


def config_dtype(config: Config) -> str | None:
    """The dtype a config states, in either key style, or None. `ModelError` if not a float."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise ModelError(f"config.json: dtype '{name}'; expected one of {', '.join(DTYPES)}.")
    return name
