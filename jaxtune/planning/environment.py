"""The environment in which the TPU compiler works without a TPU. Imports no JAX."""

from __future__ import annotations

import os
import sys

from jaxtune.parallel.chips import set_compiler_flags

# The TPU compiler asks the metadata server of a cloud machine, unless these say what it is.
_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # need not be what is compiled for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second plan beside this one aborts
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def set_environment() -> None:
    """Set the compiler's variables; before JAX is imported, also that it uses the CPU alone.

    Where JAX has been imported already (a notebook) it keeps its devices.
    """
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    set_compiler_flags()
