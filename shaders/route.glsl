// The ACTIVE experts of a column that have the greatest scores, of equal ones those that come first, and
// their shares: the softmax over them, times a factor of each expert. Including shader: COUNT, ACTIVE.

const uint SCORE_QUADS = COUNT > 0 ? (COUNT + 3) / 4 : 1;
shared vec4 known[SCORE_QUADS];  // behind the last score what is less than all
shared uint picked[ACTIVE > 0 ? ACTIVE : 1];
shared float exponentials[ACTIVE > 0 ? ACTIVE : 1];  // of their scores, of the greatest one 1

float known_score(uint i) {
    return known[i / 4][i % 4];
}

void know_score(uint i, float score) {
    known[i / 4][i % 4] = i < COUNT ? score : uintBitsToFloat(0xFF800000u);
}

// Of the scores that `known` is about to hold. Four lanes count those in front of one. Loops stay loops: in a
// kernel of many stages code has to be fetched for each.
void pick_known() {
    uint lane = lane_index();
    [[dont_unroll]] for (uint i = lane; i < ACTIVE; i += LANES) {
        picked[i] = 0;  // scores that are no numbers have no order
    }
    barrier();
    [[dont_unroll]] for (uint base = 0; base < COUNT; base += LANES / 4) {
        uint i = base + lane / 4, before = 0;
        float own = known_score(min(i, COUNT - 1));
        [[dont_unroll]] for (uint quad = lane % 4; quad < SCORE_QUADS; quad += 4) {
            vec4 others = known[quad];
            bvec4 is_first = lessThan(4 * quad + uvec4(0, 1, 2, 3), uvec4(i));
            bvec4 is_before = mix(greaterThan(others, vec4(own)), greaterThanEqual(others, vec4(own)), is_first);
            uvec4 ones = uvec4(is_before);
            before += ones.x + ones.y + ones.z + ones.w;
        }
        before += subgroupShuffleXor(before, 1);
        before += subgroupShuffleXor(before, 2);
        if (lane % 4 == 0 && i < COUNT && before < ACTIVE) {
            picked[before] = i;
        }
    }
    barrier();
    [[dont_unroll]] for (uint i = lane; i < ACTIVE; i += LANES) {
        exponentials[i] = exp(known_score(picked[i]) - known_score(picked[0]));
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
        total += exponentials[j];
    }
    return exponentials[slot] / total * factors.at[picked[slot]];
}
