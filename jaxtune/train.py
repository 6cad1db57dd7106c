"""Hugging Face model in, fine-tuned Hugging Face model out.

    python -m jaxtune.train --model_name_or_path MODEL --dataset FILE --output_dir OUT

`jaxtune.api.train` does the work; nothing slow is imported before `run`, so that `--help` is quick.
"""

from __future__ import annotations

import sys

from pydantic import Field

from jaxtune import cli
from jaxtune.api.results import TrainResult
from jaxtune.config import Config

__all__ = ["TrainOptions", "TrainResult", "main", "run"]


class TrainOptions(cli.Options):
    replay_step: int | None = Field(
        None,
        ge=1,
        description="go to this step once more, from the checkpoint before it, and write its "
        "loss by row and gradient norms into OUT/step-N.json; trains and saves nothing",
    )


def run(config: Config, options: TrainOptions | None = None) -> TrainResult:
    """Train, checkpoint and export; with `replay_step` go to one step again. Print nothing.

    Raises: ConfigError, DataError, ModelError, Diverged; `cli.Stopped` after saving on SIGTERM or
    SIGINT.
    """
    from jaxtune.api.train import replay, train

    if options is None or options.replay_step is None:
        return train(config)
    return replay(config, options.replay_step)


def _run_and_print(config: Config, options: TrainOptions) -> None:
    if summary := run(config, options).replay_summary:
        print(summary)


def main(argv: list[str] | None = None) -> int:
    return cli.execute("train", __doc__, TrainOptions, _run_and_print, argv)


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
