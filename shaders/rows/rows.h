// SPDX-License-Identifier: MIT
// shaders/rows/rows.h: push constants of the ops on marked rows. C and GLSL.
#include "common/shared.h"

#define ROWS_ABLATE 0u // takes out the whole component
#define ROWS_CAP 1u    // takes out what lies above the limit
#define ROWS_FLOOR 2u  // adds what is missing to the limit

struct rows_pc {
    uint n_rows, width;
    uint k;    // directions
    uint row0; // rows_cov: first row of the matrix
    float a;   // rows_add: factor; rows_project: limit
};
