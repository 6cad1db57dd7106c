"""A thread beside a run: it shares what each host is doing, and ends a host that waits in vain.

Every host writes a beat every two seconds into the key-value store that JAX keeps on host 0, and
reads those of the others. This names a host that failed, with its reason, and one that is lost or
lags. When host 0 is lost, or a host is silent for
`hosts.heartbeat_timeout_seconds`, JAX itself ends the process by SIGABRT: here it ends with a
message and exit code 75, since the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.cli import STOPPED, ThisProcess, emit
from jaxtune.config import HostsConfig
from jaxtune.parallel import memory, processes

_BEAT_SECONDS = 2.0
_SILENT_BEATS = 4
_ENDED_SECONDS = 10.0  # host 0, which keeps the store, stays for the others to read why it ends
_HOST, _ENDED = "jaxtune/host/", "jaxtune/ended/"
_STACKS = "stacks"
_STATUS = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


class Beat(NamedTuple):
    """A host's last report, and when it was received, by this host's clock."""

    number: int
    step: int
    doing: str
    received: float


def join(hosts: HostsConfig) -> None:
    """Join the other processes and set `cli.ThisProcess`: the beginning of every command."""
    processes.start(hosts, before=_handle_aborts)
    if processes.count() == 1 or ThisProcess.name:
        return
    ThisProcess.name = f"host {processes.index()} of {processes.count()}: "
    ThisProcess.quiet = not processes.is_first()
    ThisProcess.leave = _leave
    _keep_stdout()


class Heartbeat:
    """A monitor that ends the run after `hang_seconds` without a call of `at`; 0 = never.

    A context manager; without other hosts and without a limit there is no thread.
    """

    def __init__(self, *, hang_seconds: float, folder: Path | None = None) -> None:
        self._hang_seconds, self._folder = hang_seconds, folder
        self._now = (0, "starting")
        self._since: float | None = None  # set while hanging counts
        self._number = 0
        self._closed = threading.Event()
        self._store = processes.store()
        self.peers: dict[int, Beat] = {}
        self._thread = threading.Thread(target=self._run, name="jaxtune-watch", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._store is not None or self._hang_seconds:
            _State.watch = self
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._store is not None and _of_runtime(error) and not memory.is_exhausted(error):
            self._blame(error)
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, step: int, doing: str) -> None:
        self._now, self._since = (step, doing), time.monotonic()

    @contextlib.contextmanager
    def unlimited(self, doing: str) -> Iterator[None]:
        """Stop the clock while something takes as long as it needs, such as an export."""
        self._now, self._since = (self._now[0], doing), None
        yield
        self._since = time.monotonic()

    def _run(self) -> None:
        while not self._closed.wait(min(_BEAT_SECONDS, (self._hang_seconds or 99) / 4)):
            if self._store is not None:
                # Host 0 may be gone: then JAX ends this process, and `_on_abort` says why.
                with contextlib.suppress(Exception):
                    self._exchange(self._store)
            since = self._since
            if self._hang_seconds and since and time.monotonic() - since > self._hang_seconds:
                self._hangs()

    def _exchange(self, store: Any) -> None:
        self._number += 1
        step, doing = self._now
        own = f"{_HOST}{processes.index()}"
        store.key_value_set(own, f"{self._number} {step} {doing}", allow_overwrite=True)
        for key, value in store.key_value_dir_get(_HOST):
            host = int(key.rpartition("/")[2])
            number, at, doing_there = value.split(" ", 2)
            before = self.peers.get(host)
            if before is None or before.number != int(number):
                self.peers[host] = Beat(int(number), int(at), doing_there, time.monotonic())
        for key, value in store.key_value_dir_get(_ENDED):
            host, (code, stacks, reason) = int(key.rpartition("/")[2]), value.split("\n", 2)
            if host != processes.index():
                if stacks == _STACKS:
                    self._show_stacks()
                _exit(int(code), f"host {host} has ended, so this one does too. It said: {reason}")

    def silent(self, *, beats: int = _SILENT_BEATS) -> list[int]:
        """List the other hosts without a beat for so long while others had some.

        Of several only the first to fall silent: those after them may have ended for it.
        """
        own = processes.index()
        received = {host: beat.received for host, beat in self.peers.items()}
        limit = max(received.values(), default=0.0) - beats * _BEAT_SECONDS
        quiet = {host: at for host, at in received.items() if at < limit and host != own}
        first = min(quiet.values(), default=0.0) + 2 * _BEAT_SECONDS
        return sorted(host for host, at in quiet.items() if at <= first)

    def _blame(self, error: BaseException | None) -> None:
        """Name the host that is gone when a collective fails; return if all are well.

        A collective fails at once, before JAX knows of the loss; a few beats show which host it is.
        """
        deadline = time.monotonic() + (_SILENT_BEATS + 2) * _BEAT_SECONDS
        while time.monotonic() < deadline:
            if silent := self.silent():
                text = str(error).splitlines()[0]
                _exit(STOPPED, f"{_lost(silent, self._now[0])} What failed first: {text}")
            time.sleep(0.2)

    def _hangs(self) -> None:
        step, doing = self._now
        stacks = self._show_stacks()
        limit = f"{self._hang_seconds:g}"
        _exit(
            STOPPED,
            f"no progress for {limit} s at step {step}, {doing}. {self._laggard()}Every thread's "
            f"stack is in {stacks}. The same command goes on from the last checkpoint; a step that "
            "really takes longer needs a larger hang_timeout_seconds.",
            stacks=True,
        )

    def _show_stacks(self) -> str:
        """Write every thread's stack to stderr and, where possible, into a file; return where."""
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        if self._folder is not None:
            path = self._folder / f"stacks-host-{processes.index()}.txt"
            with contextlib.suppress(OSError), path.open("w") as file:
                faulthandler.dump_traceback(file)
                return str(path)
        return "stderr"

    def _laggard(self) -> str:
        if len(self.peers) < 2:
            return ""
        behind = min(self.peers, key=lambda host: self.peers[host].step)
        least, most = self.peers[behind], max(self.peers.values(), key=lambda beat: beat.step)
        if silent := self.silent():
            return f"Host {', '.join(map(str, silent))} is silent. "
        if least.step < most.step:
            return (
                f"Host {behind} lags: it is at step {least.step}, {least.doing}; others are at "
                f"step {most.step}. "
            )
        others = [h for h, beat in self.peers.items() if beat.doing != self._now[1]]
        if others:
            each = ", ".join(f"host {host}: {self.peers[host].doing}" for host in sorted(others))
            return f"All hosts are at that step, but not all do the same ({each}). "
        return f"All {len(self.peers)} hosts are at that step and do the same. "


