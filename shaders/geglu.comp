#version 460
#extension GL_GOOGLE_include_directive : require
// gelu(gate) * up of matrices multiplied one by one: activations, or float16. One workgroup a column.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const uint CHANNELS = 4;
layout(constant_id = 3) const bool HALF_OUT = false;
layout(constant_id = 4) const uint ITEMS = 1;  // vectors of four channels in each invocation
#include "activations.glsl"
#include "halves.glsl"

layout(push_constant) uniform Push {
    Quads gate;  // both (part, column, stride) with the rows' padding; the parts' sum counts
    Quads up;
    Uints x;
    Uints half_x;  // (columns, channels) float16
    Floats units;  // (columns) the power of two that they were divided by
    uint stride, parts;
};

const uint TILES = (CHANNELS + 127) / 128;

vec4 sum_of(Quads from, uint quad) {
    vec4 sum = vec4(0.0);
    for (uint part = 0; part < parts; part++) {
        sum += from.at[(part * gl_NumWorkGroups.x + gl_WorkGroupID.x) * (stride / 4) + quad];
    }
    return sum;
}

void main() {
    uint column = gl_WorkGroupID.x;
    vec4 y[ITEMS];
    float peak = 0.0;
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        y[i] = vec4(0.0);
        if (quad < CHANNELS / 4) {
            vec4 g = sum_of(gate, quad);
            y[i] = vec4(gelu(g.x), gelu(g.y), gelu(g.z), gelu(g.w)) * sum_of(up, quad);
        }
        peak = max(peak, magnitude(y[i]));
    }
    int exponent = HALF_OUT ? half_exponent(workgroup_max(peak)) : 0;
    float scale = ldexp(1.0, -exponent);
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (HALF_OUT && quad < 32 * TILES) {  // the padding too: it must be finite
            store_half(half_x, column * 32 * TILES + quad, y[i] * scale);
        } else if (!HALF_OUT && quad < CHANNELS / 4) {
            store_activations(x, column * column_words(TILES), quad, y[i]);
        }
    }
    if (HALF_OUT && lane_index() == 0) {
        units.at[column] = ldexp(1.0, exponent);
    }
}
