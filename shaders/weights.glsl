// A lane's piece of an `igpu` tile: 32 channels of one row (formats/README.md, section 5).
//
// WEIGHT is INT4, INT5, INT6 or INT8, with ZERO_POINT 0 or 1, and GROUP channels to a scale; or F16,
// BF16 or F32, in panels of 64 loads of 16 bytes like the codes. Lane L = 4 * row + piece. A scale is a
// float16, or, where SCALE_BITS is 8, a signed byte in steps of its row, float16 behind the row block's
// tiles; the product is exact, so nothing that is computed depends on which it is.

#define INT4 4
#define INT5 5
#define INT6 6
#define INT8 8
#define F16 16
#define BF16 17
#define F32 32
#ifndef ZERO_POINT
#define ZERO_POINT 0
#endif

#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

#if WEIGHT <= INT8
#include "layouts.glsl"
layout(constant_id = 19) const uint SCALE_BITS = 16;
const bool FLOAT_X = false;
const uint PANELS = WEIGHT == INT8 ? 2 : 1;
const float UNIT = 1.0 / float(1 << (8 - WEIGHT));  // codes are unpacked into the tops of bytes
const uint HIGH_VECTORS = HIGH_OFFSET(WEIGHT, GROUP, SCALE_BITS) / 16;
const uint SCALE_VECTORS = SCALES_OFFSET(WEIGHT, GROUP, SCALE_BITS) / 16;
const uint ZERO_VECTORS = TILE_BYTES(WEIGHT, GROUP, SCALE_BITS) / 16;
const uint STEP_VECTORS = STEPS_BYTES(WEIGHT, GROUP, SCALE_BITS) / 16;
const uint WORD_SCALES = 32 / SCALE_BITS;  // scales in a word
const uint TILE_VECTORS = ZERO_VECTORS + ZERO_POINT * (GROUP == 32 ? 2 : 1);
#else
const bool FLOAT_X = true;
const uint PANELS = WEIGHT == F32 ? 8 : 4;
const uint TILE_VECTORS = 64 * PANELS;
const uint STEP_VECTORS = 0;
#endif

#include "activations.glsl"

#ifdef INTEGER_DOT
#extension GL_EXT_integer_dot_product : require
int dot_bytes(uint a, uint b) {
    return dotPacked4x8EXT(int(a), int(b));
}
#else
int dot_bytes(uint a, uint b) {
    int total = 0;
    for (int i = 0; i < 32; i += 8) {
        total += bitfieldExtract(int(a), i, 8) * bitfieldExtract(int(b), i, 8);
    }
    return total;
}
#endif

// As they are loaded: whoever waits for a piece would wait for all that is made of it, too.
struct Piece {
    uvec4 panel[PANELS];
    uvec2 high;
    uint scales;  // of two or four groups
    uint zeros;   // of eight groups
    uint group;   // the piece's
    float unit;   // of its scale, and of its codes
};

layout(buffer_reference, std430, buffer_reference_align = 4) readonly restrict buffer Singles {
    uint at[];
};

// An address that all lanes share, and the bytes by which each is behind it: instructions add the two,
// where an index would become 64 bits wide in every lane, and be multiplied and added there.
Words behind(uint64_t base, uint bytes) {
    return Words(base + uint64_t(bytes));
}

Singles singles_behind(uint64_t base, uint bytes) {
    return Singles(base + uint64_t(bytes));
}

// Address of a row block of `tiles` tiles.
uint64_t block_address(Words weights, uint block, uint tiles) {
    return uint64_t(weights) + uint64_t(block) * uint64_t(16 * (tiles * TILE_VECTORS + STEP_VECTORS));
}

// The steps of the scales of two rows, of which `row` is one, of the row block at `rows`, as they are loaded.
uint load_steps(uint64_t rows, uint tiles, uint row) {
#if WEIGHT > INT8
    return 0;
#else
    return SCALE_BITS == 16 ? 0 : singles_behind(rows, 16 * tiles * TILE_VECTORS + row / 2 * 4).at[0];
#endif
}

