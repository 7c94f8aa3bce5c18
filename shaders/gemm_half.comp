#version 460
#extension GL_GOOGLE_include_directive : require
// Activations as float16 rows. Workgroup (column, slice of its channels).
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
#include "activations.glsl"
#include "gemm_bytes.glsl"
#include "halves.glsl"

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
            peak = max(peak, magnitude(quad(column, i)));
        }
        return workgroup_max(peak);
    }
    for (uint tile = lane; tile < tiles; tile += LANES) {
        uint place = (column * tiles + tile) * (X_WORDS / 4) + SCALE_WORDS / 4;
        peak = max(peak, magnitude(uintBitsToFloat(x.at[place])));
    }
    return workgroup_max(peak) * (INT8_X ? 127.0 : FULL);
}

void main() {
    uint column = gl_WorkGroupID.x, lane = lane_index();
    int exponent = half_exponent(column_peak(column, lane));
    float factor = ldexp(1.0, -exponent);
    uint first = gl_WorkGroupID.y * LANES + lane, step = gl_NumWorkGroups.y * LANES;
    for (uint i = first; i < 32 * tiles; i += step) {
        store_half(half_x, column * 32 * tiles + i, quad(column, i) * factor);
    }
    if (first == 0) {
        units.at[column] = ldexp(1.0, exponent);
    }
}
