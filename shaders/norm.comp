#version 460
#extension GL_GOOGLE_include_directive : require
// hidden += norm(branch); x = activations of norm(hidden). One workgroup for each column.
#include "common.glsl"
layout(constant_id = 1) const bool FLOAT_X = false;
#include "activations.glsl"
#include "norm.glsl"

layout(push_constant) uniform Push {
    Quads branch, hidden, branch_gain, gain, normed;
    Uints x;
};

void main() {
    add_and_norm(gl_WorkGroupID.x, branch, hidden, branch_gain, gain, normed, x);
}
