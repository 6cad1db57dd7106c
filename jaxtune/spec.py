"""A decoder's description, as frozen, hashable data: stacks of repeated layers and their numbers.

The spec knows no weights, no arrays and no model brand: `hf/family/` writes one from a
`config.json`, `model/` builds the function from it, and it is a static argument of `jax.jit`.
Impossible combinations raise ValueError here, so that nothing below has to check again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
QK_NORMS = (None, "head", "full")
NORM_PLACES = ("pre", "post", "both")
NORMS = ("rms", "layer")
ROUTER_SOFTMAXES = ("all", "chosen")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: base `theta` and how the frequencies are stretched.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides by `factor` those
    whose wave is longer than `original_max_positions / low_freq_factor`, keeps those shorter than
    `original_max_positions / high_freq_factor`, and interpolates between. `yarn` (arXiv 2309.00071)
    keeps features that turn more than `beta_fast` times within `original_max_positions`, divides
    by `factor` those that turn less than `beta_slow` times, and interpolates between, by whole
    features if `truncate`. `longrope` (arXiv 2402.13753) divides each feature's frequency by its
    own number: of `short_factors` in a text of up to `original_max_positions` tokens, of
    `long_factors` in a longer one.

    `attention_factor` multiplies cosines and sines. `fraction` is the share of the head, counted
    from its first feature, that is rotated at all. A pair is feature i and the one half of these
    behind it, or with `interleaved` features 2i and 2i + 1. Queries at position p are multiplied by
    1 + `growth` * log(1 + floor(p / original_max_positions)).
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    fraction: float = 1.0
    interleaved: bool = False
    growth: float = 0.0

    def __post_init__(self) -> None:
        _check(self.theta > 0, f"rope theta is {self.theta}; expected a positive number")
        _check(
            self.scaling in ROPE_SCALINGS,
            f"rope scaling is {self.scaling!r}; expected one of {', '.join(ROPE_SCALINGS)}",
        )
        for name in ("factor", "attention_factor"):
            number = getattr(self, name)
            _check(number > 0, f"rope {name} is {number}; expected a positive number")
        _check(
            self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor > 0,
            f"rope high_freq_factor ({self.high_freq_factor}) must exceed "
            f"low_freq_factor ({self.low_freq_factor}), both positive",
        )
        _check(
            self.scaling != "yarn" or self.beta_fast >= self.beta_slow > 0,
            f"rope beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow}), "
            "both positive",
        )
        _check(
            all(number > 0 for number in self.short_factors + self.long_factors),
            "rope short and long factors must all be positive",
        )
        _check(self.growth >= 0, f"rope growth is {self.growth}; expected 0 or more")
        _check(0 < self.fraction <= 1, f"rope fraction is {self.fraction}; expected 0 < x <= 1")

    def rotated(self, head_dim: int) -> int:
        """Count the features of a head that are rotated."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of `experts` MLPs, of which a token uses the `per_token` its router likes best.

    A chosen expert counts by its share in the softmax of router logits over "all" experts or over
    the "chosen" ones; the second is also the first renormalised to a sum of one. `router_bias`
    adds to the logits. `clamp` = (alpha, limit) replaces an expert's activation(gate) * up by
    g * sigmoid(alpha * g) * (u + 1) with g = min(gate, limit), u = up within +-limit.

    `shared_width` is the width of one more MLP that every token uses, times the sigmoid of a
    number of its own; 0 = none. `aux_coef` weighs the load-balancing loss in training.
    """

    experts: int
    per_token: int
    softmax_over: str = "chosen"
    router_bias: bool = False
    clamp: tuple[float, float] | None = None
    shared_width: int = 0
    aux_coef: float = 0.0

    def __post_init__(self) -> None:
        _check(
            1 <= self.per_token <= self.experts,
            f"each token uses {self.per_token} of {self.experts} experts; expected 1 to all",
        )
        _check(
            self.softmax_over in ROUTER_SOFTMAXES,
            f"router softmax is over {self.softmax_over!r}; expected all or chosen",
        )
        _check(
            self.clamp is None or (self.clamp[0] > 0 and self.clamp[1] > 0),
            f"expert clamp is {self.clamp}; expected a positive alpha and limit",
        )
        _check(self.shared_width >= 0, f"shared width is {self.shared_width}; expected 0 or more")
        _check(self.aux_coef >= 0, f"router aux_coef is {self.aux_coef}; expected 0 or more")


@dataclass(frozen=True)
class LayerSpec:
    """A residual block: grouped-query attention, then an MLP.

    `kv_heads` divides `heads`. `window` is the number of keys a query sees, itself included
    (None = all earlier ones). `rope` is None for a layer without positions. `out_bias` is the bias
    of the attention's output projection. `qk_norm` is an RMSNorm of queries and keys before rope,
    over each head's K ("head") or over all heads together ("full").

    `norms` says where the norms stand: "pre" x + f(norm(x)), "post" x + norm(f(x)), "both"
    x + norm(f(norm(x))). `residual_scale` multiplies what is added to x. `gated` is the MLP
    down(activation(gate(x)) * up(x)), otherwise down(activation(up(x))).

    Attention scores are multiplied by `scale` (None = K ** -0.5), then bounded to +-`softcap`;
    `sinks` is a learned score per head that takes attention and gives nothing.

    With `moe` the MLP is a mixture; `mlp_width` and `mlp_bias` are then those of each expert.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope: RopeSpec | None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    activation: str = "silu"
    gated: bool = True
    norms: str = "pre"
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    residual_scale: float = 1.0
    moe: MoeSpec | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "mlp_width"):
            size = getattr(self, name)
            _check(size >= 1, f"{name} is {size}; expected at least 1")
        _check(
            self.heads % self.kv_heads == 0,
            f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads; "
            "expected a divisor",
        )
        if self.rope is not None:
            self._check_rope(self.rope)
        _check(
            self.window is None or self.window >= 1,
            f"attention window is {self.window}; expected at least 1, or none",
        )
        _check(
            self.activation in ACTIVATIONS,
            f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}",
        )
        _check(
            self.qk_norm in QK_NORMS, f"qk_norm is {self.qk_norm!r}; expected head, full or None"
        )
        _check(
            self.norms in NORM_PLACES,
            f"norms stand {self.norms!r}; expected one of {', '.join(NORM_PLACES)}",
        )
        _check(self.moe is None or self.gated, "experts are gated MLPs; this layer's are not")
        for name in ("scale", "softcap"):
            number = getattr(self, name)
            _check(
                number is None or number > 0,
                f"attention {name} is {number}; expected a positive number, or none",
            )

    def _check_rope(self, rope: RopeSpec) -> None:
        rotated = rope.rotated(self.head_dim)
        _check(
            rotated % 2 == 0 and rotated > 0,
            f"rotary positions need an even number of features; head_dim {self.head_dim} x "
            f"{rope.fraction:g} gives {rotated}",
        )
        for name in ("short_factors", "long_factors"):
            count = len(getattr(rope, name))
            _check(
                rope.scaling != "longrope" or count == rotated // 2,
                f"rope has {count} {name}; {rotated} rotated features need {rotated // 2}",
            )


