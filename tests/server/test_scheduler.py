"""The queue alone, one thread: order, limits, time, cancelling, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from echo import Drawn, Echo

from jaxtune.inference.generate import TextEvent
from jaxtune.server.openai_schema import Refused
from jaxtune.server.scheduler import (
    GenerationRequest,
    PendingRequest,
    Scheduler,
    ServeSettings,
)


class Office:
    """A scheduler with the thread that runs it, and what it handed out."""

    def __init__(self, engines: dict[str, Echo], settings: ServeSettings) -> None:
        for engine in engines.values():
            engine.slots = settings.slots
        self.scheduler = Scheduler(engines, settings)
        self.came: dict[str, list[TextEvent | Refused]] = {}
        self.first: list[str] = []
        self.failed: list[BaseException] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.scheduler.run()
        except BaseException as error:
            self.failed.append(error)

    def ask(self, text: str, model: str = "m") -> PendingRequest:
        got = self.came.setdefault(text, [])

        def deliver(event: TextEvent | Refused) -> None:
            if not got:
                self.first.append(text)
            got.append(event)

        return self.scheduler.submit(
            GenerationRequest(model, [*map(ord, text)], 99, Drawn(), ()), deliver
        )

    def text(self, asked: str) -> str:
        return "".join(event.text for event in self.came[asked] if not isinstance(event, Refused))

    def ended(self, asked: str) -> bool:
        last = (self.came[asked] or [None])[-1]
        return isinstance(last, Refused) or (last is not None and last.generation is not None)

    def wait(self, *asked: str) -> None:
        end = time.monotonic() + 10
        while not all(map(self.ended, asked)):
            assert time.monotonic() < end
            time.sleep(0.002)


@pytest.fixture
def office() -> Iterator[Any]:
    made: list[Office] = []

    def make(engines: dict[str, Echo], **limits: Any) -> Office:
        found = Office(engines, ServeSettings(Drawn(), 64, **{"grace": 0.3, **limits}))
        made.append(found)
        return found

    yield make
    for each in made:
        each.scheduler.close()
        if each.thread.ident is not None:
            each.thread.join(timeout=60)
            assert not each.thread.is_alive()


def test_first_come_first_served(office: Any) -> None:
    engine = Echo()
    here = office({"m": engine}, slots=3)
    names = [f"question {i:02d}" + "." * (i % 5) for i in range(40)]
    for name in names:
        here.ask(name)
    here.thread.start()
    here.wait(*names)
    assert engine.asked == names
    assert here.first == names
    assert engine.most == 3
    assert [here.text(name) for name in names] == names
    assert here.scheduler.counts() == (0, 0)


def test_a_place_that_is_free_is_taken_while_others_are_answered(office: Any) -> None:
    engine = Echo()
    here = office({"m": engine}, slots=2)
    for name in ("a" * 50, "bb", "cc"):
        here.ask(name)
    here.thread.start()
    here.wait("a" * 50, "bb", "cc")
    last = [name for name, got in here.came.items() if got and got[-1].generation]
    assert len(last) == 3
    assert here.first == ["a" * 50, "bb", "cc"]
    assert engine.most == 2


def test_models_do_not_wait_for_each_other(office: Any) -> None:
    here = office({"m": Echo(0.02), "n": Echo()}, slots=1)
    here.ask("a" * 500)
    here.ask("b" * 500)
    here.ask("quick", "n")
    here.thread.start()
    here.wait("quick")
    assert not here.ended("b" * 500)
    assert not here.came["b" * 500]


def test_the_queue_has_an_end(office: Any) -> None:
    here = office({"m": Echo()}, slots=1, queue=2)
    for name in ("in the slot", "one", "two"):
        here.ask(name)
    with pytest.raises(Refused, match="2 requests wait already") as caught:
        here.ask("three")
    assert caught.value.status == 429
    assert 1 <= int(caught.value.headers["Retry-After"]) <= 60
    here.thread.start()
    here.wait("in the slot", "one", "two")
    here.ask("four")  # there is room again
    here.wait("four")


def test_who_finds_a_slot_free_does_not_wait(office: Any) -> None:
    """As many as come at once, before the first of them has been seen; a slot of another model is
    none."""
    here = office({"m": Echo(0.01), "n": Echo()}, slots=8, queue=1)
    names = [f"at once {i}" for i in range(9)]
    for name in names:
        here.ask(name)
    with pytest.raises(Refused, match="1 requests wait already"):
        here.ask("one too many")
    here.ask("of the other", "n")
    here.thread.start()
    here.wait(*names, "of the other")
    assert here.scheduler.counts() == (0, 0)


def test_time_is_limited_also_for_those_who_wait(office: Any) -> None:
    engine = Echo(0.01)
    here = office({"m": engine}, slots=1, seconds=0.3)
    here.ask("long" * 100)
    here.ask("late")
    here.thread.start()
    here.wait("long" * 100, "late")
    assert here.text("long" * 100)
    cut, never = here.came["long" * 100][-1], here.came["late"][-1]
    assert (cut.status, never.status) == (504, 503)
    assert "did not end within 0.3 seconds" in str(cut)
    assert "was not begun" in str(never)
    assert engine.asked == ["long" * 100]
    assert engine.cancelled == [0, 1]
    here.ask("next")
    here.wait("next")
    assert here.text("next") == "next"


def test_cancelled_in_the_queue_and_in_its_place(office: Any) -> None:
    engine = Echo(0.005)
    here = office({"m": engine}, slots=1)
    running, waiting = here.ask("r" * 400), here.ask("waits")
    here.ask("third")
    here.thread.start()
    while not here.came["r" * 400]:
        time.sleep(0.002)
    here.scheduler.cancel(waiting)
    here.scheduler.cancel(running)
    here.scheduler.cancel(running)  # a second time does nothing
    here.wait("third")
    assert engine.asked == ["r" * 400, "third"]
    assert engine.cancelled == [1, 0]
    assert not here.came["waits"]
    assert here.scheduler.counts() == (0, 0)


def test_what_an_engine_refuses_is_told(office: Any) -> None:
    here = office({"m": Echo()})
    here.ask("unspeakable")
    here.ask("fine")
    here.thread.start()
    here.wait("unspeakable", "fine")
    assert here.came["unspeakable"][-1].status == 400
    assert here.text("fine") == "fine"


def test_closing_lets_answers_end(office: Any) -> None:
    here = office({"m": Echo(0.002)}, slots=1, grace=5)
    here.ask("a" * 30)
    here.ask("b" * 30)
    here.thread.start()
    while not here.came["a" * 30]:
        time.sleep(0.001)
    here.scheduler.close()
    here.wait("a" * 30, "b" * 30)
    here.thread.join(timeout=60)
    assert not here.thread.is_alive()
    assert here.text("b" * 30) == "b" * 30
    with pytest.raises(Refused, match="stopping") as caught:
        here.ask("too late")
    assert caught.value.status == 503


@pytest.mark.parametrize("again", [False, True])
def test_closing_tells_those_who_cannot_end(office: Any, again: bool) -> None:
    here = office({"m": Echo(0.01)}, slots=1, grace=60 if again else 0.2)
    here.ask("a" * 10_000)
    here.ask("waits")
    here.thread.start()
    while not here.came["a" * 10_000]:
        time.sleep(0.001)
    here.scheduler.close()
    if again:
        here.scheduler.close()
    here.thread.join(timeout=60)
    assert not here.thread.is_alive()
    for asked in ("a" * 10_000, "waits"):
        assert "stopping" in str(here.came[asked][-1])


def test_a_model_that_fails_ends_it_after_everybody_was_told(office: Any) -> None:
    engine = Echo()
    engine.broken = True
    here = office({"m": engine})
    here.ask("one")
    here.ask("two")
    here.thread.start()
    here.thread.join(timeout=60)
    assert isinstance(here.failed[0], RuntimeError)
    for asked in ("one", "two"):
        assert here.came[asked][-1].status == 500
        assert "secret" not in str(here.came[asked][-1])


def test_want_of_memory_ends_the_request_it_was_for(
    office: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = office({"m": Echo()}, slots=3)
    for name in ("before", "enormous secret", "after"):
        here.ask(name)
    here.thread.start()
    here.wait("before", "enormous secret", "after")
    refused = here.came["enormous secret"][-1]
    assert refused.status == 503
    assert "no memory for 15 tokens and an answer of up to 99" in str(refused)
    assert (here.text("before"), here.text("after")) == ("before", "after")
    assert not here.failed
    assert here.scheduler.counts() == (0, 0)
    said = capsys.readouterr().err
    assert "--serve_length" in said
    assert "secret" not in said
