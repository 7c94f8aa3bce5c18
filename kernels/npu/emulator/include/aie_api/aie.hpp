// A host version of the part of aie_api that our kernels use. Same names and the same integers;
// floats are IEEE single precision where cores emulate them with bfloat16 products.
#pragma once

#include "vector.hpp"

namespace aie {

namespace host {

template <class T, unsigned N, class F>
vector<T, N> map(const vector<T, N>& v, F f) {
  vector<T, N> out;
  for (unsigned i = 0; i < N; ++i) out.data[i] = T(f(v.data[i]));
  return out;
}

template <unsigned N, class T, class F>
mask<N> test(const vector<T, N>& v, F f) {
  mask<N> out;
  for (unsigned i = 0; i < N; ++i) out.data[i] = f(v.data[i]);
  return out;
}

}  // namespace host

// ---- element by element

template <class T, unsigned N>
vector<T, N> add(const vector<T, N>& a, const vector<T, N>& b) {
  vector<T, N> out;
  for (unsigned i = 0; i < N; ++i) out.data[i] = T(a.data[i] + b.data[i]);
  return out;
}
template <class T, unsigned N>
vector<T, N> add(T a, const vector<T, N>& v) {
  return host::map(v, [a](T x) { return a + x; });
}
template <class T, unsigned N>
vector<T, N> sub(T a, const vector<T, N>& v) {
  return host::map(v, [a](T x) { return a - x; });
}
template <class T, unsigned N>
vector<T, N> neg(const vector<T, N>& v) {
  return host::map(v, [](T x) { return -x; });
}
template <class T, unsigned N>
vector<T, N> min(const vector<T, N>& v, T a) {
  return host::map(v, [a](T x) { return std::min(x, a); });
}
template <class T, unsigned N>
vector<T, N> max(const vector<T, N>& v, T a) {
  return host::map(v, [a](T x) { return std::max(x, a); });
}
template <class T, unsigned N>
vector<T, N> downshift(const vector<T, N>& v, unsigned shift) {
  return host::map(v, [shift](T x) { return x >> shift; });
}
template <class T, unsigned N>
vector<T, N> upshift(const vector<T, N>& v, unsigned shift) {
  return host::map(v, [shift](T x) { return x << shift; });
}
template <class T, unsigned N>
vector<T, N> bit_and(T a, const vector<T, N>& v) {
  return host::map(v, [a](T x) { return a & x; });
}

template <class T, unsigned N>
mask<N> le(const vector<T, N>& v, T a) {
  return host::test<N>(v, [a](T x) { return x <= a; });
}
template <class T, unsigned N>
mask<N> gt(const vector<T, N>& v, T a) {
  return host::test<N>(v, [a](T x) { return x > a; });
}
template <class T, unsigned N>
mask<N> lt(const vector<T, N>& v, T a) {
  return host::test<N>(v, [a](T x) { return x < a; });
}
// b where the mask is set, a elsewhere.
template <class T, unsigned N>
vector<T, N> select(const vector<T, N>& a, const vector<T, N>& b, const mask<N>& m) {
  vector<T, N> out;
  for (unsigned i = 0; i < N; ++i) out.data[i] = m.data[i] ? b.data[i] : a.data[i];
  return out;
}
template <class T, unsigned N>
vector<T, N> select(T a, const vector<T, N>& v, const mask<N>& m) {
  return select(broadcast<T, N>(a), v, m);
}

template <class T, unsigned N>
T reduce_max(const vector<T, N>& v) {
  return *std::max_element(v.data.begin(), v.data.end());
}
template <class T, unsigned N>
T reduce_add(const vector<T, N>& v) {
  T sum = 0;
  for (T x : v.data) sum = T(sum + x);
  return sum;
}

// ---- products

template <class T, unsigned N>
using product = accum<std::conditional_t<std::is_same_v<T, float>, accfloat, acc32>, N>;

template <class T, unsigned N>
product<T, N> mul(const vector<T, N>& a, const vector<T, N>& b) {
  product<T, N> out;
  using value = typename product<T, N>::value;
  for (unsigned i = 0; i < N; ++i) out.data[i] = value(a.data[i]) * value(b.data[i]);
  return out;
}
template <class T, unsigned N>
product<T, N> mul(const vector<T, N>& a, T b) {
  return mul(a, broadcast<T, N>(b));
}
template <class T, unsigned N>
product<T, N> mac(const product<T, N>& acc, const vector<T, N>& a, const vector<T, N>& b) {
  product<T, N> out = mul(a, b);
  for (unsigned i = 0; i < N; ++i) out.data[i] = acc.data[i] + out.data[i];
  return out;
}

// C (M, N) += A (M, K) B (K, N), row-major operands; sums in 32 bits.
template <unsigned M, unsigned K, unsigned N, class A, class B>
struct mmul {
  static constexpr unsigned size_A = M * K, size_B = K * N, size_C = M * N;
  std::array<int32, M * N> data{};

