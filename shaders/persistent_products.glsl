// The products of persistent.comp.

Piece ahead_0, ahead_1, ahead_2, ahead_3, ahead_4, ahead_5, ahead_6, ahead_7;
Piece other_0, other_1, other_2, other_3, other_4, other_5, other_6, other_7;  // of the second block

// Tile k of the slice's chunk. Nothing is loaded under a condition, so no compiler waits for it: behind the
// last tile it is loaded again.
#define FETCH(k) \
    if (k < DEPTH) { \
        uint tile_ = min(ahead.tile + k * ahead.apart, ahead.last_tile - 1); \
        ahead_##k = load_piece(ahead.rows_at, tile_, lane % 64, 0.0); \
        if (WIDTH == 2) { \
            other_##k = load_piece(ahead.other_at, tile_, lane % 64, 0.0); \
        } \
    }

float product_of(Piece piece, float unit, Input y) {
    piece.unit = unit;
    piece.group = lane % 64 / (GROUP / 32);
    return multiply(piece, y);
}

#define MULTIPLY(k) \
    if (k < DEPTH && tile + k * work.apart < last) { \
        Input y_ = INPUT(held, (held_at + k * work.apart) * INPUT_VECTORS, lane % 4); \
        precise vec2 sum = total; \
        precise float one_ = share * product_of(ahead_##k, unit.x, y_); \
        sum.x += one_; \
        if (WIDTH == 2) { \
            precise float two_ = share * product_of(other_##k, unit.y, y_); \
            sum.y += two_; \
        } \
        total = sum; \
    }

// A chunk all of whose tiles there are, in front of such a one: no branches, and addresses that differ by
// constants, those of the gate's teams.
const uint APART = TEAM(2);

bool is_full() {
    return STRAIGHT && ahead.team == APART && ahead.tile + (DEPTH - 1) * APART < ahead.last_tile;
}

struct Place {
    uint64_t codes, scales;
};

// Of the lane's piece of the first tile of what is ahead.
Place place_of(uint64_t rows_at) {
    uint tile = 16 * TILE_VECTORS * ahead.tile, own = lane % 64;
    uint scales = tile + 16 * SCALE_VECTORS + own / (GROUP / 32) / WORD_SCALES * 4;
    return Place(rows_at + uint64_t(tile + 16 * own), rows_at + uint64_t(scales));
}

Piece piece_behind(Place place, uint bytes) {
    Piece piece;
    piece.panel[0] = behind(place.codes, bytes).at[0];
    piece.scales = singles_behind(place.scales, bytes).at[0];
    return piece;
}

#define MULTIPLY_STRAIGHT(k) \
    if (k < DEPTH) { \
        Input y_ = INPUT(held, held_at * INPUT_VECTORS + k * APART * INPUT_VECTORS, lane % 4); \
        precise vec2 sum = total; \
        precise float one_ = product_of(ahead_##k, unit.x, y_); \
        sum.x += one_; \
        ahead_##k = piece_behind(place_, k * APART * 16 * TILE_VECTORS); \
        if (WIDTH == 2) { \
            precise float two_ = product_of(other_##k, unit.y, y_); \
            sum.y += two_; \
            other_##k = piece_behind(other_place_, k * APART * 16 * TILE_VECTORS); \
        } \
        total = sum; \
    }

#define EACH_TILE(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7)
#define MULTIPLY_AND_FETCH(k) MULTIPLY(k) FETCH(k)

uvec2 steps;  // of the scales of a row of each block, on their way

void ask_steps() {
    uint behind_ = is_of_experts(ahead.step) ? ahead.last_tile : ahead.tiles;
    steps.x = load_steps(ahead.rows_at, behind_, lane % 64 / 4);
    if (WIDTH == 2) {
        steps.y = load_steps(ahead.other_at, behind_, lane % 64 / 4);
    }
}

void begin_work() {
    begin();
    ask_steps();
    EACH_TILE(FETCH)
}

float team_result(uint first, uint row) {
    precise float sum = 0.0;
    [[unroll]] for (uint s = 0; s < SLICES; s++) {
        float own = partial[flip + (first * work.team + min(s, work.team - 1)) * 16 + row];
        sum = s < work.team ? sum + own : sum;
    }
    return sum;
}

void finish_group(uint stage, uint group, vec2 total) {
    precise vec2 sums = total + subgroupShuffleXor(total, 1);
    sums += subgroupShuffleXor(sums, 2);
    [[unroll]] for (uint i = 0; i < WIDTH; i++) {
        if (lane % 4 == 0) {
            partial[flip + ((work.first_sum + i) * work.team + work.place) * 16 + lane % 64 / 4] = sums[i];
        }
    }
    barrier();
    uint result = lane / 16, row = lane % 16, block = group * work.at_once + result;
    if (result < work.at_once && block < work.blocks) {
        float y = team_result(work.is_gate ? 2 * result : result, row);
        if (work.is_gate) {
            y = gelu(y) * team_result(2 * result + 1, row);
        }
        uint channel = 16 * block + row, place = work.sent_at + work.part * PLANE(HIDDEN) + channel;
        if (ACTIVE > 0 && stage == EXPERT_GATE) {
            place += block / (EXPERT_ROWS / 16) * (128 * EXPERT_TILES - EXPERT_ROWS);
        }
        if (KEPT_COLUMNS > 0 && stage == QKV && channel >= HEADS * DIM) {
            place = channel - HEADS * DIM + entry[entry_at + NEW_AT].x;
            Messages(keys_copy()).at[place] = floatBitsToUint(y);
        } else {
            send(stage == QKV ? place : spread(place), y);
        }
    }
    flip = 16 * SLICES * WIDTH - flip;
}

vec2 unit;          // of the scales of a row of each block
float share = 1.0;  // of an expert in the sum

// Of a chunk that ends in front of the tile `last`.
void know_rows(uint stage, bool are_other, uint last) {
    if (are_other) {
        unit.x = unit_of(steps.x, lane % 64 / 4);
        unit.y = unit_of(steps.y, lane % 64 / 4);
        if (ACTIVE > 0) {
            share = stage == EXPERT_DOWN ? parts[last / EXPERT_TILES - 1] : 1.0;
        }
    }
}

// All groups of a part, whose input is there and whose first chunk is on its way.
void multiply_part(uint stage) {
    vec2 total = vec2(0.0);
    bool more = true;
    [[dont_unroll]] while (more) {
        uint group = ahead.group, tile = ahead.tile, last = ahead.last_tile;
        uint held_at = tile - work.first_tile + (ACTIVE > 0 && stage == EXPERT_GATE ? HIDDEN_TILES : 0);
        bool is_straight = is_full();
        know_rows(stage, has_other_rows(), last);
        go_on();
        if (ACTIVE > 0 && stage == GATE && ahead.step != work.step) {
            choose_experts();  // in front of the first weights of theirs
        }
        enter_chunk();
        if (has_other_rows()) {
            ask_steps();
        }
        if (is_straight && is_full()) {
            Place place_ = place_of(ahead.rows_at), other_place_ = place_of(ahead.other_at);
            EACH_TILE(MULTIPLY_STRAIGHT)
        } else {
            EACH_TILE(MULTIPLY_AND_FETCH)
        }
        if (ahead.chunk == 0) {
            finish_group(stage, group, total);
            total = vec2(0.0);
        }
        more = ahead.step == work.step && ahead.part == work.part;
    }
}
