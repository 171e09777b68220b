// SPDX-License-Identifier: MIT
// shaders/ewise/ewise.h: push constants of the element-wise ops.
#include "common/shared.h"

struct ewise_pc {
    uint n;     // elements
    uint width; // row ops: elements a row
    float a;
};
