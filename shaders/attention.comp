#version 460
#extension GL_GOOGLE_include_directive : require
// Attention of one token to the KV cache: QK-norm, RoPE, the new row of the cache, softmax(Q K^T) V.
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
layout(constant_id = 9) const uint SPLITS = 1;
layout(constant_id = 10) const bool QK_NORM = false;
layout(constant_id = 11) const float EPS = 1e-6;
layout(constant_id = 12) const float SCALE = 1.0;
layout(constant_id = 13) const float CAP = 0.0;
#include "activations.glsl"
#include "cache.glsl"

const uint WHOLE = 0;    // every column is of another sequence: everything
const uint PREPARE = 1;  // columns of one sequence: norm, RoPE, the cache; queries go back
const uint ATTEND = 2;   // the rest, when all keys are there

layout(push_constant) uniform Push {
    Floats qkv;
    Floats q_gain, k_gain;
    Uints keys, values;
    Floats key_scales, value_scales;  // of KV_INT8
    Floats turns;     // (cos, sin) of 256 positions, then of every 256th position: (rows, DIM / 2, 2)
    Floats partials;  // (column, block, split, query, DIM + 2)
    Uints x;
    State state;
    uint stride, k_column, v_column, counter;
};

const uint LEAST = 32;  // keys that are worth a split
const uint TILE = 32;   // keys between two barriers
const uint PAIRS = DIM / 2;
const uint VECTORS = DIM / 8;  // of 8 channels in a row of the cache
const uint SHARING = HEADS / KV_HEADS;
const uint BLOCKS = HEADS / QUERIES;
const uint V_SLICES = LANES / VECTORS;

shared float rows[(QUERIES + 1) * DIM];  // the queries, then the new key
shared float weights[QUERIES * TILE];
shared float correction[QUERIES];
shared float gathered[V_SLICES * DIM];

uint lane;
uint position;
uint first_row;  // of the sequence, in heads of the cache

void load_row(uint row, uint column) {
    uint from = gl_WorkGroupID.z * stride + column;
    for (uint i = lane; i < DIM; i += LANES) {
        rows[row * DIM + i] = qkv.at[from + i];
    }
}

// RMS norm of rows first .. last - 1, eight lanes each.
void norm_rows(uint first, uint last) {
    for (uint base = first; base < last; base += LANES / 8) {
        uint row = base + lane / 8;
        float total = 0.0;
        if (row < last) {
            for (uint i = lane % 8; i < DIM; i += 8) {
                total += rows[row * DIM + i] * rows[row * DIM + i];
            }
        }
        float factor = inversesqrt(team_sum(total, 8) / float(DIM) + EPS);
        if (row < last) {
            for (uint i = lane % 8; i < DIM; i += 8) {
                float gain = row < QUERIES ? q_gain.at[i] : k_gain.at[i];
                rows[row * DIM + i] *= factor * gain;
            }
        }
    }
    barrier();
}

// Component i turns with component i + DIM / 2; the angle of a position is that of its multiple of
// 256 and that of the rest.
void turn_rows(uint first, uint last) {
    for (uint i = lane; i < (last - first) * PAIRS; i += LANES) {
        uint pair = i % PAIRS, at = (first + i / PAIRS) * DIM + pair;
        uint fine = (position % 256 * PAIRS + pair) * 2;
        uint coarse = ((256 + position / 256) * PAIRS + pair) * 2;
        vec2 a = vec2(turns.at[fine], turns.at[fine + 1]);
        vec2 b = vec2(turns.at[coarse], turns.at[coarse + 1]);
        float c = a.x * b.x - a.y * b.y, s = a.y * b.x + a.x * b.y;
        float low = rows[at], high = rows[at + PAIRS];
        rows[at] = low * c - high * s;
        rows[at + PAIRS] = high * c + low * s;
    }
    barrier();
}

// Of the query or, behind the queries, of the new key.
vec4 query_quad(uint query, uint i) {
    uint at = query * DIM + i;
    return vec4(rows[at], rows[at + 1], rows[at + 2], rows[at + 3]);
}

