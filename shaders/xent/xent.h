// SPDX-License-Identifier: MIT
// shaders/xent/xent.h: push constants of the ops on vocabulary rows. A row is cut into segments of XENT_SEGMENT elements.
#include "common/shared.h"

#define XENT_SEGMENT 4096u

struct xent_pc {
    uint vocab;
    uint segments; // a row
    uint n_rows;
};
