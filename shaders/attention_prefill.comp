#version 460
#extension GL_GOOGLE_include_directive : require
// Causal attention of many tokens to the KV cache, whose rows are there already: softmax(Q K^T) V.
//
// Workgroup (piece of a run: up to TOKENS tokens of one sequence, kv head): all query heads of the tokens that
// share the key head read each key once (Dao et al., FlashAttention: running maximum and sum). K and V
// are (sequence, kv head, slot, DIM), a token's slot is its position modulo SLOTS; SLOTS is at
// least WINDOW and the tokens of the pass, so no key that is still seen has been overwritten.
// LANES is a multiple of KEYS and of DIM / 8, ROWS one of LANES / KEYS and of LANES / (DIM / 8).
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
layout(constant_id = 2) const uint DIM = 256;
layout(constant_id = 3) const uint HEADS = 4;
layout(constant_id = 4) const uint KV_HEADS = 1;
layout(constant_id = 5) const uint TOKENS = 4;
layout(constant_id = 6) const uint KEYS = 32;
layout(constant_id = 7) const uint WINDOW = 0;  // keys that a token sees, 0: all
layout(constant_id = 8) const uint SLOTS = 1;
layout(constant_id = 9) const float SCALE = 1.0;
layout(constant_id = 10) const float CAP = 0.0;
layout(constant_id = 12) const uint PIECES = 1;  // workgroups of a run
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
const uint ROWS = TOKENS * SHARING;  // a row is a token's head
const uint QUADS = DIM / 4;
const uint VECTORS = DIM / 8;  // of 8 channels in a row of the cache
const uint KEY_GROUPS = LANES / KEYS;
const uint KEY_ROWS = ROWS / KEY_GROUPS;  // whose scores of one key a lane makes
const uint VALUE_GROUPS = LANES / VECTORS;
const uint VALUE_ROWS = ROWS / VALUE_GROUPS;  // whose 8 channels a lane sums up
const float NEVER = -1e30;

shared vec4 rows[ROWS * QUADS];       // queries; in the end the results
shared uvec4 tile[KEYS * VECTORS];    // keys, vector by vector, then values, key by key
shared float weights[ROWS * KEYS];    // scores, then their exponentials
shared float peaks[ROWS], sums[ROWS], corrections[ROWS];

uint lane, head, first_token, tokens;
uint first_position;  // of the run
uint first_row;       // of the sequence, in heads of the cache

uint row_token(uint row) {
    return first_token + row / SHARING;
}

void load_queries() {
    for (uint i = lane; i < ROWS * QUADS; i += LANES) {
        uint row = i / QUADS, token = min(row_token(row), first_token + tokens - 1);
        uint query = head * SHARING + row % SHARING;
        rows[i] = qkv.at[token * (stride / 4) + query * QUADS + i % QUADS] * SCALE;
    }
    for (uint row = lane; row < ROWS; row += LANES) {
        peaks[row] = NEVER;
        sums[row] = 0.0;
    }
}

// Keys vector by vector: neighbouring lanes, which take neighbouring keys, read neighbours.
void load_tile(Uints cache, Floats scales, uint first, uint last, bool by_vector) {
    for (uint i = lane; i < KEYS * VECTORS; i += LANES) {
        uint key = i / VECTORS, vector = i % VECTORS;
        uint row = (first_row + head) * SLOTS + min(first + key, last) % SLOTS;
#if KV_INT8
        vec4 low, high;
        load_channels(cache, scales, row, vector, low, high);
        uvec2 front = uvec2(packHalf2x16(low.xy), packHalf2x16(low.zw));
        uvec4 packed = uvec4(front, packHalf2x16(high.xy), packHalf2x16(high.zw));
#else
        uvec4 packed = Words(cache).at[row * VECTORS + vector];
#endif
        tile[by_vector ? vector * KEYS + key : i] = packed;
    }
}

void unpack(uvec4 packed, out vec4 low, out vec4 high) {
    low = vec4(unpackHalf2x16(packed.x), unpackHalf2x16(packed.y));
    high = vec4(unpackHalf2x16(packed.z), unpackHalf2x16(packed.w));
}

