"""A conversation with a model, in the terminal or from a file of prompts.

    python -m jaxtune.chat --model_name_or_path DIR                       a conversation
    python -m jaxtune.chat --model_name_or_path DIR --prompt TEXT         one answer on stdout
    python -m jaxtune.chat --model_name_or_path DIR --prompts FILE.jsonl --output OUT.jsonl

    python -m jaxtune.chat --model_name_or_path DIR --serve :8000         a server and its page

DIR is a folder in Hugging Face format, a run directory, a checkpoint or an adapter. Answers are
greedy unless a temperature is given. `--base DIR` puts the same to a second model. docs/chat.md has
the commands of the conversation, and what the server promises.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtune import cli
from jaxtune.api.chat_options import ChatOptions
from jaxtune.config import Config, ConfigError
from jaxtune.terminal.text import printable

if TYPE_CHECKING:
    from jaxtune.api.chat import ChatResult


def run(config: Config, options: ChatOptions | None = None) -> ChatResult:
    """Print answers or write them to `output`. Raises: ConfigError, DataError, ModelError."""
    from jaxtune.api.chat import chat

    options = options or ChatOptions()
    result = chat(config, options)
    if options.prompt is not None or options.prompts is not None:
        _show(result, options)
    return result


def main(argv: list[str] | None = None) -> int:
    return cli.execute("chat", __doc__, ChatOptions, run, argv)


def _show(result: ChatResult, options: ChatOptions) -> None:
    rows = result.answers
    if options.prompt is not None:
        (row,) = rows
        if "base" in row:
            print(f"base: {printable(row['base']['response'])}\ntuned: ", end="")
        print(printable(row["response"]))
        return
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.output is None:
        print(text, end="")
        return
    try:
        Path(options.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output {options.output}: cannot be written: {error.strerror}."
        ) from None
    cli.note(f"answers: {options.output} ({len(rows)})")


if __name__ == "__main__":
    sys.exit(main())
