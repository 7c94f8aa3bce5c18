// Products of weights that are not quantized: of bfloat16, with float32 inputs. They are small, so they are cut
// finer than others: a workgroup takes few rows at a time, and has as many slices of the columns as that leaves
// lanes for. The first tiles are asked for before the input is there.
//
// TELL and PROJECT: how a layer takes in its part of the per-layer embedding, of which TOLD channels were made
// in an earlier dispatch, as projection (gelu(gate h) * part). ROUTE: the scores of experts.

struct Kept {
    uint64_t weights;
    uint tiles, tile;  // of a row; the slice's
    uint rows, row;    // at a time; the lane's, of all
    uint groups, group;
};
Kept kept;
uvec4 kept_ahead[4];  // of a tile

uint kept_slices() {
    return LANES / 4 >> findMSB(kept.rows);
}

uint kept_slice() {
    return lane / 4 >> findMSB(kept.rows);
}

// The slice's tile; behind the last tile it again.
void fetch_kept() {
    uint tile = kept.row / 16 * kept.tiles + min(kept.tile, kept.tiles - 1);
    Words from = behind(kept.weights, 4096 * tile + 16 * (kept.row % 16 * 4 + lane % 4));
    [[unroll]] for (uint i = 0; i < 4; i++) {
        kept_ahead[i] = from.at[64 * i];
    }
}

void enter_kept_group() {
    kept.row = min(kept.group, kept.groups - 1) * kept.rows + (lane / 4 & kept.rows - 1);
    kept.tile = kept_slice();
    fetch_kept();
}

void ask_kept(uint stage) {
    bool is_projection = TOLD > 0 && stage == PROJECT;
    kept.weights = uint64_t(Words(entry[entry_at + (stage == ROUTE ? ROUTER_AT : TOLD_AT + stage - TELL)]));
    kept.tiles = is_projection ? (TOLD + 127) / 128 : HIDDEN_TILES;
    kept.rows = is_projection ? 16 : LANES > 256 ? 8 : 4;
    kept.groups = (is_projection ? HIDDEN : stage == ROUTE ? COUNT : TOLD) / kept.rows;
    // Of the router whoever has least to do for experts.
    kept.group = stage == ROUTE ? gl_NumWorkGroups.x - 1 - gl_WorkGroupID.x : gl_WorkGroupID.x;
    enter_kept_group();
}

float multiply_kept_tile() {
    uint base = 32 * kept.tile + 8 * (lane % 4);
    precise vec4 total = vec4(0.0);
    [[unroll]] for (uint i = 0; i < 8; i++) {
        uvec2 w = i % 2 == 0 ? kept_ahead[i / 2].xy : kept_ahead[i / 2].zw;
        vec4 v = uintBitsToFloat(uvec4(w.x << 16, w.x & 0xFFFF0000u, w.y << 16, w.y & 0xFFFF0000u));
        total = fma(v, uintBitsToFloat(held[base + i]), total);
    }
    precise float sum = total.x + total.y + total.z + total.w;
    return sum;
}

void finish_kept_group(uint stage, float total) {
    float sum = team_sum(total, 4);
    if (lane % 4 == 0) {
        partial[flip + lane / 4] = sum;
    }
    barrier();
    if (lane < kept.rows) {
        uint channel = kept.group * kept.rows + lane;
        precise float y = 0.0;
        for (uint s = 0; s < min(kept_slices(), kept.tiles); s++) {
            y += partial[flip + s * kept.rows + lane];
        }
        if (TOLD > 0 && stage == TELL) {
            y = gelu(y) * Floats(entry[entry_at + TOLD_AT + 2]).at[channel];
        }
        send(TOLD > 0 && stage == PROJECT ? spread(BESIDE_BRANCH_AT + channel) : BESIDE_AT + channel, y);
    }
    flip = 16 * SLICES * WIDTH - flip;
}

void hold_told() {
    for (uint quad = lane; quad < (TOLD + 127) / 128 * 32; quad += LANES) {
        uvec4 v = uvec4(quad < TOLD / 4 ? EMPTY : 0);
        for (uint looks = 0; is_empty(v) && !gives_up(looks); looks++) {
            v = MessageQuads(copy_at).at[BESIDE_AT / 4 + quad];
        }
        held[quad] = v;
    }
    barrier();
}

// All groups, the first tiles of which are on their way, by the floats that are held.
void multiply_kept(uint stage) {
    float total = 0.0;
    [[dont_unroll]] while (kept.group < kept.groups) {
        if (kept.tile < kept.tiles) {
            precise float sum = total + multiply_kept_tile();
            total = sum;
        }
        kept.tile += kept_slices();
        if (kept.tile - kept_slice() < kept.tiles) {
            fetch_kept();
        } else {
            finish_kept_group(stage, total);
            total = 0.0;
            kept.group += gl_NumWorkGroups.x;
            enter_kept_group();
        }
    }
}
