// The residual stream in persistent.comp, with the sums of norm.glsl in their order. Four lanes have the 32
// channels of a run, eight each, an octet. A lane makes a step for all of its octets before the next step:
// what takes long then is the steps, not the octets.

const uint OCTETS = HIDDEN / 8, RUNS = HIDDEN / 32, HIDDEN_TILES = (HIDDEN + 127) / 128;
const uint OWN = (OCTETS + LANES - 1) / LANES;  // octets of a lane
const uint OWN_QUADS = 2 * OWN;

shared float run_squares[(ACTIVE > 0 ? 4 : 2) * RUNS];  // of what joins, of the sum; of two branches before

vec4 h[OWN_QUADS], joining[OWN_QUADS];
vec4 branch_gains[OWN_QUADS], gains[OWN_QUADS];
vec4 others[OWN_QUADS];                           // the experts' outputs, which join the MLP's
vec4 first_gains[OWN_QUADS], second_gains[OWN_QUADS];  // of the router and of the experts; of what joins

uint own_octet(uint i) {
    return i * LANES + lane;
}

// Whether there is one; known where each lane has so many.
bool has_octet(uint i) {
    return (i + 1) * LANES <= OCTETS || own_octet(i) < OCTETS;
}

uint last_or_own(uint i) {
    return (i + 1) * LANES <= OCTETS ? own_octet(i) : min(own_octet(i), OCTETS - 1);
}

// Quads of the lane's octets; beyond the last octet they are the last one's again.
#define LOAD_OWN(to, from) \
    [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) { \
        to[k] = from.at[2 * last_or_own(k / 2) + k % 2]; \
    }

float squares_of(vec4 v) {
    precise float squares = v.x * v.x;
    squares += v.y * v.y;
    squares += v.z * v.z;
    squares += v.w * v.w;
    return squares;
}

void put_squares(vec4 v[OWN_QUADS], uint place) {
    float squares[OWN];
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        squares[i] = squares_of(v[2 * i]) + squares_of(v[2 * i + 1]);
    }
    [[unroll]] for (uint step = 1; step < 4; step *= 2) {
        [[unroll]] for (uint i = 0; i < OWN; i++) {
            squares[i] += subgroupShuffleXor(squares[i], step);
        }
    }
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        if (has_octet(i) && lane % 4 == 0) {
            run_squares[place * RUNS + own_octet(i) / 4] = squares[i];
        }
    }
}

void add_squares(vec4 v[OWN_QUADS], uint place) {
    put_squares(v, place);
    barrier();
}

// 1 / RMS, known to the whole workgroup.
float factor_of(uint place) {
    const uint loads = (RUNS + 7) / 8;
    float run[loads], total = 0.0;
    [[unroll]] for (uint k = 0; k < loads; k++) {
        uint last = 8 * k + 8 <= RUNS ? 8 * k + lane % 8 : min(8 * k + lane % 8, RUNS - 1);
        run[k] = run_squares[place * RUNS + last];
    }
    [[unroll]] for (uint k = 0; k < loads; k++) {
        total += 8 * k + 8 <= RUNS || 8 * k + lane % 8 < RUNS ? run[k] : 0.0;
    }
    precise float mean = team_sum(total, 8) / float(HIDDEN);
    mean = mean + EPS;
    return inversesqrt(mean);
}

// h += norm(joining), or + joining, all of it times `scale`.
void add_branch(float scale) {
    float factor = 1.0;
    if (POST_NORM) {
        add_squares(joining, 0);
        factor = factor_of(0);
    }
    [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) {
        precise vec4 sum = joining[k];
        if (POST_NORM) {
            sum = sum * factor;
            sum = sum * branch_gains[k];
        }
        sum = h[k] + sum;
        sum = sum * scale;
        h[k] = sum;
    }
}

// 1 / RMS of h.
float measure_stream() {
    add_squares(h, 1);
    return factor_of(1);
}

// Activations of COUNT octets of a lane, as products take them: `octet` of the first, LANES from one to the
// next; those from `end` on are not there. QUADS_ is 2 * COUNT by a name: so compilers know the type again.
#define DEFINE_HOLD(NAME, COUNT, QUADS_) \
    void NAME(uint octet, uint end, vec4 v[QUADS_]) { \
        float peak[COUNT]; \
        [[unroll]] for (uint i = 0; i < COUNT; i++) { \
            vec4 size = max(abs(v[2 * i]), abs(v[2 * i + 1])); \
            peak[i] = max(max(size.x, size.y), max(size.z, size.w)); \
        } \
        [[unroll]] for (uint step = 1; step < 4; step *= 2) { \
            [[unroll]] for (uint i = 0; i < COUNT; i++) { \
                peak[i] = max(peak[i], subgroupShuffleXor(peak[i], step)); \
            } \
        } \
        uvec4 word[COUNT]; \
        float scale[COUNT]; \
        [[unroll]] for (uint i = 0; i < COUNT; i++) { \
            ivec4 one = quantized(v[2 * i], peak[i], scale[i]), two = quantized(v[2 * i + 1], peak[i], scale[i]); \
            word[i] = words_of(one, two); \
        } \
        [[unroll]] for (uint i = 0; i < COUNT; i++) { \
            if (octet + i * LANES < end) { \
                hold_words(octet + i * LANES, word[i], scale[i]); \
            } \
        } \
    }

