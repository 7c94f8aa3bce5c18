#version 460
#extension GL_GOOGLE_include_directive : require
// y = W x for 1 to 16 columns of x, and what has to follow before the next product can begin.
//
// A workgroup owns BLOCKS blocks of 16 rows at a time. Its invocations are slices of 64 lanes; slice s
// takes tiles s, s + slices, ... of the rows, so neighbours always read neighbouring memory. Of one
// column, the next weights are on their way while a tile is multiplied, and the first ones while the
// input is made.
//
// A column's sums are made in an order that depends on LANES alone, not even on the size of a subgroup,
// and nothing of it may be fused (`precise`): a column has the same bits whatever else is computed with
// it, on whatever subgroups the driver takes for it.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;  // channels that share a scale
layout(constant_id = 2) const uint COLUMNS = 1;
layout(constant_id = 3) const uint BLOCKS = 1;
layout(constant_id = 10) const bool NORMS = false;  // one column: x = norm(hidden + branch)
layout(constant_id = 11) const uint EPILOGUE = 0;
layout(constant_id = 12) const float CAP = 0.0;  // of the logits
layout(constant_id = 13) const uint ROUNDS = 1;  // of one column, each of other blocks
// Experts that each column chooses: workgroup z is the product of one of them, for one column, and all
// experts of a column have the same x. 0: the weight has no experts.
layout(constant_id = 16) const uint ACTIVE = 0;
layout(constant_id = 17) const uint COUNT = 0;  // ACTIVE: of so many experts it chooses them here
#include "weights.glsl"
#include "norm.glsl"
#include "route.glsl"

const uint STORE = 0;   // y as float32
const uint GEGLU = 1;   // half of the blocks are of `weights`, half of `second`: gelu(gate) * up
const uint CHOOSE = 2;  // logits of the last token: the last workgroup finds the likeliest one
const uint BRANCH = 3;  // STORE, the product of one of gl_NumWorkGroups.y parts of the tiles
const uint TELL = 4;    // gelu(y) times what `y` holds, (COLUMNS, stride), as float activations

// (value, id) of each workgroup, for the last one.
layout(buffer_reference, std430, buffer_reference_align = 8) coherent buffer Candidates {
    uvec2 at[];
};

layout(push_constant) uniform Push {
    Words weights, second, x;  // NORMS: x is the branch
    Floats y;
    // ACTIVE: scores, factors, then where the chosen experts and their shares go (shaders/route.comp)
    Quads hidden, joined, branch_gain, gain;
    Uints next;  // activations of the next product; CHOOSE: Candidates
    State state;
    // `counter`, NORMS: the sum is stored where it is 1; ACTIVE: blocks from an expert to the next, and
    // `stride` is that of the scores.
    uint blocks, tiles, stride, rows, counter;
    float scale;  // NORMS: of the sum
};

const uint SLICES = LANES / 64;
const uint HALF = BLOCKS > 1 ? BLOCKS / 2 : 1;
const uint STEP = EPILOGUE == GEGLU ? HALF : BLOCKS;  // blocks of one weight
const uint ROWS = 16 * BLOCKS;
const bool AHEAD = COLUMNS == 1 && WEIGHT != F32;  // two tiles of float32 are too many registers

// Sums of all slices beside each other, or, where these are too many, of one after the other.
const uint SETS = SLICES * ROWS * COLUMNS <= 4096 ? SLICES : 1;

shared float partial[SETS * ROWS * COLUMNS];
shared uvec4 held[NORMS ? HIDDEN_TILES * INPUT_VECTORS : 1];  // activations, where NORMS

float total[COLUMNS * BLOCKS];
uint first_tile, last_tile;  // of this part
uint expert_block = 0;       // at which the chosen expert's rows begin
Piece pieces[(AHEAD ? 2 : 1) * BLOCKS];  // of tiles on their way
uint64_t rows_at[BLOCKS];  // where the row blocks lie
uint steps[BLOCKS];  // of their scales, as they are loaded
float units[BLOCKS];

#include "held.glsl"

void make_input() {
    float factor = join_column(scale);
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < 32 * HIDDEN_TILES) {  // the padding too: it meets weights of zero
            hold_quad(quad, normed_quad(i, factor));
            if (HAS_BRANCH && quad < HIDDEN_QUADS && gl_WorkGroupID.x == 0 && counter == 1) {
                joined.at[quad] = h[i];
            }
        }
    }
    barrier();
}

void begin_rows(uint first, uint lane) {
    [[unroll]] for (uint b = 0; b < BLOCKS; b++) {
        uint block = expert_block + min(first + b % STEP, blocks - 1);
        rows_at[b] = block_address(b < STEP ? weights : second, block, tiles);
        steps[b] = load_steps(rows_at[b], tiles, lane / 4);
    }
}

