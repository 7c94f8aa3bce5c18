import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.pack import (
    join_planes,
    pack_fields,
    pack_masks,
    pack_pairs,
    pack_quads,
    unpack_fields,
    unpack_masks,
    unpack_pairs,
    unpack_quads,
)

ALL_BYTES = np.arange(256, dtype=np.uint8)


def codes(*values: int) -> NDArray[np.int8]:
    return np.array(values, np.int8)


def test_pairs_put_the_even_code_into_the_low_nibble() -> None:
    assert pack_pairs(codes(0, 1, 2, 3, 4, 5, 6, 7)).tobytes() == bytes.fromhex("10 32 54 76")


def test_pairs_are_twos_complement() -> None:
    assert pack_pairs(codes(-1, -8, -2, 7)).tobytes() == bytes.fromhex("8f 7e")


def test_quads_share_a_word_of_eight_codes() -> None:
    assert pack_quads(codes(0, 1, 2, 3, 4, 5, 6, 7)).tobytes() == bytes.fromhex("40 51 62 73")


def test_quads_are_twos_complement() -> None:
    assert pack_quads(codes(-1, -8, 0, 0, 1, 0, -8, 7)).tobytes() == bytes.fromhex("1f 08 80 70")


def test_two_masks_of_a_word_are_signed_bytes_of_sixteen_times_the_codes() -> None:
    values = np.random.default_rng(0).integers(-8, 8, 8, dtype=np.int8)
    word = pack_quads(values).view("<u4")
    first, second = (word << 4) & 0xF0F0F0F0, word & 0xF0F0F0F0
    np.testing.assert_array_equal(first.astype("<u4").view(np.int8), 16 * values[:4])
    np.testing.assert_array_equal(second.astype("<u4").view(np.int8), 16 * values[4:])


def test_every_byte_survives_as_pairs() -> None:
    unpacked = unpack_pairs(ALL_BYTES)
    assert (unpacked.min(), unpacked.max()) == (-8, 7)
    np.testing.assert_array_equal(pack_pairs(unpacked), ALL_BYTES)


def test_every_byte_survives_as_quads() -> None:
    unpacked = unpack_quads(ALL_BYTES)
    assert (unpacked.min(), unpacked.max()) == (-8, 7)
    np.testing.assert_array_equal(pack_quads(unpacked), ALL_BYTES)


def test_leading_axes_stay() -> None:
    values = np.random.default_rng(1).integers(-8, 8, (3, 5, 16), dtype=np.int8)
    assert pack_pairs(values).shape == pack_quads(values).shape == (3, 5, 8)
    np.testing.assert_array_equal(unpack_pairs(pack_pairs(values)), values)
    np.testing.assert_array_equal(unpack_quads(pack_quads(values)), values)


def test_masks_have_one_bit_for_each_code() -> None:
    values = np.zeros(32, np.int8)
    values[[0, 9]] = 16, 32
    assert pack_masks(values, 2).tobytes() == bytes.fromhex("01000000 00020000")
    assert pack_masks(values, 1).tobytes() == bytes.fromhex("01000000")


def test_fields_of_four_consecutive_codes_lie_in_the_bytes_of_a_word() -> None:
    values = np.random.default_rng(2).integers(-32, 32, 32, dtype=np.int8)
    for high in (1, 2):
        words = pack_fields(values, high)
        mask = (1 << high) - 1
        for run in range(8):
            word = int(words[high * run // 8]) >> high * run % 8
            found = [word >> 8 * byte & mask for byte in range(4)]
            assert found == [int(code) >> 4 & mask for code in values[4 * run : 4 * run + 4]]


@pytest.mark.parametrize("high", [1, 2])
def test_split_codes_survive(high: int) -> None:
    half = 8 << high
    values = np.random.default_rng(3).integers(-half, half, (3, 5, 64), dtype=np.int8)
    masks, fields = pack_masks(values, high), pack_fields(values, high)
    assert masks.shape == (3, 5, 8 * high) and fields.shape == (3, 5, 2 * high)
    for low, above in [
        (unpack_pairs(pack_pairs(values)), unpack_masks(masks, high)),
        (unpack_quads(pack_quads(values)), unpack_fields(fields, high)),
    ]:
        join_planes(low, above, high)
        np.testing.assert_array_equal(low, values)
