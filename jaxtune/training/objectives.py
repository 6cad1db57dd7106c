"""Objectives to minimise: functions (variables, batch, key) -> `Sums`, never a mean.

Sums and counts travel through microbatches, devices and hosts; the one division is in
`step.train_step`, by the global weight. An objective knows nothing of optimisers or meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxtune.model import decoder
from jaxtune.model.decoder import ForwardConfig, TokenRows
from jaxtune.ops import neftune
from jaxtune.ops.cross_entropy import Sums, TokenLosses, linear_cross_entropy, token_losses
from jaxtune.ops.loss_plan import LossType
from jaxtune.ops.moe import balance
from jaxtune.parallel import collectives
from jaxtune.spec import ModelSpec


class Tokens(Protocol):
    """A batch, as an objective reads it: arrays [B T], shifted per example before packing."""

    @property
    def inputs(self) -> jax.Array: ...
    @property
    def targets(self) -> jax.Array: ...
    @property
    def weights(self) -> jax.Array: ...
    @property
    def segment_ids(self) -> jax.Array: ...
    @property
    def positions(self) -> jax.Array: ...


Variables = Mapping[str, Any]  # {"params": ...}, with adapters {"params": ..., "lora": ...}
Objective = Callable[[Variables, Tokens, jax.Array | None], Sums]  # no key: nothing random


def next_token(
    spec: ModelSpec,
    config: ForwardConfig,
    *,
    noise_alpha: float | None = None,
    loss_block: int | None = None,
    z_loss: float = 0.0,
    loss_type: LossType = "nll",
) -> Objective:
    """Weighted next-token cross-entropy: loss = sum(w * -log p(target)), weight = sum(w).

    `targets` at weight 0 may be any id in range; nothing is inferred from token values.
    `noise_alpha` is NEFTune's; its noise, like all that is random, is absent without a key.
    `loss_block`, `z_loss` and `loss_type` are `linear_cross_entropy`'s; what z-loss costs is in
    `auxiliary`.

    Where the model asks for it (`MoeSpec.aux_coef`), auxiliary = coef * balance * sum(w): a step
    minimises the mean loss plus coef * balance, as transformers does. The balance of routers
    (`ops.moe.balance`) is over all tokens of the batch given here that are not padding, trained or
    not, of all mixtures and devices together; rows and packing do not matter. It is no sum over
    tokens: with microbatches a step has the mean of their balances by trained weight, which is not
    quite that of all their tokens at once.
    """
    coef = router_coef(spec)

    def objective(variables: Variables, batch: Tokens, key: jax.Array | None) -> Sums:
        batch = collectives.zigzag_split(batch)
        noise = None
        if noise_alpha is not None and key is not None:
            key, own = jax.random.split(key)
            noise = _noise(own, batch.segment_ids, spec.width, noise_alpha)
        rows = _rows(batch)
        output = decoder.forward(spec, variables, rows, config, key=key, noise=noise)
        sums = linear_cross_entropy(
            output.hidden,
            output.head,
            batch.targets,
            batch.weights,
            z_loss=z_loss,
            loss_type=loss_type,
            block=loss_block,
        )
        if coef and output.load is not None:
            # Of all devices together; each adds its share of it, by weight.
            routers = coef * balance(collectives.total(output.load)) * sums.weight
            sums = sums._replace(auxiliary=sums.auxiliary + routers)
        return sums

    return objective


def each_token(
    spec: ModelSpec, config: ForwardConfig
) -> Callable[[Variables, Tokens], TokenLosses]:
    """`next_token` before it is added up: `[B T]`, each token where it lies in the batch."""

    def losses(variables: Variables, batch: Tokens) -> TokenLosses:
        batch = collectives.zigzag_split(batch)
        output = decoder.forward(spec, variables, _rows(batch), config)
        each = token_losses(output.hidden, output.head, batch.targets, batch.weights)
        return TokenLosses(*map(collectives.whole_rows, each))

    return losses


def _rows(batch: Tokens) -> TokenRows:
    return TokenRows(batch.inputs, batch.segment_ids, batch.positions)


def _noise(key: jax.Array, segment_ids: jax.Array, width: int, alpha: float) -> jax.Array:
    """NEFTune's, the same for a token whatever devices its batch lies on."""
    bits = collectives.bits(key, (*segment_ids.shape, width))
    rows = collectives.whole_rows(segment_ids)
    return neftune.noise(neftune.uniform(bits), segment_ids, alpha, row_segments=rows)


def router_coef(spec: ModelSpec) -> float:
    """Return the coefficient of the router balance in training; 0 where nothing sets it."""
    return next((layer.moe.aux_coef for layer in spec.layers if layer.moe is not None), 0.0)


def zero_sums() -> Sums:
    zero = jnp.zeros((), jnp.float32)
    return Sums(zero, zero, zero, zero, zero)


def add(a: Sums, b: Sums) -> Sums:
    return Sums(*(jnp.add(x, y) for x, y in zip(a, b, strict=True)))
