"""The tiny model of `tests/model`, for the engine that runs it."""

from model.conftest import params

__all__ = ["params"]
