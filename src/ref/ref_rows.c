// SPDX-License-Identifier: MIT
// src/ref/ref_rows.c: ops on marked rows: steering, products with directions, running sums. See ref.h.
#include "ref.h"

#include <math.h>
#include <string.h>

void ref_rows_add(double *x, const double *v, const double *marks, int T, int D, double a)
{
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < D; i++) {
            x[(size_t)t * D + i] += a * marks[t] * v[i];
        }
    }
}

void ref_rows_dot(double *y, const double *x, const double *u, int T, int k, int D)
{
    for (int t = 0; t < T; t++) {
        for (int j = 0; j < k; j++) {
            double sum = 0;
            for (int i = 0; i < D; i++) {
                sum += x[(size_t)t * D + i] * u[(size_t)j * D + i];
            }
            y[(size_t)t * k + j] = sum;
        }
    }
}

void ref_rows_project(double *x, double *factor, const double *u, const double *marks, int T, int D, int k, int mode, double limit)
{
    for (int t = 0; t < T; t++) {
        double *row = x + (size_t)t * D;
        factor[t] = 0;
        for (int j = 0; j < k; j++) {
            double over;
            ref_rows_dot(&over, row, u + (size_t)j * D, 1, 1, D);
            over = mode == 0 ? over : mode == 1 ? fmax(over - limit, 0) : fmin(over - limit, 0);
            factor[t] = mode != 0 && over != 0 ? marks[t] : 0;
            for (int i = 0; i < D; i++) {
                row[i] -= marks[t] * over * u[(size_t)j * D + i];
            }
        }
    }
}

void ref_rows_sums(double *sum, double *square, double *size, const double *x, const double *marks, const double *shift, int T, int D)
{
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < D; i++) {
            const double v = x[(size_t)t * D + i], d = v - shift[i];
            sum[i] += marks[t] * d;
            square[i] += marks[t] * d * d;
            size[i] += marks[t] * fabs(v);
        }
    }
}

void ref_rows_cov(double *cov, const double *x, const double *marks, const double *shift, int T, int D)
{
    for (int t = 0; t < T; t++) {
        const double *row = x + (size_t)t * D;
        for (int i = 0; i < D; i++) {
            for (int j = 0; j < D; j++) {
                cov[(size_t)i * D + j] += marks[t] * (row[i] - shift[i]) * (row[j] - shift[j]);
            }
        }
    }
}

void ref_rows_pool(double *y, const double *x, const double *marks, const uint32_t *segments, int R, int D)
{
    memset(y, 0, (size_t)R * D * sizeof *y);
    for (int r = 0; r < R; r++) {
        for (uint32_t t = segments[2 * r]; t < segments[2 * r + 1]; t++) {
            for (int i = 0; i < D; i++) {
                y[(size_t)r * D + i] += marks[t] * x[(size_t)t * D + i];
            }
        }
    }
}
