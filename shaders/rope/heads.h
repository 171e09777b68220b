// SPDX-License-Identifier: MIT
// shaders/rope/heads.h: push constants of QK-norm with rotary embedding.
#include "common/shared.h"

struct heads_part {
    uint n_heads;
    uint x, w;     // where its input and its norm begin in the bound buffers
    uint y_rows;   // above 0: row slot % y_rows of the destination; 0: row t
    uint norm;     // 0: plain copy (values)
    uint packed;   // whether its destination holds packed heads (common/kv.glsl); 0: floats
};

struct heads_pc {
    uint head_dim;
    float eps;
    STRUCT(heads_part) part[3];
};

struct heads_bwd_pc {
    uint n_heads, head_dim;
    float eps;
};
