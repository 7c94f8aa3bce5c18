// The input of a linear. FLOAT_X: float32 in order. Otherwise 16-bit fixed point, each 32 channels
// with their own scale, as two signed bytes (value = 256 high + low): products with integer codes
// are then exact, and four of them are one instruction. A tile of 128 channels is
//
//     uvec4[2][4]  high bytes: half of the 32 channels, piece of 32
//     uvec4[2][4]  low bytes
//     float[4]     scale of each piece
//     int[4]       sum of each piece's values, for weights with a zero point

const float FULL = 32512.0;   // 127 * 256: the high byte of no value exceeds 127
const uint X_WORDS = 72;  // in a tile

uint packed_bytes(ivec4 v) {
    uvec4 b = uvec4(v) & 0xFFu;
    return b.x | b.y << 8 | b.z << 16 | b.w << 24;
}

// Store channels 4 * quad .. 4 * quad + 3. The eight lanes that share 32 channels call it together.
void store_fixed(Uints x, uint first_word, uint quad, vec4 v) {
    vec4 size = abs(v);
    float peak = team_max(max(max(size.x, size.y), max(size.z, size.w)), 8);
    ivec4 code = ivec4(round(v * (peak > 0.0 ? FULL / peak : 0.0)));
    ivec4 high = (code + 128) >> 8;
    float sum = team_sum(float(code.x + code.y + code.z + code.w), 8);  // exact: below 2^24
    uint word = quad % 8, piece = quad / 8 % 4, tile = first_word + quad / 32 * X_WORDS;
    uint place = tile + (word / 4 * 4 + piece) * 4 + word % 4;
    x.at[place] = packed_bytes(high);
    x.at[place + 32] = packed_bytes(code - (high << 8));
    if (word == 0) {
        x.at[tile + 64 + piece] = floatBitsToUint(peak / FULL);
        x.at[tile + 68 + piece] = uint(int(sum));
    }
}

void store_float(Uints x, uint first_word, uint quad, vec4 v) {
    uint place = first_word + 4 * quad;
    x.at[place] = floatBitsToUint(v.x);
    x.at[place + 1] = floatBitsToUint(v.y);
    x.at[place + 2] = floatBitsToUint(v.z);
    x.at[place + 3] = floatBitsToUint(v.w);
}

// 32-bit words of one column of activations with `tiles` of 128 channels.
uint column_words(uint tiles) {
    return FLOAT_X ? 128 * tiles : X_WORDS * tiles;
}

void store_activations(Uints x, uint first_word, uint quad, vec4 v) {
    if (FLOAT_X) {
        store_float(x, first_word, quad, v);
    } else {
        store_fixed(x, first_word, quad, v);
    }
}
