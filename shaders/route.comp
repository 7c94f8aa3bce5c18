#version 460
#extension GL_GOOGLE_include_directive : require
// The ACTIVE experts of a column that have the greatest scores, of equal ones those that come first, and
// their shares: the softmax over them, times a factor of each expert. One workgroup for a column.
#include "common.glsl"
layout(constant_id = 1) const uint COUNT = 8;
layout(constant_id = 2) const uint ACTIVE = 1;

layout(push_constant) uniform Push {
    Floats scores;   // (column, stride)
    Floats factors;  // (COUNT)
    Uints chosen;    // (column, ACTIVE)
    Floats shares;   // (column, ACTIVE)
    uint stride;
};

shared float known[COUNT];
shared uint picked[ACTIVE];

void main() {
    uint lane = lane_index(), column = gl_WorkGroupID.x;
    for (uint i = lane; i < COUNT; i += LANES) {
        known[i] = scores.at[column * stride + i];
    }
    for (uint i = lane; i < ACTIVE; i += LANES) {
        picked[i] = 0;  // scores that are no numbers have no order
    }
    barrier();
    for (uint i = lane; i < COUNT; i += LANES) {
        uint before = 0;
        for (uint j = 0; j < COUNT; j++) {
            before += uint(known[j] > known[i] || known[j] == known[i] && j < i);
        }
        if (before < ACTIVE) {
            picked[before] = i;
        }
    }
    barrier();
    for (uint i = lane; i < ACTIVE; i += LANES) {
        float total = 0.0;
        for (uint j = 0; j < ACTIVE; j++) {
            total += exp(known[picked[j]] - known[picked[0]]);
        }
        float share = exp(known[picked[i]] - known[picked[0]]) / total;
        chosen.at[column * ACTIVE + i] = picked[i];
        shares.at[column * ACTIVE + i] = share * factors.at[picked[i]];
    }
}
