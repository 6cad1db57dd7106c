"""The attention of one layer: projections, positions, and the keys and values kept for decoding.

reading     many tokens of each row see each other; with `keep` their keys and values come back
decoding    one new token of each row sees what is kept of it, in a cache of slots
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtune.model.layers import Build, Projection, RMSNorm, weight
from jaxtune.ops import rope
from jaxtune.ops.attention import OPAQUE, Share, attend
from jaxtune.ops.decoding import attend_slots
from jaxtune.parallel import collectives, mesh
from jaxtune.spec import LayerSpec


class Places(NamedTuple):
    """Where each token stands: its segment and position `[B T]`, and the angles that follow.

    `rotations` holds the cosines and sines `[B T k]` of every kind of rope in the model, in the
    order of `kinds_of_rope`: computed once, not once per layer. `row_segments` and `row_positions`
    `[B S]` are of all tokens of these rows: more than a device's own, where it has a share of them
    (`collectives.zigzag_positions`).
    """

    segment_ids: jax.Array
    positions: jax.Array
    rotations: tuple[tuple[jax.Array, jax.Array], ...]
    row_segments: jax.Array
    row_positions: jax.Array


class KeyValues(NamedTuple):
    """Keys and values of one layer, `[B G S K]`. In a cache of S slots position p has slot p mod S:
    a layer that sees a window of S keys needs no more, and every slot in use is one it sees."""

    keys: jax.Array
    values: jax.Array


class Attention(nn.Module):
    """Grouped-query attention of one layer, `[B T D]` -> `[B T D]`."""

    layer: LayerSpec
    rotation: int | None  # index into Places.rotations
    sizes: Mapping[str, int]
    norm_eps: float
    norm_offset: float
    build: Build
    impl: str
    keep: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: KeyValues | None, places: Places
    ) -> tuple[jax.Array, KeyValues | None]:
        layer = self.layer

        def project(name: str, equation: str, x: jax.Array, bias: bool) -> jax.Array:
            return Projection(equation, self.sizes, self.build, bias, name=name)(x)

        q_BTHK = project("q", "BTD,DHK->BTHK", x_BTD, layer.qkv_bias)
        k_BTGK = project("k", "BTD,DGK->BTGK", x_BTD, layer.qkv_bias)
        v_BTGK = project("v", "BTD,DGK->BTGK", x_BTD, layer.qkv_bias)
        if layer.qk_norm is not None:
            over = {"head": 1, "full": 2}[layer.qk_norm]  # K, or H and K
            settings = (self.norm_eps, self.build, self.norm_offset, over)
            q_BTHK = RMSNorm(*settings, name="q_norm")(q_BTHK)
            k_BTGK = RMSNorm(*settings, name="k_norm")(k_BTGK)
        if self.rotation is not None:
            assert layer.rope is not None
            turn = functools.partial(rope.rotate, interleaved=layer.rope.interleaved)
            cos, sin = places.rotations[self.rotation]
            q_BTHK, k_BTGK = turn(q_BTHK, cos, sin), turn(k_BTGK, cos, sin)
            q_BTHK = rope.grown(layer.rope, q_BTHK, places.positions)

        sinks_H = self._sinks() if layer.sinks else None
        if cache is not None:
            mixed_BTHK, cache = self._decode(q_BTHK, k_BTGK, v_BTGK, cache, places, sinks_H)
        else:
            axes = ("batch", "length", "kv_heads", None)
            keys_BSGK, values_BSGK = (collectives.whole_rows(x, axes) for x in (k_BTGK, v_BTGK))
            mixed_BTHK = self._attend(
                q_BTHK,
                keys_BSGK,
                values_BSGK,
                (places.segment_ids, places.row_segments),
                (places.positions, places.row_positions),
                sinks_H,
            )
            if self.keep:
                cache = KeyValues(*(jnp.swapaxes(x, 1, 2) for x in (keys_BSGK, values_BSGK)))
        mixed_BTHK = mesh.constrain(mixed_BTHK, "batch", "length", "heads", None)
        return project("o", "BTHK,HKD->BTD", mixed_BTHK, layer.out_bias), cache

    def _decode(
        self,
        q_B1HK: jax.Array,
        k_B1GK: jax.Array,
        v_B1GK: jax.Array,
        cache: KeyValues,
        places: Places,
        sinks_H: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        """One new token a row: kept in the slot of its position, then mixed with all that is."""
        position_B, slots = places.positions[:, 0], cache.keys.shape[2]
        cache = KeyValues(
            *(
                _kept(slot_BGSK, new_B1GK, position_B % slots)
                for slot_BGSK, new_B1GK in zip(cache, (k_B1GK, v_B1GK), strict=True)
            )
        )
        # Once a row has gone round, all slots are in use.
        visible_BS = jnp.arange(slots)[None, :] <= position_B[:, None]
        mixed_BHK = attend_slots(
            q_B1HK[:, 0],
            *cache,
            visible=visible_BS & (places.segment_ids != 0),
            softcap=self.layer.softcap,
            sinks=sinks_H,
            scale=self.layer.scale,
        )
        return mixed_BHK[:, None], cache

    def _attend(
        self,
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        segments: tuple[jax.Array, jax.Array],
        positions: tuple[jax.Array, jax.Array],
        sinks_H: jax.Array | None,
    ) -> jax.Array:
        """`ops.attention.attend`, on each device's own rows and heads where it must be."""

        length = k_BSGK.shape[1]
        shared = collectives.row_devices() > 1
        order = collectives.zigzag_positions(length, collectives.row_devices()) if shared else None

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
            of_q, of_k, at_q, at_k, sinks, device = rest
            return attend(
                q,
                k,
                v,
                segments=(of_q, of_k),
                positions=(at_q, at_k),
                window=self.layer.window,
                softcap=self.layer.softcap,
                sinks=sinks,
                scale=self.layer.scale,
                impl=self.impl,
                share=None if order is None else Share(order, device),
            )

        device = jax.lax.axis_index("context") if shared else None
        rest = (*segments, *positions, sinks_H, device)
        if self.impl not in OPAQUE:
            return mix(q_BTHK, k_BSGK, v_BSGK, *rest)
        H, G = self.layer.heads, self.layer.kv_heads
        if mesh.spread("kv_heads", G) != mesh.spread("heads", H):
            # Heads are spread wider than their keys: every head gets keys of its own.
            k_BSGK, v_BSGK = (jnp.repeat(x, H // G, axis=2) for x in (k_BSGK, v_BSGK))
        rows, heads = ("batch", None), ("batch", None, "heads", None)
        axes = (*3 * [heads], *4 * [rows], ("heads",), ())
        return mesh.local(mix, (q_BTHK, k_BSGK, v_BSGK, *rest), axes, heads, kernel=True)

    def _sinks(self) -> jax.Array:
        return weight(
            self,
            "sinks",
            shape=(self.layer.heads,),
            axes=("heads",),
            new=self.build.new,
            compute=None,
            initialiser=nn.initializers.normal(self.build.init_scale),
        )


def _kept(kept_BGSK: jax.Array, new_B1GK: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Each row's new key or value in its slot."""

    def write(kept_GSK: jax.Array, new_1GK: jax.Array, slot: jax.Array) -> jax.Array:
        new_G1K = jnp.swapaxes(new_1GK, 0, 1)
        return jax.lax.dynamic_update_slice(kept_GSK, new_G1K, (0, slot, 0))

    kept_BGSK = jax.vmap(write)(kept_BGSK, new_B1GK, slot_B)
    return mesh.constrain(kept_BGSK, "batch", "kv_heads", None, None)
