"""A conversation with a model, in the terminal or from a file of prompts.

    python -m jaxtune.chat --model_name_or_path DIR                       a conversation
    python -m jaxtune.chat --model_name_or_path DIR --prompt TEXT         one answer on stdout
    python -m jaxtune.chat --model_name_or_path DIR --prompts FILE.jsonl --output OUT.jsonl

DIR is a folder in Hugging Face format or a run directory. Answers are greedy. `--base DIR` asks a
second model the same.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import command
from jaxtune.command import note
from jaxtune.config import Config, ConfigError, DataError

if TYPE_CHECKING:
    from jaxtune.data.schema import Conversation, Message
    from jaxtune.inference import Answer, Model, Words

_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C ends an answer"


class ChatOptions(command.Options):
    prompt: str | None = Field(None, description="ask this and leave")
    prompts: str | None = Field(
        None, description='.jsonl file, each line with "prompt" or "messages"'
    )
    output: str | None = Field(None, description="where the answers to --prompts go, not stdout")
    max_new_tokens: int = Field(512, ge=1, description="longest answer, in tokens")
    base: str | None = Field(None, description="a second model, asked the same")


class Result(NamedTuple):
    """The rows that `--prompts` and `--prompt` give; empty after a conversation."""

    answers: list[Mapping[str, Any]]


class Asked(NamedTuple):
    """A prompt as it was given, and as a conversation."""

    given: Any
    conversation: Conversation


def run(config: Config, options: ChatOptions | None = None) -> Result:
    """Answers on stdout or in `output`. Raises `ConfigError`, `DataError` and `ModelError`."""
    options = options or ChatOptions()
    asked = _asked(options)
    _check_output(options.output)

    from jaxtune.inference import check_base, load_model, open_mesh, open_words, resolved

    config = resolved(config)
    words = open_words(config)
    mesh = open_mesh(config)
    assert config.model_name_or_path is not None
    names = {"tuned" if options.base else "model": config.model_name_or_path}
    if options.base is not None:
        check_base(options.base, words)
        names = {"base": options.base, **names}
    models = {label: load_model(name, config, words, mesh) for label, name in names.items()}

    if asked is None:
        _converse(models, words, options.max_new_tokens)
        return Result([])
    rows = _rows(models, words, asked, options.max_new_tokens)
    if options.prompt is not None:
        _print_answers(rows[0])
    else:
        _write(rows, options.output)
    return Result(rows)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return command.execute("chat", description, ChatOptions, run, argv)


# -- prompts in, answers out ---------------------------------------------------------------------


def _asked(options: ChatOptions) -> list[Asked] | None:
    """What is asked; None for a conversation."""
    from jaxtune.data.schema import Conversation, Message

    if options.prompt is not None and options.prompts is not None:
        raise ConfigError("prompt and prompts exclude each other; give one.")
    if options.output is not None and options.prompts is None:
        raise ConfigError("output: is for the answers to --prompts FILE.jsonl. Give that, too.")
    if options.prompt is not None:
        if not options.prompt.strip():
            raise ConfigError("prompt: is empty; there is nothing to answer.")
        return [Asked(options.prompt, Conversation((Message("user", options.prompt),)))]
    return None if options.prompts is None else list(_read(options.prompts))


def _read(path: str) -> Iterator[Asked]:
    from jaxtune.data import sources
    from jaxtune.data.formats import to_noun
    from jaxtune.data.schema import Conversation, Message

    for record in sources.read(sources.find(path)):
        where, fields = record.where, record.fields
        prompt = fields.get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            yield Asked(prompt, Conversation((Message("user", prompt),)))
            continue
        given = prompt if isinstance(prompt, list) else fields.get("messages")
        if given is None:
            raise DataError(
                f"{where}: expected 'prompt' (text) or 'messages' (a list); the record has: "
                f"{', '.join(fields) or 'nothing'}{', prompt empty' if prompt == '' else ''}."
            )
        tools = {"tools": fields["tools"]} if fields.get("tools") else {}
        noun = to_noun("messages", {"messages": given, **tools}, {}, where)
        if not isinstance(noun, Conversation):
            raise DataError(f"{where}: {': '.join(filter(None, noun))}.")
        if noun.messages[-1].role == "assistant":
            raise DataError(f"{where}: ends with an answer. End it with what is to be answered.")
        yield Asked(given, noun)


def _rows(
    models: Mapping[str, Model], words: Words, asked: list[Asked], max_new_tokens: int
) -> list[Mapping[str, Any]]:
    """One object per prompt, in order; the base's answer under "base"."""
    from jaxtune.inference import answer, prompt_ids

    by_model = {
        label: answer(
            model,
            words,
            [prompt_ids(model, words, prompt.conversation) for prompt in asked],
            max_new_tokens=max_new_tokens,
        )
        for label, model in models.items()
    }
    *base, answers = by_model.values()
    rows: list[Mapping[str, Any]] = []
    for number, prompt in enumerate(asked):
        beside = {"base": _as_object(base[0][number])} if base else {}
        rows.append({"prompt": prompt.given, **_as_object(answers[number]), **beside})
    return rows


