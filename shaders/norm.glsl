// The residual stream: hidden += norm(branch), then the activations of norm(hidden).
// A workgroup holds a column in registers, ITEMS vectors of four channels in each invocation. Nothing is
// fused (`precise`): a column has the same bits in every kernel that has the same LANES.

layout(constant_id = 4) const uint ITEMS = 1;
layout(constant_id = 5) const uint HIDDEN = 4;
layout(constant_id = 6) const float EPS = 1e-6;
layout(constant_id = 7) const bool POST_NORM = false;  // the branch has a norm of its own
layout(constant_id = 8) const bool KEEP_NORMED = false;  // also as float32, for the caller

const uint HIDDEN_QUADS = HIDDEN / 4;
const uint HIDDEN_TILES = (HIDDEN + 127) / 128;

float rms_factor(vec4 h[ITEMS]) {
    precise float total = 0.0;
    for (uint i = 0; i < ITEMS; i++) {
        precise vec4 square = h[i] * h[i];
        total += square.x + square.y + square.z + square.w;
    }
    return inversesqrt(workgroup_sum(total) / float(HIDDEN) + EPS);
}

void load_column(Quads from, uint column, out vec4 h[ITEMS]) {
    for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        h[i] = quad < HIDDEN_QUADS ? from.at[column * HIDDEN_QUADS + quad] : vec4(0.0);
    }
}

void store_norm(vec4 h[ITEMS], uint column, Quads gain, Quads normed, Uints x) {
    float factor = rms_factor(h);
    for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < HIDDEN_QUADS) {
            vec4 y = h[i] * factor * gain.at[quad];
            if (KEEP_NORMED) {
                normed.at[column * HIDDEN_QUADS + quad] = y;
            }
            store_activations(x, column * column_words(HIDDEN_TILES), quad, y);
        }
    }
}

void add_and_norm(
    uint column, Quads branch, Quads hidden, Quads branch_gain, Quads gain, Quads normed, Uints x
) {
    vec4 b[ITEMS], h[ITEMS];
    load_column(branch, column, b);
    load_column(hidden, column, h);
    float factor = POST_NORM ? rms_factor(b) : 1.0;
    for (uint i = 0; i < ITEMS; i++) {
        uint quad = i * LANES + lane_index();
        if (quad < HIDDEN_QUADS) {
            precise vec4 sum = h[i] + b[i] * factor * (POST_NORM ? branch_gain.at[quad] : vec4(1.0));
            h[i] = sum;
            hidden.at[column * HIDDEN_QUADS + quad] = h[i];
        }
    }
    store_norm(h, column, gain, normed, x);
}
