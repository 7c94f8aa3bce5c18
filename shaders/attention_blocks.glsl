// Attention's products in blocks of 16 x 16, spread over a subgroup. Included by attention_matrix.comp.
//
// EMULATED does with plain arithmetic what the matrix instructions do, for tests of all the rest on
// devices that have none.
const uint SCORES = ROWS / 16 * (KEYS / 16) / (SPLIT ? 1 : SUBGROUPS);  // blocks of a subgroup
const uint DEPTH = DIM / 16 / PARTS;  // blocks of DIM that a subgroup has in a score
const uint DOWN = ROWS / 16;
const uint ACROSS = DIM / 16 / SUBGROUPS;  // blocks of DIM of a subgroup

#ifdef EMULATED
struct Block {
    float element[32];  // number i * gl_SubgroupSize + gl_SubgroupInvocationID, at least 8 lanes
};
#else
#define Block coopmat<float, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>
#define BlockA coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define BlockB coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>
#endif

Block mixed[DOWN * ACROSS];

// Of the subgroup's first channel in a score, in blocks; of its scores.
uint first_block() {
    return SPLIT ? gl_SubgroupID * DEPTH : 0;
}

uint own_scores() {
    return SPLIT ? gl_SubgroupID * ROWS * SCORE_ROW : 0;
}

// Where the subgroup's block of scores number i lies: (row, key) of its first element.
uvec2 score_place(uint i) {
    uint block = SPLIT ? i : gl_SubgroupID * SCORES + i;
    return 16 * uvec2(block / (KEYS / 16), block % (KEYS / 16));
}

#ifdef EMULATED
void clear_blocks() {
    for (uint i = 0; i < DOWN * ACROSS; i++) {
        for (uint e = 0; e < 32; e++) {
            mixed[i].element[e] = 0.0;
        }
    }
}

// scores = q_tile kv_tile^T
void score_blocks() {
    for (uint i = 0; i < SCORES; i++) {
        for (uint at = gl_SubgroupInvocationID; at < 256; at += gl_SubgroupSize) {
            uvec2 place = score_place(i) + uvec2(at / 16, at % 16);
            float total = 0.0;
            for (uint i = 0; i < 4 * DEPTH; i++) {
                uint k = 4 * first_block() + i;
                total += dot(vec4(q_tile[place.x * ROW + k]), vec4(kv_tile[place.y * ROW + k]));
            }
            scores[own_scores() + place.x * SCORE_ROW + place.y / 4][place.y % 4] = total;
        }
    }
}

// mixed = mixed * factors + w_tile kv_tile
void mix_blocks() {
    for (uint i = 0; i < DOWN * ACROSS; i++) {
        for (uint e = 0; e < 256 / gl_SubgroupSize; e++) {
            uint at = e * gl_SubgroupSize + gl_SubgroupInvocationID;
            uint row = 16 * (i / ACROSS) + at / 16;
            uint channel = 16 * (gl_SubgroupID * ACROSS + i % ACROSS) + at % 16;
            float total = mixed[i].element[e] * scores[row * SCORE_ROW + at % 16 / 4][at % 4];
            for (uint k = 0; k < KEYS; k++) {
                float w = float(w_tile[row * WEIGHT_ROW + k / 4][k % 4]);
                total += w * float(kv_tile[k * ROW + channel / 4][channel % 4]);
            }
            mixed[i].element[e] = total;
        }
    }
}

// scores = channels 32 * chunk .. 32 * chunk + 31 of the results
void store_blocks(uint chunk) {
    for (uint i = 0; i < DOWN * ACROSS; i++) {
        uint across = gl_SubgroupID * ACROSS + i % ACROSS;
        for (uint e = 0; e < (across / 2 == chunk ? 256 / gl_SubgroupSize : 0); e++) {
            uint at = e * gl_SubgroupSize + gl_SubgroupInvocationID;
            uint row = 16 * (i / ACROSS) + at / 16, channel = across % 2 * 16 + at % 16;
            scores[row * SCORE_ROW + channel / 4][channel % 4] = mixed[i].element[e];
        }
    }
}
#else
void clear_blocks() {
    [[unroll]] for (uint i = 0; i < DOWN * ACROSS; i++) {
        mixed[i] = Block(0.0);
    }
}

// scores = q_tile kv_tile^T
void score_blocks() {
    [[unroll]] for (uint i = 0; i < SCORES; i++) {
        uvec2 place = score_place(i);
        Block total = Block(0.0);
        [[unroll]] for (uint k = 0; k < DEPTH; k++) {
            BlockA a;
            BlockB b;
            uint from = 4 * (first_block() + k);
            coopMatLoad(a, q_tile, place.x * ROW + from, ROW, gl_CooperativeMatrixLayoutRowMajor);
            coopMatLoad(b, kv_tile, place.y * ROW + from, ROW, gl_CooperativeMatrixLayoutColumnMajor);
            total = coopMatMulAdd(a, b, total);
        }
        uint at = own_scores() + place.x * SCORE_ROW + place.y / 4;
        coopMatStore(total, scores, at, SCORE_ROW, gl_CooperativeMatrixLayoutRowMajor);
    }
}

// mixed = mixed * factors + w_tile kv_tile
void mix_blocks() {
    [[unroll]] for (uint i = 0; i < DOWN; i++) {
        Block factors;
        uint at = 16 * i * SCORE_ROW;
        coopMatLoad(factors, scores, at, SCORE_ROW, gl_CooperativeMatrixLayoutRowMajor);
        [[unroll]] for (uint j = 0; j < ACROSS; j++) {
            mixed[i * ACROSS + j] = mixed[i * ACROSS + j] * factors;
        }
    }
    [[unroll]] for (uint k = 0; k < KEYS / 16; k++) {
        BlockA a[DOWN];
        [[unroll]] for (uint i = 0; i < DOWN; i++) {
            uint at = 16 * i * WEIGHT_ROW + 4 * k;
            coopMatLoad(a[i], w_tile, at, WEIGHT_ROW, gl_CooperativeMatrixLayoutRowMajor);
        }
        [[unroll]] for (uint j = 0; j < ACROSS; j++) {
            BlockB b;
            uint at = 16 * k * ROW + 4 * (gl_SubgroupID * ACROSS + j);
            coopMatLoad(b, kv_tile, at, ROW, gl_CooperativeMatrixLayoutRowMajor);
            [[unroll]] for (uint i = 0; i < DOWN; i++) {
                mixed[i * ACROSS + j] = coopMatMulAdd(a[i], b, mixed[i * ACROSS + j]);
            }
        }
    }
}

// scores = channels 32 * chunk .. 32 * chunk + 31 of the results
void store_blocks(uint chunk) {
    [[unroll]] for (uint i = 0; i < DOWN * ACROSS; i++) {
        uint across = gl_SubgroupID * ACROSS + i % ACROSS;
        if (across / 2 == chunk) {
            uint at = 16 * (i / ACROSS) * SCORE_ROW + across % 2 * 4;
            coopMatStore(mixed[i], scores, at, SCORE_ROW, gl_CooperativeMatrixLayoutRowMajor);
        }
    }
}
#endif
