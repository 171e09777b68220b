// SPDX-License-Identifier: MIT
// steer/geometry.c: how many dimensions a shift of activations has, which channels are massive, how subspaces lie to each other.
// Source: science notes 3.1, M7. What adapters add to the weights: delta.c.
#include "steer.h"

#include <lapacke.h>
#include <math.h>
#include <stdlib.h>

// --- shift of activations ------------------------------------------------------------------------

// Components, participation ratio and scree of a descending spectrum.
static void measure_spectrum(struct keel_shift_geometry *g, const double *spectrum, size_t n)
{
    static const double shares[] = { 0.5, 0.8, 0.9, 0.95 };
    double sum = 0, squares = 0, so_far = 0;
    for (size_t i = 0; i < n; i++) {
        sum += spectrum[i];
        squares += spectrum[i] * spectrum[i];
    }
    for (size_t i = 0, s = 0; i < n && s < KEEL_COUNT(shares); i++) {
        so_far += spectrum[i];
        while (s < KEEL_COUNT(shares) && so_far >= shares[s] * sum * (1 - 1e-12)) {
            g->components[s++] = (uint32_t)i + 1;
        }
    }
    for (size_t i = 0; i < n && i < KEEL_SCREE; i++) {
        g->scree[i] = spectrum[i] / sum;
    }
    g->participation = squares > 0 ? sum * sum / squares : 0;
}

static keel_status list_massive(struct keel_shift_geometry *g, const double *size, uint32_t width)
{
    uint8_t *use = malloc(width);
    const keel_status st = use ? keel_massive_of(size, width, use) : KEEL_ERR_NO_MEMORY;
    for (uint32_t c = 0; st == KEEL_OK && c < width; c++) {
        if (use[c] && g->n_massive++ < KEEL_COUNT(g->massive)) {
            g->massive[g->n_massive - 1] = c;
        }
    }
    free(use);
    return st;
}

// The leading directions of x as an orthonormal subspace; fewer where the spectrum says that x spans fewer.
static keel_status take_space(struct keel_direction *out, const double *x, size_t n, uint32_t d, uint32_t k, const double *spectrum,
                              size_t n_spectrum, const keel_log *log)
{
    keel_status st = KEEL_OK;
    double *u = NULL;
    while (k > n_spectrum || (k > 1 && !(spectrum[k - 1] > 1e-10 * spectrum[0]))) {
        k--;
    }
    u = malloc((size_t)k * d * sizeof *u);
    out->v = malloc((size_t)k * d * sizeof *out->v);
    if (!u || !out->v) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for %u directions", k);
    }
    KEEL_TRY(keel_top_vectors(x, n, d, k, u, NULL, log));
    for (size_t i = 0; i < (size_t)k * d; i++) {
        out->v[i] = (float)u[i];
    }
    out->k = k;
out:
    free(u);
    return st;
}

// x [n, d] after - before; returns the length of the mean row.
static double difference(double *x, const float *after, const float *before, size_t n, uint32_t d)
{
    double sum = 0;
    for (size_t i = 0; i < n * d; i++) {
        x[i] = (double)after[i] - (double)before[i];
    }
    for (uint32_t c = 0; c < d; c++) {
        double mean = 0;
        for (size_t i = 0; i < n; i++) {
            mean += x[i * d + c] / (double)n;
        }
        sum += mean * mean;
    }
    return sqrt(sum);
}

keel_status keel_geometry_shift(struct keel_shift_geometry *out, struct keel_directions *spaces, uint32_t k,
                                const struct keel_capture *after, const struct keel_capture *before, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t d = after->width;
    const size_t n = after->n_rows, rank = KEEL_MIN(n, (size_t)d);
    double *x = malloc(n * d * sizeof *x), *u = malloc(d * sizeof *u), *spectrum = malloc(rank * sizeof *spectrum);
    KEEL_ASSERT(before->n_rows == n && before->width == d && before->n_layers == after->n_layers);
    *spaces = (struct keel_directions){ .width = d, .site = after->site, .method = "svd" };
    spaces->at = calloc(after->n_layers, sizeof *spaces->at);
    if (!x || !u || !spectrum || !spaces->at) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the shift of %zu rows", n);
    }
    for (uint32_t i = 0; i < after->n_layers; i++) {
        const struct keel_capture_layer *a = &after->layer[i], *b = &before->layer[i];
        out[i] = (struct keel_shift_geometry){ .layer = a->layer, .median_norm = b->median_norm };
        out[i].mean_shift = difference(x, a->rows, b->rows, n, d);
        KEEL_TRY(list_massive(&out[i], b->size, d));
        if (out[i].mean_shift > 0) {
            struct keel_direction *space = &spaces->at[spaces->n++];
            space->layer = a->layer;
            space->median_norm = b->median_norm;
            KEEL_TRY(keel_top_vectors(x, n, d, 1, u, spectrum, log));
            measure_spectrum(&out[i], spectrum, rank);
            KEEL_TRY(take_space(space, x, n, d, k, spectrum, rank, log));
        }
    }
