from __future__ import annotations

from collections.abc import Iterator

import pytest
from echo import Echo, Running, running


@pytest.fixture(scope="module")
def echo() -> Iterator[Running]:
    """One server for the tests that leave it as it is."""
    with running({"model": Echo()}) as found:
        yield found
