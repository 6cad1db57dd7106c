"""Plan what a run costs before it is paid for: the real train step, compiled for other hardware.

    python -m jaxtune.plan --config C --topology v5e-16 [--dataset FILE] [--search]

Needs `config.json` of the model and no weights. TPUs are planned with the TPU compiler itself
(`pip install 'jaxtune[tpu]'`, no TPU needed), GPUs and the CPU by arithmetic. docs/plan.md says
what each figure means and how far it can be believed.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from pydantic import Field

from jaxtune import cli
from jaxtune.config import Config
from jaxtune.planning.environment import set_environment

if TYPE_CHECKING:
    from jaxtune.api.plan import PlanResult


class PlanOptions(cli.Options):
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
    search_output: str = Field("plan.yaml", description="where a search writes what it chose")
    price_per_chip_hour: float | None = Field(
        None, gt=0, le=1e9, description="in any currency; adds the price of the run"
    )
    cache: bool = Field(True, description="keep and reuse what the compiler said")
    as_json: bool = Field(False, alias="json", description="one object on stdout")


def run(config: Config, options: PlanOptions | None = None) -> PlanResult:
    """Plan and print nothing. Raises `ConfigError`, `DataError` and `ModelError`."""
    set_environment()  # before JAX is imported, whose devices it decides
    from jaxtune.api.plan import PlanRequest, run_plan

    options = options or PlanOptions()
    return run_plan(config, PlanRequest(**options.model_dump(exclude={"as_json"})))


def _run_and_print(config: Config, options: PlanOptions) -> None:
    result = run(config, options)
    as_json = json.dumps(result.plan, ensure_ascii=False, allow_nan=False)
    print(as_json if options.as_json else result.text())


def main(argv: list[str] | None = None) -> int:
    return cli.execute("plan", __doc__, PlanOptions, _run_and_print, argv)


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
