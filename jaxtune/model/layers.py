"""The parts a block is made of, and the one way a weight is declared and used.

A weight is declared once, by the letters of its dimensions: `Projection("BTD,DHK->BTHK", ...)`
owns a kernel `[D H K]`. Its shape, its logical axes for sharding, its initialiser, the constraint
on what it produces: all follow from the letters. Weights are stored in one dtype, cast where used.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxtune.model import lora as adapters
from jaxtune.model import quantise
from jaxtune.model.lora import Lora
from jaxtune.parallel import collectives, mesh

WEIGHT_AXES = {
    "D": "embed",
    "E": "expert",
    "F": "mlp",
    "G": "kv_heads",
    "H": "heads",
    "K": "head_dim",
    "S": "norm",
    "V": "vocab",
}
ACTIVATION_AXES = {
    "B": "batch",
    "D": "act_embed",
    "F": "mlp",
    "G": "kv_heads",
    "H": "heads",
    "K": None,
    "S": None,
    "T": "length",
}
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


# Zeros beside trained parameters, in the dtype of the computation: the gradient of a kernel is
# theirs, half as wide as one of the kernel, which would be that widened and nothing more.
GRADIENT_SINK = "gradient_sink"


class ModuleConfig(NamedTuple):
    """The settings that every module of one decoder shares.

    `new` is the dtype of new weights, `compute` that of all that is computed, `init_scale` the
    spread of random weights; `lora` says which modules have adapters.
    """

    new: DTypeLike
    compute: DTypeLike
    init_scale: float
    lora: Lora | None = None


class PartitionedParam(meta.Partitioned[Any]):
    """A parameter together with the `names` of its logical axes; `nn.scan` adds the stacked one.

    Under a mesh Flax would take them for names of its axes and constrain the parameter by them.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def weight(
    module: nn.Module,
    name: str,
    *,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    new: DTypeLike,
    compute: DTypeLike | None,
    initialiser: Callable[..., jax.Array],
) -> jax.Array:
    """The parameter `name` of `module`, declared here and ready for use in dtype `compute`.

    `new` is its dtype when it is made; without `compute` it is used as it is stored.
    """
    stored = _stored(module, name, lambda key: PartitionedParam(initialiser(key, shape, new), axes))
    if compute is None:
        return collectives.all_gathered(stored, axes, shape, stored.dtype)
    sink: jax.Array | None = None
    if module.has_variable(GRADIENT_SINK, name):
        sink = module.get_variable(GRADIENT_SINK, name)
    return collectives.all_gathered(stored, axes, shape, compute, sink)


