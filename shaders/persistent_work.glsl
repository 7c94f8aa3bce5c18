// Which weights of persistent.comp a workgroup multiplies, one after the other. Its slices of 64 lanes are
// teams; a team has WIDTH blocks of 16 rows and shares their tiles, and a group of blocks is what all teams
// have at a time. Which groups a workgroup has is a list that kernels/vulkan/persistent_shares.py writes. Two
// blocks, of the gate a block of each matrix, share the loads of activations. DEPTH tiles of each slice are a
// chunk. Chunks, groups, parts of the columns and stages follow each other without a break: what is asked for
// is one chunk ahead of what is multiplied, in the next stage too.

#define TEAM(which) (TEAMS >> 4 * which & 15u)

// Experts whose columns of down the slices of a team have at a time, and chunks of each.
const uint EXPERTS_AT_ONCE = ACTIVE > 0 ? (TEAMS >> 20 & 15u) / SHARING : 1;
const uint EXPERT_CHUNKS = ACTIVE > 0 ? (EXPERT_TILES / SHARING + DEPTH - 1) / DEPTH : 1;

const uint NEXT_LAYER = 8;  // from a step to the same one of the next layer

// Of a step, as kernels/vulkan/persistent_plans.py writes it.
uvec2 plan_of(uint step, uint word) {
    return entry[step / NEXT_LAYER % ENTRIES * ENTRY + PLAN_WORDS * (step % NEXT_LAYER) + word];
}

struct Work {
    uint step;  // NEXT_LAYER * layer + stage
    uint part, part_tiles, first_tile, last_tile;
    uint group;
    uint chunk, chunks;
    bool is_gate;                     // of two matrices
    uint at_once;                     // blocks of a group, of a matrix
    uint blocks, sent_at;             // of a matrix; place of the messages
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
    return ACTIVE > 0 && step % NEXT_LAYER == EXPERT_DOWN;
}

// Than the chunk before.
bool has_other_rows() {
    return ahead.chunk == 0 || is_of_experts(ahead.step);
}

// What is the same in a whole slice, so that compilers know it for a subgroup: those have 64 lanes at most. Where they
// have fewer, an exchange only costs time: no such device was seen to gain by it.
// Attention with sizes of its own leaves few scalar registers for that, with scales besides none.
uint of_slice(uint value) {
    return HEADS_VARY || gl_SubgroupSize < 64 ? value : subgroupBroadcastFirst(value);
}

uint64_t of_slice(uint64_t value) {
    uvec2 words = unpack32(value);
    words = uvec2(subgroupBroadcastFirst(words.x), subgroupBroadcastFirst(words.y));
    return HEADS_VARY && KV_INT8 == 1 || gl_SubgroupSize < 64 ? value : pack64(words);
}

void enter_stage() {
    uvec2 sizes = plan_of(ahead.step, 0), sums = plan_of(ahead.step, 1);
    uvec2 first = plan_of(ahead.step, 2), second = plan_of(ahead.step, 3);
    ahead.tiles = sizes.x & 0xFFFFu;
    ahead.part_tiles = sizes.x >> 16;
    ahead.chunks = sizes.y & 0xFFFFu;
    ahead.team = sizes.y >> 16 & 15u;
    ahead.apart = sizes.y >> 20 & 15u;
    ahead.at_once = sizes.y >> 24 & 63u;
    ahead.is_gate = sizes.y >> 31 == 1;
    ahead.blocks = sums.x;
    ahead.sent_at = sums.y;
    uint slice = of_slice(lane / 64), own = slice * (ahead.is_gate ? 2 * ahead.at_once : ahead.at_once) / (SLICES * WIDTH);
    ahead.place = slice - own * ahead.team;
    ahead.first_sum = own * WIDTH;
    ahead.matrix = Words(WIDTH == 1 && own % 2 == 1 ? second : first);
    ahead.other = Words(second);
}

// Of experts the rows of all that were chosen follow each other.
uint64_t address_of(Words matrix, uint block) {
    block = min(block, ahead.blocks - 1);
    if (ACTIVE > 0 && ahead.step % NEXT_LAYER == EXPERT_GATE) {
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
    return ahead.group * ahead.at_once + (ahead.is_gate ? ahead.first_sum / 2 : ahead.first_sum);
}

void enter_group() {
    uint block = first_block();
    ahead.rows_at = address_of(ahead.matrix, block);
    if (WIDTH == 2) {
        ahead.other_at = address_of(ahead.other, ahead.is_gate ? block : block + 1);
    }
    ahead.tile = ahead.first_tile + ahead.place;
}

uint taken = 0;      // items of the workgroup
uint upcoming_item;  // on its way

// The same for all lanes. Where there are scales besides, scalar registers are few: then each lane asks for it.
uint item_of(uint place) {
    uint none = KV_INT8 == 1 ? lane / LANES : 0;
    return items.at[gl_WorkGroupID.x * LIST + min(place + none, LIST - 1)];
}

uint next_item() {
    uint item = of_slice(upcoming_item);
    taken += 1;
    upcoming_item = item_of(taken);
    return item;
}

// The next item of the list, without its addresses.
void enter_item() {
    uint item = next_item(), step = item >> 20;
    ahead.part = item >> 16 & 15u;
    ahead.group = item & 0xFFFFu;
    if (step != ahead.step) {
        ahead.step = step;
        enter_stage();
    }
    ahead.chunk = 0;
    ahead.reads = 0;
    ahead.first_tile = ahead.part * ahead.part_tiles;
    uint last = ahead.first_tile + ahead.part_tiles;
    ahead.last_tile = is_of_experts(step) ? last : min(last, ahead.tiles);
}

// To the next chunk, without its addresses.
void go_on() {
    ahead.chunk += 1;
    ahead.tile += DEPTH * ahead.team;
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
    upcoming_item = item_of(0);
    enter_item();
    enter_group();
}

uint word_ahead = 0, most_ahead = 0;  // on its way; of those before

// Whoever has looked for a message in vain reads a word of another 64 bytes that come behind what is on its way
// of the item: so the caches have them. A word is waited for with the next look.
void read_ahead() {
    uint from = ahead.tile - ahead.place + DEPTH * ahead.team;
    if (ahead.reads < READS && from < ahead.last_tile) {
        uint last = (ahead.last_tile - from) * (TILE_VECTORS / 4) - 1;
        uint own = ahead.reads / WIDTH * 64 * ahead.team + 64 * ahead.place + lane % 64;
        uint64_t rows_at = WIDTH == 2 && ahead.reads % 2 == 1 ? ahead.other_at : ahead.rows_at;
        most_ahead = max(most_ahead, word_ahead);
        word_ahead = Messages(rows_at + uint64_t(16 * TILE_VECTORS * from + 64 * min(own, last))).at[0];
        ahead.reads += 1;
    }
}
