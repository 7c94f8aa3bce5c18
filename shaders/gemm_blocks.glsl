// Blocks of 16 x 16 of a product, spread over a subgroup. Including shader: x_tile, w_tile, ROW, STEP,
// DOWN, ACROSS, y_block.
//
// EMULATED does with plain arithmetic what the matrix instructions do, for tests of all the rest on
// devices that have none.
#ifdef EMULATED
struct Block {
    float element[32];  // number i * gl_SubgroupSize + gl_SubgroupInvocationID, at least 8 lanes
};
#else
#define Block coopmat<float, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>
#define BlockA coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define BlockB coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>
#endif

Block sum[DOWN * ACROSS];

#ifdef EMULATED
void clear_blocks() {
    for (uint i = 0; i < DOWN * ACROSS; i++) {
        for (uint e = 0; e < 32; e++) {
            sum[i].element[e] = 0.0;
        }
    }
}

void multiply_step(uint top, uint left) {
    for (uint i = 0; i < DOWN * ACROSS; i++) {
        for (uint e = 0; e < 256 / gl_SubgroupSize; e++) {
            uint at = e * gl_SubgroupSize + gl_SubgroupInvocationID;
            uint m = top + 16 * (i / ACROSS) + at / 16, n = left + 16 * (i % ACROSS) + at % 16;
            for (uint k = 0; k < STEP / 2; k++) {
                vec2 x = unpackHalf2x16(x_tile[m * ROW + k / 4][k % 4]);
                sum[i].element[e] += dot(x, unpackHalf2x16(w_tile[n * ROW + k / 4][k % 4]));
            }
        }
    }
}

void block_to_shared(uint i, uint base) {
    for (uint e = 0; e < 256 / gl_SubgroupSize; e++) {
        y_block[base + e * gl_SubgroupSize + gl_SubgroupInvocationID] = sum[i].element[e];
    }
}
#else
void clear_blocks() {
    [[unroll]] for (uint i = 0; i < DOWN * ACROSS; i++) {
        sum[i] = Block(0.0);
    }
}

// x_tile[top .. top + SM] w_tile[left .. left + SN]^T, added to `sum`.
void multiply_step(uint top, uint left) {
    [[unroll]] for (uint k = 0; k < STEP / 16; k++) {
        BlockA a[DOWN];
        [[unroll]] for (uint i = 0; i < DOWN; i++) {
            uint at = (top + 16 * i) * ROW + 2 * k;
            coopMatLoad(a[i], x_tile, at, ROW, gl_CooperativeMatrixLayoutRowMajor);
        }
        [[unroll]] for (uint j = 0; j < ACROSS; j++) {
            BlockB b;
            uint at = (left + 16 * j) * ROW + 2 * k;
            coopMatLoad(b, w_tile, at, ROW, gl_CooperativeMatrixLayoutColumnMajor);
            [[unroll]] for (uint i = 0; i < DOWN; i++) {
                sum[i * ACROSS + j] = coopMatMulAdd(a[i], b, sum[i * ACROSS + j]);
            }
        }
    }
}

// Row-major.
void block_to_shared(uint i, uint base) {
    coopMatStore(sum[i], y_block, base, 16, gl_CooperativeMatrixLayoutRowMajor);
}
#endif
