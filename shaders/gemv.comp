#version 460
#extension GL_GOOGLE_include_directive : require
// y = W x for 1 to 16 columns of x, and what has to follow before the next product can begin.
//
// A workgroup owns BLOCKS blocks of 16 rows. Its invocations are slices of 64 lanes; slice s takes
// tiles s, s + slices, ... of the rows, so neighbours always read neighbouring memory.
//
// A column's sums are made in an order that depends on LANES alone, not even on the size of a subgroup,
// and nothing of it may be fused (`precise`): a column has the same bits whatever else is computed with
// it, on whatever subgroups the driver takes for it.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;  // channels that share a scale
layout(constant_id = 2) const uint COLUMNS = 1;
layout(constant_id = 3) const uint BLOCKS = 1;
layout(constant_id = 9) const uint EPILOGUE = 0;
layout(constant_id = 10) const float CAP = 0.0;  // of the logits
#include "weights.glsl"
#include "norm.glsl"

const uint STORE = 0;   // y as float32
const uint NORM = 1;    // one column: the last workgroup joins y to the residual stream
const uint GEGLU = 2;   // half of the blocks are of `weights`, half of `second`: gelu(gate) * up
const uint CHOOSE = 3;  // logits of the last token: the last workgroup finds the likeliest one

layout(push_constant) uniform Push {
    Words weights, second, x;
    Floats y;
    Quads hidden, branch_gain, gain, normed;
    Uints next;  // activations of the next product; CHOOSE: the best of each workgroup
    State state;
    uint blocks, tiles, stride, rows, counter;
};

const uint SLICES = LANES / 64;
const uint HALF = BLOCKS > 1 ? BLOCKS / 2 : 1;
const uint STEP = EPILOGUE == GEGLU ? HALF : BLOCKS;  // blocks of one weight
const uint ROWS = 16 * BLOCKS;

// Sums of all slices beside each other, or, where these are too many, of one after the other.
const uint SETS = SLICES * ROWS * COLUMNS <= 4096 ? SLICES : 1;

shared float partial[SETS * ROWS * COLUMNS];

float total[COLUMNS * BLOCKS];

void accumulate(uint first, uint lane, uint slice) {
    uint piece = lane % 4;
    uint column = EPILOGUE == CHOOSE ? state.count - 1 : 0;  // the first one that is read
    [[unroll]] for (uint i = 0; i < COLUMNS * BLOCKS; i++) {
        total[i] = 0.0;
    }
    for (uint tile = slice; tile < tiles; tile += SLICES) {
        Piece pieces[BLOCKS];
        [[unroll]] for (uint b = 0; b < BLOCKS; b++) {
            uint block = min(first + b % STEP, blocks - 1);
            Words from = b < STEP ? weights : second;
            pieces[b] = load_piece(from, block * tiles + tile, lane);
        }
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            Input v = load_input(x, (column + c) * tiles + tile, piece);
            [[unroll]] for (uint b = 0; b < BLOCKS; b++) {
                precise float sum = total[c * BLOCKS + b] + multiply(pieces[b], v);
                total[c * BLOCKS + b] = sum;
            }
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
            y.at[i / ROWS * stride + row] = result(i);
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
            store_activations(next, i / quads * column_words((rows + 127) / 128), quad, v);
        }
    }
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

void choose(uint first) {
    float value = LOWEST;
    uint id = 0xFFFFFFFFu;
    for (uint i = lane_index(); i < ROWS; i += LANES) {
        uint row = 16 * first + i;
        float logit = result(i);
        if (row < rows && logit > value) {
            value = logit;
            id = row;
        }
    }
    workgroup_best(value, id);
    if (lane_index() == 0) {
        next.at[2 * gl_WorkGroupID.x] = floatBitsToUint(value);
        next.at[2 * gl_WorkGroupID.x + 1] = id;
    }
    if (!is_last(state, counter, gl_NumWorkGroups.x)) {
        return;
    }
    value = LOWEST;
    id = 0xFFFFFFFFu;
    for (uint i = lane_index(); i < gl_NumWorkGroups.x; i += LANES) {
        float other = uintBitsToFloat(next.at[2 * i]);
        if (other > value) {  // rows rise with i
            value = other;
            id = next.at[2 * i + 1];
        }
    }
    workgroup_best(value, id);
    if (lane_index() == 0) {
        state.choices[0] = id == 0xFFFFFFFFu ? 0 : id;
        advance(state, 0);
    }
}

void main() {
    uint first = gl_WorkGroupID.x * STEP, lane = lane_index() % 64, slice = lane_index() / 64;
    accumulate(first, lane, slice);
    gather(lane, slice);
    if (EPILOGUE == GEGLU) {
        store_gated(first);
        return;
    }
    store_rows(first);
    if (EPILOGUE == NORM) {
        if (is_last(state, counter, gl_NumWorkGroups.x)) {
            add_and_norm(0, Quads(y), hidden, branch_gain, gain, normed, next);
        }
    } else if (EPILOGUE == CHOOSE) {
        choose(first);
    }
}
