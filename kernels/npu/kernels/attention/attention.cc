// Online softmax attention of ROWS query rows over blocks of KEYS keys, head size DIM.
//
// Queries are int16 in two limbs of int8, keys and values int8 or int4 (KV_BITS), scores int32. Weights 2^(t - m) are
// integers of 14 bits and m, the running maximum of a row, is an integer too: so sums of weights and
// of weighted values are integers, and a new maximum shifts them. `state` keeps m in units of 1/256
// and the sum of weights for each row. ../../README.md and twin.py say the same in other words.
#include <aie_api/aie.hpp>

#if __AIE_ARCH__ == 20
constexpr unsigned SCORE_M = 4, SCORE_K = KV_BITS == 8 ? 8 : 16, SCORE_N = 8;
constexpr unsigned MIX_M = 4;
#else
constexpr unsigned SCORE_M = KV_BITS == 8 ? 8 : 4, SCORE_K = KV_BITS == 8 ? 8 : 16;
constexpr unsigned SCORE_N = KV_BITS == 8 ? 8 : 16, MIX_M = 8;
#endif
constexpr unsigned MIX_K = 4, MIX_N = 8, QUAD = 4;

#if KV_BITS == 8
using Code = int8;
#else
using Code = int4;
#endif
using Score = aie::mmul<SCORE_M, SCORE_K, SCORE_N, int8, Code>;
using Mix = aie::mmul<MIX_M, MIX_K, MIX_N, int16, int8>;

constexpr unsigned CODES = KEYS * DIM * KV_BITS / 8;  // bytes of a block of keys, or of values
constexpr int32 ONE = 256;                            // a factor of two, in units of m
constexpr int32 LOWEST = -(1 << 28);                  // m before the first key
constexpr int32 MASKED = -(1 << 30);                  // a score that does not count
constexpr int32 FULL = 1 << 23;                       // sum of weights above which m is raised

// The queries of one block: words, then codes in blocks of the multiply.
struct Queries {
  int32 blocks;    // of keys that these rows see; the core's loop reads it, too
  int32 first;     // position of the first key
  int32 position;  // of the first row
  int32 step;      // from row to row: 1, or 0 when all rows are heads of one token
  int32 window;    // keys before this distance do not count
  float cap;       // scores s become cap tanh(s / cap), both in powers of two; 0 leaves them
  float inverse;   // 1 / cap
  int32 unused[9];
  float scale[ROWS];  // of the codes, with log2(e) / sqrt(head size) in it
  int8 high[ROWS * DIM];  // codes are 256 high + low
  int8 low[ROWS * DIM];
};

// One block of keys and values: codes of keys, codes of values, then a scale of each.
struct Keys {
  int8 keys[CODES];
  int8 values[CODES];
  float scale[KEYS];   // of a key
  int16 weight[KEYS];  // scale of a value in 1 / 32768 of the largest
};

alignas(aie::vector_decl_align) static const int32 LANES[32] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// 2^(-distance / 256) in 1 / 16384; 0 from 15 on.
static aie::vector<int16, KEYS> power(const aie::vector<int32, KEYS> &distance);

#if __AIE_ARCH__ == 20
#include "exp2_table.h"
static aie::vector<int16, KEYS> power(const aie::vector<int32, KEYS> &distance) {
  using Table = aie::lut<4, int16>;
  const aie::parallel_lookup<uint16, Table> whole(Table(16, WHOLE, WHOLE_COPY));
  const aie::parallel_lookup<uint16, Table> part(Table(256, PART, PART_COPY));
  const auto index = [](const aie::vector<int32, KEYS> &v) {
    return aie::accum<acc32, KEYS>(v).template to_vector<int16>(0).template cast_to<uint16>();
  };
  const auto high = whole.fetch(index(aie::downshift(distance, 8)));
  const auto low = part.fetch(index(aie::bit_and(int32(255), distance)));
  return aie::mul(high, low).template to_vector<int16>(14);
}
#else
static aie::vector<int16, KEYS> power(const aie::vector<int32, KEYS> &distance) {
  return aie::to_fixed<int16>(aie::exp2<bfloat16>(aie::to_float(aie::neg(distance), 8)), 14);
}
#endif

static void score(const Queries &q, const Keys &kv, int32 *scores) {
  for (unsigned i = 0; i < ROWS / SCORE_M; ++i)
    for (unsigned j = 0; j < KEYS / SCORE_N; ++j) {
      Score high, low;
      for (unsigned k = 0; k < DIM / SCORE_K; ++k) {
        const unsigned left = (i * (DIM / SCORE_K) + k) * Score::size_A;
        const int8 *right = kv.keys + (k * (KEYS / SCORE_N) + j) * Score::size_B * KV_BITS / 8;
        const auto keys = aie::load_v<Score::size_B>((const Code *)right);
        high.mac(aie::load_v<Score::size_A>(q.high + left), keys);
        low.mac(aie::load_v<Score::size_A>(q.low + left), keys);
      }
      const auto block = aie::add(aie::upshift(high.template to_vector<int32>(), 8),
                                  low.template to_vector<int32>());
      for (unsigned row = 0; row < SCORE_M; ++row)
        aie::store_v(scores + (i * SCORE_M + row) * KEYS + j * SCORE_N,
                     block.template extract<SCORE_N>(row));
    }
}

