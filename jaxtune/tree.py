"""Names of leaves: one spelling, `stack_0/layer_0/attention/q/kernel`, for rules that go by name.

A rule that matches nothing is a mistake in the rule, so it is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.config import ConfigError

SHOWN = 40  # names that an error lists; the layers of a stack share theirs
Tree = Any  # nested dicts with string keys; leaves are arrays, shapes or anything not a dict


def named(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to {"a/b/c": leaf}, in the order of sorted names.

    >>> named({"b": {"c": 2}, "a": 1})
    {'a': 1, 'b/c': 2}
    """
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key in sorted(tree):
        leaves.update(named(tree[key], f"{prefix}/{key}" if prefix else str(key)))
    return leaves


def unnamed(leaves: Mapping[str, Any]) -> Tree:
    """Nest names again: the inverse of `named`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *groups, last = name.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return tree


def map_named(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Map `f(name, leaf, *leaves_of_rest)` over the leaves of `tree`."""
    others = [named(other) for other in rest]
    return unnamed(
        {name: f(name, leaf, *(o[name] for o in others)) for name, leaf in named(tree).items()}
    )


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Split a tree in two: leaves whose name is `chosen`, and the others. `merge` undoes it.

    >>> split({"a": 1, "b": {"c": 2, "d": 3}}, lambda name: name == "b/c")
    ({'b': {'c': 2}}, {'a': 1, 'b': {'d': 3}})
    """
    leaves = named(tree)
    return (
        unnamed({name: leaf for name, leaf in leaves.items() if chosen(name)}),
        unnamed({name: leaf for name, leaf in leaves.items() if not chosen(name)}),
    )


def merge(one: Tree, other: Tree) -> Tree:
    """Merge two trees; ValueError where both have a leaf of the same name."""
    a, b = named(one), named(other)
    if twice := sorted(a.keys() & b.keys()):
        raise ValueError(f"in both trees: {', '.join(twice[:4])}")
    return unnamed({**a, **b})


def select(tree: Tree, pattern: str) -> Tree:
    """A tree of booleans: does `pattern` (a regex, searched) match the leaf's name?"""
    chosen = map_named(lambda name, _: re.search(pattern, name) is not None, tree)
    if not any(named(chosen).values()):
        names = list(named(tree))
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        raise ConfigError(f"pattern '{pattern}' matches no parameter. There are: {shown}.")
    return chosen
