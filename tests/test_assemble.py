"""What a config makes of a mesh: rows of a step, and what cannot be cut."""

from __future__ import annotations

import jax
import pytest

from jaxtune.assemble import rows_per_step
from jaxtune.config import ConfigError, load
from jaxtune.mesh import make_mesh


def rows(**fields: object) -> int:
    config = load(None, {"mesh.fsdp": 4, "mesh.context": 2, **fields})
    return rows_per_step(config, make_mesh(config.mesh.model_dump(), jax.devices()[:8]))


def test_rows_are_of_all_devices_that_do_not_share_one() -> None:
    assert rows(per_device_train_batch_size=3, gradient_accumulation_steps=2) == 4 * 3 * 2
    assert rows(per_device_train_batch_size=3, global_batch_size=24) == 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 1023}, "1023 tokens cannot be cut over mesh.context=2 .* a multiple of 4"),
        ({"packing": False}, "mesh.context: 2 devices share a row .* Set packing: true"),
        ({"global_batch_size": 30}, "30 rows do not divide into microbatches .* multiple of 32"),
    ],
)
def test_what_cannot_be_cut_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows(**fields)
