"""The decoder: token ids in, hidden states and the head out. No loss.

    params = init(spec, key, jnp.float32)
    rows   = TokenRows(inputs, segment_ids, positions)
    output = forward(spec, {"params": params}, rows, ForwardConfig(jnp.bfloat16))
    sums   = linear_cross_entropy(output.hidden, output.head, targets, weights)

Every function here is pure and takes the spec as its static argument. The layers of a stack are
stored along one leading axis and scanned, so a model compiles as fast with 80 layers as with one.

    embed/table [V D]
    stack_{i}/layer_{j}/attention_norm/scale [L D]       i: stack, j: place in its pattern
    stack_{i}/layer_{j}/attention/q/kernel [L D H K]     also k, v [L D G K] and o [L H K D]
    stack_{i}/layer_{j}/attention/q/bias [L H K]         and other biases, if the spec has them
    stack_{i}/layer_{j}/attention/q_norm/scale [L K]     or [L H K]; also k_norm, if it has them
    stack_{i}/layer_{j}/attention/sinks [L H]            if the spec has them
    stack_{i}/layer_{j}/attention_post_norm/scale [L D]  norms after the part, also mlp_post_norm
    stack_{i}/layer_{j}/mlp_norm/scale [L D]
    stack_{i}/layer_{j}/mlp/gate/kernel [L D F]          also up [L D F] and down [L F D]
    stack_{i}/layer_{j}/moe/router/kernel [L D E]        in place of mlp; also bias
    stack_{i}/layer_{j}/moe/gate/kernel [L E D F]        also up, down [L E F D], and biases
    stack_{i}/layer_{j}/moe/shared/gate/kernel [L D F]   also up and down, and shared_gate [L D 1]
    final_norm/scale [D]                                 a LayerNorm also has bias
    head/kernel [D V]                                    absent when the head is the table
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

from jaxtune.config import ConfigError
from jaxtune.model import lora as adapters
from jaxtune.model.attention import Attention, AttentionContext, KVCache
from jaxtune.model.layers import (
    GRADIENT_SINK,
    GatedMLP,
    LayerNorm,
    Matrix,
    ModuleConfig,
    PartitionedParam,
    PlainMLP,
    RMSNorm,
)
from jaxtune.model.lora import Lora
from jaxtune.model.moe import LOADS, Mixture, total_load
from jaxtune.ops import head as output_head
from jaxtune.ops import rope
from jaxtune.ops.attention import choose
from jaxtune.ops.head import Head
from jaxtune.ops.moe import Load
from jaxtune.ops.reference import AttentionShape
from jaxtune.parallel import collectives, mesh
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec
from jaxtune.tree import named

# What a layer's forward pass leaves behind for its backward pass, by name; always its input.
_keep = jax.checkpoint_policies
REMAT: Mapping[str, Callable[..., bool] | None] = {
    "none": None,  # everything
    "full": _keep.nothing_saveable,  # nothing else
    "attention": _keep.save_only_these_names("attention"),  # what heads mix, and its softmax's sums
    "projections": _keep.save_only_these_names("attention", "projection"),  # the products too
    "dots": _keep.dots_with_no_batch_dims_saveable,  # products with weights, attention's not
    # Nothing on the device: the layer's input waits in the host's memory.
    "offload": _keep.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

CACHE_AXES = ("layers", "batch", "kv_heads", None, None)

Params = Any  # nested dicts of arrays
Cache = dict[str, dict[str, KVCache]]  # stack_{i} -> layer_{j} -> [L B G S K] each


class TokenRows(NamedTuple):
    """Token ids `[B T]` int32, and who sees whom among them (`ops/reference.py`).

    Padding is segment 0.
    """

    inputs: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


class ForwardConfig(NamedTuple):
    """The settings of a forward pass, known when it is traced.

    `dtype` is of the computation, `remat` a name of `REMAT`. `attention` names an implementation of
    `ops/attention.py`; None or "auto" chooses by length and `platform`, of which None is this
    process's own. `lora` says how the adapters in the collection "lora" are used.
    """

    dtype: DTypeLike
    remat: str = "full"
    attention: str | None = None
    platform: str | None = None
    lora: Lora | None = None


class Output(NamedTuple):
    """The result of a forward pass: `hidden` `[B T D]` after the final norm, in compute dtype.

    `head` has its kernel as stored; `cache` is the one passed in with these tokens in it, or the
    keys and values to `keep`; `load` is of all mixtures of experts together, None without them.
    """

    hidden: jax.Array
    head: Head
    cache: Cache | None
    load: Load | None = None


def forward(
    spec: ModelSpec,
    variables: Mapping[str, Params],
    rows: TokenRows,
    config: ForwardConfig,
    *,
    cache: Cache | None = None,
    keep: bool = False,
    key: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> Output:
    """Run `rows` through the decoder `variables["params"]`.

    With a `cache` a row is one text of which this is the newest token, T = 1: it goes into the slot
    of its position and sees what the cache holds; a text that outgrows a limit of `rope_limits`
    needs a new prefill. `keep` gives back the keys and values of these tokens, for `in_slots`.
    `key` is for what is random while training; without it nothing is. Without the collection
    `variables["lora"]` the base runs. `noise` `[B T D]` is added to the input of the layers.
    Raises: ConfigError for an unknown `remat`, or attention that cannot be run here.
    """
    if config.remat not in REMAT:
        raise ConfigError(
            f"gradient_checkpointing: there is no policy {config.remat!r}. Use one of "
            f"{', '.join(REMAT)}."
        )
    devices = collectives.row_devices()
    attention, _ = attention_for(
        spec,
        config.platform or jax.default_backend(),
        rows.inputs.shape[1] * devices,
        devices=devices,
        dtype=config.dtype,
        requested=config.attention or "auto",
    )
    of_modules = ModuleConfig(config.dtype, config.dtype, spec.init_scale, config.lora)
    module = Decoder(spec, of_modules, config.remat, attention, keep)
    rngs = {} if key is None else {"dropout": key}
    arguments = (*rows, cache, noise)
    (hidden, kernel, cache), sown = module.apply(variables, *arguments, rngs=rngs, mutable=[LOADS])
    head = _head(spec, kernel, config.dtype)
    return Output(hidden, head, cache, total_load(sown[LOADS]) if LOADS in sown else None)


def _head(spec: ModelSpec, kernel: jax.Array, dtype: DTypeLike) -> Head:
    """The head on a kernel as it is stored: a tied one is a table."""
    axes = ("vocab", "embed") if spec.tie_head else ("embed", "vocab")
    blocks = collectives.Blocks(axes, spec.width, jnp.dtype(dtype))
    return Head(
        kernel,
        spec.logit_scale,
        spec.logit_softcap,
        by_token=spec.tie_head,
        gather=blocks.gather,
        scatter=blocks.scatter,
        shards=mesh.parts("vocab", spec.vocab),
    )


def attention_for(
    spec: ModelSpec,
    platform: str,
    length: int,
    *,
    dtype: DTypeLike,
    devices: int = 1,
    requested: str = "auto",
) -> tuple[str, str]:
    """The implementation of attention for rows of `length` tokens over so many `devices`, and why
    it is that one.

    Raises: ConfigError if the one `requested` cannot be run here.
    """
    try:
        return choose(
            platform,
            AttentionShape(
                queries=length,
                keys=length,
                head_dims=tuple(sorted({layer.head_dim for layer in spec.layers})),
                devices=devices,
                dtype=jnp.dtype(dtype).name,
                softcap=any(layer.softcap is not None for layer in spec.layers),
                sinks=any(layer.sinks for layer in spec.layers),
            ),
            requested,
        )
    except ValueError as error:
        raise ConfigError(f"attention: {error}. Choose auto, or another implementation.") from error


def logits(
    spec: ModelSpec,
    variables: Mapping[str, Params],
    inputs: jax.Array,
    *,
    segment_ids: jax.Array,
    positions: jax.Array,
    key: jax.Array | None = None,
    **config: Any,
) -> jax.Array:
    """`[B T V]` float32 for all positions, with fields of `ForwardConfig`; for tests and tools."""
    rows = TokenRows(inputs, segment_ids, positions)
    output = forward(spec, variables, rows, ForwardConfig(**config), key=key)
    return output_head.logits(output.hidden, output.head)


def init(spec: ModelSpec, key: jax.Array, dtype: DTypeLike) -> Params:
    """Random parameters in `dtype`: normal of `spec.init_scale`, zero biases, norms at one.

    The same values under any sharding: jit it with `out_shardings` to make them where they live.
    """
    return meta.unbox(_declare(spec, key, dtype))


def abstract(spec: ModelSpec, dtype: DTypeLike, lora: Lora | None = None) -> Params:
    """The tree of `jax.ShapeDtypeStruct` that `init` would fill; with `lora` as its `base` is
    stored: a quantised kernel is a dict of leaves (`quantise.leaves`)."""
    return meta.unbox(_declared(spec, jnp.dtype(dtype), lora))


def axes(spec: ModelSpec, lora: Lora | None = None) -> Params:
    """The same tree with each parameter's logical axes, for `mesh.shardings`."""
    return _axes(_declared(spec, jnp.dtype(jnp.float32), lora))


