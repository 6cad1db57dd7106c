"""The MLP of a layer as a mixture of experts; `ops/moe.py` has the mathematics.

Every device sorts and multiplies the tokens it holds, with the experts gathered over `fsdp` and
cut along their width over `tensor`: no token travels, so how the experts are loaded changes no
communication. In a training step with the mesh axis `expert` each device keeps experts of its own:
those along it see the tokens of all of them, and add up what each one's experts made of a token.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.typing import DTypeLike

from jaxtune.model import quantise
from jaxtune.model.layers import (
    ACTIVATIONS,
    WEIGHT_AXES,
    GatedMLP,
    ModuleConfig,
    Projection,
    quantised_weight,
    weight,
)
from jaxtune.ops import expert_parallel, moe
from jaxtune.parallel import collectives, mesh
from jaxtune.spec import LayerSpec

LOADS = "loads"  # the collection in which a layer leaves its `ops.moe.Load`, where it is mutable

Kernels = jax.Array | quantise.Stored  # of experts side by side


class Mixture(nn.Module):
    """The experts that each token's router chooses, `[B T D]` -> `[B T D]`; router in float32.

    Tokens of segment 0 (padding) go through the experts too but are left out of the loads.
    """

    layer: LayerSpec
    sizes: Mapping[str, int]
    config: ModuleConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        layer, spec = self.layer, self.layer.moe
        assert spec is not None
        sizes = {**self.sizes, "E": spec.experts}

        def bank(name: str, letters: str) -> tuple[Kernels, jax.Array | None]:
            return Bank(
                letters, sizes, self.config, layer.mlp_bias, self.config.compute, name=name
            )()

        plain = self.config._replace(lora=None)
        scores = {**WEIGHT_AXES, "E": "scores"}  # on every device: any expert may be chosen
        router = Bank("DE", sizes, plain, spec.router_bias, jnp.float32, scores, name="router")
        kernel_DE, bias_E = router()
        assert isinstance(kernel_DE, jax.Array)
        logits_BTE = _scores(x_BTD, kernel_DE, bias_E)
        chosen = moe.route(logits_BTE, per_token=spec.per_token, softmax_over=spec.softmax_over)
        self.sow(LOADS, "load", moe.load(logits_BTE, chosen, segment_ids_BT != 0))
        (gate, gate_bias), (up, up_bias) = bank("gate", "EDF"), bank("up", "EDF")
        down, down_bias = bank("down", "EFD")
        cut, others = mesh.spread("mlp", sizes["F"]), collectives.cut("expert", spec.experts)
        apply = (
            functools.partial(_exchanged, over=others, count=spec.experts)
            if others
            else moe.apply_experts
        )

        def mixed(x_BTD: jax.Array, *arrays: Any) -> jax.Array:
            (B, T, D), k = x_BTD.shape, spec.per_token
            choice, experts = moe.Chosen(*arrays[:2]), moe.Experts(*arrays[2:])
            if cut and experts.down_bias is not None:
                first = jax.lax.axis_index(cut) == 0
                experts = experts._replace(down_bias=jnp.where(first, experts.down_bias, 0))
            y_ND = apply(
                x_BTD.reshape(B * T, D),
                experts,
                moe.Chosen(*(part.reshape(B * T, k) for part in choice)),
                activation=ACTIVATIONS[layer.activation],
                clamp=spec.clamp,
            )
            return (jax.lax.psum(y_ND, cut) if cut else y_ND).reshape(B, T, D)

        token = ("batch", "length", None)
        kernels = ((None, None, "mlp"), (None, None, "mlp"), (None, "mlp", None))

        def through(x_BTD: jax.Array, chosen: moe.Chosen, banks: tuple[Kernels, ...]) -> jax.Array:
            return mesh.local(
                mixed,
                (x_BTD, *chosen, *map(self._whole, banks), gate_bias, up_bias, down_bias),
                (token, token, token, *kernels, (None, "mlp"), (None, "mlp"), (None, None)),
                out=token,
            )

        if not isinstance(gate, jax.Array):
            # What the backward pass needs is made again from the codes, whatever `remat` keeps.
            through = jax.checkpoint(through)
        y_BTD = through(x_BTD, chosen, (gate, up, down))
        if spec.shared_width:
            y_BTD = y_BTD + self._shared(x_BTD, {**sizes, "F": spec.shared_width})
        return mesh.constrain(y_BTD, "batch", "length", "act_embed")

    def _whole(self, bank: Kernels) -> jax.Array:
        if isinstance(bank, jax.Array):
            return bank
        assert self.config.lora is not None
        kind, dtype = self.config.lora.base, self.config.compute
        one = functools.partial(quantise.dequantise, kind=kind, inputs=1, dtype=dtype)
        return jax.vmap(one)(bank)

    def _shared(self, x_BTD: jax.Array, sizes: Mapping[str, int]) -> jax.Array:
        """The expert that every token uses, times the sigmoid of a number per token."""
        shared = GatedMLP(self.layer.activation, sizes, self.config, name="shared")(x_BTD)
        one = {**sizes, "S": 1}
        share_BTS = Projection("BTD,DS->BTS", one, self.config, name="shared_gate")(x_BTD)
        return jnp.broadcast_to(jax.nn.sigmoid(share_BTS), shared.shape) * shared


class Bank(nn.Module):
    """A `kernel` of `letters`, the last but one of which is summed over, and perhaps a `bias` of
    the others; handed out in dtype `compute`, or as the config's `lora.base` stores it."""

    letters: str
    sizes: Mapping[str, int]
    config: ModuleConfig
    bias: bool
    compute: DTypeLike
    axes: Mapping[str, str] = FrozenDict(WEIGHT_AXES)

    @nn.compact
    def __call__(self) -> tuple[Kernels, jax.Array | None]:
        lora = self.config.lora
        kernel: Kernels
        if lora is not None and lora.base != "none":
            kernel = quantised_weight(self, lora, self.letters, self.letters[-2], self.sizes)
        else:
            axes = tuple(self.axes[letter] for letter in self.letters)
            spread = nn.initializers.normal(self.config.init_scale)
            kernel = self._declared("kernel", self.letters, axes, spread)
        if not self.bias:
            return kernel, None
        letters = self.letters[:-2] + self.letters[-1]
        axes = tuple("norm" if letter == "D" else self.axes[letter] for letter in letters)
        return kernel, self._declared("bias", letters, axes, nn.initializers.zeros)

    def _declared(
        self, leaf: str, letters: str, axes: tuple[str, ...], initialiser: Callable[..., jax.Array]
    ) -> jax.Array:
        return weight(
            self,
            leaf,
            shape=tuple(self.sizes[letter] for letter in letters),
            axes=axes,
            new=self.config.new,
            compute=self.compute,
            initialiser=initialiser,
        )