// `unit` of the pieces of a row, of what `load_steps` has loaded.
float unit_of(uint steps, uint row) {
#if WEIGHT > INT8
    return 1.0;
#else
    return SCALE_BITS == 16 ? UNIT : unpackHalf2x16(steps >> 16 * (row % 2)).x * UNIT;
#endif
}

// `unit` of the pieces of a row, 0 .. 15, of the row block at `rows`.
float load_unit(uint64_t rows, uint tiles, uint row) {
    return unit_of(load_steps(rows, tiles, row), row);
}

// `lane` of a tile of the row block at `rows`; `unit` is its row's.
Piece load_piece(uint64_t rows, uint tile, uint lane, float unit) {
    Piece piece;
    piece.unit = unit;
    uint place = 16 * TILE_VECTORS * tile;
    Words codes_ = behind(rows, place + 16 * lane);
    [[unroll]] for (uint i = 0; i < PANELS; i++) {
        piece.panel[i] = codes_.at[64 * i];
    }
#if WEIGHT == INT5
    piece.high.x = singles_behind(rows, place + 4 * lane).at[4 * HIGH_VECTORS];
#elif WEIGHT == INT6
    Singles high = singles_behind(rows, place + 8 * lane);
    piece.high = uvec2(high.at[4 * HIGH_VECTORS], high.at[4 * HIGH_VECTORS + 1]);
#endif
#if WEIGHT <= INT8
    piece.group = lane / (GROUP / 32);
    uint scales = 4 * (piece.group / WORD_SCALES);
    piece.scales = singles_behind(rows, place + scales).at[4 * SCALE_VECTORS];
#endif
#if ZERO_POINT
    uint zeros = 4 * (piece.group / 8);
    piece.zeros = singles_behind(rows, place + zeros).at[4 * ZERO_VECTORS];
#endif
    return piece;
}

#if WEIGHT <= INT8
float scale_of(Piece piece) {
    if (SCALE_BITS == 16) {
        return unpackHalf2x16(piece.scales >> 16 * (piece.group % 2)).x * piece.unit;
    }
    return float(bitfieldExtract(int(piece.scales), int(8 * (piece.group % 4)), 8)) * piece.unit;
}

// In units like the codes.
int zero_of(Piece piece) {
    return bitfieldExtract(int(piece.zeros), int(piece.group % 8 * 4), 4) * 16;
}

// Codes of channels 0 .. 15 (half 0) or 16 .. 31, four in a word, in units of 1 / UNIT.
uvec4 codes(Piece piece, uint half_) {
#if WEIGHT == INT8
    return piece.panel[half_];
#else
    uvec2 w = half_ == 0 ? piece.panel[0].xy : piece.panel[0].zw;
    uvec4 low = uvec4(w.x, w.x >> 4, w.y, w.y >> 4) & 0x0F0F0F0Fu;
#if WEIGHT == INT4
    return uvec4(w.x << 4, w.x, w.y << 4, w.y) & 0xF0F0F0F0u;
#elif WEIGHT == INT5
    uvec4 high = (uvec4(piece.high.x >> 4 * half_) >> uvec4(0, 1, 2, 3)) & 0x01010101u;
    return low << 3 | high << 7;
#else
    uvec4 high = (uvec4(piece.high[half_]) >> uvec4(0, 2, 4, 6)) & 0x03030303u;
    return low << 2 | high << 6;
#endif
#endif
}

// Channels 4 * i .. 4 * i + 3 of the piece.
vec4 values(Piece piece, uint i) {
    int word = int(codes(piece, i / 4)[i % 4]);
    ivec4 code = ivec4(word << 24, word << 16, word << 8, word) >> 24;
#if ZERO_POINT
    code -= zero_of(piece);
#endif
    return vec4(code) * scale_of(piece);
}

struct Input {
    uvec4 high[2], low[2];
    float scale;
    int sum;
};

