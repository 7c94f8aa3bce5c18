// What every kernel of the decode path shares: buffers by address, lanes, sums over a workgroup.

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_control_flow_attributes : enable
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require

layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer Words {
    uvec4 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Uints {
    uint at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Vectors {
    uvec4 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Floats {
    float at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Quads {
    vec4 at[];
};

#include "state.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint LANES = 64;  // invocations of a workgroup

shared float part_totals[128];  // of parts of 8 lanes or more, at most 1024 lanes

// Position in the workgroup such that the lanes of a subgroup follow each other.
uint lane_index() {
    return gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
}

// Sum over the `lanes` (a power of two, at most 8) neighbouring lanes.
float team_sum(float value, uint lanes) {
    for (uint step = 1; step < lanes; step *= 2) {
        value += subgroupShuffleXor(value, step);
    }
    return value;
}

float team_max(float value, uint lanes) {
    for (uint step = 1; step < lanes; step *= 2) {
        value = max(value, subgroupShuffleXor(value, step));
    }
    return value;
}

// sum + a . b in fused steps, one after the other: no compiler may choose others.
float dot_onto(vec4 a, vec4 b, float sum) {
    precise float total = fma(a.x, b.x, sum);
    total = fma(a.y, b.y, total);
    total = fma(a.z, b.z, total);
    total = fma(a.w, b.w, total);
    return total;
}

// Sum over the workgroup, known to all of it. Every invocation must call it. The order depends on LANES
// alone, not on the size of a subgroup: drivers choose that for each pipeline.
float workgroup_sum(float value) {
    value = team_sum(value, 8);
    if (lane_index() % 8 == 0) {
        part_totals[lane_index() / 8] = value;
    }
    barrier();
    float total = 0.0;
    for (uint i = lane_index() % 8; i < LANES / 8; i += 8) {
        total += part_totals[i];
    }
    barrier();
    return team_sum(total, 8);
}

// Greatest value of the workgroup, known to all of it. Every invocation must call it.
float workgroup_max(float value) {
    value = subgroupMax(value);
    if (subgroupElect()) {
        part_totals[gl_SubgroupID] = value;
    }
    barrier();
    for (uint i = 0; i < gl_NumSubgroups; i++) {
        value = max(value, part_totals[i]);
    }
    barrier();
    return value;
}

shared bool arrived_last;

// True for the whole of the last of `workgroups` to come here: it sees what the others wrote.
// Nobody waits, so no workgroup needs another one to make progress.
bool is_last(State state, uint counter, uint workgroups) {
    memoryBarrierBuffer();
    barrier();
    if (lane_index() == 0) {
        uint before = atomicAdd(state.arrived[counter], 1);
        arrived_last = before + 1 == workgroups;
        if (arrived_last) {
            state.arrived[counter] = 0;
        }
    }
    barrier();
    memoryBarrierBuffer();
    return arrived_last;
}

// Behind a step of decoding: the sequence has one token more, and its choice is the next one. It is
// done when the token that it got ends a text; a sequence that is done stays as it is, so that further
// steps of the submit repeat the last one. One invocation calls this.
void advance(State state, uint sequence) {
    if (state.done[sequence] != 0) {
        return;
    }
    uint token = state.tokens[sequence];
    for (uint i = 0; i < state.stop_count; i++) {
        if (state.stops[i] == token) {
            state.done[sequence] = 1;
        }
    }
    state.tokens[sequence] = state.choices[sequence];
    state.positions[sequence] += 1;
    state.made[sequence] += 1;
}

// c * tanh(x / c), without an overflow on the way.
float softcap(float x, float cap) {
    precise float y = cap - 2.0 * cap / (1.0 + exp(2.0 * x / cap));
    return y;
}

// gelu in its tanh form: x / (1 + exp(-2 v)), v = sqrt(2 / pi) (x + 0.044715 x^3).
float gelu(float x) {
    precise float cubic = x + 0.044715 * x * x * x;
    return x / (1.0 + exp(-1.5957691216057308 * cubic));
}
