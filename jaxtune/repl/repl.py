"""The conversation at a terminal: reads entries, streams answers, obeys commands.

Answers go to stdout, everything else to stderr. Nothing is written that was not asked for.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.cli import note
from jaxtune.config import ConfigError, JaxtuneError
from jaxtune.repl import history as conversation
from jaxtune.repl.history import Talk
from jaxtune.repl.input import COMMANDS, Command, Entry, Unknown, entry, help_text
from jaxtune.repl.models import Settings, Voice, sampling
from jaxtune.terminal.text import printable

_HISTORY = 1000  # lines of a history file


class Room(NamedTuple):
    """All that a conversation is: who answers, how, and what was said."""

    voices: tuple[Voice, ...]
    settings: Settings
    talk: Talk = Talk()
    adapter: bool = True
    saved: frozenset[Path] = frozenset()  # files of this conversation, which it may write again


class _Left(Exception):
    """By /quit."""


def converse(
    voices: Sequence[Voice],
    settings: Settings,
    *,
    history: str | None = None,
) -> None:
    """Until /quit, the end of input, or Ctrl-C twice.

    `history` is a file of the lines typed, read at the start and written at the end.
    """
    room = Room(tuple(voices), settings)
    note("/help lists the commands, /quit or Ctrl-D leaves, Ctrl-C ends an answer")
    left = contextlib.suppress(EOFError, KeyboardInterrupt, _Left)
    with _line_editing(history), left, _ctrl_c() as ctrl_c:
        while True:
            try:
                typed = ctrl_c.line()
                room = _heard(room, typed, ctrl_c)
            except _Pressed:
                print(file=sys.stderr)
            except JaxtuneError as error:
                note(printable(str(error)))


def _heard(room: Room, typed: Entry, ctrl_c: _CtrlC) -> Room:
    """What becomes of the conversation."""
    if isinstance(typed, Unknown):
        note(printable(typed.said))
    elif isinstance(typed, Command):
        return _retry(room, ctrl_c) if typed.name == "retry" else _obey(room, typed)
    elif typed.text.strip():
        return _ask(room, typed.text, ctrl_c)
    return room


# -- Ctrl-C --------------------------------------------------------------------------------------


class _Pressed(Exception):
    """Ctrl-C, for the first time, while a line is typed."""


class _CtrlC:
    """The first ends an answer between two tokens, or the line being typed; a second one before
    another line is entered raises `KeyboardInterrupt`, wherever that is."""

    def __init__(self) -> None:
        self.pressed = False  # since the last line
        self._typing = False

    def hear(self, *_: Any) -> None:
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
            self.pressed = False
            return typed
        finally:
            self._typing = False


@contextlib.contextmanager
def _ctrl_c() -> Iterator[_CtrlC]:
    """In another thread than the main one there is none to hear."""
    ctrl_c = _CtrlC()
    if threading.current_thread() is not threading.main_thread():
        yield ctrl_c
        return
    before = signal.signal(signal.SIGINT, ctrl_c.hear)
    try:
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)


# -- answers -------------------------------------------------------------------------------------


def _ask(room: Room, question: str, ctrl_c: _CtrlC) -> Room:
    """Streams every model's answer, then remembers. Ctrl-C ends this answer and what follows."""
    answers: dict[str, str] = {}
    for voice in room.voices:
        if ctrl_c.pressed:
            break
        if len(room.voices) > 1:
            print(f"{voice.label}: ", end="", flush=True)
        try:
            said = _stream(room, voice, question, ctrl_c)
        except JaxtuneError as error:
            note(f"{printable(str(error))} /reset begins a new conversation, /undo takes "
                 "back a question.")  # fmt: skip
            continue
        if said or not ctrl_c.pressed:
            answers[voice.label] = said
    settings = room.settings._replace(seed=room.settings.seed + 1)
    talk = conversation.answered(room.talk, question, answers)
    return room._replace(talk=talk, settings=settings)


def _stream(room: Room, voice: Voice, question: str, ctrl_c: _CtrlC) -> str:
    say = voice.say if room.adapter or voice.bare is None else voice.bare
    pieces = say(conversation.messages(room.talk, voice.label, question), room.settings)
    said = ""
    ended = None
    with contextlib.closing(pieces):
        while not ctrl_c.pressed:
            try:
                piece = next(pieces)
            except StopIteration as end:
                ended = end.value
                break
            said += piece
            print(printable(piece), end="", flush=True)
    print(flush=True)
    if ended is not None and not ended.stopped:
        if ended.full:
            note("cut: the model has no position left. /reset begins a new conversation.")
        else:
            note(f"cut after {room.settings.max_new_tokens} tokens: /max_new_tokens N allows more")
    return said


