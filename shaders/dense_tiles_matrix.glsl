// 16 x 16 x 16, float16 into float32, by matrix instructions.

const uint A_PITCH = (A_ROW + PAD) / 4, B_PITCH = (B_ROW + PAD) / 4;  // in f16vec4
const uint A_SIZE = A_VECTORS * A_WIDTH / A_ROW * A_PITCH, B_SIZE = B_VECTORS * B_WIDTH / B_ROW * B_PITCH;
const uint DOWN = SM / 16, ACROSS = SN / 16;

shared f16vec4 a_tile[A_SIZE];
shared f16vec4 b_tile[B_SIZE];
#ifdef A_FLOAT
shared f16vec4 a_low[A_SIZE];
#endif
#ifdef B_FLOAT
shared f16vec4 b_low[B_SIZE];
#endif

#define Block coopmat<float, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>
#define BlockA coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define BlockB coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>

Block sum[DOWN * ACROSS];

void clear_sums() {
    [[unroll]] for (uint i = 0; i < DOWN * ACROSS; i++) {
        sum[i] = Block(0.0);
    }
}

// The next numbers of 11 bits, which are float16. By way of the bits, because a compiler may take a
// float16 that becomes a float32 again for what it was made of: then low would be 0.
vec4 upper_bits(uvec4 v) {
    return uintBitsToFloat((v + 0x1000u) & 0xFFFFE000u);
}

void stage(uint lane) {
    [[unroll]] for (uint i = 0; i < A_LOADS; i++) {
        uint load = i * LANES + lane;
        if (A_VECTORS % LANES != 0 && load >= A_VECTORS) {
            break;
        }
        uint place = load / (A_ROW / A_WIDTH) * A_PITCH + load % (A_ROW / A_WIDTH) * (A_WIDTH / 4);
        uvec4 v = a_next[i];
#ifdef A_FLOAT
        vec4 high = upper_bits(v);
        a_tile[place] = f16vec4(high);
        a_low[place] = f16vec4(uintBitsToFloat(v) - high);
#else
        a_tile[place] = f16vec4(unpackFloat2x16(v.x), unpackFloat2x16(v.y));
        a_tile[place + 1] = f16vec4(unpackFloat2x16(v.z), unpackFloat2x16(v.w));
#endif
    }
    [[unroll]] for (uint i = 0; i < B_LOADS; i++) {
        uint load = i * LANES + lane;
        if (B_VECTORS % LANES != 0 && load >= B_VECTORS) {
            break;
        }
        uint place = load / (B_ROW / B_WIDTH) * B_PITCH + load % (B_ROW / B_WIDTH) * (B_WIDTH / 4);
        uvec4 v = b_next[i];
#ifdef B_FLOAT
        vec4 high = upper_bits(v);
        b_tile[place] = f16vec4(high);
        b_low[place] = f16vec4(uintBitsToFloat(v) - high);
#else
        b_tile[place] = f16vec4(unpackFloat2x16(v.x), unpackFloat2x16(v.y));
        b_tile[place + 1] = f16vec4(unpackFloat2x16(v.z), unpackFloat2x16(v.w));
#endif
    }
}

// A tile that lies by k is the operand turned over.
#define LOAD_A(block, tile, m, kk)                                                                 \
    if (A_BY_K) {                                                                                  \
        coopMatLoad(block, tile, (kk) * A_PITCH + (m) / 4, A_PITCH, gl_CooperativeMatrixLayoutColumnMajor); \
    } else {                                                                                       \
        coopMatLoad(block, tile, (m) * A_PITCH + (kk) / 4, A_PITCH, gl_CooperativeMatrixLayoutRowMajor);    \
    }
#define LOAD_B(block, tile, n, kk)                                                                 \
    if (B_BY_K) {                                                                                  \
        coopMatLoad(block, tile, (kk) * B_PITCH + (n) / 4, B_PITCH, gl_CooperativeMatrixLayoutRowMajor);    \
    } else {                                                                                       \
        coopMatLoad(block, tile, (n) * B_PITCH + (kk) / 4, B_PITCH, gl_CooperativeMatrixLayoutColumnMajor); \
    }

