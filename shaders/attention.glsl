// One token's attention to a run of keys: norms of queries, keys and values, RoPE, the new row of the
// cache, softmax(Q K^T) V. Who includes it has the sizes of heads and cache, and says where queries,
// keys and values come from (`input_pair`), and how many of its lanes have keys and values (ATTENDING).
// DIM is a constant, or, with HEADS_VARY, a variable: powers of two from LEAST_DIM to MOST_DIM.
#ifndef HEADS_VARY
#define HEADS_VARY false
#define MOST_DIM DIM
#define LEAST_DIM DIM
#endif
#define QUADS (DIM / 4)
#define VECTORS (DIM / 8)  // of 8 channels in a row of the cache
#define V_SLICES over(ATTENDING, VECTORS)
#define ROW_LANES ((VECTORS + 7) / 8 * 8)
#define KEY_TEAMS (DIM < 512 ? 1 : 2)  // of eight lanes, that share a key
#define TILE (TEAMS_OF_8 / KEY_TEAMS)  // keys at a time

const uint TEAMS_OF_8 = ATTENDING / 8;
const uint BLOCKS = HEADS / QUERIES;
const uint MOST_VECTORS = MOST_DIM / 8;
const uint MOST_KEY_TEAMS = MOST_DIM < 512 ? 1 : 2;
const uint KEY_LOADS = (MOST_VECTORS + 8 * MOST_KEY_TEAMS - 1) / (8 * MOST_KEY_TEAMS);  // of a lane for a key
const uint LEAST_SLICES = ATTENDING / MOST_VECTORS;
const uint MOST_SLICES = ATTENDING / (LEAST_DIM / 8);
const uint TILE_OF_MOST = TEAMS_OF_8 / MOST_KEY_TEAMS;
const uint VALUE_LOADS = (TILE_OF_MOST + LEAST_SLICES - 1) / LEAST_SLICES;  // of a lane for a tile
// None, where every lane has a vector of all its keys; and where it has a slice, and all its values a key.
const uint VECTORS_LACKED = LEAST_DIM % 64 + (LEAST_DIM < 256 ? MOST_DIM - LEAST_DIM : 0);
const uint VALUES_LACKED =
    LANES - ATTENDING + ATTENDING % MOST_VECTORS + TILE_OF_MOST % LEAST_SLICES + VECTORS_LACKED;
// Whether those who share a scale do not have neighbouring lanes.
#if KV_INT8
const bool STORES_ROWS = LEAST_DIM % 64 > 0;
#else
const bool STORES_ROWS = false;
#endif

// Rows of DIM channels: the quads with even numbers, then the others, so that lanes that read eight
// channels each find neighbours.
shared vec4 rows[(QUERIES + 2) * 2 * MOST_VECTORS];
shared STORED fresh[2][2 * MOST_VECTORS];  // the new key and value, as the cache has them
shared float squares[LANES / 8 + MOST_VECTORS / 8];  // of eight lanes' channels
shared float scores[2 * QUERIES * TEAMS_OF_8 * MOST_KEY_TEAMS];  // of tiles' keys, by turns; of each team
shared vec4 gathered[QUERIES * LEAST_SLICES * 2 * MOST_VECTORS];
shared float gathered_weights[QUERIES * MOST_SLICES];

uint lane;
uint position;
uint head;  // of keys and values
uint first_row;  // of the head in the cache
uint new_slot;   // of the new key, or SLOTS more

// x / size and x % size, of sizes that are made of DIM.
uint over(uint x, uint size) {
    return HEADS_VARY ? x >> findLSB(size) : x / size;
}

uint rest(uint x, uint size) {
    return HEADS_VARY ? x & size - 1 : x % size;
}

uint quad_place(uint quad) {
    return quad % 2 * VECTORS + quad / 2;
}

// `slot` may be that of a tile's first key and less than SLOTS more.
uint cache_row(uint slot) {
    return first_row + (slot < SLOTS ? slot : slot - SLOTS);
}

#include "attention_rows.glsl"

// A tile of the cache, and the next one on its way: KEY_TEAMS times eight lanes for a key, VECTORS lanes for a
// value.
Channels key_parts[KEY_LOADS], value_parts[VALUE_LOADS], next_keys[KEY_LOADS], next_values[VALUE_LOADS];

