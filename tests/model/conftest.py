"""One small decoder that has nearly every switch, shared by the tests of this room."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.model import decoder
from jaxtune.model.decoder import TokenRows as Rows
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack

PLAIN = LayerSpec(4, 2, 8, 32, RopeSpec(10_000.0))
FANCY = LayerSpec(
    4,
    4,
    8,
    48,
    RopeSpec(1e6, "linear", 2.0),
    window=3,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm="head",
    activation="gelu_tanh",
    norms="both",
    scale=0.5,
    softcap=4.0,
    sinks=True,
    residual_scale=0.7,
)
LIMIT = 4  # tokens; a longer text has other positions, in the first half of each head
ODD = LayerSpec(
    4,
    2,
    8,
    40,
    RopeSpec(
        100.0,
        "longrope",
        original_max_positions=LIMIT,
        short_factors=(1.0, 1.5),
        long_factors=(2.5, 7.0),
        attention_factor=1.2,
        fraction=0.5,
    ),
    qk_norm="full",
    gated=False,
    norms="post",
)
# Large random weights: texts differ clearly, and the likeliest next token is no close call.
SPEC = ModelSpec(
    64,
    16,
    (Stack((PLAIN, FANCY), 2), Stack((ODD,), 1)),
    1e-5,
    False,
    64,
    init_scale=0.4,
    norm="layer",
    norm_offset=0.25,
    embed_scale=1.5,
    logit_scale=0.8,
    logit_softcap=9.0,
)


@pytest.fixture(scope="session")
def params() -> decoder.Params:
    return jax.jit(lambda key: decoder.init(SPEC, key, jnp.float32))(jax.random.key(0))


@pytest.fixture(scope="session")
def packed() -> Rows:
    """Two texts and padding, a text and padding, one full row, an empty row: `[4 12]`."""
    rng = np.random.default_rng(0)
    segments = [[1] * 5 + [2] * 4 + [0] * 3, [1] * 7 + [0] * 5, [1] * 12, [0] * 12]
    positions = [[*range(5), *range(4), 0, 0, 0], [*range(7), *[0] * 5], list(range(12)), [0] * 12]
    inputs = rng.integers(0, SPEC.vocab, (4, 12))
    return Rows(*(jnp.asarray(x, jnp.int32) for x in (inputs, segments, positions)))
