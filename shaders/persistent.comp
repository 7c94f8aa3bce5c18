#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_KHR_shader_subgroup_ballot : require
// All layers of one token in one dispatch.
//
// As many workgroups as the device runs at a time go through the layers together. Products are four
// stages of a layer: q, k and v; attention's output; gate and up; down. With TOLD channels of a per-layer
// embedding there are two more: its gate and its projection. With ACTIVE experts there are three: the router,
// beside gate and up, the experts' gate and up, and their down. What one workgroup makes and others need are
// messages, floats in places that are empty before: all bits set, which is no result of arithmetic. A reader
// looks at a place until it is not empty, so nobody waits for more than it needs, and there are no barriers
// among workgroups. Each layer has another copy of the places; between the layer that filled a copy and the
// one that fills it again all workgroups together empty it.
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
layout(constant_id = 10) const uint HEAD_DIM = 8;
layout(constant_id = 11) const uint HEADS = 1;
layout(constant_id = 12) const uint KEY_HEADS = 1;
layout(constant_id = 13) const uint QUERIES = 1;
layout(constant_id = 14) const uint SPLITS = 16;  // for which there are places: a multiple of 16
layout(constant_id = 15) const bool QK_NORM = false;
layout(constant_id = 16) const float SCALE = 1.0;
layout(constant_id = 17) const float CAP = 0.0;
layout(constant_id = 21) const uint INTERMEDIATE = 32;  // at most
layout(constant_id = 22) const uint LAYERS = 1;
layout(constant_id = 23) const uint DOWN_PARTS = 1;
layout(constant_id = 24) const uint TEAMS = 0;  // slices that share a block's tiles: 4 bits for each stage
layout(constant_id = 25) const uint HELD_TILES = 1;  // of activations, of a stage at most
layout(constant_id = 26) const uint OUT_PARTS = 1;
layout(constant_id = 27) const uint ATTENDING = 256;  // lanes that have keys and values
layout(constant_id = 28) const bool JOINS = false;    // a head's splits are joined by one workgroup
layout(constant_id = 29) const uint WIDTH = 1;        // blocks of rows of a slice, 1 or 2
layout(constant_id = 30) const uint RUN = 32;         // keys of a split, at least
layout(constant_id = 31) const uint FULL_DIM = 0;     // of heads of other layers; 0: all layers have the same sizes
layout(constant_id = 32) const uint QKV_COLUMNS = 1;  // of a layer, at most
layout(constant_id = 33) const uint KEPT_COLUMNS = 0; // keys and values of layers whose ones others read, too
layout(constant_id = 34) const bool VALUE_NORM = false;
layout(constant_id = 35) const uint TOLD = 0;
layout(constant_id = 36) const uint ACTIVE = 0;
layout(constant_id = 37) const uint COUNT = 0;        // experts
layout(constant_id = 38) const uint EXPERT_ROWS = 0;  // of an expert's gate
layout(constant_id = 39) const uint SHARING = 1;      // slices that share an expert's columns of down
layout(constant_id = 40) const uint MOST_SPLITS = 16;
layout(constant_id = 41) const uint LIST = 1;         // items of a workgroup's list
layout(constant_id = 42) const bool STRAIGHT = false;  // full chunks have code of their own; not with experts
layout(constant_id = 45) const uint READS = 0;         // ahead into the caches, of an item
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
    uint read;   // so that no compiler leaves out what is read ahead
};
// As kernels/vulkan/persistent.py writes it.
layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer Entries {
    uvec2 at[];
};

// Of each workgroup, as kernels/vulkan/persistent_shares.py writes them.
layout(buffer_reference, std430, buffer_reference_align = 4) readonly restrict buffer Items {
    uint at[];
};

layout(push_constant) uniform Push {
    Entries entries;  // of each layer, and what stands behind the last one
    State state;
    Ledger ledger;
    Messages messages;
    Items items;
    Quads hidden, normed;
    Uints next;
};

// Behind the plans of six stages of products. Sizes are two in a word.
const uint PLAN_WORDS = 4, Q_GAIN_AT = 24, KEYS_AT = 26, TURNS_AT = 30, WINDOW_AT = 31, HEADS_AT = 32;
const uint ROWS_AT = 33, NEW_AT = 34, SOURCE_AT = 35, FACTOR_AT = 36, GAINS_AT = 37, TOLD_AT = 42;
const uint ROUTER_AT = 45, EXPERT_GAINS_AT = 47, ENTRY = 51;
const uint ENTRIES = 2;  // of this layer and of the next one
shared uvec2 entry[ENTRIES * ENTRY];
uint entry_at;

