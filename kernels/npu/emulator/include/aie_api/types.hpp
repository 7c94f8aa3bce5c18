// Scalar types of a core, on the host.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

using int8 = std::int8_t;
using int16 = std::int16_t;
using int32 = std::int32_t;
using uint16 = std::uint16_t;

struct int4 {};  // only in vectors, two codes in a byte, the first in the low nibble

// Rounded to nearest, ties to even, as the core does after set_rounding(conv_even).
struct bfloat16 {
  uint16 bits = 0;
  bfloat16() = default;
  bfloat16(float x) {
    const auto word = std::bit_cast<std::uint32_t>(x);
    const bool nan = x != x;
    bits = nan ? 0x7fc0 : uint16((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(std::uint32_t(bits) << 16); }
};

// Tags of accumulators, by their use here: exact integers, or float32.
struct acc32 {};
struct accfloat {};