@dataclass(frozen=True)
class Stack:
    """`pattern` applied `repeats` times: the unit that is compiled once and scanned."""

    pattern: tuple[LayerSpec, ...]
    repeats: int

    def __post_init__(self) -> None:
        _check(len(self.pattern) >= 1, "a stack needs at least one layer in its pattern")
        _check(self.repeats >= 1, f"a stack repeats {self.repeats} times; expected at least 1")


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder: embedding `[vocab, width]`, the stacks in order, a final norm, a head.

    `tie_head` reads the head from the embedding table (one leaf, never two). `max_positions` is
    the longest text the model was made for. `init_scale` is the standard deviation of random
    weights, used only when nothing is loaded.

    `norm` is every norm but those of queries and keys: "rms", or "layer" with a bias. A norm
    multiplies by `norm_offset` + its scale. Embeddings are multiplied by `embed_scale`; logits by
    `logit_scale`, then bounded to +-`logit_softcap` by tanh.
    """

    vocab: int
    width: int
    stacks: tuple[Stack, ...]
    norm_eps: float
    tie_head: bool
    max_positions: int
    init_scale: float = 0.02
    norm: str = "rms"
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "max_positions"):
            size = getattr(self, name)
            _check(size >= 1, f"{name} is {size}; expected at least 1")
        _check(len(self.stacks) >= 1, "a model needs at least one stack of layers")
        _check(self.norm in NORMS, f"norm is {self.norm!r}; expected one of {', '.join(NORMS)}")
        _check(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"logit_softcap is {self.logit_softcap}; expected a positive number, or none",
        )

        mixtures = {(moe.experts, moe.aux_coef) for layer in self.layers if (moe := layer.moe)}
        _check(
            len(mixtures) <= 1,
            "the mixtures of one model differ in experts or aux_coef; their loads are added up",
        )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in the order a token meets them."""
        return tuple(
            layer for stack in self.stacks for _ in range(stack.repeats) for layer in stack.pattern
        )

    @property
    def experts(self) -> int:
        """Of each of its mixtures; 0 without one."""
        return next((layer.moe.experts for layer in self.layers if layer.moe is not None), 0)