uint cache_row(uint head, uint key) {
    return (first_row + head) * SLOTS + key % SLOTS;
}

// The new key and value of a head, where no other token of the window lies.
void append(uint head) {
    uint row = cache_row(head, position);
    uint v = gl_WorkGroupID.z * stride + v_column + head * DIM;
    for (uint i = lane; i < DIM / 4; i += LANES) {
        uint from = v + 4 * i;
        vec4 value = vec4(qkv.at[from], qkv.at[from + 1], qkv.at[from + 2], qkv.at[from + 3]);
        store_quad(keys, key_scales, row, i, query_quad(QUERIES, 4 * i));
        store_quad(values, value_scales, row, i, value);
    }
    memoryBarrierBuffer();
    barrier();
}

// weights = scores of up to TILE keys, eight lanes for a key.
void score(uint head, uint first, uint stop) {
    for (uint base = 0; base < TILE; base += LANES / 8) {
        uint key = first + base + lane / 8;
        float total[QUERIES];
        [[unroll]] for (uint q = 0; q < QUERIES; q++) {
            total[q] = 0.0;
        }
        if (key < stop) {
            for (uint vector = lane % 8; vector < VECTORS; vector += 8) {
                vec4 low, high;
                load_channels(keys, key_scales, cache_row(head, key), vector, low, high);
                [[unroll]] for (uint q = 0; q < QUERIES; q++) {
                    total[q] += dot(low, query_quad(q, 8 * vector));
                    total[q] += dot(high, query_quad(q, 8 * vector + 4));
                }
            }
        }
        [[unroll]] for (uint q = 0; q < QUERIES; q++) {
            float s = team_sum(total[q], 8) * SCALE;
            s = CAP > 0.0 ? softcap(s, CAP) : s;
            if (lane % 8 == 0 && base + lane / 8 < TILE) {
                weights[q * TILE + base + lane / 8] = key < stop ? s : -1e30;
            }
        }
    }
    barrier();
}

// Scores to weights relative to the greatest so far; eight lanes know a query's maximum and sum.
void renormalize(inout float peak, inout float sum) {
    uint query = lane / 8;
    if (query < QUERIES) {
        float best = peak;
        for (uint i = lane % 8; i < TILE; i += 8) {
            best = max(best, weights[query * TILE + i]);
        }
        best = team_max(best, 8);
        float total = 0.0;
        for (uint i = lane % 8; i < TILE; i += 8) {
            float w = weights[query * TILE + i];
            w = w > -1e29 ? exp(w - best) : 0.0;
            weights[query * TILE + i] = w;
            total += w;
        }
        float factor = exp(peak - best);
        sum = sum * factor + team_sum(total, 8);
        peak = best;
        correction[query] = factor;
    }
    barrier();
}

void mix(uint head, uint first, uint stop, inout vec4 low[QUERIES], inout vec4 high[QUERIES]) {
    uint vector = lane % VECTORS, slice = lane / VECTORS;
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        low[q] *= correction[q];
        high[q] *= correction[q];
    }
    if (slice < V_SLICES) {
        for (uint key = first + slice; key < min(stop, first + TILE); key += V_SLICES) {
            vec4 a, b;
            load_channels(values, value_scales, cache_row(head, key), vector, a, b);
            [[unroll]] for (uint q = 0; q < QUERIES; q++) {
                float w = weights[q * TILE + key - first];
                low[q] += w * a;
                high[q] += w * b;
            }
        }
    }
    barrier();
}

uint partial_place(uint block, uint split, uint query) {
    uint row = (gl_WorkGroupID.z * BLOCKS + block) * SPLITS + split;
    return (row * QUERIES + query) * (DIM + 2);
}

