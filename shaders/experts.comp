#version 460
#extension GL_GOOGLE_include_directive : require
// y = sum of the down projections of the experts that a column has chosen, each times its share. Workgroup
// (blocks of 16 rows, column).
//
// SHARING slices of 64 lanes take the tiles of an expert by turns, and as many experts at a time as that leaves
// slices for. A column's sums are made in an order that depends on both alone.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint ACTIVE = 1;
layout(constant_id = 3) const uint DEPTH = 1;  // tiles that a lane has on their way
layout(constant_id = 4) const uint SHARING = 1;
#include "weights.glsl"

layout(push_constant) uniform Push {
    Words weights, x;  // x: (column, ACTIVE, tiles)
    Floats y;          // (column, rows)
    Uints chosen;      // (column, ACTIVE)
    Floats shares;     // (column, ACTIVE)
    State state;
    uint tiles, rows, step;  // step: row blocks from an expert to the next
};

const uint SLICES = LANES / 64, AT_ONCE = SLICES / SHARING;

shared float partial[SLICES * 16];
shared uint experts[ACTIVE];
shared float parts[ACTIVE];

// A tile of an expert on its way, and what it meets.
struct Turn {
    Piece piece;
    uint steps;   // of the scales of its rows, as they are loaded
    uint number;  // slot * tiles + tile
};

Turn begin_turn(uint number, uint lane) {
    uint block = experts[number / tiles] * step + gl_WorkGroupID.x;
    uint64_t rows_at = block_address(weights, block, tiles);
    uint steps = load_steps(rows_at, tiles, lane / 4);
    return Turn(load_piece(rows_at, number % tiles, lane, 0.0), steps, number);
}

float end_turn(Turn turn, uint lane, float sum) {
    uint slot = turn.number / tiles, first = gl_WorkGroupID.y * ACTIVE;
    Input v = load_input(column_address(x, first + slot, tiles), turn.number % tiles, lane % 4);
    turn.piece.unit = unit_of(turn.steps, lane / 4);
    precise float product = parts[slot] * multiply(turn.piece, v);
    precise float both = sum + product;
    return both;
}

// The tile that a slice takes as its turn `i`; `own` are those of an expert that it has.
uint number_of(uint i, uint own, uint slice) {
    uint slot = min(i / own * AT_ONCE + slice / SHARING, ACTIVE - 1);
    return slot * tiles + i % own * SHARING + slice % SHARING;
}

// Nothing that is loaded is looked at before DEPTH tiles are asked for; behind the last one it is loaded
// again.
float accumulate(uint lane, uint slice) {
    uint own = tiles / SHARING, first_slot = slice / SHARING;
    uint count = first_slot < ACTIVE ? (ACTIVE - first_slot + AT_ONCE - 1) / AT_ONCE * own : 0;
    float total = 0.0;
    Turn turns[DEPTH];
    for (uint first = 0; first < count; first += DEPTH) {
        [[unroll]] for (uint i = 0; i < DEPTH; i++) {
            turns[i] = begin_turn(number_of(min(first + i, count - 1), own, slice), lane);
        }
        [[unroll]] for (uint i = 0; i < DEPTH; i++) {
            if (first + i < count) {
                total = end_turn(turns[i], lane, total);
            }
        }
    }
    return total;
}

void main() {
    uint lane = lane_index() % 64, slice = lane_index() / 64, column = gl_WorkGroupID.y;
    if (column >= state.count) {
        return;
    }
    for (uint i = lane_index(); i < ACTIVE; i += LANES) {
        experts[i] = chosen.at[column * ACTIVE + i];
        parts[i] = shares.at[column * ACTIVE + i];
    }
    barrier();
    float sum = team_sum(accumulate(lane, slice), 4);
    if (lane % 4 == 0) {
        partial[slice * 16 + lane / 4] = sum;
    }
    barrier();
    uint row = 16 * gl_WorkGroupID.x + lane_index();
    if (lane_index() < 16 && row < rows) {
        precise float total = 0.0;
        for (uint s = 0; s < SLICES; s++) {
            total += partial[s * 16 + lane_index()];
        }
        y.at[column * rows + row] = total;
    }
}
