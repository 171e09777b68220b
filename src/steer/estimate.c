// SPDX-License-Identifier: MIT
// steer/estimate.c: directions from rows of two classes.
// Sources: difference of means: Arditi et al. 2024, arXiv 2506.11618; pca_diff and pca_center as repeng computes them (Zou et al.
// 2023): leading principal component of centred differences, sign by majority of pairs; LDA: Fisher 1936 with the correlation
// matrix shrunk to the identity; probe: ridge logistic regression by Newton's method in the dual.
#include "steer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MASSIVE 20.0      // times the median channel's mean |h|
#define LDA_SHRINK 0.1    // share of the identity
#define PROBE_RIDGE 1.0   // λ of λ/2 |w|² beside the summed log-loss, on standardised channels
#define PROBE_STEPS 50
#define EQUAL 1e-12 // differences this small beside the activations are what summing in another order leaves

const char *const keel_method_name[KEEL_N_METHODS] = { "mean", "mean_z", "mean_mask", "lda", "probe", "pca_diff", "pca_center", "svd" };

// What most estimators start from.
struct moments {
    double *delta;     // [width] mean(pos) - mean(neg)
    double *mp, *mn;   // means
    double *sd;        // within classes
    double *all, *sd_all; // of both classes as one
    double size;       // length of the classes' means
};

static double dot(const double *a, const double *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

static const float *row_of(const struct keel_sample *s, size_t i)
{
    return i < s->np ? s->pos + (size_t)s->ip[i] * s->width : s->neg + (size_t)s->in[i - s->np] * s->width;
}

static keel_status moments_make(struct moments *m, const struct keel_sample *s, const keel_log *log)
{
    const uint32_t d = s->width;
    const size_t n = s->np + s->nn;
    double *all = calloc(6 * (size_t)d, sizeof *all), top = 0, top_all = 0;
    if (!all) {
        KEEL_ERROR(log, "no memory for moments of %u channels", d);
        return KEEL_ERR_NO_MEMORY;
    }
    *m = (struct moments){ all, all + d, all + 2 * d, all + 3 * d, all + 4 * d, all + 5 * d, 0 };
    for (size_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < d; c++) {
            (i < s->np ? m->mp : m->mn)[c] += (double)row_of(s, i)[c] / (double)(i < s->np ? s->np : s->nn);
            m->all[c] += (double)row_of(s, i)[c] / (double)n;
        }
    }
    for (size_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < d; c++) {
            const double x = (double)row_of(s, i)[c], w = x - (i < s->np ? m->mp : m->mn)[c], a = x - m->all[c];
            m->sd[c] += w * w;
            m->sd_all[c] += a * a;
        }
    }
    for (uint32_t c = 0; c < d; c++) {
        m->delta[c] = m->mp[c] - m->mn[c];
        m->sd[c] = sqrt(m->sd[c] / (double)(n > 2 ? n - 2 : 1));
        m->sd_all[c] = sqrt(m->sd_all[c] / (double)n);
        top = KEEL_MAX(top, m->sd[c]);
        top_all = KEEL_MAX(top_all, m->sd_all[c]);
    }
    for (uint32_t c = 0; c < d; c++) { // a channel that never changes must not become the whole direction
        m->sd[c] = KEEL_MAX(m->sd[c], 1e-6 * top + 1e-30);
        m->sd_all[c] = KEEL_MAX(m->sd_all[c], 1e-6 * top_all + 1e-30);
    }
    m->size = sqrt(dot(m->mp, m->mp, d)) + sqrt(dot(m->mn, m->mn, d));
    return KEEL_OK;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

keel_status keel_massive_of(const double *size, uint32_t width, uint8_t *use)
{
    double *sorted = malloc(width * sizeof *sorted);
    if (!sorted) {
        return KEEL_ERR_NO_MEMORY;
    }
    memcpy(sorted, size, width * sizeof *size);
    qsort(sorted, width, sizeof *sorted, ascending);
    const double median = (sorted[(width - 1) / 2] + sorted[width / 2]) / 2;
    for (uint32_t c = 0; c < width; c++) {
        use[c] = size[c] > MASSIVE * median;
    }
    free(sorted);
    return KEEL_OK;
}

