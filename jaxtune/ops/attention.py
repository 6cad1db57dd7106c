"""Attention inside packed rows: `attend`, and the choice among its implementations.

Every implementation has the signature of `reference` and joins the same tests. `choose` picks one
for a platform and says why; a name that was requested is never replaced by another.
"""

from collections.abc import Callable

import jax

from jaxtune.ops import cudnn as cudnn_kernel
from jaxtune.ops import splash as splash_kernel
from jaxtune.ops.blocked import QUERY_BLOCK, blocked
from jaxtune.ops.cudnn import cudnn
from jaxtune.ops.reference import (
    AttentionMask,
    AttentionShape,
    AttentionSpec,
    ContextShard,
    reference,
)
from jaxtune.ops.splash import splash

LONGEST_REFERENCE_ROW = 512
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "blocked": blocked,
    "splash": splash,
    "cudnn": cudnn,
}
KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # and the platform each is for
UNSUPPORTED = {"splash": splash_kernel.unsupported, "cudnn": cudnn_kernel.unsupported}
# What the partitioner cannot cut well: run on each device's own rows and heads.
OPAQUE = frozenset({"blocked", "splash", "cudnn"})


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    spec: AttentionSpec,
    *,
    impl: str = "reference",
    shard: ContextShard | None = None,
) -> jax.Array:
    """Attend causally from `q` `[B T H K]` over `k`, `v` `[B S G K]` -> `[B T H K]`, dtype of `q`.

    Query head h reads kv head h // (H / G). Softmax in float32. A query that sees nothing gives
    zeros, with zero gradients. `impl` is a name that `choose` returned. `shard` is for kernels that
    go by places in the row; the others go by positions.
    """
    options = {"shard": shard} if impl == "splash" else {}
    return IMPLEMENTATIONS[impl](q, k, v, mask, spec, **options)


def choose(platform: str, shape: AttentionShape, requested: str = "auto") -> tuple[str, str]:
    """Choose the implementation for rows of that shape; its name, and the reason.

    `requested` is a name of `IMPLEMENTATIONS` or "auto".
    Raises: ValueError if what was requested cannot be run.
    """
    refused = {name: reason for name in KERNELS if (reason := _refusal(name, platform, shape))}
    if requested != "auto":
        if requested not in IMPLEMENTATIONS:
            known = ", ".join(sorted(IMPLEMENTATIONS))
            raise ValueError(f"there is no {requested!r}; expected auto or one of {known}")
        if requested in refused:
            raise ValueError(f"{requested} cannot be run: {refused[requested]}")
        return requested, "requested"
    for name in KERNELS:
        if name not in refused:
            return name, f"rows of {shape.queries} tokens on {platform}: no scores are kept"
    others = "; ".join(f"not {name}: {reason}" for name, reason in refused.items())
    if shape.queries <= LONGEST_REFERENCE_ROW:
        return "reference", f"{shape.queries} queries: all scores of a layer fit; {others}"
    return "blocked", (
        f"{shape.queries} queries: above {LONGEST_REFERENCE_ROW} the scores of {QUERY_BLOCK} "
        f"queries are held at a time, and of keys that they may see; {others}"
    )


def _refusal(name: str, platform: str, shape: AttentionShape) -> str | None:
    """Return the reason why a kernel cannot be run there; None if it can."""
    home = KERNELS[name]
    if platform != home and not (home == "gpu" and platform == "cuda"):
        return f"it is for {home}, here is {platform}"
    return UNSUPPORTED[name](shape)
