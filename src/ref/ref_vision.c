// SPDX-License-Identifier: MIT
// src/ref/ref_vision.c: the ops that only the vision tower uses: LayerNorm, plain GELU, biases, pooling. See ref.h.
#include "ref.h"

#include <math.h>
#include <string.h>

void ref_layernorm(double *y, const double *x, const double *w, const double *b, int T, int D, double eps)
{
    for (int t = 0; t < T; t++) {
        const double *xt = x + (size_t)t * D; // [D]
        double mean = 0, var = 0;
        for (int i = 0; i < D; i++) {
            mean += xt[i] / D;
        }
        for (int i = 0; i < D; i++) {
            var += (xt[i] - mean) * (xt[i] - mean) / D;
        }
        for (int i = 0; i < D; i++) {
            y[(size_t)t * D + i] = (xt[i] - mean) / sqrt(var + eps) * w[i] + b[i];
        }
    }
}

void ref_layernorm_bwd(double *dx, const double *x, const double *w, const double *dy, int T, int D, double eps, bool add)
{
    for (int t = 0; t < T; t++) {
        const size_t at = (size_t)t * D;
        double mean = 0, var = 0, mean_g = 0, mean_gz = 0;
        for (int i = 0; i < D; i++) {
            mean += x[at + i] / D;
        }
        for (int i = 0; i < D; i++) {
            var += (x[at + i] - mean) * (x[at + i] - mean) / D;
        }
        const double r = 1 / sqrt(var + eps);
        for (int i = 0; i < D; i++) {
            mean_g += dy[at + i] * w[i] / D;
            mean_gz += dy[at + i] * w[i] * (x[at + i] - mean) * r / D;
        }
        for (int i = 0; i < D; i++) {
            const double v = r * (dy[at + i] * w[i] - mean_g - (x[at + i] - mean) * r * mean_gz);
            dx[at + i] = add ? dx[at + i] + v : v;
        }
    }
}

static double tanh_gelu(double x)
{
    return x / 2 * (1 + tanh(sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x)));
}

void ref_gelu(double *y, const double *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        y[i] = tanh_gelu(x[i]);
    }
}

void ref_gelu_bwd(double *dx, const double *x, const double *dy, size_t n)
{
    const double c = sqrt(2 / acos(-1));
    for (size_t i = 0; i < n; i++) {
        const double t = tanh(c * (x[i] + 0.044715 * x[i] * x[i] * x[i]));
        dx[i] = dy[i] * ((1 + t) / 2 + x[i] / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * x[i] * x[i]));
    }
}

void ref_bias(double *y, const double *x, const double *b, const double *residual, int T, int N)
{
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < N; i++) {
            const size_t at = (size_t)t * N + i;
            y[at] = x[at] + b[i] + (residual ? residual[at] : 0);
        }
    }
}

void ref_pool(double *y, const double *x, int grid, int kernel, int D)
{
    const int side = grid / kernel;
    memset(y, 0, (size_t)side * side * D * sizeof *y);
    for (int r = 0; r < side * kernel; r++) {
        for (int c = 0; c < side * kernel; c++) {
            for (int i = 0; i < D; i++) {
                const size_t j = (size_t)(r / kernel) * side + c / kernel;
                y[j * D + i] += x[((size_t)r * grid + c) * D + i] / (kernel * kernel);
            }
        }
    }
}

void ref_pool_bwd(double *dx, const double *dy, int grid, int kernel, int D)
{
    const int side = grid / kernel;
    memset(dx, 0, (size_t)grid * grid * D * sizeof *dx);
    for (int r = 0; r < side * kernel; r++) {
        for (int c = 0; c < side * kernel; c++) {
            for (int i = 0; i < D; i++) {
                const size_t j = (size_t)(r / kernel) * side + c / kernel;
                dx[((size_t)r * grid + c) * D + i] = dy[j * D + i] / (kernel * kernel);
            }
        }
    }
}
