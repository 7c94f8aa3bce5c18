// What products of persistent.comp take: the residual stream behind its norm, the context of some heads,
// the gate's outputs. A workgroup makes what it needs by itself, of messages.

void load_gains(uint branch_gain, uint gain) {
    Quads first = Quads(entry[entry_at + branch_gain]), second = Quads(entry[entry_at + gain]);
    EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane;
        branch_gains[i] = POST_NORM ? quad_or_zero(first, 0, quad) : vec4(1.0);
        gains[i] = quad_or_zero(second, 0, quad);
    }
}

bool look_branch(Messages from, uint wanted, uint parts) {
    bool there = true;
    EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
        uint quad = min(i * LANES + lane, HIDDEN_QUADS - 1);
        precise vec4 sum = vec4(0.0);
        vec4 part_[MOST_PARTS];
        [[unroll]] for (uint p = 0; p < MOST_PARTS; p++) {
            bool this_ = look_quad(from, min(p, parts - 1) * 128 * HIDDEN_TILES, quad, wanted, part_[p]);
            there = there && this_;
        }
        [[unroll]] for (uint p = 0; p < MOST_PARTS; p++) {
            sum = p < parts ? sum + part_[p] : sum;
        }
        joining[i] = i * LANES + lane < HIDDEN_QUADS ? sum : vec4(0.0);
    }
    return there;
}

void receive_branch(Messages from, uint wanted, uint parts) {
    for (uint looks = 0; !look_branch(from, wanted, parts) && !gives_up(looks); looks++) {
    }
}

// What stands in front of a layer, or of its MLP, and behind the last layer. Nothing joins the embedding.
void hold_stream(bool enters, uint layer) {
    load_gains(enters ? BRANCH_GAIN_AT : ATTENTION_GAIN_AT, enters ? GAIN_AT : MLP_GAIN_AT);
    EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
        joining[i] = vec4(0.0);
    }
    if (layer > 0 || !enters) {
        Messages from = enters ? down_branch : out_branch;
        receive_branch(from, enters ? tag - 1 : tag, enters ? DOWN_PARTS : OUT_PARTS);
    }
    float factor = join_column(1.0);
    EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane;
        if (quad < 32 * HIDDEN_TILES) {  // the padding too: it meets weights of zero
            hold_quad(quad, normed_quad(i, factor));
        }
        if (quad < HIDDEN_QUADS && layer == LAYERS) {
            normed.at[quad] = normed_quad(i, factor);
        }
    }
}

const uint MOST_QUADS = 32 * (DOWN_TILES > OUT_TILES ? DOWN_TILES : OUT_TILES);
const uint BATCH = MOST_QUADS > 3 * LANES ? 4 : (MOST_QUADS + LANES - 1) / LANES;  // quads on their way

// A part of what a stage has sent.
void hold_messages(Messages from, uint channels) {
    uint first = 32 * work.first_tile, count = 32 * (work.last_tile - work.first_tile);
    [[dont_unroll]] for (uint base = 0; base < count; base += BATCH * LANES) {
        vec4 v[BATCH];
        bool there = false;
        for (uint looks = 0; !there && !gives_up(looks); looks++) {
            there = true;
            [[unroll]] for (uint i = 0; i < BATCH; i++) {
                uint quad = base + i * LANES + lane;
                v[i] = vec4(0.0);
                if (quad < count && first + quad < channels / 4) {
                    bool this_ = look_quad(from, 0, first + quad, tag, v[i]);
                    there = there && this_;
                }
            }
        }
        [[unroll]] for (uint i = 0; i < BATCH; i++) {
            uint quad = base + i * LANES + lane;
            if (quad < count) {
                hold_quad(quad, v[i]);
            }
        }
    }
}

uint splits;

const uint PART_HEADS = JOINS ? 1 : HEADS / OUT_PARTS;
shared float shares[PART_HEADS * SPLITS];

uint partial_row(uint query_head, uint split) {
    return query_head * SPLITS + split;
}

