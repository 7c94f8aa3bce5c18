// Reading one weight of an `igpu` tensor (formats/README.md, section 5) from a buffer of words.
// The including shader defines BITS (4 or 8) and a constant GROUP.
#ifndef TILES_GLSL
#define TILES_GLSL
#include "layouts.glsl"

// Byte offset of the tile that holds (row, col) of a weight with `cols` columns.
uint tile_offset(uint row, uint col, uint cols) {
    uint across = (cols + TILE_COLS - 1u) / TILE_COLS;
    return TILE_BYTES(BITS, GROUP) * (row / TILE_ROWS * across + col / TILE_COLS);
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

// Byte offset in the tile of the scale of (row, col), a float16.
uint scale_place(uint row, uint col) {
    uint index = row % TILE_ROWS * (TILE_COLS / GROUP) + col % TILE_COLS / GROUP;
    return SCALES_OFFSET(BITS, GROUP) + 2u * index;
}
#endif
