// Attention of persistent.comp: a workgroup takes splits of blocks of heads, one after the other.

void attend_unit(uint split, uint block, uint first, uint run) {
    head = block * QUERIES * KV_HEADS / HEADS;
    first_row = (state.slots[0] * KV_HEADS + head) * SLOTS;
    uint begin = first + split * run, stop = min(begin + run, position + 1);
    bool appends = split + 1 == splits;
    uint slot = new_slot + begin - position;
    slot = begin + new_slot < position ? slot + SLOTS : slot;
    attend(block, appends, slot, begin, stop);
    gather_values();
    for (uint i = lane; i < QUERIES * QUADS; i += LANES) {
        uint row = partial_row(block * QUERIES + over(i, QUADS), split);
        uint place = PARTIALS_AT / 4 + row * QUADS + rest(i, QUADS);
        MessageQuads(copy_at).at[place] = floatBitsToUint(gathered_quad(i));
    }
    [[unroll]] for (uint q = 0; q < QUERIES; q++) {
        if (lane == LANES - 1 - q) {
            uint place = STATS_AT / 2 + partial_row(block * QUERIES + q, split);
            MessagePairs(copy_at).at[place] = floatBitsToUint(vec2(peaks[q], gathered_weight(q)));
        }
    }
}

// Layers without keys of their own read an earlier one's, and make the token's row of them again: nobody
// reads from the cache what was written in this dispatch.
void attend_layer() {
    uvec2 sizes = entry[entry_at + WINDOW_AT];
    SLOTS = sizes.y;
    keys = Uints(entry[entry_at + KEYS_AT]);
    cached_values = Uints(entry[entry_at + KEYS_AT + 1]);
    key_scales = Floats(entry[entry_at + KEYS_AT + 2]);
    value_scales = Floats(entry[entry_at + KEYS_AT + 3]);
    uint most = HEADS_VARY ? entry[entry_at + SOURCE_AT].y : MOST_SPLITS;
    uint least = HEADS_VARY ? entry[entry_at + FACTOR_AT].y : RUN;
    uint first = sizes.x > 0 && position >= sizes.x ? position + 1 - sizes.x : 0;
    uint seen = position + 1 - first, run = max(least, (seen + most - 1) / most);
    splits = (seen + run - 1) / run;
    new_slot = position % SLOTS;
    [[dont_unroll]] for (uint i = gl_WorkGroupID.x; i < splits * BLOCKS; i += gl_NumWorkGroups.x) {
        attend_unit(i / BLOCKS, i % BLOCKS, first, run);
    }
}
