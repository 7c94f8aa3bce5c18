#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference : require
// An `igpu` weight to row-major float32: out[row, col] = code * scale, exact.
// One invocation a weight. The plainest reader of the layout; the fast ones are tested against it.

layout(local_size_x = 64) in;
layout(constant_id = 0) const uint GROUP = 32u;
layout(buffer_reference, std430) readonly buffer Words { uint word[]; };
layout(buffer_reference, std430) writeonly buffer Floats { float value[]; };
layout(push_constant) uniform Arguments { Words weight; Floats result; uint rows; uint cols; };

#include "tiles.glsl"

void main() {
    uint index = gl_GlobalInvocationID.x;
    if (index >= rows * cols) return;
    uint row = index / cols;
    uint col = index % cols;
    uint tile = tile_offset(row, col, cols);
    uvec2 place = code_place(row, col);
    uint at = tile + place.x;
    int code = bitfieldExtract(int(weight.word[at / 4u]), int(8u * (at % 4u) + place.y), BITS);
    uint scale = tile + scale_place(row, col);
    result.value[index] = float(code) * unpackHalf2x16(weight.word[scale / 4u])[scale / 2u % 2u];
}
