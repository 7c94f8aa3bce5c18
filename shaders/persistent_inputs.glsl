// What the other products of persistent.comp take: the context of some heads, the gate's outputs. A workgroup
// makes what it needs by itself, of messages.

const uint MOST_OCTETS = 16 * HELD_TILES;
const uint BATCH = MOST_OCTETS > 3 * LANES ? 4 : (MOST_OCTETS + LANES - 1) / LANES;  // octets on their way

const uint BATCH_QUADS = 2 * BATCH;

DEFINE_HOLD(hold_batch, BATCH, BATCH_QUADS)

// A part of what a stage has sent: of each `period` tiles so many channels, and 0 behind them.
void hold_messages(uint place, uint channels, uint period) {
    MessageQuads from = MessageQuads(copy_at + 4 * place);
    uint first = 16 * work.first_tile, count = 16 * (work.last_tile - work.first_tile);
    [[dont_unroll]] for (uint octet = lane; octet < count + lane; octet += BATCH * LANES) {
        uvec4 v[BATCH_QUADS];
        [[unroll]] for (uint k = 0; k < BATCH_QUADS; k++) {
            uint own = octet + k / 2 * LANES;
            uint at = ACTIVE > 0 ? (first + own) % (16 * period) : first + own;
            v[k] = uvec4(own < count && at < channels / 8 ? EMPTY : 0);
        }
        bool waits = true;
        for (uint looks = 0; waits && !gives_up(looks); looks++) {
            [[unroll]] for (uint k = 0; k < BATCH_QUADS; k += 2) {
                look_octet(from, first + octet + k / 2 * LANES, v[k], v[k + 1]);
            }
            waits = false;
            [[unroll]] for (uint k = 0; k < BATCH_QUADS; k += 2) {
                waits = waits || is_empty(max(v[k], v[k + 1]));
            }
            if (waits) {
                read_ahead();
            }
        }
        vec4 y[BATCH_QUADS];
        [[unroll]] for (uint k = 0; k < BATCH_QUADS; k++) {
            y[k] = uintBitsToFloat(v[k]);
        }
        hold_batch(octet, count, y);
    }
}

uint splits;

const uint PART_HEADS = JOINS ? 1 : HEADS / OUT_PARTS;
shared float shares[PART_HEADS * SPLITS];

uint partial_row(uint query_head, uint split) {
    return query_head * SPLITS + split;
}

const uint STATS_ON_WAY = SPLITS > 16 ? 4 : 2;  // of a lane

// Peaks and sums of the splits `first` .. that a lane has, every eighth; those that are missing.
bool look_stats(uint first_head, uint first, inout uvec2 stat[STATS_ON_WAY]) {
    MessagePairs from = MessagePairs(copy_at + 4 * STATS_AT);
    uint h = lane / 8;
    bool waits = false;
    [[unroll]] for (uint k = 0; k < STATS_ON_WAY; k++) {
        uint s = first + 8 * k + lane % 8;
        if (h < PART_HEADS && s < splits && max(stat[k].x, stat[k].y) == EMPTY) {
            stat[k] = from.at[partial_row(first_head + h, s)];
            waits = true;
        }
    }
    return waits;
}

// shares = share of each split in the output of a part's heads, eight lanes a head, as in attention_join.glsl.
// `stat` may be on their way.
void weigh_heads(uint first_head, uvec2 stat[STATS_ON_WAY]) {
    uint h = lane / 8;
    float best = -1e30, total = 0.0;
    [[dont_unroll]] for (uint first = 0; first < splits; first += 8 * STATS_ON_WAY) {
        for (uint looks = 0; look_stats(first_head, first, stat) && !gives_up(looks); looks++) {
        }
        [[unroll]] for (uint k = 0; k < STATS_ON_WAY; k += 2) {
            uint s = first + 8 * k + lane % 8;
            vec2 one = uintBitsToFloat(stat[k]), two = uintBitsToFloat(stat[k + 1]);
            two = s + 8 < splits ? two : vec2(-1e30, 0.0);
            if (h < PART_HEADS && s < splits) {
                float peak = max(best, max(one.x, two.x));
                precise float sum = total * exp(best - peak);
                sum = fma(one.y, exp(one.x - peak), sum);
                sum = fma(two.y, exp(two.x - peak), sum);
                total = sum;
                best = peak;
                shares[h * SPLITS + s] = one.x;
                shares[h * SPLITS + s + 8] = two.x;
            }
            stat[k] = stat[k + 1] = uvec2(EMPTY);
        }
    }
    float peak = team_max(best, 8);
    total = team_sum(total * exp(best - peak), 8);
    [[dont_unroll]] for (uint s = lane % 8; s < (h < PART_HEADS ? splits : 0); s += 8) {
        shares[h * SPLITS + s] = exp(shares[h * SPLITS + s] - peak) / total;
    }
    barrier();
}

