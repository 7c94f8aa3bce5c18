#version 460
#extension GL_GOOGLE_include_directive : require
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

const uint TILE = LANES / 8;  // keys between two barriers
const uint PAIRS = DIM / 2;
const uint QUADS = DIM / 4;
const uint VECTORS = DIM / 8;  // of 8 channels in a row of the cache
const uint SHARING = HEADS / KV_HEADS;
const uint BLOCKS = HEADS / QUERIES;
const uint V_SLICES = LANES / VECTORS;
const uint KEY_LOADS = (VECTORS + 7) / 8;                   // of a lane for a key
const uint VALUE_LOADS = (TILE + V_SLICES - 1) / V_SLICES;  // of a lane for a tile
const uint TURN_ROWS = LANES / PAIRS;                       // that are turned at a time
const uint AT_ONCE = 16;  // partial results that a lane asks for together
// 32 channels share a scale: where a workgroup's heads are no whole number of them, one joins all.
const bool JOINS_OWN = QUERIES * DIM % 32 == 0;
const uint JOINED_HEADS = JOINS_OWN ? QUERIES : HEADS;
// Of a tile's keys, later of the splits.
const uint WEIGHTS = QUERIES * TILE > JOINED_HEADS * SPLITS ? QUERIES * TILE : JOINED_HEADS * SPLITS;

// Rows of DIM channels: the quads with even numbers, then the others, so that lanes that read eight
// channels each find neighbours.
shared vec4 rows[(QUERIES + 1) * QUADS];  // the queries, then the new key
shared vec4 new_value[QUADS];
shared STORED fresh_key[QUADS], fresh_value[QUADS];  // as the cache has them
shared float factors[QUERIES + 1];
shared float weights[WEIGHTS];
shared float correction[QUERIES];
shared vec4 gathered[QUERIES * V_SLICES * QUADS];

uint lane;
uint position;
uint head;  // of keys and values
uint first_row;  // of the head in the cache

uint quad_place(uint quad) {
    return quad % 2 * VECTORS + quad / 2;
}

vec4 input_at(uint place) {
    return MODE == PREPARE ? qkv.at[place] : Inputs(qkv).at[place];
}

vec4 input_quad(uint column, uint quad) {
    uint place = (gl_WorkGroupID.z * stride + column) / 4 + quad;
    vec4 sum = input_at(place);
    [[unroll]] for (uint part = 1; part < PARTS; part++) {
        sum += input_at(part * gl_NumWorkGroups.z * (stride / 4) + place);
    }
    return sum;
}

// Queries, and with `appends` the new key and value.
void load_rows(uint block, bool appends) {
    const uint own = QUERIES * QUADS;
    [[dont_unroll]] for (uint i = lane; i < own + (appends ? 2 * QUADS : 0); i += LANES) {
        if (i < own) {
            rows[i / QUADS * QUADS + quad_place(i % QUADS)] = input_quad(block * QUERIES * DIM, i);
        } else if (i < own + QUADS) {
            rows[own + quad_place(i - own)] = input_quad(k_column + head * DIM, i - own);
        } else {
            uint quad = i - own - QUADS;
            new_value[quad_place(quad)] = input_quad(v_column + head * DIM, quad);
        }
    }
}

// factors = 1 / RMS of the first `count` rows, eight lanes each.
void measure_rows(uint count) {
    [[dont_unroll]] for (uint base = 0; base < count; base += LANES / 8) {
        uint row = base + lane / 8;
        float total = 0.0;
        if (row < count) {
            [[unroll]] for (uint i = lane % 8; i < QUADS; i += 8) {
                total = dot_onto(rows[row * QUADS + i], rows[row * QUADS + i], total);
            }
        }
        total = team_sum(total, 8);
        if (row < count && lane % 8 == 0) {
            precise float mean = total / float(DIM);
            mean = mean + EPS;
            factors[row] = inversesqrt(mean);
        }
    }
    barrier();
}

// What turns a lane's pair of channels, on its way early: fine and coarse angle, gains of q and k.
vec2 fine, coarse;
vec4 pair_gains;

void load_turns() {
    uint pair = lane % PAIRS;
    fine = turns.at[position % 256 * PAIRS + pair];
    coarse = turns.at[(256 + position / 256) * PAIRS + pair];
    if (QK_NORM) {
        pair_gains.xy = vec2(q_gain.at[pair], q_gain.at[pair + PAIRS]);
        pair_gains.zw = vec2(k_gain.at[pair], k_gain.at[pair + PAIRS]);
    }
}

