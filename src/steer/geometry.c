// SPDX-License-Identifier: MIT
// steer/geometry.c: how many dimensions a shift of activations has, how subspaces lie to each other, what an adapter adds to the
// weights. Source: science notes 3.1, M7.
#include "steer.h"

#include <lapacke.h>
#include <math.h>
#include <stdlib.h>

// --- shift of activations ------------------------------------------------------------------------

static void count_components(struct keel_shift_geometry *g, const double *spectrum, size_t n)
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
    g->participation = squares > 0 ? sum * sum / squares : 0;
}

keel_status keel_geometry_shift(struct keel_shift_geometry *out, const struct keel_capture *after, const struct keel_capture *before,
                                const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t d = after->width;
    const size_t n = after->n_rows, rank = KEEL_MIN(n, (size_t)d);
    double *x = malloc(n * d * sizeof *x), *u = malloc(d * sizeof *u), *spectrum = malloc(rank * sizeof *spectrum);
    KEEL_ASSERT(before->n_rows == n && before->width == d && before->n_layers == after->n_layers);
    if (!x || !u || !spectrum) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the shift of %zu rows", n);
    }
    for (uint32_t k = 0; k < after->n_layers; k++) {
        double norm = 0;
        for (size_t i = 0; i < n * d; i++) {
            x[i] = (double)after->layer[k].rows[i] - (double)before->layer[k].rows[i];
        }
        for (uint32_t c = 0; c < d; c++) {
            double mean = 0;
            for (size_t i = 0; i < n; i++) {
                mean += x[i * d + c] / (double)n;
            }
            norm += mean * mean;
        }
        out[k] = (struct keel_shift_geometry){ .layer = after->layer[k].layer, .mean_shift = sqrt(norm),
                                               .median_norm = before->layer[k].median_norm };
        if (norm > 0) {
            KEEL_TRY(keel_top_vectors(x, n, d, 1, u, spectrum, log));
            count_components(&out[k], spectrum, rank);
        }
    }
out:
    free(x);
    free(u);
    free(spectrum);
    return st;
}

// --- subspaces -----------------------------------------------------------------------------------

// Orthonormal columns q [width, k] that span the rows of v [k, width].
static keel_status orthonormal(double *q, const float *v, uint32_t k, uint32_t width, const keel_log *log)
{
    keel_status st = KEEL_OK;
    double *tau = malloc(k * sizeof *tau);
    if (!tau) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a subspace of %u directions", k);
    }
    for (uint32_t j = 0; j < k; j++) {
        for (uint32_t c = 0; c < width; c++) {
            q[(size_t)c * k + j] = (double)v[(size_t)j * width + c];
        }
    }
    if (LAPACKE_dgeqrf(LAPACK_ROW_MAJOR, (lapack_int)width, (lapack_int)k, q, (lapack_int)k, tau) != 0 ||
        LAPACKE_dorgqr(LAPACK_ROW_MAJOR, (lapack_int)width, (lapack_int)k, (lapack_int)k, q, (lapack_int)k, tau) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "a subspace of %u directions cannot be made orthonormal", k);
    }
out:
    free(tau);
    return st;
}