def init_adapters(spec: ModelSpec, lora: Lora, params: Params, key: jax.Array) -> Params:
    """The collection "lora" for the base `params`, which a new adapter leaves as it is; f32."""
    return meta.unbox(_declare_adapters(spec, lora, params, key))


def abstract_adapters(spec: ModelSpec, lora: Lora) -> Params:
    """The tree of `jax.ShapeDtypeStruct` that `init_adapters` would fill."""
    return meta.unbox(_abstract_adapters(spec, lora))


def adapter_axes(spec: ModelSpec, lora: Lora) -> Params:
    """The same tree with the logical axes of each leaf; what is only of adapters is replicated."""
    return _axes(_abstract_adapters(spec, lora))


def _axes(boxes: Params) -> Params:
    return jax.tree.map(
        lambda box: box.names, boxes, is_leaf=lambda x: isinstance(x, PartitionedParam)
    )


@functools.cache
def projections(spec: ModelSpec) -> tuple[str, ...]:
    """Names of all that can have an adapter: `stack_0/layer_0/attention/q`."""
    leaves = named(abstract_adapters(spec, Lora(r=1, alpha=1.0)))
    return tuple(name.removesuffix("/a") for name in leaves if name.endswith("/a"))


@functools.cache
def banks(spec: ModelSpec) -> tuple[str, ...]:
    """Names of all kernels of experts side by side, `[L E ..]`: `stack_0/layer_0/moe/gate`."""
    return tuple(
        f"stack_{i}/layer_{j}/moe/{name}"
        for i, stack in enumerate(spec.stacks)
        for j, layer in enumerate(stack.pattern)
        if layer.moe is not None
        for name in ("gate", "up", "down")
    )