// Norm and RoPE of the first `count` rows. Component i turns with component i + DIM / 2; the angle of
// a position is that of its multiple of 256 and that of the rest.
void turn_rows(uint count) {
    uint pair = lane % PAIRS;
    precise float c = fine.x * coarse.x - fine.y * coarse.y;
    precise float s = fine.y * coarse.x + fine.x * coarse.y;
    if (QK_NORM) {
        measure_rows(count);
    }
    uint rows_end = lane < TURN_ROWS * PAIRS ? count : 0;
    [[dont_unroll]] for (uint row = lane / PAIRS; row < rows_end; row += TURN_ROWS) {
        uint low_at = row * QUADS + quad_place(pair / 4);
        uint high_at = row * QUADS + quad_place((pair + PAIRS) / 4);
        precise float low = rows[low_at][pair % 4], high = rows[high_at][pair % 4];
        if (QK_NORM) {
            vec2 gain = row < QUERIES ? pair_gains.xy : pair_gains.zw;
            low *= factors[row] * gain.x;
            high *= factors[row] * gain.y;
        }
        precise vec2 turned = vec2(low * c - high * s, high * c + low * s);
        rows[low_at][pair % 4] = turned.x;
        rows[high_at][pair % 4] = turned.y;
    }
    barrier();
}

// Norm of the new value.
void norm_value() {
    float total = 0.0;
    [[unroll]] for (uint i = lane % 8; i < QUADS; i += 8) {
        total = dot_onto(new_value[i], new_value[i], total);
    }
    precise float mean = team_sum(total, 8) / float(DIM);
    mean = mean + EPS;
    float factor = inversesqrt(mean);
    barrier();
    for (uint i = lane; i < QUADS; i += LANES) {
        new_value[i] *= factor;
    }
}

// The new key and value, where no other token of the window lies. They stay in shared memory as the
// cache has them: nobody reads them from there in this dispatch.
void append() {
    uint row = first_row + position % SLOTS;
    for (uint i = lane; i < QUADS; i += LANES) {
        uint at = quad_place(i), key_at = QUERIES * QUADS + at;
        fresh_key[at] = store_quad(keys, key_scales, row, i, rows[key_at]);
        fresh_value[at] = store_quad(values, value_scales, row, i, new_value[at]);
    }
    barrier();
}

// `slot` may be that of a tile's first key and less than SLOTS more.
uint cache_row(uint slot) {
    return first_row + (slot < SLOTS ? slot : slot - SLOTS);
}

// A tile of the cache on its way: eight lanes for a key, VECTORS lanes for a value.
Channels key_parts[KEY_LOADS], value_parts[VALUE_LOADS];

// Keys beyond the last are the last again: their weights are 0.
void fetch_keys(uint first, uint last) {
    uint row = cache_row(first % SLOTS + min(lane / 8, last - first));
    [[unroll]] for (uint i = 0; i < KEY_LOADS; i++) {
        key_parts[i] = fetch(keys, key_scales, row, min(8 * i + lane % 8, VECTORS - 1));
    }
}

void fetch_values(uint first, uint last) {
    [[unroll]] for (uint i = 0; i < VALUE_LOADS; i++) {
        uint key = min(lane / VECTORS + i * V_SLICES, last - first);
        uint row = cache_row(first % SLOTS + key);
        value_parts[i] = fetch(values, value_scales, row, lane % VECTORS);
    }
}

// weights = scores of up to TILE keys, eight lanes for a key. `fresh` is the key in shared memory.
void score(uint first, uint stop, uint fresh) {
    uint key = first + lane / 8;
    float total[QUERIES];
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        total[q] = 0.0;
    }
    [[unroll]] for (uint i = 0; i < KEY_LOADS; i++) {
        uint vector = 8 * i + lane % 8;
        if (vector < VECTORS) {
            vec4 low, high;
            unpack(key_parts[i], low, high);
            if (key == fresh) {
                low = stored_quad(fresh_key[vector]);
                high = stored_quad(fresh_key[VECTORS + vector]);
            }
            [[unroll]] for (uint q = 0; q < QUERIES; q++) {
                total[q] = dot_onto(low, rows[q * QUADS + vector], total[q]);
                total[q] = dot_onto(high, rows[q * QUADS + VECTORS + vector], total[q]);
            }
        }
    }
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        float s = team_sum(total[q], 8) * SCALE;
        s = CAP > 0.0 ? softcap(s, CAP) : s;
        if (lane % 8 == 0) {
            weights[q * TILE + lane / 8] = key < stop ? s : -1e30;
        }
    }
    barrier();
}

