// SPDX-License-Identifier: MIT
// device/mad.comp: chains of fp32 multiply-adds in registers, to measure what the device can compute.
// Eight independent chains hide the latency of one; values stay finite because |a| < 1.
#version 450
layout(local_size_x_id = 0) in;

layout(constant_id = 1) const uint ROUNDS = 64;

layout(binding = 0) writeonly buffer Y { float y[]; }; // [invocations]
layout(push_constant) uniform Push { float a, b; };

void main()
{
    const uint i = gl_GlobalInvocationID.x;
    vec4 u = vec4(i) * 1e-6 + vec4(0.0, 0.1, 0.2, 0.3);
    vec4 v = u + 0.05;
    for (uint r = 0; r < ROUNDS; ++r) {
        // 16 × 8 multiply-adds = 256 FLOP a round
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
        u = u * a + b; v = v * a + b; u = u * a + b; v = v * a + b;
    }
    const vec4 s = u + v;
    y[i] = s.x + s.y + s.z + s.w;
}
