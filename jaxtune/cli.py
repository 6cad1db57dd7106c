"""argv in, (Config, a command's options) out; exceptions in, exit codes out.

Every command is two functions: `run(config, options)`, which returns its result, and `main(argv)`
for the shell, which is `execute(...)`. This module knows no JAX, so `--help` is quick.

Exit codes: 0 done, 2 bad input, 3 diverged, 75 stopped after saving, with a lost host or a store
that cannot be reached, 130 interrupted without saving, 1 a bug (with its traceback).
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo

from jaxtune.config import (
    ALIASES,
    YAML_FAILS,
    Config,
    ConfigError,
    Diverged,
    JaxtuneError,
    entry_type,
    field_name,
    field_names,
    load,
    nearest,
    parse_model,
)
from jaxtune.storage import object_store
from jaxtune.storage.safe_read import shown

BUG = 1
BAD_INPUT = 2
DIVERGED = 3
STOPPED = 75  # EX_TEMPFAIL: run the same command again
INTERRUPTED = 130  # as shells say of SIGINT
DISK_REFUSES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    errno.EFBIG,
)


class CommandModule(types.ModuleType):
    """A command's module that can be called: `jaxtune.train(config, ...)` is `api.train.train`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(f"jaxtune.api.{name}"), name)(*args, **kwargs)


class Options(pydantic.BaseModel):
    """A command's own flags, next to the config's; `positional` names those without a flag.

    A field whose name Python or pydantic wants for itself has its flag as alias:
    `as_json: bool = Field(False, alias="json", description=...)`.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @classmethod
    def positional(cls) -> tuple[str, ...]:
        return ()


O = TypeVar("O", bound=Options)


class Stopped(Exception):
    """A training that a signal stopped and that has saved; the same command resumes."""


class ThisProcess:
    """A process's place among those of a run, set by `heartbeat` once they have joined.

    `quiet` processes make no notes; their errors begin with `name`. `leave(code, message)` ends a
    process that fails, and tells the others. `is_command`: a command runs, not a call from Python.
    """

    is_command = False
    quiet = False
    name = ""
    leave: Callable[[int, str], None] | None = None


def shows_notes() -> bool:
    """Tell whether somebody at a terminal reads what this process says."""
    return ThisProcess.is_command and not ThisProcess.quiet


def note(message: str) -> None:
    """Print a line for the person at the terminal, on stderr: stdout is for results."""
    if shows_notes():
        emit(message)


def emit(message: str) -> None:
    """Print a message from every process, not the first alone."""
    print(message, file=sys.stderr, flush=True)


def execute(
    command: str,
    description: str | None,
    options: type[O],
    run: Callable[[Config, O], Any],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn what went wrong into an exit code and one message on stderr.

    `description` is a module's docstring, of which `--help` shows the first paragraph.
    """
    code, message, together = 0, "", False
    before, ThisProcess.is_command = ThisProcess.is_command, True
    try:
        config, chosen = parse(
            sys.argv[1:] if argv is None else argv,
            command,
            (description or "").split("\n\n")[0],
            options,
        )
        run(config, chosen)
    except Diverged as error:
        code, message = DIVERGED, str(error)
    except JaxtuneError as error:
        code, message = STOPPED if error.passes else BAD_INPUT, _harmless(str(error))
    except Stopped as error:
        code, message, together = STOPPED, str(error), True
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted."
    except BrokenPipeError:  # the reader of stdout left (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_REFUSES:
            message = f"{error.filename or 'a file'}: cannot be written: {error.strerror}."
            code = BAD_INPUT
        elif ThisProcess.leave is None:
            raise
        else:
            traceback.print_exc()
            code, message = BUG, f"{type(error).__name__}: {error}"
    finally:
        ThisProcess.is_command = before
    if code:
        emit(f"jaxtune {command}: {ThisProcess.name}{message}")
        if ThisProcess.leave is not None and not together:
            ThisProcess.leave(code, message)
    return code


