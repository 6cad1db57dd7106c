"""A device without memory to give is a message with what to do; other errors stay as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxtune.config import ConfigError
from jaxtune.parallel import memory


def test_xla_is_quoted_with_what_it_wanted() -> None:
    with pytest.raises(ConfigError) as error, memory.explained("Set less."):
        jnp.zeros(2**45).block_until_ready()
    assert str(error.value) == (
        "out of memory on a device: RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 "
        "bytes. Set less."
    )
    assert memory.is_exhausted(error.value)
    assert not memory.is_exhausted(ConfigError("a mistake"))


@pytest.mark.parametrize(
    ("said", "explained"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 33.61G of 31.25G hbm.\nmore", True),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB", True),
        ("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory: 20M", False),
        ("RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)", False),
        ("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes.", True),
        ("INTERNAL: out of memory", False),
    ],
)  # fmt: skip
def test_what_is_meant_is_the_memory_of_devices(said: str, explained: bool) -> None:
    wanted = ConfigError if explained else jax.errors.JaxRuntimeError
    with pytest.raises(wanted) as error, memory.explained("Set less."):
        raise jax.errors.JaxRuntimeError(said)
    assert said.partition("\n")[0].rstrip(".") in str(error.value)
    assert ("more" in str(error.value)) is False
    assert memory.is_exhausted(error.value) is explained