def _stored(module: nn.Module, name: str, new: Callable[[jax.Array], Any]) -> Any:
    """The parameter as it came, which may be one device's slice of what `new` declares."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, new)


class Projection(nn.Module):
    """`einsum(equation, x, kernel)`, plus a bias over the dimensions it adds."""

    equation: str
    sizes: Mapping[str, int]
    config: ModuleConfig
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        operands, output = self.equation.split("->")
        letters = operands.split(",")[1]
        lora = self.config.lora
        kernel, product = self._weights(letters, output)
        y = product(x)
        if lora is not None and adapters.has_adapter(self, lora):
            y = adapters.adapt(
                self,
                lora,
                self.equation,
                x,
                y,
                kernel=kernel,
                product=product,
                declare=_adapter_leaf(self, self.sizes, self.config),
            )
        if self.bias:
            added = [letter for letter in letters if letter in output]
            bias = weight(
                self,
                "bias",
                shape=tuple(self.sizes[letter] for letter in added),
                axes=tuple("norm" if letter == "D" else WEIGHT_AXES[letter] for letter in added),
                new=self.config.new,
                compute=self.config.compute,
                initialiser=nn.initializers.zeros,
            )
            y = y + jnp.broadcast_to(bias, y.shape)
        y = checkpoint_name(y, "projection")
        return mesh.constrain(y, *(ACTIVATION_AXES[letter] for letter in output))

    def _weights(
        self, letters: str, output: str
    ) -> tuple[Callable[[], jax.Array], Callable[[jax.Array], jax.Array]]:
        """The kernel, and the product with it."""
        shape = tuple(self.sizes[letter] for letter in letters)
        lora = self.config.lora
        if lora is None or lora.base == "none":
            stored = weight(
                self,
                "kernel",
                shape=shape,
                axes=tuple(WEIGHT_AXES[letter] for letter in letters),
                new=self.config.new,
                compute=self.config.compute,
                initialiser=nn.initializers.normal(self.config.init_scale),
            )
            return lambda: stored, lambda x: _product(self.equation, x, stored)

        inputs = sum(letter not in output for letter in letters)
        quantised = quantised_weight(self, lora, letters, letters[:inputs], self.sizes)

        def dequantised(leaves: quantise.Stored) -> jax.Array:
            dtype = self.config.compute
            return quantise.dequantise(leaves, kind=lora.base, inputs=inputs, dtype=dtype)

        # What the backward pass needs is made again from the codes, whatever `remat` keeps.
        product = jax.checkpoint(lambda x, leaves: _product(self.equation, x, dequantised(leaves)))
        return lambda: dequantised(quantised), lambda x: product(x, quantised)


def quantised_weight(
    module: nn.Module, lora: Lora, letters: str, shared: str, sizes: Mapping[str, int]
) -> quantise.Stored:
    """The leaves of `module`'s quantised kernel, gathered over `fsdp` while they are small."""
    leaves = quantise.leaves(lora.base, letters, shared, sizes, double=lora.double_quant)
    axes = {
        name: tuple(WEIGHT_AXES.get(letter) for letter in leaf.letters)
        for name, leaf in leaves.items()
    }

    def new(key: jax.Array) -> dict[str, PartitionedParam]:
        return {
            name: PartitionedParam(jnp.zeros(leaf.shape, leaf.dtype), axes[name])
            for name, leaf in leaves.items()
        }

    stored = _stored(module, "kernel", new)
    return {
        name: collectives.all_gathered(leaf, axes[name], leaves[name].shape, leaf.dtype)
        for name, leaf in stored.items()
    }


