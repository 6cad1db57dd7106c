"""The memory of this machine, and the error where a device's does not suffice. Imports no JAX: it
knows the error by its name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxtune.config import ConfigError

_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
# The second is what several devices of a CPU say, as an internal error.
_SAID = ("RESOURCE_EXHAUSTED", "Out of memory allocating")


def machine_bytes() -> int:
    """Return all that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int | None:
    """Return what a new process could use of it; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return None


@contextlib.contextmanager
def explained(advice: str) -> Iterator[None]:
    """Make a `ConfigError` of XLA's error: how much it wanted, in its own words, and `advice`."""
    try:
        yield
    except Exception as error:
        if (message := _exhausted(error)) is None:
            raise
        raise ConfigError(f"out of memory on a device: {message.rstrip('.')}. {advice}") from error


def is_exhausted(error: BaseException | None) -> bool:
    """Test if an error, or its cause, is that a device's memory is full."""
    while error is not None:
        if _exhausted(error) is not None:
            return True
        error = error.__cause__ or error.__context__
    return False


def _exhausted(error: BaseException) -> str | None:
    """Return the first line of XLA's message on a full memory; None for other messages.

    Messages between hosts, or a kernel's scratch memory, which no setting makes smaller.
    """
    if type(error).__name__ not in _ERRORS or not any(each in str(error) for each in _SAID):
        return None
    message = str(error).partition("\n")[0]
    about = any(word in message.lower() for word in ("memory", "alloc", "hbm"))
    return message if about and "vmem" not in message.lower() else None
