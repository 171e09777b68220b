// SPDX-License-Identifier: MIT
// shaders/rope/heads.h: push constants of QK-norm with rotary embedding.
#include "common/shared.h"

struct heads_pc {
    uint n_heads, head_dim;
    uint y_rows;   // rows of the destination
    uint use_slot; // 1: row slot % y_rows of the destination, 0: row t
    float eps;
};