// Into `pieces` from `at` on.
void load_tile(uint at, uint tile, uint lane) {
    [[unroll]] for (uint b = 0; b < BLOCKS; b++) {
        pieces[at + b] = load_piece(rows_at[b], tile, lane, 0.0);
    }
}

Input input_of(uint column, uint tile, uint lane) {
    uint first = EPILOGUE == CHOOSE ? state.count - 1 : 0, piece = lane % 4;  // the first one that is read
    if (ACTIVE > 0) {
        first = gl_WorkGroupID.z / ACTIVE;
    }
    if (NORMS) {
        return INPUT(held, tile * INPUT_VECTORS, piece);
    }
    return load_input(column_address(x, first + column, tiles), tile, piece);
}

// `pieces` from `at` on times `v` of a column.
void multiply_pieces(uint at, uint column, Input v) {
    [[unroll]] for (uint b = 0; b < BLOCKS; b++) {
        Piece piece = pieces[at + b];
        piece.unit = units[b];
        precise float sum = total[column * BLOCKS + b] + multiply(piece, v);
        total[column * BLOCKS + b] = sum;
    }
}

// The first tile is on its way, and then always the next one, in either half of `pieces` by turns:
// nothing is copied from one to the other and nothing is loaded under a condition, so no compiler waits
// for a tile before it is needed. The input is asked for first, since loads come back in their order.
// Behind the last tile it is loaded again.
void accumulate_ahead(uint lane, uint slice) {
    uint last = last_tile - 1;
    for (uint tile = first_tile + slice; tile < last_tile; tile += SLICES) {
        Input v = input_of(0, tile, lane);
        load_tile(BLOCKS, min(tile + SLICES, last), lane);
        multiply_pieces(0, 0, v);
        tile += SLICES;
        if (tile >= last_tile) {
            break;
        }
        v = input_of(0, tile, lane);
        load_tile(0, min(tile + SLICES, last), lane);
        multiply_pieces(BLOCKS, 0, v);
    }
}

void accumulate(uint lane, uint slice) {
    [[unroll]] for (uint i = 0; i < COLUMNS * BLOCKS; i++) {
        total[i] = 0.0;
    }
    [[unroll]] for (uint b = 0; b < BLOCKS; b++) {
        units[b] = unit_of(steps[b], lane / 4);
    }
    if (AHEAD) {
        accumulate_ahead(lane, slice);
        return;
    }
    for (uint tile = first_tile + slice; tile < last_tile; tile += SLICES) {
        load_tile(0, tile, lane);
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            multiply_pieces(0, c, input_of(c, tile, lane));
        }
    }
}

// `total` to shared memory. Either way slices are added in their order.
void gather(uint lane, uint slice) {
    for (uint turn = 0; turn < SLICES / SETS; turn++) {
        if (SETS > 1 || slice == turn) {
            [[unroll]] for (uint i = 0; i < COLUMNS * BLOCKS; i++) {
                float sum = team_sum(total[i], 4);
                uint place = (slice % SETS * COLUMNS * BLOCKS + i) * 16 + lane / 4;
                if (lane % 4 == 0) {
                    precise float both = turn == 0 ? sum : partial[place] + sum;
                    partial[place] = both;
                }
            }
        }
        barrier();
    }
}

// Element i of the workgroup's (COLUMNS, ROWS) results.
float result(uint i) {
    precise float sum = 0.0;
    for (uint s = 0; s < SETS; s++) {
        sum += partial[s * COLUMNS * ROWS + i];
    }
    return CAP > 0.0 ? softcap(sum, CAP) : sum;
}

void store_rows(uint first) {
    for (uint i = lane_index(); i < ROWS * COLUMNS; i += LANES) {
        uint row = 16 * first + i % ROWS;
        if (row < rows) {
            uint part = gl_WorkGroupID.z * gl_NumWorkGroups.y + gl_WorkGroupID.y;
            y.at[(part * COLUMNS + i / ROWS) * stride + row] = result(i);
        }
    }
}

// 16 * HALF outputs, four in a lane.
void store_gated(uint first) {
    const uint quads = 4 * HALF;
    for (uint i = lane_index(); i < quads * COLUMNS; i += LANES) {
        uint at = i / quads * ROWS + i % quads * 4;
        vec4 v;
        for (uint k = 0; k < 4; k++) {
            v[k] = gelu(result(at + k)) * result(at + k + 16 * HALF);
        }
        uint quad = 4 * first + i % quads;
        if (4 * quad < rows) {
            uint column = gl_WorkGroupID.z + i / quads;
            store_activations(next, column * column_words((rows + 127) / 128), quad, v);
        }
    }
}

