"""Quantised kernels: the table exactly, errors within its bound, small on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.model.quantise import BLOCK, NF4, dequantise, leaves, quantise

KERNEL = np.random.RandomState(0).normal(size=(192, 3, 8)).astype(np.float32)


def there_and_back(kernel: np.ndarray, kind: str, *, inputs: int = 1, double: bool = False):
    stored = quantise(jnp.asarray(kernel), kind=kind, inputs=inputs, double=double)
    return stored, np.asarray(dequantise(stored, kind=kind, inputs=inputs, dtype=jnp.float32))


def absmax(kernel: np.ndarray) -> np.ndarray:
    """Of each weight's block of 64, in the kernel's shape."""
    blocks = np.abs(kernel.reshape(-1, BLOCK, *kernel.shape[1:])).max(axis=1)
    return np.repeat(blocks, BLOCK, axis=0)


def test_every_value_of_the_table_comes_back_exactly() -> None:
    column = np.resize(np.array(NF4, np.float32), BLOCK) * np.float32(0.5)
    kernel = np.stack([column, -column[::-1]], axis=1)
    stored, back = there_and_back(kernel[:, :1], "nf4")
    np.testing.assert_array_equal(back, kernel[:, :1])
    assert set(np.asarray(stored["codes"]).astype(int).ravel()) == set(range(16))


def test_the_nf4_error_is_within_half_the_largest_gap_of_the_table() -> None:
    _, back = there_and_back(KERNEL, "nf4")
    bound = max(np.diff(NF4)) / 2
    error = np.abs(back - KERNEL) / absmax(KERNEL)
    assert error.max() <= bound + 1e-6
    assert error.max() > 0.9 * bound  # the bound is that of the table, not a loose one
    nearest = np.abs(KERNEL[..., None] / absmax(KERNEL)[..., None] - np.array(NF4)).min(axis=-1)
    np.testing.assert_allclose(error, nearest, atol=1e-6)


def test_double_quantisation_moves_a_scale_by_half_a_step_at_most() -> None:
    plain, once = there_and_back(KERNEL, "nf4")
    stored, twice = there_and_back(KERNEL, "nf4", double=True)
    scales = np.asarray(plain["scales"])
    step = np.abs(scales - scales.mean()).max() / 127
    assert stored["scales"].dtype == jnp.int8
    assert 0 < np.abs(twice - once).max() <= step / 2 + 1e-6


def test_the_int8_error_is_half_a_step_of_its_output() -> None:
    kernel = KERNEL.reshape(192, 24) * np.arange(1, 25, dtype=np.float32)
    _, back = there_and_back(kernel, "int8")
    assert (np.abs(back - kernel) <= np.abs(kernel).max(axis=0) / 127 / 2 + 1e-5).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_odd_sizes_and_two_summed_axes(kind: str) -> None:
    assert not there_and_back(np.zeros((70, 2), np.float32), kind)[1].any()
    kernel = KERNEL[:90].reshape(9, 10, 24)  # 90 inputs: one block and a part of one
    _, back = there_and_back(kernel, kind, inputs=2)
    _, flat = there_and_back(kernel.reshape(90, 24), kind)
    np.testing.assert_array_equal(back, flat.reshape(kernel.shape))
    assert np.abs(back - kernel).max() < 0.16 * np.abs(kernel).max()


@pytest.mark.parametrize(
    ("kind", "double", "most"), [("int8", False, 8.1), ("nf4", False, 4.51), ("nf4", True, 4.14)]
)
def test_bits_of_a_weight(kind: str, double: bool, most: float) -> None:
    """Of a kernel [4096 4096], by shapes and dtypes; uint4 counts as the four bits it has."""
    found = leaves(kind, "DF", "D", {"D": 4096, "F": 4096}, double=double)
    bits = {jnp.dtype("uint4"): 4, jnp.dtype("int8"): 8, jnp.dtype("float32"): 32}
    total = sum(np.prod(leaf.shape) * bits[jnp.dtype(leaf.dtype)] for leaf in found.values())
    assert 0.98 * most < total / 4096**2 <= most
    made = jax.eval_shape(
        lambda w: quantise(w, kind=kind, inputs=1, double=double),
        jax.ShapeDtypeStruct((4096, 4096), jnp.float32),
    )
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (leaf.shape, jnp.dtype(leaf.dtype)) for k, leaf in found.items()
    }
