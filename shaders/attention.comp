#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference_uvec2 : require
// Attention of one token to the KV cache: norms of queries, keys and values, RoPE, the new row of the
// cache, softmax(Q K^T) V.
//
// Workgroup (split, block of QUERIES heads that share a key head, column). Each split takes a run of
// keys and keeps its maximum, sum and weighted values; the last one to finish joins them.
// K and V are (sequence, kv head, slot, DIM); a token's slot is its position modulo SLOTS.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const uint MODE = 0;
layout(constant_id = 3) const uint DIM = 8;
layout(constant_id = 4) const uint HEADS = 1;
layout(constant_id = 5) const uint KV_HEADS = 1;
layout(constant_id = 6) const uint QUERIES = 1;
layout(constant_id = 7) const uint WINDOW = 0;  // keys that a token sees, 0: all
layout(constant_id = 8) const uint SLOTS = 1;
layout(constant_id = 9) const uint SPLITS = 16;  // or a multiple
layout(constant_id = 10) const bool QK_NORM = false;
layout(constant_id = 11) const float EPS = 1e-6;
layout(constant_id = 12) const float SCALE = 1.0;
layout(constant_id = 13) const float CAP = 0.0;
layout(constant_id = 14) const uint PARTS = 1;  // (part, column, stride) of qkv, whose sum counts
layout(constant_id = 15) const uint RUN = 1;    // keys of a split at least, and a tile
layout(constant_id = 16) const bool VALUE_NORM = false;  // without a gain
layout(constant_id = 17) const bool OWNS_KEYS = true;    // otherwise they are an earlier layer's
layout(constant_id = 18) const uint MOST_SPLITS = 16;    // SPLITS or fewer
#include "activations.glsl"
#include "cache.glsl"

const uint WHOLE = 0;    // every column is of another sequence: everything
const uint PREPARE = 1;  // columns of one sequence: norm, RoPE, the cache; queries go back
const uint ATTEND = 2;   // the rest, when all keys are there

layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer Inputs {
    vec4 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 8) readonly restrict buffer Turns {
    vec2 at[];
};

// What the last workgroup reads of the others. Loads of `coherent` memory wait for each other on some
// GPUs: the many of Quads are not, no invocation has read them before the barrier of is_last.
layout(buffer_reference, std430, buffer_reference_align = 8) coherent buffer Stats {
    vec2 at[];
};

layout(push_constant) uniform Push {
    Quads qkv;
    Floats q_gain, k_gain;
    Uints keys, values;
    Floats key_scales, value_scales;  // of KV_INT8
    Turns turns;     // (cos, sin) of 256 positions, then of every 256th position: (rows, DIM / 2)
    Quads partials;  // weighted values: (column, block, split, query, DIM / 4)
    Stats stats;     // greatest score and sum of weights: (column, block, split, query)
    Uints x;
    State state;
    uint stride, k_column, v_column, counter;
};

vec4 input_at(uint place) {
    return MODE == PREPARE ? qkv.at[place] : Inputs(qkv).at[place];
}

// A quad of the low half of a row, and the one of the high half.
void input_pair(uint column, uint quad, out vec4 low, out vec4 high) {
    uint place = (gl_WorkGroupID.z * stride + column) / 4 + quad;
    low = input_at(place);
    high = input_at(place + DIM / 8);
    [[unroll]] for (uint part = 1; part < PARTS; part++) {
        uint behind_ = part * gl_NumWorkGroups.z * (stride / 4) + place;
        low += input_at(behind_);
        high += input_at(behind_ + DIM / 8);
    }
}

const uint SHARING = HEADS / KV_HEADS;
#define ATTENDING LANES
#include "attention.glsl"
#include "attention_join.glsl"

void store_queries(uint block) {
    uint to = (gl_WorkGroupID.z * stride + block * QUERIES * DIM) / 4;
    for (uint i = lane; i < QUERIES * QUADS; i += LANES) {
        qkv.at[to + i] = rows[i / QUADS * QUADS + quad_place(i % QUADS)];
    }
}

void main() {
    lane = lane_index();
    uint column = gl_WorkGroupID.z, count = state.count, sequence = state.slots[column];
    position = state.positions[column];
    if (column >= count) {
        return;
    }
    uint first = WINDOW > 0 && position >= WINDOW ? position + 1 - WINDOW : 0;
    uint seen = position + 1 - first;
    uint run = max(max(TEAMS_OF_8, RUN), (seen + MOST_SPLITS - 1) / MOST_SPLITS);
    uint splits = MODE == PREPARE ? 1 : (seen + run - 1) / run;
    uint split = gl_WorkGroupID.x, block = gl_WorkGroupID.y;
    head = block * QUERIES / SHARING;
    first_row = (sequence * KV_HEADS + head) * SLOTS;
    if (split >= splits) {
        return;
    }
    uint begin = first + split * run, stop = min(begin + run, position + 1);
    bool appends = OWNS_KEYS && MODE != ATTEND && split + 1 == splits;
    new_slot = position % SLOTS;
    if (MODE == PREPARE) {
        prepare(block, appends);
        store_queries(block);
        return;
    }
    attend(block, appends, begin % SLOTS, begin, stop);
    bool is_output = JOINS_OWN && splits == 1;
    store_partials(is_output);
    if (is_output) {
        return;
    }
    uint number = counter + gl_WorkGroupID.z * (JOINS_OWN ? BLOCKS : 1) + (JOINS_OWN ? block : 0);
    if (is_last(state, number, JOINS_OWN ? splits : splits * BLOCKS)) {
        join(JOINS_OWN ? block * QUERIES : 0, splits);
    }
}
