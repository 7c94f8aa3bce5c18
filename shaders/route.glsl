// The ACTIVE experts of a column that have the greatest scores, of equal ones those that come first, and
// their shares: the softmax over them, times a factor of each expert. Including shader: COUNT, ACTIVE.

const uint SCORE_QUADS = COUNT > 0 ? (COUNT + 3) / 4 : 1;
shared vec4 known[SCORE_QUADS];  // behind the last score what is less than all
shared uint picked[ACTIVE > 0 ? ACTIVE : 1];

float known_score(uint i) {
    return known[i / 4][i % 4];
}

void know_score(uint i, float score) {
    known[i / 4][i % 4] = i < COUNT ? score : uintBitsToFloat(0xFF800000u);
}

// Of the scores that `known` is about to hold. Four lanes count those in front of one.
void pick_known() {
    uint lane = lane_index();
    for (uint i = lane; i < ACTIVE; i += LANES) {
        picked[i] = 0;  // scores that are no numbers have no order
    }
    barrier();
    for (uint base = 0; base < COUNT; base += LANES / 4) {
        uint i = base + lane / 4;
        float own = known_score(min(i, COUNT - 1)), before = 0.0;
        [[unroll]] for (uint k = 0; k < SCORE_QUADS; k += 4) {
            uint quad = k + lane % 4;
            vec4 others = known[min(quad, SCORE_QUADS - 1)];
            [[unroll]] for (uint c = 0; c < 4; c++) {
                bool is_before = 4 * quad + c < i ? others[c] >= own : others[c] > own;
                before += is_before && quad < SCORE_QUADS ? 1.0 : 0.0;
            }
        }
        before = team_sum(before, 4);
        if (lane % 4 == 0 && i < COUNT && before < float(ACTIVE)) {
            picked[uint(before)] = i;
        }
    }
    barrier();
}

void pick(Floats scores, uint first) {
    for (uint i = lane_index(); i < 4 * SCORE_QUADS; i += LANES) {
        know_score(i, scores.at[first + min(i, COUNT - 1)]);
    }
    pick_known();
}

// Of picked[slot].
float share_of(uint slot, Floats factors) {
    float total = 0.0;
    for (uint j = 0; j < ACTIVE; j++) {
        total += exp(known_score(picked[j]) - known_score(picked[0]));
    }
    return exp(known_score(picked[slot]) - known_score(picked[0])) / total * factors.at[picked[slot]];
}