// High bytes of both, low bytes of both.
uvec4 words_of(ivec4 one, ivec4 two) {
    ivec4 high_one = INT8_X ? one : (one + 128) >> 8, high_two = INT8_X ? two : (two + 128) >> 8;
    uvec2 low = uvec2(packed_bytes(one), packed_bytes(two));
    return uvec4(packed_bytes(high_one), packed_bytes(high_two), low);
}

// Weights with zero points would need the sums, too.
void hold_words(uint octet, uvec4 words, float scale) {
    uint tile = octet / 16 * INPUT_VECTORS, piece = octet / 4 % 4, part = octet % 4;
    uint place = tile + part / 2 * 4 + piece, first = part % 2 * 2;
    held[place][first] = words.x;
    held[place][first + 1] = words.y;
    if (!INT8_X) {
        held[place + LOW_AT][first] = words.z;
        held[place + LOW_AT][first + 1] = words.w;
    }
    if (part == 0) {
        held[tile + SCALE_AT][piece] = floatBitsToUint(scale);
    }
}

DEFINE_HOLD(hold_own, OWN, OWN_QUADS)

const uint MOST_ON_WAY = 12;  // quads of messages
const uint DOWN_BRANCHES = DOWN_PARTS + (ACTIVE > 0 ? 1 : 0);  // the last one is the experts'
const uint BRANCHES = OUT_PARTS > DOWN_BRANCHES ? OUT_PARTS : DOWN_BRANCHES;
const uint ROOM = MOST_ON_WAY / OWN_QUADS > 0 ? MOST_ON_WAY / OWN_QUADS : 1;
const uint PARTS_ON_WAY = BRANCHES < ROOM ? BRANCHES : ROOM;
const uint ON_WAY = PARTS_ON_WAY * OWN_QUADS;

// Loads an octet of messages again, as long as one is missing.
void look_octet(MessageQuads from, uint octet, inout uvec4 one, inout uvec4 two) {
    if (is_empty(max(one, two))) {
        one = from.at[first_quad(octet)];
        two = from.at[first_quad(octet) + 16];
    }
}

// Adds what joins the lane's octets: of all parts, those from `first` on; behind them `others`, if there are such.
void receive_parts(MessageQuads from, uint first, uint parts, bool has_others) {
    uvec4 v[ON_WAY];
    bool is_missing[ON_WAY / 2];
    [[unroll]] for (uint k = 0; k < ON_WAY; k++) {
        v[k] = uvec4(0);
        is_missing[k / 2] = first + k / OWN_QUADS < parts + uint(has_others);
    }
    bool waits = true;
    for (uint looks = 0; waits && !gives_up(looks); looks++) {
        [[unroll]] for (uint k = 0; k < ON_WAY; k += 2) {
            uint octet = last_or_own(k % OWN_QUADS / 2), part = first + k / OWN_QUADS;
            bool is_other = has_others && part == parts;
            uint plane = is_other ? (BESIDE_BRANCH_AT - DOWN_AT) / 8 : part * (PLANE(HIDDEN) / 8);
            if (is_missing[k / 2]) {
                v[k] = from.at[first_quad(plane + octet)];
                v[k + 1] = from.at[first_quad(plane + octet) + 16];
            }
        }
        waits = false;
        [[unroll]] for (uint k = 0; k < ON_WAY; k += 2) {
            is_missing[k / 2] = is_empty(max(v[k], v[k + 1]));
            waits = waits || is_missing[k / 2];
        }
        if (waits) {
            read_ahead();
        }
    }
    [[unroll]] for (uint k = 0; k < ON_WAY; k++) {  // + 0 where there is no such part
        uint part = first + k / OWN_QUADS;
        precise vec4 sum = joining[k % OWN_QUADS] + uintBitsToFloat(v[k]);
        joining[k % OWN_QUADS] = ACTIVE == 0 || part < parts ? sum : joining[k % OWN_QUADS];
        if (ACTIVE > 0) {
            others[k % OWN_QUADS] = part == parts ? uintBitsToFloat(v[k]) : others[k % OWN_QUADS];
        }
    }
}

