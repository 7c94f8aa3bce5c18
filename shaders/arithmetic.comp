#version 460
#extension GL_GOOGLE_include_directive : require
#ifdef MATRIX
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#pragma use_vulkan_memory_model
#endif
#ifdef INTEGER_DOT
#extension GL_EXT_integer_dot_product : require
#endif
// Products and sums in registers and nothing else: how fast the arithmetic of a GEMM could be. MATRIX:
// 16 x 16 x 16, float16 into float32. INTEGER_DOT: four bytes at a time. Otherwise float32.
// A lane's CHAINS do not wait for each other (kernels/vulkan/arithmetic.py counts their operations).
#include "common.glsl"

layout(push_constant) uniform Push {
    Floats sums;  // one for each invocation
    uint rounds;
    float factor;
};

#ifdef MATRIX
const uint CHAINS = 4;
#define Chain coopmat<float, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>
#define FactorA coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define FactorB coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>

Chain begun(uint i) {
    return Chain(float(i));
}

Chain next(Chain chain) {
    return coopMatMulAdd(FactorA(float16_t(factor)), FactorB(float16_t(factor)), chain);
}

float value(Chain chain) {
    return chain[0];
}
#elif defined(INTEGER_DOT)
const uint CHAINS = 16;
#define Chain int

Chain begun(uint i) {
    return int(i);
}

Chain next(Chain chain) {
    return dotPacked4x8EXT(chain, 0x01010101) + chain;
}

float value(Chain chain) {
    return float(chain);
}
#else
const uint CHAINS = 8;
#define Chain vec4

Chain begun(uint i) {
    return vec4(i);
}

Chain next(Chain chain) {
    return fma(chain, vec4(factor), vec4(1.0));
}

float value(Chain chain) {
    return chain.x + chain.y + chain.z + chain.w;
}
#endif

void main() {
    Chain chains[CHAINS];
    [[unroll]] for (uint i = 0; i < CHAINS; i++) {
        chains[i] = begun(i);
    }
    for (uint round_ = 0; round_ < rounds; round_++) {
        [[unroll]] for (uint i = 0; i < CHAINS; i++) {
            chains[i] = next(chains[i]);
        }
    }
    float total = 0.0;
    [[unroll]] for (uint i = 0; i < CHAINS; i++) {
        total += value(chains[i]);
    }
    sums.at[gl_WorkGroupID.x * LANES + lane_index()] = total;
}
