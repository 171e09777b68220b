// SPDX-License-Identifier: MIT
// eval/stats.c: means, bootstrap, Wilson and t intervals, rank correlation.
// Sources: Efron & Tibshirani 1993 (percentile bootstrap); Miller 2024, arXiv 2411.00640 (clustered, paired); Owen 2007 (runs
// crossed with items); Wilson 1927; Phipson & Smyth 2010 (the +1 of a permutation p-value).
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

// --- draws ---------------------------------------------------------------------------------------

#define CACHE_BYTES (64u << 20) // of cluster numbers; a set that does not fit is drawn again for every estimate

struct keel_draws keel_draws_make(uint32_t b, uint64_t seed)
{
    return (struct keel_draws){ .b = b, .seed = seed };
}

static void forget_sets(struct keel_draws *d)
{
    for (size_t i = 0; i < d->n_sets; i++) {
        free(d->set[i].pick);
    }
    d->n_sets = 0;
    d->bytes = 0;
}

void keel_draws_finish(struct keel_draws *d)
{
    forget_sets(d);
    free(d->row);
    free(d->value);
    *d = (struct keel_draws){ 0 };
}

// All draws over n_clusters clusters, [b, n_clusters], or NULL: draw them one by one. The numbers are the same either way.
static const uint16_t *cached_set(struct keel_draws *d, uint32_t n_clusters)
{
    const size_t n = (size_t)d->b * n_clusters, bytes = n * sizeof(uint16_t);
    for (size_t i = 0; i < d->n_sets; i++) {
        if (d->set[i].n_clusters == n_clusters) {
            return d->set[i].pick;
        }
    }
    if (n_clusters > UINT16_MAX || bytes > CACHE_BYTES) {
        return NULL;
    }
    if (d->n_sets == KEEL_COUNT(d->set) || d->bytes + bytes > CACHE_BYTES) {
        forget_sets(d);
    }
    uint16_t *pick = malloc(bytes);
    if (!pick) {
        return NULL;
    }
    struct keel_rng rng = keel_rng_make(d->seed, 0);
    for (size_t i = 0; i < n; i++) {
        pick[i] = (uint16_t)keel_rng_below(&rng, n_clusters);
    }
    d->set[d->n_sets].n_clusters = n_clusters;
    d->set[d->n_sets++].pick = pick;
    d->bytes += bytes;
    return pick;
}

static bool reserve(struct keel_draws *d, uint32_t n_clusters)
{
    if (!d->value) {
        d->value = malloc(3 * (size_t)d->b * sizeof *d->value);
    }
    if (d->row_cap < n_clusters) {
        free(d->row);
        d->row = malloc(n_clusters * sizeof *d->row);
        d->row_cap = d->row ? n_clusters : 0;
    }
    return d->value && d->row;
}

static void interval(struct keel_estimate *e, double *draw, uint32_t b)
{
    qsort(draw, b, sizeof *draw, by_value);
    e->lo = keel_percentile(draw, b, 0.025);
    e->hi = keel_percentile(draw, b, 0.975);
}

// Sums of each cluster: weight, base, then one column a run.
static double *cluster_sums(const struct keel_pairs *p)
{
    const size_t width = 2 + (size_t)p->n_runs;
    double *sum = calloc(width * p->n_clusters, sizeof *sum);
    for (size_t i = 0; sum && i < p->n; i++) {
        double *s = sum + width * (p->cluster ? p->cluster[i] : i);
        s[0] += p->weight ? p->weight[i] : 1.0;
        s[1] += p->base ? p->base[i] : 0.0;
        for (size_t r = 0; r < p->n_runs; r++) {
            s[2 + r] += p->tuned[r * p->n + i];
        }
    }
    return sum;
}

// One draw: whole clusters, then runs, each with replacement. total [2 + n_runs] is scratch.
static void one_draw(const struct keel_pairs *p, const double *sum, const uint32_t *pick, struct keel_rng *runs, double *total,
                     double *base, double *tuned)
{
    const size_t width = 2 + (size_t)p->n_runs;
    memset(total, 0, width * sizeof *total);
    for (uint32_t i = 0; i < p->n_clusters; i++) {
        const double *s = sum + width * pick[i];
        for (size_t k = 0; k < width; k++) {
            total[k] += s[k];
        }
    }
    double t = 0;
    for (uint32_t r = 0; r < p->n_runs; r++) {
        t += total[2 + (p->n_runs > 1 ? keel_rng_below(runs, p->n_runs) : 0)];
    }
    *base = total[1] / total[0];
    *tuned = t / (total[0] * p->n_runs);
}

