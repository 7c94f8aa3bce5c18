#version 460
#extension GL_GOOGLE_include_directive : require
// hidden = SCALE * row of the embedding. One workgroup for a column.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const bool DECODE = false;  // a column is a sequence that is continued
layout(constant_id = 3) const float SCALE = 1.0;
layout(constant_id = 4) const uint HIDDEN = 32;
#include "weights.glsl"

layout(push_constant) uniform Push {
    Words table;
    Quads hidden;
    State state;
};

const uint QUADS = HIDDEN / 4;
const uint TILES = (HIDDEN + 127) / 128;

void main() {
    uint column = gl_WorkGroupID.x;
    uint token = state.tokens[column];
    if (DECODE && column < state.count && lane_index() == 0) {
        state.generated[column * MAX_STEPS + state.made[column]] = token;
    }
    for (uint quad = lane_index(); quad < QUADS; quad += LANES) {
        uint64_t rows = block_address(table, token / 16, TILES);
        float unit = load_unit(rows, TILES, token % 16);
        Piece piece = load_piece(rows, quad / 32, token % 16 * 4 + quad / 8 % 4, unit);
        hidden.at[column * QUADS + quad] = SCALE * values(piece, quad % 8);
    }
}
