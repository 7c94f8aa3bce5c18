#version 460
#extension GL_GOOGLE_include_directive : require
// hidden = sqrt(1/2) (hidden + x + norm(low)): the residual stream in front of attention with a learned
// product of low rank of its input x beside it. One workgroup for a column.
#include "common.glsl"
#include "norm.glsl"

layout(push_constant) uniform Push {
    Quads hidden, x, low, gain;
};

void main() {
    uint base = gl_WorkGroupID.x * HIDDEN_QUADS;
    vec4 v[ITEMS];
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        v[i] = quad_or_zero(low, base, i * LANES + lane_index());
        add_squares(v[i], i * LANES + lane_index(), 0);
    }
    barrier();
    float factor = factor_of(0);
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < HIDDEN_QUADS) {
            vec4 sum = v[i] * factor * gain.at[quad] + x.at[base + quad] + hidden.at[base + quad];
            hidden.at[base + quad] = sqrt(0.5) * sum;
        }
    }
}
