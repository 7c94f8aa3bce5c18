#version 460
#extension GL_GOOGLE_include_directive : require
// What happens to each element of a matrix by itself. An invocation has two neighbours of a row.
#include "common.glsl"
#include "dense_half.glsl"
layout(constant_id = 1) const uint OP = 0;
layout(constant_id = 2) const bool HALF_OUT = false;
layout(constant_id = 3) const bool BY_ROW = false;  // times a factor of the row
layout(constant_id = 4) const bool BY_COL = false;  // times a factor of the column
layout(constant_id = 5) const uint GROUP = 32;

// As `Cells` of kernels/vulkan/dense/cells.py.
const uint COPY = 0, GATHER = 1, SQUARE = 2, MIRROR = 3, WEIGHT = 4, MISSING = 5, LEVELS = 6;
const uint HALVES = 7, GEGLU = 8, SET_DIAGONAL = 9, GET_DIAGONAL = 10, GATHER_BYTES = 11;

layout(push_constant) uniform Push {
    Floats result;
    Floats from;
    Uints other;   // bytes of levels, float16, or the second matrix of GEGLU
    Floats scales;  // (rows, groups)
    Uints index;   // columns of `from` to take
    Floats row_factors, col_factors;
    uint stride_out, stride_in, groups, rows, cols;  // rows and cols: those that are not padding
    float alpha;
    float beta;  // SQUARE: added to the diagonal
};

float level(uint row, uint col) {
    uint at = row * stride_in + col;
    return float(bitfieldExtract(int(other.at[at / 4]), int(8 * (at % 4)), 8));
}

float dequantized(uint row, uint col) {
    return level(row, col) * scales.at[row * groups + col / GROUP];
}

float half_at(uint at) {
    return unpackHalf2x16(other.at[at / 2])[at % 2];
}

float value(uint row, uint col) {
    uint at = row * stride_in + col;
    bool inside = row < rows && col < cols;
    switch (OP) {
    case GATHER:
        return inside ? from.at[row * stride_in + index.at[col]] : 0.0;
    case SQUARE:
        float taken = inside ? from.at[index.at[row] * stride_in + index.at[col]] : 0.0;
        return taken + (row == col ? (inside ? beta : 1.0) : 0.0);
    case MIRROR:
        return from.at[col * stride_in + row];
    case WEIGHT:
        return dequantized(row, col);
    case MISSING:
        return from.at[at] - dequantized(row, col);
    case LEVELS:
        return level(row, col);
    case HALVES:
        return half_at(at);
    case GEGLU:
        return gelu(from.at[at]) * uintBitsToFloat(other.at[at]);
    default:
        return from.at[at];
    }
}

float scaled(uint row, uint col) {
    float factor = alpha;
    if (BY_ROW) {
        factor *= row_factors.at[row];
    }
    if (BY_COL) {
        factor *= col_factors.at[col];
    }
    return factor * value(row, col);
}

// Bytes of four columns.
void gather_bytes(uint row, uint word) {
    uint bytes = 0;
    for (uint i = 0; i < 4; i++) {
        uint col = 4 * word + i;
        if (col < cols) {
            bytes |= (uint(int(level(row, index.at[col]))) & 0xFFu) << (8 * i);
        }
    }
    result.at[row * (stride_out / 4) + word] = uintBitsToFloat(bytes);
}

void main() {
    uint pair = gl_WorkGroupID.x * LANES + lane_index(), row = gl_WorkGroupID.y, col = 2 * pair;
    if (OP == GATHER_BYTES) {
        if (4 * pair < stride_out) {
            gather_bytes(row, pair);
        }
        return;
    }
    if (col >= stride_out) {
        return;
    }
    uint at = row * stride_out + col;
    if (OP == SET_DIAGONAL || OP == GET_DIAGONAL) {  // of `cols` elements
        for (uint i = col; i < col + 2 && i < cols; i++) {
            if (OP == SET_DIAGONAL) {
                result.at[i * stride_out + i] = from.at[i] + beta;
            } else {
                result.at[i] = from.at[i * stride_in + i];
            }
        }
        return;
    }
    if (OP == MIRROR) {
        for (uint i = max(col, row + 1); i < col + 2; i++) {
            result.at[row * stride_out + i] = value(row, i);
        }
        return;
    }
    float one = scaled(row, col), two = scaled(row, col + 1);
    if (HALF_OUT) {
        vec2 both = limited(vec2(one, two));
        result.at[at / 2] = uintBitsToFloat(packHalf2x16(both));
    } else {
        result.at[at] = one;
        result.at[at + 1] = two;
    }
}