def _harmless(text: str) -> str:
    """Spell out what would steer the terminal: a message may quote a stranger's file."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def parse(
    argv: Sequence[str], command: str, description: str, options: type[O]
) -> tuple[Config, O]:
    """Parse `--config FILE`, every config field, and the command's own flags.

    `--name value`, `--name=value`, `-` and `_` alike; a flag alone means true; lists take several
    values or one YAML value (`--datasets '[{path: a.jsonl, limit: 10}]'`; see `_strings`); mappings
    one YAML value, or entry by entry (`--columns.output answer`). `none` unsets a config field; in
    a command's own text it is a word. Raises `ConfigError` with the nearest name for an unknown
    flag.
    """
    own = {field.alias or name: field for name, field in options.model_fields.items()}
    positional = options.positional()
    flags = {**field_names(Config), **{n: f for n, f in own.items() if n not in positional}}
    words, loose, typed, entries = _split(argv, {*flags, *ALIASES})
    if len(loose) > len(positional):
        extra = loose[len(positional)]
        raise ConfigError(f"flags: '{extra}' belongs to no flag. Every value needs its --name.")
    usage = " ".join(["jaxtune", command, *(name.upper() for name in positional)])
    typed_values = _read_with_tyro(words, usage, description, flags)
    values = {
        name: _value(name, texts, flags.get(name), own=name in own)
        for name, texts in typed_values.items()
    }
    values |= {name: _entry(name, texts) for name, texts in entries.items()}

    chosen: dict[str, Any] = dict(zip(positional, loose, strict=False))
    for name in positional:
        if name not in chosen and own[name].is_required():
            raise ConfigError(f"{name.upper()} is missing. Usage: {usage} [--flags]")
    chosen.update({name: values.pop(name) for name in own if name in values})
    columns = typed_values.get("columns", [""])  # `preview` has some of its own, which are a list
    if "columns" in chosen and columns[0].startswith("{"):
        del chosen["columns"]
        values = {"columns": _yaml("columns", columns[0]), **values}
    path = values.pop("config", None)
    if path is not None and object_store.is_url(path):
        path = str(object_store.cached([_object(path)]) / object_store.name_of(path))
    # Names go on as they were typed: `load` translates aliases and their values, in one place.
    config = load(path, {typed.get(name, name): value for name, value in values.items()}, note=note)
    return config, parse_model(options, chosen, where="flags")


def _object(url: str) -> object_store.Item:
    item = object_store.find(url)
    if item is None:
        raise ConfigError(f"{url}: cannot read the config: there is no such object.")
    return item


class _Words(NamedTuple):
    """The words of argv, by what they belong to."""

    flags: list[str]  # flags with their values
    loose: list[str]  # before the first flag
    typed: dict[str, str]  # field -> the name that was typed
    entries: dict[str, list[str]]  # of fields that are mappings: dotted name -> values


def _split(argv: Sequence[str], known: set[str]) -> _Words:
    split = _Words([], [], {}, {})
    target = split.loose
    for word in argv:
        if word in ("-h", "--help"):
            target = split.flags
            target.append("--help")
        elif re.match(r"--[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            name = field_name(flag[2:])
            is_entry = entry_type(name) is not None
            if name not in known and not is_entry and name != "config":
                raise ConfigError(f"flags: unknown flag '{flag}'.{nearest(name, [*known])}")
            field = ALIASES[name].name if name in ALIASES else name
            if field in split.typed:
                raise ConfigError(f"flags: '--{split.typed[field]}' and '{flag}' both set {field}.")
            split.typed[field] = name
            target = split.entries.setdefault(field, []) if is_entry else split.flags
            target.extend(([] if is_entry else ["--" + field]) + ([value] if equals else []))
        else:
            target.append(word)
    return split


def _entry(name: str, values: list[str]) -> Any:
    """Make the value of one entry of a mapping, such as `columns.output`."""
    if not values:
        raise ConfigError(f"flags: --{name} needs a value.")
    if len(values) > 1:
        raise ConfigError(f"flags: --{name} takes one value; got {' '.join(values)!r}. Quote it.")
    return values[0] if entry_type(name) is str else _yaml(name, values[0])


def _read_with_tyro(
    words: list[str], usage: str, description: str, flags: Mapping[str, FieldInfo]
) -> dict[str, list[str]]:
    """Map the flags that are set to the words after them."""
    import tyro  # here, so that a mistyped flag is answered without it

    fields: list[tuple[str, Any, Any]] = [("config", _flag("config", "FILE", "YAML config"), None)]
    for name, field in flags.items():
        help_text = f"{field.description or ''}{_lists(field)}{_choices_and_default(field)}"
        fields.append((name.replace(".", "__"), _flag(name, _kind(field), help_text), None))
    namespace = dataclasses.make_dataclass("Flags", fields)
    parsed: Any = tyro.cli(
        namespace, args=words, prog=usage, description=description, use_underscores=True
    )
    values = {name: getattr(parsed, name.replace(".", "__")) for name in ["config", *flags]}
    return {name: texts for name, texts in values.items() if texts is not None}


def _flag(name: str, metavar: str, help_text: str) -> Any:
    import tyro

    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda values: list(values),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    arg = tyro.conf.arg(name=name, help=help_text, help_behavior_hint="", prefix_name=False)
    return Annotated[Any, spec, arg]


# A field's type, read from its annotation -> what `--help` calls its value.
_KINDS = {
    "Literal": "NAME", "DatasetConfig": "YAML", "dict": "YAML", "tuple": "TEXT...",
    "bool": "BOOL", "float": "FLOAT", "int": "INT",
}  # fmt: skip


def _kind(field: FieldInfo) -> str:
    text = str(field.annotation)
    return next((kind for word, kind in _KINDS.items() if word in text), "TEXT")


def _lists(field: FieldInfo) -> str:
    if typing.get_origin(field.annotation) is dict:
        return "; also entry by entry, with a dot: --name.key value"
    if not _holds_strings(str(field.annotation)):
        return ""
    return "; several words, or one YAML list with a comma or quotes: '[a, b]', '[\"a\"]'"


def _choices_and_default(field: FieldInfo) -> str:
    options = typing.get_args(field.annotation)
    options += tuple(c for option in options for c in typing.get_args(option))  # `Literal | None`
    choices = [c for c in options if isinstance(c, str)]
    default = "none" if field.default in (None, (), {}) else field.default
    return (f" [{' | '.join(choices)}]" if choices else "") + f" (default: {default})"


def _value(name: str, values: list[str], field: FieldInfo | None, *, own: bool) -> Any:
    """Make one value of the words after a flag, still text where pydantic gives it its type.

    No word is true; a structured field is YAML. `own` flags are the command's.
    """
    text = "str" if field is None else str(field.annotation)
    if not values:
        if "bool" in text or name == "gradient_checkpointing":
            return True
        raise ConfigError(f"flags: --{name} needs a value.")
    if _holds_strings(text):
        return _strings(name, values)
    if "tuple[" in text and not (len(values) == 1 and values[0].startswith(("[", "{"))):
        return values[0] if "DatasetConfig" in text and len(values) == 1 else values
    if len(values) > 1:
        raise ConfigError(f"flags: --{name} takes one value; got {' '.join(values)!r}. Quote it.")
    if "tuple[" in text or "dict[" in text:
        return _yaml(name, values[0])
    if own and "str" in text:
        return values[0]
    return None if values[0].lower() in ("none", "null") and "None" in text else values[0]


def _yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, *YAML_FAILS):
        raise ConfigError(f"flags: --{name}: not valid YAML: {shown(text)}") from None


def _holds_strings(annotation: str) -> bool:
    return "tuple[str" in annotation


def _strings(name: str, values: list[str]) -> list[Any]:
    """Read several words, or one YAML list.

    Tokens and prompts begin with brackets, too: a word is a list only where it has a comma or
    quotes and is one.

        [a, b]   ["a"]                     lists
        [INST]   [draft] hi, you   [a]     text
    """
    word = values[0]
    if len(values) > 1 or not word.startswith("[") or not any(c in word for c in ",\"'"):
        return values
    try:
        value = yaml.safe_load(word)
    except (yaml.YAMLError, *YAML_FAILS):
        if word.startswith(('["', "['")):  # meant as a list
            raise ConfigError(f"flags: --{name}: not valid YAML: {shown(word)}") from None
        return values
    return value if isinstance(value, list) else values