void receive_branch(uint64_t copy, uint place, uint parts, bool has_others) {
    MessageQuads from = MessageQuads(copy + 4 * place);
    if (PARTS_ON_WAY == BRANCHES) {
        receive_parts(from, 0, parts, has_others);
    } else {
        [[dont_unroll]] for (uint first = 0; first < parts + uint(has_others); first += PARTS_ON_WAY) {
            receive_parts(from, first, parts, has_others);
        }
    }
}

// What joins is norm(joining) + norm(others), of the MLP's output and the experts'.
void join_others() {
    put_squares(joining, 2);
    put_squares(others, 3);
    barrier();
    float own_factor = factor_of(2), others_factor = factor_of(3);
    [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) {
        precise vec4 own = joining[k] * own_factor * first_gains[k];
        precise vec4 sum = own + others[k] * others_factor * second_gains[k];
        joining[k] = sum;
    }
}

// What joins the residual stream in front of `stage`.
void receive(uint stage) {
    bool enters = stage == QKV, is_told = TOLD > 0 && enters;
    uint64_t copy = enters ? copy_of(turn - 1) : copy_at;
    uint place = stage == GATE ? OUT_AT : is_told ? BESIDE_BRANCH_AT : DOWN_AT;
    receive_branch(copy, place, stage == GATE ? OUT_PARTS : is_told ? 1 : DOWN_PARTS, ACTIVE > 0 && enters);
    if (ACTIVE > 0 && enters) {
        join_others();
    }
}

float stream_factor;  // of the last norm

// The residual stream in front of a layer, of its MLP or of its per-layer gate, which has no norm, and behind
// the last layer. Nothing joins the embedding.
void join_stream(uint stage, uint layer) {
    bool is_plain = TOLD > 0 && stage == TELL;
    uint gains_at = entry_at + GAINS_AT + stage;  // 0, 2 or 4
    Quads branch_gain = Quads(entry[gains_at]), gain = Quads(entry[is_plain ? gains_at : gains_at + 1]);
    if (OWN < 3) {  // otherwise there are no registers for what is not needed yet
        if (POST_NORM) {
            LOAD_OWN(branch_gains, branch_gain)
        }
        LOAD_OWN(gains, gain)
    }
    if (ACTIVE > 0) {
        uint others_at = entry_at + EXPERT_GAINS_AT + (stage == GATE ? 0 : 2);
        Quads first_gain = Quads(entry[others_at]), second_gain = Quads(entry[others_at + 1]);
        LOAD_OWN(first_gains, first_gain)
        LOAD_OWN(second_gains, second_gain)
    }
    [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) {
        joining[k] = vec4(0.0);
        if (ACTIVE > 0) {
            others[k] = vec4(0.0);  // so that compilers do not keep the last ones
        }
    }
    if (layer > 0 || stage != QKV) {
        receive(stage);
    }
    if (OWN >= 3) {
        if (POST_NORM) {
            LOAD_OWN(branch_gains, branch_gain)
        }
        LOAD_OWN(gains, gain)
    }
    add_branch(HEADS_VARY && stage == QKV ? uintBitsToFloat(entry[entry_at + FACTOR_AT].x) : 1.0);
    stream_factor = is_plain ? 1.0 : measure_stream();
}

void hold_floats(vec4 y[OWN_QUADS]) {
    [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) {
        if (own_octet(k / 2) < 16 * HIDDEN_TILES) {
            held[2 * own_octet(k / 2) + k % 2] = floatBitsToUint(y[k]);
        }
    }
}

#define NORMED(y, by) \
    vec4 y[OWN_QUADS]; \
    [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) { \
        precise vec4 normed_ = h[k] * stream_factor; \
        normed_ = normed_ * by[k]; \
        y[k] = has_octet(k / 2) ? normed_ : vec4(0.0); \
    }

void hold_stream(uint stage, uint layer) {
    if (TOLD > 0 && stage == TELL) {
        vec4 y[OWN_QUADS];
        [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) {
            y[k] = has_octet(k / 2) ? h[k] : vec4(0.0);
        }
        hold_floats(y);
        return;
    }
    // Of the MLP, and behind it of the experts.
    [[dont_unroll]] for (uint input_ = 0; input_ < (ACTIVE > 0 && stage == GATE ? 2 : 1); input_++) {
        vec4 own_gains[OWN_QUADS];
        [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) {
            own_gains[k] = input_ == 0 ? gains[k] : second_gains[k];
        }
        NORMED(z, own_gains)
        hold_own(lane + input_ * 16 * HIDDEN_TILES, (1 + input_) * 16 * HIDDEN_TILES, z);  // the padding too
    }
    NORMED(y, gains)
    if (layer == LAYERS) {
        [[unroll]] for (uint k = 0; k < OWN_QUADS; k++) {
            if (has_octet(k / 2)) {
                normed.at[2 * own_octet(k / 2) + k % 2] = y[k];
            }
        }
    }
}
