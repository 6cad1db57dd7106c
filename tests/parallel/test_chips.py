import pytest

from jaxtune.config import ConfigError
from jaxtune.parallel.chips import CHIPS, Slice, parse_slice, peak_flops


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-16", "v5e:4x4", 16),
        ("V5e-256", "v5e:16x16", 256),
        ("v6e-8", "v6e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-8", "v4:2x2x1", 4),
        ("tpu7x-8", "tpu7x:2x2x1", 4),
        ("v5e:2x4", "v5e:2x4", 8),
        ("2xv5e-256", "v5e:16x16", 512),
        ("2 x v6e-8", "v6e:2x4", 16),
        ("2*v6e-8", "v6e:2x4", 16),
        ("2*7x-8", "tpu7x:2x2x1", 8),
        ("v5p:16x20x28", "v5p:16x20x28", 8960),
    ],
)
def test_names_as_people_rent_them(name: str, topology: str, chips: int) -> None:
    found = parse_slice(name)
    assert (found.topology, found.chips) == (topology, chips)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-7", r"no 'v5e-7'\. There are: v5e-1, v5e-4, v5e-8"),
        ("v5p-6", r"There are: v5p-8, v5p-16"),
        ("v9-8", r"'v9-8' is not known"),
        ("v5e:4x4x4", r"a v5e slice is written as v5e:2x4"),
        ("v5e:0x4", r"written as v5e:2x4"),
        ("", r"'' is not known"),
        ("v5e-²", r"no 'v5e-²'\. There are"),
        ("v5e-٨", r"no 'v5e-٨'\. There are"),
        ("v5e:²x4", r"written as v5e:2x4"),
        ("h100-²", r"'h100-²' is not known"),
        ("²xv5e-8", r"'²xv5e-8' is not known"),
        ("2**v5e-8", r"'2\*\*v5e-8' is not known"),
        ("v5e-" + "9" * 5000, r"no 'v5e-999"),
        ("v5e:1000000x1000000", r"1,000,000,000,000 chips; the largest slice of v5e has 256"),
        ("v5e:16x32", r"512 chips; the largest slice of v5e has 256"),
        ("tpu7x:32x32x32", r"the largest slice of tpu7x has 9,216"),
        ("100000xv5e-8", r"800,000 chips; plans are made for up to 131,072"),
    ],
)
def test_other_names_are_refused_with_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_slice(name)


def test_a_shape_is_a_slice() -> None:
    assert parse_slice("v5e:4x4") == Slice("v5e", (4, 4)) == parse_slice("v5e-16")


def test_peak_is_of_a_device_not_of_a_chip() -> None:
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v4") == 275e12
    assert peak_flops("TPU7x") == 2307e12 / 2
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