// Sums of one row lie in blocks of (4 rows, 8 channels).
static int32 *sums_of(int32 *sums, unsigned row, unsigned block) {
  return sums + ((row / QUAD) * (DIM / MIX_N) + block) * QUAD * MIX_N + row % QUAD * MIX_N;
}

static void lower(int32 *sums, unsigned row, unsigned shift) {
  for (unsigned block = 0; block < DIM / MIX_N; ++block) {
    int32 *here = sums_of(sums, row, block);
    aie::store_v(here, aie::downshift(aie::load_v<MIX_N>(here), shift));
  }
}

// cap tanh(t / cap), tanh as a ratio of polynomials up to 4.97, where it is 1 but for 1e-4.
static aie::vector<float, KEYS> capped(const aie::vector<float, KEYS> &t, float cap, float inverse) {
  using Floats = aie::vector<float, KEYS>;
  const auto times = [](const Floats &a, const auto &b) {
    return aie::mul(a, b).template to_vector<float>();
  };
  const Floats x = aie::max(aie::min(times(t, inverse), 4.97f), -4.97f), u = times(x, x);
  const Floats top = aie::add(135135.0f, times(aie::add(17325.0f, times(aie::add(378.0f, u), u)), u));
  const Floats steep = aie::add(62370.0f, times(aie::add(3150.0f, times(u, 28.0f)), u));
  const Floats bottom = aie::add(135135.0f, times(steep, u));
  return times(times(times(x, top), aie::inv(bottom)), cap);
}

// Weights of one row times the scales of its values; updates the row's state.
static aie::vector<int16, KEYS> weigh(const Queries &q, const Keys &kv, const int32 *scores,
                                      int32 *sums, int32 *state, unsigned row, int32 first) {
  const auto scale = aie::mul(aie::load_v<KEYS>(kv.scale), q.scale[row]).template to_vector<float>();
  const auto products = aie::to_float(aie::load_v<KEYS>(scores + row * KEYS));
  auto scores_of_row = aie::mul(products, scale).template to_vector<float>();
  if (q.cap > 0) scores_of_row = capped(scores_of_row, q.cap, q.inverse);
  auto t = aie::to_fixed<int32>(scores_of_row, 8);

  const int32 position = q.position + int32(row) * q.step;
  if (first + int32(KEYS) - 1 > position || first <= position - q.window) {
    const auto keys = aie::add(first, aie::load_v<KEYS>(LANES));
    t = aie::select(MASKED, t, aie::le(keys, position) & aie::gt(keys, position - q.window));
  }
  const int32 before = state[row], raised = state[ROWS + row] >= FULL ? before + ONE : before;
  const int32 largest = (aie::reduce_max(t) + ONE - 1) & ~(ONE - 1);
  const int32 now = largest > raised ? largest : raised;
  if (now != before) {
    const int32 shift = (now - before) / ONE < 31 ? (now - before) / ONE : 31;
    lower(sums, row, shift);
    state[row] = now;
    state[ROWS + row] >>= shift;
  }
  const auto weights = power(aie::min(aie::sub(now, t), int32(15 * ONE)));
  state[ROWS + row] +=
      aie::reduce_add(aie::accum<acc32, KEYS>(weights).template to_vector<int32>(0));
  return aie::mul(weights, aie::load_v<KEYS>(kv.weight)).template to_vector<int16>(15);
}

// Four rows of weights as blocks of (4 rows, 4 keys).
static void store_quad(int16 *to, const aie::vector<int16, KEYS> *rows) {
  const auto [a, b] = aie::interleave_zip(rows[0], rows[1], QUAD);
  const auto [c, d] = aie::interleave_zip(rows[2], rows[3], QUAD);
  const auto [e, f] = aie::interleave_zip(a, c, 2 * QUAD);
  const auto [g, h] = aie::interleave_zip(b, d, 2 * QUAD);
  aie::store_v(to, e);
  aie::store_v(to + KEYS, f);
  aie::store_v(to + 2 * KEYS, g);
  aie::store_v(to + 3 * KEYS, h);
}

