#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#ifndef EMULATED
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#pragma use_vulkan_memory_model
#endif
// y = x W^T for many columns of x (tokens), with matrix instructions: 16 x 16 x 16, float16 into float32.
//
// A workgroup makes BM tokens x BN rows of the weight in steps of STEP channels, each of its subgroups
// SM x SN; of few tokens, one of gl_NumWorkGroups.z parts of the channels. The weight becomes float16
// on its way into shared memory; while a step is multiplied, the next one is on its way into registers.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint BM = 64;
layout(constant_id = 3) const uint BN = 128;
layout(constant_id = 4) const uint SM = 32;  // BM / SM * (BN / SN) subgroups
layout(constant_id = 5) const uint SN = 32;
layout(constant_id = 6) const uint PAD = 8;  // float16 behind each row of shared memory
layout(constant_id = 7) const uint STEP = 64;  // 64 or 128
layout(constant_id = 8) const uint CHOICES = 0;  // of a column, each with an expert; 0: no experts
#include "weights.glsl"

layout(push_constant) uniform Push {
    Words weights;
    Words x;       // (count, 128 * tiles) float16, as gemm_half.comp makes it
    Floats units;  // (count) what x was divided by
    Floats y;      // (count, stride)
    uint tiles, stride, rows, count;
    Words tiles_of_items;  // with experts
    Uints items;
    uint step;  // row blocks from an expert to the next
};
#include "columns.glsl"

const uint STEPS = 128 / STEP;  // of a tile
const uint ROW = (STEP + PAD) / 8;  // of shared memory, in vectors of eight float16
const uint X_VECTORS = BM * (STEP / 8), W_PIECES = BN * (STEP / 32);  // of a step
const uint X_LOADS = (X_VECTORS + LANES - 1) / LANES;  // of a lane, at most
const uint W_LOADS = (W_PIECES + LANES - 1) / LANES;
const uint DOWN = SM / 16;
const uint ACROSS = SN / 16;

shared uvec4 x_tile[BM * ROW];
shared uvec4 w_tile[BN * ROW];
shared float y_block[BM / SM * (BN / SN) * 256];  // one for each subgroup, on its way out

uvec4 x_next[X_LOADS];
uint x_columns[X_LOADS];
Piece w_next[W_LOADS];
float w_units[W_LOADS];
#include "gemm_blocks.glsl"

uint row_of(uint i, uint lane) {
    uint load = min(i * LANES + lane, W_PIECES - 1);
    return min(gl_WorkGroupID.x * BN + load / (STEP / 32), rows - 1);
}

void find_columns(uint lane) {
    [[unroll]] for (uint i = 0; i < X_LOADS; i++) {
        x_columns[i] = x_column_of(min(i * LANES + lane, X_VECTORS - 1) / (STEP / 8));
    }
}

void fetch_units(uint lane) {
    [[unroll]] for (uint i = 0; i < W_LOADS; i++) {
        uint row = row_of(i, lane);
        w_units[i] = load_unit(block_address(weights, expert_block + row / 16, tiles), tiles, row % 16);
    }
}

void fetch(uint step, uint lane) {
    [[unroll]] for (uint i = 0; i < X_LOADS; i++) {
        uint load = min(i * LANES + lane, X_VECTORS - 1), vectors = STEP / 8;
        x_next[i] = x.at[(x_columns[i] * STEPS * tiles + step) * vectors + load % vectors];
    }
    [[unroll]] for (uint i = 0; i < W_LOADS; i++) {
        uint load = min(i * LANES + lane, W_PIECES - 1), pieces = STEP / 32;
        uint row = row_of(i, lane), piece = step % STEPS * pieces + load % pieces;
        uint64_t rows_at = block_address(weights, expert_block + row / 16, tiles);
        w_next[i] = load_piece(rows_at, step / STEPS, row % 16 * 4 + piece, w_units[i]);
    }
}

#if WEIGHT <= INT8
// A byte behind the exponent of 2^(2 + WEIGHT) is that power plus the byte times UNIT, exactly.
const uint EXPONENT = (WEIGHT + 17) << 10 | (WEIGHT + 17) << 26;

