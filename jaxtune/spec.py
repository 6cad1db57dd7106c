"""What a decoder is, as frozen and hashable data: stacks of repeated layers and their numbers.

The spec knows no weights, no arrays and no model brand: `hf/families.py` writes one from a
`config.json`, `model/` builds the function from it, and it is a static argument of `jax.jit`.
Impossible combinations raise ValueError here, so that nothing below has to check again.
"""

from dataclasses import dataclass

ROPE_SCALINGS = ("none", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions over the whole head: base `theta` and how the frequencies are stretched.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides by `factor` those
    whose wave is longer than `original_max_positions / low_freq_factor`, keeps those shorter than
    `original_max_positions / high_freq_factor`, and interpolates between.
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        _check(self.theta > 0, f"rope theta is {self.theta}; expected a positive number")
        _check(
            self.scaling in ROPE_SCALINGS,
            f"rope scaling is {self.scaling!r}; expected one of {', '.join(ROPE_SCALINGS)}",
        )
        _check(self.factor > 0, f"rope factor is {self.factor}; expected a positive number")
        _check(
            self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor > 0,
            f"rope high_freq_factor ({self.high_freq_factor}) must exceed "
            f"low_freq_factor ({self.low_freq_factor}), both positive",
        )


@dataclass(frozen=True)
class LayerSpec:
    """One pre-norm block: grouped-query attention, then a gated MLP.

    `kv_heads` divides `heads`. `window` is the number of keys a query sees, itself included
    (None = all earlier ones). `rope` is None for a layer without positions. `out_bias` is the bias
    of the attention's output projection; `qk_norm` is an RMSNorm over each head's K before rope.
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
    qk_norm: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "mlp_width"):
            size = getattr(self, name)
            _check(size >= 1, f"{name} is {size}; expected at least 1")
        _check(
            self.heads % self.kv_heads == 0,
            f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads; "
            "expected a divisor",
        )
        _check(
            self.rope is None or self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; rotary positions need an even number",
        )
        _check(
            self.window is None or self.window >= 1,
            f"attention window is {self.window}; expected at least 1, or none",
        )
        _check(
            self.activation in ACTIVATIONS,
            f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}",
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
    """

    vocab: int
    width: int
    stacks: tuple[Stack, ...]
    norm_eps: float
    tie_head: bool
    max_positions: int
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "max_positions"):
            size = getattr(self, name)
            _check(size >= 1, f"{name} is {size}; expected at least 1")
        _check(len(self.stacks) >= 1, "a model needs at least one stack of layers")

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in the order a token meets them."""
        return tuple(
            layer for stack in self.stacks for _ in range(stack.repeats) for layer in stack.pattern
        )


def parameter_count(spec: ModelSpec) -> int:
    """The exact number of parameters; a tied head counts once."""
    biases_and_norms = sum(_vector_parameters(spec, layer) for layer in spec.layers)
    embedding = spec.vocab * spec.width
    tied = embedding if spec.tie_head else 0
    return embedding + _matmul_parameters(spec) - tied + biases_and_norms + spec.width


def flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Floating-point operations of one training token, forward and backward, without remat.

    Matrix weights: 2 per parameter forward and 4 backward, 6 x N_matmul; the head counts (also
    when tied), the embedding lookup, norms and biases do not. Attention: scores and weighted sum
    are 2 x 2 x H x K per visible key forward, x 3 with the backward: 12 x H x K x keys, where
    `keys` is the mean number of keys a causal query of a `seq_len` row really sees: (T + 1) / 2
    without a window (the causal half), the mean of min(t + 1, window) with one.
    """
    attention = sum(
        12.0 * layer.heads * layer.head_dim * _mean_visible_keys(seq_len, layer.window)
        for layer in spec.layers
    )
    return 6.0 * _matmul_parameters(spec) + attention


def _mean_visible_keys(seq_len: int, window: int | None) -> float:
    reach = seq_len if window is None else min(window, seq_len)
    growing = reach * (reach + 1) / 2  # the first `reach` queries see 1, 2, ..., reach keys
    return (growing + (seq_len - reach) * reach) / seq_len


def _matmul_parameters(spec: ModelSpec) -> int:
    per_layer = (
        2 * spec.width * layer.head_dim * (layer.heads + layer.kv_heads)  # q and o, k and v
        + 3 * spec.width * layer.mlp_width
        for layer in spec.layers
    )
    return spec.vocab * spec.width + sum(per_layer)


def _vector_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    norms = 2 * spec.width + (2 * layer.head_dim if layer.qk_norm else 0)
    qkv = (layer.heads + 2 * layer.kv_heads) * layer.head_dim if layer.qkv_bias else 0
    out = spec.width if layer.out_bias else 0
    mlp = 2 * layer.mlp_width + spec.width if layer.mlp_bias else 0
    return norms + qkv + out + mlp


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
