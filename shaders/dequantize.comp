#version 460
#extension GL_GOOGLE_include_directive : require
// An `igpu` weight to row-major float32: out[row, col] = code * scale, exact.
// One invocation a weight. The plainest reader of the layout; the fast ones are tested against it.

layout(local_size_x = 64) in;
layout(constant_id = 0) const uint GROUP = 32u;
layout(push_constant) uniform Size { uint rows; uint cols; };
layout(std430, set = 0, binding = 0) readonly buffer Weight { uint words[]; };
layout(std430, set = 0, binding = 1) writeonly buffer Out { float values[]; };

#include "tiles.glsl"

void main() {
    uint index = gl_GlobalInvocationID.x;
    if (index >= rows * cols) return;
    uint row = index / cols;
    uint col = index % cols;
    uint tile = tile_offset(row, col, cols);
    uvec2 place = code_place(row, col);
    uint at = tile + place.x;
    int code = bitfieldExtract(int(words[at / 4u]), int(8u * (at % 4u) + place.y), BITS);
    uint scale = tile + scale_place(row, col);
    values[index] = float(code) * unpackHalf2x16(words[scale / 4u])[scale / 2u % 2u];
}
