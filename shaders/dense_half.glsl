// The float16 next to x, ties to even, as a float32; infinity beyond 65504.
float nearest_half(float x) {
    float size = abs(x);
    if (size < 6.103515625e-5) {  // subnormal: multiples of 2^-24
        return roundEven(x * 16777216.0) * 5.9604644775390625e-8;
    }
    uint bits = floatBitsToUint(x);
    bits = (bits + 0xFFFu + (bits >> 13 & 1u)) & 0xFFFFE000u;
    float near = uintBitsToFloat(bits);
    return abs(near) > 65504.0 ? sign(x) * uintBitsToFloat(0x7F800000u) : near;
}

// What float16 can hold of x. Infinity and NaN stay: a broken model must not look like a whole one.
vec2 limited(vec2 x) {
    bvec2 is_broken = equal(floatBitsToUint(x) & 0x7F800000u, uvec2(0x7F800000u));
    return mix(clamp(x, -65504.0, 65504.0), x, is_broken);
}
