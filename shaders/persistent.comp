#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference_uvec2 : require
// All layers of one token in one dispatch.
//
// As many workgroups as the device runs at a time go through the layers together. A product is four
// stages of a layer: q, k and v; attention's output; gate and up; down. What one workgroup makes and others
// need are messages of 64 bits: a float and a tag, which is another one in every layer of every token. A
// reader looks at a message until it has the tag that it waits for, so nobody waits for more than it needs,
// and there are neither barriers nor fences among workgroups. Every workgroup has outputs of the gate, for
// which it needs all that came before: so nobody is two stages behind, and messages may be overwritten.
// Weights do not wait: a workgroup asks for the first ones of its next stage while it multiplies the last
// ones of this.
//
// Waiting needs every workgroup to be running. Vulkan promises that of none; whoever waits too long
// says so in `failed`, waits no more, and the token is computed anew by other kernels.
//
// Sums have the order of gemv.comp and attention.comp, so a token has the same bits there and here.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint DEPTH = 4;     // tiles of weights on their way, up to 4
layout(constant_id = 3) const uint PATIENCE = 1;  // looks at a message before one gives up
layout(constant_id = 10) const uint DIM = 8;
layout(constant_id = 11) const uint HEADS = 1;
layout(constant_id = 12) const uint KV_HEADS = 1;
layout(constant_id = 13) const uint QUERIES = 1;
layout(constant_id = 14) const uint SPLITS = 16;
layout(constant_id = 15) const bool QK_NORM = false;
layout(constant_id = 16) const float SCALE = 1.0;
layout(constant_id = 17) const float CAP = 0.0;
layout(constant_id = 21) const uint INTERMEDIATE = 32;
layout(constant_id = 22) const uint LAYERS = 1;
layout(constant_id = 23) const uint DOWN_PARTS = 1;
layout(constant_id = 24) const uint TEAMS = 0;  // slices that share a block's tiles: 4 bits for each stage
layout(constant_id = 25) const uint HELD_TILES = 1;  // of activations, of a stage at most
layout(constant_id = 26) const uint OUT_PARTS = 1;
layout(constant_id = 27) const uint ATTENDING = 256;  // lanes that have keys and values
layout(constant_id = 28) const bool JOINS = false;    // a head's splits are joined by one workgroup
#include "weights.glsl"
#define EACH_ITEM [[dont_unroll]]
#include "norm.glsl"


layout(buffer_reference, std430, buffer_reference_align = 8) readonly restrict buffer Turns {
    vec2 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 8) coherent volatile buffer Messages {
    uint64_t at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) coherent buffer Ledger {
    uint epoch;  // tokens so far
    uint left;   // workgroups that are done with this one
};
// As kernels/vulkan/persistent.py writes it.
layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer Entries {
    uvec2 at[];
};

layout(push_constant) uniform Push {
    Entries entries;  // of each layer, and what stands behind the last one
    State state;
    Ledger ledger;
    Messages qkv, partials, stats, context, out_branch, gated, down_branch;
    Quads hidden, normed;
    Uints next;
};

const uint ENTRY = 17;
const uint WINDOW_AT = 12, GAIN_AT = 13, BRANCH_GAIN_AT = 14, ATTENTION_GAIN_AT = 15, MLP_GAIN_AT = 16;
shared uvec2 entry[2 * ENTRY];  // of this layer and of the next one
uint entry_at;

const uint WHOLE = 0, PREPARE = 1, ATTEND = 2, MODE = WHOLE;
const bool VALUE_NORM = false;
Floats q_gain, k_gain;
Uints keys, cached_values;
Floats key_scales, value_scales;
Turns turns;
uint WINDOW, SLOTS;
const uint k_column = HEADS * DIM, v_column = (HEADS + KV_HEADS) * DIM;

uint tag;  // of this layer's messages
uint patience = PATIENCE;

uint message_place(uint quad, uint component) {
    return quad / 32 * 128 + component * 32 + quad % 32;  // neighbours for neighbouring lanes
}

void send(Messages to, uint place, float value) {
    to.at[place] = pack64(uvec2(floatBitsToUint(value), tag));
}

bool gives_up(uint looks) {
    if (looks < patience) {
        return false;
    }
    patience = 0;
    state.failed = 1;
    return true;
}

// The message at `place`; whether it is there yet.
bool look(Messages from, uint place, uint wanted, out float value) {
    uvec2 message = unpack32(from.at[place]);
    value = uintBitsToFloat(message.x);
    return message.y == wanted;
}

bool look_quad(Messages from, uint first, uint quad, uint wanted, out vec4 v) {
    bool there = true;
    [[unroll]] for (uint c = 0; c < 4; c++) {
        float one;
        bool this_ = look(from, first + message_place(quad, c), wanted, one);
        v[c] = one;
        there = there && this_;
    }
    return there;
}

vec4 input_quad(uint column, uint quad) {
    vec4 v;
    for (uint looks = 0; !look_quad(qkv, 0, column / 4 + quad, tag, v) && !gives_up(looks); looks++) {
    }
    return v;
}

#define values cached_values
#include "cache.glsl"
#include "attention.glsl"