const uint WHOLE = 0, PREPARE = 1, ATTEND = 2, MODE = WHOLE;
Uints keys, cached_values;
Floats key_scales, value_scales;
uint SLOTS;
uint layer_dim, layer_kv_heads;
#define HEADS_VARY (FULL_DIM > 0)
#define MOST_DIM (FULL_DIM > HEAD_DIM ? FULL_DIM : HEAD_DIM)
#define LEAST_DIM (FULL_DIM > 0 && FULL_DIM < HEAD_DIM ? FULL_DIM : HEAD_DIM)
#define DIM (HEADS_VARY ? layer_dim : HEAD_DIM)
#define KV_HEADS (HEADS_VARY ? layer_kv_heads : KEY_HEADS)

const uint COPIES = 8, EMPTY = 0xFFFFFFFFu;
// Places of a copy, a word each, as kernels/vulkan/persistent.py counts them.
#define PLANE(channels) (((channels) + 127) / 128 * 128)
const uint QKV_AT = 0;
const uint CONTEXT_AT = QKV_AT + PLANE(QKV_COLUMNS);
const uint OUT_AT = CONTEXT_AT + PLANE(HEADS * MOST_DIM);
const uint GATED_AT = OUT_AT + OUT_PARTS * PLANE(HIDDEN);
const uint DOWN_AT = GATED_AT + PLANE(INTERMEDIATE);
const uint PARTIALS_AT = DOWN_AT + DOWN_PARTS * PLANE(HIDDEN);
const uint STATS_AT = PARTIALS_AT + SPLITS * HEADS * MOST_DIM;
const uint EXPERT_TILES = (EXPERT_ROWS + 127) / 128;
const uint BESIDE_AT = STATS_AT + PLANE(2 * SPLITS * HEADS);  // of the per-layer gate, or of the router
const uint BESIDE_BRANCH_AT = BESIDE_AT + PLANE(TOLD + COUNT);  // what joins behind the MLP
const uint EXPERTS_GATED_AT = BESIDE_BRANCH_AT + (TOLD + ACTIVE > 0 ? PLANE(HIDDEN) : 0);
const uint COPY = EXPERTS_GATED_AT + ACTIVE * EXPERT_TILES * 128;

uint turn;         // layers so far, of all tokens
uint patience = PATIENCE;

uint64_t copy_of(uint turn_) {
    return uint64_t(messages) + uint64_t(turn_ % COPIES * (4 * COPY));
}

// Keys and values that later layers read have two places, for tokens by turns: the other one is emptied.
uint64_t kept_copy(uint epoch) {
    return uint64_t(messages) + uint64_t(4 * (COPIES * COPY + epoch % 2 * PLANE(KEPT_COLUMNS)));
}

#define copy_at copy_of(turn)  // of this layer: not kept, scalar registers are few

// Who takes octets loads a quad after the other. Of 16 octets the first quads stand in front of the second
// ones: so what neighbouring lanes load at a time has no gaps, and no sector is read twice.
uint spread(uint place) {
    return place & ~0x7Cu | (place & 0x78u) >> 1 | (place & 4u) << 4;
}