def _adapter_leaf(
    module: nn.Module, sizes: Mapping[str, int], config: ModuleConfig
) -> adapters.Declare:
    """Declare leaves of `module` in the collection of adapters; R and N are on every device."""
    lora = config.lora
    assert lora is not None
    sizes = {**sizes, "R": lora.r, "N": len(lora.tokens)}

    def declare(name: str, letters: str, make: adapters.Make) -> jax.Array:
        shape = tuple(sizes[letter] for letter in letters)
        axes = tuple(WEIGHT_AXES.get(letter) for letter in letters)

        def declared() -> Any:  # `variable` gives what is in the box
            return PartitionedParam(make(module.make_rng("params"), shape), axes)

        stored: jax.Array = module.variable(adapters.COLLECTION, name, declared).value
        if name == "rows":  # beside a table that stays cut as they are
            return stored
        dtype = stored.dtype if name == "magnitude" else config.compute
        return collectives.all_gathered(stored, axes, shape, dtype)

    return declare


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`einsum(equation, x, kernel)`; the operands of its gradients are in the order given here.

    The same numbers as the derivative JAX writes, but that one puts the cotangent first in the
    kernel's gradient, and XLA then transposes `[B T F]` in memory: 1.6 times the time of a whole
    MLP, forward and backward, on a CPU.
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(
    equation: str, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _product_backward(
    equation: str, saved: tuple[jax.Array, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    operands, output = equation.split("->")
    of_x, of_kernel = operands.split(",")
    d_x = jnp.einsum(f"{output},{of_kernel}->{of_x}", d_y, kernel)
    d_kernel = jnp.einsum(f"{of_x},{output}->{of_kernel}", x, d_y)
    return d_x, d_kernel


_product.defvjp(_product_forward, _product_backward)


class Matrix(nn.Module):
    """A weight that is handed out rather than applied: as it is stored, of which a device may have
    its own slice.

    So the embedding's gradient is summed over all tokens in float32: thousands of small
    contributions to one row stop adding up in bfloat16.
    """

    leaf: str
    letters: str
    sizes: Mapping[str, int]
    config: ModuleConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = tuple(self.sizes[letter] for letter in self.letters)
        axes = tuple(WEIGHT_AXES[letter] for letter in self.letters)
        initialiser = nn.initializers.normal(self.config.init_scale)
        table: jax.Array = _stored(
            self,
            self.leaf,
            lambda key: PartitionedParam(initialiser(key, shape, self.config.new), axes),
        )
        lora = self.config.lora
        if lora is None or not lora.tokens or not adapters.has_adapter(self, lora, "rows"):
            return table
        declare = _adapter_leaf(self, self.sizes, self.config)
        return adapters.with_rows(lora, self.letters, table, declare=declare)


class RMSNorm(nn.Module):
    """Scales the last axes to unit root mean square in float32, then by `offset` + a learned one.

    `axes` is how many: 1 for a vector of features, 2 for all features of all heads together.
    """

    epsilon: float
    config: ModuleConfig
    offset: float = 0.0
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _norm_weight(self, "scale", x.shape[-self.axes :], 1.0 - self.offset)
        x_f32 = x.astype(jnp.float32)
        over = tuple(range(-self.axes, 0))
        mean_square = jnp.mean(jnp.square(x_f32), axis=over, keepdims=True)
        normed = x_f32 * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.offset:
            scale_f32 = self.offset + scale.astype(jnp.float32)
            return (normed * jnp.broadcast_to(scale_f32, x.shape)).astype(x.dtype)
        # Rounded before the scale is applied, as the models were trained.
        scale = scale.astype(self.config.compute)
        return normed.astype(x.dtype) * jnp.broadcast_to(scale, x.shape)


class LayerNorm(nn.Module):
    """Brings the last axis to mean 0 and variance 1, then scales and shifts it, all in float32."""

    epsilon: float
    config: ModuleConfig
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _norm_weight(self, "scale", x.shape[-1:], 1.0 - self.offset)
        bias = _norm_weight(self, "bias", x.shape[-1:], 0.0)
        x_f32 = x.astype(jnp.float32)
        centred = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        scale_f32, bias_f32 = self.offset + scale.astype(jnp.float32), bias.astype(jnp.float32)
        shifted = normed * jnp.broadcast_to(scale_f32, x.shape) + jnp.broadcast_to(
            bias_f32, x.shape
        )
        return shifted.astype(x.dtype)


def _norm_weight(
    module: RMSNorm | LayerNorm, name: str, shape: tuple[int, ...], value: float
) -> jax.Array:
    """A vector that begins as `value`, in the dtype it is stored in, on every device."""
    return weight(
        module,
        name,
        shape=shape,
        axes=("norm",) * len(shape),
        new=module.config.new,
        compute=None,
        initialiser=nn.initializers.constant(value),
    )


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    activation: str
    sizes: Mapping[str, int]
    config: ModuleConfig
    bias: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = _projection(self, "gate", "BTD,DF->BTF")(x_BTD)
        up_BTF = _projection(self, "up", "BTD,DF->BTF")(x_BTD)
        mixed_BTF = _gate(self.activation, gate_BTF, up_BTF)
        return _projection(self, "down", "BTF,FD->BTD")(mixed_BTF)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """`activation(gate) * up`, whose two cotangents are made once and kept.

    Without the barrier XLA for TPU makes them again inside of every product that reads them.
    """
    return ACTIVATIONS[activation](gate) * up


def _gate_forward(
    activation: str, gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _gate(activation, gate, up), (gate, up)


def _gate_backward(
    activation: str, saved: tuple[jax.Array, jax.Array], d_mixed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, derivative = jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, *saved)
    d_gate, d_up = jax.lax.optimization_barrier(derivative(d_mixed))
    return d_gate, d_up


_gate.defvjp(_gate_forward, _gate_backward)


class PlainMLP(nn.Module):
    """`down(activation(up(x)))`."""

    activation: str
    sizes: Mapping[str, int]
    config: ModuleConfig
    bias: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = ACTIVATIONS[self.activation](_projection(self, "up", "BTD,DF->BTF")(x_BTD))
        return _projection(self, "down", "BTF,FD->BTD")(up_BTF)


def _projection(mlp: GatedMLP | PlainMLP, name: str, equation: str) -> Projection:
    return Projection(equation, mlp.sizes, mlp.config, mlp.bias, name=name)
