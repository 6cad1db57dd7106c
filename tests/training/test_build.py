"""What a config makes of a mesh: rows of a step, and what cannot be cut."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxtune.config import ConfigError, load
from jaxtune.parallel.mesh import check_experts, make_mesh
from jaxtune.training.build import keep_compiled, rows_per_step


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


def test_experts_that_are_not_there_or_do_not_divide_are_refused() -> None:
    mesh = make_mesh({"fsdp": -1, "expert": 4}, jax.devices()[:8])
    check_experts(8, mesh)
    check_experts(0, make_mesh({"fsdp": -1}))
    with pytest.raises(ConfigError, match=r"mesh.expert: 4 devices .* has none. Leave mesh.expert"):
        check_experts(0, mesh)
    with pytest.raises(ConfigError, match=r"6 experts do not divide over 4 .* one of 2, 3, 6, or"):
        check_experts(6, mesh)


def test_compiled_programs_are_kept_where_the_field_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        for told, field, folder in (
            ("/told", "auto", "/told"),
            (None, "auto", str(tmp_path / "compiled")),
            ("/told", "/mine", "/mine"),
            ("/told", "none", None),
            ("/told", None, None),
        ):
            jax.config.update("jax_compilation_cache_dir", told)
            monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path))
            keep_compiled(field)
            assert jax.config.jax_compilation_cache_dir == folder
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
