#version 460
#extension GL_GOOGLE_include_directive : require
// Residual streams with alternating updates: what happens to all of them between layers, and in front of
// the first and behind the last. One workgroup for a column.
//
// TELL:   streams behind the first one += norm(branch)
// ENTER:  streams += mixture of all; hidden = the active one, of which a layer makes another hidden
// LEAVE:  streams += share of (hidden - the active one); plain = scale * the active one
// SPREAD: the first stream = hidden; the others, each brought to its size; then as ENTER
// GATHER: hidden = mean of the first stream and of the others' projections, each brought to its size
//
// Mixture and shares are linear in STREAMS numbers in -1 .. 1, of what the active stream is like.
#include "common.glsl"
layout(constant_id = 1) const uint STREAMS = 2;
layout(constant_id = 2) const uint ACTIVE = 0;
layout(constant_id = 3) const uint MODE = 0;
#include "norm.glsl"

const uint ENTER = 0;
const uint LEAVE = 1;
const uint TELL_AND_ENTER = 2;
const uint TELL = 3;
const uint SPREAD = 4;
const uint GATHER = 5;

layout(push_constant) uniform Push {
    Quads streams;  // (stream, column, HIDDEN); GATHER: its first is the stream, the others projections
    Quads hidden;   // (column, HIDDEN)
    Quads branch;   // (part, column, HIDDEN), whose sum counts
    Quads branch_gain, router_gain, router;  // router: (STREAMS, HIDDEN)
    Floats coefficients;                     // ENTER: (to, from, STREAMS); LEAVE: (to, STREAMS)
    Quads scale;
    Quads plain;  // (column, HIDDEN padded to 128)
};

const float LEAST_SQUARE = 1e-5;

vec4 own[STREAMS * ITEMS];
vec4 state_of[ITEMS];  // the layer's hidden state
float modality[STREAMS];
float of_streams[STREAMS];  // what `sum_streams` adds up
shared float stream_totals[STREAMS * LANES / 8];

// Sums of `of_streams` over the workgroup, known to all of it. Every invocation must call it.
void sum_streams() {
    const uint teams = LANES / 8;
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        float total = team_sum(of_streams[s], 8);
        if (lane_index() % 8 == 0) {
            stream_totals[s * teams + lane_index() / 8] = total;
        }
    }
    barrier();
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        float total = 0.0;
        for (uint i = lane_index() % 8; i < teams; i += 8) {
            total += stream_totals[s * teams + i];
        }
        of_streams[s] = team_sum(total, 8);
    }
    barrier();
}

uint stream_place(uint stream, uint quad) {
    return (stream * gl_NumWorkGroups.x + gl_WorkGroupID.x) * HIDDEN_QUADS + quad;
}

uint quad_of(uint i) {
    return i * LANES + lane_index();
}

void load_streams() {
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        [[unroll]] for (uint i = 0; i < ITEMS; i++) {
            own[s * ITEMS + i] = quad_or_zero(streams, stream_place(s, 0), quad_of(i));
        }
    }
}

void store_streams() {
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        [[unroll]] for (uint i = 0; i < ITEMS; i++) {
            if (quad_of(i) < HIDDEN_QUADS) {
                streams.at[stream_place(s, quad_of(i))] = own[s * ITEMS + i];
            }
        }
    }
}

void load_state(Quads from) {
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        state_of[i] = quad_or_zero(from, gl_WorkGroupID.x * HIDDEN_QUADS, quad_of(i));
    }
}

void store_hidden(uint i, vec4 v) {
    if (quad_of(i) < HIDDEN_QUADS) {
        hidden.at[gl_WorkGroupID.x * HIDDEN_QUADS + quad_of(i)] = v;
    }
}

// Sum of the squares of `state_of`, known to the whole workgroup.
float squares() {
    float total = 0.0;
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        total += dot(state_of[i], state_of[i]);
    }
    return workgroup_sum(total);
}

// modality = tanh(router norm(state_of) / HIDDEN).
void find_modalities() {
    float factor = inversesqrt(squares() / float(HIDDEN) + EPS) / float(HIDDEN);
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        float total = 0.0;
        [[unroll]] for (uint i = 0; i < ITEMS; i++) {
            vec4 x = state_of[i] * quad_or_zero(router_gain, 0, quad_of(i));
            total += factor * dot(x, quad_or_zero(router, s * HIDDEN_QUADS, quad_of(i)));
        }
        of_streams[s] = total;
    }
    sum_streams();
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        modality[s] = 1.0 - 2.0 / (exp(2.0 * of_streams[s]) + 1.0);  // tanh, without an overflow
    }
}

