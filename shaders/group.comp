#version 460
#extension GL_GOOGLE_include_directive : require
// Items (column * ACTIVE + choice) in the order of the experts that they meet, and tiles of up to SIZE of
// them that meet one. One workgroup. The order within an expert is anybody's: each item's product is its
// own.
#include "common.glsl"
layout(constant_id = 1) const uint COUNT = 8;
layout(constant_id = 2) const uint ACTIVE = 1;
layout(constant_id = 3) const uint SIZE = 32;
layout(constant_id = 4) const uint TILES = 1;  // that there is room for

layout(push_constant) uniform Push {
    Uints chosen;            // (column, ACTIVE)
    Vectors tiles_of_items;  // expert, first place, how many: 0 behind the last
    Uints items;
    State state;
};

shared uint counts[COUNT], firsts[COUNT];

// Items, and tiles of them, of the experts in front of one.
uvec2 in_front_of(uint expert) {
    uvec2 total = uvec2(0);
    for (uint i = 0; i < expert; i++) {
        total += uvec2(counts[i], (counts[i] + SIZE - 1) / SIZE);
    }
    return total;
}

void main() {
    uint lane = lane_index(), count = state.count * ACTIVE;
    for (uint i = lane; i < COUNT; i += LANES) {
        counts[i] = 0;
    }
    barrier();
    for (uint i = lane; i < count; i += LANES) {
        atomicAdd(counts[chosen.at[i]], 1);
    }
    barrier();
    for (uint i = lane; i < COUNT; i += LANES) {
        uvec2 front = in_front_of(i);
        firsts[i] = front.x;
        for (uint first = 0; first < counts[i]; first += SIZE) {
            uint size = min(counts[i] - first, SIZE);
            tiles_of_items.at[front.y + first / SIZE] = uvec4(i, front.x + first, size, 0);
        }
    }
    for (uint i = in_front_of(COUNT).y + lane; i < TILES; i += LANES) {
        tiles_of_items.at[i] = uvec4(0);
    }
    barrier();
    for (uint i = lane; i < count; i += LANES) {
        items.at[atomicAdd(firsts[chosen.at[i]], 1)] = i;
    }
}