def apart(spec: ModelSpec, last: int) -> tuple[ModelSpec, int]:
    """The same model with its `last` layers in stacks of their own, and the first one's number.

    Layers of a stack share one leaf; what is to be trained alone must be a leaf alone. Of Gemma's
    (local x5, global) x10 the last 8 are (local x4, global) of the ninth repeat, then the tenth.

    >>> spec = ModelSpec(8, 4, (Stack((LayerSpec(1, 1, 4, 4, None),), 5),), 1e-6, True, 8)
    >>> split, first = apart(spec, 2)
    >>> [stack.repeats for stack in split.stacks], first
    ([3, 2], 1)
    """
    _check(
        1 <= last <= len(spec.layers),
        f"the last {last} layers are asked for; the model has {len(spec.layers)}",
    )
    before: list[Stack] = []
    after: list[Stack] = []
    left = len(spec.layers) - last
    for stack in spec.stacks:
        size = len(stack.pattern) * stack.repeats
        whole, part = divmod(min(left, size), len(stack.pattern))
        left -= min(left, size)
        before += _stacks((stack.pattern, whole), (stack.pattern[:part], 1))
        rest = stack.repeats - whole - (part > 0)
        after += _stacks((stack.pattern[part:], int(part > 0)), (stack.pattern, rest))
    return replace(spec, stacks=(*before, *after)), len(before)


def _stacks(*pieces: tuple[tuple[LayerSpec, ...], int]) -> list[Stack]:
    return [Stack(pattern, repeats) for pattern, repeats in pieces if pattern and repeats]


def parameter_count(spec: ModelSpec) -> int:
    """The exact number of parameters; a tied head counts once."""
    biases_and_norms = sum(_vector_parameters(spec, layer) for layer in spec.layers)
    embedding = spec.vocab * spec.width
    tied = embedding if spec.tie_head else 0
    matrices = matmul_parameters(spec, active=False)
    return embedding + matrices - tied + biases_and_norms + _norm_parameters(spec)


class Backward(NamedTuple):
    """A description of the backward pass of a model of which a part is trained.

    Gradients of activations pass through the head if `through_head`, and through the layers of
    stack `first` and of all behind it (the number of stacks: through none). Trained weights of
    matrix products: `dense[i][j]` those that every token meets in a layer at place j of stack i's
    pattern, `experts[i][j]` all experts' there; `head` whether the head's are. `numbers` counts
    everything that is trained.
    """

    first: int
    through_head: bool
    dense: tuple[tuple[int, ...], ...]
    experts: tuple[tuple[int, ...], ...]
    head: bool
    numbers: int

    def reaches(self, stack: int) -> bool:
        return stack >= self.first


def whole_backward(spec: ModelSpec) -> Backward:
    """Describe the backward pass where everything is trained."""

    def each(size: Callable[[LayerSpec], int]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(size(layer) for layer in stack.pattern) for stack in spec.stacks)

    def experts(layer: LayerSpec) -> int:
        return expert_parameters(spec, layer, active=False)

    def dense(layer: LayerSpec) -> int:
        return layer_parameters(spec, layer, active=False) - experts(layer)

    return Backward(0, True, each(dense), each(experts), True, parameter_count(spec))


