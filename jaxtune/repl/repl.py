"""The conversation at a terminal: reads entries, streams answers, obeys commands.

Answers go to stdout, everything else to stderr. Nothing is written that was not asked for.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.cli import note
from jaxtune.config import ConfigError, JaxtuneError
from jaxtune.repl import history as conversation
from jaxtune.repl.history import Talk
from jaxtune.repl.input import COMMANDS, Command, Entry, entry, help_text
from jaxtune.repl.models import ChatModel, ChatSettings
from jaxtune.terminal.text import printable

_HISTORY = 1000  # lines of a history file


class Session(NamedTuple):
    """A conversation at the terminal: its models, settings and messages."""

    models: tuple[ChatModel, ...]
    settings: ChatSettings
    talk: Talk = Talk()
    adapter: bool = True
    saved: frozenset[Path] = frozenset()  # files of this conversation, which it may write again


class _Quit(Exception):
    """Raised by /quit."""


def run_conversation(
    models: Sequence[ChatModel],
    settings: ChatSettings,
    *,
    history: str | None = None,
) -> None:
    """Run until /quit, the end of input, or Ctrl-C twice.

    `history` is a file of the lines typed, read at the start and written at the end.
    """
    session = Session(tuple(models), settings)
    note("/help lists the commands, /quit or Ctrl-D leaves, Ctrl-C ends an answer")
    left = contextlib.suppress(EOFError, KeyboardInterrupt, _Quit)
    with _line_editing(history), left, _ctrl_c() as ctrl_c:
        while True:
            try:
                typed = ctrl_c.line()
                session = _handle(session, typed, ctrl_c)
            except _Pressed:
                print(file=sys.stderr)
            except JaxtuneError as error:
                note(printable(str(error)))


def _handle(session: Session, typed: Entry, ctrl_c: _CtrlC) -> Session:
    """Act on what was typed, and return the new state."""
    if isinstance(typed, Command):
        return _retry(session, ctrl_c) if typed.name == "retry" else _execute(session, typed)
    return _ask(session, typed.text, ctrl_c) if typed.text.strip() else session


# -- Ctrl-C --------------------------------------------------------------------------------------


class _Pressed(Exception):
    """Raised by a first Ctrl-C while a line is typed."""


class _CtrlC:
    """A handler of Ctrl-C: the first one ends an answer between two tokens, or the typed line.

    A second one before another line is entered raises `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.pressed = False  # since the last line
        self._typing = False

    def handle(self, *_: Any) -> None:
        if self.pressed:
            print(file=sys.stderr)
            raise KeyboardInterrupt
        self.pressed = True
        if self._typing:
            raise _Pressed

    def line(self) -> Entry:
        self._typing = True
        try:
            if self.pressed:
                note("Ctrl-C once more leaves")
            typed = entry(_read)
        except ConfigError:  # of a whole line, which was entered all the same
            self.pressed = False
            raise
        finally:
            self._typing = False
        self.pressed = False
        return typed


@contextlib.contextmanager
def _ctrl_c() -> Iterator[_CtrlC]:
    """Handle Ctrl-C; only the main thread gets signals."""
    ctrl_c = _CtrlC()
    if threading.current_thread() is not threading.main_thread():
        yield ctrl_c
        return
    before = signal.signal(signal.SIGINT, ctrl_c.handle)
    try:
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)


# -- answers -------------------------------------------------------------------------------------


def _ask(session: Session, question: str, ctrl_c: _CtrlC) -> Session:
    """Stream the answer of every model and keep them. Ctrl-C ends this answer and the next ones."""
    answers: dict[str, str] = {}
    for model in session.models:
        if ctrl_c.pressed:
            break
        if len(session.models) > 1:
            print(f"{model.label}: ", end="", flush=True)
        try:
            text = _stream(session, model, question, ctrl_c)
        except JaxtuneError as error:
            note(f"{printable(str(error))} /reset begins a new conversation, /undo takes "
                 "back a question.")  # fmt: skip
            continue
        if text or not ctrl_c.pressed:
            answers[model.label] = text
    settings = replace(session.settings, seed=session.settings.seed + 1)
    talk = conversation.answered(session.talk, question, answers)
    return session._replace(talk=talk, settings=settings)


def _stream(session: Session, model: ChatModel, question: str, ctrl_c: _CtrlC) -> str:
    bare = None if session.adapter else model.without_adapter
    answer = bare or model.answer
    pieces = answer(conversation.messages(session.talk, model.label, question), session.settings)
    text = ""
    ended = None
    with contextlib.closing(pieces):
        while not ctrl_c.pressed:
            try:
                piece = next(pieces)
            except StopIteration as end:
                ended = end.value
                break
            text += piece
            print(printable(piece), end="", flush=True)
    print(flush=True)
    if ended is not None and not ended.stopped:
        if ended.tokens < session.settings.max_new_tokens:
            note("cut: the model has no position left. /reset begins a new conversation.")
        else:
            most = session.settings.max_new_tokens
            note(f"cut after {most} tokens: /max_new_tokens N allows more")
    return text


def _retry(session: Session, ctrl_c: _CtrlC) -> Session:
    last = conversation.last_question(session.talk)
    if last is None:
        note("there is no question to ask again")
        return session
    if session.settings.temperature == 0:
        note("a greedy answer comes out the same: /temperature 0.7 draws")
    talk, question = last
    again = _ask(session._replace(talk=talk), question, ctrl_c)
    # An answer that did not come takes nothing away: what was there before stays.
    return again if again.talk.open is None else session


# -- commands ------------------------------------------------------------------------------------


def _execute(session: Session, command: Command) -> Session:
    """Run a command. Raises: JaxtuneError."""
    name, argument = command
    takes = COMMANDS[name][0]
    if argument and not takes:
        raise ConfigError(f"/{name} takes nothing behind it; got '{argument}'.")
    labels = [model.label for model in session.models]
    match name:
        case "help":
            note(help_text(adapter=_has_adapter(session)))
        case "quit":
            raise _Quit
        case "reset":
            note("forgotten")
            return session._replace(talk=Talk(session.talk.system))
        case "undo":
            if not session.talk.turns and session.talk.open is None:
                note("there is nothing to take back")
            else:
                note(f"taken back; {len(conversation.undone(session.talk).turns)} before it stay")
            return session._replace(talk=conversation.undone(session.talk))
        case "system":
            return _system(session, argument)
        case "adapter":
            return _adapter(session, argument)
        case "save":
            if not session.talk.turns:
                raise ConfigError("/save: there is nothing said yet.")
            named = Path(_argument(command)).expanduser().absolute()
            file = conversation.save(
                session.talk, labels, argument, overwrite=named in session.saved
            ).absolute()
            note(f"saved: {argument} ({len(session.talk.turns)} questions)")
            return session._replace(saved=session.saved | {file})
        case "load":
            talk = conversation.load(labels, _argument(command))
            note(f"loaded: {argument} ({len(talk.turns)} questions)")
            return session._replace(talk=talk)
        case _:
            return session._replace(settings=_set(session.settings, command))
    return session


def _argument(command: Command) -> str:
    if not command.argument:
        raise ConfigError(f"/{command.name} needs {COMMANDS[command.name][0]} behind it.")
    return command.argument


def _system(session: Session, argument: str) -> Session:
    if not argument:
        note(f"system: {printable(session.talk.system) if session.talk.system else 'none'}")
        return session
    system = None if argument == "-" else argument
    note("system: none" if system is None else "system: from the next question on")
    return session._replace(talk=session.talk._replace(system=system))


def _has_adapter(session: Session) -> bool:
    return any(model.without_adapter is not None for model in session.models)


def _adapter(session: Session, argument: str) -> Session:
    if not _has_adapter(session):
        raise ConfigError(
            "/adapter: this model has no adapter apart from its weights. Give a folder of one."
        )
    if argument and argument not in ("on", "off"):
        raise ConfigError(f"/adapter: expected on or off; got '{argument}'.")
    on = session.adapter if not argument else argument == "on"
    note(f"adapter: {'on' if on else 'off'}")
    return session._replace(adapter=on)


def _set(settings: ChatSettings, command: Command) -> ChatSettings:
    """Set one of the settings by its name; without a value show it."""
    name, argument = command
    if argument:
        kind = type(getattr(settings, name))
        try:
            value = kind(argument)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ConfigError(f"/{name}: expected {expected}; got '{argument}'.") from None
        settings = replace(settings, **{name: value})
    value = getattr(settings, name)
    note(f"{name}: {value}{' (greedy)' if name == 'temperature' and value == 0 else ''}")
    return settings


# -- the terminal --------------------------------------------------------------------------------


def _read(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


@contextlib.contextmanager
def _line_editing(history: str | None) -> Iterator[None]:
    """Turn on arrow keys, history and completion if there are a terminal and readline."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # Windows; lines are typed all the same
        if history is not None:
            raise ConfigError("history: this Python has no readline. Leave history out.") from None
        yield
        return
    file = None if history is None else Path(history).expanduser()
    if file is not None and file.exists():
        with _explained(file):
            readline.read_history_file(file)
    names = [f"/{name}" for name in COMMANDS]

    def complete(begun: str, nth: int) -> str | None:
        fitting = [name for name in names if begun.startswith("/") and name.startswith(begun)]
        return fitting[nth] if nth < len(fitting) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        if file is not None:
            readline.set_history_length(_HISTORY)
            with _explained(file):
                readline.write_history_file(file)


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"history {file}: {error.strerror}. Leave history out.") from None