keel_status keel_bootstrap_pairs(struct keel_draws *d, const struct keel_pairs *p, struct keel_estimate out[3])
{
    keel_status st = KEEL_OK;
    double *sum = NULL, *total = NULL, all[3] = { 0 };
    for (int k = 0; k < 3; k++) {
        out[k] = KEEL_NO_ESTIMATE;
    }
    if (p->n == 0 || p->n_runs == 0 || p->n_clusters == 0 || d->b == 0) {
        return KEEL_ERR_ARG;
    }
    for (size_t i = 0; p->cluster && i < p->n; i++) {
        if (p->cluster[i] >= p->n_clusters) {
            return KEEL_ERR_ARG;
        }
    }
    sum = cluster_sums(p);
    total = calloc(2 + (size_t)p->n_runs, sizeof *total);
    if (!sum || !total || !reserve(d, p->n_clusters)) {
        st = KEEL_ERR_NO_MEMORY;
        goto out;
    }
    for (size_t c = 0; c < p->n_clusters; c++) {
        const double *s = sum + (2 + (size_t)p->n_runs) * c;
        all[0] += s[0];
        all[1] += s[1];
        for (uint32_t r = 0; r < p->n_runs; r++) {
            all[2] += s[2 + r] / p->n_runs;
        }
    }
    out[1].value = all[2] / all[0];
    if (p->base) {
        out[0].value = all[1] / all[0];
        out[2].value = out[1].value - out[0].value;
    }
    if (p->n_clusters < 2) {
        goto out;
    }
    const uint16_t *pick = cached_set(d, p->n_clusters);
    struct keel_rng rng = keel_rng_make(d->seed, 0), runs = keel_rng_make(d->seed, 1);
    double *draw[3] = { d->value, d->value + d->b, d->value + 2 * (size_t)d->b };
    for (uint32_t k = 0; k < d->b; k++) {
        for (uint32_t i = 0; i < p->n_clusters; i++) {
            d->row[i] = pick ? pick[(size_t)k * p->n_clusters + i] : keel_rng_below(&rng, p->n_clusters);
        }
        one_draw(p, sum, d->row, &runs, total, &draw[0][k], &draw[1][k]);
        draw[2][k] = draw[1][k] - draw[0][k];
    }
    interval(&out[1], draw[1], d->b);
    if (p->base) {
        interval(&out[0], draw[0], d->b);
        interval(&out[2], draw[2], d->b);
    }
out:
    free(sum);
    free(total);
    return st;
}

keel_status keel_bootstrap(const double *num, const double *den, const uint32_t *cluster, size_t n, uint32_t n_clusters,
                           uint32_t b, uint64_t seed, struct keel_estimate *out)
{
    struct keel_draws d = keel_draws_make(b, seed);
    struct keel_estimate e[3];
    const struct keel_pairs p = { .tuned = num, .weight = den, .cluster = cluster, .n = n, .n_runs = 1,
                                  .n_clusters = cluster ? n_clusters : (uint32_t)KEEL_MIN(n, UINT32_MAX) };
    *out = KEEL_NO_ESTIMATE;
    const keel_status st = n > UINT32_MAX ? KEEL_ERR_ARG : keel_bootstrap_pairs(&d, &p, e);
    if (st == KEEL_OK) {
        *out = e[1];
    }
    keel_draws_finish(&d);
    return st;
}

// --- seeds and order -----------------------------------------------------------------------------

struct keel_estimate keel_t_interval(const double *x, size_t n)
{
    // 97.5 % points of Student's t for 1 to 30 degrees of freedom; beyond that the normal's is within 2 %.
    static const double t975[30] = { 12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004,
                                     2.262157,  2.228139, 2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905,
                                     2.109816,  2.100922, 2.093024, 2.085963, 2.079614, 2.073873, 2.068658, 2.063899,
                                     2.059539,  2.055529, 2.051831, 2.048407, 2.045230, 2.042272 };
    struct keel_estimate e = { keel_mean(x, n), NAN, NAN };
    double square = 0;
    if (n < 2) {
        return e;
    }
    for (size_t i = 0; i < n; i++) {
        square += (x[i] - e.value) * (x[i] - e.value);
    }
    const double half = (n <= 31 ? t975[n - 2] : 1.959964) * sqrt(square / (double)(n - 1) / (double)n);
    e.lo = e.value - half;
    e.hi = e.value + half;
    return e;
}

// Rank of each value from 1, ties share their mean.
static void ranks(const double *x, size_t n, double *rank)
{
    for (size_t i = 0; i < n; i++) {
        size_t below = 0, equal = 0;
        for (size_t k = 0; k < n; k++) {
            below += x[k] < x[i];
            equal += x[k] == x[i];
        }
        rank[i] = (double)below + ((double)equal + 1) / 2;
    }
}

static double correlation(const double *x, const double *y, size_t n)
{
    const double mx = keel_mean(x, n), my = keel_mean(y, n);
    double xx = 0, yy = 0, xy = 0;
    for (size_t i = 0; i < n; i++) {
        xx += (x[i] - mx) * (x[i] - mx);
        yy += (y[i] - my) * (y[i] - my);
        xy += (x[i] - mx) * (y[i] - my);
    }
    return xx > 0 && yy > 0 ? xy / sqrt(xx * yy) : NAN;
}

keel_status keel_spearman(const double *x, const double *y, size_t n, uint32_t b, uint64_t seed, double *rho, double *p)
{
    struct keel_rng rng = keel_rng_make(seed, 2);
    uint32_t above = 0;
    *rho = *p = NAN;
    if (n < 3 || n > UINT32_MAX) {
        return KEEL_ERR_ARG;
    }
    double *r = malloc(2 * n * sizeof *r);
    if (!r) {
        return KEEL_ERR_NO_MEMORY;
    }
    ranks(x, n, r);
    ranks(y, n, r + n);
    *rho = correlation(r, r + n, n);
    for (uint32_t k = 0; k < b && isfinite(*rho); k++) {
        for (size_t i = n - 1; i > 0; i--) {
            const size_t j = keel_rng_below(&rng, (uint32_t)i + 1);
            const double keep = r[i];
            r[i] = r[j];
            r[j] = keep;
        }
        above += correlation(r, r + n, n) >= *rho - 1e-12; // equal up to rounding counts as equal
    }
    *p = isfinite(*rho) && b > 0 ? ((double)above + 1) / ((double)b + 1) : NAN;
    free(r);
    return KEEL_OK;
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