// `at` are vectors of activations, in a buffer or in shared memory. INT8_X has no low bytes: nobody
// looks at what stands for them.
const uint LOW_AT = INT8_X ? 0 : LOW_WORDS / 4, SCALE_AT = SCALE_WORDS / 4;
#define INPUT(at, base, piece) Input( \
    uvec4[2](at[base + piece], at[base + 4 + piece]), \
    uvec4[2](at[base + LOW_AT + piece], at[base + LOW_AT + 4 + piece]), \
    uintBitsToFloat(at[base + SCALE_AT][piece]), int(at[base + SCALE_AT + 1][piece]))
const uint INPUT_VECTORS = X_WORDS / 4;  // of a tile

// Piece 0 .. 3 of tile `tile` of the column of activations at `column`.
Input load_input(uint64_t column, uint tile, uint piece) {
    Words bytes = behind(column, 16 * (tile * INPUT_VECTORS + piece));
    Singles scale = singles_behind(column, 16 * tile * INPUT_VECTORS + 4 * piece);
    return Input(
        uvec4[2](bytes.at[0], bytes.at[4]),
        uvec4[2](bytes.at[LOW_AT], bytes.at[LOW_AT + 4]),
        uintBitsToFloat(scale.at[4 * SCALE_AT]), int(scale.at[4 * SCALE_AT + 4]));
}

int dot_vectors(uvec4 a, uvec4 b) {
    return dot_bytes(a.x, b.x) + dot_bytes(a.y, b.y) + dot_bytes(a.z, b.z) + dot_bytes(a.w, b.w);
}

// Exact in 32-bit integers: 32 codes of 8 bits times 16-bit values stay below 2^31.
float multiply(Piece piece, Input y) {
    uvec4 first = codes(piece, 0), second = codes(piece, 1);
    int total = dot_vectors(first, y.high[0]) + dot_vectors(second, y.high[1]);
    if (!INT8_X) {
        total = 256 * total + dot_vectors(first, y.low[0]) + dot_vectors(second, y.low[1]);
    }
#if ZERO_POINT
    total -= zero_of(piece) * y.sum;
#endif
    precise float product = float(total) * (scale_of(piece) * y.scale);
    return product;
}
#else
struct Input {
    uvec4 quad[8];
};

#define INPUT(at, base, piece) Input(uvec4[8]( \
    at[base + 8 * piece], at[base + 8 * piece + 1], at[base + 8 * piece + 2], \
    at[base + 8 * piece + 3], at[base + 8 * piece + 4], at[base + 8 * piece + 5], \
    at[base + 8 * piece + 6], at[base + 8 * piece + 7]))
const uint INPUT_VECTORS = 32;  // of a tile

Input load_input(uint64_t column, uint tile, uint piece) {
    Words x = behind(column, 16 * (tile * INPUT_VECTORS + 8 * piece));
    return INPUT(x.at, 0, 0);
}

// Channels 4 * i .. 4 * i + 3 of the piece.
vec4 values(Piece piece, uint i) {
#if WEIGHT == F32
    return uintBitsToFloat(piece.panel[i]);
#else
    uvec2 w = i % 2 == 0 ? piece.panel[i / 2].xy : piece.panel[i / 2].zw;
#if WEIGHT == F16
    return vec4(unpackHalf2x16(w.x), unpackHalf2x16(w.y));
#else
    return uintBitsToFloat(uvec4(w.x << 16, w.x & 0xFFFF0000u, w.y << 16, w.y & 0xFFFF0000u));
#endif
#endif
}

float multiply(Piece piece, Input y) {
    precise vec4 total = vec4(0.0);
    [[unroll]] for (uint i = 0; i < 8; i++) {
        total = fma(values(piece, i), uintBitsToFloat(y.quad[i]), total);
    }
    precise float sum = total.x + total.y + total.z + total.w;
    return sum;
}
#endif

// Address of a column of activations with `tiles` tiles.
uint64_t column_address(Words x, uint column, uint tiles) {
    return uint64_t(x) + uint64_t(column) * uint64_t(16 * tiles * INPUT_VECTORS);
}
