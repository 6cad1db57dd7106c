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
    """Answer, and write the answers to `output`; only a conversation prints.

    Raises: ConfigError, DataError, ModelError.
    """
    from jaxtune.api.chat import chat

    options = options or ChatOptions()
    result = chat(config, options)
    if options.prompts is not None and options.output is not None:
        _write(options.output, _lines(result))
        cli.note(f"answers: {options.output} ({len(result.answers)})")
    return result


def _run_and_print(config: Config, options: ChatOptions) -> None:
    result = run(config, options)
    if options.prompt is not None:
        (row,) = result.answers
        if "base" in row:
            print(f"base: {printable(row['base']['response'])}\ntuned: ", end="")
        print(printable(row["response"]))
    elif options.prompts is not None and options.output is None:
        print(_lines(result), end="")


def main(argv: list[str] | None = None) -> int:
    return cli.execute("chat", __doc__, ChatOptions, _run_and_print, argv)


def _lines(result: ChatResult) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.answers)


def _write(output: str, text: str) -> None:
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {output}: cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    sys.exit(main())