void store_piece(Piece piece, uint place) {
    float16_t scale = float16_t(scale_of(piece) / UNIT);
#if ZERO_POINT
    float16_t offset = float16_t(float(1024 + 128 + zero_of(piece)) * UNIT);
#else
    const float16_t offset = float16_t((1024.0 + 128.0) * UNIT);
#endif
    [[unroll]] for (uint i = 0; i < 4; i++) {
        uvec4 halves;
        [[unroll]] for (uint j = 0; j < 2; j++) {
            uint unsigned_ = codes(piece, i / 2)[i % 2 * 2 + j] ^ 0x80808080u;
            f16vec2 even = unpackFloat2x16(unsigned_ & 0x00FF00FFu | EXPONENT);
            f16vec2 odd = unpackFloat2x16(unsigned_ >> 8 & 0x00FF00FFu | EXPONENT);
            halves[2 * j] = packFloat2x16((f16vec2(even.x, odd.x) - offset) * scale);
            halves[2 * j + 1] = packFloat2x16((f16vec2(even.y, odd.y) - offset) * scale);
        }
        w_tile[place + i] = halves;
    }
}
#else
void store_piece(Piece piece, uint place) {
    [[unroll]] for (uint i = 0; i < 4; i++) {
        vec4 low = values(piece, 2 * i), high = values(piece, 2 * i + 1);
        uvec2 front = uvec2(packHalf2x16(low.xy), packHalf2x16(low.zw));
        w_tile[place + i] = uvec4(front, packHalf2x16(high.xy), packHalf2x16(high.zw));
    }
}
#endif

void stage(uint lane) {
    [[unroll]] for (uint i = 0; i < X_LOADS; i++) {
        uint load = i * LANES + lane, vectors = STEP / 8;
        uint place = load / vectors * ROW + load % vectors;
        if (X_VECTORS % LANES != 0 && load >= X_VECTORS) {
            break;
        }
        x_tile[place] = x_next[i];
    }
    [[unroll]] for (uint i = 0; i < W_LOADS; i++) {
        uint load = i * LANES + lane, pieces = STEP / 32;
        if (W_PIECES % LANES != 0 && load >= W_PIECES) {
            break;
        }
        store_piece(w_next[i], load / pieces * ROW + load % pieces * 4);
    }
}

// By way of shared memory: at the edges of y only a part of a block is there.
void store_block(uint block, uint first_m, uint first_n) {
    uint base = gl_SubgroupID * 256;
    block_to_shared(block, base);
    subgroupBarrier();
    for (uint i = gl_SubgroupInvocationID; i < 256; i += gl_SubgroupSize) {
        uint m = first_m + i / 16, n = first_n + i % 16;
        if (first_column + m < end_column && n < rows) {
            uint place = (gl_WorkGroupID.z * count + column_of(m)) * stride + n;
            y.at[place] = y_block[base + i] * units.at[x_column_of(m)];
        }
    }
    subgroupBarrier();
}

void main() {
    uint lane = lane_index();
    uint top = gl_SubgroupID / (BN / SN) * SM, left = gl_SubgroupID % (BN / SN) * SN;
    if (!begin_columns()) {
        return;
    }
    clear_blocks();
    uint steps = STEPS * tiles, part_steps = (steps + gl_NumWorkGroups.z - 1) / gl_NumWorkGroups.z;
    uint first = gl_WorkGroupID.z * part_steps, last = min(first + part_steps, steps);
    find_columns(lane);
    fetch_units(lane);
    fetch(first, lane);
    for (uint step = first; step < last; step++) {
        stage(lane);
        barrier();
        if (step + 1 < last) {
            fetch(step + 1, lane);
        }
        multiply_step(top, left);
        barrier();
    }
    [[unroll]] for (uint i = 0; i < DOWN * ACROSS; i++) {
        uint m = top + 16 * (i / ACROSS);
        store_block(i, m, gl_WorkGroupID.x * BN + left + 16 * (i % ACROSS));
    }
}
