#version 460
#extension GL_GOOGLE_include_directive : require
// mixed = norm(MLP) + norm(sum of the chosen experts' outputs by their shares). One workgroup for a column.
#include "common.glsl"
layout(constant_id = 1) const uint ACTIVE = 1;
#include "norm.glsl"

layout(push_constant) uniform Push {
    Quads mlp;      // (part, column, HIDDEN), whose sum counts
    Quads experts;  // (column, ACTIVE, HIDDEN)
    Floats shares;  // (column, ACTIVE)
    Quads mlp_gain, experts_gain;
    Quads mixed;  // (column, HIDDEN)
};

vec4 expert_sum(uint column, uint quad) {
    vec4 total = vec4(0.0);
    [[unroll]] for (uint i = 0; i < ACTIVE; i++) {
        uint row = column * ACTIVE + i;
        total += shares.at[row] * quad_or_zero(experts, row * HIDDEN_QUADS, quad);
    }
    return total;
}

vec4 mlp_sum(uint column, uint quad) {
    vec4 total = vec4(0.0);
    [[unroll]] for (uint part = 0; part < PARTS; part++) {
        uint row = part * gl_NumWorkGroups.x + column;
        total += quad_or_zero(mlp, row * HIDDEN_QUADS, quad);
    }
    return total;
}

void main() {
    uint column = gl_WorkGroupID.x;
    vec4 own[ITEMS], others[ITEMS];
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        own[i] = mlp_sum(column, quad);
        others[i] = expert_sum(column, quad);
        add_squares(own[i], quad, 0);
        add_squares(others[i], quad, 1);
    }
    barrier();
    float own_factor = factor_of(0), others_factor = factor_of(1);
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < HIDDEN_QUADS) {
            vec4 sum = own[i] * own_factor * mlp_gain.at[quad];
            mixed.at[column * HIDDEN_QUADS + quad] = sum + others[i] * others_factor * experts_gain.at[quad];
        }
    }
}
