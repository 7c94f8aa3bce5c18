// Which weights of persistent.comp a workgroup multiplies, one after the other. Its slices of 64 lanes are
// teams; a team has WIDTH blocks of 16 rows and shares their tiles, and a group of blocks is what all teams
// have at a time. Which groups a workgroup has is a list that kernels/vulkan/persistent_shares.py writes. Two
// blocks, of the gate a block of each matrix, share the loads of activations. DEPTH tiles of each slice are a
// chunk. Chunks, groups, parts of the columns and stages follow each other without a break: what is asked for
// is one chunk ahead of what is multiplied, in the next stage too.

// One of constants, by `stage`.
#define PICK(q, o, g, d, eg, ed) (stage == QKV ? (q) : stage == OUT ? (o) : stage == GATE ? (g) : \
    stage == DOWN ? (d) : stage == EXPERT_GATE ? (eg) : (ed))
#define EACH(of) PICK(of(0, 1), of(1, 1), of(2, 2), of(3, 1), of(4, 2), of(5, 1))
#define TEAM(which, matrices) (TEAMS >> 4 * which & 15u)
#define OWN(which, matrices) (slice / TEAM(which, 1))
#define AT_ONCE(which, matrices) (SLICES * WIDTH / TEAM(which, 1) / matrices)

// Experts whose columns of down the slices of a team have at a time, and chunks of each.
const uint EXPERTS_AT_ONCE = ACTIVE > 0 ? (TEAMS >> 20 & 15u) / SHARING : 1;
const uint EXPERT_CHUNKS = ACTIVE > 0 ? (EXPERT_TILES / SHARING + DEPTH - 1) / DEPTH : 1;

// As kernels/vulkan/persistent_plans.py writes them.
uvec2 plan_of(uint step, uint which) {
    return entry[step / PRODUCTS % 2 * ENTRY + PLANS_AT + 2 * (step % PRODUCTS) + which];
}

// Blocks of a group, of a matrix.
uint at_once(uint stage) {
    return EACH(AT_ONCE);
}

struct Work {
    uint step;  // PRODUCTS * layer + stage
    uint part, part_tiles, first_tile, last_tile;
    uint group;
    uint next, item;                  // its place in the list, and itself, on its way
    uint chunk, chunks;
    uint team, place, first_sum;      // of the slice; its sums among the group's
    uint apart;                       // from a tile of the slice to its next one
    uint tile;                        // its first one of the chunk
    uint reads;                       // ahead of what is on its way
    Words matrix, other;              // of the slice's team
    uint tiles;                       // of a row of them
    uint64_t rows_at, other_at;       // of the team's blocks
};

Work ahead, work;  // what is asked for, what is multiplied

// The down projection of all experts that were chosen: a chunk is of one of them, SHARING slices share it.
bool is_of_experts(uint step) {
    return ACTIVE > 0 && step % PRODUCTS == EXPERT_DOWN;
}

// Tiles of a slice in a chunk.
uint depth_of(uint step) {
    return OUT_DEPTH < DEPTH && step % PRODUCTS == OUT ? OUT_DEPTH : DEPTH;
}

// Behind the last tile of the row, or of the chunk where that is less than DEPTH.
uint chunk_end() {
    uint depth = depth_of(ahead.step);
    return depth < DEPTH ? min(ahead.last_tile, ahead.tile + depth * ahead.apart) : ahead.last_tile;
}

// Than the chunk before.
bool has_other_rows() {
    return ahead.chunk == 0 || is_of_experts(ahead.step);
}

bool is_gate(uint stage) {
    return stage == GATE || ACTIVE > 0 && stage == EXPERT_GATE;
}

// What is the same in a whole slice, so that compilers know it for a subgroup: those have 64 lanes at most.
// Attention with sizes of its own leaves few scalar registers for that, with scales besides none.
uint of_slice(uint value) {
    return HEADS_VARY ? value : subgroupBroadcastFirst(value);
}

uint64_t of_slice(uint64_t value) {
    uvec2 words = unpack32(value);
    words = uvec2(subgroupBroadcastFirst(words.x), subgroupBroadcastFirst(words.y));
    return HEADS_VARY && KV_INT8 == 1 ? value : pack64(words);
}

void enter_stage() {
    uint stage = ahead.step % PRODUCTS, slice = of_slice(lane / 64), from = ahead.step / PRODUCTS % 2 * ENTRY;
    uint team = EACH(TEAM), own = EACH(OWN);
    uvec2 plan = plan_of(ahead.step, 0);
    ahead.tiles = plan.x & 0xFFFFu;
    ahead.part_tiles = plan.x >> 16;
    ahead.team = team;
    ahead.place = slice - own * team;
    ahead.first_sum = own * WIDTH;
    ahead.apart = is_of_experts(ahead.step) ? SHARING : team;
    ahead.chunks = plan.y;
    uint which = PICK(0, 1, 2, 4, EXPERTS_AT, EXPERTS_AT + 2);
    which += uint(is_gate(stage) && WIDTH == 1 && own % 2 == 1);
    ahead.matrix = Words(entry[from + which]);
    ahead.other = Words(entry[from + which + uint(is_gate(stage))]);
}

