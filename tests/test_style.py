"""The house rules that can be counted, by package; `python tests/test_style.py` prints figures.

A number of `PENDING` may only go down: the test fails until it is what the package has.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jaxtune"
COMMANDS = {"train", "preview", "plan", "evaluate", "chat", "report", "convert"}
LONGEST = 60  # lines of a function
MOST_PARAMETERS = 8
MOST_WORDS = 25  # of a docstring's first sentence
# Words that a docstring does not begin with: it says what a function does or a class is.
WRONG_STARTS = {
    "how", "one", "so", "that", "there", "these", "they", "this", "those", "what", "when",
    "where", "whether", "which", "who", "whom", "whose", "why",
}  # fmt: skip
THIRD_PERSON = {
    "adds", "calls", "finds", "gives", "joins", "keeps", "makes", "opens", "prints", "puts",
    "raises", "reads", "refuses", "removes", "returns", "says", "sets", "shows", "splits", "takes",
    "tells", "waits", "writes", "yields",
}  # fmt: skip
PENDING: dict[str, dict[str, int]] = {
    # The server needs optional libraries, so `chat --serve` alone imports it.
    "hidden imports": {"api": 1},
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """A source file: its dotted name without `jaxtune.`, the package it is of, and its tree."""

    name: str
    package: str
    lines: int
    tree: ast.Module


class Violation(NamedTuple):
    """A rule that is not kept, where, and the figure or the text."""

    package: str
    where: str
    what: str


@cache
def modules() -> tuple[Module, ...]:
    return tuple(
        module_of(path.relative_to(PACKAGE), path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    )


def module_of(path: Path, source: str) -> Module:
    parts = path.with_suffix("").parts
    return Module(".".join(parts), parts[0], source.count("\n"), ast.parse(source))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def of_jaxtune(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] == "jaxtune"
    return isinstance(node, ast.Import) and any(
        alias.name.partition(".")[0] == "jaxtune" for alias in node.names
    )


def hidden_imports(files: tuple[Module, ...]) -> Iterator[Violation]:
    """Imports of jaxtune inside functions; `run` of a command may have one."""
    for module in files:
        inner: dict[int, str] = {}
        for function in functions(module.tree):  # outer functions come first
            found = [node for node in ast.walk(function) if of_jaxtune(node)]
            inner |= {node.lineno: function.name for node in found}
        allowed = 1 if module.name in COMMANDS else 0
        for line, name in sorted(inner.items()):
            if allowed and name == "run":
                allowed -= 1
                continue
            yield Violation(module.package, f"{module.name}:{line}", f"in {name}")


def long_functions(files: tuple[Module, ...]) -> Iterator[Violation]:
    for module in files:
        for function in functions(module.tree):
            length = lines_of(function)
            if length > LONGEST:
                yield Violation(module.package, f"{module.name}.{function.name}", str(length))


def many_parameters(files: tuple[Module, ...]) -> Iterator[Violation]:
    for module in files:
        for function in functions(module.tree):
            where, count = f"{module.name}.{function.name}", parameters_of(function)
            if count > MOST_PARAMETERS:
                yield Violation(module.package, where, str(count))


def doubled_classes(files: tuple[Module, ...]) -> Iterator[Violation]:
    """Class names that stand in two modules or more, private ones too."""
    found: dict[str, set[Module]] = defaultdict(set)
    for module in files:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(module)
    for name, homes in sorted(found.items()):
        if len(homes) > 1:
            others = ", ".join(sorted(module.name for module in homes))
            yield from (Violation(module.package, name, others) for module in homes)


def docstrings(files: tuple[Module, ...]) -> Iterator[Violation]:
    """First sentences that are too long or do not begin as a function's or a class's does."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for module in files:
        for node in [module.tree, *(n for n in ast.walk(module.tree) if isinstance(n, kinds))]:
            first = first_sentence(ast.get_docstring(node) or "")
            words = first.split()
            start = words[0].strip("`'\"(),:;").lower() if words else ""
            wrong = WRONG_STARTS if isinstance(node, ast.ClassDef) else WRONG_STARTS | THIRD_PERSON
            if start in wrong or len(words) > MOST_WORDS:
                line = getattr(node, "lineno", 1)
                yield Violation(module.package, f"{module.name}:{line}", first[:100])


