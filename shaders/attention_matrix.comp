#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#ifndef EMULATED
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#pragma use_vulkan_memory_model
#endif
// Attention of many tokens as in attention_prefill.comp, with matrix instructions: queries, keys, weights
// and values are float16, sums float32.
//
// A workgroup takes steps of KEYS keys. Scores go through shared memory to the softmax and come back as
// weights; the weighted values stay in registers, a part of DIM in each of the SUBGROUPS subgroups. While
// scores are made the values are on their way into registers, and the next keys while those are mixed.
// KEYS and DIM are multiples of 16, DIM of 16 * SUBGROUPS; LANES is a multiple of ROWS.
//
// Large heads are SPLIT: a subgroup has its part of DIM in the scores, too, and the softmax adds the parts.
// Queries stay in shared memory: kept as matrices in registers they came out wrong by NVIDIA's driver 580.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const uint DIM = 64;
layout(constant_id = 3) const uint HEADS = 4;
layout(constant_id = 4) const uint KV_HEADS = 1;
layout(constant_id = 5) const uint ROWS = 16;  // of queries: a row is a token's head
layout(constant_id = 6) const uint KEYS = 32;
layout(constant_id = 7) const uint WINDOW = 0;  // keys that a token sees, 0: all
layout(constant_id = 8) const uint SLOTS = 1;
layout(constant_id = 9) const float SCALE = 1.0;
layout(constant_id = 10) const float CAP = 0.0;
layout(constant_id = 11) const uint SUBGROUPS = 4;
layout(constant_id = 12) const uint PIECES = 1;  // workgroups of a run
layout(constant_id = 13) const bool SPLIT = false;  // at least as many KEYS as ROWS
#include "activations.glsl"
#include "cache.glsl"

layout(push_constant) uniform Push {
    Quads qkv;  // (count, stride): queries behind norm and RoPE, (heads, DIM), come first
    Uints keys, values;
    Floats key_scales, value_scales;  // of KV_INT8
    Uints x;  // activations, HEADS * DIM channels
    State state;
    uint stride;
};

const uint SHARING = HEADS / KV_HEADS;
const uint TOKENS = ROWS / SHARING;  // of a workgroup, at most
const uint QUADS = DIM / 4;
const uint VECTORS = DIM / 8;  // of 8 channels in a row of the cache
const uint LOADS = (KEYS * VECTORS + LANES - 1) / LANES;  // of a lane for a step
const uint KEY_QUADS = KEYS / 4;
// Lanes of a row in the softmax.
const uint TEAM = LANES / ROWS < KEY_QUADS ? LANES / ROWS : KEY_QUADS;
// Rows of shared memory, in vectors of four.
const uint ROW = QUADS + 2;
const uint WEIGHT_ROW = KEY_QUADS + 2;
const uint SCORE_ROW = KEY_QUADS + 4;
const uint PARTS = SPLIT ? SUBGROUPS : 1;  // whose sum a score is
const float NEVER = -1e30;

shared f16vec4 q_tile[ROWS * ROW];
shared f16vec4 kv_tile[KEYS * ROW];  // keys, then values
shared f16vec4 w_tile[ROWS * WEIGHT_ROW];
shared vec4 scores[PARTS * ROWS * SCORE_ROW];  // then the factors of what was summed before, then results
shared float sums[ROWS];

uint lane, head, first_token, tokens;
uint first_position;  // of the run
uint first_row;       // of the sequence, in heads of the cache
uint last;            // position of the last key
Channels next_rows[LOADS];  // of the cache, on their way
float peak = NEVER, sum = 0.0;  // of this lane's row
#include "attention_blocks.glsl"

uint row_token(uint row) {
    return first_token + row / SHARING;
}

void load_queries() {
    for (uint i = lane; i < ROWS * QUADS; i += LANES) {
        uint row = i / QUADS, token = min(row_token(row), first_token + tokens - 1);
        uint query = head * SHARING + row % SHARING;
        vec4 v = qkv.at[token * (stride / 4) + query * QUADS + i % QUADS] * SCALE;
        q_tile[row * ROW + i % QUADS] = f16vec4(v);
    }
}

void fetch_step(Uints cache, Floats scales, uint first) {
    [[unroll]] for (uint i = 0; i < LOADS; i++) {
        uint load = i * LANES + lane, key = first + load / VECTORS;
        uint row = (first_row + head) * SLOTS + min(key, last) % SLOTS;
        next_rows[i] = fetch(cache, scales, row, load % VECTORS);
    }
}

