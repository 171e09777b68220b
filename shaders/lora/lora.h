// SPDX-License-Identifier: MIT
// shaders/lora/lora.h: push constants of the low-rank products. M is an adapter matrix read as m[long * s_long + c * s_rank],
// where `long` runs over the wide side (K or N) and c over the rank: both A [r, K] and B [N, r] fit.
#include "common/shared.h"

// What is read four at once: nothing; M along the wide side (A, wide a multiple of four) or along the rank (B, rank a multiple of four),
// and the vectors by which it is multiplied; these alone.
#define LORA_ONE 0u
#define LORA_FOUR_WIDE 1u
#define LORA_FOUR_RANK 2u
#define LORA_FOUR_H 3u

struct lora_pc {
    uint wide;     // K or N
    uint rank;
    uint s_wide;   // stride of m along the wide side
    uint s_rank;   // stride of m along the rank
    uint n_tokens;
    float scale;
    uint m_at[3], h_at[3]; // lora_reduce: where M and h of each workgroup in z begin
};
