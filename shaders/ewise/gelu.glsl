// SPDX-License-Identifier: MIT
// shaders/ewise/gelu.glsl: GELU, tanh form (Hendrycks & Gimpel 2016). 0.5·(1 + tanh u) = 1 / (1 + exp(-2u)), which neither
// overflows to NaN nor cancels.

const float GELU_C = 1.5957691216057308; // 2·sqrt(2/π)
const float GELU_A = 0.044715;

float gelu_gate(float x)
{
    return 1.0 / (1.0 + exp(-GELU_C * (x + GELU_A * x * x * x)));
}

float gelu(float x)
{
    return x * gelu_gate(x);
}

float gelu_grad(float x)
{
    const float s = gelu_gate(x);
    return s + x * s * (1.0 - s) * GELU_C * (1.0 + 3.0 * GELU_A * x * x);
}