void store_told(uint first) {
    for (uint i = lane_index(); i < ROWS * COLUMNS; i += LANES) {
        uint row = 16 * first + i % ROWS, column = i / ROWS;
        if (row < rows) {
            float told = gelu(result(i)) * y.at[column * stride + row];
            next.at[column * 128 * ((rows + 127) / 128) + row] = floatBitsToUint(told);
        }
    }
}

// The expert of workgroup z.
uint expert() {
    uint at = gl_WorkGroupID.z, slot = at % ACTIVE;
    pick(Floats(hidden), at / ACTIVE * stride);
    if (gl_WorkGroupID.x == 0 && lane_index() == 0) {
        Uints(branch_gain).at[at] = picked[slot];
        Floats(gain).at[at] = share_of(slot, Floats(joined));
    }
    return picked[slot];
}

shared float best_values[128];
shared uint best_ids[128];

// The greatest value of the workgroup; of equal ones the smallest id.
void workgroup_best(inout float value, inout uint id) {
    float peak = subgroupMax(value);
    id = subgroupMin(value == peak ? id : 0xFFFFFFFFu);
    if (subgroupElect()) {
        best_values[gl_SubgroupID] = peak;
        best_ids[gl_SubgroupID] = id;
    }
    barrier();
    value = best_values[0];
    id = best_ids[0];
    for (uint i = 1; i < gl_NumSubgroups; i++) {
        if (best_values[i] > value || best_values[i] == value && best_ids[i] < id) {
            value = best_values[i];
            id = best_ids[i];
        }
    }
    barrier();
}

const float LOWEST = -3.402823e38;
float best = LOWEST;  // of the rows that this invocation has seen
uint best_id = 0xFFFFFFFFu;

void consider(float value, uint id) {
    if (value > best || value == best && id < best_id) {
        best = value;
        best_id = id;
    }
}

void consider_rows(uint first) {
    for (uint i = lane_index(); i < ROWS; i += LANES) {
        uint row = 16 * first + i;
        if (row < rows) {
            consider(result(i), row);
        }
    }
}

void choose() {
    workgroup_best(best, best_id);
    if (lane_index() == 0) {
        Candidates(next).at[gl_WorkGroupID.x] = uvec2(floatBitsToUint(best), best_id);
    }
    if (!is_last(state, counter, gl_NumWorkGroups.x)) {
        return;
    }
    best = LOWEST;
    best_id = 0xFFFFFFFFu;
    for (uint i = lane_index(); i < gl_NumWorkGroups.x; i += LANES) {
        uvec2 other = Candidates(next).at[i];
        consider(uintBitsToFloat(other.x), other.y);
    }
    workgroup_best(best, best_id);
    if (lane_index() == 0) {
        state.choices[0] = best_id == 0xFFFFFFFFu ? 0 : best_id;
        advance(state, 0);
    }
}

void main() {
    uint lane = lane_index() % 64, slice = lane_index() / 64;
    uint first = gl_WorkGroupID.x * STEP, step = gl_NumWorkGroups.x * STEP;
    uint part_tiles = (tiles + gl_NumWorkGroups.y - 1) / gl_NumWorkGroups.y;
    first_tile = gl_WorkGroupID.y * part_tiles;
    last_tile = min(first_tile + part_tiles, tiles);
    bool has_tiles = first_tile + slice < last_tile;
    if (ACTIVE > 0) {
        if (gl_WorkGroupID.z / ACTIVE >= state.count) {
            return;
        }
        expert_block = expert() * counter;
    }
    if (NORMS) {
        load_column(hidden, Quads(x), branch_gain, gain, 0, 1);
    }
    begin_rows(first, lane);
    if (AHEAD && has_tiles) {
        load_tile(0, first_tile + slice, lane);
    }
    if (NORMS) {
        make_input();
    }
    [[dont_unroll]] for (uint round = 0; round < ROUNDS; round++) {  // behind the last block: it again
        accumulate(lane, slice);
        if (round + 1 < ROUNDS) {
            begin_rows(first + step, lane);
            if (AHEAD && has_tiles) {
                load_tile(0, first_tile + slice, lane);
            }
        }
        gather(lane, slice);
        if (EPILOGUE == GEGLU) {
            store_gated(first);
        } else if (EPILOGUE == TELL) {
            store_told(first);
        } else {
            store_rows(first);
        }
        if (EPILOGUE == CHOOSE) {
            consider_rows(first);
        }
        if (ROUNDS > 1) {
            barrier();  // before the sums are written again
        }
        first += step;
    }
    if (EPILOGUE == CHOOSE) {
        choose();
    }
}
