// SPDX-License-Identifier: MIT
// shaders/xent/top.h: push constants of the ops on a row's listed elements (TOP of them) and the rest of it, its tail.
#include "xent/xent.h"

#define TOP 64u
#define TOP_TAKEN -3.402823e38 // the logit of a listed element while the tail is summed

struct top_pc {
    uint vocab;
    uint segments; // a row
    uint n_top;    // listed elements a row, at most TOP; the rest of the list is not read
    uint n_rows;
};
