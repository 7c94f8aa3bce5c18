#version 460
#extension GL_GOOGLE_include_directive : require
// The next token of each sequence: the likeliest, or one that is drawn among those that top-k, then
// top-p (Holtzman et al., nucleus sampling) leave. A workgroup for each sequence.
//
// The least logit that is kept lies in an interval [low, high) that is cut into BINS parts until it is
// narrower than any difference that matters; `spare` of the logits inside, first come first served,
// are kept, too. A lane owns a run of neighbouring groups of 32 logits and passes over each group
// whose peak is too small.
#include "common.glsl"
layout(constant_id = 1) const float CAP = 0.0;  // of the logits; 0 where they are capped already

layout(push_constant) uniform Push {
    Floats logits;  // (columns, stride)
    Floats peaks;  // (columns, groups), of peaks.comp
    State state;
    uint stride, vocabulary, groups;
    uint advances;  // 1: behind a step of decoding
};

const uint BINS = 8;
const uint ROUNDS = 12;  // of cutting: 8^12 is far beyond the digits of a float
const uint NOBODY = 0xFFFFFFFFu;
const float LOWEST = -3.402823e38;
const float WIDTH = 32.0;  // below the peak, at temperature 1, lies what is never drawn: exp(-32)

shared uint subgroup_least[128];

uint lane, column;
float peak, temperature;

// Least of the workgroup.
uint workgroup_min(uint value) {
    value = subgroupMin(value);
    if (subgroupElect()) {
        subgroup_least[gl_SubgroupID] = value;
    }
    barrier();
    for (uint i = 0; i < gl_NumSubgroups; i++) {
        value = min(value, subgroup_least[i]);
    }
    barrier();
    return value;
}

// Sum over the lanes in front of this one.
float before(float value) {
    float sum = subgroupExclusiveAdd(value);
    if (gl_SubgroupInvocationID == gl_SubgroupSize - 1) {
        part_totals[gl_SubgroupID] = sum + value;
    }
    barrier();
    for (uint i = 0; i < gl_SubgroupID; i++) {
        sum += part_totals[i];
    }
    barrier();
    return sum;
}

float weight(float logit) {
    return exp((logit - peak) / temperature);
}

float logit(uint group, uint i) {
    float v = logits.at[column * stride + 32 * group + i];
    return CAP > 0.0 ? softcap(v, CAP) : v;
}

// This lane's groups.
uint run_begin() {
    return min(lane * ((groups + LANES - 1) / LANES), groups);
}

uint run_end() {
    return min((lane + 1) * ((groups + LANES - 1) / LANES), groups);
}

float group_peak(uint group) {
    return peaks.at[column * groups + group];
}

bool exists(uint group, uint i) {
    return 32 * group + i < vocabulary;
}

// What to count: the peaks of the groups, all logits, or the weights of all logits.
const uint PEAKS = 0, LOGITS = 1, WEIGHTS = 2;

struct Interval {
    float low, high;
    float above;  // what lies at `high` and beyond
};

// The same number wherever it is computed.
float edge(Interval part, uint i) {
    precise float inside = part.low + (part.high - part.low) * (float(i) / float(BINS));
    return i == BINS ? part.high : inside;
}

void count_logit(float v, float value, Interval part, inout float sums[BINS]) {
    [[unroll]] for (uint b = 0; b < BINS; b++) {
        sums[b] += v >= edge(part, b) && v < part.high ? value : 0.0;
    }
}

// sums[b]: what lies from edge b to the end of the interval.
void measure(uint what, Interval part, out float sums[BINS]) {
    [[unroll]] for (uint b = 0; b < BINS; b++) {
        sums[b] = 0.0;
    }
    for (uint group = run_begin(); group < run_end(); group++) {
        float best = group_peak(group);
        if (best < part.low) {
            continue;
        }
        if (what == PEAKS) {
            count_logit(best, 1.0, part, sums);
            continue;
        }
        for (uint i = 0; i < 32 && exists(group, i); i++) {
            float v = logit(group, i);
            if (v >= part.low) {
                count_logit(v, what == WEIGHTS ? weight(v) : 1.0, part, sums);
            }
        }
    }
    [[unroll]] for (uint b = 0; b < BINS; b++) {
        sums[b] = workgroup_sum(sums[b]);
    }
}

// The interval in which the sum from the top reaches `target`, which is above 0. It begins at `floor_`
// where the whole sum does not.
Interval border(uint what, float target, float low, float floor_) {
    Interval part = Interval(low, peak + 1.0, 0.0);
    for (uint i = 0; i < ROUNDS; i++) {
        float sums[BINS];
        measure(what, part, sums);
        if (part.above + sums[0] < target) {
            if (part.low <= floor_) {
                return Interval(floor_, floor_, part.above + sums[0]);
            }
            float wider = max(peak - 16.0 * (peak - part.low), floor_);
            part = Interval(wider, part.low, part.above + sums[0]);
            continue;
        }
        uint b = 0;
        [[unroll]] for (uint next = 1; next < BINS; next++) {
            b = part.above + sums[next] >= target ? next : b;
        }
        float beyond = 0.0;
        [[unroll]] for (uint next = 1; next < BINS; next++) {
            beyond = next == b + 1 ? sums[next] : beyond;
        }
        part = Interval(edge(part, b), edge(part, b + 1), part.above + beyond);
    }
    return part;
}

