"""The table of chips beside what the TPU compiler itself says of them, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxtune.parallel.chips import CHIPS, parse_slice
from jaxtune.planning.hardware import make_hardware

ROOT = Path(__file__).resolve().parents[2]
SLICES = ("v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8")  # four chips each
# Prints, of each slice, its devices and what a program far too large is refused with.
ASK = """
import json, sys
from jaxtune.planning.environment import set_environment
set_environment()
import jax
from jaxtune.planning.hardware import make_hardware
from jaxtune.parallel.chips import parse_slice
from jaxtune.planning.compile import too_large

def refusal(device):
    where = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**28, 1024), "float32", sharding=where)
    try:
        jax.jit(lambda x: 2 * x, out_shardings=where).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)

for name in sys.argv[1:]:
    there = make_hardware(parse_slice(name), compiles=True)
    limit = too_large(refusal(there.devices[0])).limit
    kinds = sorted({device.device_kind for device in there.devices})
    print(json.dumps([len(there.devices), there.per_chip, kinds, there.limit, limit]))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: the TPU compiler was not asked (pip install .[tpu])")
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *SLICES],
        capture_output=True, text=True, timeout=600, check=False,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(SLICES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", SLICES)
def test_devices_and_memory_are_the_compilers(name: str, said: dict[str, Any]) -> None:
    """The compiler says its limit to a hundredth of a GiB."""
    chip = parse_slice(name).chip
    devices, per_chip, kinds, limit, compilers = said[name]
    assert (devices, per_chip) == (4 * chip.devices, chip.devices)
    assert set(kinds) <= {*chip.kinds}
    assert limit == pytest.approx(compilers, abs=2)  # bytes


@pytest.mark.parametrize("name", SLICES)
def test_stand_ins_are_as_many(name: str) -> None:
    there = make_hardware(parse_slice(name), compiles=False)
    assert there.per_chip == there.slice.chip.devices
    assert there.limit == there.slice.chip.hbm // there.per_chip


def test_a_v4_is_one_device_with_all_of_its_memory() -> None:
    assert (CHIPS["v4"].devices, CHIPS["v4"].mode) == (1, "megacore")
    assert CHIPS["v4"].hbm == int(30.75 * 2**30)
