#version 460
#extension GL_GOOGLE_include_directive : require
// What needs sums over a row; a workgroup a row. A row that becomes float16 is multiplied by `factor`,
// a power of two that keeps it far from overflow.
#include "common.glsl"
#include "dense_half.glsl"
layout(constant_id = 1) const uint OP = 0;
layout(constant_id = 2) const bool HAS_GAIN = true;

// As `Rows` of kernels/vulkan/dense/cells.py.
const uint NORM = 0, NORM_CHANGE = 1, JOIN = 2, SIZE = 3, WANTED = 4, DOT = 5, EXTENT = 6;

layout(push_constant) uniform Push {
    Floats result;
    Floats from, other;  // (rows, stride_in)
    Floats gain;         // (cols)
    Floats sizes;        // (rows) mean squares
    Floats branch;       // WANTED: (rows, stride_in) outputs of the linear
    Floats row_factors;  // WANTED: (rows)
    uint stride_out, stride_in, cols;
    float eps, factor, correction, residual;
};

uint row, lane;

float mean_square(Floats matrix) {
    float total = 0.0;
    for (uint i = lane; i < cols; i += LANES) {
        float x = matrix.at[row * stride_in + i];
        total += x * x;
    }
    return workgroup_sum(total) / float(cols);
}

void store_half(uint pair, vec2 values) {
    vec2 both = limited(values * factor);
    result.at[(row * stride_out) / 2 + pair] = uintBitsToFloat(packHalf2x16(both));
}

float normed(Floats matrix, uint col, float scale) {
    return matrix.at[row * stride_in + col] * scale * gain.at[col];
}

void write_norm() {
    float one = inversesqrt(mean_square(from) + eps), two = 0.0;
    if (OP == NORM_CHANGE) {
        two = inversesqrt(mean_square(other) + eps);
    }
    for (uint pair = lane; pair < stride_out / 2; pair += LANES) {
        vec2 values = vec2(0.0);
        for (uint i = 0; i < 2; i++) {
            uint col = 2 * pair + i;
            if (col < cols) {
                values[i] = normed(from, col, one);
                if (OP == NORM_CHANGE) {
                    values[i] -= normed(other, col, two);
                }
            }
        }
        store_half(pair, values);
    }
}

// `result` is the residual stream.
void join() {
    float scale = HAS_GAIN ? inversesqrt(mean_square(from) + eps) : 1.0;
    for (uint i = lane; i < cols; i += LANES) {
        float x = from.at[row * stride_in + i] * scale;
        result.at[row * stride_out + i] += HAS_GAIN ? x * gain.at[i] : x;
    }
}

// What the outputs should add: of the exact ones, and of what the residual stream has lost, which
// `gain` brings in front of the norm (`undo_norm` of quantize/moments.py).
void write_wanted() {
    float weight = row_factors.at[row], size = HAS_GAIN ? sqrt(sizes.at[row]) : 1.0;
    for (uint pair = lane; pair < stride_out / 2; pair += LANES) {
        vec2 values = vec2(0.0);
        for (uint i = 0; i < 2; i++) {
            uint col = 2 * pair + i, at = row * stride_in + col;
            if (col < cols) {
                float lost = (from.at[at] - other.at[at]) * size;
                lost *= HAS_GAIN ? gain.at[col] : 1.0;
                values[i] = weight * (correction * branch.at[at] + residual * lost);
            }
        }
        store_half(pair, values);
    }
}

void sum_products() {
    float total = 0.0;
    for (uint i = lane; i < cols; i += LANES) {
        total += from.at[row * stride_in + i] * other.at[row * stride_in + i];
    }
    total = workgroup_sum(total);
    if (lane == 0) {
        result.at[row] = total;
    }
}

// Sum of squares and largest magnitude.
void measure() {
    float peak = 0.0;
    for (uint i = lane; i < cols; i += LANES) {
        peak = max(peak, abs(from.at[row * stride_in + i]));
    }
    peak = workgroup_max(peak);
    float squares = mean_square(from) * float(cols);
    if (lane == 0) {
        result.at[2 * row] = squares;
        result.at[2 * row + 1] = peak;
    }
}

void main() {
    row = gl_WorkGroupID.x;
    lane = lane_index();
    switch (OP) {
    case NORM:
    case NORM_CHANGE:
        write_norm();
        break;
    case JOIN:
        join();
        break;
    case SIZE:
        float size = mean_square(from) + eps;
        if (lane == 0) {
            result.at[row] = size;
        }
        break;
    case WANTED:
        write_wanted();
        break;
    case DOT:
        sum_products();
        break;
    case EXTENT:
        measure();
        break;
    }
}
