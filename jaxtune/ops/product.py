"""Products of narrow numbers with float32 sums, on every platform."""

import jax
import jax.numpy as jnp


def einsum_f32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum(equation, x, y)` in float32, whatever `x` and `y` are."""

    def narrow(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32))

    if x.dtype == y.dtype == jnp.float32:
        return narrow(x, y)
    # XLA for CPU (jax 0.10 to 0.12) has no bfloat16 x bfloat16 = float32 for some layouts.
    product: jax.Array = jax.lax.platform_dependent(x, y, cpu=widened, default=narrow)
    return product
