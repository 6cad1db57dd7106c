"""Typed lines as entries: a message of one or more lines, or a command. Knows no model.

a line                              a message
a line that ends in a backslash \\   goes on in the next
\"\"\" ... \"\"\"                         a message of many lines, whatever they begin with
/name argument                      a command; //name is a message that begins with a slash
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtune.config import ConfigError, nearest

_BLOCK = '"""'
_FIRST, _MORE = "> ", "| "

# name -> (its argument, what it does), as /help shows them
COMMANDS: dict[str, tuple[str, str]] = {
    "help": ("", "shows this"),
    "system": ("TEXT", "what the model reads first, from the next question on; - takes it away"),
    "reset": ("", "forgets the conversation; the system prompt stays"),
    "retry": ("", "asks the last question again; with a temperature, for another answer"),
    "undo": ("", "forgets the last question and its answer"),
    "save": ("FILE", "writes the conversation, a row of format `messages`: .json or .jsonl"),
    "load": ("FILE", "goes on with a saved conversation"),
    "temperature": ("X", "0 is greedy; 1 draws as the model says; above, more widely"),
    "top_k": ("N", "draws among the N likeliest tokens; 0 is all"),
    "top_p": ("X", "draws among the likeliest tokens that make up this share; 1 is all"),
    "repetition_penalty": ("X", "above 1 makes tokens of the conversation less likely; 1 is off"),
    "seed": ("N", "of the next draw; the one after has N + 1"),
    "max_new_tokens": ("N", "longest answer"),
    "adapter": ("on|off", "answers with the adapter, or with the base model alone"),
    "quit": ("", "leaves, as Ctrl-D does"),
}


class Text(NamedTuple):
    text: str


class Command(NamedTuple):
    name: str
    argument: str


Entry = Text | Command


def entry(read: Callable[[str], str]) -> Entry:
    """Read the next entry. `read(prompt)` gives a line and raises EOFError at the end.

    An end of input within an entry ends the entry; what was typed is not lost.
    Raises: ConfigError for a command that does not exist.
    """
    line = read(_FIRST)
    if line.lstrip().startswith(_BLOCK):
        return Text(_block(line.lstrip().removeprefix(_BLOCK), read))
    while line.endswith("\\"):
        try:
            line = f"{line[:-1]}\n{read(_MORE)}"
        except EOFError:
            line = line[:-1]
            break
    line = line.strip()
    if line.startswith("//"):
        return Text(line[1:])
    return _command(line[1:]) if line.startswith("/") else Text(line)


def _block(first: str, read: Callable[[str], str]) -> str:
    """Read lines up to one that ends in three quotes; `first` follows the opening quotes."""
    lines = [first]
    while not lines[-1].rstrip().endswith(_BLOCK):
        try:
            lines.append(read(_MORE))
        except EOFError:
            break
    lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
    return "\n".join(lines).strip("\n")


def _command(line: str) -> Command:
    name, _, argument = line.partition(" ")
    if name in COMMANDS:
        return Command(name, argument.strip())
    known = [f"/{each}" for each in COMMANDS]
    more = nearest(f"/{name}", known) or " /help lists them."
    raise ConfigError(f"no command '/{name}'.{more} A message that begins with / is typed //.")


def help_text(*, adapter: bool) -> str:
    shown = {n: c for n, c in COMMANDS.items() if adapter or n != "adapter"}
    left = {name: f"/{name} {argument}".rstrip() for name, (argument, _) in shown.items()}
    width = max(map(len, left.values()))
    lines = [f"  {left[name].ljust(width)}  {does}" for name, (_, does) in shown.items()]
    return "\n".join(
        [
            *lines,
            '  A line that ends in \\ goes on in the next; """ begins and ends a message of many '
            "lines; // begins one that begins with a slash.",
            "  Ctrl-C ends an answer, twice leaves.",
        ]
    )
