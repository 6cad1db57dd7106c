"""What each `model_type` means: config.json -> ModelSpec and back, and a layout row per tensor.

A family is data over the one decoder; there is no code per brand below this table. Configs are
read as transformers reads them, in the key style of version 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and of version 5 (`rope_parameters`, `dtype`), a key that is absent having the
value transformers gives it. What cannot be represented is refused, never approximated.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.config import ModelError, nearest
from jaxtune.hf.layout import Row
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack

Config = Mapping[str, Any]

_LAYER = "model.layers.{L}."
_BLOCK = "stack_{i}/layer_{j}/"


def _layer_rows(*rows: tuple[str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(_LAYER + source, _BLOCK + target, layout) for source, target, layout in rows)


_DECODER = (
    Row("model.embed_tokens.weight", "embed/table", "V D -> V D"),
    *_layer_rows(
        ("input_layernorm.weight", "attention_norm/scale", "D -> L D"),
        ("self_attn.q_proj.weight", "attention/q/kernel", "(H K) D -> L D H K"),
        ("self_attn.k_proj.weight", "attention/k/kernel", "(G K) D -> L D G K"),
        ("self_attn.v_proj.weight", "attention/v/kernel", "(G K) D -> L D G K"),
        ("self_attn.o_proj.weight", "attention/o/kernel", "D (H K) -> L H K D"),
        ("post_attention_layernorm.weight", "mlp_norm/scale", "D -> L D"),
        ("mlp.gate_proj.weight", "mlp/gate/kernel", "F D -> L D F"),
        ("mlp.up_proj.weight", "mlp/up/kernel", "F D -> L D F"),
        ("mlp.down_proj.weight", "mlp/down/kernel", "D F -> L F D"),
    ),
    Row("model.norm.weight", "final_norm/scale", "D -> D"),
    Row("lm_head.weight", "head/kernel", "V D -> D V"),
)
_QKV_BIAS = _layer_rows(
    ("self_attn.q_proj.bias", "attention/q/bias", "(H K) -> L H K"),
    ("self_attn.k_proj.bias", "attention/k/bias", "(G K) -> L G K"),
    ("self_attn.v_proj.bias", "attention/v/bias", "(G K) -> L G K"),
)
_OUT_BIAS = _layer_rows(("self_attn.o_proj.bias", "attention/o/bias", "D -> L D"))
_MLP_BIAS = _layer_rows(
    ("mlp.gate_proj.bias", "mlp/gate/bias", "F -> L F"),
    ("mlp.up_proj.bias", "mlp/up/bias", "F -> L F"),
    ("mlp.down_proj.bias", "mlp/down/bias", "D -> L D"),
)
_QK_NORM = _layer_rows(
    ("self_attn.q_norm.weight", "attention/q_norm/scale", "K -> L K"),
    ("self_attn.k_norm.weight", "attention/k_norm/scale", "K -> L K"),
)


@dataclass(frozen=True)
class Family:
    """`layers` reads every layer of a config that has been completed with `defaults`.

    `rows` is total: each parameter the spec can ask for has one row, and a tensor without a row
    is refused. `defaults` are transformers' own, for keys that older files leave out.
    """

    architecture: str
    rows: tuple[Row, ...]
    defaults: Config
    layers: Callable[[Config], Sequence[LayerSpec]]

    def to_spec(self, config: Config, *, where: str = "config.json") -> ModelSpec:
        """Raises `ModelError`, naming `where`, for what is missing, malformed or unsupported."""
        config = {**_DEFAULTS, **self.defaults, **config}
        try:
            return ModelSpec(
                vocab=_size(config, "vocab_size"),
                width=_size(config, "hidden_size"),
                stacks=stacked(self.layers(config)),
                norm_eps=_number(config, "rms_norm_eps"),
                tie_head=bool(config["tie_word_embeddings"]),
                max_positions=_size(config, "max_position_embeddings"),
                init_scale=_number(config, "initializer_range"),
            )
        except (ValueError, TypeError) as error:
            raise ModelError(f"{where}: {error}.") from None

    def to_hf_config(self, config: Config, spec: ModelSpec, *, dtype: str) -> dict[str, Any]:
        """`config` as a causal model of `spec`, readable by transformers 4 and 5, no key lost."""
        rope = rope_parameters({**self.defaults, **config})
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaling |= config.get("rope_scaling") or {}
        return {
            **config,
            "architectures": [self.architecture],
            "vocab_size": spec.vocab,
            "tie_word_embeddings": spec.tie_head,
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_DTYPES = ("float32", "bfloat16", "float16")


def _llama(config: Config) -> list[LayerSpec]:
    layer = _layer(
        config,
        qkv_bias=bool(config["attention_bias"]),
        out_bias=bool(config["attention_bias"]),
        mlp_bias=bool(config["mlp_bias"]),
    )
    return [layer] * _size(config, "num_hidden_layers")


def _mistral(config: Config) -> list[LayerSpec]:
    window = None if config["sliding_window"] is None else _size(config, "sliding_window")
    return [_layer(config, window=window)] * _size(config, "num_hidden_layers")


def _qwen2(config: Config) -> list[LayerSpec]:
    return [_layer(config, window=window, qkv_bias=True) for window in _windows(config)]


def _qwen3(config: Config) -> list[LayerSpec]:
    bias = bool(config["attention_bias"])
    return [
        _layer(config, window=window, qkv_bias=bias, out_bias=bias, qk_norm="head")
        for window in _windows(config)
    ]


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        rows=_DECODER + _QKV_BIAS + _OUT_BIAS + _MLP_BIAS,
        defaults={"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        layers=_llama,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        rows=_DECODER,
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        layers=_mistral,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        rows=_DECODER + _QKV_BIAS,
        defaults=_QWEN,
        layers=_qwen2,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        rows=_DECODER + _QKV_BIAS + _OUT_BIAS + _QK_NORM,
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        layers=_qwen3,
    ),
}


def family_of(config: Config, *, where: str = "config.json") -> Family:
    """The row of FAMILIES for `model_type`; an unknown one is a `ModelError` with the nearest."""
    kind = config.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind]
    known = ", ".join(FAMILIES)
    if kind is None:
        raise ModelError(f"{where}: no 'model_type'; expected one of {known}.")
    raise ModelError(
        f"{where}: model_type '{kind}' is unknown; known are {known}.{nearest(str(kind), FAMILIES)}"
    )


def config_dtype(config: Config) -> str | None:
    """The dtype a config states, in either key style, or None. `ModelError` if not a float."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in _DTYPES:
        raise ModelError(f"config.json: dtype '{name}'; expected one of {', '.join(_DTYPES)}.")
    return name


