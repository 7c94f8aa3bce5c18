#version 460
#extension GL_GOOGLE_include_directive : require
// The experts of each column and their shares. One workgroup for a column.
#include "common.glsl"
layout(constant_id = 1) const uint COUNT = 8;
layout(constant_id = 2) const uint ACTIVE = 1;
#include "route.glsl"

layout(push_constant) uniform Push {
    Floats scores;   // (column, stride)
    Floats factors;  // (COUNT)
    Uints chosen;    // (column, ACTIVE)
    Floats shares;   // (column, ACTIVE)
    uint stride;
};

void main() {
    uint column = gl_WorkGroupID.x;
    pick(scores, column * stride);
    for (uint i = lane_index(); i < ACTIVE; i += LANES) {
        chosen.at[column * ACTIVE + i] = picked[i];
        shares.at[column * ACTIVE + i] = share_of(i, factors);
    }
}
