// SPDX-License-Identifier: MIT
// shaders/common/reduce.glsl: sum over the lanes of a workgroup with one barrier: every lane adds all partial values in the same
// order, which beats a tree on CPU drivers by 1.2 to 1.9 (portability notes) and is as deterministic. At most 64 lanes: as many on
// a GPU, on a CPU one subgroup, which has no barrier to wait at and less to add (reduce_lanes() in src/ops).

shared float reduce_part[64];

// All lanes must call it. `again`: the shared array was used before in this invocation.
float reduce_sum(float v, bool again)
{
    if (again) {
        barrier(); // the previous reduction may still be read
    }
    reduce_part[gl_LocalInvocationID.x] = v;
    barrier();
    float sum = 0.0;
    [[unroll]] for (uint i = 0; i < gl_WorkGroupSize.x; i++) {
        sum += reduce_part[i];
    }
    return sum;
}

float reduce_max(float v, bool again)
{
    if (again) {
        barrier();
    }
    reduce_part[gl_LocalInvocationID.x] = v;
    barrier();
    float best = reduce_part[0];
    [[unroll]] for (uint i = 1; i < gl_WorkGroupSize.x; i++) {
        best = max(best, reduce_part[i]);
    }
    return best;
}
