"""Fill the reference pages from the code: `{{ name }}` on a line of its own becomes a table.

The names are the keys of `SECTIONS`; a name without a section ends the build. `{{ config_fields }}`
needs jaxtune importable where the site is built, and no device.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import annotated_types
import pydantic
from pydantic.fields import FieldInfo

import jaxtune
from jaxtune import cli, config
from jaxtune.data import formats

_LINE = re.compile(r"^\{\{ (\w+) \}\}$", re.MULTILINE)
COMMANDS = ("preview", "plan", "train", "evaluate", "chat", "report", "convert")
_EXIT_CODES = {
    "BAD_INPUT": (
        "bad input: a config, a flag, data or a model that cannot be used, a full disk, a device "
        "without enough memory. One message, no traceback",
        "do what the message says; the same command then goes on",
    ),
    "DIVERGED": (
        "the loss or the gradient was not finite. The last good checkpoint is there",
        "look at `OUT/step-N.json`, change what it shows",
    ),
    "STOPPED": (
        "stopped by SIGTERM or SIGINT after saving; or a host, a store or a download was lost",
        "the same command goes on",
    ),
    "INTERRUPTED": (
        "interrupted by Ctrl-C and nothing was saved",
        "the same command goes on from the last checkpoint",
    ),
    "BUG": ("a bug, with its traceback", "report it"),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every `{{ name }}` line; raise `KeyError` for a name without a section."""
    return _LINE.sub(lambda match: SECTIONS[match[1]](), markdown)


def config_fields() -> str:
    """Every field of the config, one table for each group."""
    groups: dict[str, list[tuple[str, FieldInfo]]] = {"": []}
    for name, field in config.field_names(config.Config).items():
        group = name.partition(".")[0] if "." in name else ""
        groups.setdefault(group, []).append((name, field))
    parts = []
    for group, fields in groups.items():
        if group:
            model = config.Config.model_fields[group].annotation
            parts.append(f"## {group}\n\n{inspect.getdoc(model)}")
        parts.append(_field_table(fields))
    for heading, name in (
        ("An entry of `datasets` and `eval_datasets`", "DatasetConfig"),
        ("`proportions` of an entry", "ProportionsConfig"),
    ):
        model = getattr(config, name)
        parts.append(f"## {heading}\n\n{inspect.getdoc(model)}")
        parts.append(_field_table(model.model_fields.items()))
    return "\n\n".join(parts)


def aliases() -> str:
    """Names that other tools use, and the fields that they mean."""
    return _table(
        ("name elsewhere", "field"),
        ((f"`{name}`", f"`{alias.name}`") for name, alias in config.ALIASES.items()
         if name != alias.name),
    )  # fmt: skip


def command_flags() -> str:
    """Every command: its purpose, its usage, and the flags that are its own."""
    parts = []
    for name in COMMANDS:
        module = importlib.import_module(f"jaxtune.{name}")
        options = options_of(module)
        positional = options.positional()
        usage = " ".join(["jaxtune", name, *(word.upper() for word in positional), "[--flags]"])
        parts.append(f"## {name}\n\n{_purpose(module)}\n\n```bash\n{usage}\n```")
        flags = [
            (field.alias or field_name, field) for field_name, field in options.model_fields.items()
        ]
        rows = [(flag, field) for flag, field in flags if flag not in positional]
        words = [(flag, field) for flag, field in flags if flag in positional]
        parts.append(_field_table([*words, *rows], flags=tuple(flag for flag, _ in rows)))
    return "\n\n".join(parts)


def _purpose(module: Any) -> str:
    """The first paragraph of a module's docstring and its indented examples."""
    first, *others = (inspect.getdoc(module) or "").split("\n\n")
    return "\n\n".join([first, *(each for each in others if each.startswith("    "))])


def options_of(module: Any) -> type[cli.Options]:
    """The one `cli.Options` class that a command's module has."""
    [options] = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, cli.Options) and value is not cli.Options
    ]
    return options


def exit_codes() -> str:
    """Exit codes by the constants of `jaxtune.cli`."""
    rows = [("0", "done", "")]
    rows += [
        (str(getattr(cli, name)), meaning, then) for name, (meaning, then) in _EXIT_CODES.items()
    ]
    return _table(("code", "means", "then"), rows)


def record_formats() -> str:
    """Columns of every record format."""
    return _table(
        ("format", "required columns", "also read"),
        (
            (f"`{name}`", _names(each.required), _names(each.optional))
            for name, each in formats.FORMATS.items()
        ),
    )