// Of experts the rows of all that were chosen follow each other.
uint64_t address_of(Words matrix, uint block) {
    block = min(block, plan_of(ahead.step, 1).x - 1);
    if (ACTIVE > 0 && ahead.step % PRODUCTS == EXPERT_GATE) {
        const uint own = EXPERT_ROWS > 0 ? EXPERT_ROWS / 16 : 1;
        block = picked[block / own] * 2 * own + block % own;
    }
    return of_slice(block_address(matrix, block, ahead.tiles));
}

// A chunk of the experts' down: tiles of all of them are counted, so the rows begin as far in front of theirs.
void enter_expert(uint block) {
    uint slot = ahead.chunk / EXPERT_CHUNKS * EXPERTS_AT_ONCE + ahead.place / SHARING;
    uint own = min(slot, ACTIVE - 1), first = own * EXPERT_TILES, blocks = picked[own] * (HIDDEN / 16);
    uint tile = ahead.chunk % EXPERT_CHUNKS * DEPTH * SHARING + ahead.place % SHARING;
    uint64_t before = uint64_t(16 * TILE_VECTORS * first);
    ahead.tile = first + (slot < ACTIVE ? tile : EXPERT_TILES);
    ahead.last_tile = first + EXPERT_TILES;
    block = min(block, HIDDEN / 16 - 1);
    ahead.rows_at = of_slice(block_address(ahead.matrix, blocks + block, EXPERT_TILES) - before);
    if (WIDTH == 2) {
        block = min(block + 1, HIDDEN / 16 - 1);
        ahead.other_at = of_slice(block_address(ahead.matrix, blocks + block, EXPERT_TILES) - before);
    }
}

// The block of the slice's team.
uint first_block() {
    uint stage = ahead.step % PRODUCTS;
    return ahead.group * at_once(stage) + (is_gate(stage) ? ahead.first_sum / 2 : ahead.first_sum);
}

void enter_group() {
    uint block = first_block();
    ahead.rows_at = address_of(ahead.matrix, block);
    if (WIDTH == 2) {
        ahead.other_at = address_of(ahead.other, block + uint(!is_gate(ahead.step % PRODUCTS)));
    }
    ahead.tile = ahead.first_tile + ahead.place;
}

// The next item of the list, which is there, without its addresses; the one behind it is asked for.
void enter_item() {
    uint item = of_slice(ahead.item), step = item >> 20, stage = step % PRODUCTS;
    ahead.part = item >> 16 & 15u;
    ahead.group = item & 0xFFFFu;
    if (step != ahead.step) {
        ahead.step = step;
        enter_stage();
    }
    ahead.next += 1;
    ahead.item = items.at[ahead.next];
    ahead.chunk = 0;
    ahead.reads = 0;
    ahead.first_tile = ahead.part * ahead.part_tiles;
    uint last = ahead.first_tile + ahead.part_tiles;
    ahead.last_tile = stage == OUT || stage == DOWN ? min(last, ahead.tiles) : last;
}

// To the next chunk, without its addresses.
void go_on() {
    ahead.chunk += 1;
    ahead.tile += depth_of(ahead.step) * ahead.team;
    if (ahead.chunk == ahead.chunks) {
        enter_item();
    }
}

void enter_chunk() {
    if (is_of_experts(ahead.step)) {
        enter_expert(first_block());
    } else if (ahead.chunk == 0) {
        enter_group();
    }
}

// The first chunk.
void begin() {
    ahead.step = 0xFFFFFFFFu;
    ahead.next = gl_WorkGroupID.x * LIST;
    ahead.item = items.at[ahead.next];
    enter_item();
    enter_group();
}

uint word_ahead = 0, most_ahead = 0;  // on its way; of those before

// Whoever has looked for a message in vain reads a word of another 64 bytes that come behind the item's first
// chunk: so the caches have them. A word is waited for with the next look.
void read_ahead() {
    uint from = ahead.tile - ahead.place + depth_of(ahead.step) * ahead.team;
    if (ahead.reads < READS && from < ahead.last_tile) {
        uint last = (ahead.last_tile - from) * (TILE_VECTORS / 4) - 1;
        uint own = ahead.reads / WIDTH * 64 * ahead.team + 64 * ahead.place + lane % 64;
        uint64_t rows_at = WIDTH == 2 && ahead.reads % 2 == 1 ? ahead.other_at : ahead.rows_at;
        most_ahead = max(most_ahead, word_ahead);
        word_ahead = Messages(rows_at + uint64_t(16 * TILE_VECTORS * from + 64 * min(own, last))).at[0];
        ahead.reads += 1;
    }
}