const uint SLICES = LANES / 64;
const uint MOST_PARTS = OUT_PARTS > DOWN_PARTS ? OUT_PARTS : DOWN_PARTS;
const uint QKV = 0, OUT = 1, GATE = 2, DOWN = 3;
const uint MLP_TILES = (INTERMEDIATE + 127) / 128, Q_TILES = (HEADS * DIM + 127) / 128;
const uint OUT_TILES = (Q_TILES + OUT_PARTS - 1) / OUT_PARTS;
const uint DOWN_TILES = (MLP_TILES + DOWN_PARTS - 1) / DOWN_PARTS;

shared uvec4 held[HELD_TILES * INPUT_VECTORS];
shared float partial[2 * 16 * SLICES];  // in turns
uint flip = 0;

#include "held.glsl"

#include "persistent_work.glsl"
#include "persistent_inputs.glsl"
#include "persistent_products.glsl"

void attend_unit(uint split, uint block, uint first, uint run) {
    head = block * QUERIES / SHARING;
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
        vec4 total = gathered_quad(i);
        uint place = partial_row(block * QUERIES + i / QUADS, split) * DIM + i % QUADS * 4;
        [[unroll]] for (uint c = 0; c < 4; c++) {
            send(partials, place + c, total[c]);
        }
    }
    if (lane % 8 == 0 && lane / 8 < QUERIES) {
        uint place = 2 * partial_row(block * QUERIES + lane / 8, split);
        send(stats, place, stat.x);
        send(stats, place + 1, stat.y);
    }
    barrier();
}

void attend_layer() {
    uvec2 sizes = entry[entry_at + WINDOW_AT];
    WINDOW = sizes.x;
    SLOTS = sizes.y;
    q_gain = Floats(entry[entry_at + 5]);
    k_gain = Floats(entry[entry_at + 6]);
    keys = Uints(entry[entry_at + 7]);
    cached_values = Uints(entry[entry_at + 8]);
    key_scales = Floats(entry[entry_at + 9]);
    value_scales = Floats(entry[entry_at + 10]);
    turns = Turns(entry[entry_at + 11]);
    uint first = WINDOW > 0 && position >= WINDOW ? position + 1 - WINDOW : 0;
    uint seen = position + 1 - first, run = max(TILE, (seen + SPLITS - 1) / SPLITS);
    splits = (seen + run - 1) / run;
    [[dont_unroll]] for (uint i = gl_WorkGroupID.x; i < splits * BLOCKS; i += gl_NumWorkGroups.x) {
        attend_unit(i % splits, i / splits, first, run);
    }
}

void hold_part(uint stage) {
    if (stage == OUT && !JOINS) {
        hold_context(work.part * PART_HEADS);
    } else {
        Messages from = stage == OUT ? context : gated;
        hold_messages(from, stage == OUT ? HEADS * DIM : INTERMEDIATE);
    }
    barrier();
}

void run_stage(uint step, uint layer) {
    uint stage = step % 4;
    if (stage == OUT) {
        attend_layer();
        if (JOINS) {
            join_heads();
        }
    }
    if (stage == QKV || stage == GATE) {
        hold_stream(stage == QKV, layer);
        barrier();
    }
    [[dont_unroll]] while (ahead.step == step && layer < LAYERS) {
        work = ahead;
        if (stage == OUT || stage == DOWN) {
            hold_part(stage);
        }
        multiply_part(stage);
    }
}

uvec2 upcoming;  // a word of the next entry, on its way

void ask_entry(uint layer) {
    upcoming = entries.at[min(layer, LAYERS) * ENTRY + min(lane, ENTRY - 1)];
}

void keep_entry(uint layer) {
    if (lane < ENTRY) {
        entry[layer % 2 * ENTRY + lane] = upcoming;
    }
}

// What `held` is behind the last layer.
void finish() {
    for (uint i = lane; i < HIDDEN_TILES * INPUT_VECTORS; i += LANES) {
        Vectors(next).at[i] = held[i];
    }
}

// The first workgroup makes what stands behind the last layer, too.
void run_layers(uint epoch) {
    uint steps_ = 4 * LAYERS + (gl_WorkGroupID.x == 0 ? 1 : 0);
    [[dont_unroll]] for (uint step = 0; step < steps_; step++) {
        uint layer = step / 4;
        if (step % 4 == QKV) {
            tag = epoch * LAYERS + layer + 1;
            entry_at = layer % 2 * ENTRY;
            ask_entry(layer + 1);
        }
        run_stage(step, layer);
        if (step % 4 == OUT) {
            keep_entry(layer + 1);  // there are barriers before it is needed
        }
    }
    if (gl_WorkGroupID.x == 0) {
        finish();
    }
}

void main() {
    lane = lane_index();
    if (state.count == 0 || state.failed != 0) {
        return;
    }
    uint epoch = ledger.epoch;
    position = state.positions[0];
    EACH_ITEM for (uint i = 0; i < ITEMS; i++) {
        h[i] = quad_or_zero(hidden, 0, i * LANES + lane);
    }
    ask_entry(0);
    keep_entry(0);
    barrier();
    begin_work();
    run_layers(epoch);
    if (lane == 0) {
        uint before = atomicAdd(ledger.left, 1);
        if (before + 1 == gl_NumWorkGroups.x) {
            ledger.left = 0;
            ledger.epoch = epoch + 1;
        }
    }
}
