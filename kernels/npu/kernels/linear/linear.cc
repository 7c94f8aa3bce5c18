// y = x W^T for one block of outputs: INT8 inputs of ROWS tokens, INT4 weights as a bundle has them.
//
// Weights are a block of the layouts npu-aie2 and npu-aie2p, or a slice of one: float16 scales
// (GROUPS, N), then codes of INPUTS x N in blocks of the multiply. Products of one group are summed in
// int32, the groups in float; slices add to what those before them left in y.
#include <aie_api/aie.hpp>

#if __AIE_ARCH__ == 20
constexpr unsigned N = 8;  // AIE2: native 4x16x8
#else
constexpr unsigned N = 16;  // AIE2P: native 4x16x16
#endif
constexpr unsigned M = 4, K = 16, GROUPS = INPUTS / GROUP;
using Multiply = aie::mmul<M, K, N, int8, int4>;
using Floats = aie::vector<float, N>;

// Four tokens: scales of each group, then codes in blocks of the multiply.
struct Tokens {
  float scale[GROUPS][M];
  int8 codes[INPUTS * M];
};

struct Inputs {
  int32 blocks;  // of weights that these tokens meet; the core's loop reads it, too
  int32 unused[15];
  Tokens tokens[ROWS / M];
};

struct Weights {
  int16 scale[GROUPS][N];  // float16
  int8 codes[INPUTS * N / 2];
};

// float16 to float: cores have no instruction for it. Scales are finite.
static Floats widened(const int16 *halves) {
  const aie::accum<acc32, N> wide(aie::load_v<N>(halves));
  const auto bits = wide.template to_vector<int32>(0);
  const auto size = aie::bit_and(int32(0x7fff), bits);
  const auto normal = aie::add(int32(112 << 23), aie::upshift(size, 13)).template cast_to<float>();
  const auto tiny = aie::to_float(size, 24);
  const auto value = aie::select(normal, tiny, aie::lt(size, int32(0x400)));
  return aie::select(value, aie::neg(value), aie::lt(bits, int32(0)));
}

static void multiply(const Tokens &x, const Weights &w, float *y, bool first) {
  aie::accum<accfloat, N> sums[M];
  for (unsigned row = 0; row < M; ++row)
    if (first)
      sums[row] = aie::zeros<accfloat, N>();
    else
      sums[row] = aie::accum<accfloat, N>(aie::load_v<N>(y + row * N));
  for (unsigned group = 0; group < GROUPS; ++group) {
    Multiply products;
    for (unsigned k = group * GROUP / K; k < (group + 1) * GROUP / K; ++k)
      products.mac(aie::load_v<Multiply::size_A>(x.codes + k * Multiply::size_A),
                   aie::load_v<Multiply::size_B>((const int4 *)(w.codes + k * Multiply::size_B / 2)));
    const auto block = products.template to_vector<int32>();
    const Floats scale = widened(w.scale[group]);
    for (unsigned row = 0; row < M; ++row) {
      const Floats both = aie::mul(scale, x.scale[group][row]).template to_vector<float>();
      sums[row] = aie::mac(sums[row], aie::to_float(block.template extract<N>(row)), both);
    }
  }
  for (unsigned row = 0; row < M; ++row)
    aie::store_v(y + row * N, sums[row].template to_vector<float>());
}

extern "C" void linear_block(const int32 *inputs, const int8 *weights, float *y, int32 slice) {
  aie::set_rounding(aie::rounding_mode::conv_even);
  const Inputs &x = *(const Inputs *)inputs;
  for (unsigned i = 0; i < ROWS / M; ++i)
    multiply(x.tokens[i], *(const Weights *)weights, y + i * M * N, slice == 0);
}
