// The products of persistent.comp.

Piece ahead_0, ahead_1, ahead_2, ahead_3, ahead_4, ahead_5, ahead_6, ahead_7;
Piece other_0, other_1, other_2, other_3, other_4, other_5, other_6, other_7;  // of the second block

// Tile k of the slice's chunk. Nothing is loaded under a condition, so no compiler waits for it: behind the
// last tile it is loaded again.
#define FETCH(k) \
    if (k < DEPTH) { \
        uint tile_ = min(ahead.tile + k * ahead.team, ahead.last_tile - 1); \
        ahead_##k = load_piece(ahead.rows_at, tile_, lane % 64, 0.0); \
        if (WIDTH == 2) { \
            other_##k = load_piece(ahead.other_at, tile_, lane % 64, 0.0); \
        } \
    }

#define MULTIPLY(k) \
    if (k < DEPTH && tile + k * work.team < work.last_tile) { \
        ahead_##k.unit = unit.x; \
        ahead_##k.group = lane % 64 / (GROUP / 32); \
        Input y_ = INPUT(held, (tile + k * work.team - work.first_tile) * INPUT_VECTORS, lane % 4); \
        precise vec2 sum = total; \
        sum.x += multiply(ahead_##k, y_); \
        if (WIDTH == 2) { \
            other_##k.unit = unit.y; \
            other_##k.group = lane % 64 / (GROUP / 32); \
            sum.y += multiply(other_##k, y_); \
        } \
        total = sum; \
    }

#define EACH_TILE(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7)
#define MULTIPLY_AND_FETCH(k) MULTIPLY(k) FETCH(k)

uvec2 steps;  // of the scales of a row of each block, on their way

void ask_steps() {
    steps.x = load_steps(ahead.rows_at, ahead.tiles, lane % 64 / 4);
    if (WIDTH == 2) {
        steps.y = load_steps(ahead.other_at, ahead.tiles, lane % 64 / 4);
    }
}

void begin_work() {
    begin();
    ask_steps();
    EACH_TILE(FETCH)
}

float team_result(uint first, uint row) {
    precise float sum = 0.0;
    for (uint s = 0; s < work.team; s++) {
        sum += partial[flip + (first * work.team + s) * 16 + row];
    }
    return sum;
}

void finish_group(uint stage, uint group, vec2 total) {
    [[unroll]] for (uint i = 0; i < WIDTH; i++) {
        float sum = team_sum(total[i], 4);
        if (lane % 4 == 0) {
            partial[flip + ((work.first_sum + i) * work.team + work.place) * 16 + lane % 64 / 4] = sum;
        }
    }
    barrier();
    uint result = lane / 16, row = lane % 16, block = group * at_once(stage) + result;
    if (result < at_once(stage) && block < blocks_of(stage)) {
        float y;
        if (stage == GATE) {
            y = gelu(team_result(2 * result, row)) * team_result(2 * result + 1, row);
        } else {
            y = team_result(result, row);
        }
        uint plane = stage == QKV || stage == GATE ? 0 : work.part * PLANE(HIDDEN);
        send(PICK(QKV_AT, OUT_AT, GATED_AT, DOWN_AT) + plane + 16 * block + row, y);
    }
    flip = 16 * SLICES * WIDTH - flip;
}

// All groups of a part, whose input is there and whose first chunk is on its way.
void multiply_part(uint stage) {
    vec2 total = vec2(0.0), unit = vec2(0.0);
    bool more = true;
    [[dont_unroll]] while (more) {
        uint group = ahead.group, tile = ahead.tile;
        if (ahead.chunk == 0) {
            unit.x = unit_of(steps.x, lane % 64 / 4);
            unit.y = unit_of(steps.y, lane % 64 / 4);
        }
        go_on();
        if (ahead.chunk == 0) {
            ask_steps();
        }
        EACH_TILE(MULTIPLY_AND_FETCH)
        if (ahead.chunk == 0) {
            finish_group(stage, group, total);
            total = vec2(0.0);
        }
        more = ahead.step == work.step && ahead.part == work.part;
    }
}
