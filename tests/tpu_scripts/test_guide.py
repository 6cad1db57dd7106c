"""docs/tpu.md shows what every script prints, and names no file that is not there."""

from __future__ import annotations

import re

import guide


def test_every_dry_run_is_what_the_script_prints() -> None:
    text = guide.GUIDE.read_text(encoding="utf-8")
    found = guide.blocks(text)
    named = {re.search(r"tpu_scripts/(\w+\.sh)", command)[1] for command, _ in found}  # type: ignore[index]
    assert named == {
        *("create.sh", "setup.sh", "launch.sh", "logs.sh", "status.sh", "resume.sh", "fetch.sh"),
        *("delete.sh", "gke.sh", "slurm.sh"),
    }
    for command, shown in found:
        assert re.search(r"--dry_run\b", command), command
        assert shown == guide.printed(command), f"python tests/tpu_scripts/guide.py: {command}"


def test_a_changed_block_is_noticed() -> None:
    text = "```console\n$ echo a \\\n  b --dry_run\nold\n```\n"
    assert guide.blocks(text) == [("echo a \\\n  b --dry_run", "old\n")]
    assert guide.rewritten(text).splitlines()[-2] == "a b --dry_run"


def test_files_that_are_named_are_there() -> None:
    text = guide.GUIDE.read_text(encoding="utf-8")
    folders = "tpu_scripts|configs|docs|benchmarks|tests"
    names = set(re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w", text))
    assert len(names) > 10
    assert [name for name in sorted(names) if not (guide.ROOT / name).exists()] == []
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    links = re.findall(r"\]\(([^)#:]+)\)", prose)
    assert len(links) > 2
    for link in links:
        assert (guide.GUIDE.parent / link).exists(), link