// z [n, width]: rows less their class means (or the mean of all), divided by sd.
static double *standardised(const struct keel_sample *s, const struct moments *m, bool within)
{
    const size_t n = s->np + s->nn;
    double *z = calloc(n * s->width, sizeof *z);
    for (size_t i = 0; z && i < n; i++) {
        const double *mean = within ? i < s->np ? m->mp : m->mn : m->all, *sd = within ? m->sd : m->sd_all;
        for (uint32_t c = 0; c < s->width; c++) {
            z[i * s->width + c] = ((double)row_of(s, i)[c] - mean[c]) / sd[c];
        }
    }
    return z;
}

// --- LDA -----------------------------------------------------------------------------------------

// w = S⁻¹ R⁻¹ S⁻¹ Δ with R = (1 - γ) ZᵀZ / (n - 2) + γ I, by the identity of Woodbury: a system of n equations rather than of width.
static keel_status lda(const struct keel_sample *s, const struct moments *m, double *v, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const size_t n = s->np + s->nn;
    const uint32_t d = s->width;
    const double ridge = LDA_SHRINK * (double)(n - 2) / (1 - LDA_SHRINK);
    double *z = standardised(s, m, true), *g = malloc(n * n * sizeof *g), *b = calloc(n, sizeof *b);
    if (!z || !g || !b) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for LDA on %zu rows", n);
    }
    keel_gram(g, z, n, d);
    for (size_t i = 0; i < n; i++) {
        g[i * n + i] += ridge;
        for (uint32_t c = 0; c < d; c++) {
            b[i] += z[i * d + c] * m->delta[c] / m->sd[c];
        }
    }
    KEEL_TRY(keel_solve_symmetric(g, b, (uint32_t)n, log));
    for (uint32_t c = 0; c < d; c++) {
        v[c] = m->delta[c] / m->sd[c];
    }
    for (size_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < d; c++) {
            v[c] -= z[i * d + c] * b[i];
        }
    }
    for (uint32_t c = 0; c < d; c++) {
        v[c] /= m->sd[c];
    }
out:
    free(z);
    free(g);
    free(b);
    return st;
}

// --- logistic probe ------------------------------------------------------------------------------

// One Newton step for f = K α + b: [K + λ W⁻¹, 1; 1ᵀ, 0] [α; b] = [f + W⁻¹ (y - p); 0]. Returns the largest change of f.
static keel_status probe_step(const double *k, double *a, double *x, double *f, const struct keel_sample *s, double *change, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const size_t n = s->np + s->nn, m = n + 1;
    for (size_t i = 0; i < n; i++) {
        const double p = 1 / (1 + exp(-f[i])), w = KEEL_MAX(p * (1 - p), 1e-10);
        memcpy(a + i * m, k + i * n, n * sizeof *a);
        a[i * m + i] += PROBE_RIDGE / w;
        a[i * m + n] = a[n * m + i] = 1;
        x[i] = f[i] + ((i < s->np ? 1 : 0) - p) / w;
    }
    a[n * m + n] = x[n] = 0;
    KEEL_TRY(keel_solve_symmetric(a, x, (uint32_t)m, log));
    *change = 0;
    for (size_t i = 0; i < n; i++) {
        double sum = x[n];
        for (size_t j = 0; j < n; j++) {
            sum += k[i * n + j] * x[j];
        }
        *change = KEEL_MAX(*change, fabs(sum - f[i]));
        f[i] = sum;
    }
out:
    return st;
}

static keel_status probe(const struct keel_sample *s, const struct moments *m, double *v, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const size_t n = s->np + s->nn;
    const uint32_t d = s->width;
    double *z = standardised(s, m, false), *k = malloc(n * n * sizeof *k), *a = malloc((n + 1) * (n + 1) * sizeof *a);
    double *x = calloc(n + 1, sizeof *x), *f = calloc(n, sizeof *f), change = 1;
    if (!z || !k || !a || !x || !f) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a probe on %zu rows", n);
    }
    keel_gram(k, z, n, d);
    for (uint32_t i = 0; i < PROBE_STEPS && change > 1e-9; i++) {
        KEEL_TRY(probe_step(k, a, x, f, s, &change, log));
    }
    if (!(change < 1e-4)) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the probe on %zu rows did not converge", n);
    }
    memset(v, 0, d * sizeof *v);
    for (size_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < d; c++) {
            v[c] += z[i * d + c] * x[i] / m->sd_all[c];
        }
    }
out:
    free(z);
    free(k);
    free(a);
    free(x);
    free(f);
    return st;
}

// --- pairs ---------------------------------------------------------------------------------------