def _exchanged(
    x_ND: jax.Array,
    experts: moe.Experts,
    chosen: moe.Chosen,
    *,
    over: tuple[str, ...],
    count: int,
    activation: moe.Activation,
    clamp: moe.Clamp,
) -> jax.Array:
    """Apply experts of which the devices along `over` have each their own of all `count`."""

    all_of = functools.partial(jax.lax.all_gather, axis_name=over)
    order = moe.ordered(chosen.experts, count)
    y_PND = expert_parallel.apply_local_experts(
        all_of(x_ND),
        experts,
        moe.Order(*map(all_of, order)),
        all_of(chosen.shares),
        first=jax.lax.axis_index(over) * len(experts.gate),
        activation=activation,
        clamp=clamp,
    )
    y_ND: jax.Array = jax.lax.psum_scatter(y_PND, over)
    return y_ND


def total_load(loads: Mapping[str, Any]) -> moe.Load:
    """All that the layers left in the collection `LOADS` of one forward pass, added up."""
    layers = jax.tree.leaves(loads, is_leaf=lambda x: isinstance(x, moe.Load))
    chosen, probability, tokens = zip(*layers, strict=True)  # [L E], [L E], [L] of each
    return moe.Load(
        sum(part.sum(axis=0) for part in chosen),
        sum(part.sum(axis=0) for part in probability),
        sum(part.sum() for part in tokens),
    )


def _scores(x_BTD: jax.Array, kernel_DE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    logits_BTE = jnp.einsum(
        "BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST
    )
    return logits_BTE if bias_E is None else logits_BTE + jnp.broadcast_to(bias_E, logits_BTE.shape)
