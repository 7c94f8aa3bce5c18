#version 460
#extension GL_GOOGLE_include_directive : require
// GPTQ of 128 columns in the order of rounding (quantize/gptq.py): a column's error goes to the columns
// of the block behind it at once, and is kept for those of the blocks to come.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;

layout(push_constant) uniform Push {
    Quads target;      // (rows, stride) by place
    Quads upper;       // (stride, stride)
    Quads errors;      // (rows, stride_out), out
    Words order;       // (stride) column of a place
    Floats scales;     // (rows, groups)
    Floats lows;       // (rows, groups) lowest level
    Vectors levels;    // (rows, stride) bytes by place, out
    uint stride, groups, start, stride_out;
    float span;  // of the levels
};

#include "dense_team.glsl"

void main() {
    uint row = team_row(), part = lane_index() % TEAM, first = start + part * OWN;
    float left[OWN], scale[OWN], low[OWN], error[OWN], level[OWN];
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        left[i] = target.at[(row * stride + first) / 4 + i / 4][i % 4];
        uint group = row * groups + order.at[first / 4 + i / 4][i % 4] / GROUP;
        scale[i] = scales.at[group];
        low[i] = lows.at[group];
    }
    for (uint owner = 0; owner < TEAM; owner++) {
        [[unroll]] for (uint i = 0; i < OWN; i++) {
            uint place = start + owner * OWN + i;
            float near = 0.0;
            if (scale[i] != 0.0) {
                near = clamp(roundEven(left[i] / scale[i]), low[i], low[i] + span);
            }
            uint diagonal = place * stride + place;
            float lost = (left[i] - near * scale[i]) / upper.at[diagonal / 4][diagonal % 4];
            if (part == owner) {
                level[i] = near;
                error[i] = lost;
            }
            lost = of_owner(lost, owner);
            [[unroll]] for (uint j = 0; j < OWN; j += 4) {
                vec4 share = lost * upper.at[(place * stride + first + j) / 4];
                left[j] -= share.x;
                left[j + 1] -= share.y;
                left[j + 2] -= share.z;
                left[j + 3] -= share.w;
            }
        }
    }
    [[unroll]] for (uint i = 0; i < OWN; i += 4) {
        errors.at[(row * stride_out + part * OWN + i) / 4] =
            vec4(error[i], error[i + 1], error[i + 2], error[i + 3]);
    }
    levels.at[(row * stride + first) / 16] = packed(level);
}
