// A column (token) of activations as float16, for gemm_matrix.comp.
//
// It is divided by a power of two that brings its largest value below 2048: far from overflow, and
// values down to 2^-25 of the largest are rounded no more than float16 rounds anyway.

// Exponent of that power of two; `peak` is the column's greatest magnitude.
int half_exponent(float peak) {
    int exponent = 0;
    frexp(peak, exponent);  // peak is below 2^exponent
    return peak > 0.0 ? max(exponent - 11, -100) : 0;
}

float magnitude(vec4 v) {
    vec4 size = abs(v);
    return max(max(size.x, size.y), max(size.z, size.w));
}

void store_half(Uints half_x, uint quad, vec4 v) {
    half_x.at[2 * quad] = packHalf2x16(v.xy);
    half_x.at[2 * quad + 1] = packHalf2x16(v.zw);
}