def empty_cache(spec: ModelSpec, *, rows: int, length: int, dtype: DTypeLike) -> Cache:
    """Room for `length` positions of `rows` texts; a layer with a window has that many slots."""

    def zeros(repeats: int, layer: LayerSpec) -> jax.Array:
        slots = length if layer.window is None else min(length, layer.window)
        shape = (repeats, rows, layer.kv_heads, slots, layer.head_dim)
        return mesh.constrain(jnp.zeros(shape, dtype), *CACHE_AXES)

    return {
        f"stack_{i}": {
            f"layer_{j}": KVCache(zeros(stack.repeats, layer), zeros(stack.repeats, layer))
            for j, layer in enumerate(stack.pattern)
        }
        for i, stack in enumerate(spec.stacks)
    }


def in_slots(cache: Cache, new: Cache, rows: jax.Array, lengths: jax.Array) -> Cache:
    """`cache` with what `forward` was to `keep` of texts of `lengths` `[R]` in its `rows` `[R]`.

    Rows that the cache does not have are left out. A text longer than a layer's slots leaves its
    end there.
    """

    def write(slots_LBGSK: jax.Array, new_LRGTK: jax.Array) -> jax.Array:
        S, T = slots_LBGSK.shape[3], new_LRGTK.shape[3]
        if S < T:
            last_R1 = lengths[:, None] - 1
            # The latest position that has the slot; below 0 it is not in use yet.
            held_RS = last_R1 - (last_R1 - jnp.arange(S)[None, :]) % S
            at_1R1S1 = jnp.maximum(held_RS, 0)[None, :, None, :, None]
            new_LRGTK = jnp.take_along_axis(new_LRGTK, at_1R1S1, axis=3)
        slots_LBGSK = slots_LBGSK.at[:, rows, :, : new_LRGTK.shape[3]].set(new_LRGTK, mode="drop")
        return mesh.constrain(slots_LBGSK, *CACHE_AXES)

    filled: Cache = jax.tree.map(write, cache, new)
    return filled


