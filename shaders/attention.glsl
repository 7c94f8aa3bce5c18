// One token's attention to a run of keys: norms of queries, keys and values, RoPE, the new row of the
// cache, softmax(Q K^T) V. Who includes it has the sizes of heads and cache, and says where queries,
// keys and values come from (`input_quad`), and how many of its lanes have keys and values (ATTENDING).
// DIM is a constant, or, with HEADS_VARY, a variable: powers of two up to MOST_DIM.
#ifndef HEADS_VARY
#define HEADS_VARY false
#define MOST_DIM DIM
#endif
#define PAIRS (DIM / 2)
#define QUADS (DIM / 4)
#define VECTORS (DIM / 8)  // of 8 channels in a row of the cache
#define V_SLICES over(ATTENDING, VECTORS)
#define TURN_ROWS over(LANES, PAIRS)  // that are turned at a time

const uint TILE = ATTENDING / 8;  // keys between two barriers
const uint BLOCKS = HEADS / QUERIES;
const uint MOST_VECTORS = MOST_DIM / 8;
const uint KEY_LOADS = (MOST_VECTORS + 7) / 8;  // of a lane for a key
const uint LEAST_SLICES = ATTENDING / MOST_VECTORS;
const uint VALUE_LOADS = (TILE + LEAST_SLICES - 1) / LEAST_SLICES;  // of a lane for a tile

// Rows of DIM channels: the quads with even numbers, then the others, so that lanes that read eight
// channels each find neighbours.
shared vec4 rows[(QUERIES + 1) * 2 * MOST_VECTORS];  // the queries, then the new key
shared vec4 new_value[2 * MOST_VECTORS];
shared STORED fresh_key[2 * MOST_VECTORS], fresh_value[2 * MOST_VECTORS];  // as the cache has them
shared float factors[QUERIES + 1];
shared float weights[QUERIES * TILE];  // of a tile's keys
shared float correction[QUERIES];
shared vec4 gathered[QUERIES * LEAST_SLICES * 2 * MOST_VECTORS];

uint lane;
uint position;
uint head;  // of keys and values
uint first_row;  // of the head in the cache

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

// Queries, and with `appends` the new key and value.
void load_rows(uint block, bool appends) {
    uint own = QUERIES * QUADS;
    [[dont_unroll]] for (uint i = lane; i < own + (appends ? 2 * QUADS : 0); i += LANES) {
        if (i < own) {
            rows[over(i, QUADS) * QUADS + quad_place(rest(i, QUADS))] = input_quad(block * QUERIES * DIM, i);
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
    uint pair = rest(lane, PAIRS);
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
    uint pair = rest(lane, PAIRS);
    precise float c = fine.x * coarse.x - fine.y * coarse.y;
    precise float s = fine.y * coarse.x + fine.x * coarse.y;
    if (QK_NORM) {
        measure_rows(count);
    }
    uint rows_end = lane < TURN_ROWS * PAIRS ? count : 0;
    [[dont_unroll]] for (uint row = over(lane, PAIRS); row < rows_end; row += TURN_ROWS) {
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
        uint key = min(over(lane, VECTORS) + i * V_SLICES, last - first);
        uint row = cache_row(first % SLOTS + key);
        value_parts[i] = fetch(values, value_scales, row, rest(lane, VECTORS));
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
        if (lane % 8 == 0 && lane < ATTENDING) {
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
    uint vector = rest(lane, VECTORS), slice = over(lane, VECTORS);
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

// Weighted values of the keys `begin` .. `stop` - 1, the first of which are on their way; `stat` is the
// greatest score and the sum of the weights.
void attend(
    uint begin, uint stop, uint fresh, out vec4 low[QUERIES], out vec4 high[QUERIES], out vec2 stat
) {
    float peak = -1e30, sum = 0.0;
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        low[q] = vec4(0.0);
        high[q] = vec4(0.0);
    }
    [[dont_unroll]] for (uint tile = begin; tile < stop; tile += TILE) {
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
    stat = vec2(peak, sum);
}

// The weighted values of all lanes to shared memory, for `gathered_quad`.
void gather_values(vec4 low[QUERIES], vec4 high[QUERIES]) {
    uint vector = rest(lane, VECTORS), slice = over(lane, VECTORS);
    if (slice < V_SLICES) {
        [[unroll]] for (uint q = 0; q < QUERIES; q++) {
            gathered[(slice * QUERIES + q) * QUADS + vector] = low[q];
            gathered[(slice * QUERIES + q) * QUADS + VECTORS + vector] = high[q];
        }
    }
}

// Quad i of the workgroup's queries.
vec4 gathered_quad(uint i) {
    uint at = over(i, QUADS) * QUADS + quad_place(rest(i, QUADS));
    vec4 total = gathered[at];
    [[unroll]] for (uint s = 1; s < V_SLICES; s++) {
        total += gathered[s * QUERIES * QUADS + at];
    }
    return total;
}

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
