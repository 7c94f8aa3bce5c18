// Tiles of two operands on their way through shared memory, and their product. Including shader:
// dense_gemm.comp, with A_FLOAT and B_FLOAT where operands are float32.

#ifdef A_FLOAT
const uint A_WIDTH = 4;  // elements of 16 bytes
#else
const uint A_WIDTH = 8;
#endif
#ifdef B_FLOAT
const uint B_WIDTH = 4;
#else
const uint B_WIDTH = 8;
#endif
const uint A_ROW = A_BY_K ? BM : STEP;  // elements of a row of the tile
const uint B_ROW = B_BY_K ? BN : STEP;
const uint A_VECTORS = BM * STEP / A_WIDTH, B_VECTORS = BN * STEP / B_WIDTH;
const uint A_LOADS = (A_VECTORS + LANES - 1) / LANES;  // of a lane, at most
const uint B_LOADS = (B_VECTORS + LANES - 1) / LANES;

uvec4 a_next[A_LOADS];
uvec4 b_next[B_LOADS];

// Of vector `load` of a tile whose first element is (extent `first`, k `at`) of its operand.
uint operand_at(uint load, uint row_vectors, uint width, bool by_k, uint first, uint at, uint stride) {
    uint row = load / row_vectors, col = load % row_vectors * width;
    return by_k ? (at + row) * stride + first + col : (first + row) * stride + at + col;
}

void fetch(uint lane, uint at, uint base_a, uint base_b, uint first_m, uint first_n) {
    [[unroll]] for (uint i = 0; i < A_LOADS; i++) {
        uint load = min(i * LANES + lane, A_VECTORS - 1);
        uint from = operand_at(load, A_ROW / A_WIDTH, A_WIDTH, A_BY_K, first_m, at, stride_a);
        a_next[i] = a.at[(base_a + from) / A_WIDTH];
    }
    [[unroll]] for (uint i = 0; i < B_LOADS; i++) {
        uint load = min(i * LANES + lane, B_VECTORS - 1);
        uint from = operand_at(load, B_ROW / B_WIDTH, B_WIDTH, B_BY_K, first_n, at, stride_b);
        b_next[i] = b.at[(base_b + from) / B_WIDTH];
    }
}

#ifdef SYSTEMS
// Entry (group, other) of row m's system, and its double on the other side of the diagonal.
void store_entry(uint m, uint group, uint other, float value) {
    uint base = m * c_outer;
    if (other >= group) {
        c.at[base + group * stride_c + other] = value;
        c.at[base + other * stride_c + group] = value;
    }
}
#endif

#ifdef MATRIX
#include "dense_tiles_matrix.glsl"
#else
#include "dense_tiles_plain.glsl"
#endif
