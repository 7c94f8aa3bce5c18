// C += A B for one tile: int8 (TILE_M, TILE_K) and (TILE_K, TILE_N), int32 sums.
//
// A and B arrive in blocks of the multiply, block rows first, which the mem tile makes of row-major
// tiles; C is row-major. TILE_M, TILE_K and TILE_N are macros.
#include <aie_api/aie.hpp>

#if __AIE_ARCH__ == 20
constexpr unsigned R = 4;  // AIE2: native 4x8x8
#else
constexpr unsigned R = 8;  // AIE2P: native 8x8x8
#endif
constexpr unsigned S = 8, T = 8;
using Multiply = aie::mmul<R, S, T, int8, int8>;

static aie::vector<int32, Multiply::size_C> load_rows(const int32 *c) {
  aie::vector<int32, Multiply::size_C> rows;
  for (unsigned row = 0; row < R; ++row) rows.insert(row, aie::load_v<T>(c + row * TILE_N));
  return rows;
}

static void store_rows(int32 *c, const aie::vector<int32, Multiply::size_C> &rows) {
  for (unsigned row = 0; row < R; ++row)
    aie::store_v(c + row * TILE_N, rows.template extract<T>(row));
}

extern "C" {

void matmul_zero(int32 *c) {
  for (unsigned i = 0; i < TILE_M * TILE_N; i += 16) aie::store_v(c + i, aie::zeros<int32, 16>());
}

void matmul_add(const int8 *a, const int8 *b, int32 *c) {
  for (unsigned i = 0; i < TILE_M / R; ++i)
    for (unsigned j = 0; j < TILE_N / T; ++j) {
      int32 *block = c + i * R * TILE_N + j * T;
      Multiply sum(load_rows(block));
      for (unsigned k = 0; k < TILE_K / S; ++k) {
        const int8 *left = a + (i * (TILE_K / S) + k) * Multiply::size_A;
        const int8 *right = b + (k * (TILE_N / T) + j) * Multiply::size_B;
        sum.mac(aie::load_v<Multiply::size_A>(left), aie::load_v<Multiply::size_B>(right));
      }
      store_rows(block, sum.template to_vector<int32>());
    }
}

}  // extern "C"
