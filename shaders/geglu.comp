#version 460
#extension GL_GOOGLE_include_directive : require
// x = activations of gelu(gate) * up, when gate and up are not of one kind. One workgroup a column.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const uint CHANNELS = 4;
#include "activations.glsl"

layout(push_constant) uniform Push {
    Quads gate;  // both (columns, stride) with the rows' padding
    Quads up;
    Uints x;
    uint stride;
};

void main() {
    uint column = gl_WorkGroupID.x;
    for (uint quad = lane_index(); quad < CHANNELS / 4; quad += LANES) {
        vec4 g = gate.at[column * (stride / 4) + quad], u = up.at[column * (stride / 4) + quad];
        vec4 y = vec4(gelu(g.x), gelu(g.y), gelu(g.z), gelu(g.w)) * u;
        store_activations(x, column * column_words((CHANNELS + 127) / 128), quad, y);
    }
}
