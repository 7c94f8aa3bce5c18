// Activations in shared memory, `held`: quads of channels as a product takes them.

void hold_quad(uint quad, vec4 v) {
#if WEIGHT > INT8
    held[quad] = floatBitsToUint(v);
#else
    Fixed y = to_fixed(v);
    uint word = quad % 8, piece = quad / 8 % 4, tile = quad / 32 * INPUT_VECTORS;
    uint place = tile + word / 4 * 4 + piece;
    held[place][word % 4] = y.high;
    if (!INT8_X) {
        held[place + LOW_AT][word % 4] = y.low;
    }
    if (word == 0) {
        held[tile + SCALE_AT][piece] = floatBitsToUint(y.scale);
        held[tile + SCALE_AT + 1][piece] = uint(y.sum);
    }
#endif
}