def first_sentence(text: str) -> str:
    """The text up to its first full stop, colon or empty line; a doctest is no sentence."""
    paragraph = text.partition("\n\n")[0].partition(">>>")[0]
    return re.split(r"(?<=[.:;])\s", " ".join(paragraph.split()))[0]


def lines_of(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters_of(function: Function) -> int:
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


RULES: dict[str, Callable[[tuple[Module, ...]], Iterator[Violation]]] = {
    "hidden imports": hidden_imports,
    "long functions": long_functions,
    "many parameters": many_parameters,
    "doubled classes": doubled_classes,
    "docstrings": docstrings,
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_hold_where_nothing_is_pending(rule: str) -> None:
    violations = list(RULES[rule](modules()))
    counts = dict(Counter(violation.package for violation in violations))
    shown = "\n".join(
        f"  {found.where}: {found.what}"
        for found in violations
        if counts[found.package] > PENDING.get(rule, {}).get(found.package, 0)
    )
    assert counts == PENDING.get(rule, {}), f"{rule}: lower PENDING, or mend\n{shown}"


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        ("hidden imports", "ops/a.py", "def f():\n    from jaxtune.tree import named"),
        ("hidden imports", "ops/a.py", "def f():\n    def g():\n        import jaxtune.tree"),
        ("hidden imports", "train.py", "def main():\n    from jaxtune.api.train import train"),
        (
            "hidden imports",
            "train.py",
            "def run():\n    from jaxtune import spec\n    from jaxtune import tree",
        ),
        ("long functions", "ops/a.py", "def f():\n" + "    pass\n" * 60),
        ("many parameters", "ops/a.py", "def f(a, b, c, d, *, e, f, g, h, i): ..."),
        ("docstrings", "ops/a.py", '"""What this is."""'),
        ("docstrings", "ops/a.py", 'class A:\n    """There are sizes."""'),
        ("docstrings", "ops/a.py", f'def f():\n    """Adds {"one and " * 13}two."""'),
    ],
)
def test_the_rules_themselves_catch(rule: str, path: str, source: str) -> None:
    files = (module_of(Path(path), source),)
    assert len(list(RULES[rule](files))) == 1
    twice = (*files, module_of(Path("model/b.py"), "class A: ..."))
    doubled = list(doubled_classes((*twice, module_of(Path("ops/c.py"), "class A: ..."))))
    assert {"model", "ops"} <= {violation.package for violation in doubled}


def test_what_is_allowed() -> None:
    command = module_of(Path("train.py"), "def run():\n    from jaxtune.api.train import train")
    method = "class A:\n    def f(self, a, b, c, d, e, f, g, h):\n        '''Make A.'''"
    files = (command, module_of(Path("ops/a.py"), method))
    assert not [found for rule in RULES.values() for found in rule(files)]


def main() -> None:
    files = modules()
    packages = sorted({module.package for module in files})
    counts = {rule: Counter(v.package for v in check(files)) for rule, check in RULES.items()}
    print(f"{'package':12}{'lines':>8}" + "".join(f"{rule:>17}" for rule in RULES))
    for package in [*packages, "total"]:
        here = [m for m in files if package in (m.package, "total")]
        numbers = [
            count.total() if package == "total" else count[package] for count in counts.values()
        ]
        figures = "".join(f"{number:17}" for number in numbers)
        print(f"{package:12}{sum(m.lines for m in here):8,}{figures}")
    every = [(f"{m.name}.{f.name}", f) for m in files for f in functions(m.tree)]
    where, longest = max(every, key=lambda each: lines_of(each[1]))
    print(f"longest function: {where}, {lines_of(longest)} lines")
    where, most = max(every, key=lambda each: parameters_of(each[1]))
    print(f"most parameters: {where}, {parameters_of(most)}")
    names = {found.where for found in doubled_classes(files)}
    print(f"doubled class names: {len(names)}: {', '.join(sorted(names)) or 'none'}")
    if sys.argv[1:] == ["-v"]:
        for rule, check in RULES.items():
            for found in check(files):
                print(f"{rule}: {found.where}: {found.what}")
    print("PENDING =", {rule: dict(count) for rule, count in counts.items() if count})


if __name__ == "__main__":
    main()
