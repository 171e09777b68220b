// SPDX-License-Identifier: MIT
// eval/stats.c: means, bootstrap and Wilson intervals.
// Sources: Efron & Tibshirani 1993 (percentile bootstrap); Miller 2024, arXiv 2411.00640 (clustered, paired); Wilson 1927.
#include "eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

double keel_mean(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i];
    }
    return n ? sum / (double)n : NAN;
}

double keel_percentile(const double *sorted, size_t n, double p)
{
    const double at = p * (double)(n - 1);
    const size_t i = (size_t)at;
    return i + 1 < n ? sorted[i] + (at - (double)i) * (sorted[i + 1] - sorted[i]) : sorted[n - 1];
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

keel_status keel_bootstrap(const double *num, const double *den, const uint32_t *cluster, size_t n, uint32_t n_clusters,
                           uint32_t b, uint64_t seed, struct keel_estimate *out)
{
    keel_status st = KEEL_OK;
    double *sum = NULL, *draw = NULL;
    struct keel_rng rng = keel_rng_make(seed, 0);
    double total = 0, weight = 0;
    *out = KEEL_NO_ESTIMATE;
    if (!cluster) {
        n_clusters = (uint32_t)n;
    }
    if (n == 0 || n > UINT32_MAX || n_clusters == 0 || b == 0) {
        return KEEL_ERR_ARG;
    }
    sum = calloc(2 * (size_t)n_clusters, sizeof *sum); // Σ num and Σ den of each cluster
    draw = malloc(b * sizeof *draw);
    if (!sum || !draw) {
        st = KEEL_ERR_NO_MEMORY;
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = cluster ? cluster[i] : (uint32_t)i;
        if (c >= n_clusters) {
            st = KEEL_ERR_ARG;
            goto out;
        }
        sum[2 * c] += num[i];
        sum[2 * c + 1] += den ? den[i] : 1.0;
        total += num[i];
        weight += den ? den[i] : 1.0;
    }
    out->value = total / weight;
    if (n_clusters < 2) {
        goto out;
    }
    for (uint32_t k = 0; k < b; k++) {
        double x = 0, w = 0;
        for (uint32_t i = 0; i < n_clusters; i++) {
            const uint32_t c = keel_rng_below(&rng, n_clusters);
            x += sum[2 * c];
            w += sum[2 * c + 1];
        }
        draw[k] = x / w;
    }
    qsort(draw, b, sizeof *draw, by_value);
    out->lo = keel_percentile(draw, b, 0.025);
    out->hi = keel_percentile(draw, b, 0.975);
out:
    free(sum);
    free(draw);
    return st;
}

struct keel_estimate keel_wilson(uint64_t k, uint64_t n)
{
    if (n == 0) {
        return KEEL_NO_ESTIMATE;
    }
    const double z = 1.959963984540054, m = (double)n, p = (double)k / m;
    const double mid = (p + z * z / (2 * m)) / (1 + z * z / m);
    const double half = z * sqrt(p * (1 - p) / m + z * z / (4 * m * m)) / (1 + z * z / m);
    return (struct keel_estimate){ p, k == 0 ? 0 : fmax(0, mid - half), k == n ? 1 : fmin(1, mid + half) };
}

void keel_moving_mean(const double *x, size_t n, size_t width, double *out)
{
    const size_t half = width / 2;
    for (size_t i = 0; i < n; i++) {
        const size_t from = i > half ? i - half : 0, to = KEEL_MIN(i + half + 1, n);
        out[i] = keel_mean(x + from, to - from);
    }
}
