#version 460
#extension GL_GOOGLE_include_directive : require
// joined = scale * (hidden + norm(branch)); x = activations of norm(joined), or the same as float16. One
// workgroup for each column.
//
// BEFORE_EXPERTS: expert_x and plain are the same with gains of their own, plain as float32.
// BEHIND_EXPERTS: the branch is norm(branch) + norm(sum of the experts' outputs by their shares).
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const bool KEEP_NORMED = false;  // also as float32, for the caller
layout(constant_id = 3) const bool HALF_OUT = false;
layout(constant_id = 10) const uint EXPERTS = 1;
#include "activations.glsl"
#include "halves.glsl"
#include "norm.glsl"

layout(push_constant) uniform Push {
    Quads branch, hidden, joined, branch_gain, gain, normed;  // hidden and joined may be one
    Uints x;
    Uints half_x;  // (columns, channels) float16
    Floats units;  // (columns) the power of two that they were divided by
#ifdef BEFORE_EXPERTS
    Quads expert_gain, plain_gain;
    Uints expert_x, plain;
#endif
#ifdef BEHIND_EXPERTS
    Quads experts;  // (column, EXPERTS, HIDDEN)
    Floats shares;  // (column, EXPERTS); of one, which is the sum, they do not count
    Quads own_gain, experts_gain;
#endif
    float scale;
};

#ifdef BEFORE_EXPERTS
void store_for_experts(uint column, uint quad, vec4 v) {
    precise vec4 x = v * expert_gain.at[quad], y = v * plain_gain.at[quad];
    store_activations(expert_x, column * column_words(HIDDEN_TILES), quad, x);
    store_float(plain, column * 128 * HIDDEN_TILES, quad, y);
}
#endif

#ifdef BEHIND_EXPERTS
vec4 expert_sum(uint column, uint quad) {
    if (EXPERTS == 1) {
        return quad_or_zero(experts, column * HIDDEN_QUADS, quad);
    }
    vec4 total = vec4(0.0);
    [[unroll]] for (uint i = 0; i < EXPERTS; i++) {
        uint row = column * EXPERTS + i;
        total += shares.at[row] * quad_or_zero(experts, row * HIDDEN_QUADS, quad);
    }
    return total;
}

// To what joins, which is the MLP's output until now.
void join_experts(uint column) {
    vec4 others[ITEMS], own_gains[ITEMS], experts_gains[ITEMS];
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        others[i] = expert_sum(column, quad);
        own_gains[i] = quad_or_zero(own_gain, 0, quad);
        experts_gains[i] = quad_or_zero(experts_gain, 0, quad);
    }
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        add_squares(joining[i], quad, 0);
        add_squares(others[i], quad, 1);
    }
    barrier();
    float own_factor = factor_of(0), others_factor = factor_of(1);
    barrier();  // before the sums are written again
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        precise vec4 own = joining[i] * own_factor * own_gains[i];
        precise vec4 sum = own + others[i] * others_factor * experts_gains[i];
        joining[i] = sum;
    }
}
#endif

void store_halves(uint column, float factor) {
    float peak = 0.0;
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        peak = max(peak, magnitude(normed_quad(i, factor)));
    }
    int exponent = half_exponent(workgroup_max(peak));
    float scale = ldexp(1.0, -exponent);
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        vec4 y = as_products_have(normed_quad(i, factor));
        if (quad < 32 * HIDDEN_TILES) {  // the padding too: it must be finite
            store_half(half_x, column * 32 * HIDDEN_TILES + quad, y * scale);
        }
    }
    if (lane_index() == 0) {
        units.at[column] = ldexp(1.0, exponent);
    }
}

void main() {
    uint column = gl_WorkGroupID.x;
    load_column(hidden, branch, branch_gain, gain, column, gl_NumWorkGroups.x);
#ifdef BEHIND_EXPERTS
    join_experts(column);
#endif
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
#ifdef BEFORE_EXPERTS
            precise vec4 plain_norm = h[i] * factor;
            store_for_experts(column, quad, plain_norm);
#endif
            if (!HALF_OUT) {
                store_activations(x, column * column_words(HIDDEN_TILES), quad, y);
            }
        }
    }
    if (HALF_OUT) {
        store_halves(column, factor);
    }
}
