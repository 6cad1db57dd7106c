"""Packed 4-bit weights against a reading nibble by nibble, and against transformers'."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune.config import ModelError
from jaxtune.hf.mxfp4 import fetch, unpacked
from jaxtune.hf.tensors import open_tensors

E, R, G = 3, 5, 2
# Sign, two bits of exponent (bias 1), one of mantissa; the OCP table written out.
TABLE = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def _pieces(scales=(100, 140)) -> dict[str, np.ndarray]:
    """Every byte occurs among the blocks; values of all sixteen kinds at many scales."""
    rng = np.random.default_rng(0)
    blocks = rng.permutation(np.resize(np.arange(256), E * R * G * 16)).astype(np.uint8)
    return {
        "w_blocks": blocks.reshape(E, R, G, 16),
        "w_scales": rng.integers(*scales, (E, R, G)).astype(np.uint8),
    }


def _by_nibbles(pieces: dict[str, np.ndarray]) -> np.ndarray:
    blocks, scales = pieces["w_blocks"], pieces["w_scales"]
    out = np.zeros((E, G * 32, R))
    for e, r, g, byte in np.ndindex(*blocks.shape):
        scale = 2.0 ** (int(scales[e, r, g]) - 127)
        for half in range(2):
            nibble = int(blocks[e, r, g, byte]) >> 4 * half & 15
            out[e, g * 32 + byte * 2 + half, r] = TABLE[nibble] * scale
    return out


def _open(folder, pieces):
    save_file(pieces, folder / "model.safetensors")
    return unpacked(open_tensors(folder))


def test_any_slice_is_that_of_the_table(tmp_path):
    pieces = _pieces()
    (tensor,) = _open(tmp_path, pieces).values()
    expected = _by_nibbles(pieces)
    assert (tensor.shape, tensor.code) == ((E, G * 32, R), "BF16")
    rng = np.random.default_rng(1)
    cuts = [(slice(0, E), slice(0, G * 32), slice(0, R)), (slice(1, 2), slice(31, 33), slice(4, 5))]
    for _ in range(20):
        low = [int(rng.integers(0, n)) for n in tensor.shape]
        cuts.append(
            tuple(
                slice(a, int(rng.integers(a + 1, n + 1)))
                for a, n in zip(low, tensor.shape, strict=True)
            )
        )
    for cut in cuts:
        found = fetch(tensor, cut)
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found.astype(np.float64), expected[cut])


@pytest.mark.torch
def test_bit_for_bit_as_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pieces = _pieces(scales=(0, 255))
    (tensor,) = _open(tmp_path, pieces).values()
    expected = convert_moe_packed_tensors(
        *(torch.tensor(pieces[f"w_{x}"]) for x in ("blocks", "scales"))
    )
    found = fetch(tensor, tuple(slice(0, n) for n in tensor.shape))
    np.testing.assert_array_equal(found.view(np.int16), expected.view(torch.int16).numpy())


def test_pieces_that_do_not_fit(tmp_path):
    pieces = _pieces()
    cases = {
        "w_blocks has no w_scales": {"w_blocks": pieces["w_blocks"]},
        "w_scales has no w_blocks": {"w_scales": pieces["w_scales"]},
        "are the same weights twice": {**pieces, "w": np.zeros(3, np.float32)},
        r"w_blocks is U8 \[3, 5, 2, 8\]": {
            **pieces,
            "w_blocks": pieces["w_blocks"][..., :8].copy(),
        },
        "_scales F32": {**pieces, "w_scales": pieces["w_scales"].astype(np.float32)},
    }
    for message, broken in cases.items():
        with pytest.raises(ModelError, match=message):
            _open(tmp_path, broken)


def test_the_extent_of_bytes_is_checked(tmp_path):
    header = {"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(3))
    with pytest.raises(ModelError, match=r"w has 3 bytes, which is not U8"):
        open_tensors(tmp_path)
