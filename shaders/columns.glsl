// Which columns of x and y a workgroup of a product of many takes: BM neighbours, or a tile of items that
// meet one expert (shaders/group.comp). An item is a token and one of the experts that it chooses.
// Including shader: BM, CHOICES, count, tiles_of_items, items, step.

uint first_column, end_column;  // places of the workgroup's columns
uint expert_block = 0;          // at which the rows of their expert begin

// False where there is nothing to do.
bool begin_columns() {
    first_column = gl_WorkGroupID.y * BM;
    end_column = count;
    if (CHOICES > 0) {
        uvec4 tile = tiles_of_items.at[gl_WorkGroupID.y];  // expert, first place, how many
        expert_block = tile.x * step;
        first_column = tile.y;
        end_column = tile.y + tile.z;
    }
    return first_column < end_column;
}

// Of y; those behind the last one repeat it.
uint column_of(uint i) {
    uint place = min(first_column + i, end_column - 1);
    return CHOICES > 0 ? items.at[place] : place;
}

// Of x, which CHOICES items share.
uint x_column_of(uint i) {
    return column_of(i) / max(CHOICES, 1);
}
