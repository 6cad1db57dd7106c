"""The config: one strict frozen model, read from YAML and flags. Knows no JAX."""

from jaxtune.config.aliases import ALIASES
from jaxtune.config.conversations import RESERVED, ROLES, TOKEN_NAMES, kwargs_mistake
from jaxtune.config.errors import ConfigError, DataError, Diverged, JaxtuneError, ModelError
from jaxtune.config.fields import DatasetConfig, HostsConfig, ProportionsConfig, label, shard_bytes
from jaxtune.config.load import (
    YAML_FAILS,
    Config,
    ConfigSource,
    dump,
    entry_type,
    field_name,
    field_names,
    load,
    load_config,
    nearest,
    parse_model,
)

__all__ = [
    "ALIASES",
    "RESERVED",
    "ROLES",
    "TOKEN_NAMES",
    "YAML_FAILS",
    "Config",
    "ConfigError",
    "ConfigSource",
    "DataError",
    "DatasetConfig",
    "Diverged",
    "HostsConfig",
    "JaxtuneError",
    "ModelError",
    "ProportionsConfig",
    "dump",
    "entry_type",
    "field_name",
    "field_names",
    "kwargs_mistake",
    "label",
    "load",
    "load_config",
    "nearest",
    "parse_model",
    "shard_bytes",
]
