// SPDX-License-Identifier: MIT
// shaders/pool/pool.h: push constants of average pooling.
#include "common/shared.h"

struct pool_pc {
    uint grid;   // rows and columns of x
    uint kernel; // rows and columns of a square that becomes one row of y
    uint side;   // squares along a side: grid / kernel, rounded down
    uint width;
};
