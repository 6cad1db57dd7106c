from __future__ import annotations

import pytest

from jaxtune.cli import ThisProcess


@pytest.fixture(autouse=True)
def _called_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets notes and progress be silent, as they are for a caller that is no command."""
    monkeypatch.setattr(ThisProcess, "is_command", False)
