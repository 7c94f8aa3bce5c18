#version 460
#extension GL_GOOGLE_include_directive : require
// hidden = SCALE * row of the embedding; x = activations of its norm. One workgroup for a column.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const bool DECODE = false;  // a column is a sequence that is continued
layout(constant_id = 3) const float SCALE = 1.0;
#include "weights.glsl"
#include "norm.glsl"

layout(push_constant) uniform Push {
    Words table;
    Quads hidden, gain, normed;
    Uints x;
    State state;
};

void main() {
    uint column = gl_WorkGroupID.x;
    uint token = state.tokens[column];
    if (DECODE && column < state.count && lane_index() == 0) {
        state.generated[column * MAX_STEPS + state.made[column]] = token;
    }
    vec4 h[ITEMS];
    for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        h[i] = vec4(0.0);
        if (quad < HIDDEN_QUADS) {
            uint tile = token / 16 * HIDDEN_TILES + quad / 32;
            Piece piece = load_piece(table, tile, token % 16 * 4 + quad / 8 % 4);
            h[i] = SCALE * values(piece, quad % 8);
            hidden.at[column * HIDDEN_QUADS + quad] = h[i];
        }
    }
    store_norm(h, column, gain, normed, x);
}
