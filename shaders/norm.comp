#version 460
#extension GL_GOOGLE_include_directive : require
// hidden += norm(branch); x = activations of norm(hidden). One workgroup for each column.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const bool KEEP_NORMED = false;  // also as float32, for the caller
#include "activations.glsl"
#include "norm.glsl"

layout(push_constant) uniform Push {
    Quads branch, hidden, joined, branch_gain, gain, normed;  // hidden and joined may be one
    Uints x;
};

void main() {
    uint column = gl_WorkGroupID.x;
    load_column(hidden, branch, branch_gain, gain, column, gl_NumWorkGroups.x);
    float factor = join_column();
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < HIDDEN_QUADS) {
            uint place = column * HIDDEN_QUADS + quad;
            vec4 y = normed_quad(i, factor);
            joined.at[place] = h[i];
            if (KEEP_NORMED) {
                normed.at[place] = y;
            }
            store_activations(x, column * column_words(HIDDEN_TILES), quad, y);
        }
    }
}