out:
    free(x);
    free(u);
    free(spectrum);
    if (st != KEEL_OK) {
        keel_directions_finish(spaces);
    }
    return st;
}

// --- subspaces -----------------------------------------------------------------------------------

// Beside the longest of what is left of them: rows are of 24 bits, so that dependent ones leave about 1e-7.
#define RANK_TOL 1e-6

// Orthonormal columns q [width, k] of which the first *rank span the rows of v [k, width]. QR takes the longest remaining row first, so
// that rows which depend on others come last and are not counted.
static keel_status orthonormal(double *q, const float *v, uint32_t k, uint32_t width, uint32_t *rank, const keel_log *log)
{
    keel_status st = KEEL_OK;
    double *tau = malloc(k * sizeof *tau);
    lapack_int *pivot = calloc(k, sizeof *pivot);
    if (!tau || !pivot) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a subspace of %u directions", k);
    }
    for (uint32_t j = 0; j < k; j++) {
        for (uint32_t c = 0; c < width; c++) {
            q[(size_t)c * k + j] = (double)v[(size_t)j * width + c];
        }
    }
    if (LAPACKE_dgeqp3(LAPACK_ROW_MAJOR, (lapack_int)width, (lapack_int)k, q, (lapack_int)k, pivot, tau) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "a subspace of %u directions cannot be made orthonormal", k);
    }
    for (*rank = 0; *rank < k && fabs(q[(size_t)*rank * k + *rank]) > RANK_TOL * fabs(q[0]); ++*rank) {
    }
    if (LAPACKE_dorgqr(LAPACK_ROW_MAJOR, (lapack_int)width, (lapack_int)k, (lapack_int)k, q, (lapack_int)k, tau) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "a subspace of %u directions cannot be made orthonormal", k);
    }
out:
    free(tau);
    free(pivot);
    return st;
}

keel_status keel_geometry_overlap(const struct keel_direction *a, const struct keel_direction *b, uint32_t width, double *cosines,
                                  double *overlap, uint32_t rank[2], const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t k = a->k, m = b->k;
    double *p = malloc((size_t)width * k * sizeof *p), *q = malloc((size_t)width * m * sizeof *q);
    double *c = calloc((size_t)k * m, sizeof *c), *rest = malloc((size_t)KEEL_MIN(k, m) * sizeof *rest);
    if (!p || !q || !c || !rest) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory to compare subspaces of %u and %u directions", k, m);
    }
    KEEL_TRY(orthonormal(p, a->v, k, width, &rank[0], log));
    KEEL_TRY(orthonormal(q, b->v, m, width, &rank[1], log));
    const uint32_t r = rank[0], s = rank[1], n = KEEL_MIN(r, s);
    if (n == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "layer %u: the %s direction has length 0: there is no angle to it; leave this layer out", a->layer,
                  r == 0 ? "first" : "other");
    }
    for (uint32_t x = 0; x < width; x++) {
        for (uint32_t i = 0; i < r; i++) {
            for (uint32_t j = 0; j < s; j++) {
                c[(size_t)i * s + j] += p[(size_t)x * k + i] * q[(size_t)x * m + j];
            }
        }
    }
    if (LAPACKE_dgesvd(LAPACK_ROW_MAJOR, 'N', 'N', (lapack_int)r, (lapack_int)s, c, (lapack_int)s, cosines, NULL, 1, NULL, 1, rest) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the angles between subspaces of %u and %u directions did not converge", k, m);
    }
    *overlap = 0;
    for (uint32_t i = 0; i < n; i++) {
        cosines[i] = KEEL_MIN(cosines[i], 1);
        *overlap += cosines[i] * cosines[i] / n;
    }
out:
    free(p);
    free(q);
    free(c);
    free(rest);
    return st;
}
