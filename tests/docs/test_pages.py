"""The pages name flags, files and links that are there; the reference covers everything."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import jaxtune
from jaxtune import config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import reference  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_NAMES = "|".join(reference.COMMANDS)


def _commands(text: str) -> list[tuple[str, str]]:
    """(command, its words) of every `jaxtune ...` line of a shell block, continuations joined."""
    found = []
    for block in re.findall(r"^ *```(?:bash|console)\n(.*?)^ *```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition(" #")[0]
            match = re.search(rf"(?:python -m jaxtune\.|\bjaxtune )({_NAMES})\b(.*)", line)
            if match:
                found.append((match[1], match[2]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_flags_in_shell_blocks_exist(page: Path) -> None:
    fields = {*config.field_names(config.Config), *config.ALIASES, "config", "help"}
    for command, words in _commands(page.read_text(encoding="utf-8")):
        options = reference.options_of(importlib.import_module(f"jaxtune.{command}"))
        own = {field.alias or name for name, field in options.model_fields.items()}
        flags = {
            flag.replace("-", "_") for flag in re.findall(r"(?<=\s)--([A-Za-z][\w.-]*)", words)
        }
        assert flags - own - fields == set(), f"{page.name}: {command}{words}"


def test_names_of_the_python_api_exist() -> None:
    public = {*jaxtune._PUBLIC, *jaxtune._COMMANDS}
    notebook = ROOT / "notebooks" / "finetune.ipynb"
    named = {
        name
        for page in (*PAGES, *([notebook] if notebook.exists() else []))
        for name in re.findall(r"\bjt\.([A-Za-z]\w*)", page.read_text(encoding="utf-8"))
    }
    assert named - public == {"NAME"}
    assert public - named == set(), "docs/python.md names all of it"


def test_every_public_name_has_its_docstring() -> None:
    text = reference.python_api()
    for name in {*jaxtune._PUBLIC, *jaxtune._COMMANDS}:
        assert re.search(rf"^## jt\.{name}\n\n(?:```text\n[^`]+```\n\n)?\w", text, re.M), name


def test_shell_blocks_are_read() -> None:
    text = "```bash\njaxtune train --lora.r 16 \\\n  --no_such_flag 1   # --comment\n```\n"
    assert [(name, words.split()) for name, words in _commands(text)] == [
        ("train", ["--lora.r", "16", "--no_such_flag", "1"])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", prose)
    files = re.findall(r"`((?!OUT)(?:\w+/)+[\w.-]+\.(?:py|md|sh|jinja))\b", text)
    files += re.findall(
        r"`((?:jaxtune|tests|configs|docs|benchmarks|tpu_scripts)/[\w/.-]+/)`", text
    )
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in files if not _exists(name)]
    assert missing == []


def _exists(name: str) -> bool:
    """Files are named from the repository's folder or from the package's."""
    return (ROOT / name).exists() or (ROOT / "jaxtune" / name).exists()


def test_the_reference_has_every_field_and_flag() -> None:
    fields, flags = reference.config_fields(), reference.command_flags()
    for name, field in config.field_names(config.Config).items():
        assert field.description, name
        assert f"| `{name}` |" in fields
    for command in reference.COMMANDS:
        options = reference.options_of(importlib.import_module(f"jaxtune.{command}"))
        for name, field in options.model_fields.items():
            assert field.description, (command, name)
            assert f"`--{field.alias or name}`" in flags or name in options.positional()


def test_every_reference_page_is_filled() -> None:
    used = [
        name
        for page in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"^\{\{ (\w+) \}\}$", page.read_text(encoding="utf-8"), re.M)
    ]
    assert sorted(used) == sorted(reference.SECTIONS)
    assert "| 75 |" in reference.on_page_markdown("{{ exit_codes }}")
    with pytest.raises(KeyError, match="nothing"):
        reference.on_page_markdown("{{ nothing }}")
