"""A conversation with a model, in the terminal or from a file of prompts.

    python -m jaxtune.chat --model_name_or_path DIR                       a conversation
    python -m jaxtune.chat --model_name_or_path DIR --prompt TEXT         one answer on stdout
    python -m jaxtune.chat --model_name_or_path DIR --prompts FILE.jsonl --output OUT.jsonl

    python -m jaxtune.chat --model_name_or_path DIR --serve :8000         a server and its page

DIR is a folder in Hugging Face format, a run directory, a checkpoint or an adapter. Answers are
greedy unless a temperature is given. `--base DIR` asks a second model the same. docs/chat.md has
the commands of the conversation, and what the server promises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import cli
from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, DataError
from jaxtune.parallel import memory

if TYPE_CHECKING:
    from jaxtune.data.schema import Conversation
    from jaxtune.inference.generate import Generation
    from jaxtune.inference.load import Model, TextCodec
    from jaxtune.repl.models import Settings
    from jaxtune.server.run import Taken


_KINDS = {bool: "true or false", int: "a number", float: "a number"}  # of JSON, beside objects


class ChatOptions(cli.Options):
    prompt: str | None = Field(None, description="ask this and leave")
    prompts: str | None = Field(
        None, description='.jsonl file, each line with "prompt" or "messages"'
    )
    output: str | None = Field(None, description="where the answers to --prompts go, not stdout")
    max_new_tokens: int = Field(512, ge=1, description="longest answer, in tokens")
    base: str | None = Field(None, description="a second model, asked the same")
    temperature: float = Field(
        0.0, ge=0, description="0 is greedy; 1 draws as the model says; above, more widely"
    )
    top_k: int = Field(0, ge=0, description="draws among the N likeliest tokens; 0 is all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draws among the likeliest tokens that make up this share"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1 makes tokens that were said less likely; 1 is off"
    )
    sample_seed: int = Field(
        0,
        ge=0,
        description="the same seed draws the same answers, however many are made at once; a server "
        "that is given none draws one for each request",
    )
    history: str | None = Field(
        None, description="file of the lines typed, read and written; none is kept otherwise"
    )
    serve: str | None = Field(
        None,
        description="[HOST]:PORT of an OpenAI-compatible server and a page to talk to; without a "
        "host only this machine reaches it; needs pip install 'jaxtune[serve]'",
    )
    serve_slots: int = Field(
        8, ge=1, description="answers that each model makes at a time; each takes memory"
    )
    serve_queue: int = Field(
        64, ge=1, description="requests that may wait for one; more are refused with 429"
    )
    serve_length: int | None = Field(
        None,
        ge=2,
        description="longest prompt and answer together, in tokens; as long as the "
        "model takes and memory allows unless given",
    )
    serve_seconds: float = Field(
        300.0, gt=0, description="longest time from a request to the end of its answer"
    )


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
    taken = _take(options)
    smaller = (
        f"Set dtype bfloat16, a smaller --max_new_tokens (now {options.max_new_tokens}), or "
        f"more devices along mesh.fsdp (now {config.mesh.fsdp}; -1 is all there are)."
    )
    try:
        with memory.explained(smaller):
            return _run(config, options, asked, taken)
    finally:
        if taken is not None:
            taken.socket.close()


def _run(
    config: Config, options: ChatOptions, asked: list[Asked] | None, taken: Taken | None
) -> Result:
    from jaxtune.inference.load import check_base, load_model, open_codec, open_mesh, resolved

    config = resolved(config)
    words = open_codec(config)
    mesh = open_mesh(config)
    assert config.model_name_or_path is not None
    names = {"tuned" if options.base else "model": config.model_name_or_path}
    if options.base is not None:
        check_base(options.base, words)
        names = {"base": options.base, **names}
    # For a file of prompts adapters are merged, which answers faster; others turn them off and on.
    merge = asked is not None
    models = {n: load_model(name, config, words, mesh, merge=merge) for n, name in names.items()}

    if taken is not None:
        _serve(models, words, options, taken)
        return Result([])
    if asked is None:
        _converse(models, words, options)
        return Result([])
    rows = _rows(models, words, asked, options)
    if options.prompt is not None:
        _print_answers(rows[0])
    else:
        _write(rows, options.output)
    return Result(rows)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return cli.execute("chat", description, ChatOptions, run, argv)


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
    from jaxtune.data.readers import EmptyError

    try:
        for record in sources.read(sources.find(path)):
            yield _prompt_of(record.where, record.fields)
    except EmptyError:
        raise DataError(
            f"{path}: there is no prompt in it. Expected an object for each, with 'prompt' (text) "
            "or 'messages' (a list)."
        ) from None


def _prompt_of(where: str, fields: Mapping[str, Any]) -> Asked:
    from jaxtune.data.formats import to_noun
    from jaxtune.data.schema import Conversation, Message

    prompt = fields.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return Asked(prompt, Conversation((Message("user", prompt),)))
    given = prompt if isinstance(prompt, list) else fields.get("messages")
    if given is None:
        if not isinstance(prompt, str | None):
            raise DataError(
                f"{where}: 'prompt' is {_KINDS.get(type(prompt), 'an object')}; expected text, or "
                "a list of messages."
            )
        empty = isinstance(prompt, str) and not prompt.strip()
        raise DataError(
            f"{where}: expected 'prompt' (text) or 'messages' (a list); the record has: "
            f"{', '.join(fields) or 'nothing'}{', prompt empty' if empty else ''}."
        )
    tools = {"tools": fields["tools"]} if fields.get("tools") else {}
    noun = to_noun("messages", {"messages": given, **tools}, {}, where)
    if not isinstance(noun, Conversation):
        raise DataError(f"{where}: {', '.join(filter(None, noun))}.")
    if noun.messages[-1].role == "assistant":
        raise DataError(f"{where}: ends with an answer. End it with what is to be answered.")
    return Asked(given, noun)


def _rows(
    models: Mapping[str, Model], words: TextCodec, asked: list[Asked], options: ChatOptions
) -> list[Mapping[str, Any]]:
    """One object per prompt, in order; the base's answer under "base"."""
    from jaxtune.inference.generate import generate, prompt_ids
    from jaxtune.repl.models import sampling

    by_model = {
        label: generate(
            model,
            words,
            [prompt_ids(model, words, prompt.conversation) for prompt in asked],
            max_new_tokens=options.max_new_tokens,
            sampling=sampling(_drawn(options)),
        )
        for label, model in models.items()
    }
    *base, answers = by_model.values()
    rows: list[Mapping[str, Any]] = []
    for number, prompt in enumerate(asked):
        beside = {"base": _as_object(base[0][number])} if base else {}
        rows.append({"prompt": prompt.given, **_as_object(answers[number]), **beside})
    return rows


