// The input of a linear. FLOAT_X: float32 in order. Otherwise integers, each 32 channels with their own
// scale: products with integer codes are then exact, and four of them are one instruction. They have
// 16 bits, as two signed bytes (value = 256 high + low), or with INT8_X 8 bits, the high bytes alone. A
// tile of 128 channels is
//
//     uvec4[2][4]  high bytes: half of the 32 channels, piece of 32
//     uvec4[2][4]  low bytes, not with INT8_X
//     float[4]     scale of each piece
//     int[4]       sum of each piece's values, for weights with a zero point

layout(constant_id = 20) const bool INT8_X = false;

const float FULL = 32512.0;   // 127 * 256: the high byte of no value exceeds 127
const uint X_WORDS = INT8_X ? 40 : 72;  // in a tile
const uint LOW_WORDS = 32;
const uint SCALE_WORDS = X_WORDS - 8;

uint packed_bytes(ivec4 v) {
    uvec4 b = uvec4(v) & 0xFFu;
    return b.x | b.y << 8 | b.z << 16 | b.w << 24;
}

// To even. Behind the sum with a float that counts in ones, the low bits are the integer: conversions take a
// quarter of the rate of sums, or less.
ivec4 rounded(vec4 v) {
    const float ones = 12582912.0;  // 1.5 * 2^23
    precise vec4 sum = v + ones;
    return floatBitsToInt(sum) - floatBitsToInt(ones);
}

// Codes of four channels, and the scale that `peak`, the greatest magnitude of their 32, asks for.
ivec4 quantized(vec4 v, float peak, out float scale) {
    if (INT8_X) {  // kernels/numerics.py, Int8Activations
        scale = peak / 127.0;
        return rounded(v * (peak > 1e-30 ? 127.0 / peak : 0.0));
    }
    scale = peak / FULL;
    return rounded(v * (peak > 0.0 ? FULL / peak : 0.0));
}

// Four channels as bytes, the scale of their 32 channels and the sum of those.
struct Fixed {
    uint high, low;
    float scale;
    int sum;
};

// The eight lanes that share 32 channels call it together.
Fixed to_fixed(vec4 v) {
    vec4 size = abs(v);
    float peak = team_max(max(max(size.x, size.y), max(size.z, size.w)), 8), scale;
    ivec4 code = quantized(v, peak, scale);
    ivec4 high = INT8_X ? code : (code + 128) >> 8;
    float sum = team_sum(float(code.x + code.y + code.z + code.w), 8);  // exact: below 2^24
    return Fixed(packed_bytes(high), packed_bytes(code), scale, int(sum));
}

// Store channels 4 * quad .. 4 * quad + 3. The eight lanes that share 32 channels call it together.
void store_fixed(Uints x, uint first_word, uint quad, vec4 v) {
    Fixed y = to_fixed(v);
    uint word = quad % 8, piece = quad / 8 % 4, tile = first_word + quad / 32 * X_WORDS;
    uint place = tile + (word / 4 * 4 + piece) * 4 + word % 4;
    x.at[place] = y.high;
    if (!INT8_X) {
        x.at[place + LOW_WORDS] = y.low;
    }
    if (word == 0) {
        x.at[tile + SCALE_WORDS + piece] = floatBitsToUint(y.scale);
        x.at[tile + SCALE_WORDS + 4 + piece] = uint(y.sum);
    }
}

// What products take v for that have it in another form than `store_fixed` writes. The eight lanes that share 32
// channels call it together.
vec4 as_products_have(vec4 v) {
    if (FLOAT_X || !INT8_X) {
        return v;
    }
    vec4 size = abs(v);
    float peak = team_max(max(max(size.x, size.y), max(size.z, size.w)), 8), scale;
    ivec4 code = quantized(v, peak, scale);
    return vec4(code) * scale;
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