def rope_parameters(config: Config) -> dict[str, Any]:
    """Rope settings in the style of transformers 5, from either style, as transformers merges."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", 10_000.0 if theta is None else theta)
    if rope["rope_type"] == "llama3":
        outer = config.get("original_max_position_embeddings")
        inner = rope.get("original_max_position_embeddings")
        positions = outer or inner or config["max_position_embeddings"]
        rope["original_max_position_embeddings"] = positions
    return rope


def stacked(layers: Sequence[LayerSpec]) -> tuple[Stack, ...]:
    """Groups layers into repeated patterns so that the fewest distinct layers are compiled.

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


def _layer(config: Config, *, window: int | None = None, **switches: Any) -> LayerSpec:
    heads = _size(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    activation = str(config["hidden_act"])
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"hidden_act '{activation}' is not supported; supported are {known}")
    return LayerSpec(
        heads=heads,
        kv_heads=heads
        if config.get("num_key_value_heads") is None
        else _size(config, "num_key_value_heads"),
        head_dim=_size(config, "hidden_size") // heads
        if head_dim is None
        else _size(config, "head_dim"),
        mlp_width=_size(config, "intermediate_size"),
        rope=_rope(config),
        window=window,
        activation=_ACTIVATIONS[activation],
        **switches,
    )


def _rope(config: Config) -> RopeSpec:
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rope type '{kind}' is not supported yet; supported are default, linear, llama3"
        )
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError("rope settings that differ by layer type are not supported yet")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor {partial} is not supported; expected 1")
    theta = _number(rope, "rope_theta")
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, "linear", _number(rope, "factor"))
    return RopeSpec(
        theta,
        "llama3",
        _number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_positions=_size(rope, "original_max_position_embeddings"),
    )


def _windows(config: Config) -> list[int | None]:
    """Each layer's window: `layer_types` where stated, else from `max_window_layers` on."""
    window = _size(config, "sliding_window") if config["use_sliding_window"] else None
    count = _size(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(_number(config, "max_window_layers"))
        return [window if n >= first else None for n in range(count)]
    if len(kinds) != count:
        raise ValueError(f"layer_types names {len(kinds)} layers; num_hidden_layers is {count}")
    unknown = sorted({*kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layer_types has '{unknown[0]}'; known: full_ and sliding_attention")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _size(config: Config, key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"'{key}' is {value!r}; expected a positive integer")
    return value


def _number(config: Config, key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'{key}' is {value!r}; expected a number")
    if not math.isfinite(value):
        raise ValueError(f"'{key}' is {value}; expected a finite number")
    return float(value)
