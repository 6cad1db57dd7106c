"""Names of leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.config import ConfigError
from jaxtune.tree import map_named, merge, named, select, split, unnamed

TREE = {"stack_0": {"q": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3}}

keys = st.text("abc_", min_size=1, max_size=3)
trees = st.recursive(st.integers(), lambda t: st.dictionaries(keys, t, min_size=1, max_size=3))


def test_names_and_order() -> None:
    assert list(named(TREE)) == ["head/kernel", "stack_0/q/bias", "stack_0/q/kernel"]


@given(st.dictionaries(keys, trees, min_size=1, max_size=3))
def test_unnamed_is_the_inverse(tree: dict) -> None:
    assert unnamed(named(tree)) == tree


def test_map_named_gives_names_and_the_other_trees() -> None:
    doubled = map_named(lambda name, a, b: (name, a + b), TREE, TREE)
    assert doubled["stack_0"]["q"]["bias"] == ("stack_0/q/bias", 4)


def test_select_and_a_pattern_that_matches_nothing() -> None:
    assert named(select(TREE, r"q/.*")) == {
        "head/kernel": False,
        "stack_0/q/bias": True,
        "stack_0/q/kernel": True,
    }
    with pytest.raises(ConfigError, match=r"pattern 'v/' matches no parameter. There are: head"):
        select(TREE, "v/")


def test_split_and_merge_are_inverse() -> None:
    yes, no = split(TREE, lambda name: name.endswith("bias"))
    assert merge(yes, no) == merge(no, yes) == TREE
    assert split(TREE, lambda name: True) == (TREE, {})
    with pytest.raises(ValueError, match="in both trees: "):
        merge(TREE, yes)