float coefficient(uint row) {
    float total = 0.0;
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        total += coefficients.at[row * STREAMS + s] * modality[s];
    }
    return total;
}

void tell() {
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        state_of[i] = vec4(0.0);
        [[unroll]] for (uint p = 0; p < PARTS; p++) {
            uint row = p * gl_NumWorkGroups.x + gl_WorkGroupID.x;
            state_of[i] += quad_or_zero(branch, row * HIDDEN_QUADS, quad_of(i));
        }
    }
    float factor = inversesqrt(squares() / float(HIDDEN) + EPS);
    [[unroll]] for (uint s = 1; s < STREAMS; s++) {
        [[unroll]] for (uint i = 0; i < ITEMS; i++) {
            own[s * ITEMS + i] += factor * state_of[i] * quad_or_zero(branch_gain, 0, quad_of(i));
        }
    }
}

void enter() {
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        state_of[i] = own[ACTIVE * ITEMS + i];
    }
    find_modalities();
    vec4 before[STREAMS * ITEMS];
    [[unroll]] for (uint i = 0; i < STREAMS * ITEMS; i++) {
        before[i] = own[i];
    }
    [[unroll]] for (uint to = 0; to < STREAMS; to++) {
        [[unroll]] for (uint from = 0; from < STREAMS; from++) {
            float c = coefficient(to * STREAMS + from);
            [[unroll]] for (uint i = 0; i < ITEMS; i++) {
                own[to * ITEMS + i] += c * before[from * ITEMS + i];
            }
        }
    }
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        store_hidden(i, own[ACTIVE * ITEMS + i]);
    }
}

void leave() {
    load_state(hidden);
    find_modalities();
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        vec4 moved = state_of[i] - own[ACTIVE * ITEMS + i];
        [[unroll]] for (uint s = 0; s < STREAMS; s++) {
            own[s * ITEMS + i] += (1.0 + coefficient(s)) * moved;
        }
        uint quad = quad_of(i), place = gl_WorkGroupID.x * 32 * HIDDEN_TILES + quad;
        if (quad < HIDDEN_QUADS) {
            plain.at[place] = own[ACTIVE * ITEMS + i] * scale.at[quad];
        }
    }
}

// The streams behind the first one get the size of `state_of`.
void bring_to_size() {
    float size = squares() / float(HIDDEN);
    [[unroll]] for (uint s = 0; s < STREAMS; s++) {
        of_streams[s] = 0.0;
        [[unroll]] for (uint i = 0; i < ITEMS; i++) {
            of_streams[s] += dot(own[s * ITEMS + i], own[s * ITEMS + i]);
        }
    }
    sum_streams();
    [[unroll]] for (uint s = 1; s < STREAMS; s++) {
        float square = max(of_streams[s] / float(HIDDEN), LEAST_SQUARE);
        [[unroll]] for (uint i = 0; i < ITEMS; i++) {
            own[s * ITEMS + i] *= sqrt(size / square);
        }
    }
}

void gather() {
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        state_of[i] = own[i];
    }
    bring_to_size();
    [[unroll]] for (uint i = 0; i < ITEMS; i++) {
        vec4 total = vec4(0.0);
        [[unroll]] for (uint s = 0; s < STREAMS; s++) {
            total += own[s * ITEMS + i];
        }
        store_hidden(i, total / float(STREAMS));
    }
}

void main() {
    load_streams();
    if (MODE == GATHER) {
        gather();
        return;
    }
    if (MODE == SPREAD) {
        load_state(hidden);
        bring_to_size();
        [[unroll]] for (uint i = 0; i < ITEMS; i++) {
            own[i] = state_of[i];
        }
    }
    if (MODE == TELL || MODE == TELL_AND_ENTER) {
        tell();
    }
    if (MODE == ENTER || MODE == TELL_AND_ENTER || MODE == SPREAD) {
        enter();
    }
    if (MODE == LEAVE) {
        leave();
    }
    store_streams();
}
