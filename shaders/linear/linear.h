// SPDX-License-Identifier: MIT
// shaders/linear/linear.h: push constants of the products with frozen weights.
#include "common/shared.h"

// One of up to three matrices that a forward product goes through behind each other.
struct linear_part {
    uint w;      // its first word in the bound weights
    uint tile;   // its first tile, counted over all parts
    uint n;      // its rows
    uint y;      // where its y begins in the bound buffer
    uint h, b;   // LoRA: where h [T, r] and B [N, r] begin
    float scale; // LoRA
};

struct linear_fwd_pc {
    uint k;       // K: columns of W
    uint kb;      // 32-column blocks
    uint n_total; // one part: columns of y (several: each has its own n)
    uint row0;    // one part: first row of the shard in W
    uint tile0;   // first tile of this dispatch; gate tile where y is gelu(gate) · up
    uint tiles;   // tiles of this dispatch
    uint t0;      // first token of this dispatch
    uint n_tokens;
    uint add;     // 1: add to the result
    uint rank;    // LoRA
    STRUCT(linear_part) part[3];
};

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
