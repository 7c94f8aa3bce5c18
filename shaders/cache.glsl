// Rows of the KV cache, DIM channels each. KV_INT8 0: float16. KV_INT8 1: codes -127 .. 127, and for
// each 32 channels a scale that float16 can hold, its greatest magnitude over 127
// (kernels/kv_format.py); `scales` are (row, DIM / 32) float32.
#include "gemm_bytes.glsl"

#ifndef KV_INT8
#define KV_INT8 0
#endif

// What a kernel only reads while it runs; loads of it need not wait for each other.
layout(buffer_reference, std430, buffer_reference_align = 8) readonly restrict buffer CodePairs {
    uvec2 at[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) readonly restrict buffer CacheScales {
    float at[];
};

// Four channels as the cache has them, for who does not wait for it: halves, or codes and their scale. They
// stay in this form until they are used: a driver may take the way from float32 to float16 and back for none
// at all.
#define STORED uvec2

#if KV_INT8
// The float16 next to `x`, to even, as float32; `x` is not negative, and below what float16 holds. By integers:
// a driver may take the way to float16 and back for none at all, and NVIDIA's does.
float nearest_half(float x) {
    uint bits = floatBitsToUint(x);
    precise float small = x + 0.75;  // whose last bit counts the steps of subnormal numbers
    small = small - 0.75;
    uint rounded = bits + 0xFFFu + (bits >> 13 & 1u) & ~0x1FFFu;
    return x < 6.103515625e-5 ? small : uintBitsToFloat(rounded);
}

// Eight channels of a row, as they are stored.
struct Channels {
    uvec2 codes;
    float scale;
};

Channels fetch(Uints cache, Floats scales, uint row, uint vector) {
    float scale = CacheScales(scales).at[row * (DIM / 32) + vector / 4];
    return Channels(CodePairs(cache).at[row * (DIM / 8) + vector], scale);
}

void unpack(Channels from, out vec4 low, out vec4 high) {
    low = vec4(unpack_bytes(from.codes.x)) * from.scale;
    high = vec4(unpack_bytes(from.codes.y)) * from.scale;
}

// Channels 4 * quad .. 4 * quad + 3; what was kept of them. The eight lanes that share 32
// channels call it together.
STORED store_quad(Uints cache, Floats scales, uint row, uint quad, vec4 v) {
    vec4 size = abs(v);
    float peak = team_max(max(max(size.x, size.y), max(size.z, size.w)), 8);
    float scale = nearest_half(peak / 127.0);
    ivec4 code = clamp(ivec4(roundEven(v / (scale > 0.0 ? scale : 1.0))), -127, 127);
    cache.at[row * (DIM / 4) + quad] = packed_bytes(code);
    if (quad % 8 == 0) {
        scales.at[row * (DIM / 32) + quad / 8] = scale;
    }
    return uvec2(packed_bytes(code), floatBitsToUint(scale));
}

Channels stored_channels(STORED one, STORED two) {
    return Channels(uvec2(one.x, two.x), uintBitsToFloat(one.y));
}
#else
struct Channels {
    uvec4 halves;
};

Channels fetch(Uints cache, Floats scales, uint row, uint vector) {
    return Channels(Words(cache).at[row * (DIM / 8) + vector]);
}

void unpack(Channels from, out vec4 low, out vec4 high) {
    low = vec4(unpackHalf2x16(from.halves.x), unpackHalf2x16(from.halves.y));
    high = vec4(unpackHalf2x16(from.halves.z), unpackHalf2x16(from.halves.w));
}

STORED store_quad(Uints cache, Floats scales, uint row, uint quad, vec4 v) {
    uvec2 halves = uvec2(packHalf2x16(v.xy), packHalf2x16(v.zw));
    cache.at[row * (DIM / 2) + 2 * quad] = halves.x;
    cache.at[row * (DIM / 2) + 2 * quad + 1] = halves.y;
    return halves;
}

Channels stored_channels(STORED one, STORED two) {
    return Channels(uvec4(one, two));
}
#endif

// Channels 8 * vector .. 8 * vector + 7 of a row.
void load_channels(Uints cache, Floats scales, uint row, uint vector, out vec4 low, out vec4 high) {
    unpack(fetch(cache, scales, row, vector), low, high);
}
