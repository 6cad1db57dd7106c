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

from jaxtune import cli
from jaxtune.config import Config
from jaxtune.planning.environment import set_environment
from jaxtune.planning.options import PlanOptions

if TYPE_CHECKING:
    from jaxtune.api.plan import PlanResult


def run(config: Config, options: PlanOptions | None = None) -> PlanResult:
    """Plan and print nothing. Raises `ConfigError`, `DataError` and `ModelError`."""
    set_environment()  # before JAX is imported, whose devices it decides
    from jaxtune.api.plan import run_plan

    return run_plan(config, options or PlanOptions())


def _run_and_print(config: Config, options: PlanOptions) -> None:
    result = run(config, options)
    as_json = json.dumps(result.plan, ensure_ascii=False, allow_nan=False)
    print(as_json if options.as_json else result.text())


def main(argv: list[str] | None = None) -> int:
    return cli.execute("plan", __doc__, PlanOptions, _run_and_print, argv)


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