keel_status keel_geometry_overlap(const struct keel_direction *a, const struct keel_direction *b, uint32_t width, double *cosines,
                                  double *overlap, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t k = a->k, m = b->k, n = KEEL_MIN(k, m);
    double *p = malloc((size_t)width * k * sizeof *p), *q = malloc((size_t)width * m * sizeof *q);
    double *c = calloc((size_t)k * m, sizeof *c), *rest = malloc((size_t)n * sizeof *rest);
    if (!p || !q || !c || !rest) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory to compare subspaces of %u and %u directions", k, m);
    }
    KEEL_TRY(orthonormal(p, a->v, k, width, log));
    KEEL_TRY(orthonormal(q, b->v, m, width, log));
    for (uint32_t x = 0; x < width; x++) {
        for (uint32_t i = 0; i < k; i++) {
            for (uint32_t j = 0; j < m; j++) {
                c[(size_t)i * m + j] += p[(size_t)x * k + i] * q[(size_t)x * m + j];
            }
        }
    }
    if (LAPACKE_dgesvd(LAPACK_ROW_MAJOR, 'N', 'N', (lapack_int)k, (lapack_int)m, c, (lapack_int)m, cosines, NULL, 1, NULL, 1, rest) != 0) {
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

// --- adapters ------------------------------------------------------------------------------------

// g [r, r] = xᵀ x of x [n, r], or x xᵀ of x [r, n].
static void small_gram(double *g, const float *x, uint32_t r, uint32_t n, bool tall)
{
    for (uint32_t i = 0; i < r; i++) {
        for (uint32_t j = 0; j <= i; j++) {
            double sum = 0;
            for (size_t c = 0; c < n; c++) {
                sum += (double)(tall ? x[c * r + i] : x[i * (size_t)n + c]) * (double)(tall ? x[c * r + j] : x[j * (size_t)n + c]);
            }
            g[i * r + j] = g[j * r + i] = sum;
        }
    }
}

// Squared singular values of B A, ascending, from BᵀB and A Aᵀ (both destroyed): the eigenvalues of (A Aᵀ)½ BᵀB (A Aᵀ)½.
static keel_status product_spectrum(double *gb, double *ga, uint32_t r, double *values, const keel_log *log)
{
    keel_status st = KEEL_OK;
    double *m = calloc((size_t)r * r, sizeof *m), *t = calloc((size_t)r * r, sizeof *t);
    if (!m || !t) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the spectrum of an adapter of rank %u", r);
    }
    if (LAPACKE_dsyev(LAPACK_ROW_MAJOR, 'V', 'U', (lapack_int)r, ga, (lapack_int)r, values) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the spectrum of an adapter of rank %u did not converge", r);
    }
    for (uint32_t i = 0; i < r; i++) { // columns of V √λ: a square root up to a rotation, which does not matter
        for (uint32_t j = 0; j < r; j++) {
            ga[i * r + j] *= sqrt(KEEL_MAX(values[j], 0));
        }
    }
    for (uint32_t i = 0; i < r; i++) {
        for (uint32_t j = 0; j < r; j++) {
            for (uint32_t k = 0; k < r; k++) {
                t[i * r + j] += gb[i * r + k] * ga[k * r + j];
            }
        }
    }
    for (uint32_t i = 0; i < r; i++) {
        for (uint32_t j = 0; j < r; j++) {
            for (uint32_t k = 0; k < r; k++) {
                m[i * r + j] += ga[k * r + i] * t[k * r + j];
            }
        }
    }
    if (LAPACKE_dsyev(LAPACK_ROW_MAJOR, 'N', 'U', (lapack_int)r, m, (lapack_int)r, values) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the spectrum of an adapter of rank %u did not converge", r);
    }
out:
    free(m);
    free(t);
    return st;
}

static keel_status measure(struct keel_delta *out, const struct keel_lora *p, keel_device *dev, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t r = p->rank;
    const size_t na = (size_t)r * p->k, nb = (size_t)r * p->n;
    float *a = malloc(na * sizeof *a), *b = malloc(nb * sizeof *b);
    double *ga = malloc((size_t)r * r * sizeof *ga), *gb = malloc((size_t)r * r * sizeof *gb), *values = malloc(r * sizeof *values);
    if (!a || !b || !ga || !gb || !values) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for an adapter of rank %u", r);
    }
    KEEL_TRY(keel_download(dev, a, keel_span_sub(p->a, 0, na * sizeof *a), na * sizeof *a));
    KEEL_TRY(keel_download(dev, b, keel_span_sub(p->b, 0, nb * sizeof *b), nb * sizeof *b));
    small_gram(ga, a, r, p->k, false);
    small_gram(gb, b, r, p->n, true);
    KEEL_TRY(product_spectrum(gb, ga, r, values, log));
    double sum = 0;
    for (uint32_t i = 0; i < r; i++) {
        sum += KEEL_MAX(values[i], 0);
    }
    out->rank = r;
    out->frobenius = fabs((double)p->scale) * sqrt(sum);
    out->spectral = fabs((double)p->scale) * sqrt(KEEL_MAX(values[r - 1], 0));
    out->stable_rank = values[r - 1] > 0 ? sum / values[r - 1] : 0;
out:
    free(a);
    free(b);
    free(ga);
    free(gb);
    free(values);
    return st;
}

keel_status keel_geometry_adapter(struct keel_delta **out, size_t *n, keel_model *model, const char *path, float scale)
{
    keel_status st = KEEL_OK;
    keel_device *dev = keel_model_device(model);
    const keel_log *log = keel_device_log(dev);
    keel_adapter *a = NULL;
    *out = NULL;
    *n = 0;
    KEEL_TRY(keel_adapter_load(&a, model, path, scale));
    *out = calloc((size_t)a->n_layers * KEEL_N_PROJ, sizeof **out);
    if (!*out) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the geometry of %s", path);
    }
    for (size_t i = 0; i < (size_t)a->n_layers * KEEL_N_PROJ; i++) {
        if (a->pair[i].rank > 0) {
            struct keel_delta *d = &(*out)[(*n)++];
            *d = (struct keel_delta){ .layer = (uint32_t)(i / KEEL_N_PROJ), .module = keel_proj_name[i % KEEL_N_PROJ] };
            KEEL_TRY(measure(d, &a->pair[i], dev, log));
        }
    }
out:
    keel_adapter_destroy(&a);
    if (st != KEEL_OK) {
        free(*out);
        *out = NULL;
    }
    return st;
}
