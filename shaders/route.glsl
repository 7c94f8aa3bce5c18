// The ACTIVE experts of a column that have the greatest scores, of equal ones those that come first, and
// their shares: the softmax over them, times a factor of each expert. Including shader: COUNT, ACTIVE.

shared float known[COUNT > 0 ? COUNT : 1];
shared uint picked[ACTIVE > 0 ? ACTIVE : 1];

// Of the scores that `known` is about to hold. Four lanes count those in front of one.
void pick_known() {
    uint lane = lane_index();
    for (uint i = lane; i < ACTIVE; i += LANES) {
        picked[i] = 0;  // scores that are no numbers have no order
    }
    barrier();
    for (uint base = 0; base < COUNT; base += LANES / 4) {
        uint i = base + lane / 4;
        float own = known[min(i, COUNT - 1)], before = 0.0;
        for (uint j = lane % 4; j < COUNT; j += 4) {
            before += known[j] > own || known[j] == own && j < i ? 1.0 : 0.0;
        }
        before = team_sum(before, 4);
        if (lane % 4 == 0 && i < COUNT && before < float(ACTIVE)) {
            picked[uint(before)] = i;
        }
    }
    barrier();
}

void pick(Floats scores, uint first) {
    for (uint i = lane_index(); i < COUNT; i += LANES) {
        known[i] = scores.at[first + i];
    }
    pick_known();
}

// Of picked[slot].
float share_of(uint slot, Floats factors) {
    float total = 0.0;
    for (uint j = 0; j < ACTIVE; j++) {
        total += exp(known[picked[j]] - known[picked[0]]);
    }
    return exp(known[picked[slot]] - known[picked[0]]) / total * factors.at[picked[slot]];
}
