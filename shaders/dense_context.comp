#version 460
#extension GL_GOOGLE_include_directive : require
// Mixed values of all heads of a token side by side, as float16: the input of o_proj.
#include "common.glsl"
#include "dense_half.glsl"
layout(constant_id = 1) const uint DIM = 128;

layout(push_constant) uniform Push {
    Uints result;  // (tokens, stride_out) float16
    Floats from;   // (sequences, heads, length padded, DIM padded)
    uint stride_out, heads, length_, length_in, dim_in;
    float factor;
};

void main() {
    uint pair = gl_WorkGroupID.x * LANES + lane_index(), token = gl_WorkGroupID.y;
    if (2 * pair >= stride_out) {
        return;
    }
    vec2 values = vec2(0.0);
    for (uint i = 0; i < 2; i++) {
        uint head = (2 * pair + i) / DIM, col = (2 * pair + i) % DIM;
        if (head < heads) {
            uint row = (token / length_ * heads + head) * length_in + token % length_;
            values[i] = from.at[row * dim_in + col] * factor;
        }
    }
    result.at[token * (stride_out / 2) + pair] = packHalf2x16(limited(values));
}