// Of a part's heads, or, where one workgroup joins, of one or half of one.
const uint PART_CHANNELS = JOINS ? (MOST_DIM < LANES ? MOST_DIM : LANES) : PART_HEADS * MOST_DIM;
const uint OWN_CHANNELS = PART_CHANNELS > LANES ? 2 : 1;  // of a lane, at a time
const uint AT_MOST = SPLITS > 16 ? 24 : 8;  // splits that are asked for at a time
const uint TOGETHER = AT_MOST / OWN_CHANNELS;
const uint SUMS_ON_WAY = OWN_CHANNELS * TOGETHER;

// Splits `first` .. of the lane's channels, whose places in the first split these are.
void receive_splits(uint places[OWN_CHANNELS], uint first, out uint sums[SUMS_ON_WAY]) {
    Messages from = Messages(copy_at + 4 * PARTIALS_AT);
    bool waits = true;
    for (uint looks = 0; waits && !gives_up(looks); looks++) {
        [[unroll]] for (uint k = 0; k < SUMS_ON_WAY; k++) {
            sums[k] = from.at[places[k / TOGETHER] + min(first + k % TOGETHER, splits - 1) * DIM];
        }
        uint most = 0;
        [[unroll]] for (uint k = 0; k < SUMS_ON_WAY; k++) {
            most = max(most, sums[k]);
        }
        waits = most == EMPTY;
    }
}

void deliver(uint first_channel, uint channel, float total) {
    if (JOINS) {
        send(spread(CONTEXT_AT + first_channel + channel), total);
    } else {
        gathered[channel / 4][channel % 4] = total;
    }
}

// `count` channels of the context, of whole heads or of one: each lane has channels of its own.
void sum_splits(uint first_channel, uint count) {
    uvec2 stat[STATS_ON_WAY];
    [[unroll]] for (uint k = 0; k < STATS_ON_WAY; k++) {
        stat[k] = uvec2(EMPTY);
    }
    uint first_head = over(first_channel, DIM);
    look_stats(first_head, 0, stat);
    [[dont_unroll]] for (uint base = 0; base < count; base += OWN_CHANNELS * LANES) {
        float total[OWN_CHANNELS];
        uint own[OWN_CHANNELS], places[OWN_CHANNELS];
        [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
            uint at = first_channel + min(base + i * LANES + lane, count - 1);
            total[i] = 0.0;
            own[i] = (over(at, DIM) - first_head) * SPLITS;
            places[i] = partial_row(over(at, DIM), 0) * DIM + rest(at, DIM);
        }
        [[dont_unroll]] for (uint first = 0; first < splits; first += TOGETHER) {
            uint sums[SUMS_ON_WAY];
            receive_splits(places, first, sums);
            if (first + base == 0) {
                weigh_heads(first_head, stat);
            }
            [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
                [[unroll]] for (uint s = 0; s < TOGETHER; s++) {
                    float weight = first + s < splits ? shares[own[i] + first + s] : 0.0;
                    precise float sum = fma(weight, uintBitsToFloat(sums[i * TOGETHER + s]), total[i]);
                    total[i] = sum;
                }
            }
        }
        [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
            uint channel = base + i * LANES + lane;
            if (channel < count) {
                deliver(first_channel, channel, total[i]);
            }
        }
    }
}

// Whoever has no run of keys joins first.
void join_heads() {
    uint own = gl_NumWorkGroups.x - 1 - gl_WorkGroupID.x, count = DIM > LANES ? DIM / 2 : DIM;
    [[dont_unroll]] for (uint first = own * count; first < HEADS * DIM; first += gl_NumWorkGroups.x * count) {
        sum_splits(first, count);
        barrier();  // before the shares are written again
    }
}

DEFINE_HOLD(hold_one, 1, 2)

void hold_context(uint first_head) {
    uint count = PART_HEADS * DIM;
    sum_splits(first_head * DIM, count);
    barrier();
    for (uint octet = lane; octet < count / 8 + lane; octet += LANES) {
        uint quad = 2 * min(octet, count / 8 - 1);
        hold_one(octet, count / 8, vec4[2](gathered[quad], gathered[quad + 1]));
    }
}
