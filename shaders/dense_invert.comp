#version 460
#extension GL_GOOGLE_include_directive : require
// L^-1 of one positive definite block L L^T of SIZE x SIZE, by a single workgroup. What stands above the
// diagonal is not read and becomes zero.
#include "common.glsl"
const uint SIZE = 64, PITCH = 65;

layout(push_constant) uniform Push {
    Floats matrix, inverse;
    Uints failed;  // 1 when the block is not positive definite
    uint stride;   // of both
};

// L on and below the diagonal; its inverse, turned over and one place to the right, above it.
shared float block[SIZE * PITCH];

uint inverse_at(uint row, uint col) {
    return col * PITCH + row + 1;
}

void factorize(uint lane) {
    for (uint j = 0; j < SIZE; j++) {
        float pivot = block[j * PITCH + j];
        if (!(pivot > 0.0) && lane == 0) {
            failed.at[0] = 1;
        }
        float root = sqrt(max(pivot, 1e-30));
        barrier();
        for (uint i = j + lane; i < SIZE; i += LANES) {
            block[i * PITCH + j] = i == j ? root : block[i * PITCH + j] / root;
        }
        barrier();
        for (uint e = lane; e < SIZE * SIZE; e += LANES) {
            uint row = e / SIZE, col = e % SIZE;
            if (row >= col && col > j) {
                block[row * PITCH + col] -= block[row * PITCH + j] * block[col * PITCH + j];
            }
        }
        barrier();
    }
}

// Column by column, each its own lane's.
void invert(uint lane) {
    for (uint col = lane; col < SIZE; col += LANES) {
        for (uint row = col; row < SIZE; row++) {
            float left = row == col ? 1.0 : 0.0;
            for (uint i = col; i < row; i++) {
                left -= block[row * PITCH + i] * block[inverse_at(i, col)];
            }
            block[inverse_at(row, col)] = left / block[row * PITCH + row];
        }
    }
}

void main() {
    uint lane = lane_index();
    for (uint e = lane; e < SIZE * SIZE; e += LANES) {
        if (e % SIZE <= e / SIZE) {
            block[e / SIZE * PITCH + e % SIZE] = matrix.at[e / SIZE * stride + e % SIZE];
        }
    }
    barrier();
    factorize(lane);
    invert(lane);
    barrier();
    for (uint e = lane; e < SIZE * SIZE; e += LANES) {
        uint row = e / SIZE, col = e % SIZE;
        inverse.at[row * stride + col] = row < col ? 0.0 : block[inverse_at(row, col)];
    }
}
