"""The options of a plan: flags of the command, keyword arguments of `jaxtune.plan`."""

from __future__ import annotations

from pydantic import Field

from jaxtune import cli


class PlanOptions(cli.Options):
    """A choice of hardware, and of what to find out about it."""

    topology: str | None = Field(
        None,
        description="v5e-16, v6e-8, v5p-128, v4-8, tpu7x-8, a shape (v5e:4x4), several slices "
        "(2xv5e-256), GPUs of one machine (h100-8), or cpu",
    )
    compile: bool = Field(
        True, description="false = arithmetic alone, in seconds; GPUs and cpu always"
    )
    verify: bool = Field(
        False, description="where it does not fit, compile the changes proposed until one fits"
    )
    search: bool = Field(
        False, description="walk mesh, batch and gradient_checkpointing for the fastest that fits"
    )
    search_minutes: float = Field(20.0, gt=0, description="time for compiling in a search")
    search_output: str | None = Field(
        "plan.yaml", description="where a search writes what it chose"
    )
    price_per_chip_hour: float | None = Field(
        None, gt=0, le=1e9, description="in any currency; adds the price of the run"
    )
    cache: bool = Field(True, description="keep and reuse the answers of the compiler")
    as_json: bool = Field(False, alias="json", description="one object on stdout")
