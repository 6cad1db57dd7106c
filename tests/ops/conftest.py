import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.extend.core import jaxprs_in_params


@pytest.fixture
def largest_array() -> Callable[..., int]:
    """largest_array(f, *args): elements of the largest array made anywhere in the traced `f`,
    inside its loops and calls too."""

    def sizes(jaxpr: Any) -> Iterator[int]:
        for equation in jaxpr.eqns:
            yield from (math.prod(out.aval.shape) for out in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return lambda f, *args: max(sizes(jax.make_jaxpr(f)(*args).jaxpr))
