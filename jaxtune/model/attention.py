"""The attention of one layer: projections, positions, and the cache of keys and values.

prefill     many tokens of each row see each other; with `keep` their keys and values come back
decode      one new token of each row sees what is in its cache of slots
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtune.model.layers import ModuleConfig, Projection, RMSNorm, weight
from jaxtune.ops import rope
from jaxtune.ops.attention import OPAQUE, attend
from jaxtune.ops.decode import attend_slots
from jaxtune.ops.reference import AttentionMask, AttentionSpec, ContextShard
from jaxtune.parallel import collectives, mesh
from jaxtune.spec import LayerSpec


class AttentionContext(NamedTuple):
    """The segment and position `[B T]` of each token, and the angles that follow.

    `rotations` holds the cosines and sines `[B T k]` of every kind of rope in the model, in the
    order of `kinds_of_rope`: computed once, not once per layer. `row_segments` and `row_positions`
    `[B S]` are of all tokens of these rows: more than a device's own if devices share rows.
    """

    segment_ids: jax.Array
    positions: jax.Array
    rotations: tuple[tuple[jax.Array, jax.Array], ...]
    row_segments: jax.Array
    row_positions: jax.Array


class KVCache(NamedTuple):
    """The keys and values of one layer, `[B G S K]`.

    In a cache of S slots position p has slot p mod S: a layer that sees a window of S keys needs no
    more, and every slot in use is one it sees.
    """

    keys: jax.Array
    values: jax.Array


class Attention(nn.Module):
    """Grouped-query attention of one layer, `[B T D]` -> `[B T D]`."""

    layer: LayerSpec
    rotation: int | None  # index into AttentionContext.rotations
    sizes: Mapping[str, int]
    norm_eps: float
    norm_offset: float
    config: ModuleConfig
    impl: str
    keep: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: KVCache | None, context: AttentionContext
    ) -> tuple[jax.Array, KVCache | None]:
        layer = self.layer

        def project(name: str, equation: str, x: jax.Array, bias: bool) -> jax.Array:
            return Projection(equation, self.sizes, self.config, bias, name=name)(x)

        q_BTHK = project("q", "BTD,DHK->BTHK", x_BTD, layer.qkv_bias)
        k_BTGK = project("k", "BTD,DGK->BTGK", x_BTD, layer.qkv_bias)
        v_BTGK = project("v", "BTD,DGK->BTGK", x_BTD, layer.qkv_bias)
        if layer.qk_norm is not None:
            over = {"head": 1, "full": 2}[layer.qk_norm]  # K, or H and K
            settings = (self.norm_eps, self.config, self.norm_offset, over)
            q_BTHK = RMSNorm(*settings, name="q_norm")(q_BTHK)
            k_BTGK = RMSNorm(*settings, name="k_norm")(k_BTGK)
        if self.rotation is not None:
            assert layer.rope is not None
            turn = functools.partial(rope.rotate, interleaved=layer.rope.interleaved)
            cos, sin = context.rotations[self.rotation]
            q_BTHK, k_BTGK = turn(q_BTHK, cos, sin), turn(k_BTGK, cos, sin)
            q_BTHK = rope.grown(layer.rope, q_BTHK, context.positions)

        sinks_H = self._sinks() if layer.sinks else None
        if cache is not None:
            mixed_BTHK, cache = self._decode(q_BTHK, k_BTGK, v_BTGK, cache, context, sinks_H)
        else:
            axes = ("batch", "length", "kv_heads", None)
            keys_BSGK, values_BSGK = (collectives.whole_rows(x, axes) for x in (k_BTGK, v_BTGK))
            mixed_BTHK = self._attend(
                q_BTHK,
                keys_BSGK,
                values_BSGK,
                AttentionMask(
                    context.segment_ids,
                    context.row_segments,
                    context.positions,
                    context.row_positions,
                ),
                sinks_H,
            )
            if self.keep:
                cache = KVCache(*(jnp.swapaxes(x, 1, 2) for x in (keys_BSGK, values_BSGK)))
        mixed_BTHK = mesh.constrain(mixed_BTHK, "batch", "length", "heads", None)
        return project("o", "BTHK,HKD->BTD", mixed_BTHK, layer.out_bias), cache

    def _decode(
        self,
        q_B1HK: jax.Array,
        k_B1GK: jax.Array,
        v_B1GK: jax.Array,
        cache: KVCache,
        context: AttentionContext,
        sinks_H: jax.Array | None,
    ) -> tuple[jax.Array, KVCache]:
        """Put one new token a row into the slot of its position, then attend over all slots."""
        position_B, slots = context.positions[:, 0], cache.keys.shape[2]
        cache = KVCache(
            *(
                _in_slots(slots_BGSK, new_B1GK, position_B % slots)
                for slots_BGSK, new_B1GK in zip(cache, (k_B1GK, v_B1GK), strict=True)
            )
        )
        # Once a row has gone round, all slots are in use.
        visible_BS = jnp.arange(slots)[None, :] <= position_B[:, None]
        mixed_BHK = attend_slots(
            q_B1HK[:, 0],
            *cache,
            visible=visible_BS & (context.segment_ids != 0),
            spec=self._spec(sinks_H),
        )
        return mixed_BHK[:, None], cache

    def _attend(
        self,
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        mask: AttentionMask,
        sinks_H: jax.Array | None,
    ) -> jax.Array:
        """Attend, on each device's own rows and heads if the implementation needs that."""
        length = k_BSGK.shape[1]
        shared = collectives.row_devices() > 1
        order = collectives.zigzag_positions(length, collectives.row_devices()) if shared else None

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
            *mask, sinks, device = rest
            shard = None if order is None else ContextShard(order, device)
            spec = self._spec(sinks)
            return attend(q, k, v, AttentionMask(*mask), spec, impl=self.impl, shard=shard)

        device = jax.lax.axis_index("context") if shared else None
        rest = (*mask, sinks_H, device)
        if self.impl not in OPAQUE:
            return mix(q_BTHK, k_BSGK, v_BSGK, *rest)
        H, G = self.layer.heads, self.layer.kv_heads
        if mesh.spread("kv_heads", G) != mesh.spread("heads", H):
            # Heads are spread wider than their keys: every head gets keys of its own.
            k_BSGK, v_BSGK = (jnp.repeat(x, H // G, axis=2) for x in (k_BSGK, v_BSGK))
        rows, heads = ("batch", None), ("batch", None, "heads", None)
        axes = (*3 * [heads], *4 * [rows], ("heads",), ())
        return mesh.local(mix, (q_BTHK, k_BSGK, v_BSGK, *rest), axes, heads, kernel=True)

    def _spec(self, sinks_H: jax.Array | None) -> AttentionSpec:
        layer = self.layer
        scale = layer.head_dim**-0.5 if layer.scale is None else layer.scale
        return AttentionSpec(scale, layer.window, layer.softcap, sinks_H)

    def _sinks(self) -> jax.Array:
        return weight(
            self,
            "sinks",
            shape=(self.layer.heads,),
            axes=("heads",),
            new=self.config.new,
            compute=None,
            initialiser=nn.initializers.normal(self.config.init_scale),
        )


def _in_slots(cache_BGSK: jax.Array, new_B1GK: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Each row's new key or value in its slot."""

    def write(slots_GSK: jax.Array, new_1GK: jax.Array, slot: jax.Array) -> jax.Array:
        new_G1K = jnp.swapaxes(new_1GK, 0, 1)
        return jax.lax.dynamic_update_slice(slots_GSK, new_G1K, (0, slot, 0))

    cache_BGSK = jax.vmap(write)(cache_BGSK, new_B1GK, slot_B)
    return mesh.constrain(cache_BGSK, "batch", "kv_heads", None, None)