def _retry(room: Room, ctrl_c: _CtrlC) -> Room:
    found = conversation.last_question(room.talk)
    if found is None:
        note("there is no question to ask again")
        return room
    if room.settings.temperature == 0:
        note("a greedy answer comes out the same: /temperature 0.7 draws")
    talk, question = found
    again = _ask(room._replace(talk=talk), question, ctrl_c)
    # An answer that did not come takes nothing away: what was there before stays.
    return again if again.talk.open is None else room


# -- commands ------------------------------------------------------------------------------------


def _obey(room: Room, given: Command) -> Room:
    """Raises `JaxtuneError` for what cannot be done."""
    name, argument = given
    takes = COMMANDS[name][0]
    if argument and not takes:
        raise ConfigError(f"/{name} takes nothing behind it; got '{argument}'.")
    labels = [voice.label for voice in room.voices]
    match name:
        case "help":
            note(help_text(adapter=_has_adapter(room)))
        case "quit":
            raise _Left
        case "reset":
            note("forgotten")
            return room._replace(talk=Talk(room.talk.system))
        case "undo":
            if not room.talk.turns and room.talk.open is None:
                note("there is nothing to take back")
            else:
                note(f"taken back; {len(conversation.undone(room.talk).turns)} before it stay")
            return room._replace(talk=conversation.undone(room.talk))
        case "system":
            return _system(room, argument)
        case "adapter":
            return _adapter(room, argument)
        case "save":
            if not room.talk.turns:
                raise ConfigError("/save: there is nothing said yet.")
            named = Path(_needed(given)).expanduser().absolute()
            file = conversation.save(
                room.talk, labels, argument, overwrite=named in room.saved
            ).absolute()
            note(f"saved: {argument} ({len(room.talk.turns)} questions)")
            return room._replace(saved=room.saved | {file})
        case "load":
            talk = conversation.load(labels, _needed(given))
            note(f"loaded: {argument} ({len(talk.turns)} questions)")
            return room._replace(talk=talk)
        case _:
            return room._replace(settings=_set(room.settings, given))
    return room


def _needed(given: Command) -> str:
    if not given.argument:
        raise ConfigError(f"/{given.name} needs {COMMANDS[given.name][0]} behind it.")
    return given.argument


def _system(room: Room, argument: str) -> Room:
    if not argument:
        note(f"system: {printable(room.talk.system) if room.talk.system else 'none'}")
        return room
    system = None if argument == "-" else argument
    note("system: none" if system is None else "system: from the next question on")
    return room._replace(talk=room.talk._replace(system=system))


def _has_adapter(room: Room) -> bool:
    return any(voice.bare is not None for voice in room.voices)


def _adapter(room: Room, argument: str) -> Room:
    if not _has_adapter(room):
        raise ConfigError(
            "/adapter: this model has no adapter apart from its weights. Give a folder of one."
        )
    if argument and argument not in ("on", "off"):
        raise ConfigError(f"/adapter: expected on or off; got '{argument}'.")
    on = room.adapter if not argument else argument == "on"
    note(f"adapter: {'on' if on else 'off'}")
    return room._replace(adapter=on)


def _set(settings: Settings, given: Command) -> Settings:
    """One of the settings, by its name; without a value it is shown."""
    name, argument = given
    if argument:
        kind = type(getattr(settings, name))
        try:
            settings = settings._replace(**{name: kind(argument)})
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ConfigError(f"/{name}: expected {expected}; got '{argument}'.") from None
        sampling(settings)  # or it raises
    value = getattr(settings, name)
    note(f"{name}: {value}{' (greedy)' if name == 'temperature' and value == 0 else ''}")
    return settings


# -- the terminal --------------------------------------------------------------------------------


def _read(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


@contextlib.contextmanager
def _line_editing(history: str | None) -> Iterator[None]:
    """Arrow keys, history and completion of commands, where there is a terminal and readline."""
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
        with _told(file):
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
            with _told(file):
                readline.write_history_file(file)


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"history {file}: {error.strerror}. Leave history out.") from None
