#version 460
#extension GL_GOOGLE_include_directive : require
// What each layer is told of a token: told = (norm(SCALE * projected) + sqrt(SIZE) * row) / sqrt(2), of its
// SIZE channels of the token's row of the per-layer embedding. Workgroup (layer, column).
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint SIZE = 32;
layout(constant_id = 3) const uint ROWS = 1;  // of the table; tokens behind them have the first one
layout(constant_id = 4) const float EPS = 1e-6;
layout(constant_id = 5) const float SCALE = 1.0;
#include "weights.glsl"

layout(push_constant) uniform Push {
    Words table;
    Quads projected;  // (column, layer, SIZE)
    Quads gain;
    Quads told;  // (layer, column, SIZE)
    State state;
};

const uint QUADS = SIZE / 4;

vec4 row_quad(uint token, uint quad) {
    uint tiles = (gl_NumWorkGroups.x * QUADS + 31) / 32, row = token % 16;
    uint64_t rows = block_address(table, token / 16, tiles);
    float unit = load_unit(rows, tiles, row);
    Piece piece = load_piece(rows, quad / 32, row * 4 + quad / 8 % 4, unit);
    return values(piece, quad % 8);
}

void main() {
    uint layer = gl_WorkGroupID.x, column = gl_WorkGroupID.y;
    uint token = state.tokens[column] < ROWS ? state.tokens[column] : 0;
    uint from = (column * gl_NumWorkGroups.x + layer) * QUADS;
    uint to = (layer * gl_NumWorkGroups.y + column) * QUADS;
    float squares = 0.0;
    for (uint quad = lane_index(); quad < QUADS; quad += LANES) {
        vec4 v = SCALE * projected.at[from + quad];
        squares += dot(v, v);
    }
    float factor = SCALE * inversesqrt(workgroup_sum(squares) / float(SIZE) + EPS);
    for (uint quad = lane_index(); quad < QUADS; quad += LANES) {
        vec4 normed = factor * projected.at[from + quad] * gain.at[quad];
        vec4 row = sqrt(float(SIZE)) * row_quad(token, layer * QUADS + quad);
        told.at[to + quad] = sqrt(0.5) * (normed + row);
    }
}
