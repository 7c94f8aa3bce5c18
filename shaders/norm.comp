#version 460
#extension GL_GOOGLE_include_directive : require
// joined = scale * (hidden + norm(branch)); x = activations of norm(joined), or the same as float16. One
// workgroup for each column.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const bool KEEP_NORMED = false;  // also as float32, for the caller
layout(constant_id = 3) const bool HALF_OUT = false;
#include "activations.glsl"
#include "halves.glsl"
#include "norm.glsl"

layout(push_constant) uniform Push {
    Quads branch, hidden, joined, branch_gain, gain, normed;  // hidden and joined may be one
    Uints x;
    Uints half_x;  // (columns, channels) float16
    Floats units;  // (columns) the power of two that they were divided by
    float scale;
};

void store_halves(uint column, float factor) {
    float peak = 0.0;
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        peak = max(peak, magnitude(normed_quad(i, factor)));
    }
    int exponent = half_exponent(workgroup_max(peak));
    float scale = ldexp(1.0, -exponent);
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < 32 * HIDDEN_TILES) {  // the padding too: it must be finite
            store_half(half_x, column * 32 * HIDDEN_TILES + quad, normed_quad(i, factor) * scale);
        }
    }
    if (lane_index() == 0) {
        units.at[column] = ldexp(1.0, exponent);
    }
}

void main() {
    uint column = gl_WorkGroupID.x;
    load_column(hidden, branch, branch_gain, gain, column, gl_NumWorkGroups.x);
    float factor = join_column(scale);
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < HIDDEN_QUADS) {
            uint place = column * HIDDEN_QUADS + quad;
            vec4 y = normed_quad(i, factor);
            joined.at[place] = h[i];
            if (KEEP_NORMED) {
                normed.at[place] = y;
            }
            if (!HALF_OUT) {
                store_activations(x, column * column_words(HIDDEN_TILES), quad, y);
            }
        }
    }
    if (HALF_OUT) {
        store_halves(column, factor);
    }
}
