"""The table of what the second Python runs names tests that exist, and one for everything."""

from __future__ import annotations

from typing import get_args

import compat
import pytest
from golden.cases import CASES
from test_floors import COMMANDS

from jaxtune.config import Config
from jaxtune.hf.family.registry import FAMILIES
from jaxtune.ops.attention import IMPLEMENTATIONS


def test_every_entry_is_a_test(pytestconfig: pytest.Config) -> None:
    """As far as this run has collected: of a file, of which it has all."""
    nodes = pytestconfig.stash[compat.COLLECTED]
    files = {node.partition("::")[0] for node in nodes}
    if any("::" in argument for argument in pytestconfig.args):
        files = set()
    entries = {entry for node in nodes for entry in compat.entries_of(node)}
    assert {e for e in compat.NODES if e.partition("::")[0] in files} <= entries


def test_every_kernel_family_optimizer_and_command_has_one() -> None:
    assert set(compat.KERNELS) == set(IMPLEMENTATIONS)
    assert set(compat.OPTIMIZERS) == set(get_args(Config.model_fields["optim"].annotation))
    assert set(compat.COMMANDS) == COMMANDS
    assert set(compat.FAMILIES) == set(FAMILIES)
    assert all(CASES[case]["model_type"] == kind for kind, case in compat.FAMILIES.items())


def test_groups_reach_the_scheduler(request: pytest.FixtureRequest) -> None:
    """A group counts by its name behind the node id; without, both workers compile everything."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not among workers that share groups: nothing to see")
    grouped = [item for item in request.session.items if item.get_closest_marker("xdist_group")]
    assert all("@" in item.nodeid.rpartition("]")[2] for item in grouped)