uint tile_top() {
    return gl_SubgroupID / (BN / SN) * SM;
}

uint tile_left() {
    return gl_SubgroupID % (BN / SN) * SN;
}

void multiply_step(uint lane) {
    uint top = tile_top(), left = tile_left();
    [[unroll]] for (uint kk = 0; kk < STEP; kk += 16) {
        BlockA high[DOWN];
#ifdef A_FLOAT
        BlockA low[DOWN];
#endif
        [[unroll]] for (uint i = 0; i < DOWN; i++) {
            LOAD_A(high[i], a_tile, top + 16 * i, kk)
#ifdef A_FLOAT
            LOAD_A(low[i], a_low, top + 16 * i, kk)
#endif
        }
        [[unroll]] for (uint j = 0; j < ACROSS; j++) {
            BlockB other;
            LOAD_B(other, b_tile, left + 16 * j, kk)
            [[unroll]] for (uint i = 0; i < DOWN; i++) {
                sum[i * ACROSS + j] = coopMatMulAdd(high[i], other, sum[i * ACROSS + j]);
#ifdef A_FLOAT
                sum[i * ACROSS + j] = coopMatMulAdd(low[i], other, sum[i * ACROSS + j]);
#endif
            }
#ifdef B_FLOAT
            LOAD_B(other, b_low, left + 16 * j, kk)
            [[unroll]] for (uint i = 0; i < DOWN; i++) {
                sum[i * ACROSS + j] = coopMatMulAdd(high[i], other, sum[i * ACROSS + j]);
            }
#endif
        }
    }
}

#ifdef SYSTEMS
const uint OUT_PITCH = 20;  // 16 and what spreads rows over the banks
shared vec4 block_out[BM / SM * (BN / SN) * 4 * OUT_PITCH];  // one for each subgroup

// Sum over each GROUP of columns of C times the levels: C is (rows, columns), `group` that of A's.
// Two lanes share a row of a block.
void store_systems(uint lane, uint first_m, uint first_n, uint group) {
    uint base = gl_SubgroupID * 4 * OUT_PITCH, top = first_m + tile_top(), left = first_n + tile_left();
    uint row = gl_SubgroupInvocationID / 2 % 16, side = gl_SubgroupInvocationID % 2;
    [[unroll]] for (uint i = 0; i < DOWN; i++) {
        float total = 0.0;
        [[unroll]] for (uint j = 0; j < ACROSS; j++) {
            coopMatStore(
                sum[i * ACROSS + j], block_out, base, OUT_PITCH / 4, gl_CooperativeMatrixLayoutRowMajor);
            subgroupBarrier();
            uint m = top + 16 * i + row, n = left + 16 * j;
            uvec4 level = levels.at[(m * stride_levels + n) / 8 + side];
            vec4 one = block_out[base + row * (OUT_PITCH / 4) + 2 * side];
            vec4 two = block_out[base + row * (OUT_PITCH / 4) + 2 * side + 1];
            total += dot(one, vec4(unpackHalf2x16(level.x), unpackHalf2x16(level.y)));
            total += dot(two, vec4(unpackHalf2x16(level.z), unpackHalf2x16(level.w)));
            if ((n + 16) % GROUP == 0) {
                total = team_sum(total, 2);
                if (side == 0) {
                    store_entry(m, group, n / GROUP, total);
                }
                total = 0.0;
            }
            subgroupBarrier();
        }
    }
}
#else
void store_sums(uint lane, uint base, uint first_m, uint first_n) {
    uint top = first_m + tile_top(), left = first_n + tile_left();
    [[unroll]] for (uint i = 0; i < DOWN * ACROSS; i++) {
        uint at = base + (top + 16 * (i / ACROSS)) * stride_c + left + 16 * (i % ACROSS);
        Block block = sum[i] * alpha;
        if (ADD) {
            Block before;
            coopMatLoad(before, c.at, at, stride_c, gl_CooperativeMatrixLayoutRowMajor);
            block = block + before;
        }
        coopMatStore(block, c.at, at, stride_c, gl_CooperativeMatrixLayoutRowMajor);
    }
}
#endif
