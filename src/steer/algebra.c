// SPDX-License-Identifier: MIT
// steer/algebra.c: small dense algebra on top of LAPACK.
#include "steer.h"

#include <lapacke.h>
#include <math.h>
#include <stdlib.h>

struct gram {
    double *g;
    const double *x;
    size_t n;
    uint32_t width;
};

static void gram_row(void *user, uint32_t i)
{
    const struct gram *r = user;
    const double *a = r->x + (size_t)i * r->width;
    for (size_t j = 0; j <= i; j++) {
        const double *b = r->x + j * r->width;
        double sum = 0;
        for (uint32_t c = 0; c < r->width; c++) {
            sum += a[c] * b[c];
        }
        r->g[i * r->n + j] = r->g[j * r->n + i] = sum;
    }
}

void keel_gram(double *g, const double *x, size_t n, uint32_t width)
{
    struct gram r = { g, x, n, width };
    keel_parallel_for((uint32_t)n, gram_row, &r);
}

static void transpose(double *t, const double *x, size_t n, uint32_t width)
{
    for (size_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < width; c++) {
            t[c * n + i] = x[i * width + c];
        }
    }
}

keel_status keel_top_vectors(const double *x, size_t n, uint32_t width, uint32_t k, double *u, double *spectrum, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const bool tall = n > width; // the smaller of x xᵀ and xᵀ x
    const uint32_t m = tall ? width : (uint32_t)n;
    double *t = tall ? malloc(n * width * sizeof *t) : NULL;
    double *g = malloc((size_t)m * m * sizeof *g), *values = malloc(m * sizeof *values), *vectors = malloc((size_t)m * KEEL_MAX(k, 1) * sizeof *vectors);
    lapack_int found, *support = malloc(2 * (size_t)m * sizeof *support);
    if (!g || !values || !vectors || !support || (tall && !t)) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a decomposition of %zu rows of %u", n, width);
    }
    if (k > m) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%u directions cannot come from %zu rows of width %u; ask for fewer or give more rows", k, n, width);
    }
    if (tall) {
        transpose(t, x, n, width);
    }
    keel_gram(g, tall ? t : x, m, tall ? (uint32_t)n : width);
    if (LAPACKE_dsyevr(LAPACK_ROW_MAJOR, 'V', 'I', 'U', (lapack_int)m, g, (lapack_int)m, 0, 0, (lapack_int)(m - k + 1), (lapack_int)m, 0,
                       &found, values, vectors, (lapack_int)k, support) != 0 || found != (lapack_int)k) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the decomposition of %zu rows of %u did not converge", n, width);
    }
    for (uint32_t j = 0; j < k; j++) { // ascending in `values`
        const double lambda = values[k - 1 - j], scale = tall ? 1 : 1 / sqrt(lambda);
        double *row = u + (size_t)j * width;
        if (!(lambda > 1e-12 * values[k - 1]) || lambda <= 0) {
            KEEL_FAIL(log, KEEL_ERR_DATA, "the rows span only %u directions; ask for fewer", j);
        }
        for (uint32_t c = 0; c < width; c++) {
            row[c] = tall ? vectors[(size_t)c * k + (k - 1 - j)] : 0;
        }
        for (size_t i = 0; !tall && i < n; i++) {
            const double a = vectors[i * k + (k - 1 - j)] * scale;
            for (uint32_t c = 0; c < width; c++) {
                row[c] += a * x[i * width + c];
            }
        }
    }
    if (spectrum) {
        keel_gram(g, tall ? t : x, m, tall ? (uint32_t)n : width);
        if (LAPACKE_dsyev(LAPACK_ROW_MAJOR, 'N', 'U', (lapack_int)m, g, (lapack_int)m, values) != 0) {
            KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the spectrum of %zu rows of %u did not converge", n, width);
        }
        for (uint32_t i = 0; i < m; i++) {
            spectrum[i] = KEEL_MAX(values[m - 1 - i], 0);
        }
    }
out:
    free(t);
    free(g);
    free(values);
    free(vectors);
    free(support);
    return st;
}

keel_status keel_solve_symmetric(double *a, double *b, uint32_t n, const keel_log *log)
{
    keel_status st = KEEL_OK;
    lapack_int *pivot = malloc(n * sizeof *pivot);
    if (!pivot) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a system of %u equations", n);
    }
    if (LAPACKE_dsysv(LAPACK_ROW_MAJOR, 'U', (lapack_int)n, 1, a, (lapack_int)n, pivot, b, 1) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "a system of %u equations is singular", n);
    }
out:
    free(pivot);
    return st;
}
