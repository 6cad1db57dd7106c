"""Measure a model on a data set: loss, perplexity, token accuracy, and its answers.

    python -m jaxtune.evaluate --model_name_or_path DIR --dataset FILE [--generate N] [--base DIR]

Evaluates on `--dataset`, else on the config's eval_datasets, its eval_split, or its datasets.
`--generate N` answers the first N questions of each data set and compares with the answers there;
`--base` does everything with a second model and says which differences are more than chance;
`--judge` asks a third one which answers are better. docs/evaluate.md says what each figure means.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from jaxtune import cli
from jaxtune.config import Config
from jaxtune.evaluation.options import EvaluateOptions
from jaxtune.parallel import processes

if TYPE_CHECKING:
    from jaxtune.api.evaluate import EvaluateResult


def run(config: Config, options: EvaluateOptions | None = None) -> EvaluateResult:
    """Evaluate and print nothing. Raises `ConfigError`, `DataError` and `ModelError`."""
    from jaxtune.api.evaluate import evaluate_model

    return evaluate_model(config, options or EvaluateOptions())


def _run_and_print(config: Config, options: EvaluateOptions) -> None:
    result = run(config, options)
    if processes.is_first():
        as_json = json.dumps(result.scores, ensure_ascii=False, allow_nan=False)
        print(as_json if options.as_json else result)


def main(argv: list[str] | None = None) -> int:
    return cli.execute("evaluate", __doc__, EvaluateOptions, _run_and_print, argv)


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
