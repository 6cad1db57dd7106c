"""Attention by cuDNN's fused kernel on NVIDIA GPUs: no scores in memory, half precision only.

The signature of `reference`, for rows that attend to themselves: query t is key t, so
causality and window are of indices, which the kernel knows and skips by. JAX's public interface to
it (`jax.nn.dot_product_attention`) has no argument for segments: they go in as a mask `[B 1 T T]`,
one for all heads, which is what limits the length. Not yet measured on a GPU.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxtune.ops.reference import AttentionMask, AttentionShape, AttentionSpec

LONGEST = 8192  # its mask takes 2 bytes for each pair of tokens: 128 MiB a row
WIDEST = 128  # heads up to 256 need compute capability 9.0, which is not assumed here
DTYPES = ("bfloat16", "float16")


def unsupported(shape: AttentionShape) -> str | None:
    """Return the reason why attention of this shape cannot be run, or None."""
    queries, keys = shape.queries, shape.keys
    if shape.devices != 1:
        return f"rows lie on {shape.devices} devices: cuDNN is used for rows that are whole"
    if queries != keys:
        return f"{queries} queries over {keys} keys: cuDNN is used for rows that see themselves"
    if shape.dtype not in DTYPES:
        return f"cuDNN computes in {' or '.join(DTYPES)}, here is {shape.dtype}"
    for head_dim in shape.head_dims:
        if head_dim % 8 or head_dim > WIDEST:
            return f"head_dim {head_dim} is no multiple of 8 up to {WIDEST}, as cuDNN wants"
    if queries % 2 or queries > LONGEST:
        return f"cuDNN takes masks of an even number of tokens up to {LONGEST}, not {queries}"
    if shape.softcap:
        return "cuDNN has no softcap"
    return "cuDNN has no sinks" if shape.sinks else None


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    spec: AttentionSpec,
    *,
    kernel: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attend as `reference` does, for positions that grow by one inside each segment.

    Positions are not read: distance in the row is distance in the text. `kernel="xla"` is the same
    call in plain XLA, to be tested anywhere.
    Raises: ValueError for what is `unsupported`.
    """
    shape = AttentionShape(
        q.shape[1],
        k.shape[1],
        (q.shape[3],),
        dtype=DTYPES[0] if kernel == "xla" else str(q.dtype),
        softcap=spec.softcap is not None,
        sinks=spec.sinks is not None,
    )
    if reason := unsupported(shape):
        raise ValueError(f"cudnn attention: {reason}")
    same_BTS = mask.query_segments[:, :, None] == mask.key_segments[:, None, :]
    mixed_BTHK = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same_BTS[:, None],  # padding sees padding, and is cut out below
        is_causal=True,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        scale=spec.scale,
        implementation=kernel,
    )
    return jnp.where((mask.query_segments != 0)[:, :, None, None], mixed_BTHK, 0).astype(q.dtype)
