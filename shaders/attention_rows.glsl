// What attention.glsl makes of the queries, and, in the split that appends, of the new key and value. A lane has
// a quad of the low half of a row, and that of the high half which RoPE turns with it: norms need one barrier,
// RoPE none. All rows at once need (QUERIES + 2) * ROW_LANES lanes.

uint own_row() {
    return over(lane, ROW_LANES);
}

uint own_quad() {
    return rest(lane, ROW_LANES);
}

// What turns the lane's pairs of channels, on its way early: fine and coarse angles, gains of q or k.
vec4 fine[2], coarse[2], low_gain, high_gain;

void load_turns() {
    uint quad = min(own_quad(), VECTORS - 1), half_ = DIM / 2;
    Quads angles = Quads(turns);
    [[unroll]] for (uint i = 0; i < 2; i++) {
        fine[i] = angles.at[position % 256 * (half_ / 2) + 2 * quad + i];
        coarse[i] = angles.at[(256 + position / 256) * (half_ / 2) + 2 * quad + i];
    }
    if (QK_NORM) {
        Quads gains_ = Quads(own_row() < QUERIES ? q_gain : k_gain);
        low_gain = gains_.at[quad];
        high_gain = gains_.at[quad + VECTORS];
    }
}

// 1 / RMS of the lane's row.
float row_factor(vec4 low, vec4 high) {
    float total = team_sum(dot_onto(high, high, dot_onto(low, low, 0.0)), 8);
    if (lane % 8 == 0) {
        squares[lane / 8] = total;
    }
    barrier();
    uint first = own_row() * (ROW_LANES / 8);
    precise float mean = 0.0;
    [[unroll]] for (uint i = 0; i < (MOST_VECTORS + 7) / 8; i++) {
        float part = squares[first + i];
        mean += i < ROW_LANES / 8 ? part : 0.0;
    }
    mean = mean / float(DIM);
    mean = mean + EPS;
    return inversesqrt(mean);
}

// RoPE. Component i turns with component i + DIM / 2; the angle of a position is that of its multiple of 256
// and that of the rest.
void turn_pair(inout vec4 low, inout vec4 high) {
    vec4 fine_c = vec4(fine[0].xz, fine[1].xz), fine_s = vec4(fine[0].yw, fine[1].yw);
    vec4 coarse_c = vec4(coarse[0].xz, coarse[1].xz), coarse_s = vec4(coarse[0].yw, coarse[1].yw);
    precise vec4 c = fine_c * coarse_c - fine_s * coarse_s;
    precise vec4 s = fine_s * coarse_c + fine_c * coarse_s;
    precise vec4 turned_low = low * c - high * s, turned_high = high * c + low * s;
    low = turned_low;
    high = turned_high;
}

// The lane's quads of the new key or value, to the cache, where no other token of the window lies, and to
// shared memory: nobody reads them from the cache in this dispatch.
void append_quad(uint quad, vec4 v, bool is_value) {
    uint row = cache_row(new_slot);
    Uints to = Uints(is_value ? uvec2(values) : uvec2(keys));
    Floats to_scales = Floats(is_value ? uvec2(value_scales) : uvec2(key_scales));
    fresh[is_value ? 1 : 0][quad] = store_quad(to, to_scales, row, quad, v);
}

void append_rows() {
    [[dont_unroll]] for (uint i = lane; i < 2 * QUADS; i += LANES) {
        bool is_value = i >= QUADS;
        uint quad = is_value ? i - QUADS : i;
        append_quad(quad, rows[(is_value ? QUERIES + 1 : QUERIES) * QUADS + quad_place(quad)], is_value);
    }
    barrier();
}

// The workgroup's queries, and with `appends` the new key and value, as attention takes them.
void prepare(uint block, bool appends) {
    if (MODE != ATTEND) {
        load_turns();
    }
    uint row = own_row(), quad = own_quad();
    bool is_query = row < QUERIES, is_value = row > QUERIES;
    bool is_there = row < (appends ? QUERIES + 2 : QUERIES) && quad < VECTORS;
    vec4 low = vec4(0.0), high = vec4(0.0);
    if (is_there) {
        uint column = is_query ? (block * QUERIES + row) * DIM : (is_value ? v_column : k_column) + head * DIM;
        input_pair(column, quad, low, high);
    }
    if (MODE != ATTEND) {
        if (QK_NORM || VALUE_NORM) {
            float factor = row_factor(low, high);
            bool has_norm = is_value ? VALUE_NORM : QK_NORM;
            precise vec4 low_factor = vec4(has_norm ? factor : 1.0), high_factor = low_factor;
            if (QK_NORM && !is_value) {
                low_factor *= low_gain;
                high_factor *= high_gain;
            }
            low *= low_factor;
            high *= high_factor;
        }
        if (!is_value) {
            turn_pair(low, high);
        }
    }
    if (is_there && (is_query || STORES_ROWS)) {
        rows[row * QUADS + quad_place(quad)] = low;
        rows[row * QUADS + quad_place(quad + VECTORS)] = high;
    } else if (is_there) {
        [[dont_unroll]] for (uint i = 0; i < 2; i++) {
            append_quad(quad + i * VECTORS, i == 0 ? low : high, is_value);
        }
    }
    barrier();
    if (STORES_ROWS && appends) {
        append_rows();
    }
}