def _as_object(found: Generation) -> dict[str, Any]:
    return {"response": found.text, "stopped": found.stopped, "tokens": found.tokens}


def _print_answers(row: Mapping[str, Any]) -> None:
    from jaxtune.terminal.text import printable

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


# -- the conversation, and the server ------------------------------------------------------------


def _drawn(options: ChatOptions) -> Settings:
    from jaxtune.repl.models import Settings

    return Settings(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.sample_seed,
        max_new_tokens=options.max_new_tokens,
    )


def _converse(models: Mapping[str, Model], words: TextCodec, options: ChatOptions) -> None:
    from jaxtune.repl.models import voices
    from jaxtune.repl.repl import converse

    converse(voices(models, words), _drawn(options), history=options.history)


def _take(options: ChatOptions) -> Taken | None:
    """The port, before any model is loaded; None where none is asked for."""
    if options.serve is None:
        return None
    from jaxtune.server.run import take

    for name in ("prompt", "prompts", "history"):
        if getattr(options, name) is not None:
            raise ConfigError(f"serve and {name} exclude each other; give one.")
    return take(options.serve)


def _serve(
    models: Mapping[str, Model], words: TextCodec, options: ChatOptions, taken: Taken
) -> None:
    from jaxtune.repl.models import sampling
    from jaxtune.server.app import Defaults
    from jaxtune.server.scheduler import Limits
    from jaxtune.server.start import start

    limits = Limits(
        slots=options.serve_slots, queue=options.serve_queue, seconds=options.serve_seconds
    )
    seeded = "sample_seed" in options.model_fields_set
    defaults = Defaults(sampling(_drawn(options)), options.max_new_tokens, seeded)
    start(models, words, defaults, limits, taken, length=options.serve_length)


if __name__ == "__main__":
    sys.exit(main())