void score(uint first) {
    uint key = lane % KEYS, group = lane / KEYS;
    float total[KEY_ROWS];
    [[unroll]] for (uint r = 0; r < KEY_ROWS; r++) {
        total[r] = 0.0;
    }
    for (uint vector = 0; vector < VECTORS; vector++) {
        vec4 low, high;
        unpack(tile[vector * KEYS + key], low, high);
        [[unroll]] for (uint r = 0; r < KEY_ROWS; r++) {
            uint at = (r * KEY_GROUPS + group) * QUADS + 2 * vector;
            total[r] += dot(rows[at], low) + dot(rows[at + 1], high);
        }
    }
    [[unroll]] for (uint r = 0; r < KEY_ROWS; r++) {
        uint row = r * KEY_GROUPS + group, at = first + key;
        uint position = first_position + row / SHARING;
        bool seen = at <= position && (WINDOW == 0 || at + WINDOW > position);
        float s = CAP > 0.0 ? softcap(total[r], CAP) : total[r];
        weights[row * KEYS + key] = seen ? s : NEVER;
    }
}

// Scores to weights relative to the row's greatest so far, eight lanes for a row.
void renormalize() {
    for (uint row = lane / 8; row < ROWS; row += LANES / 8) {
        float before = peaks[row], peak = before, sum = 0.0;
        for (uint key = lane % 8; key < KEYS; key += 8) {
            peak = max(peak, weights[row * KEYS + key]);
        }
        peak = team_max(peak, 8);
        for (uint key = lane % 8; key < KEYS; key += 8) {
            float s = weights[row * KEYS + key];
            float w = s > NEVER ? exp(s - peak) : 0.0;
            weights[row * KEYS + key] = w;
            sum += w;
        }
        sum = team_sum(sum, 8);
        if (lane % 8 == 0) {
            corrections[row] = exp(before - peak);
            sums[row] = sums[row] * corrections[row] + sum;
            peaks[row] = peak;
        }
    }
}

vec4 low_sums[VALUE_ROWS], high_sums[VALUE_ROWS];

void mix() {
    uint vector = lane % VECTORS, group = lane / VECTORS;
    [[unroll]] for (uint r = 0; r < VALUE_ROWS; r++) {
        float factor = corrections[r * VALUE_GROUPS + group];
        low_sums[r] *= factor;
        high_sums[r] *= factor;
    }
    for (uint key = 0; key < KEYS; key++) {
        vec4 low, high;
        unpack(tile[key * VECTORS + vector], low, high);
        [[unroll]] for (uint r = 0; r < VALUE_ROWS; r++) {
            float w = weights[(r * VALUE_GROUPS + group) * KEYS + key];
            low_sums[r] += w * low;
            high_sums[r] += w * high;
        }
    }
}

void store() {
    uint vector = lane % VECTORS, group = lane / VECTORS;
    [[unroll]] for (uint r = 0; r < VALUE_ROWS; r++) {
        uint row = r * VALUE_GROUPS + group;
        rows[row * QUADS + 2 * vector] = low_sums[r] / sums[row];
        rows[row * QUADS + 2 * vector + 1] = high_sums[r] / sums[row];
    }
    barrier();
    uint column_size = column_words((HEADS * DIM + 127) / 128);
    for (uint i = lane; i < ROWS * QUADS; i += LANES) {
        uint row = i / QUADS, token = row_token(row), query = head * SHARING + row % SHARING;
        if (token < first_token + tokens) {
            store_activations(x, token * column_size, query * QUADS + i % QUADS, rows[i]);
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
    [[unroll]] for (uint r = 0; r < VALUE_ROWS; r++) {
        low_sums[r] = high_sums[r] = vec4(0.0);
    }
    load_queries();
    uint first = WINDOW > 0 && first_position >= WINDOW ? first_position + 1 - WINDOW : 0;
    uint last = first_position + tokens - 1;
    for (uint key = first; key <= last; key += KEYS) {
        barrier();
        load_tile(keys, key_scales, key, last, true);
        barrier();
        score(key);
        barrier();
        load_tile(values, value_scales, key, last, false);
        renormalize();
        barrier();
        mix();
    }
    barrier();
    store();
}
