#version 460
#extension GL_GOOGLE_include_directive : require
#ifdef MATRIX
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#pragma use_vulkan_memory_model
#endif
// C = alpha A B^T (+ C), float32 sums; a workgroup makes a tile of BM x BN in steps of STEP.
//
// An operand is (extent, k), or (k, extent) where BY_K. HALF ones are float16; of FLOAT ones matrix
// instructions get two float16, x = high + low, and multiply all but low by low: products to 2^-22.
// Sizes are multiples of the tile's, and rows begin at multiples of 16 bytes.
// SYSTEMS: C is not stored, but its sums over each GROUP of columns, multiplied by levels (refit).
#include "common.glsl"
layout(constant_id = 1) const uint BM = 128;
layout(constant_id = 2) const uint BN = 128;
layout(constant_id = 3) const uint SM = 64;  // of a subgroup, or of a lane without MATRIX
layout(constant_id = 4) const uint SN = 32;
layout(constant_id = 5) const uint STEP = 32;
layout(constant_id = 6) const uint PAD = 8;  // elements behind each row of shared memory
layout(constant_id = 7) const bool A_BY_K = false;
layout(constant_id = 8) const bool B_BY_K = false;
layout(constant_id = 9) const bool ADD = false;  // to what is there
#ifdef SYSTEMS
layout(constant_id = 10) const uint GROUP = 32;
#endif

layout(push_constant) uniform Push {
    Words a, b;
    Floats c;
    Words levels;  // SYSTEMS: (rows, stride_levels) float16
    uint k, stride_a, stride_b, stride_c;  // strides in elements
    // Workgroup z is a pair (outer, inner) of batches; `sharing` inner ones share B. SYSTEMS: a group.
    uint inner, sharing;
    uint a_outer, a_inner, b_outer, b_inner, c_outer, c_inner;  // in elements
    float alpha;
    uint stride_levels;
};

#include "dense_tiles.glsl"

void main() {
    uint lane = lane_index();
    uint first_m = gl_WorkGroupID.y * BM, first_n = gl_WorkGroupID.x * BN;
#ifdef SYSTEMS
    if (first_n + BN <= gl_WorkGroupID.z * GROUP) {  // a system is symmetric
        return;
    }
#endif
    uint outer = gl_WorkGroupID.z / inner, within = gl_WorkGroupID.z % inner;
    uint base_a = outer * a_outer + within * a_inner;
    uint base_b = outer * b_outer + within / sharing * b_inner;
    clear_sums();
    fetch(lane, 0, base_a, base_b, first_m, first_n);
    for (uint at = 0; at < k; at += STEP) {
        stage(lane);
        barrier();
        if (at + STEP < k) {
            fetch(lane, at + STEP, base_a, base_b, first_m, first_n);
        }
        multiply_step(lane);
        barrier();
    }
#ifdef SYSTEMS
    store_systems(lane, first_m, first_n, gl_WorkGroupID.z);
#else
    store_sums(lane, outer * c_outer + within * c_inner, first_m, first_n);
#endif
}
