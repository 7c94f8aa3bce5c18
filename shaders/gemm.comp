#version 460
#extension GL_GOOGLE_include_directive : require
// y = x W^T for many columns of x (tokens), without matrix instructions.
//
// A workgroup makes BM tokens x BN rows of the weight, in steps of 32 channels: x and the codes go
// through shared memory, a lane keeps TM x TN sums. With INTEGER_DOT the codes meet the bytes of x:
// integers and exact. Otherwise both are float32.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint BM = 32;
layout(constant_id = 3) const uint BN = 32;
layout(constant_id = 4) const uint TM = 4;  // BM / TM * (BN / TN) lanes
layout(constant_id = 5) const uint TN = 4;
layout(constant_id = 8) const uint CHOICES = 0;  // of a column, each with an expert; 0: no experts
#include "gemm_bytes.glsl"
#include "weights.glsl"

layout(push_constant) uniform Push {
    Words weights, x;
    Floats y;  // (count, stride)
    uint tiles, stride, rows, count;
    Words tiles_of_items;  // with experts
    Uints items;
    uint step;  // row blocks from an expert to the next
};
#include "columns.glsl"

// A pack is what one load from shared memory brings: 16 bytes, or 4 floats.
#ifdef INTEGER_DOT
#define PACK uvec4
const uint PACKS = 2;
const uint X_PACKS = INT8_X ? 2 : 4;
#else
#define PACK vec4
const uint PACKS = 8;
const uint X_PACKS = 8;
#endif

// Pack by pack, so that neighbouring lanes read neighbouring packs.
shared PACK x_packs[X_PACKS * BM];
shared PACK w_packs[PACKS * BN];
#ifdef INTEGER_DOT
shared float x_scales[BM], w_scales[BN];
shared int x_sums[BM], w_zeros[BN];
#endif

const uint DOWN = BM / TM;
const uint ACROSS = BN / TN;

float total[TM * TN];

// x of a token; those behind the last one repeat it and are not stored.
void stage_x(uint i, uint tile, uint piece) {
    Input v = load_input(column_address(x, x_column_of(i), tiles), tile, piece);
#ifdef INTEGER_DOT
    x_packs[i] = v.high[0];
    x_packs[BM + i] = v.high[1];
    if (!INT8_X) {
        x_packs[2 * BM + i] = v.low[0];
        x_packs[3 * BM + i] = v.low[1];
    }
    x_scales[i] = v.scale;
#if ZERO_POINT
    x_sums[i] = v.sum;
#endif
#else
    [[unroll]] for (uint p = 0; p < PACKS; p++) {
#if WEIGHT <= INT8
        ivec4 code = unpack_bytes(v.high[p / 4][p % 4]);
        if (!INT8_X) {
            code = 256 * code + unpack_bytes(v.low[p / 4][p % 4]);
        }
        x_packs[p * BM + i] = vec4(code) * v.scale;
#else
        x_packs[p * BM + i] = uintBitsToFloat(v.quad[p]);
#endif
    }
#endif
}

void stage_weight(uint i, uint tile, uint piece) {
    uint row = min(gl_WorkGroupID.x * BN + i, rows - 1);
    uint64_t rows_at = block_address(weights, expert_block + row / 16, tiles);
    float unit = load_unit(rows_at, tiles, row % 16);
    Piece w = load_piece(rows_at, tile, row % 16 * 4 + piece, unit);
#ifdef INTEGER_DOT
    w_packs[i] = codes(w, 0);
    w_packs[BN + i] = codes(w, 1);
    w_scales[i] = scale_of(w);
#if ZERO_POINT
    w_zeros[i] = zero_of(w);
#endif
#else
    [[unroll]] for (uint p = 0; p < PACKS; p++) {
        w_packs[p * BN + i] = values(w, p);
    }
#endif
}

#ifdef INTEGER_DOT
void multiply_step(uint down, uint across) {
    int high[TM * TN], low[TM * TN];
    [[unroll]] for (uint i = 0; i < TM * TN; i++) {
        high[i] = low[i] = 0;
    }
    [[unroll]] for (uint p = 0; p < PACKS; p++) {
        uvec4 w[TN];
        [[unroll]] for (uint j = 0; j < TN; j++) {
            w[j] = w_packs[p * BN + j * ACROSS + across];
        }
        [[unroll]] for (uint i = 0; i < TM; i++) {
            uint at = p * BM + i * DOWN + down;
            uvec4 a = x_packs[at];
            uvec4 b = INT8_X ? uvec4(0) : x_packs[2 * BM + at];
            [[unroll]] for (uint j = 0; j < TN; j++) {
                high[i * TN + j] += dot_vectors(w[j], a);
                low[i * TN + j] += INT8_X ? 0 : dot_vectors(w[j], b);
            }
        }
    }
    [[unroll]] for (uint i = 0; i < TM; i++) {
        uint m = i * DOWN + down;
        [[unroll]] for (uint j = 0; j < TN; j++) {
            uint n = j * ACROSS + across, at = i * TN + j;
            int sum = INT8_X ? high[at] : 256 * high[at] + low[at];
#if ZERO_POINT
            sum -= w_zeros[n] * x_sums[m];
#endif
            total[at] += float(sum) * (x_scales[m] * w_scales[n]);
        }
    }
}
#else
void multiply_step(uint down, uint across) {
    for (uint p = 0; p < PACKS; p++) {
        vec4 w[TN];
        [[unroll]] for (uint j = 0; j < TN; j++) {
            w[j] = w_packs[p * BN + j * ACROSS + across];
        }
        [[unroll]] for (uint i = 0; i < TM; i++) {
            vec4 a = x_packs[p * BM + i * DOWN + down];
            [[unroll]] for (uint j = 0; j < TN; j++) {
                total[i * TN + j] += dot(a, w[j]);
            }
        }
    }
}
#endif

void main() {
    uint lane = lane_index(), down = lane / ACROSS, across = lane % ACROSS;
    if (!begin_columns()) {
        return;
    }
    [[unroll]] for (uint i = 0; i < TM * TN; i++) {
        total[i] = 0.0;
    }
    for (uint step = 0; step < 4 * tiles; step++) {
        for (uint i = lane; i < BM; i += LANES) {
            stage_x(i, step / 4, step % 4);
        }
        for (uint i = lane; i < BN; i += LANES) {
            stage_weight(i, step / 4, step % 4);
        }
        barrier();
        multiply_step(down, across);
        barrier();
    }
    [[unroll]] for (uint i = 0; i < TM; i++) {
        uint m = i * DOWN + down, column = column_of(m);
        [[unroll]] for (uint j = 0; j < TN; j++) {
            uint n = gl_WorkGroupID.x * BN + j * ACROSS + across;
            if (first_column + m < end_column && n < rows) {
                y.at[column * stride + n] = total[i * TN + j];
            }
        }
    }
}
