#version 460
#extension GL_GOOGLE_include_directive : require
// The grid of each group (quantize/grids.py): its scale and its lowest level. A lane a group.
#include "common.glsl"
#include "dense_half.glsl"
layout(constant_id = 1) const uint GROUP = 32;
layout(constant_id = 2) const uint KIND = 0;  // 0: symmetric, 1: with zero points, 2: INT8

layout(push_constant) uniform Push {
    Floats weight;      // (rows, stride)
    Floats importance;  // (stride) mean 1
    Floats steps;       // of the candidates
    Floats scales, lows;  // (rows, groups), out
    uint stride, groups, used;  // groups, and those with columns of the weight
    float qmin, qmax, zero_step;
    float unit;  // a weight of 1 here is one of `unit` in the model, a power of two
};

const uint CANDIDATES = 19, LANES_OF_ZEROS = 24;
const float TINY = 1e-30;

uint first;   // of the group's weights
uint column;  // of its first

// (S1, S2) of levels rint(x * step) within low..high.
vec2 fit(float inverse, float step, float low, float high) {
    precise float s1 = 0.0, s2 = 0.0;
    [[dont_unroll]] for (uint i = 0; i < GROUP; i++) {
        precise float x = weight.at[first + i] * inverse;
        precise float scaled = x * step;
        float level = clamp(roundEven(scaled), low, high);
        precise float weighted = importance.at[column + i] * level;
        s1 += weighted * x;
        s2 += weighted * level;
    }
    return vec2(s1, s2);
}

float symmetric_scale(float largest) {
    precise float inverse = 1.0 / largest;
    float best = -1.0, scale = 0.0;
    [[dont_unroll]] for (uint k = 0; k < CANDIDATES; k++) {
        float step = steps.at[k];
        vec2 s = fit(inverse, step, qmin, qmax);
        precise float quality = s.x * s.x / s.y;
        if (quality > best) {
            best = quality;
            scale = s.x / s.y * largest;
        }
    }
    return scale;
}

// (scale, lowest level)
vec2 scale_and_low(float least, float most) {
    precise float inverse = 1.0 / (most - least);
    float span = qmax - qmin, best = -1.0;
    vec2 found = vec2(0.0);
    [[dont_unroll]] for (int shift = 0; shift < 3; shift++) {
        [[dont_unroll]] for (uint k = 0; k < LANES_OF_ZEROS; k++) {
            float step = steps.at[k];
            precise float nibble = roundEven(least * inverse * step / zero_step);
            float low = zero_step * clamp(nibble + float(shift == 1 ? -1 : shift / 2), -15.0, 0.0);
            vec2 s = fit(inverse, step, low, low + span);
            precise float quality = s.y > 0.0 ? s.x * s.x / s.y : 0.0;
            if (quality > best) {
                best = quality;
                found = vec2(s.x / s.y * (most - least), low);
            }
        }
    }
    return found;
}

void main() {
    uint group = gl_WorkGroupID.x * LANES + lane_index(), row = gl_WorkGroupID.y;
    if (group >= groups) {
        return;
    }
    column = group * GROUP;
    first = row * stride + column;
    float least = 0.0, most = 0.0, largest = 0.0;
    [[dont_unroll]] for (uint i = 0; i < GROUP; i++) {
        float w = weight.at[first + i];
        least = min(least, w);
        most = max(most, w);
        largest = abs(w) > abs(largest) ? w : largest;
    }
    vec2 found = vec2(0.0, qmin);
    if (group < used && KIND == 0 && abs(largest) * unit > TINY) {
        found.x = symmetric_scale(largest);
    } else if (group < used && KIND == 1 && (most - least) * unit > TINY) {
        found = scale_and_low(least, most);
    } else if (group < used && KIND == 2) {
        found.x = abs(largest) / 127.0;
    }
    float scale = nearest_half(found.x * unit) / unit;
    scales.at[row * groups + group] = scale;
    lows.at[row * groups + group] = scale == 0.0 ? qmin : found.y;
}
