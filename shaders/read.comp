#version 460
#extension GL_GOOGLE_include_directive : require
// Reads memory and keeps next to nothing of it: the bandwidth that a kernel could have.
#include "common.glsl"

layout(push_constant) uniform Push {
    Words data;
    Uints sums;  // one for each invocation
    uint vectors;  // 16 bytes each, a multiple of 4 * the number of invocations
};

void main() {
    uint stride = gl_NumWorkGroups.x * LANES;
    uint index = gl_WorkGroupID.x * LANES + lane_index();
    uvec4 total = uvec4(0);
    for (uint i = index; i < vectors; i += 4 * stride) {
        uvec4 a = data.at[i], b = data.at[i + stride];
        uvec4 c = data.at[i + 2 * stride], d = data.at[i + 3 * stride];
        total ^= a ^ b ^ c ^ d;
    }
    sums.at[index] = total.x ^ total.y ^ total.z ^ total.w;
}
