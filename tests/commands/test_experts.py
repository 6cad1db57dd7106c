"""A mixture as a user trains it with experts on devices of their own: resumed without, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_adapters import losses, params_of, run_settings, write_root

from jaxtune import train
from jaxtune.config import ConfigError

MIXTURE = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
    "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1,
}  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_on_where_experts_have_no_devices_of_their_own(tmp_path: Path) -> None:
    root, before, after = write_root(tmp_path, **MIXTURE), tmp_path / "before", tmp_path / "after"
    train.run(run_settings(root, before, **{"mesh.expert": 2}))
    shutil.copytree(before, after)
    shutil.rmtree(after / "checkpoints" / "4")
    shutil.rmtree(after / "hf")
    train.run(run_settings(root, after, **{"mesh.fsdp": 8}))
    assert len(losses(before)) == 4
    np.testing.assert_allclose(losses(after), losses(before), rtol=1e-5)
    found = params_of(after / "hf")
    for name, value in params_of(before / "hf").items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)


def test_experts_that_cannot_be_spread_are_refused(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    with pytest.raises(ConfigError, match=r"mesh.expert: 2 devices .* this model has none"):
        train.run(run_settings(root, tmp_path / "out", **{"mesh.expert": 2}))