// Of the lane's key, its vector i.
uint key_vector(uint i) {
    uint vector = (lane / 8 % KEY_TEAMS * KEY_LOADS + i) * 8 + lane % 8;
    return VECTORS_LACKED == 0 ? vector : min(vector, VECTORS - 1);
}

bool has_vector(uint i) {
    return VECTORS_LACKED == 0 || i * 8 + lane % 8 < VECTORS;
}

// Keys beyond the last, `behind` the first, are the last again: their weights are 0.
void ask_keys(uint slot, uint behind) {
    uint row = cache_row(slot + min(lane / 8 / KEY_TEAMS, behind));
    [[unroll]] for (uint i = 0; i < KEY_LOADS; i++) {
        next_keys[i] = fetch(keys, key_scales, row, key_vector(i));
    }
}

void ask_values(uint slot, uint behind) {
    [[unroll]] for (uint i = 0; i < VALUE_LOADS; i++) {
        uint row = cache_row(slot + min(over(lane, VECTORS) + i * V_SLICES, behind));
        next_values[i] = fetch(values, value_scales, row, rest(lane, VECTORS));
    }
}

// So that compilers do not keep what was in them before.
void forget_tile() {
    [[unroll]] for (uint i = 0; i < KEY_LOADS; i++) {
        next_keys[i] = stored_channels(uvec2(0), uvec2(0));
    }
    [[unroll]] for (uint i = 0; i < VALUE_LOADS; i++) {
        next_values[i] = stored_channels(uvec2(0), uvec2(0));
    }
}

Channels fresh_channels(uint which, uint vector) {
    return stored_channels(fresh[which][2 * vector], fresh[which][2 * vector + 1]);
}

// Scores of a tile's keys. `fresh_at` is the key in shared memory.
void score(uint to, uint first, uint stop, uint fresh_at) {
    uint own = lane / 8 / KEY_TEAMS;
    float total[QUERIES];
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        total[q] = 0.0;
    }
    if (first + own == fresh_at) {
        [[unroll]] for (uint i = 0; i < KEY_LOADS; i++) {
            key_parts[i] = fresh_channels(0, key_vector(i));
        }
    }
    [[unroll]] for (uint i = 0; i < KEY_LOADS; i++) {
        if (has_vector(i)) {
            uint vector = key_vector(i);
            vec4 low, high;
            unpack(key_parts[i], low, high);
            [[unroll]] for (uint q = 0; q < QUERIES; q++) {
                total[q] = dot_onto(low, rows[q * QUADS + vector], total[q]);
                total[q] = dot_onto(high, rows[q * QUADS + VECTORS + vector], total[q]);
            }
        }
    }
    [[unroll]] for (uint step = 1; step < 8; step *= 2) {
        [[unroll]] for (uint q = 0; q < QUERIES; q++) {
            total[q] += subgroupShuffleXor(total[q], step);
        }
    }
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        if (lane % 8 == 0 && (LANES == ATTENDING || lane < ATTENDING)) {
            float s = first + own < stop ? total[q] * SCALE : -1e30;
            uint place = (to + q * TEAMS_OF_8 + own) * MOST_KEY_TEAMS;
            scores[place + lane / 8 % KEY_TEAMS] = s;
            if (KEY_TEAMS < MOST_KEY_TEAMS) {
                scores[place + 1] = 0.0;
            }
        }
    }
}

// Below -1e29 of no key.
float score_of(uint place) {
    float s = scores[place * MOST_KEY_TEAMS];
    if (MOST_KEY_TEAMS == 2) {
        s += scores[2 * place + 1];
    }
    return CAP > 0.0 && s > -1e29 ? softcap(s, CAP) : s;
}

// Weighted values of a slice of the keys, of all queries; the greatest score of all keys so far, and the sum
// of the slice's weights.
vec4 mixed_low[QUERIES], mixed_high[QUERIES];
float peaks[QUERIES], total_weight[QUERIES];

void clear_mixed() {
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        mixed_low[q] = mixed_high[q] = vec4(0.0);
        peaks[q] = -1e30;
        total_weight[q] = 0.0;
    }
}

// Every eight lanes find the greatest score by themselves.
void find_peaks(uint from) {
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        float best = peaks[q];
        [[unroll]] for (uint i = 0; i < TEAMS_OF_8; i += 8) {
            best = max(best, score_of(from + q * TEAMS_OF_8 + min(i + lane % 8, TILE - 1)));
        }
        best = team_max(best, 8);
        float factor = exp(peaks[q] - best);
        mixed_low[q] *= factor;
        mixed_high[q] *= factor;
        total_weight[q] *= factor;
        peaks[q] = best;
    }
}