def _as_object(found: Answer) -> dict[str, Any]:
    return {"response": found.text, "stopped": found.stopped, "tokens": found.tokens}


def _print_answers(row: Mapping[str, Any]) -> None:
    from jaxtune.draw.terminal import printable

    if "base" in row:
        print(f"base: {printable(row['base']['response'])}")
        print(f"tuned: {printable(row['response'])}")
    else:
        print(printable(row["response"]))


def _check_output(output: str | None) -> None:
    """Before the model is loaded, not after the answers are made."""
    if output is None:
        return
    if not Path(output).parent.is_dir():
        raise ConfigError(f"output {output}: there is no folder {Path(output).parent}. Make it.")
    if Path(output).is_dir():
        raise ConfigError(f"output {output}: is a folder; expected a file to write.")


def _write(rows: list[Mapping[str, Any]], output: str | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        print(text, end="")
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {output}: cannot be written: {error.strerror}.") from None
    note(f"answers: {output} ({len(rows)})")


# -- the conversation ----------------------------------------------------------------------------


def _converse(models: Mapping[str, Model], words: Words, max_new_tokens: int) -> None:
    """Reads a line, streams each model's answer; every model remembers its own conversation."""
    from jaxtune.data.schema import Message

    fresh: dict[str, tuple[Message, ...]] = dict.fromkeys(models, ())
    history = dict(fresh)
    note(_HELP)
    for line in _lines():
        if line == "/reset":
            history = dict(fresh)
            note("forgotten")
            continue
        for label, model in models.items():
            messages = (*history[label], Message("user", line))
            if len(models) > 1:
                print(f"{label}: ", end="", flush=True)
            try:
                said = _stream(model, words, messages, max_new_tokens)
            except DataError as error:
                note(f"{error} /reset begins a new conversation.")
                continue
            history[label] = (*messages, Message("assistant", said))


def _lines() -> Iterator[str]:
    """What is typed, until /quit or the end of input."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (line := input(prompt).strip()) != "/quit":
            if line:
                yield line


def _stream(
    model: Model,
    words: Words,
    messages: tuple[Message, ...],
    max_new_tokens: int,
    show: Callable[[str], None] = lambda piece: print(piece, end="", flush=True),
) -> str:
    """Shows the answer as it is made and returns it; Ctrl-C ends it there."""
    from jaxtune.draw.terminal import printable
    from jaxtune.inference import stream

    said = ""
    pieces = stream(model, words, messages, max_new_tokens=max_new_tokens)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            said += piece
            show(printable(piece))
    show("\n")
    return said


if __name__ == "__main__":
    sys.exit(main())
