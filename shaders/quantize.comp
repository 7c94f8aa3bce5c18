#version 460
#extension GL_GOOGLE_include_directive : require
// x = activations of float32 columns. One workgroup for each column.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const uint CHANNELS = 4;
#include "activations.glsl"

layout(push_constant) uniform Push {
    Quads values;
    Uints x;
};

void main() {
    uint column = gl_WorkGroupID.x;
    for (uint quad = lane_index(); quad < CHANNELS / 4; quad += LANES) {
        vec4 v = values.at[column * (CHANNELS / 4) + quad];
        store_activations(x, column * column_words((CHANNELS + 127) / 128), quad, v);
    }
}
