#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_KHR_shader_subgroup_ballot : require
// All layers of one token in one dispatch.
//
// As many workgroups as the device runs at a time go through the layers together. A product is four
// stages of a layer: q, k and v; attention's output; gate and up; down. What one workgroup makes and others
// need are messages, floats in places that are empty before: all bits set, which is no result of arithmetic.
// A reader looks at a place until it is not empty, so nobody waits for more than it needs, and there are no
// barriers among workgroups. Each layer has another copy of the places; between the layer that filled a copy
// and the one that fills it again all workgroups together empty it.
// Weights do not wait: a workgroup asks for the first ones of its next stage while it multiplies the last
// ones of this.
//
// What a workgroup did in a layer n is seen by all four layers later: behind its fence (n + 1) it sends
// outputs of the gate, every workgroup has some. Somebody has a product of them, and behind its fence (n + 2)
// it sends outputs of down, which everyone needs in front of a fence (n + 3).
//
// Waiting needs every workgroup to be running. Vulkan promises that of none; whoever waits too long
// says so in `failed`, waits no more, and the token is computed anew by other kernels.
//
// Sums have the order of gemv.comp and attention.comp, so a token has the same bits there and here.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint DEPTH = 4;     // tiles of weights on their way, up to 8, of each block
layout(constant_id = 3) const uint PATIENCE = 1;  // looks at a message before one gives up
layout(constant_id = 5) const uint HIDDEN = 32;
layout(constant_id = 6) const float EPS = 1e-6;
layout(constant_id = 7) const bool POST_NORM = false;  // what joins the residual stream has a norm
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
layout(constant_id = 29) const uint WIDTH = 1;        // blocks of rows of a slice, 1 or 2
layout(constant_id = 30) const uint RUN = 32;         // keys of a split, at least
#include "weights.glsl"

layout(buffer_reference, std430, buffer_reference_align = 8) readonly restrict buffer Turns {
    vec2 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) coherent volatile buffer Messages {
    uint at[];
};
layout(buffer_reference, std430, buffer_reference_align = 8) coherent volatile buffer MessagePairs {
    uvec2 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) coherent volatile buffer MessageQuads {
    uvec4 at[];
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
    Messages messages;
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

const uint COPIES = 8, EMPTY = 0xFFFFFFFFu;
// Places of a copy, a word each, as kernels/vulkan/persistent.py counts them.
#define PLANE(channels) (((channels) + 127) / 128 * 128)
const uint QKV_AT = 0;
const uint CONTEXT_AT = QKV_AT + PLANE((HEADS + 2 * KV_HEADS) * DIM);
const uint OUT_AT = CONTEXT_AT + PLANE(HEADS * DIM);
const uint GATED_AT = OUT_AT + OUT_PARTS * PLANE(HIDDEN);
const uint DOWN_AT = GATED_AT + PLANE(INTERMEDIATE);
const uint PARTIALS_AT = DOWN_AT + DOWN_PARTS * PLANE(HIDDEN);
const uint STATS_AT = PARTIALS_AT + SPLITS * HEADS * DIM;
const uint COPY = STATS_AT + PLANE(2 * SPLITS * HEADS);

uint64_t copy_at;  // of this layer
uint turn;         // layers so far, of all tokens
uint patience = PATIENCE;

uint64_t copy_of(uint turn_) {
    return uint64_t(messages) + uint64_t(turn_ % COPIES * (4 * COPY));
}

void send(uint place, float value) {
    Messages(copy_at).at[place] = floatBitsToUint(value);
}

// The workgroup's share of the copy that is filled four layers later.
void empty_copy() {
    MessageQuads to = MessageQuads(copy_of(turn + 4));
    uint first = gl_WorkGroupID.x * LANES + lane_index();
    [[dont_unroll]] for (uint i = first; i < COPY / 4; i += gl_NumWorkGroups.x * LANES) {
        to.at[i] = uvec4(EMPTY);
    }
}

bool gives_up(uint looks) {
    if (looks < patience) {
        return false;
    }
    patience = 0;
    state.failed = 1;
    return true;
}

bool is_empty(uvec4 quad) {
    return max(max(quad.x, quad.y), max(quad.z, quad.w)) == EMPTY;
}

vec4 input_quad(uint column, uint quad) {
    MessageQuads from = MessageQuads(copy_at);
    uvec4 v = uvec4(EMPTY);
    for (uint looks = 0; is_empty(v) && !gives_up(looks); looks++) {
        v = from.at[QKV_AT / 4 + column / 4 + quad];
    }
    return uintBitsToFloat(v);
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
shared float partial[2 * 16 * SLICES * WIDTH];  // in turns
uint flip = 0;

#include "persistent_stream.glsl"
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
        uint place = PARTIALS_AT / 4 + partial_row(block * QUERIES + i / QUADS, split) * QUADS + i % QUADS;
        MessageQuads(copy_at).at[place] = floatBitsToUint(gathered_quad(i));
    }
    if (lane % 8 == 0 && lane / 8 < QUERIES) {
        uint place = STATS_AT / 2 + partial_row(block * QUERIES + lane / 8, split);
        MessagePairs(copy_at).at[place] = floatBitsToUint(stat);
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
    uint seen = position + 1 - first, run = max(max(TILE, RUN), (seen + SPLITS - 1) / SPLITS);
    splits = (seen + run - 1) / run;
    [[dont_unroll]] for (uint i = gl_WorkGroupID.x; i < splits * BLOCKS; i += gl_NumWorkGroups.x) {
        attend_unit(i / BLOCKS, i % BLOCKS, first, run);
    }
}

void hold_part(uint stage) {
    if (stage == OUT && !JOINS) {
        hold_context(work.part * PART_HEADS);
    } else {
        hold_messages(stage == OUT ? CONTEXT_AT : GATED_AT, stage == OUT ? HEADS * DIM : INTERMEDIATE);
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
        if (stage == GATE) {
            memoryBarrierBuffer();
        }
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
            turn = epoch * LAYERS + layer;
            copy_at = copy_of(turn);
            entry_at = layer % 2 * ENTRY;
            ask_entry(layer + 1);
        }
        run_stage(step, layer);
        if (step % 4 == QKV) {
            empty_copy();
        } else if (step % 4 == OUT) {
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
    LOAD_OWN(h, hidden)
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
