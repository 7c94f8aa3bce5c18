#version 460
#extension GL_GOOGLE_include_directive : require
// The greatest of each 32 neighbouring logits, so that sample.comp can pass over most of them.
// Workgroup (part of the vocabulary, column); eight lanes for 32 logits.
#include "common.glsl"
layout(constant_id = 1) const float CAP = 0.0;  // of the logits; 0 where they are capped already

layout(push_constant) uniform Push {
    Quads logits;  // (columns, stride)
    Floats peaks;  // (columns, groups)
    State state;
    uint stride, vocabulary, groups;
};

const float LOWEST = -3.402823e38;

void main() {
    uint column = gl_WorkGroupID.y, lane = lane_index();
    uint quad = gl_WorkGroupID.x * LANES + lane, group = quad / 8;
    if (column >= state.count) {
        return;
    }
    float best = LOWEST;
    if (4 * quad < vocabulary) {
        vec4 v = logits.at[column * (stride / 4) + quad];
        for (uint i = 0; i < 4; i++) {
            float logit = CAP > 0.0 ? softcap(v[i], CAP) : v[i];
            best = 4 * quad + i < vocabulary ? max(best, logit) : best;
        }
    }
    best = team_max(best, 8);
    if (lane % 8 == 0 && group < groups) {
        peaks.at[column * groups + group] = best;
    }
}