static keel_status components(const struct keel_sample *s, const struct moments *m, enum keel_method method, uint32_t k, double *v, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t d = s->width;
    const size_t n = method == KEEL_PCA_CENTER ? 2 * s->np : s->np;
    double *x = malloc(n * d * sizeof *x);
    if (!x) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for differences of %zu pairs", s->np);
    }
    for (size_t i = 0; i < s->np; i++) {
        const float *p = row_of(s, i), *q = row_of(s, s->np + i);
        for (uint32_t c = 0; c < d; c++) {
            const double diff = (double)p[c] - (double)q[c];
            if (method == KEEL_PCA_CENTER) { // both ends less their middle
                x[2 * i * d + c] = diff / 2;
                x[(2 * i + 1) * d + c] = -diff / 2;
            } else {
                x[i * d + c] = diff;
            }
        }
    }
    for (uint32_t c = 0; method == KEEL_PCA_DIFF && c < d; c++) {
        double mean = 0;
        for (size_t i = 0; i < n; i++) {
            mean += x[i * d + c] / (double)n;
        }
        for (size_t i = 0; i < n; i++) {
            x[i * d + c] -= mean;
        }
    }
    if (sqrt(dot(x, x, n * d)) <= EQUAL * m->size * sqrt((double)n)) {
        memset(v, 0, (size_t)k * d * sizeof *v);
        goto out;
    }
    KEEL_TRY(keel_top_vectors(x, n, d, k, v, NULL, log));
    for (uint32_t j = 0; j < k; j++) { // points to the positive side for most pairs
        double *u = v + (size_t)j * d;
        size_t larger = 0, smaller = 0;
        for (size_t i = 0; i < s->np; i++) {
            double sum = 0;
            for (uint32_t c = 0; c < d; c++) {
                sum += u[c] * ((double)row_of(s, i)[c] - (double)row_of(s, s->np + i)[c]);
            }
            larger += sum > 0;
            smaller += sum < 0;
        }
        for (uint32_t c = 0; smaller > larger && c < d; c++) {
            u[c] = -u[c];
        }
    }
out:
    free(x);
    return st;
}

// --- all -----------------------------------------------------------------------------------------

double keel_cosine(const double *a, const double *b, uint32_t n)
{
    const double size = sqrt(dot(a, a, n)) * sqrt(dot(b, b, n));
    return size > 0 ? dot(a, b, n) / size : 0;
}

static keel_status mask_massive(const struct keel_sample *s, double *v)
{
    uint8_t *use = malloc(s->width);
    const keel_status st = use ? keel_massive_of(s->size, s->width, use) : KEEL_ERR_NO_MEMORY;
    for (uint32_t c = 0; st == KEEL_OK && c < s->width; c++) {
        v[c] = use[c] ? 0 : v[c];
    }
    free(use);
    return st;
}

keel_status keel_estimate(const struct keel_sample *s, enum keel_method method, uint32_t k, double *v, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t d = s->width;
    struct moments m = { 0 };
    KEEL_TRY(moments_make(&m, s, log));
    if (k == 1 && sqrt(dot(m.delta, m.delta, d)) <= EQUAL * m.size) {
        memset(v, 0, d * sizeof *v);
        goto out;
    }
    memcpy(v, m.delta, d * sizeof *v);
    if (method == KEEL_MEAN_Z) {
        for (uint32_t c = 0; c < d; c++) {
            v[c] /= m.sd[c];
        }
    } else if (method == KEEL_MEAN_MASK) {
        KEEL_TRY(mask_massive(s, v));
    } else if (method == KEEL_LDA) {
        KEEL_TRY(lda(s, &m, v, log));
    } else if (method == KEEL_PROBE) {
        KEEL_TRY(probe(s, &m, v, log));
    } else if (keel_method_needs_pairs(method)) {
        KEEL_TRY(components(s, &m, method, k, v, log));
    }
    const double norm = sqrt(dot(v, v, d));
    if (!isfinite(norm)) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "method %s gives a direction that is not finite", keel_method_name[method]);
    }
    if (k == 1 && norm > 0) {
        // One unit of the direction is the distance of the classes along it, whatever the method's own scale; principal components
        // keep the side that most pairs chose.
        const double along = dot(v, m.delta, d) / norm, size = keel_method_needs_pairs(method) ? fabs(along) : along;
        for (uint32_t c = 0; c < d; c++) {
            v[c] *= size / norm;
        }
    }
out:
    free(m.delta);
    return st;
}