static aie::vector<int8, Mix::size_B> values_at(const Keys &kv, unsigned index) {
  const auto *codes = (const Code *)(kv.values + index * Mix::size_B * KV_BITS / 8);
#if KV_BITS == 8
  return aie::load_v<Mix::size_B>(codes);
#else
  return aie::unpack(aie::load_v<Mix::size_B>(codes));
#endif
}

// One block of four rows, or two that follow each other: `stride` elements lie between them.
template <unsigned N, class T>
static auto load_quads(const T *from, unsigned stride) {
  if constexpr (MIX_M == QUAD)
    return aie::load_v<N>(from);
  else
    return aie::concat(aie::load_v<N>(from), aie::load_v<N>(from + stride));
}

static void mix(const int16 *weights, const Keys &kv, int32 *sums) {
  constexpr unsigned STEPS = KEYS / MIX_K, BLOCKS = DIM / MIX_N, SUM = QUAD * MIX_N;
  for (unsigned n = 0; n < BLOCKS; ++n)
    for (unsigned i = 0; i < ROWS / QUAD; i += MIX_M / QUAD) {
      int32 *here = sums + (i * BLOCKS + n) * SUM;
      Mix sum(load_quads<SUM>(here, BLOCKS * SUM));
      for (unsigned k = 0; k < STEPS; ++k)
        sum.mac(load_quads<QUAD * MIX_K>(weights + (i * STEPS + k) * QUAD * MIX_K, QUAD * KEYS),
                values_at(kv, k * BLOCKS + n));
      const auto block = sum.template to_vector<int32>();
      for (unsigned part = 0; part < MIX_M / QUAD; ++part)
        aie::store_v(here + part * BLOCKS * SUM, block.template extract<SUM>(part));
    }
}

extern "C" {

void attention_start(int32 *sums, int32 *state) {
  for (unsigned i = 0; i < ROWS * DIM; i += 16) aie::store_v(sums + i, aie::zeros<int32, 16>());
  for (unsigned row = 0; row < ROWS; ++row) state[row] = LOWEST, state[ROWS + row] = 0;
}

// One block of keys and values; `block` counts from that of q->first.
void attention_block(const int32 *queries, const int8 *block_of_keys, int32 *scores,
                     int16 *weights, int32 *sums, int32 *state, int32 block) {
  aie::set_rounding(aie::rounding_mode::conv_even);
  const Queries &q = *(const Queries *)queries;
  const Keys &kv = *(const Keys *)block_of_keys;
  score(q, kv, scores);
  for (unsigned quad = 0; quad < ROWS / QUAD; ++quad) {
    aie::vector<int16, KEYS> rows[QUAD];
    for (unsigned row = 0; row < QUAD; ++row)
      rows[row] = weigh(q, kv, scores, sums, state, quad * QUAD + row, q.first + block * KEYS);
    store_quad(weights + quad * QUAD * KEYS, rows);
  }
  mix(weights, kv, sums);
}

// Add what another core has of the same rows. Both are halved once more, so that nothing overflows.
void attention_merge(int32 *sums, int32 *state, int32 *other_sums, const int32 *other_state) {
  for (unsigned row = 0; row < ROWS; ++row) {
    const int32 mine = state[row], other = other_state[row];
    const int32 now = (mine > other ? mine : other) + ONE;
    const int32 down = (now - mine) / ONE < 31 ? (now - mine) / ONE : 31;
    const int32 other_down = (now - other) / ONE < 31 ? (now - other) / ONE : 31;
    lower(sums, row, down);
    lower(other_sums, row, other_down);
    for (unsigned block = 0; block < DIM / MIX_N; ++block) {
      int32 *here = sums_of(sums, row, block);
      const auto there = aie::load_v<MIX_N>(sums_of(other_sums, row, block));
      aie::store_v(here, aie::add(aie::load_v<MIX_N>(here), there));
    }
    state[row] = now;
    state[ROWS + row] = (state[ROWS + row] >> down) + (other_state[ROWS + row] >> other_down);
  }
}

// Rows of sums / weights in bfloat16, then m and the sum of weights of each row.
void attention_finish(const int32 *sums, const int32 *state, bfloat16 *out) {
  aie::set_rounding(aie::rounding_mode::conv_even);
  for (unsigned row = 0; row < ROWS; ++row) {
    const int32 weight = state[ROWS + row];
    const float scale = aie::inv(float(weight > 0 ? weight : 1));
    for (unsigned block = 0; block < DIM / MIX_N; ++block) {
      const auto sum = aie::to_float(aie::load_v<MIX_N>(sums_of((int32 *)sums, row, block)));
      aie::store_v(out + row * DIM + block * MIX_N,
                   aie::mul(sum, scale).template to_vector<bfloat16>());
    }
  }
  int32 *tail = (int32 *)(out + ROWS * DIM);
  for (unsigned i = 0; i < 2 * ROWS; ++i) tail[i] = state[i];
}

}  // extern "C"
