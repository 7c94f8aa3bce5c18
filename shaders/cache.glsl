// Rows of the KV cache, DIM channels each. KV_INT8 0: float16. KV_INT8 1: codes -127 .. 127, and for
// each 32 channels a scale that float16 can hold, its greatest magnitude over 127
// (kernels/kv_format.py); `scales` are (row, DIM / 32) float32.
#include "gemm_bytes.glsl"

#ifndef KV_INT8
#define KV_INT8 0
#endif

#if KV_INT8
// Channels 8 * vector .. 8 * vector + 7 of a row.
void load_channels(Uints cache, Floats scales, uint row, uint vector, out vec4 low, out vec4 high) {
    uint place = row * (DIM / 4) + 2 * vector;
    float scale = scales.at[row * (DIM / 32) + vector / 4];
    low = vec4(unpack_bytes(cache.at[place])) * scale;
    high = vec4(unpack_bytes(cache.at[place + 1])) * scale;
}

// Channels 4 * quad .. 4 * quad + 3. The eight lanes that share 32 channels call it together.
void store_quad(Uints cache, Floats scales, uint row, uint quad, vec4 v) {
    vec4 size = abs(v);
    float peak = team_max(max(max(size.x, size.y), max(size.z, size.w)), 8);
    float scale = unpackHalf2x16(packHalf2x16(vec2(peak / 127.0, 0.0))).x;
    ivec4 code = clamp(ivec4(roundEven(v / (scale > 0.0 ? scale : 1.0))), -127, 127);
    cache.at[row * (DIM / 4) + quad] = packed_bytes(code);
    if (quad % 8 == 0) {
        scales.at[row * (DIM / 32) + quad / 8] = scale;
    }
}
#else
void load_channels(Uints cache, Floats scales, uint row, uint vector, out vec4 low, out vec4 high) {
    uvec4 packed = Vectors(cache).at[row * (DIM / 8) + vector];
    low = vec4(unpackHalf2x16(packed.x), unpackHalf2x16(packed.y));
    high = vec4(unpackHalf2x16(packed.z), unpackHalf2x16(packed.w));
}

void store_quad(Uints cache, Floats scales, uint row, uint quad, vec4 v) {
    cache.at[row * (DIM / 2) + 2 * quad] = packHalf2x16(v.xy);
    cache.at[row * (DIM / 2) + 2 * quad + 1] = packHalf2x16(v.zw);
}
#endif
