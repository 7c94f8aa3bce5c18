#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference : require
// An `igpu` weight to row-major float32: out[row, col] = code * scale, exact.
// One invocation a weight. The plainest reader of the layout; the fast ones are tested against it.

layout(local_size_x = 64) in;
layout(constant_id = 0) const uint GROUP = 32u;
layout(constant_id = 1) const uint SCALE_BITS = 16u;
layout(buffer_reference, std430) readonly buffer Words { uint word[]; };
layout(buffer_reference, std430) writeonly buffer Floats { float value[]; };
layout(push_constant) uniform Arguments { Words weight; Floats result; uint rows; uint cols; };

#include "tiles.glsl"

float half_at(uint place) {
    return unpackHalf2x16(weight.word[place / 4u])[place / 2u % 2u];
}

int bits_at(uint place, uint bit, int count) {
    return bitfieldExtract(int(weight.word[place / 4u]), int(8u * (place % 4u) + bit), count);
}

void main() {
    uint index = gl_GlobalInvocationID.x;
    if (index >= rows * cols) return;
    uint row = index / cols;
    uint col = index % cols;
    uint tile = tile_offset(row, col / TILE_COLS, cols);
    uvec2 place = code_place(row, col);
    int code = bits_at(tile + place.x, place.y, BITS);
    uint at = tile + scale_place(row, col);
    float scale;
    if (SCALE_BITS == 16) {
        scale = half_at(at);
    } else {
        uint steps = tile_offset(row, (cols + TILE_COLS - 1u) / TILE_COLS, cols);
        scale = float(bits_at(at, 0u, 8)) * half_at(steps + 2u * (row % TILE_ROWS));
    }
    result.value[index] = float(code) * scale;
}
