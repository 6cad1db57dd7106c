"""A checkpoint of a run, or a model folder, written out in Hugging Face format.

    python -m jaxtune.convert RUN_OR_CHECKPOINT OUT_DIR [--step N] [--save_dtype bfloat16]

RUN is a run directory (its newest checkpoint, or that of `--step`), RUN/checkpoints/STEP, a folder
in Hugging Face format, which is saved anew, or an adapter in PEFT's format, which is merged into
its base. `--merge_lora false` writes adapters as a PEFT folder. Flags overrule the run's config.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pydantic import Field

from jaxtune import cli
from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jaxtune.api.convert import ConvertResult


class ConvertOptions(cli.Options):
    run_or_checkpoint: str = Field(description="run directory, checkpoint, model folder or adapter")
    out_dir: str = Field(description="folder to write; an earlier export there is replaced")
    step: int | None = Field(None, ge=1, description="checkpoint to take; default: the newest")
    merge_lora: bool = Field(
        True, description="adapters into the weights; false writes them as a PEFT folder"
    )

    @classmethod
    def positional(cls) -> tuple[str, ...]:
        return ("run_or_checkpoint", "out_dir")


def run(config: Config, options: ConvertOptions | None = None) -> ConvertResult:
    """Raise `ConfigError` and `ModelError`; an earlier export in `out_dir` stays on failure."""
    if options is None:
        raise ConfigError(
            "convert: nothing says what to convert, and where to. Give "
            "ConvertOptions(run_or_checkpoint=..., out_dir=...)."
        )
    from jaxtune.api.convert import convert

    return convert(config, **dict(options))


def main(argv: list[str] | None = None) -> int:
    return cli.execute("convert", __doc__, ConvertOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
