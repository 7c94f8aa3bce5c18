#version 460
#extension GL_GOOGLE_include_directive : require
// x = activations of gelu(gate) * up of matrices multiplied one by one. Workgroup (column, slice of its
// channels). SPARSE: of the gate counts what exceeds mean + QUANTILE * deviation of all its channels.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const uint CHANNELS = 4;
layout(constant_id = 3) const bool SPARSE = false;
layout(constant_id = 4) const float QUANTILE = 0.0;
#include "activations.glsl"

layout(push_constant) uniform Push {
    Quads gate;  // both (part, column, stride) with the rows' padding; the parts' sum counts
    Quads up;
    Uints x;
    uint stride, parts;
};

vec4 sum_of(Quads from, uint column, uint quad) {
    vec4 sum = vec4(0.0);
    for (uint part = 0; part < parts; part++) {
        sum += from.at[(part * gl_NumWorkGroups.x + column) * (stride / 4) + quad];
    }
    return sum;
}

float threshold(uint column) {
    float total = 0.0, squares = 0.0;
    for (uint quad = lane_index(); quad < CHANNELS / 4; quad += LANES) {
        total += dot(sum_of(gate, column, quad), vec4(1.0));
    }
    float mean = workgroup_sum(total) / float(CHANNELS);
    for (uint quad = lane_index(); quad < CHANNELS / 4; quad += LANES) {
        vec4 off = sum_of(gate, column, quad) - mean;
        squares += dot(off, off);
    }
    return mean + QUANTILE * sqrt(workgroup_sum(squares) / float(CHANNELS));
}

void main() {
    uint column = gl_WorkGroupID.x, first = gl_WorkGroupID.y * LANES + lane_index();
    float least = SPARSE ? threshold(column) : 0.0;
    for (uint quad = first; quad < CHANNELS / 4; quad += gl_NumWorkGroups.y * LANES) {
        vec4 g = sum_of(gate, column, quad), u = sum_of(up, column, quad);
        g = SPARSE ? max(g - least, 0.0) : g;
        vec4 y = vec4(gelu(g.x), gelu(g.y), gelu(g.z), gelu(g.w)) * u;
        store_activations(x, column * column_words((CHANNELS + 127) / 128), quad, y);
    }
}
