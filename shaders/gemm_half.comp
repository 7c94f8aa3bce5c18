#version 460
#extension GL_GOOGLE_include_directive : require
// Activations as float16 rows, for gemm_matrix.comp. Workgroup (column, slice of its channels).
//
// A row is divided by a power of two that brings its largest value below 2048: far from overflow,
// and values down to 2^-25 of the largest are rounded no more than float16 rounds anyway.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
#include "activations.glsl"
#include "gemm_bytes.glsl"

layout(push_constant) uniform Push {
    Words x;      // columns of activations
    Uints half_x; // (columns, 128 * tiles) float16
    Floats units; // (columns) the power of two
    uint tiles;
};

// Four channels of the column.
vec4 quad(uint column, uint i) {
    uint tile = (column * tiles + i / 32), piece = i / 8 % 4, word = i % 8;
    if (FLOAT_X) {
        return uintBitsToFloat(x.at[tile * 32 + i % 32]);
    }
    uint base = tile * (X_WORDS / 4), from = base + word / 4 * 4 + piece;
    ivec4 code = unpack_bytes(x.at[from][word % 4]);
    if (!INT8_X) {
        code = 256 * code + unpack_bytes(x.at[from + LOW_WORDS / 4][word % 4]);
    }
    return vec4(code) * uintBitsToFloat(x.at[base + SCALE_WORDS / 4][piece]);
}

// Greatest magnitude of the column; of integers, what their scales say of it.
float column_peak(uint column, uint lane) {
    float peak = 0.0;
    if (FLOAT_X) {
        for (uint i = lane; i < 32 * tiles; i += LANES) {
            vec4 v = abs(quad(column, i));
            peak = max(peak, max(max(v.x, v.y), max(v.z, v.w)));
        }
        return workgroup_max(peak);
    }
    for (uint tile = lane; tile < tiles; tile += LANES) {
        uint place = (column * tiles + tile) * (X_WORDS / 4) + SCALE_WORDS / 4;
        vec4 scales = uintBitsToFloat(x.at[place]);
        peak = max(peak, max(max(scales.x, scales.y), max(scales.z, scales.w)));
    }
    return workgroup_max(peak) * (INT8_X ? 127.0 : FULL);
}

void main() {
    uint column = gl_WorkGroupID.x, lane = lane_index();
    float peak = column_peak(column, lane);
    int exponent = 0;
    frexp(peak, exponent);  // peak is below 2^exponent
    exponent = peak > 0.0 ? max(exponent - 11, -100) : 0;
    float factor = ldexp(1.0, -exponent);
    uint first = gl_WorkGroupID.y * LANES + lane, step = gl_NumWorkGroups.y * LANES;
    for (uint i = first; i < 32 * tiles; i += step) {
        vec4 v = quad(column, i) * factor;
        uint at = (column * 32 * tiles + i) * 2;
        half_x.at[at] = packHalf2x16(v.xy);
        half_x.at[at + 1] = packHalf2x16(v.zw);
    }
    if (first == 0) {
        units.at[column] = ldexp(1.0, exponent);
    }
}
