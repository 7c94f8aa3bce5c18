// A team of 8 lanes owns a row of a weight, each lane 16 columns of a block of 128, in registers.

const uint TEAM = 8, OWN = 16, BLOCK = TEAM * OWN;

uint team_row() {
    return gl_WorkGroupID.x * (LANES / TEAM) + lane_index() / TEAM;
}

// What lane `owner` of the team has.
float of_owner(float value, uint owner) {
    return subgroupShuffle(value, gl_SubgroupInvocationID / TEAM * TEAM + owner);
}

float byte_of(uint word, uint i) {
    return float(bitfieldExtract(int(word), int(8 * i), 8));
}

uvec4 packed(float values[OWN]) {
    uvec4 words = uvec4(0);
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        words[i / 4] |= (uint(int(values[i])) & 0xFFu) << (8 * (i % 4));
    }
    return words;
}
