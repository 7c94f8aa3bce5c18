// The products of persistent.comp. A workgroup's slices of 64 lanes are teams; a team has a block of 16 rows
// and shares its tiles, and a group of blocks is what all teams have at a time. Weights do not depend on
// messages: the first tiles of a stage are on their way while a workgroup waits.

// One of constants, by `stage`.
#define PICK(q, o, g, d) (stage == QKV ? (q) : stage == OUT ? (o) : stage == GATE ? (g) : (d))
#define TEAM(stage_) (TEAMS >> 4 * (stage_) & 15u)
#define AT_ONCE(stage_) (SLICES / TEAM(stage_) / ((stage_) == GATE ? 2 : 1))
#define GROUPS(stage_, rows_) (((rows_) / 16 + AT_ONCE(stage_) - 1) / AT_ONCE(stage_))
const uint QKV_ROWS = (HEADS + 2 * KV_HEADS) * DIM;
const uint OUT_TILES = (Q_TILES + OUT_PARTS - 1) / OUT_PARTS;
#define CHUNKS(stage_, tiles_) (((tiles_) + TEAM(stage_) * DEPTH - 1) / (TEAM(stage_) * DEPTH))

uint tiles, blocks, parts, team, at_once, chunks, part, groups, group_step;
Words matrix;  // of this slice's team
uint block_of_team, place_in_team;
uint fetched_group, fetched_tile;
Piece ahead_0, ahead_1, ahead_2, ahead_3, ahead_4, ahead_5, ahead_6, ahead_7;
uint steps_0, steps_1, steps_2, steps_3, steps_4, steps_5, steps_6, steps_7;

// Tile k of the slice's next chunk of DEPTH tiles.
#define FETCH(k) \
    if (k < DEPTH && fetched_tile + k * team < last_tile && fetched_group < groups) { \
        ahead_##k = load_piece(fetched_rows, fetched_tile + k * team, lane % 64, 0.0); \
        steps_##k = load_steps(fetched_rows, tiles, lane % 64 / 4); \
    }

#define MULTIPLY(k) \
    if (k < DEPTH && tile + k * team < last_tile) { \
        ahead_##k.unit = unit_of(steps_##k, lane % 64 / 4); \
        uint base = (tile + k * team - first_tile) * INPUT_VECTORS; \
        precise float sum = total + multiply(ahead_##k, INPUT(held, base, lane % 4)); \
        total = sum; \
    }

uint64_t fetched_rows;

void find_rows() {
    uint block = min(fetched_group * at_once + block_of_team, blocks - 1);
    fetched_rows = block_address(matrix, block, tiles);
}

// Behind a chunk: to the next one.
void go_on(uint next_chunk) {
    if (next_chunk == 0) {
        fetched_tile = first_tile + place_in_team;
        fetched_group += group_step;
        find_rows();
    } else {
        fetched_tile += DEPTH * team;
    }
}

void set_stage(uint stage) {
    bool gate = stage == GATE;
    team = PICK(TEAM(QKV), TEAM(OUT), TEAM(GATE), TEAM(DOWN));
    at_once = PICK(AT_ONCE(QKV), AT_ONCE(OUT), AT_ONCE(GATE), AT_ONCE(DOWN));
    tiles = PICK(HIDDEN_TILES, Q_TILES, HIDDEN_TILES, MLP_TILES);
    blocks = PICK(QKV_ROWS, HIDDEN, INTERMEDIATE, HIDDEN) / 16;
    parts = PICK(1, OUT_PARTS, 1, DOWN_PARTS);
    groups = PICK(
        GROUPS(QKV, QKV_ROWS), GROUPS(OUT, HIDDEN), GROUPS(GATE, INTERMEDIATE), GROUPS(DOWN, HIDDEN)
    );
    chunks = PICK(
        CHUNKS(QKV, HIDDEN_TILES), CHUNKS(OUT, OUT_TILES), CHUNKS(GATE, HIDDEN_TILES), CHUNKS(DOWN, DOWN_TILES)
    );
    uint slice = lane / 64, own = slice >> findMSB(team);
    place_in_team = slice & team - 1;
    block_of_team = gate ? own / 2 : own;
    uint which = stage + uint(stage == DOWN || gate && own % 2 == 1);  // the up projection is 3
    matrix = Words(entry[entry_at + which]);
}

// A part of the columns, and the first weights of it.
uint begin_part(uint stage, uint number) {
    part = number;
    uint part_tiles = PICK(HIDDEN_TILES, OUT_TILES, HIDDEN_TILES, DOWN_TILES);
    first_tile = part * part_tiles;
    last_tile = min(first_tile + part_tiles, tiles);
    uint count = gl_NumWorkGroups.x, id = gl_WorkGroupID.x, rest = count - min(part, count - 1);
    uint first = PICK(id, id / OUT_PARTS, id, id / DOWN_PARTS);
    group_step = PICK(count, (rest + OUT_PARTS - 1) / OUT_PARTS, count, (rest + DOWN_PARTS - 1) / DOWN_PARTS);
    fetched_group = first;
    fetched_tile = first_tile + place_in_team;
    find_rows();
    FETCH(0) FETCH(1) FETCH(2) FETCH(3) FETCH(4) FETCH(5) FETCH(6) FETCH(7)
    return first;
}

float team_result(uint first, uint row) {
    precise float sum = 0.0;
    for (uint s = 0; s < team; s++) {
        sum += partial[flip + (first * team + s) * 16 + row];
    }
    return sum;
}

void finish_group(uint stage, uint group, float total) {
    float sum = team_sum(total, 4);
    if (lane % 4 == 0) {
        partial[flip + lane / 4] = sum;
    }
    barrier();
    uint own = lane / 16, row = lane % 16, block = group * at_once + own;
    if (own < at_once && block < blocks) {
        float y;
        if (stage == GATE) {
            y = gelu(team_result(2 * own, row)) * team_result(2 * own + 1, row);
        } else {
            y = team_result(own, row);
        }
        uint channel = 16 * block + row, place = message_place(channel / 4, channel % 4);
        uint plane = stage == QKV || stage == GATE ? 0 : part * 128 * HIDDEN_TILES;
        Messages to = stage == QKV ? qkv : stage == GATE ? gated : stage == OUT ? out_branch : down_branch;
        send(to, plane + place, y);
    }
    flip = 16 * SLICES - flip;
}

// The next chunk is on its way while one is multiplied.
void multiply_part(uint stage, uint group) {
    float total = 0.0;
    uint tile = first_tile + place_in_team, chunk = 0;
    [[dont_unroll]] while (group < groups) {
        uint next_chunk = chunk + 1 == chunks ? 0 : chunk + 1;
        go_on(next_chunk);
        MULTIPLY(0) FETCH(0)
        MULTIPLY(1) FETCH(1)
        MULTIPLY(2) FETCH(2)
        MULTIPLY(3) FETCH(3)
        MULTIPLY(4) FETCH(4)
        MULTIPLY(5) FETCH(5)
        MULTIPLY(6) FETCH(6)
        MULTIPLY(7) FETCH(7)
        tile += DEPTH * team;
        chunk = next_chunk;
        if (chunk == 0) {
            finish_group(stage, group, total);
            total = 0.0;
            group += group_step;
            tile = first_tile + place_in_team;
        }
    }
}
