// SPDX-License-Identifier: MIT
// shaders/norm/norm.h: push constants of RMSNorm.
#include "common/shared.h"

struct norm_pc {
    uint width;
    float eps;
    uint flag; // forward: add the residual; backward: add to dx
};
