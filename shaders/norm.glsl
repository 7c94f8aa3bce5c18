// The residual stream: hidden = scale * (hidden + norm(branch)), then norm(hidden).
//
// A workgroup holds a column in registers, ITEMS vectors of four channels in each invocation. Sums go
// by runs of 32 channels, in an order that does not depend on LANES, and nothing is fused
// (`precise`): whoever computes a norm gets the same bits.

layout(constant_id = 4) const uint ITEMS = 1;
layout(constant_id = 5) const uint HIDDEN = 32;
layout(constant_id = 6) const float EPS = 1e-6;
layout(constant_id = 7) const bool POST_NORM = false;  // the branch has a norm of its own
layout(constant_id = 8) const bool HAS_BRANCH = false;
layout(constant_id = 9) const uint PARTS = 1;  // whose sum the branch is
layout(constant_id = 18) const bool PLAIN = false;  // x is the sum itself, without a norm

const uint HIDDEN_QUADS = HIDDEN / 4;
const uint HIDDEN_TILES = (HIDDEN + 127) / 128;
const uint RUNS = HIDDEN / 32;

shared float run_squares[2 * RUNS];  // of the branch, of the sum

#ifndef EACH_ITEM  // of a kernel that is long already it is a loop
#define EACH_ITEM [[unroll]]
#endif

// A column on its way: everything is asked for before anything is waited for.
vec4 h[ITEMS], joining[ITEMS];
vec4 branch_gains[ITEMS], gains[ITEMS];

vec4 quad_or_zero(Quads from, uint base, uint quad) {
    return quad < HIDDEN_QUADS ? from.at[base + quad] : vec4(0.0);
}

// Parts of the branch are (part, column of `columns`, HIDDEN); they are summed in their order.
void load_column(
    Quads hidden, Quads branch, Quads branch_gain, Quads gain, uint column, uint columns
) {
    uint base = column * HIDDEN_QUADS;
    vec4 parts[PARTS * ITEMS];
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        h[i] = quad_or_zero(hidden, base, quad);
        if (HAS_BRANCH) {
            [[unroll]] for (uint p = 0; p < PARTS; p++) {
                uint plane = p * columns * HIDDEN_QUADS;
                parts[p * ITEMS + i] = quad_or_zero(branch, plane + base, quad);
            }
        }
        branch_gains[i] = HAS_BRANCH && POST_NORM ? quad_or_zero(branch_gain, 0, quad) : vec4(1.0);
        gains[i] = quad_or_zero(gain, 0, quad);
    }
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        joining[i] = vec4(0.0);
        [[unroll]] for (uint p = 0; p < (HAS_BRANCH ? PARTS : 0); p++) {
            precise vec4 sum = joining[i] + parts[p * ITEMS + i];
            joining[i] = sum;
        }
    }
}

// 1 / RMS, known to the whole workgroup, of vectors of which these are the squares' sums by run.
float factor_of(uint place) {
    float total = 0.0;
    for (uint i = lane_index() % 8; i < RUNS; i += 8) {
        total += run_squares[place * RUNS + i];
    }
    precise float mean = team_sum(total, 8) / float(HIDDEN);
    mean = mean + EPS;
    return inversesqrt(mean);
}

void add_squares(vec4 v, uint quad, uint place) {
    precise float squares = v.x * v.x;
    squares += v.y * v.y;
    squares += v.z * v.z;
    squares += v.w * v.w;
    squares = team_sum(squares, 8);
    if (quad < HIDDEN_QUADS && quad % 8 == 0) {
        run_squares[place * RUNS + quad / 8] = squares;
    }
}

// h += norm(branch), or + branch, all of it times `scale`; then 1 / RMS of h.
float join_column(float scale) {
    if (HAS_BRANCH) {
        float factor = 1.0;
        if (POST_NORM) {
            EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
                add_squares(joining[i], i * LANES + lane_index(), 0);
            }
            barrier();
            factor = factor_of(0);
        }
        EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
            precise vec4 sum = joining[i];
            if (POST_NORM) {
                sum = sum * factor;
                sum = sum * branch_gains[i];
            }
            sum = h[i] + sum;
            sum = sum * scale;
            h[i] = sum;
        }
    }
    if (PLAIN) {
        return 1.0;
    }
    EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
        add_squares(h[i], i * LANES + lane_index(), 1);
    }
    barrier();
    return factor_of(1);
}

vec4 normed_quad(uint i, float factor) {
    precise vec4 y = h[i];
    if (!PLAIN) {
        y = y * factor;
        y = y * gains[i];
    }
    return y;
}
