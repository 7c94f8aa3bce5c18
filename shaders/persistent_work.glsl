// Which weights of persistent.comp a workgroup multiplies, one after the other. Its slices of 64 lanes are
// teams; a team has a block of 16 rows and shares its tiles, and a group of blocks is what all teams have at
// a time. DEPTH tiles of each slice are a chunk. Chunks, groups, parts of the columns and stages follow each
// other without a break: what is asked for is one chunk ahead of what is multiplied, in the next stage too.

// One of constants, by `stage`.
#define PICK(q, o, g, d) (stage == QKV ? (q) : stage == OUT ? (o) : stage == GATE ? (g) : (d))
#define TEAM(stage_) (TEAMS >> 4 * (stage_) & 15u)
#define AT_ONCE(stage_) (SLICES / TEAM(stage_) / ((stage_) == GATE ? 2 : 1))
#define GROUPS(stage_, rows_) (((rows_) / 16 + AT_ONCE(stage_) - 1) / AT_ONCE(stage_))
#define CHUNKS(stage_, tiles_) (((tiles_) + TEAM(stage_) * DEPTH - 1) / (TEAM(stage_) * DEPTH))
const uint QKV_ROWS = (HEADS + 2 * KV_HEADS) * DIM;

struct Work {
    uint step;  // 4 * layer + stage
    uint part, first_tile, last_tile;
    uint group, groups, group_step, at_once, blocks;
    uint chunk, chunks;
    uint team, block_of_team, place;  // of the slice
    uint tile;                        // its first one of the chunk
};

Work ahead, work;  // what is asked for, what is multiplied
Words matrix;      // of the slice's team, ahead
uint tiles;        // of a row of it
uint64_t rows_at;  // ahead
uint steps;        // of the scales of a row, on their way

void enter_stage() {
    uint stage = ahead.step % 4, slice = lane / 64;
    uint team = PICK(TEAM(QKV), TEAM(OUT), TEAM(GATE), TEAM(DOWN)), own = slice >> findMSB(team);
    tiles = PICK(HIDDEN_TILES, Q_TILES, HIDDEN_TILES, MLP_TILES);
    ahead.team = team;
    ahead.place = slice & team - 1;
    ahead.block_of_team = stage == GATE ? own / 2 : own;
    ahead.at_once = PICK(AT_ONCE(QKV), AT_ONCE(OUT), AT_ONCE(GATE), AT_ONCE(DOWN));
    ahead.blocks = PICK(QKV_ROWS, HIDDEN, INTERMEDIATE, HIDDEN) / 16;
    ahead.groups = PICK(
        GROUPS(QKV, QKV_ROWS), GROUPS(OUT, HIDDEN), GROUPS(GATE, INTERMEDIATE), GROUPS(DOWN, HIDDEN)
    );
    ahead.chunks = PICK(
        CHUNKS(QKV, HIDDEN_TILES), CHUNKS(OUT, OUT_TILES), CHUNKS(GATE, HIDDEN_TILES), CHUNKS(DOWN, DOWN_TILES)
    );
    uint which = stage + uint(stage == DOWN || stage == GATE && own % 2 == 1);  // the up projection is 3
    matrix = Words(entry[ahead.step / 4 % 2 * ENTRY + which]);
}

// The workgroup's first group of a part.
void enter_part() {
    uint stage = ahead.step % 4, count = gl_NumWorkGroups.x, id = gl_WorkGroupID.x;
    uint part_tiles = PICK(HIDDEN_TILES, OUT_TILES, HIDDEN_TILES, DOWN_TILES);
    uint rest = count - min(ahead.part, count - 1);
    ahead.first_tile = ahead.part * part_tiles;
    ahead.last_tile = min(ahead.first_tile + part_tiles, tiles);
    ahead.group = PICK(id, id / OUT_PARTS, id, id / DOWN_PARTS);
    ahead.group_step =
        PICK(count, (rest + OUT_PARTS - 1) / OUT_PARTS, count, (rest + DOWN_PARTS - 1) / DOWN_PARTS);
}

void enter_group() {
    uint block = min(ahead.group * ahead.at_once + ahead.block_of_team, ahead.blocks - 1);
    rows_at = block_address(matrix, block, tiles);
    steps = load_steps(rows_at, tiles, lane % 64 / 4);
    ahead.chunk = 0;
    ahead.tile = ahead.first_tile + ahead.place;
}

// Every workgroup has groups of the gate.
void find_part() {
    [[dont_unroll]] do {
        uint stage = ahead.step % 4;
        ahead.part += gl_NumWorkGroups.x;
        if (ahead.part >= PICK(1, OUT_PARTS, 1, DOWN_PARTS)) {
            ahead.step += 1;
            stage = ahead.step % 4;
            ahead.part = gl_WorkGroupID.x % PICK(1, OUT_PARTS, 1, DOWN_PARTS);
            enter_stage();
        }
        enter_part();
    } while (ahead.group >= ahead.groups);
}

// To the next chunk.
void go_on() {
    ahead.chunk += 1;
    ahead.tile += DEPTH * ahead.team;
    if (ahead.chunk == ahead.chunks) {
        ahead.group += ahead.group_step;
        if (ahead.group >= ahead.groups) {
            find_part();
        }
        enter_group();
    }
}