def longer(cache: Cache, spec: ModelSpec, length: int) -> Cache:
    """`cache` with room for `length` positions, of which rows have used none of the new ones."""

    def grow(slots_LBGSK: jax.Array, layer: LayerSpec) -> jax.Array:
        slots = length if layer.window is None else min(length, layer.window)
        new = [(0, 0)] * 3 + [(0, max(0, slots - slots_LBGSK.shape[3])), (0, 0)]
        return mesh.constrain(jnp.pad(slots_LBGSK, new), *CACHE_AXES)

    return {
        f"stack_{i}": {
            f"layer_{j}": KVCache(*(grow(x, layer) for x in cache[f"stack_{i}"][f"layer_{j}"]))
            for j, layer in enumerate(stack.pattern)
        }
        for i, stack in enumerate(spec.stacks)
    }


class Decoder(nn.Module):
    """Embedding, stacks, final norm; see `forward`."""

    spec: ModelSpec
    config: ModuleConfig
    remat: str
    attention: str
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        inputs_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache | None,
        noise_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        spec, sizes = self.spec, {"V": self.spec.vocab, "D": self.spec.width}
        table_VD = Matrix("table", "VD", sizes, self.config, name="embed")()
        x_BTD = collectives.sharded_lookup(table_VD, inputs_BT, spec.width, self.config.compute)
        if spec.embed_scale != 1.0:
            # Rounded to compute dtype first, as the models were trained.
            x_BTD = x_BTD * jnp.asarray(spec.embed_scale, x_BTD.dtype)
        if noise_BTD is not None:
            x_BTD = x_BTD + noise_BTD.astype(x_BTD.dtype)
        x_BTD = mesh.constrain(x_BTD, "batch", "length", "act_embed")

        row = collectives.whole_rows(segment_ids_BT), collectives.whole_rows(positions_BT)
        last_BT = None
        if collectives.row_devices() > 1:
            last_BT = rope.last_positions(row[1], row[0])[
                :, collectives.row_positions(row[0].shape[1])
            ]
        rotations = tuple(
            rope.angles(*kind, positions_BT, segment_ids_BT, last=last_BT)
            for kind in kinds_of_rope(spec)
        )
        context = AttentionContext(segment_ids_BT, positions_BT, rotations, *row)
        caches: Cache = {}
        for i, stack in enumerate(spec.stacks):
            name = f"stack_{i}"
            scanned = nn.scan(
                Pattern,
                variable_axes={"params": 0, adapters.COLLECTION: 0, GRADIENT_SINK: 0, LOADS: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                out_axes=0,
                length=stack.repeats,
                metadata_params={meta.PARTITION_NAME: "layers"},
            )
            repeated = scanned(
                spec,
                stack.pattern,
                self.config,
                self.remat,
                self.attention,
                self.keep,
                scanned=stack.repeats > 1,
                name=name,
            )
            x_BTD, caches[name] = repeated(x_BTD, None if cache is None else cache[name], context)
        x_BTD = _norm(spec, self.config, "final_norm")(x_BTD)

        kernel = table_VD
        if not spec.tie_head:
            kernel = Matrix("kernel", "DV", sizes, self.config, name="head")()
        return x_BTD, kernel, caches if self.keep or cache is not None else None


class Pattern(nn.Module):
    """A repeat of a stack: its layers in order."""

    spec: ModelSpec
    layers: tuple[LayerSpec, ...]
    config: ModuleConfig
    remat: str
    attention: str
    keep: bool

    scanned: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: dict[str, KVCache] | None, context: AttentionContext
    ) -> tuple[jax.Array, dict[str, KVCache]]:
        block, policy = Block, REMAT[self.remat]
        if policy is not None:
            # Two passes in two loops cannot share work; a loop of one is no loop, and needs the
            # barrier that keeps the compiler from undoing the recomputation.
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scanned)
        caches: dict[str, KVCache] = {}
        for j, layer in enumerate(self.layers):
            name = f"layer_{j}"
            part = block(self.spec, layer, self.config, self.attention, self.keep, name=name)
            x_BTD, layer_cache = part(x_BTD, None if cache is None else cache[name], context)
            if layer_cache is not None:
                caches[name] = layer_cache
        return x_BTD, caches


