// Four signed bytes of a word.
ivec4 unpack_bytes(uint word) {
    return ivec4(word << 24, word << 16, word << 8, word) >> 24;
}
