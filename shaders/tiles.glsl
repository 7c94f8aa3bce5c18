// Reading one weight of an `igpu` tensor (formats/README.md, section 5) from a buffer of words.
// The including shader defines BITS (4 or 8) and constants GROUP and SCALE_BITS.
#ifndef TILES_GLSL
#define TILES_GLSL
#include "layouts.glsl"

// Byte offset of tile `tile` of the row block that holds `row`, of a weight with `cols` columns; of one
// tile more than there are, where SCALE_BITS is 8: that of the steps of its rows.
uint tile_offset(uint row, uint tile, uint cols) {
    uint across = (cols + TILE_COLS - 1u) / TILE_COLS, size = TILE_BYTES(BITS, GROUP, SCALE_BITS);
    uint block = across * size + STEPS_BYTES(BITS, GROUP, SCALE_BITS);
    return row / TILE_ROWS * block + tile * size;
}

// Byte offset in the tile, and the bit in that byte, of the code of (row, col).
uvec2 code_place(uint row, uint col) {
    uint lane = 4u * (row % TILE_ROWS) + col % TILE_COLS / 32u;
    uint k = col % 32u;
#if BITS == 4
    return uvec2(16u * lane + 4u * (k / 8u) + k % 4u, 4u * (k / 4u % 2u));
#else
    return uvec2(1024u * (k / 16u) + 16u * lane + k % 16u, 0u);
#endif
}

// Byte offset in the tile of the scale of (row, col): a float16, or a signed byte.
uint scale_place(uint row, uint col) {
    uint index = row % TILE_ROWS * (TILE_COLS / GROUP) + col % TILE_COLS / GROUP;
    return SCALES_OFFSET(BITS, GROUP, SCALE_BITS) + SCALE_BITS / 8u * index;
}
#endif
