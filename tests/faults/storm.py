"""Runs that are killed, stopped, filled up and corrupted, and must end as if they were not.

    python tests/faults/storm.py --kills 100 --sigterms 20 --corruptions 20 --full-disks 10

Each trial is one run directory with a data cache of its own. Several disasters befall it, one after
the other, each followed by the same command; the last time nothing does. Then its metrics, its
exported model and its folders must be those of a run that was never disturbed, byte for byte.
After each disaster the next start must go on from the newest checkpoint that was complete and
undamaged before: nothing older, nothing half. Where the only one is damaged it must refuse and
change nothing, until that checkpoint is removed.

A kill falls at a random moment of a random phase: anywhere, while tokenised data is written, in a
step, in a save, in the export. A full disk is a tmpfs of random size where one can be mounted, else
a limit on the size of files; afterwards there is room again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from multihost import runs

STRIKE = """
import os, signal, threading
def strike():
    timer = threading.Timer({delay}, os.kill, (os.getpid(), signal.{signal}))
    timer.daemon = True
    timer.start()
def before(owner, name, when=lambda *args, **more: True):
    was = getattr(owner, name)
    def struck(*args, **more):
        if when(*args, **more):
            strike()
        return was(*args, **more)
    setattr(owner, name, struck)
"""
# Phase -> (Python that arms the strike for when it begins, seconds it may last).
PHASES = {
    "anywhere": ("strike()", 8.0),
    "cache": ("from jaxtune.data import cache\nbefore(cache, 'stored')", 0.15),
    "step": (
        "from jaxtune.training import loop\n"
        "before(loop.Loop, '_next', lambda self, feed, step: step == {step})",
        0.4,
    ),
    "save": (
        "from jaxtune.training.checkpoint import checkpoints\n"
        "before(checkpoints.Checkpoints, 'save')",
        0.5,
    ),
    "export": ("from jaxtune.hf import export\nbefore(export, 'export_model')", 0.4),
}
LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
LAST = 12


class Wrong(AssertionError):
    """The storm found something."""


class Trial:
    """One run directory and what befalls it."""

    def __init__(self, folder: Path, material: Path, dice: random.Random) -> None:
        self.folder, self.material, self.dice = folder, material, dice
        self.out = folder / "out"
        self.log: list[str] = []
        self.landed = 0  # signals that met the run, and full disks that were met
        folder.mkdir()

    def run(
        self, before: str = "", *, out: Path | None = None, goes_on_from: int | None = None
    ) -> tuple[int, str]:
        """Exit code and stderr of the command; checks where it went on."""
        place = out or self.out
        expected = newest(place) if goes_on_from is None else goes_on_from
        host = runs.Host(
            runs.flags(self.material, place),
            devices=2,
            before=f"import os\nos.environ['JAXTUNE_CACHE'] = {str(self.folder / 'cache')!r}\n"
            + before,
        )
        code, said = host.end(300), host.stderr
        if "Traceback" in said:
            raise Wrong(f"{self.log}: a traceback\n{said}")
        if "trained: " in said and expected and code == 0:
            self.expect(f"going on after step {expected}" in said, f"not from {expected}\n{said}")
        return code, said

    def expect(self, fine: bool, text: str) -> None:
        if not fine:
            raise Wrong(f"{self.folder.name} {self.log}: {text}")

    def signal(self, name: str) -> None:
        phase = self.dice.choice([*PHASES])
        code, seconds = PHASES[phase]
        delay = self.dice.uniform(0, seconds)
        done = newest(self.out)
        if phase == "cache":  # so that the phase comes about
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        elif phase in ("step", "save") and done == LAST:
            shutil.rmtree(self.out / "checkpoints" / str(LAST))
            done = newest(self.out)
        armed = code.format(step=self.dice.randint(min(done + 1, LAST), LAST))
        status, said = self.run(STRIKE.format(delay=delay, signal=name) + armed)
        self.landed += status != 0
        self.log.append(f"{name} in {phase} after {delay:.2f} s: exit {status}")
        # 0: it had ended before; SIGTERM outside of the loop ends a process as it always did.
        allowed = (0, -9) if name == "SIGKILL" else (0, 75, -15)
        self.expect(status in allowed, f"exit {status}\n{said}")
        if status == 75:
            saved = newest(self.out)
            self.expect(f"after step {saved}, which is saved" in said, f"{saved}\n{said}")

    def corruption(self) -> None:
        step = newest(self.out)
        if step == 0:
            self.run()
            step = newest(self.out)
        files = [f for f in (self.out / "checkpoints" / str(step)).rglob("*") if f.is_file()]
        path = self.dice.choice(sorted(files))
        data = path.read_bytes()
        kind = self.dice.choice(["flip", "truncate", "delete"] if data else ["delete"])
        if kind == "flip":
            at = self.dice.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        elif kind == "truncate":
            path.write_bytes(data[: self.dice.randrange(len(data))])
        else:
            path.unlink()
        self.log.append(f"{kind} {path.relative_to(self.out)}")
        whole = newest(self.out) == step  # not where digests were deleted: it was never finished
        before = newest(self.out, below=step)
        if whole and not before:
            self.refused(step, path.name)
            whole = False
        status, said = self.run(goes_on_from=before if whole else None)
        self.expect(status == 0, f"exit {status}\n{said}")
        if whole:
            self.expect(f"{step}: is damaged and not used" in said, f"not noticed\n{said}")
            self.expect(path.name in said, f"{path.name} not named\n{said}")
        shutil.rmtree(self.out / "hf")  # so that the next run has something to do

    def refused(self, step: int, name: str) -> None:
        """The only checkpoint is damaged; then it is removed, as the message says."""
        kept = (self.out / "metrics.jsonl").read_bytes()
        status, said = self.run()
        self.log.append(f"the only checkpoint: exit {status}")
        self.expect(status == 2, f"exit {status}\n{said}")
        self.expect(f"the only checkpoint, step {step}, is damaged" in said, f"not said\n{said}")
        self.expect(name in said, f"{name} not named\n{said}")
        self.expect((self.out / "metrics.jsonl").read_bytes() == kept, "rows are gone")
        shutil.rmtree(self.out / "checkpoints" / str(step))

    def full_disk(self) -> None:
        with disk(self.folder / "disk", self.out, self.dice) as (place, before, size):
            status, said = self.run(before, out=place)
            self.landed += status != 0
            self.log.append(f"full disk of {size:,} bytes: exit {status}")
            self.expect(status in (0, 2), f"exit {status}\n{said}")
            if status == 2:
                self.expect("jaxtune train: " in said, said)

    def finish(self, reference: Path) -> None:
        status, said = self.run()
        self.expect(status == 0, f"exit {status}\n{said}")
        self.expect(runs.rows_of(self.out) == runs.rows_of(reference), "other metrics")
        ours, theirs = (contents(out / "hf") for out in (self.out, reference))
        self.expect(ours == theirs, f"another model: {sorted(ours)} {sorted(theirs)}")
        left = [path.name for path in (self.out / "checkpoints").iterdir()]
        odd = [name for name in left if not name.isdigit() and not name.startswith("damaged-")]
        self.expect(not odd, f"left over: {odd}")
        outside = {path.name for path in self.folder.iterdir()} - {"out", "cache", "disk"}
        self.expect(not outside, f"written outside: {outside}")


def newest(out: Path, *, below: int = LAST + 1) -> int:
    """The newest step that a start has to go on from, by its files alone; 0 = none."""
    folder = out / "checkpoints"
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    whole = (int(path.name) for path in steps if (path / "digests-0.json").exists())
    return max((step for step in whole if step < below), default=0)


def contents(folder: Path) -> dict[str, bytes]:
    """All files; of the card only that it is there, since it says where the run lay."""
    return {
        path.name: b"" if path.name == "README.md" else path.read_bytes()
        for path in folder.iterdir()
    }


@contextlib.contextmanager
def disk(folder: Path, out: Path, dice: random.Random) -> Iterator[tuple[Path, str, int]]:
    """(output_dir, Python to run before, bytes): a place for the run that is soon full. What lies
    in `out` is there, and goes back afterwards."""
    folder.mkdir(exist_ok=True)
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    held = sum(-(-size // 4096) * 4096 for size in sizes)  # in pages, as a tmpfs keeps them
    size = held + dice.randrange(20_000, 700_000)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        limit = dice.randrange(1_000, 200_000)
        yield out, LIMITED.format(size=limit), limit
        return
    try:
        if out.exists():
            shutil.copytree(out, folder / "out")
            shutil.rmtree(out)
        yield folder / "out", "", size
        if (folder / "out").exists():
            shutil.copytree(folder / "out", out)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("kills", "sigterms", "corruptions", "full-disks"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=5, help="disasters a trial")
    asked = parser.parse_args(argv)
    dice = random.Random(asked.seed)
    events = ["SIGKILL"] * asked.kills + ["SIGTERM"] * asked.sigterms
    events += ["corruption"] * asked.corruptions + ["full_disk"] * asked.full_disks
    dice.shuffle(events)
    began, landed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="storm-") as where:
        base = Path(where)
        material = runs.make_material(base / "material")
        calm = Trial(base / "calm", material, dice)
        code, said = calm.run()
        calm.expect(code == 0, said)
        for number, first in enumerate(range(0, len(events), asked.each)):
            trial = Trial(base / f"trial-{number}", material, dice)
            for event in events[first : first + asked.each]:
                if event.startswith("SIG"):
                    trial.signal(event)
                else:
                    getattr(trial, event)()
            trial.finish(calm.out)
            landed += trial.landed
            seconds = round(time.monotonic() - began)
            print(
                json.dumps({"trial": number, "seconds": seconds, "events": trial.log}), flush=True
            )
            shutil.rmtree(trial.folder)
    print(
        f"{asked.corruptions} corruptions, {asked.kills} kills, {asked.sigterms} SIGTERM, "
        f"{asked.full_disks} full disks ({landed} of these {len(events) - asked.corruptions} met "
        "the run before it had ended): every run ended as the undisturbed one"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
