// Vectors, masks and accumulators with the interface of aie_api and the values of the hardware.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "types.hpp"

namespace aie {

inline constexpr unsigned vector_decl_align = 64;

enum class rounding_mode { floor, conv_even };
inline thread_local rounding_mode rounding = rounding_mode::floor;  // as a core powers up
inline void set_rounding(rounding_mode mode) { rounding = mode; }

namespace host {

// An accumulator shifted right, rounded as the mode says and saturated to T.
template <class T>
T shifted(std::int64_t value, int shift) {
  std::int64_t whole = shift > 0 ? value >> shift : value << -shift;
  if (shift > 0 && rounding == rounding_mode::conv_even) {
    const std::int64_t rest = value - (whole << shift), half = std::int64_t(1) << (shift - 1);
    whole += rest > half || (rest == half && (whole & 1));
  }
  using limits = std::numeric_limits<T>;
  return T(std::clamp<std::int64_t>(whole, limits::min(), limits::max()));
}

}  // namespace host

template <class T, unsigned N>
struct vector {
  using value_type = T;
  static constexpr unsigned size() { return N; }
  std::array<T, N> data{};

  T get(unsigned i) const { return data[i]; }
  T operator[](unsigned i) const { return data[i]; }
  void set(T value, unsigned i) { data[i] = value; }

  template <unsigned M>
  vector<T, M> extract(unsigned part) const {
    vector<T, M> out;
    std::copy_n(data.begin() + part * M, M, out.data.begin());
    return out;
  }
  template <unsigned M>
  vector& insert(unsigned part, const vector<T, M>& v) {
    std::copy_n(v.data.begin(), M, data.begin() + part * M);
    return *this;
  }
  template <class U>
  vector<U, N * sizeof(T) / sizeof(U)> cast_to() const {
    return std::bit_cast<vector<U, N * sizeof(T) / sizeof(U)>>(*this);
  }
};

template <unsigned N>
struct vector<int4, N> {
  using value_type = int4;
  static constexpr unsigned size() { return N; }
  std::array<std::uint8_t, N / 2> data{};

  int8 get(unsigned i) const { return int8(data[i / 2] << (i % 2 ? 0 : 4)) >> 4; }
};

template <unsigned N>
struct mask {
  std::array<bool, N> data{};
  mask operator&(const mask& other) const {
    mask out;
    for (unsigned i = 0; i < N; ++i) out.data[i] = data[i] && other.data[i];
    return out;
  }
};

template <class Tag, unsigned N>
struct accum {
  static constexpr bool real = std::is_same_v<Tag, accfloat>;
  using value = std::conditional_t<real, float, std::int64_t>;
  static constexpr unsigned size() { return N; }
  std::array<value, N> data{};

  accum() = default;
  template <class T>
  explicit accum(const vector<T, N>& v, int shift = 0) { from_vector(v, shift); }

  template <class T>
  void from_vector(const vector<T, N>& v, int shift = 0) {
    for (unsigned i = 0; i < N; ++i) data[i] = value(v.data[i]) * value(std::int64_t(1) << shift);
  }
  template <class T>
  vector<T, N> to_vector(int shift = 0) const {
    vector<T, N> out;
    for (unsigned i = 0; i < N; ++i) {
      if constexpr (real)
        out.data[i] = T(data[i]);
      else
        out.data[i] = host::shifted<T>(data[i], shift);
    }
    return out;
  }
};

// ---- loads and stores

template <unsigned N, class T>
vector<T, N> load_v(const T* from) {
  vector<T, N> out;
  std::memcpy(out.data.data(), from, sizeof(out.data));
  return out;
}

template <class T, unsigned N>
void store_v(T* to, const vector<T, N>& v) {
  std::memcpy(to, v.data.data(), sizeof(v.data));
}

template <class T, unsigned N>
auto zeros() {
  constexpr bool tag = std::is_same_v<T, acc32> || std::is_same_v<T, accfloat>;
  return std::conditional_t<tag, accum<T, N>, vector<T, N>>{};
}

template <class T, unsigned N>
vector<T, N> broadcast(T value) {
  vector<T, N> out;
  out.data.fill(value);
  return out;
}

template <class T, unsigned N, class... V>
auto concat(const vector<T, N>& first, const V&... rest) {
  vector<T, N*(1 + sizeof...(V))> out;
  unsigned part = 0;
  out.insert(part++, first);
  (out.insert(part++, rest), ...);
  return out;
}

template <unsigned N>
vector<int8, N> unpack(const vector<int4, N>& v) {
  vector<int8, N> out;
  for (unsigned i = 0; i < N; ++i) out.data[i] = v.get(i);
  return out;
}

// Runs of `chunk` elements of both in turn: the first half of the result, and the second.
template <class T, unsigned N>
std::pair<vector<T, N>, vector<T, N>> interleave_zip(const vector<T, N>& a, const vector<T, N>& b,
                                                     unsigned chunk) {
  vector<T, 2 * N> out;
  for (unsigned i = 0; i < N; ++i) {
    const unsigned run = i / chunk, place = 2 * run * chunk + i % chunk;
    out.data[place] = a.data[i];
    out.data[place + chunk] = b.data[i];
  }
  return {out.template extract<N>(0), out.template extract<N>(1)};
}

}  // namespace aie