def flops_per_token(spec: ModelSpec, seq_len: int, back: Backward | None = None) -> float:
    """Floating-point operations of one training token, forward and backward, without remat.

    Matrix weights: 2 per parameter forward, 2 for the gradient of what it is multiplied with and 2
    for its own, 6 x N_matmul; the head counts (also when tied), the embedding lookup, norms and
    biases do not, and of a mixture only the router and the experts that one token uses. Attention:
    scores and weighted sum are 2 x 2 x H x K per visible key forward and twice that backward, where
    `keys` is the mean number of keys a causal query of a `seq_len` row really sees: (T + 1) / 2
    without a window (the causal half), the mean of min(t + 1, window) with one. With `back`
    gradients are counted that a part of the model needs; adapters' own products are left out.
    """
    back = back or whole_backward(spec)
    total = 2.0 * (1 + back.through_head + back.head) * spec.vocab * spec.width
    for i, stack in enumerate(spec.stacks):
        passes = back.reaches(i)
        for layer, dense, experts in zip(
            stack.pattern, back.dense[i], back.experts[i], strict=True
        ):
            products = 2.0 * (1 + passes) * layer_parameters(spec, layer)
            products += 2.0 * (dense + of_one_token(layer, experts))
            attention = attention_flops_per_token(layer, seq_len) * (3 if passes else 1)
            total += stack.repeats * (products + attention)
    return total


def attention_flops_per_token(layer: LayerSpec, seq_len: int) -> float:
    """Of one layer, forward."""
    return 4.0 * layer.heads * layer.head_dim * _mean_visible_keys(seq_len, layer.window)


def of_one_token(layer: LayerSpec, experts: float) -> float:
    """Scale a number of all experts of a layer to those that one token meets."""
    return experts * layer.moe.per_token / layer.moe.experts if layer.moe is not None else 0.0


def _mean_visible_keys(seq_len: int, window: int | None) -> float:
    reach = seq_len if window is None else min(window, seq_len)
    growing = reach * (reach + 1) / 2  # the first `reach` queries see 1, 2, ..., reach keys
    return (growing + (seq_len - reach) * reach) / seq_len


def matmul_parameters(spec: ModelSpec, *, active: bool = True) -> int:
    """Weights of matrix products, the head's too: all, or only those that one token meets."""
    per_layer = (layer_parameters(spec, layer, active=active) for layer in spec.layers)
    return spec.vocab * spec.width + sum(per_layer)


def layer_parameters(spec: ModelSpec, layer: LayerSpec, *, active: bool = True) -> int:
    """The same of one layer."""
    attention = 2 * spec.width * layer.head_dim * (layer.heads + layer.kv_heads)  # q and o, k and v
    return attention + spec.width * _mlp_columns(layer, active=active)


def expert_parameters(spec: ModelSpec, layer: LayerSpec, *, active: bool = True) -> int:
    """Of those, the experts'; 0 without a mixture."""
    if layer.moe is None:
        return 0
    return 3 * spec.width * layer.mlp_width * (layer.moe.per_token if active else layer.moe.experts)


def _mlp_columns(layer: LayerSpec, *, active: bool) -> int:
    """The matrix weights of a layer's MLP or mixture, per unit of model width."""
    if layer.moe is None:
        return (3 if layer.gated else 2) * layer.mlp_width
    moe = layer.moe
    experts = moe.per_token if active else moe.experts
    shared = 3 * moe.shared_width + 1 if moe.shared_width else 0
    return 3 * layer.mlp_width * experts + moe.experts + shared


def _norm_parameters(spec: ModelSpec) -> int:
    return (2 if spec.norm == "layer" else 1) * spec.width


def _vector_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    norms = (4 if layer.norms == "both" else 2) * _norm_parameters(spec)
    heads = layer.heads + layer.kv_heads
    qk_norms = {None: 0, "head": 2 * layer.head_dim, "full": heads * layer.head_dim}[layer.qk_norm]
    qkv = (layer.heads + 2 * layer.kv_heads) * layer.head_dim if layer.qkv_bias else 0
    out = spec.width if layer.out_bias else 0
    mlp = (2 if layer.gated else 1) * layer.mlp_width + spec.width if layer.mlp_bias else 0
    sinks = layer.heads if layer.sinks else 0
    if layer.moe is not None:
        mlp = mlp * layer.moe.experts + (layer.moe.experts if layer.moe.router_bias else 0)
    return norms + qk_norms + qkv + out + mlp + sinks


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
