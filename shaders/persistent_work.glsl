// Which weights of persistent.comp a workgroup multiplies, one after the other. Its slices of 64 lanes are
// teams; a team has WIDTH blocks of 16 rows and shares their tiles, and a group of blocks is what all teams
// have at a time. Two blocks, of the gate a block of each matrix, share the loads of activations. DEPTH tiles of each slice are a chunk. Chunks, groups, parts of the columns and stages follow each
// other without a break: what is asked for is one chunk ahead of what is multiplied, in the next stage too.

// One of constants, by `stage`.
#define PICK(q, o, g, d) (stage == QKV ? (q) : stage == OUT ? (o) : stage == GATE ? (g) : (d))
#define TEAM(stage_) (TEAMS >> 4 * (stage_) & 15u)
#define AT_ONCE(stage_) (SLICES * WIDTH / TEAM(stage_) / ((stage_) == GATE ? 2 : 1))
#define GROUPS(stage_, rows_) (((rows_) / 16 + AT_ONCE(stage_) - 1) / AT_ONCE(stage_))
#define CHUNKS(stage_, tiles_) (((tiles_) + TEAM(stage_) * DEPTH - 1) / (TEAM(stage_) * DEPTH))
const uint QKV_ROWS = (HEADS + 2 * KV_HEADS) * DIM;

// Blocks of a group, of a matrix.
uint at_once(uint stage) {
    return PICK(AT_ONCE(QKV), AT_ONCE(OUT), AT_ONCE(GATE), AT_ONCE(DOWN));
}

uint groups_of(uint stage) {
    return PICK(GROUPS(QKV, QKV_ROWS), GROUPS(OUT, HIDDEN), GROUPS(GATE, INTERMEDIATE), GROUPS(DOWN, HIDDEN));
}

uint blocks_of(uint stage) {
    return PICK(QKV_ROWS, HIDDEN, INTERMEDIATE, HIDDEN) / 16;
}

struct Work {
    uint step;  // 4 * layer + stage
    uint part, first_tile, last_tile;
    uint group;
    uint chunk, chunks;
    uint team, place, first_sum;      // of the slice; its sums among the group's
    uint tile;                        // its first one of the chunk
    Words matrix, other;              // of the slice's team
    uint tiles;                       // of a row of them
    uint64_t rows_at, other_at;       // of the team's blocks
};

Work ahead, work;  // what is asked for, what is multiplied

// What is the same in a whole slice, so that compilers know it for a subgroup: those have 64 lanes at most.
uint of_slice(uint value) {
    return subgroupBroadcastFirst(value);
}

uint64_t of_slice(uint64_t value) {
    uvec2 words = unpack32(value);
    return pack64(uvec2(of_slice(words.x), of_slice(words.y)));
}

void enter_stage() {
    uint stage = ahead.step % 4, slice = of_slice(lane / 64);
    uint team = PICK(TEAM(QKV), TEAM(OUT), TEAM(GATE), TEAM(DOWN));
    uint own = PICK(slice / TEAM(QKV), slice / TEAM(OUT), slice / TEAM(GATE), slice / TEAM(DOWN));
    ahead.tiles = PICK(HIDDEN_TILES, Q_TILES, HIDDEN_TILES, MLP_TILES);
    ahead.team = team;
    ahead.place = slice - own * team;
    ahead.first_sum = own * WIDTH;
    ahead.chunks = PICK(
        CHUNKS(QKV, HIDDEN_TILES), CHUNKS(OUT, OUT_TILES), CHUNKS(GATE, HIDDEN_TILES), CHUNKS(DOWN, DOWN_TILES)
    );
    uint which = stage + uint(stage == DOWN || stage == GATE && WIDTH == 1 && own % 2 == 1);
    uint from = ahead.step / 4 % 2 * ENTRY;
    ahead.matrix = Words(entry[from + which]);
    ahead.other = Words(entry[from + which + uint(stage == GATE)]);  // the up projection is 3
}

// The workgroup's first group of a part.
void enter_part() {
    uint stage = ahead.step % 4, count = gl_NumWorkGroups.x, id = gl_WorkGroupID.x;
    uint part_tiles = PICK(HIDDEN_TILES, OUT_TILES, HIDDEN_TILES, DOWN_TILES);
    ahead.first_tile = ahead.part * part_tiles;
    ahead.last_tile = min(ahead.first_tile + part_tiles, ahead.tiles);
    ahead.group = PICK(id, id / OUT_PARTS, id, id / DOWN_PARTS);
}

// From a workgroup's group to its next one.
uint group_step() {
    uint stage = ahead.step % 4, count = gl_NumWorkGroups.x, rest = count - min(ahead.part, count - 1);
    return PICK(count, (rest + OUT_PARTS - 1) / OUT_PARTS, count, (rest + DOWN_PARTS - 1) / DOWN_PARTS);
}

void enter_group() {
    uint stage = ahead.step % 4, last = blocks_of(stage) - 1;
    uint block = ahead.group * at_once(stage) + (stage == GATE ? ahead.first_sum / 2 : ahead.first_sum);
    ahead.rows_at = of_slice(block_address(ahead.matrix, min(block, last), ahead.tiles));
    if (WIDTH == 2) {
        block += uint(stage != GATE);
        ahead.other_at = of_slice(block_address(ahead.other, min(block, last), ahead.tiles));
    }
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
    } while (ahead.group >= groups_of(ahead.step % 4));
}

// To the next chunk.
void go_on() {
    ahead.chunk += 1;
    ahead.tile += DEPTH * ahead.team;
    if (ahead.chunk == ahead.chunks) {
        ahead.group += group_step();
        if (ahead.group >= groups_of(ahead.step % 4)) {
            find_part();
        }
        enter_group();
    }
}

// The first chunk.
void begin() {
    ahead.step = 0xFFFFFFFFu;  // behind the last part of the one in front
    ahead.part = DOWN_PARTS;
    find_part();
    enter_group();
}