void store_partial(uint query, vec4 low, vec4 high, float peak, float sum) {
    uint vector = lane % VECTORS, slice = lane / VECTORS;
    if (slice < V_SLICES) {
        for (uint k = 0; k < 4; k++) {
            gathered[slice * DIM + 8 * vector + k] = low[k];
            gathered[slice * DIM + 8 * vector + 4 + k] = high[k];
        }
    }
    barrier();
    uint place = partial_place(gl_WorkGroupID.y, gl_WorkGroupID.x, query);
    for (uint i = lane; i < DIM; i += LANES) {
        float total = 0.0;
        for (uint s = 0; s < V_SLICES; s++) {
            total += gathered[s * DIM + i];
        }
        partials.at[place + i] = total;
    }
    if (lane == 8 * query) {
        partials.at[place + DIM] = peak;
        partials.at[place + DIM + 1] = sum;
    }
    barrier();
}

// The output of the heads of blocks first .. last - 1 from all splits.
void join(uint first, uint last, uint splits) {
    const uint quads = QUERIES * DIM / 4;
    uint words = column_words((HEADS * DIM + 127) / 128);
    for (uint i = first * quads + lane; i < last * quads; i += LANES) {
        uint block = i / quads, query = i % quads / (DIM / 4), at = i % (DIM / 4) * 4;
        float peak = -1e30;
        for (uint s = 0; s < splits; s++) {
            peak = max(peak, partials.at[partial_place(block, s, query) + DIM]);
        }
        float sum = 0.0;
        vec4 total = vec4(0.0);
        for (uint s = 0; s < splits; s++) {
            uint place = partial_place(block, s, query);
            float w = exp(partials.at[place + DIM] - peak);
            sum += w * partials.at[place + DIM + 1];
            for (uint k = 0; k < 4; k++) {
                total[k] += w * partials.at[place + at + k];
            }
        }
        store_activations(x, gl_WorkGroupID.z * words, i, total / sum);
    }
}

void main() {
    lane = lane_index();
    if (gl_WorkGroupID.z >= state.count) {
        return;
    }
    position = state.positions[gl_WorkGroupID.z];
    first_row = state.slots[gl_WorkGroupID.z] * KV_HEADS;
    uint first = WINDOW > 0 && position >= WINDOW ? position + 1 - WINDOW : 0;
    uint seen = position + 1 - first;
    uint run = max(LEAST, (seen + SPLITS - 1) / SPLITS);
    uint splits = MODE == PREPARE ? 1 : (seen + run - 1) / run;
    uint split = gl_WorkGroupID.x, block = gl_WorkGroupID.y, head = block * QUERIES / SHARING;
    if (split >= splits) {
        return;
    }
    bool appends = MODE != ATTEND && split + 1 == splits;
    for (uint q = 0; q < QUERIES; q++) {
        load_row(q, (block * QUERIES + q) * DIM);
    }
    if (appends) {
        load_row(QUERIES, k_column + head * DIM);
    }
    barrier();
    if (MODE != ATTEND) {
        uint last = appends ? QUERIES + 1 : QUERIES;
        if (QK_NORM) {
            norm_rows(0, last);
        }
        turn_rows(0, last);
    }
    if (appends) {
        append(head);
    }
    if (MODE == PREPARE) {
        for (uint i = lane; i < QUERIES * DIM; i += LANES) {
            qkv.at[gl_WorkGroupID.z * stride + block * QUERIES * DIM + i] = rows[i];
        }
        return;
    }

    float peak = -1e30, sum = 0.0;
    vec4 low[QUERIES], high[QUERIES];
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        low[q] = vec4(0.0);
        high[q] = vec4(0.0);
    }
    uint begin = first + split * run, stop = min(begin + run, position + 1);
    for (uint tile = begin; tile < stop; tile += TILE) {
        score(head, tile, stop);
        renormalize(peak, sum);
        mix(head, tile, stop, low, high);
    }
    for (uint q = 0; q < QUERIES; q++) {
        store_partial(q, low[q], high[q], peak, sum);
    }

    // 32 channels share a scale: where a head has no whole number of them, one workgroup does all.
    bool whole = QUERIES * DIM % 32 == 0;
    uint places = whole ? BLOCKS : 1;
    uint number = counter + gl_WorkGroupID.z * places + (whole ? block : 0);
    if (is_last(state, number, whole ? splits : splits * BLOCKS)) {
        join(whole ? block : 0, whole ? block + 1 : BLOCKS, splits);
    }
}