// The first quad of an octet; the second one is 16 behind it.
uint first_quad(uint octet) {
    return octet + (octet & ~15u);
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

// Where a layer's keys and values are, behind its queries.
uint64_t keys_copy() {
    bool are_kept = KEPT_COLUMNS > 0 && entry[entry_at + SOURCE_AT].x != 0;
    return are_kept ? kept_copy(turn / LAYERS) - uint64_t(4 * PLANE(QKV_COLUMNS)) : copy_at;
}

void empty_kept(uint epoch) {
    uint first = gl_WorkGroupID.x * LANES + lane_index();
    [[dont_unroll]] for (uint i = first; i < KEPT_COLUMNS / 4; i += gl_NumWorkGroups.x * LANES) {
        MessageQuads(kept_copy(epoch + 1)).at[i] = uvec4(EMPTY);
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

// A quad of the low half of a row of q, k and v, and the one of the high half.
void input_pair(uint column, uint quad, out vec4 low, out vec4 high) {
    MessageQuads from = MessageQuads(column < HEADS * DIM ? copy_at : keys_copy());
    uint at = column / 4 + quad;
    uvec4 one = uvec4(EMPTY), two = one;
    for (uint looks = 0; is_empty(max(one, two)) && !gives_up(looks); looks++) {
        one = from.at[at];
        two = from.at[at + DIM / 8];
    }
    low = uintBitsToFloat(one);
    high = uintBitsToFloat(two);
}

#define values cached_values
// Read where they are needed: scalar registers are few.
#define q_gain Floats(entry[entry_at + Q_GAIN_AT])
#define k_gain Floats(entry[entry_at + Q_GAIN_AT + 1])
#define turns Turns(entry[entry_at + TURNS_AT])
#define k_column entry[entry_at + NEW_AT].x  // among the messages of q, k and v
#define v_column entry[entry_at + NEW_AT].y
#include "cache.glsl"
#include "attention.glsl"
#include "route.glsl"

const uint SLICES = LANES / 64;
const uint MOST_PARTS = OUT_PARTS > DOWN_PARTS ? OUT_PARTS : DOWN_PARTS;
// In their order. A stage that the model lacks has the number of another one, which comes first wherever one
// asks for both.
const uint QKV = 0, OUT = 1, GATE = 2, EXPERT_GATE = 3, DOWN = ACTIVE > 0 ? 4 : 3, EXPERT_DOWN = 5;
const uint TELL = 4, PROJECT = 5, ROUTE = 6;
const uint STAGES = TOLD + ACTIVE > 0 ? 6 : 4;

const uint HELD_VECTORS = HELD_TILES * INPUT_VECTORS;
const uint FLOAT_VECTORS = TOLD + ACTIVE > 0 ? (HIDDEN + 127) / 128 * 32 : 0;
shared uvec4 held[HELD_VECTORS > FLOAT_VECTORS ? HELD_VECTORS : FLOAT_VECTORS];
shared float partial[2 * 16 * SLICES * WIDTH];  // in turns
uint flip = 0;

#include "persistent_work.glsl"
#include "persistent_stream.glsl"
#include "persistent_inputs.glsl"
#include "persistent_kept.glsl"
#include "persistent_experts.glsl"
#include "persistent_products.glsl"
#include "persistent_attention.glsl"

void hold_part(uint stage) {
    if (stage == OUT && !JOINS) {
        hold_context(work.part * PART_HEADS);
    } else {
        bool is_experts = is_of_experts(work.step);
        if (is_experts) {
            share_experts();
        }
        work.last_tile = is_experts ? work.part_tiles : work.last_tile;
        uint mlp = HEADS_VARY ? entry[entry_at + ROWS_AT].x : INTERMEDIATE;
        uint place = stage == OUT ? CONTEXT_AT : is_experts ? EXPERTS_GATED_AT : GATED_AT;
        uint channels = stage == OUT ? HEADS * DIM : is_experts ? EXPERT_ROWS : mlp;
        hold_messages(place, channels, is_experts ? EXPERT_TILES : work.last_tile);
    }
    barrier();
}

bool is_kept(uint stage) {
    return TOLD > 0 && stage >= TELL;
}

void run_stage(uint stage, uint layer) {
    if (stage == OUT) {
        attend_layer();
        if (JOINS) {
            join_heads();
        }
        memoryBarrierBuffer();  // while others join
    }
    if (is_kept(stage) || ACTIVE > 0 && stage == GATE) {
        ask_kept(is_kept(stage) ? stage : ROUTE);
    }
    if (stage == QKV || stage == GATE || TOLD > 0 && stage == TELL) {
        join_stream(stage, layer);
        if (ACTIVE > 0 && stage == GATE) {
            score_experts();
        }
        hold_stream(stage, layer);
        barrier();
    }
    if (is_kept(stage)) {
        if (stage == PROJECT && kept.group < kept.groups) {
            hold_told();
        }
        multiply_kept(stage);
        return;
    }
    uint step = NEXT_LAYER * layer + stage;
    [[dont_unroll]] while (ahead.step == step && layer < LAYERS) {
        work = ahead;
        if (stage == OUT || stage == DOWN || ACTIVE > 0 && stage == EXPERT_DOWN) {
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
        entry[layer % ENTRIES * ENTRY + lane] = upcoming;
    }
}

// What `held` is behind the last layer.
void finish() {
    for (uint i = lane; i < HIDDEN_TILES * INPUT_VECTORS; i += LANES) {
        Vectors(next).at[i] = held[i];
    }
}

void enter_layer(uint layer, uint epoch) {
    turn = epoch * LAYERS + layer;
    entry_at = layer % ENTRIES * ENTRY;
    if (HEADS_VARY) {
        layer_dim = entry[entry_at + HEADS_AT].x;
        layer_kv_heads = entry[entry_at + HEADS_AT].y;
    }
    ask_entry(layer + 1);
}

// The first workgroup makes what stands behind the last layer, too.
void run_layers(uint epoch) {
    uint steps_ = STAGES * LAYERS + (gl_WorkGroupID.x == 0 ? 1 : 0);
    [[dont_unroll]] for (uint step = 0; step < steps_; step++) {
        uint layer = step / STAGES, stage = step % STAGES;
        if (stage == QKV) {
            enter_layer(layer, epoch);
        }
        run_stage(stage, layer);
        if (stage == QKV) {
            empty_copy();
        } else if (stage == OUT) {
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
    empty_kept(epoch);
    ask_entry(0);
    keep_entry(0);
    barrier();
    begin_work();
    run_layers(epoch);
    if (READS > 0 && max(most_ahead, word_ahead) == EMPTY) {
        ledger.read = EMPTY;
    }
    if (lane == 0) {
        uint before = atomicAdd(ledger.left, 1);
        if (before + 1 == gl_NumWorkGroups.x) {
            ledger.left = 0;
            ledger.epoch = epoch + 1;
        }
    }
}
