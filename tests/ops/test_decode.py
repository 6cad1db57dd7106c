"""One query over slots against the definition of attention over the same keys in order."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops.attention import attend
from jaxtune.ops.decode import attend_slots
from jaxtune.ops.reference import AttentionMask, AttentionSpec

B, H, G, K, S = 4, 6, 2, 8, 12
rng = np.random.default_rng(5)
Q, KEYS, VALUES = (
    rng.normal(size=shape).astype(np.float32) for shape in ((B, H, K), (B, G, S, K), (B, G, S, K))
)
SINKS = rng.normal(size=H).astype(np.float32)
# How many keys each row has; the last sees nothing.
COUNTS = np.array([S, 5, 1, 0])


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.4}, {"sinks": SINKS}], ids=str)
def test_slots_in_any_order_are_the_row_in_order(options: dict) -> None:
    visible_BS = np.arange(S)[None] < COUNTS[:, None]
    spec = AttentionSpec(**{"scale": K**-0.5} | options)
    expected = attend(
        Q[:, None],
        jnp.swapaxes(KEYS, 1, 2),
        jnp.swapaxes(VALUES, 1, 2),
        AttentionMask(
            jnp.ones((B, 1), jnp.int32),
            visible_BS.astype(np.int32),
            jnp.full((B, 1), S),
            jnp.broadcast_to(jnp.arange(S), (B, S)),
        ),
        spec,
    )[:, 0]
    order = rng.permutation(S)
    found = attend_slots(
        Q,
        KEYS[:, :, order],
        VALUES[:, :, order],
        visible=visible_BS[:, order],
        spec=spec,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert np.all(np.asarray(found[3]) == 0)


def test_what_is_not_visible_may_be_anything() -> None:
    visible_BS = np.arange(S)[None] < COUNTS[:, None]
    wild = np.where(visible_BS[:, None, :, None], KEYS, 1e4)
    before = attend_slots(Q, KEYS, VALUES, visible=visible_BS, spec=AttentionSpec(1.0))
    np.testing.assert_array_equal(
        attend_slots(Q, wild, VALUES, visible=visible_BS, spec=AttentionSpec(1.0)), before
    )
