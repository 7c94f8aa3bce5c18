// The products of persistent.comp.

Piece ahead_0, ahead_1, ahead_2, ahead_3;

// Tile k of the slice's chunk. Nothing is loaded under a condition, so no compiler waits for it: behind the
// last tile it is loaded again.
#define FETCH(k) \
    if (k < DEPTH) { \
        uint tile_ = min(ahead.tile + k * ahead.team, ahead.last_tile - 1); \
        ahead_##k = load_piece(rows_at, tile_, lane % 64, 0.0); \
    }

#define MULTIPLY(k) \
    if (k < DEPTH && tile + k * work.team < work.last_tile) { \
        ahead_##k.unit = unit; \
        uint base = (tile + k * work.team - work.first_tile) * INPUT_VECTORS; \
        precise float sum = total + multiply(ahead_##k, INPUT(held, base, lane % 4)); \
        total = sum; \
    }

void begin_work() {
    ahead.step = 0xFFFFFFFFu;  // behind the last part of the one in front
    ahead.part = DOWN_PARTS;
    find_part();
    enter_group();
    FETCH(0) FETCH(1) FETCH(2) FETCH(3)
}

float team_result(uint first, uint row) {
    precise float sum = 0.0;
    for (uint s = 0; s < work.team; s++) {
        sum += partial[flip + (first * work.team + s) * 16 + row];
    }
    return sum;
}

void finish_group(uint stage, uint group, float total) {
    float sum = team_sum(total, 4);
    if (lane % 4 == 0) {
        partial[flip + lane / 4] = sum;
    }
    barrier();
    uint own = lane / 16, row = lane % 16, block = group * work.at_once + own;
    if (own < work.at_once && block < work.blocks) {
        float y;
        if (stage == GATE) {
            y = gelu(team_result(2 * own, row)) * team_result(2 * own + 1, row);
        } else {
            y = team_result(own, row);
        }
        uint channel = 16 * block + row, place = message_place(channel / 4, channel % 4);
        uint plane = stage == QKV || stage == GATE ? 0 : work.part * 128 * HIDDEN_TILES;
        Messages to = stage == QKV ? qkv : stage == GATE ? gated : stage == OUT ? out_branch : down_branch;
        send(to, plane + place, y);
    }
    flip = 16 * SLICES - flip;
}

// All groups of a part, whose input is there and whose first chunk is on its way.
void multiply_part(uint stage) {
    float total = 0.0, unit = 0.0;
    bool more = true;
    [[dont_unroll]] while (more) {
        uint group = ahead.group, tile = ahead.tile;
        if (ahead.chunk == 0) {
            unit = unit_of(steps, lane % 64 / 4);
        }
        go_on();
        MULTIPLY(0) FETCH(0)
        MULTIPLY(1) FETCH(1)
        MULTIPLY(2) FETCH(2)
        MULTIPLY(3) FETCH(3)
        if (ahead.chunk == 0) {
            finish_group(stage, group, total);
            total = 0.0;
        }
        more = ahead.step == work.step && ahead.part == work.part;
    }
}
