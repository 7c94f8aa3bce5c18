// What every kernel of the decode path shares: buffers by address, lanes, sums over a workgroup.

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_control_flow_attributes : enable
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require

layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer Words {
    uvec4 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) coherent buffer Uints {
    uint at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) coherent buffer Vectors {
    uvec4 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) coherent buffer Floats {
    float at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) coherent buffer Quads {
    vec4 at[];
};

const uint MAX_TOKENS = 512;
const uint MAX_STEPS = 64;

// Where a sequence stands; the host writes it in front of a submit, the kernels move it on.
layout(buffer_reference, std430, buffer_reference_align = 16) coherent buffer State {
    uint position;             // tokens in the KV cache
    uint count;                // columns of this pass that are tokens
    uint steps;                // tokens generated since the submit began
    uint choice;               // the likeliest token behind the last one
    uint tokens[MAX_TOKENS];   // of a pass
    uint generated[MAX_STEPS];
    uint arrived[1024];         // of each counter, the workgroups that are done
};

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint LANES = 64;  // invocations of a workgroup

shared float subgroup_totals[128];  // 1024 invocations in subgroups of 8

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

// Sum over the workgroup, known to all of it. Every invocation must call it.
float workgroup_sum(float value) {
    value = subgroupAdd(value);
    if (subgroupElect()) {
        subgroup_totals[gl_SubgroupID] = value;
    }
    barrier();
    float total = 0.0;
    for (uint i = 0; i < gl_NumSubgroups; i++) {
        total += subgroup_totals[i];
    }
    barrier();
    return total;
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

// c * tanh(x / c), without an overflow on the way.
float softcap(float x, float cap) {
    return cap - 2.0 * cap / (1.0 + exp(2.0 * x / cap));
}

// gelu in its tanh form: x / (1 + exp(-2 v)), v = sqrt(2 / pi) (x + 0.044715 x^3).
float gelu(float x) {
    return x / (1.0 + exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)));
}
