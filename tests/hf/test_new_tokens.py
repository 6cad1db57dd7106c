"""Tables for tokens that the model did not have (P21): grown when needed, filled by id."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden.cases import CASES, tensors, write_folder

from jaxtune.hf.load import load_params, open_model, with_tokens
from jaxtune.model import decoder
from jaxtune.parallel import mesh as meshes
from jaxtune.tree import named

UNTIED = "llama-biases"
TIED = next(name for name, case in CASES.items() if case.get("tie_word_embeddings"))


def tables(model, shardings=None):
    """Every table of the model as [V D]."""
    params = named(load_params(model, shardings, jnp.float32))
    found = {"model.embed_tokens.weight": np.asarray(params["embed/table"])}
    if "head/kernel" in params:
        found["lm_head.weight"] = np.asarray(params["head/kernel"]).T
    return found


@pytest.mark.parametrize("name", [UNTIED, TIED])
@pytest.mark.parametrize("count", [3, 40])
def test_rows_of_new_ids_are_the_mean_and_no_others_change(name, count, tmp_path):
    model = open_model(write_folder(name, tmp_path))
    rows = model.spec.vocab
    trained = rows - 28  # the rest is padding, as in Qwen's tables
    ids = range(trained, trained + count)
    grown = with_tokens(model, ids, trained=trained)
    assert grown.spec.vocab == max(rows, trained + count)  # never fewer, no more than needed
    found = tables(grown)
    assert len(found) == (1 if name == TIED else 2)
    for tensor, values in found.items():
        source = tensors(name)[tensor]
        mean = source[:trained].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(values[list(ids)], np.tile(mean, (count, 1)), atol=1e-6)
        kept = [i for i in range(rows) if i not in ids]
        np.testing.assert_array_equal(values[kept], source[kept])


def test_eight_devices_hold_the_same_tables(tmp_path):
    model = open_model(write_folder(UNTIED, tmp_path))
    rows = model.spec.vocab
    grown = with_tokens(model, [rows - 2, *range(rows, rows + 8)], trained=rows - 2)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    shardings = meshes.shardings(
        decoder.axes(grown.spec), decoder.abstract(grown.spec, jnp.float32), mesh
    )
    whole, spread = tables(grown), tables(grown, shardings)
    for tensor, values in whole.items():
        np.testing.assert_array_equal(spread[tensor], values)


def test_a_gap_before_a_new_id_is_filled_too(tmp_path):
    model = open_model(write_folder(UNTIED, tmp_path))
    rows = model.spec.vocab
    values = tables(with_tokens(model, [rows + 2], trained=rows))["lm_head.weight"]
    assert values.shape[0] == rows + 3
    np.testing.assert_array_equal(values[rows], values[rows + 2])


def test_the_mean_is_in_the_checkpoints_own_dtype(tmp_path):
    folder = write_folder(UNTIED, tmp_path)
    half = {key: value.astype(np.float16) for key, value in tensors(UNTIED).items()}
    safetensors.numpy.save_file(half, folder / "model.safetensors")
    model = open_model(folder)
    rows = model.spec.vocab
    row = tables(with_tokens(model, [rows], trained=rows))["lm_head.weight"][rows]
    mean = half["lm_head.weight"].mean(axis=0, dtype=np.float64)
    np.testing.assert_array_equal(row, mean.astype(np.float32).astype(np.float16))


def test_no_new_token_is_the_same_model(tmp_path):
    model = open_model(write_folder(UNTIED, tmp_path))
    assert with_tokens(model, [], trained=5) is model
