"""Families by `model_type`: config.json -> ModelSpec and back, and a layout row per tensor.

A family is data over the one decoder; there is no code per brand below these tables. Configs are
read as transformers reads them, in the key style of version 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and of version 5 (`rope_parameters`, `dtype`), a key that is absent having the
value transformers gives it. What cannot be represented is refused, never approximated.
docs/families.md is the recipe for another one.
"""

from jaxtune.config import ModelError, nearest
from jaxtune.hf.family import (
    exaone,
    gemma,
    glm,
    granite,
    llama,
    mixture,
    olmo,
    phi,
    smollm,
    starcoder,
)
from jaxtune.hf.family.config_keys import Config, config_dtype
from jaxtune.hf.family.family import Family, stacked
from jaxtune.hf.family.multimodal import WRAPPERS

__all__ = ["FAMILIES", "Config", "Family", "config_dtype", "family_of", "stacked"]

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **phi.FAMILIES,
    **olmo.FAMILIES,
    **granite.FAMILIES,
    **smollm.FAMILIES,
    **starcoder.FAMILIES,
    **glm.FAMILIES,
    **exaone.FAMILIES,
    **mixture.FAMILIES,
}


def family_of(config: Config, *, where: str = "config.json") -> Family:
    """The row of FAMILIES for `model_type`; an unknown one is a `ModelError` with the nearest."""
    kind = config.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind]
    known = ", ".join([*FAMILIES, *WRAPPERS])
    if kind is None:
        raise ModelError(f"{where}: no 'model_type'; expected one of {known}.")
    raise ModelError(
        f"{where}: model_type '{kind}' is unknown; known are {known}."
        f"{nearest(str(kind), [*FAMILIES, *WRAPPERS])}"
    )