// shares = share of each split in the output of a part's heads, eight lanes a head, as in attention_join.glsl.
void weigh_heads(uint first_head) {
    for (uint h = lane / 8; h < PART_HEADS; h += LANES / 8) {
        float best = -1e30, total = 0.0;
        uint place = 2 * partial_row(first_head + h, 0);
        [[dont_unroll]] for (uint s = lane % 8; s < splits; s += 16) {
            vec2 one, two = vec2(-1e30, 0.0);
            bool there = false, has_two = s + 8 < splits;
            for (uint looks = 0; !there && !gives_up(looks); looks++) {
                there = look(stats, place + 2 * s, tag, one.x);
                there = look(stats, place + 2 * s + 1, tag, one.y) && there;
                if (has_two) {
                    there = look(stats, place + 2 * (s + 8), tag, two.x) && there;
                    there = look(stats, place + 2 * (s + 8) + 1, tag, two.y) && there;
                }
            }
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
        [[dont_unroll]] for (uint s = lane % 8; s < splits; s += 8) {
            shares[h * SPLITS + s] = exp(shares[h * SPLITS + s] - peak) / total;
        }
    }
    barrier();
}

const uint PART_CHANNELS = PART_HEADS * DIM;
const uint OWN_CHANNELS = (PART_CHANNELS + LANES - 1) / LANES;
const uint TOGETHER = 16 / OWN_CHANNELS > 0 ? 16 / OWN_CHANNELS : 1;  // splits that a lane asks for

// The context of a part's heads: each lane has channels of its own.
void sum_splits(uint first_head, out float total[OWN_CHANNELS]) {
    weigh_heads(first_head);
    [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
        total[i] = 0.0;
    }
    [[dont_unroll]] for (uint first = 0; first < splits; first += TOGETHER) {
        float part_[OWN_CHANNELS * TOGETHER];
        bool there = false;
        for (uint looks = 0; !there && !gives_up(looks); looks++) {
            there = true;
            [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
                uint channel = min(i * LANES + lane, PART_CHANNELS - 1);
                uint place = partial_row(first_head + channel / DIM, 0) * DIM + channel % DIM;
                [[unroll]] for (uint s = 0; s < TOGETHER; s++) {
                    uint split = min(first + s, splits - 1);
                    bool this_ = look(partials, place + split * DIM, tag, part_[i * TOGETHER + s]);
                    there = there && this_;
                }
            }
        }
        [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
            uint h = min(i * LANES + lane, PART_CHANNELS - 1) / DIM;
            [[unroll]] for (uint s = 0; s < TOGETHER; s++) {
                float weight = first + s < splits ? shares[h * SPLITS + first + s] : 0.0;
                precise float sum = fma(weight, part_[i * TOGETHER + s], total[i]);
                total[i] = sum;
            }
        }
    }
}

// Whoever has no run of keys joins first.
void join_heads() {
    uint own = gl_NumWorkGroups.x - 1 - gl_WorkGroupID.x;
    [[dont_unroll]] for (uint head_ = own; head_ < HEADS; head_ += gl_NumWorkGroups.x) {
        float total[OWN_CHANNELS];
        sum_splits(head_, total);
        [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
            uint channel = head_ * DIM + i * LANES + lane;
            if (i * LANES + lane < DIM) {
                send(context, message_place(channel / 4, channel % 4), total[i]);
            }
        }
        barrier();  // before the shares are written again
    }
}

void hold_context(uint first_head) {
    float total[OWN_CHANNELS];
    sum_splits(first_head, total);
    [[unroll]] for (uint i = 0; i < OWN_CHANNELS; i++) {
        uint channel = i * LANES + lane;
        if (channel < PART_CHANNELS) {
            gathered[channel / 4][channel % 4] = total[i];
        }
    }
    barrier();
    for (uint quad = lane; quad < PART_CHANNELS / 4; quad += LANES) {
        hold_quad(quad, gathered[quad]);
    }
}
