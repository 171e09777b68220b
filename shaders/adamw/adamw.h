// SPDX-License-Identifier: MIT
// shaders/adamw/adamw.h: push constants of the optimiser.
#include "common/shared.h"

#define SUMSQ_SEGMENT 16384u

struct sumsq_pc {
    uint n;
};

struct adamw_pc {
    uint n;
    float lr, beta1, beta2, eps, weight_decay, clip;
    float bias1, sqrt_bias2;
};
