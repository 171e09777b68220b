// SPDX-License-Identifier: MIT
// shaders/linear/linear.h: push constants of the products with frozen weights.
#include "common/shared.h"

struct linear_pc {
    uint k;       // K: columns of W
    uint kb;      // 32-column blocks
    uint n;       // rows of this shard
    uint n_total; // N: columns of y
    uint row0;    // first row of the shard in W
    uint tile0;   // first tile of this dispatch within the shard
    uint tiles;   // tiles of this dispatch
    uint t0;      // first token of this dispatch
    uint n_tokens;
    uint add;     // 1: add to the result
};

struct embed_pc {
    uint k, kb;
    uint row0, n; // rows [row0, row0 + n) are in this shard
    uint n_tokens;
    float scale;
};