class _State:
    """A place for what the handler of a signal reads."""

    watch: Heartbeat | None = None
    handler: Any = None  # kept: C calls it


def _leave(code: int, message: str) -> None:
    """End this host without waiting for the others, and tell them why."""
    store: Any = processes.store()
    with contextlib.suppress(Exception):
        _publish_end(store, code, message)
        deadline = time.monotonic() + _ENDED_SECONDS
        while processes.is_first() and time.monotonic() < deadline:
            if len(store.key_value_dir_get(_ENDED)) == processes.count():
                break
            time.sleep(0.2)
    _flush()
    os._exit(code)


def _exit(code: int, message: str, *, stacks: bool = False) -> None:
    """End the process from a thread; the main one may hang in a call that never returns.

    With `stacks` the other hosts show theirs too.
    """
    emit(f"jaxtune: {ThisProcess.name}{message}")
    store = processes.store()
    with contextlib.suppress(Exception):
        if store is not None:
            _publish_end(store, code, message, stacks=stacks)
    if processes.count() > 1 and processes.is_first():
        time.sleep(2 * _BEAT_SECONDS)
    _flush()
    os._exit(code)


def _publish_end(store: Any, code: int, message: str, *, stacks: bool = False) -> None:
    """Write for the other hosts what `Heartbeat._exchange` reads."""
    text = f"{code}\n{_STACKS if stacks else ''}\n{message}"
    store.key_value_set(f"{_ENDED}{processes.index()}", text)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _handle_aborts() -> None:
    """Replace JAX's abort() when a host is lost: name the host and exit as documented.

    A handler of Python's would never run, since abort() does not return to the interpreter; one of
    C's runs in the thread that aborts, which waits for the interpreter's lock like any other.
    """
    _State.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_abort)
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), _State.handler)


