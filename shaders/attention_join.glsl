// What splits of the context hand on, and the output that the last of them makes of it.

const uint AT_ONCE = 16;  // partial results that a lane asks for together
// 32 channels share a scale: where a workgroup's heads are no whole number of them, one joins all.
const bool JOINS_OWN = QUERIES * DIM % 32 == 0;
const uint JOINED_HEADS = JOINS_OWN ? QUERIES : HEADS;

uint partial_row(uint query_head, uint split) {
    uint block = gl_WorkGroupID.z * BLOCKS + query_head / QUERIES;
    return (block * SPLITS + split) * QUERIES + query_head % QUERIES;
}

// Words of a column of the output.
uint output_words() {
    return column_words((HEADS * DIM + 127) / 128);
}

// Of the only split of heads that share no scale with others: the output.
void store_partials(bool is_output) {
    gather_values();
    uint row = partial_row(gl_WorkGroupID.y * QUERIES, gl_WorkGroupID.x);
    for (uint i = lane; i < QUERIES * QUADS; i += LANES) {
        vec4 total = gathered_quad(i);
        if (is_output) {
            uint place = gl_WorkGroupID.z * output_words();
            uint quad = gl_WorkGroupID.y * QUERIES * QUADS + i;
            store_activations(x, place, quad, total * (1.0 / gathered_weight(i / QUADS)));
        } else {
            partials.at[row * QUADS + i] = total;
        }
    }
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        if (lane == LANES - 1 - q) {
            stats.at[row + q] = vec2(peaks[q], gathered_weight(q));
        }
    }
}

shared float shares[JOINED_HEADS * SPLITS];

// shares = share of each split in the output of a head, eight lanes a head; 0 behind the last.
void weigh_splits(uint first_head, uint splits) {
    for (uint h = lane / 8; h < JOINED_HEADS; h += LANES / 8) {
        float best = -1e30, total = 0.0;
        uint place = partial_row(first_head + h, 0);
        [[dont_unroll]] for (uint s = lane % 8; s < splits; s += 16) {
            vec2 one = stats.at[place + s * QUERIES];
            vec2 two = s + 8 < splits ? stats.at[place + (s + 8) * QUERIES] : vec2(-1e30, 0.0);
            float peak = max(best, max(one.x, two.x));
            precise float sum = total * exp(best - peak);
            sum = fma(one.y, exp(one.x - peak), sum);
            sum = fma(two.y, exp(two.x - peak), sum);
            total = sum;
            best = peak;
            shares[h * SPLITS + s] = one.x;
            shares[h * SPLITS + s + 8] = two.x;
        }
        float peak = team_max(best, 8);
        total = team_sum(total * exp(best - peak), 8);
        [[dont_unroll]] for (uint s = lane % 8; s < (splits + 15) / 16 * 16; s += 8) {
            shares[h * SPLITS + s] = s < splits ? exp(shares[h * SPLITS + s] - peak) / total : 0.0;
        }
    }
    barrier();
}

// The output of JOINED_HEADS heads from all splits.
void join(uint first_head, uint splits) {
    weigh_splits(first_head, splits);
    uint words = output_words();
    [[dont_unroll]] for (uint i = lane; i < JOINED_HEADS * QUADS; i += LANES) {
        uint h = i / QUADS, place = partial_row(first_head + h, 0) * QUADS + i % QUADS;
        vec4 total = vec4(0.0);
        [[dont_unroll]] for (uint first = 0; first < splits; first += AT_ONCE) {
            // Behind the last split lies what an earlier pass left.
            [[unroll]] for (uint s = 0; s < AT_ONCE; s++) {
                vec4 part = partials.at[place + (first + s) * QUERIES * QUADS];
                precise vec4 sum = fma(vec4(shares[h * SPLITS + first + s]), part, total);
                total = sum;
            }
        }
        store_activations(x, gl_WorkGroupID.z * words, first_head * QUADS + i, total);
    }
}
