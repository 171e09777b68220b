// SPDX-License-Identifier: MIT
// shaders/attention/attention.h: push constants of attention. Probabilities P are [H][rows][cols]: row t - t0, column j - lo(t).
#include "common/shared.h"

struct attention_pc {
    uint n_tokens;   // tokens of the batch
    uint n_heads, n_kv_heads, head_dim;
    uint kv_rows;    // cache rows; row j lies at j % kv_rows
    uint t0;         // token of row 0 of P
    uint p_rows, p_cols;
    uint group0;     // first group of tokens (or keys) of this dispatch, counted from t0
    uint groups;     // groups of this dispatch
    float scale;
    uint add;        // keys: add to what is there
};

// Of the kernels for tokens that all see the same keys.
#define ATTENTION_ALL_TOKENS 16u // scores: tokens of a workgroup
#define ATTENTION_ALL_KEYS 4u    // scores: keys of a lane
#define ATTENTION_ALL_UNIT 32u   // mix: tokens of eight lanes