def python_api() -> str:
    """Signature and docstring of every public name of `jaxtune`, and of the values they return."""
    names = sorted({*jaxtune._PUBLIC, *jaxtune._COMMANDS}, key=str.lower)
    parts = [_documented(f"jt.{name}", public(name)) for name in names]
    for name in names:
        value = public(name)
        function = callable(value) and not inspect.isclass(value)
        returned = typing.get_type_hints(value).get("return") if function else None
        if inspect.isclass(returned) and returned.__module__.startswith("jaxtune.api"):
            parts.append(_documented(returned.__name__, returned))
    return "\n\n".join(parts)


def public(name: str) -> Any:
    """The object behind a public name: of a command the function that the module calls."""
    if name in jaxtune._COMMANDS:
        return getattr(importlib.import_module(f"jaxtune.api.{name}"), name)
    return getattr(jaxtune, name)


SECTIONS: Mapping[str, Callable[[], str]] = {
    "config_fields": config_fields,
    "aliases": aliases,
    "command_flags": command_flags,
    "exit_codes": exit_codes,
    "record_formats": record_formats,
    "python_api": python_api,
}


def _documented(name: str, value: Any) -> str:
    if not callable(value):
        return f"## {name}\n\nA constant: `{value!r}`."
    text = inspect.getdoc(value) or ""
    if not inspect.isclass(value):
        return f"## {name}\n\n```text\n{name}{_signature(value)}\n```\n\n{_as_markdown(text)}"
    parts = [f"## {name}\n\n{_as_markdown(text)}"]
    if issubclass(value, pydantic.BaseModel):
        return "\n\n".join([*parts, "Its fields: [Config fields](reference/config.md)."])
    if fields := getattr(value, "_fields", ()):
        parts.append(f"Fields: {_names(fields)}.")
    for method_name, method in vars(value).items():
        if not method_name.startswith("_") and callable(method):
            parts.append(
                f"### {name}.{method_name}\n\n```text\n{method_name}{_signature(method)}\n```"
            )
            parts.append(_as_markdown(inspect.getdoc(method) or ""))
    return "\n\n".join(parts)


def _signature(function: Callable[..., Any]) -> str:
    """The signature, one parameter a line where it is long."""
    signature = inspect.signature(function)
    text = str(signature).replace("jaxtune.config.fields.", "").replace("'", "")
    if len(text) < 80:
        return text
    returned = text.rpartition(" -> ")[2]
    lines = []
    kinds = inspect.Parameter
    for parameter in signature.parameters.values():
        if parameter.kind is kinds.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        lines.append(str(parameter).replace("'", ""))
    return "(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {returned}"


def _as_markdown(docstring: str) -> str:
    """A docstring with its indented examples as they stand, `>>>` examples as blocks."""
    return re.sub(r"(?m)^(>>> .*(?:\n(?!\n).*)*)", r"```text\n\1\n```", docstring)


def _field_table(fields: Iterable[tuple[str, FieldInfo]], flags: tuple[str, ...] = ()) -> str:
    rows = []
    for name, field in fields:
        shown = f"`--{name}`" if name in flags else f"`{name}`"
        rows.append((shown, _type(field), _default(field), _cell(field.description or "")))
    return _table(("name", "type", "default", "what it does"), rows)


def _type(field: FieldInfo) -> str:
    """The type in words, with its limits: `int, at least 1`."""
    limits = []
    for each in field.metadata:
        for kind, words in (
            (annotated_types.Ge, "at least {0.ge}"),
            (annotated_types.Gt, "above {0.gt}"),
            (annotated_types.Le, "at most {0.le}"),
            (annotated_types.Lt, "below {0.lt}"),
        ):
            if isinstance(each, kind):
                limits.append(words.format(each))
    return ", ".join([_type_name(field.annotation), *limits])


def _type_name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(arguments[0])
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type_name(arguments[0])}"
    if typing.get_origin(annotation) in (dict, Mapping):
        return f"{_type_name(arguments[0])} → {_type_name(arguments[1])}"
    if arguments:  # a union
        names = [_type_name(each) for each in arguments if each is not type(None)]
        return " or ".join(names)
    if inspect.isclass(annotation) and issubclass(annotation, pydantic.BaseModel):
        return "entry (below)"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, (), {}, "") else f"`{field.default}`"


def _names(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    """Text that Markdown and a table leave alone."""
    return re.sub(r"([|<*_{])", r"\\\1", text).replace("\n", " ")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