// Sum of the weights of logits from `low` on.
float mass_from(float low) {
    float sum = 0.0;
    for (uint group = run_begin(); group < run_end(); group++) {
        if (group_peak(group) < low) {
            continue;
        }
        for (uint i = 0; i < 32 && exists(group, i); i++) {
            float v = logit(group, i);
            sum += v >= low ? weight(v) : 0.0;
        }
    }
    return workgroup_sum(sum);
}

struct Kept {
    float low, high;  // all from `high` on, and of those in between
    float spare;      // so many
};

Kept top_k(uint k) {
    if (k == 0 || k >= vocabulary) {
        return Kept(LOWEST, LOWEST, 0.0);
    }
    float low = peak - WIDTH;
    if (k <= groups) {  // k peaks from `low` on are k logits from `low` on
        low = border(PEAKS, float(k), low, LOWEST).low;
    }
    Interval found = border(LOGITS, float(k), low, LOWEST);
    return Kept(found.low, found.high, float(k) - found.above);
}

Kept top_p(Kept kept, float p) {
    if (p >= 1.0) {
        return kept;
    }
    float share = kept.spare > 0.0 ? kept.spare * weight(kept.low) : 0.0;
    float sure = mass_from(kept.high), target = p * (sure + share);
    if (kept.spare > 0.0 && sure < target) {
        float spare = ceil((target - sure) / weight(kept.low));
        return Kept(kept.low, kept.high, clamp(spare, 1.0, kept.spare));
    }
    float low = max(kept.high, peak - WIDTH * temperature);
    Interval found = border(WEIGHTS, target, low, kept.high);
    float spare = found.high > found.low ? ceil((target - found.above) / weight(found.low)) : 0.0;
    return Kept(found.low, found.high, spare);
}

// Greedy: the first of the greatest.
uint likeliest() {
    uint id = NOBODY;
    for (uint group = run_begin(); group < run_end() && id == NOBODY; group++) {
        for (uint i = 0; i < 32 && group_peak(group) == peak && exists(group, i); i++) {
            id = id == NOBODY && logit(group, i) == peak ? 32 * group + i : id;
        }
    }
    return workgroup_min(id);
}

// The token, tokens in rising order, at which the sum of the kept weights exceeds `number` of it all,
// or the last of them where rounding leaves none.
uint draw(Kept kept, float number) {
    float inside = 0.0;
    for (uint group = run_begin(); group < run_end() && kept.spare > 0.0; group++) {
        for (uint i = 0; i < 32 && group_peak(group) >= kept.low && exists(group, i); i++) {
            float v = logit(group, i);
            inside += v >= kept.low && v < kept.high ? 1.0 : 0.0;
        }
    }
    float spare = clamp(kept.spare - before(inside), 0.0, inside);
    float sum = 0.0, start = 0.0, goal = 0.0;
    uint chosen = NOBODY, last = 0;
    for (uint round = 0; round < 2; round++) {  // the sum, then the token
        float left = spare;
        float at = start;
        for (uint group = run_begin(); group < run_end(); group++) {
            for (uint i = 0; i < 32 && group_peak(group) >= kept.low && exists(group, i); i++) {
                float v = logit(group, i);
                bool in_between = v >= kept.low && v < kept.high && left > 0.0;
                if (v >= kept.high || in_between) {
                    left -= in_between ? 1.0 : 0.0;
                    at += weight(v);
                    bool reached = round == 1 && at > goal && chosen == NOBODY;
                    last = 32 * group + i;
                    chosen = reached ? last : chosen;
                }
            }
        }
        if (round == 0) {
            sum = at;
            start = before(sum);
            goal = number * workgroup_sum(sum);
        }
    }
    chosen = workgroup_min(chosen);
    last = ~workgroup_min(~last);
    return min(chosen, last);
}

void main() {
    lane = lane_index();
    column = gl_WorkGroupID.x;
    if (column >= state.count) {
        return;
    }
    float best = LOWEST;
    for (uint group = run_begin(); group < run_end(); group++) {
        best = max(best, group_peak(group));
    }
    peak = workgroup_max(best);
    temperature = state.temperatures[column];
    uint token = likeliest();
    if (temperature > 0.0) {
        Kept kept = top_p(top_k(state.top_ks[column]), state.top_ps[column]);
        uint number = column * MAX_STEPS + state.made[column];
        token = draw(kept, state.draws[number]);
    }
    if (lane == 0 && (advances == 0 || state.done[column] == 0)) {
        state.choices[column] = token == NOBODY ? 0 : token;
        if (advances != 0) {
            advance(state, column);
        }
    }
}
