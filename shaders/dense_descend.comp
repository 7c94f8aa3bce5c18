#version 460
#extension GL_GOOGLE_include_directive : require
// Coordinate descent on 128 columns (quantize/descent.py). What a step changes moves the slope within
// the block at once; all changes together move the slope of the other columns afterwards.
#include "common.glsl"
layout(constant_id = 1) const uint GROUP = 32;

layout(push_constant) uniform Push {
    Quads slope;     // (rows, stride)
    Quads hessian;   // (stride, stride), damped
    Quads changes;   // (rows, stride_out), out: of the weights
    Floats scales;   // (rows, groups)
    Floats lows;     // (rows, groups)
    Vectors levels;  // (rows, stride) bytes, in and out
    uint stride, groups, start, stride_out;
    float span;
};

#include "dense_team.glsl"

void main() {
    uint row = team_row(), part = lane_index() % TEAM, first = start + part * OWN;
    float left[OWN], level[OWN], change[OWN];
    uvec4 words = levels.at[(row * stride + first) / 16];
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        left[i] = slope.at[(row * stride + first) / 4 + i / 4][i % 4];
        level[i] = byte_of(words[i / 4], i % 4);
        change[i] = 0.0;
    }
    uint group = row * groups + first / GROUP;
    float scale = scales.at[group], low = lows.at[group];
    for (uint owner = 0; owner < TEAM; owner++) {
        [[unroll]] for (uint i = 0; i < OWN; i++) {
            uint col = start + owner * OWN + i, diagonal = col * stride + col;
            float curvature = hessian.at[diagonal / 4][diagonal % 4];
            float wish = level[i];
            if (scale != 0.0) {
                wish = clamp(wish + roundEven(left[i] / (curvature * scale)), low, low + span);
            }
            float moved = (wish - level[i]) * scale;
            if (part == owner) {
                level[i] = wish;
                change[i] = moved;
            }
            moved = of_owner(moved, owner);
            [[unroll]] for (uint j = 0; j < OWN; j += 4) {
                vec4 share = moved * hessian.at[(col * stride + first + j) / 4];
                left[j] -= share.x;
                left[j + 1] -= share.y;
                left[j + 2] -= share.z;
                left[j + 3] -= share.w;
            }
        }
    }
    [[unroll]] for (uint i = 0; i < OWN; i += 4) {
        changes.at[(row * stride_out + part * OWN + i) / 4] =
            vec4(change[i], change[i + 1], change[i + 2], change[i + 3]);
    }
    levels.at[(row * stride + first) / 16] = packed(level);
}