void stage() {
    [[unroll]] for (uint i = 0; i < LOADS; i++) {
        uint load = i * LANES + lane, place = load / VECTORS * ROW + load % VECTORS * 2;
        vec4 low, high;
        unpack(next_rows[i], low, high);
        if (load < KEYS * VECTORS) {
            kv_tile[place] = f16vec4(low);
            kv_tile[place + 1] = f16vec4(high);
        }
    }
}

// Four scores of a row; those that its token does not see are NEVER.
vec4 seen_scores(uint row, uint quad, uint first) {
    uint position = first_position + row / SHARING;
    vec4 s = scores[row * SCORE_ROW + quad];
    [[unroll]] for (uint part = 1; part < PARTS; part++) {
        s += scores[(part * ROWS + row) * SCORE_ROW + quad];
    }
    [[unroll]] for (uint i = 0; i < 4; i++) {
        uint at = first + 4 * quad + i;
        bool seen = at <= position && (WINDOW == 0 || at + WINDOW > position);
        float value = CAP > 0.0 ? softcap(s[i], CAP) : s[i];
        s[i] = seen ? value : NEVER;
    }
    return s;
}

// Scores to weights relative to the row's greatest so far. Lanes behind those of the last row have none.
void weigh(uint first) {
    uint row = lane / TEAM, part = lane % TEAM;
    if (row >= ROWS) {
        return;
    }
    vec4 s[KEY_QUADS / TEAM];
    float best = peak;
    [[unroll]] for (uint i = 0; i < KEY_QUADS / TEAM; i++) {
        s[i] = seen_scores(row, i * TEAM + part, first);
        best = max(best, max(max(s[i].x, s[i].y), max(s[i].z, s[i].w)));
    }
    best = team_max(best, TEAM);
    float total = 0.0;
    [[unroll]] for (uint i = 0; i < KEY_QUADS / TEAM; i++) {
        vec4 w = mix(vec4(0.0), exp(s[i] - best), greaterThan(s[i], vec4(NEVER)));
        total += w.x + w.y + w.z + w.w;
        w_tile[row * WEIGHT_ROW + i * TEAM + part] = f16vec4(w);
    }
    float factor = exp(peak - best);
    sum = sum * factor + team_sum(total, TEAM);
    peak = best;
    for (uint i = part; i < 4; i += TEAM) {
        scores[row * SCORE_ROW + i] = vec4(factor);
    }
}

// The results, 32 channels at a time by way of `scores`.
void store() {
    uint column_size = column_words((HEADS * DIM + 127) / 128);
    if (lane % TEAM == 0 && lane / TEAM < ROWS) {
        sums[lane / TEAM] = sum;
    }
    for (uint chunk = 0; chunk < DIM / 32; chunk++) {
        barrier();
        store_blocks(chunk);
        barrier();
        for (uint i = lane; i < ROWS * 8; i += LANES) {
            uint row = i / 8, token = row_token(row), query = head * SHARING + row % SHARING;
            if (token < first_token + tokens) {
                vec4 v = scores[row * SCORE_ROW + i % 8] / sums[row];
                store_activations(x, token * column_size, query * QUADS + 8 * chunk + i % 8, v);
            }
        }
    }
}

void main() {
    lane = lane_index();
    head = gl_WorkGroupID.y;
    uint run = gl_WorkGroupID.x / PIECES, skipped = gl_WorkGroupID.x % PIECES * TOKENS;
    if (run >= state.run_count || skipped >= state.run_tokens[run]) {
        return;
    }
    first_token = state.run_columns[run] + skipped;
    tokens = min(state.run_tokens[run] - skipped, TOKENS);
    first_position = state.positions[first_token];
    first_row = state.slots[first_token] * KV_HEADS;
    last = first_position + tokens - 1;
    uint first = WINDOW > 0 && first_position >= WINDOW ? first_position + 1 - WINDOW : 0;
    fetch_step(keys, key_scales, first);
    clear_blocks();
    load_queries();
    for (uint key = first; key <= last; key += KEYS) {
        barrier();
        stage();
        fetch_step(values, value_scales, key);
        barrier();
        score_blocks();
        barrier();
        stage();
        fetch_step(keys, key_scales, key + KEYS);
        weigh(key);
        barrier();
        mix_blocks();
    }
    store();
}