def _on_abort(number: int) -> None:
    if not ThisProcess.name:
        os.write(2, f"jaxtune: {processes.LATE}\n".encode())
        os._exit(STOPPED)
    watch = _State.watch
    silent = watch.silent(beats=2) if watch is not None else []
    lost = _lost(silent, watch._now[0] if watch is not None else 0)
    os.write(2, f"jaxtune: {ThisProcess.name}{lost}\n".encode())
    os._exit(STOPPED)


def _lost(silent: list[int], step: int) -> str:
    lost = " and ".join(map(str, silent)) or "0, which coordinates the others,"
    return (
        f"host {lost} was lost at step {step}: killed, restarted or cut off. Ending; the same "
        "command on all hosts goes on from the last checkpoint."
    )


def _of_runtime(error: BaseException | None) -> bool:
    """Test if an error, or its cause, came from XLA.

    It comes as XLA's own, or as a `ValueError` that begins with a status: so a collective fails
    when it is called for the first time.
    """
    import jax  # here: `--help` reads this module

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        if isinstance(error, ValueError) and _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _keep_stdout() -> None:
    """Send to stderr what the collectives of CPUs write to stdout, which is for results.

    The number of the file is exchanged; what Python prints goes where it did.
    """
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout.flush()
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)


class StopSignal(KeyboardInterrupt):
    """A signal that came where nothing has to be saved; its text names it."""


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `StopSignal` at the first SIGTERM or SIGINT, outside of `stop_notices`.

    Of several hosts an interrupted one tells the others. SIGTERM is JAX's once they have joined: an
    earlier run of this process has them join before this one begins.
    """

    def end(number: int, frame: Any) -> None:
        restore()
        if processes.count() > 1:
            raise KeyboardInterrupt
        raise StopSignal(signal.Signals(number).name)

    def restore() -> None:
        for number, handler in before.items():
            jaxs = number == signal.SIGTERM and processes.count() > 1  # as Python does not know
            if signal.getsignal(number) is end and not jaxs:
                signal.signal(number, handler)

    before: dict[signal.Signals, Any] = {}
    ours = (signal.SIGINT,) if processes.count() > 1 else (signal.SIGTERM, signal.SIGINT)
    try:
        for number in ours:
            before[number] = signal.signal(number, end)
    except ValueError:  # not the main thread: signals are not ours
        yield
        return
    try:
        yield
    finally:
        restore()


Notice = Callable[[], str | None]
_looks = itertools.count(1)  # of this process, as of every other: `stop_notices`


@contextlib.contextmanager
def stop_notices(note: Callable[[str], None]) -> Iterator[Notice]:
    """Yield `notice()`: the signal for which all hosts are to save now, or None.

    SIGTERM (or a TPU's notice of maintenance, which JAX receives) and SIGINT; on many hosts the
    one that hears of it tells the others. JAX agrees on a look that none of them is beyond: one
    more than the most that a host has taken. So all hosts take the same looks, wherever a run may
    be left, and one that says so has to be obeyed: no later one does. A second SIGINT interrupts
    as usual.
    """
    signals: list[str] = []
    many = processes.count() > 1

    def remember(number: int, frame: Any) -> None:
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(signal.Signals(number).name)
        emit(f"{ThisProcess.name}{signals[0]}: finishing what the devices are at, then saving")
        if many:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX passes on

    def notice() -> str | None:
        if not many:
            return signals[0] if signals else None
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(next(_looks)):
            return signals[0] if signals else "SIGTERM on one of the hosts"
        return None

    # On many hosts SIGTERM is JAX's: its handler stands since they joined.
    ours = (signal.SIGINT,) if many else (signal.SIGTERM, signal.SIGINT)
    try:
        before = {n: signal.signal(n, remember) for n in ours}
    except ValueError:  # not the main thread (a notebook's worker): signals are not ours
        yield notice
        return
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
