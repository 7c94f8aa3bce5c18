#version 460
#extension GL_GOOGLE_include_directive : require
// The scales that fit a row best, its levels given (`refit_scales` of quantize/gptq.py): conjugate
// gradients with the diagonal as preconditioner, from the old scales on. A workgroup a row.
#include "common.glsl"
#include "dense_half.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint GROUPS = 672;  // of the padded row
layout(constant_id = 3) const uint ROUNDS = 64;

layout(push_constant) uniform Push {
    Floats systems;  // (rows, GROUPS, GROUPS) symmetric
    Floats outputs;  // (rows, stride) target H
    Words levels;    // (rows, stride) float16
    Floats scales;   // (rows, GROUPS), in and out
    uint stride, used;
    float ridge, tolerance, unit;
};

shared float ways[GROUPS];  // direction of search
const uint OWN = (GROUPS + LANES - 1) / LANES;

float solution[OWN], residual[OWN], diagonal[OWN], moved[OWN];
uint row;

uint group_of(uint i, uint lane) {
    return i * LANES + lane;
}

// moved = S ways: S is symmetric, so that neighbouring lanes read neighbours.
void apply(uint lane) {
    barrier();
    uint base = row * GROUPS * GROUPS;
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        uint group = min(group_of(i, lane), GROUPS - 1);
        float total = 0.0;
        for (uint g = 0; g < GROUPS; g += 4) {  // GROUPS is a multiple of 4 unless it is small
            [[unroll]] for (uint e = 0; e < 4; e++) {
                if (GROUPS % 4 == 0 || g + e < GROUPS) {
                    total += systems.at[base + (g + e) * GROUPS + group] * ways[g + e];
                }
            }
        }
        moved[i] = group_of(i, lane) < used ? total : 0.0;
    }
    barrier();
}

// L_g (H t)_g
float goal(uint group) {
    float total = 0.0;
    for (uint e = 0; e < GROUP; e++) {
        uint at = row * stride + group * GROUP + e;
        total += outputs.at[at] * unpackHalf2x16(levels.at[at / 8][e % 8 / 2])[e % 2];
    }
    return total;
}

void set_ways(uint lane, float keep) {
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        uint group = group_of(i, lane);
        if (group < GROUPS) {
            ways[group] = (group < used ? residual[i] / diagonal[i] : 0.0) + keep * ways[group];
        }
    }
}

float preconditioned() {
    float total = 0.0;
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        total += residual[i] * residual[i] / diagonal[i];
    }
    return workgroup_sum(total);
}

void main() {
    uint lane = lane_index();
    row = gl_WorkGroupID.x;
    float trace = 0.0;
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        uint group = group_of(i, lane);
        diagonal[i] = group < used ? systems.at[(row * GROUPS + group) * GROUPS + group] : 0.0;
        solution[i] = group < used ? scales.at[row * GROUPS + group] : 0.0;
        trace += diagonal[i];
        if (group < GROUPS) {
            ways[group] = solution[i];
        }
    }
    float towards = ridge * workgroup_sum(trace) / float(used);
    towards = towards == 0.0 ? 1.0 : towards;
    apply(lane);
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        uint group = group_of(i, lane);
        residual[i] = group < used ? goal(group) - moved[i] : 0.0;
        diagonal[i] += towards;
    }
    set_ways(lane, 0.0);
    float size = preconditioned(), least = 0.0;
    float scale_size = 0.0;
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        scale_size += solution[i] * solution[i] * diagonal[i];
    }
    least = tolerance * tolerance * workgroup_sum(scale_size);
    for (uint round_ = 0; round_ < ROUNDS && size > least; round_++) {
        apply(lane);
        float product = 0.0;
        [[unroll]] for (uint i = 0; i < OWN; i++) {
            uint group = group_of(i, lane);
            if (group < used) {
                moved[i] += towards * ways[group];
                product += moved[i] * ways[group];
            }
        }
        product = workgroup_sum(product);
        float step = product > 0.0 ? size / product : 0.0;
        [[unroll]] for (uint i = 0; i < OWN; i++) {
            uint group = group_of(i, lane);
            if (group < used) {
                solution[i] += step * ways[group];
                residual[i] -= step * moved[i];
            }
        }
        float next = preconditioned();
        set_ways(lane, next / size);
        size = next;
    }
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        uint group = group_of(i, lane);
        if (group < used) {
            scales.at[row * GROUPS + group] = nearest_half(solution[i] * unit) / unit;
        }
    }
}
