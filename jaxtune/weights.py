"""Where the weights of a run come from: a model folder, or a seed. The doors meet here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jaxtune.data.tokenizer import Tokenizer
    from jaxtune.hf.load import HfModel
    from jaxtune.spec import ModelSpec


def base_params(model: HfModel, config: Config, placed: Any, dtype: Any) -> Any:
    """The model's parameters in `dtype`, each leaf in its sharding of the tree `placed`.

    A model opened without weights (`init: random`) is filled from the seed, in `param_dtype` first,
    so that everybody who asks for another `dtype` begins with the same numbers.
    """
    import jax

    from jaxtune.hf.load import load_params
    from jaxtune.model import decoder

    if model.tensors:
        return load_params(model, placed, dtype)

    def first(key: jax.Array) -> Any:
        params = decoder.init(model.spec, key, config.param_dtype)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(first, out_shardings=placed)(jax.random.key(config.seed))


def check_ids(largest: int, model: str, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """An id without a row in the embedding never raises on a device: it is refused here."""
    if largest >= spec.vocab:
        raise ConfigError(
            f"{model}: has {spec.vocab} embedding rows, but meets token id {largest} of tokenizer "
            f"{tokenizer.folder}. Use the model's own tokenizer."
        )