void mix(uint from, uint first, uint fresh_at) {
    find_peaks(from);
    uint vector = rest(lane, VECTORS), slice = over(lane, VECTORS);
    [[unroll]] for (uint i = 0; i < VALUE_LOADS; i++) {
        uint at = slice + i * V_SLICES;
        if (VALUES_LACKED == 0 || slice < V_SLICES && at < TILE) {
            if (first + at >= fresh_at) {  // weights behind it are 0, but what lies there is anything
                value_parts[i] = fresh_channels(1, vector);
            }
            vec4 a, b;
            unpack(value_parts[i], a, b);
            [[unroll]] for (uint q = 0; q < QUERIES; q++) {
                float s = score_of(from + q * TEAMS_OF_8 + at), w = s > -1e29 ? exp(s - peaks[q]) : 0.0;
                precise vec4 low = fma(vec4(w), a, mixed_low[q]), high = fma(vec4(w), b, mixed_high[q]);
                mixed_low[q] = low;
                mixed_high[q] = high;
                total_weight[q] += w;
            }
        }
    }
}

// Prepares the rows, and mixes the values of the keys `begin` .. `stop` - 1, the first of which has `slot`. A
// tile is on its way while the one in front of it is computed.
void attend(uint block, bool appends, uint slot, uint begin, uint stop) {
    uint fresh_at = appends ? position : 0xFFFFFFFFu, from = 0;  // others hold no row of it
    forget_tile();
    clear_mixed();
    // What is computed is one tile behind what is asked for.
    [[dont_unroll]] for (uint next = begin; next < stop + TILE; next += TILE) {
        uint tile = next - TILE, behind = stop - 1 - next;
        [[unroll]] for (uint i = 0; i < KEY_LOADS; i++) {
            key_parts[i] = next_keys[i];
        }
        [[unroll]] for (uint i = 0; i < VALUE_LOADS; i++) {
            value_parts[i] = next_values[i];
        }
        if (next < stop) {  // together: a compiler that waits for keys may wait for values, too
            ask_keys(slot, behind);
            ask_values(slot, behind);
        }
        if (next == begin) {
            prepare(block, appends);
            clear_mixed();  // again: so compilers need not keep it meanwhile
        } else {
            score(from, tile, stop, fresh_at);
            barrier();
            mix(from, tile, fresh_at);
        }
        from = QUERIES * TEAMS_OF_8 - from;
        slot = slot + TILE < SLOTS ? slot + TILE : slot + TILE - SLOTS;
    }
}

// The weighted values of all slices to shared memory, for `gathered_quad` and `gathered_weight`.
void gather_values() {
    uint vector = rest(lane, VECTORS), slice = over(lane, VECTORS);
    if (VALUES_LACKED == 0 || slice < V_SLICES) {
        [[unroll]] for (uint q = 0; q < QUERIES; q++) {
            gathered[(slice * QUERIES + q) * QUADS + vector] = mixed_low[q];
            gathered[(slice * QUERIES + q) * QUADS + VECTORS + vector] = mixed_high[q];
            if (vector == 0) {
                gathered_weights[slice * QUERIES + q] = total_weight[q];
            }
        }
    }
    barrier();
}

// Quad i of the workgroup's queries.
vec4 gathered_quad(uint i) {
    uint at = over(i, QUADS) * QUADS + quad_place(rest(i, QUADS));
    vec4 total = vec4(0.0);
    [[dont_unroll]] for (uint s = 0; s < V_SLICES; s += LEAST_SLICES) {
        [[unroll]] for (uint k = 0; k < LEAST_SLICES; k++) {
            total += gathered[(s + k) * QUERIES * QUADS + at];
        }
    }
    return total;
}

// Sum of a query's weights.
float gathered_weight(uint query) {
    float total = 0.0;
    [[dont_unroll]] for (uint s = 0; s < V_SLICES; s += LEAST_SLICES) {
        [[unroll]] for (uint k = 0; k < LEAST_SLICES; k++) {
            total += gathered_weights[(s + k) * QUERIES + query];
        }
    }
    return total;
}