// Scores to weights relative to the greatest so far; eight lanes know a query's maximum and sum.
void renormalize(inout float peak, inout float sum) {
    uint query = lane / 8;
    if (query < QUERIES) {
        float best = peak;
        [[unroll]] for (uint i = lane % 8; i < TILE; i += 8) {
            best = max(best, weights[query * TILE + i]);
        }
        best = team_max(best, 8);
        float total = 0.0;
        [[unroll]] for (uint i = lane % 8; i < TILE; i += 8) {
            float w = weights[query * TILE + i];
            w = w > -1e29 ? exp(w - best) : 0.0;
            weights[query * TILE + i] = w;
            total += w;
        }
        float factor = exp(peak - best);
        precise float both = fma(sum, factor, team_sum(total, 8));
        sum = both;
        peak = best;
        correction[query] = factor;
    }
    barrier();
}

void mix(uint first, uint fresh, inout vec4 low[QUERIES], inout vec4 high[QUERIES]) {
    uint vector = lane % VECTORS, slice = lane / VECTORS;
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        low[q] *= correction[q];
        high[q] *= correction[q];
    }
    [[unroll]] for (uint i = 0; i < VALUE_LOADS; i++) {
        uint at = slice + i * V_SLICES;
        if (slice < V_SLICES && at < TILE) {
            vec4 a, b;
            unpack(value_parts[i], a, b);
            if (first + at >= fresh) {  // weights behind it are 0, but what lies there is anything
                a = stored_quad(fresh_value[vector]);
                b = stored_quad(fresh_value[VECTORS + vector]);
            }
            [[unroll]] for (uint q = 0; q < QUERIES; q++) {
                float w = weights[q * TILE + at];
                precise vec4 front = fma(vec4(w), a, low[q]), back = fma(vec4(w), b, high[q]);
                low[q] = front;
                high[q] = back;
            }
        }
    }
    barrier();
}

#include "attention_join.glsl"

// The workgroup's queries, and with `appends` the new key and value, as attention takes them.
void prepare(uint block, bool appends) {
    if (MODE != ATTEND) {
        load_turns();
    }
    load_rows(block, appends);
    barrier();
    if (VALUE_NORM && appends) {
        norm_value();
    }
    if (MODE != ATTEND) {
        turn_rows(appends ? QUERIES + 1 : QUERIES);
    }
    if (appends) {
        append();
    }
}

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
    uint run = max(max(TILE, RUN), (seen + SPLITS - 1) / SPLITS);
    uint splits = MODE == PREPARE ? 1 : (seen + run - 1) / run;
    uint split = gl_WorkGroupID.x, block = gl_WorkGroupID.y;
    head = block * QUERIES / SHARING;
    first_row = (sequence * KV_HEADS + head) * SLOTS;
    if (split >= splits) {
        return;
    }
    uint begin = first + split * run, stop = min(begin + run, position + 1);
    bool appends = OWNS_KEYS && MODE != ATTEND && split + 1 == splits;
    uint fresh = appends ? position : 0xFFFFFFFFu;  // others hold no key or value of it
    float peak = -1e30, sum = 0.0;
    vec4 low[QUERIES], high[QUERIES];
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        low[q] = vec4(0.0);
        high[q] = vec4(0.0);
    }
    if (MODE != PREPARE) {
        fetch_keys(begin, stop - 1);
        fetch_values(begin, stop - 1);
    }
    prepare(block, appends);
    [[dont_unroll]] for (uint tile = begin; MODE != PREPARE && tile < stop; tile += TILE) {
        bool more = tile + TILE < stop;  // keys, on their way while these are mixed
        score(tile, stop, fresh);
        if (more) {
            fetch_keys(tile + TILE, stop - 1);
        }
        renormalize(peak, sum);
        mix(tile, fresh, low, high);
        if (more) {
            fetch_values(tile + TILE, stop - 1);
        }
    }
    if (MODE == PREPARE) {
        store_queries(block);
        return;
    }
    bool is_output = JOINS_OWN && splits == 1;
    store_partials(low, high, peak, sum, is_output);
    if (is_output) {
        return;
    }
    uint number = counter + gl_WorkGroupID.z * (JOINS_OWN ? BLOCKS : 1) + (JOINS_OWN ? block : 0);
    if (is_last(state, number, JOINS_OWN ? splits : splits * BLOCKS)) {
        join(JOINS_OWN ? block * QUERIES : 0, splits);
    }
}
