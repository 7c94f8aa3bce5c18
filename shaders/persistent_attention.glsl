// Attention of persistent.comp: a workgroup takes splits of blocks of heads, one after the other.

void attend_unit(uint split, uint block, uint first, uint run) {
    head = block * QUERIES * KV_HEADS / HEADS;
    first_row = (state.slots[0] * KV_HEADS + head) * SLOTS;
    uint begin = first + split * run, stop = min(begin + run, position + 1);
    bool appends = split + 1 == splits;
    vec4 low[QUERIES], high[QUERIES];
    vec2 stat;
    fetch_keys(begin, stop - 1);
    fetch_values(begin, stop - 1);
    prepare(block, appends);
    attend(begin, stop, appends ? position : 0xFFFFFFFFu, low, high, stat);
    gather_values(low, high);
    barrier();
    for (uint i = lane; i < QUERIES * QUADS; i += LANES) {
        uint row = partial_row(block * QUERIES + over(i, QUADS), split);
        uint place = PARTIALS_AT / 4 + row * QUADS + rest(i, QUADS);
        MessageQuads(copy_at).at[place] = floatBitsToUint(gathered_quad(i));
    }
    if (lane % 8 == 0 && lane / 8 < QUERIES) {
        uint place = STATS_AT / 2 + partial_row(block * QUERIES + lane / 8, split);
        MessagePairs(copy_at).at[place] = floatBitsToUint(stat);
    }
    barrier();
}

// Layers without keys of their own read an earlier one's, and make the token's row of them again: nobody
// reads from the cache what was written in this dispatch.
void attend_layer() {
    uvec2 sizes = entry[entry_at + WINDOW_AT], new = entry[entry_at + NEW_AT];
    WINDOW = sizes.x;
    SLOTS = sizes.y;
    k_column = new.x;
    v_column = new.y;
    q_gain = Floats(entry[entry_at + Q_GAIN_AT]);
    k_gain = Floats(entry[entry_at + Q_GAIN_AT + 1]);
    keys = Uints(entry[entry_at + KEYS_AT]);
    cached_values = Uints(entry[entry_at + KEYS_AT + 1]);
    key_scales = Floats(entry[entry_at + KEYS_AT + 2]);
    value_scales = Floats(entry[entry_at + KEYS_AT + 3]);
    turns = Turns(entry[entry_at + TURNS_AT]);
    uint most = HEADS_VARY ? entry[entry_at + SOURCE_AT].y : MOST_SPLITS;
    uint least = HEADS_VARY ? entry[entry_at + FACTOR_AT].y : RUN;
    uint first = WINDOW > 0 && position >= WINDOW ? position + 1 - WINDOW : 0;
    uint seen = position + 1 - first, run = max(least, (seen + most - 1) / most);
    splits = (seen + run - 1) / run;
    [[dont_unroll]] for (uint i = gl_WorkGroupID.x; i < splits * BLOCKS; i += gl_NumWorkGroups.x) {
        attend_unit(i / BLOCKS, i % BLOCKS, first, run);
    }
}
