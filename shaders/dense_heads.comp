#version 460
#extension GL_GOOGLE_include_directive : require
// Heads of queries, keys or values on their way into attention: QK-norm, RoPE, float16 in rows of
// DIM_OUT. Workgroup (token, head).
#include "common.glsl"
#include "dense_half.glsl"
layout(constant_id = 1) const uint DIM = 128;
layout(constant_id = 2) const uint DIM_OUT = 128;
layout(constant_id = 3) const bool NORM = true;
layout(constant_id = 4) const bool ROPE = true;

layout(push_constant) uniform Push {
    Uints result;    // (tokens, heads, DIM_OUT) float16
    Floats from;     // (tokens, stride)
    Floats gain;     // (DIM)
    Quads turns;     // (length, DIM / 4) cos, sin, cos, sin of neighbours
    uint stride, heads, length_;
    float eps, factor;
};

shared float head[DIM];

void main() {
    uint token = gl_WorkGroupID.x, number = gl_WorkGroupID.y, lane = lane_index();
    uint first = token * stride + number * DIM;
    float scale = 1.0;
    if (NORM) {
        float total = 0.0;
        for (uint i = lane; i < DIM; i += LANES) {
            total += from.at[first + i] * from.at[first + i];
        }
        scale = inversesqrt(workgroup_sum(total) / float(DIM) + eps);
    }
    for (uint i = lane; i < DIM; i += LANES) {
        head[i] = from.at[first + i] * scale * (NORM ? gain.at[i] : 1.0);
    }
    barrier();
    for (uint pair = lane; pair < DIM_OUT / 2; pair += LANES) {
        vec2 values = vec2(0.0);
        for (uint i = 0; i < 2; i++) {
            uint col = 2 * pair + i, low = col % (DIM / 2), position = token % length_;
            if (col < DIM) {
                values[i] = head[col];
                if (ROPE) {
                    vec4 both = turns.at[position * (DIM / 4) + low / 2];
                    vec2 turn = low % 2 == 0 ? both.xy : both.zw;
                    float minus = head[low], plus = head[low + DIM / 2];
                    values[i] = col < DIM / 2 ? minus * turn.x - plus * turn.y
                                              : plus * turn.x + minus * turn.y;
                }
            }
        }
        uint at = (token * heads + number) * (DIM_OUT / 2) + pair;
        result.at[at] = packHalf2x16(limited(values * factor));
    }
}
