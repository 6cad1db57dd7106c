"""Instruction tuning of open language models with JAX.

Public, and loaded when first used: `load_config`, `Config`, `train`, `evaluate`, `preview`, `plan`,
`load_model`, the callbacks, and the errors. Everything else is internal.

    import jaxtune as jt
    result = jt.train(jt.load_config("config.yaml"), data=[{"prompt": "...", "completion": "..."}])
    model = jt.load_model(result.output_dir)
    model.generate(["Name a prime."], max_new_tokens=8)

The packages; imports only go down, siblings never import each other (`tests/test_floors.py`):

    commands      train  preview  plan  evaluate  chat  report  convert
    api           what each command does, for Python
    presentation  server  repl  reporting
    uses          evaluation  planning
    engines       training  inference
    outside       hf
    mathematics   model  ops  parallel
    material      data
    ground        config  spec  tree  storage  terminal  cli

Importing this package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that has it; a command's module is itself callable (`cli.CommandModule`)
_PUBLIC = {
    "load_config": "jaxtune.config",
    "Config": "jaxtune.config",
    "ConfigError": "jaxtune.config",
    "DataError": "jaxtune.config",
    "ModelError": "jaxtune.config",
    "Diverged": "jaxtune.config",
    "JaxtuneError": "jaxtune.config",
    "Callback": "jaxtune.api.callbacks",
    "CallbackError": "jaxtune.api.callbacks",
    "STOP": "jaxtune.api.callbacks",
    "load_model": "jaxtune.api.model",
}
_COMMANDS = ("train", "evaluate", "preview", "plan")

if TYPE_CHECKING:
    from jaxtune.api.callbacks import STOP as STOP
    from jaxtune.api.callbacks import Callback as Callback
    from jaxtune.api.callbacks import CallbackError as CallbackError
    from jaxtune.api.evaluate import evaluate as evaluate
    from jaxtune.api.model import load_model as load_model
    from jaxtune.api.plan import plan as plan
    from jaxtune.api.preview import preview as preview
    from jaxtune.api.train import train as train
    from jaxtune.config import Config as Config
    from jaxtune.config import ConfigError as ConfigError
    from jaxtune.config import DataError as DataError
    from jaxtune.config import Diverged as Diverged
    from jaxtune.config import JaxtuneError as JaxtuneError
    from jaxtune.config import ModelError as ModelError
    from jaxtune.config import load_config as load_config


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return importlib.import_module(f"jaxtune.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'jaxtune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, *_COMMANDS])