  mmul() = default;
  explicit mmul(const vector<int32, M * N>& v) : data(v.data) {}

  void mac(const vector<A, M * K>& a, const vector<B, K * N>& b) {
    int32 right[K][N];
    for (unsigned k = 0; k < K; ++k)
      for (unsigned n = 0; n < N; ++n) right[k][n] = b.get(k * N + n);
    for (unsigned m = 0; m < M; ++m)
      for (unsigned k = 0; k < K; ++k)
        for (unsigned n = 0; n < N; ++n) data[m * N + n] += int32(a.data[m * K + k]) * right[k][n];
  }
  void mul(const vector<A, M * K>& a, const vector<B, K * N>& b) {
    data.fill(0);
    mac(a, b);
  }
  template <class T>
  vector<T, M * N> to_vector(int shift = 0) const {
    vector<T, M * N> out;
    for (unsigned i = 0; i < M * N; ++i) out.data[i] = host::shifted<T>(data[i], shift);
    return out;
  }
};

// ---- between integers and floats

template <class T, unsigned N>
vector<float, N> to_float(const vector<T, N>& v, int shift = 0) {
  vector<float, N> out;
  for (unsigned i = 0; i < N; ++i) out.data[i] = std::ldexp(float(v.data[i]), -shift);
  return out;
}
// Rounded to nearest, ties to even, and saturated.
template <class T, class S, unsigned N>
vector<T, N> to_fixed(const vector<S, N>& v, int shift = 0) {
  using limits = std::numeric_limits<T>;
  vector<T, N> out;
  for (unsigned i = 0; i < N; ++i) {
    const double x = std::nearbyint(std::ldexp(double(float(v.data[i])), shift));
    out.data[i] = T(std::clamp<double>(x, limits::min(), limits::max()));
  }
  return out;
}
inline float inv(float x) { return 1.0f / x; }
template <unsigned N>
vector<float, N> inv(const vector<float, N>& v) {
  return host::map(v, [](float x) { return 1.0f / x; });
}

#if __AIE_ARCH__ == 21
template <class T, unsigned N>
vector<T, N> exp2(const vector<float, N>& v) {
  vector<T, N> out;
  for (unsigned i = 0; i < N; ++i) out.data[i] = T(std::exp2(v.data[i]));
  return out;
}
#endif

// ---- tables: four copies of the values, eight of them in 128 bits, each such run twice

enum class lut_oor_policy { saturate, truncate };

template <unsigned Accesses, class T>
struct lut {
  static_assert(Accesses == 4 && sizeof(T) == 2);
  unsigned elements;
  const T *ab, *cd;
  lut(unsigned elements, const void* ab, const void* cd)
      : elements(elements), ab((const T*)ab), cd((const T*)cd) {}
};

template <class Index, class Table, lut_oor_policy policy = lut_oor_policy::saturate>
struct parallel_lookup;

template <class Index, class T, lut_oor_policy policy>
struct parallel_lookup<Index, lut<4, T>, policy> {
  lut<4, T> table;
  explicit parallel_lookup(const lut<4, T>& table) : table(table) {}

  template <unsigned N>
  vector<T, N> fetch(const vector<Index, N>& index) const {
    vector<T, N> out;
    for (unsigned i = 0; i < N; ++i) {
      const unsigned wanted = index.data[i], last = table.elements - 1;
      const unsigned at = policy == lut_oor_policy::truncate ? wanted & last : std::min(wanted, last);
      const T* copy = i % 4 < 2 ? table.ab : table.cd;
      out.data[i] = copy[at / 8 * 16 + i % 2 * 8 + at % 8];
    }
    return out;
  }
};

}  // namespace aie
