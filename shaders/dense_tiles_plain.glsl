// The same in plain float32: each lane makes SM x SN, for devices without matrix instructions.

shared float a_tile[STEP * (BM + 1)];  // by k
shared float b_tile[STEP * (BN + 1)];

float sum[SM * SN];

void clear_sums() {
    [[unroll]] for (uint i = 0; i < SM * SN; i++) {
        sum[i] = 0.0;
    }
}

float element(uvec4 v, uint e, uint width) {
    return width == 4 ? uintBitsToFloat(v[e]) : unpackHalf2x16(v[e / 2])[e % 2];
}

// Where element e of vector `load` lies in the tile.
uint tile_at(uint load, uint e, uint row, uint width, bool by_k, uint extent) {
    uint down = load / (row / width), along = load % (row / width) * width + e;
    return by_k ? down * (extent + 1) + along : along * (extent + 1) + down;
}

void stage(uint lane) {
    for (uint i = 0; i < A_LOADS; i++) {
        uint load = i * LANES + lane;
        for (uint e = 0; e < A_WIDTH && load < A_VECTORS; e++) {
            a_tile[tile_at(load, e, A_ROW, A_WIDTH, A_BY_K, BM)] = element(a_next[i], e, A_WIDTH);
        }
    }
    for (uint i = 0; i < B_LOADS; i++) {
        uint load = i * LANES + lane;
        for (uint e = 0; e < B_WIDTH && load < B_VECTORS; e++) {
            b_tile[tile_at(load, e, B_ROW, B_WIDTH, B_BY_K, BN)] = element(b_next[i], e, B_WIDTH);
        }
    }
}

uint tile_top(uint lane) {
    return lane / (BN / SN) * SM;
}

uint tile_left(uint lane) {
    return lane % (BN / SN) * SN;
}

void multiply_step(uint lane) {
    uint top = tile_top(lane), left = tile_left(lane);
    for (uint kk = 0; kk < STEP; kk++) {
        float other[SN];
        [[unroll]] for (uint j = 0; j < SN; j++) {
            other[j] = b_tile[kk * (BN + 1) + left + j];
        }
        [[unroll]] for (uint i = 0; i < SM; i++) {
            float one = a_tile[kk * (BM + 1) + top + i];
            [[unroll]] for (uint j = 0; j < SN; j++) {
                sum[i * SN + j] += one * other[j];
            }
        }
    }
}

#ifdef SYSTEMS
shared float block_out[BM * BN];

void store_systems(uint lane, uint first_m, uint first_n, uint group) {
    [[unroll]] for (uint i = 0; i < SM * SN; i++) {
        block_out[(tile_top(lane) + i / SN) * BN + tile_left(lane) + i % SN] = sum[i];
    }
    barrier();
    for (uint i = lane; i < BM * (BN / GROUP); i += LANES) {
        uint row = i / (BN / GROUP), part = i % (BN / GROUP) * GROUP;
        uint m = first_m + row, n = first_n + part;
        float total = 0.0;
        for (uint e = 0; e < GROUP; e++) {
            uvec4 level = levels.at[(m * stride_levels + n + e) / 8];
            total += block_out[row * BN + part + e] * unpackHalf2x16(level[e % 8 / 2])[e % 2];
        }
        store_entry(m, group, n / GROUP, total);
    }
}
#else
void store_sums(uint lane, uint base, uint first_m, uint first_n) {
    [[unroll]] for (uint i = 0; i < SM * SN; i++) {
        uint m = first_m + tile_top(lane) + i / SN, n = first_n + tile_left(lane) + i % SN;
        uint at = base + m * stride_c + n;
        c.at[at] = alpha * sum[i] + (ADD ? c.at[at] : 0.0);
    }
}
#endif
