"""Lines in, entries out."""

from __future__ import annotations

import pytest

from jaxtune.config import ConfigError
from jaxtune.repl.input import COMMANDS, Command, Entry, Text, entry, help_text


def read(text: str) -> tuple[list[Entry], list[str]]:
    """All entries of `text`, and the prompts that asked for its lines."""
    lines, prompts = iter(text.split("\n")), []

    def line(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    found: list[Entry] = []
    while True:
        try:
            found.append(entry(line))
        except EOFError:
            return found, prompts[:-1]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("  Hello  ", "Hello"),
        ("one\\\ntwo\\\n  three", "one\ntwo\n  three"),
        ('"""\n/help\n\n  b\\\n"""', "/help\n\n  b\\"),
        ('"""one\ntwo"""', "one\ntwo"),
        ('"""all of it"""', "all of it"),
        ('  """\na "quoted" word\n"""', 'a "quoted" word'),
        ("//etc is a folder", "/etc is a folder"),
        ("cut off \\", "cut off"),
        ('"""\nnever closed', "never closed"),
        ("a\\b", "a\\b"),
    ],
)
def test_a_message(typed: str, text: str) -> None:
    assert read(typed)[0] == [Text(text)]


def test_the_prompt_says_where_one_is() -> None:
    assert read('one\ntwo\\\nthree\n"""\n\n"""')[1] == ["> ", "> ", "| ", "> ", "| ", "| "]


def test_commands() -> None:
    assert read("/system  Be short. ")[0] == [Command("system", "Be short.")]
    assert read("/quit")[0] == [Command("quit", "")]
    assert read("/seed 3\nHi")[0] == [Command("seed", "3"), Text("Hi")]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/sytem Be short", "no command '/sytem'. Did you mean '/system'?"),
        ("/temprature 1", "Did you mean '/temperature'?"),
        ("/", "no command '/'. /help lists them."),
        ("/etc/passwd is what?", "is typed //"),
        ("/Quit", "Did you mean '/quit'?"),
    ],
)
def test_no_such_command_is_one_line(typed: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(typed)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_help_names_every_command() -> None:
    text = help_text(adapter=True)
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "/adapter" not in help_text(adapter=False)
