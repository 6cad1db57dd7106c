"""Every Python block of the README and docs/ runs as it stands.

A page's blocks run in order, in one namespace, in a folder with a tiny model `MODEL`, an untuned
`BASE`, `examples.jsonl`, and a finished run `OUT`. A block that cannot run there has a comment
`<!-- not run: REASON -->` directly above; `NOT_RUN` counts them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "docs/chat.md": 1,  # needs a server on a fixed port; tests/server talks to one with this client
    "docs/families.md": 1,  # an entry of a table
}
_BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A Python block: the line its code starts at, its code, and whether it can run."""

    line: int
    code: str
    runs: bool


def blocks(text: str) -> list[Block]:
    return [
        Block(text[: match.start(2)].count("\n") + 1, match[2], match[1] is None)
        for match in _BLOCK.finditer(text)
    ]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


FOUND = {named(page): blocks(page.read_text(encoding="utf-8")) for page in PAGES}


@pytest.mark.parametrize(
    "page", [name for name, found in FOUND.items() if any(block.runs for block in found)]
)
def test_blocks_run(
    page: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in FOUND[page]:
        if block.runs:
            # Blank lines in front, so that a traceback names the page's own line.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(ROOT / page), "exec"), namespace)


def test_blocks_that_do_not_run_are_counted() -> None:
    skipped = {name: sum(not block.runs for block in found) for name, found in FOUND.items()}
    assert {name: count for name, count in skipped.items() if count} == NOT_RUN


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        fences = re.findall(
            r"^[ \t]*(?:```|~~~)[ \t]*(?:python|py|python3)\b", page.read_text(), re.M
        )
        assert len(fences) == len(FOUND[named(page)]), page
