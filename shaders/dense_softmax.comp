#version 460
#extension GL_GOOGLE_include_directive : require
// Attention weights of a query from its raw products, times 1024, as float16; what it does not see is 0.
// Workgroup (query, head of a sequence).
#include "common.glsl"
layout(constant_id = 1) const uint WINDOW = 0;  // keys that a query sees, 0: all
layout(constant_id = 2) const float CAP = 0.0;

layout(push_constant) uniform Push {
    Floats scores;  // (heads, stride, stride)
    Uints result;   // the same
    uint stride, length_;
    float scale;
};

float score(uint at) {
    float s = scores.at[at] * scale;
    return CAP > 0.0 ? softcap(s, CAP) : s;
}

void main() {
    uint query = gl_WorkGroupID.x, lane = lane_index();
    uint base = (gl_WorkGroupID.y * stride + query) * stride;
    uint last = query < length_ ? query + 1 : 0;  // behind the keys that it sees
    uint first = WINDOW > 0 && last > WINDOW ? last - WINDOW : 0;
    float peak = -1e30, total = 0.0;
    for (uint i = first + lane; i < last; i += LANES) {
        peak = max(peak, score(base + i));
    }
    peak = workgroup_max(peak);
    for (uint i = first + lane; i < last; i += LANES) {
        total += exp(score(base + i) - peak);
    }
    total = workgroup_sum(total);
    for (uint pair = lane; pair < stride / 2; pair += LANES) {
        vec2 values = vec2(0.0);
        for (uint i = 0; i < 2; i++) {
            uint key = 2 * pair + i;
            if (key >= first && key < last) {
                values[i] = 1024.0 / total * exp(score(base + key) - peak);
            }
        }
        result.at[base / 2 + pair] = packHalf2x16(values);
    }
}