class Block(nn.Module):
    """Residual block: attention, then MLP, with norms before them, after them, or both."""

    spec: ModelSpec
    layer: LayerSpec
    config: ModuleConfig
    attention: str
    keep: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: KVCache | None, context: AttentionContext
    ) -> tuple[jax.Array, KVCache | None]:
        spec, layer = self.spec, self.layer
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        sizes = {
            "D": spec.width,
            "F": layer.mlp_width,
            "G": layer.kv_heads,
            "H": layer.heads,
            "K": layer.head_dim,
        }
        rotation = None
        if layer.rope is not None:
            rotation = kinds_of_rope(spec).index((layer.rope, layer.head_dim))

        def before(part: str, x: jax.Array) -> jax.Array:
            return x if layer.norms == "post" else _norm(spec, self.config, f"{part}_norm")(x)

        def after(part: str, x: jax.Array, y: jax.Array) -> jax.Array:
            if layer.norms != "pre":
                y = _norm(spec, self.config, f"{part}_post_norm")(y)
            return x + (y if layer.residual_scale == 1.0 else y * layer.residual_scale)

        attention = Attention(
            layer,
            rotation,
            sizes,
            spec.norm_eps,
            spec.norm_offset,
            self.config,
            self.attention,
            self.keep,
            name="attention",
        )
        mlp: Any
        if layer.moe is None:
            kind = GatedMLP if layer.gated else PlainMLP
            mlp = kind(layer.activation, sizes, self.config, layer.mlp_bias, name="mlp")
        else:
            mixture: Any = Mixture(layer, sizes, self.config, name="moe")
            mlp = functools.partial(mixture, segment_ids_BT=context.segment_ids)
        mixed_BTD, cache = attention(before("attention", x_BTD), cache, context)
        x_BTD = after("attention", x_BTD, mixed_BTD)
        x_BTD = after("mlp", x_BTD, mlp(before("mlp", x_BTD)))
        return mesh.constrain(x_BTD, "batch", "length", "act_embed"), cache


def _norm(spec: ModelSpec, config: ModuleConfig, name: str) -> RMSNorm | LayerNorm:
    kind = LayerNorm if spec.norm == "layer" else RMSNorm
    return kind(spec.norm_eps, config, spec.norm_offset, name=name)


def kinds_of_rope(spec: ModelSpec) -> list[tuple[RopeSpec, int]]:
    """The distinct (rope, head_dim) of a model's layers, in order of first use."""
    kinds = ((layer.rope, layer.head_dim) for stack in spec.stacks for layer in stack.pattern)
    return list(dict.fromkeys((kind, size) for kind, size in kinds if kind is not None))


def rope_limits(spec: ModelSpec) -> tuple[int, ...]:
    """Text lengths above which all positions of a text are rotated in another way."""
    ropes = (kind for kind, _ in kinds_of_rope(spec))
    return tuple({kind.original_max_positions for kind in ropes if kind.scaling == "longrope"})


def _declare(spec: ModelSpec, key: jax.Array, dtype: DTypeLike, lora: Lora | None = None) -> Params:
    """The decoder's parameters as `PartitionedParam` leaves."""
    module = Decoder(spec, ModuleConfig(dtype, dtype, spec.init_scale, lora), "none", "reference")
    one_token = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, one_token, one_token, one_token, None)["params"]


@functools.cache
def _declared(spec: ModelSpec, dtype: jnp.dtype, lora: Lora | None) -> Params:
    """Their shapes alone; tracing the decoder takes a tenth of a second, and many ask."""
    return jax.eval_shape(lambda key: _declare(spec, key, dtype, lora), jax.random.key(0))


def _declare_adapters(spec: ModelSpec, lora: Lora, params: Params, key: jax.Array) -> Params:
    config = ModuleConfig(jnp.float32, jnp.float32, spec.init_scale, lora)
    module = Decoder(spec, config, "none", "reference")
    one_token = jnp.zeros((1, 1), jnp.int32)
    places = (one_token, one_token, one_token, None)
    mutable = [adapters.COLLECTION]
    _, made = module.apply({"params": params}, *places, rngs={"params": key}, mutable=mutable)
    return made.get(adapters.COLLECTION, {})


@functools.cache
def _abstract_adapters(spec: ModelSpec, lora: Lora) -> Params:
    params = abstract(spec, jnp.float32, lora)
    return jax.eval_shape(
        lambda params, key: _declare_adapters(spec, lora, params, key), params, jax.random.key(0)
    )
