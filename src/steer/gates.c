// SPDX-License-Identifier: MIT
// steer/gates.c: whether a direction may be reported: does it come back from half of the rows, is it more than a massive channel,
// does it part the classes better than random directions. Source: science notes 3.2.
#include "steer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SPLITS 50u
#define SPLITS_SLOW 10u // where estimating is a matter of seconds
#define RANDOM 100u
#define MIN_SPLIT 0.5
#define MAX_MASSIVE 0.05

struct halves {
    struct keel_sample a, b;
    uint32_t *index; // [2 × (np + nn)] owned
};

void keel_shuffle(uint32_t *x, size_t n, struct keel_rng *rng)
{
    for (size_t i = n; i > 1; i--) {
        const size_t j = keel_rng_below(rng, (uint32_t)i);
        const uint32_t t = x[i - 1];
        x[i - 1] = x[j];
        x[j] = t;
    }
}

static void split(struct halves *h, const struct keel_sample *s, bool paired, struct keel_rng *rng)
{
    uint32_t *p = h->index, *n = p + s->np, *order = n + s->nn;
    for (uint32_t i = 0; i < s->np; i++) {
        order[i] = i;
    }
    keel_shuffle(order, s->np, rng);
    for (size_t i = 0; i < s->np; i++) {
        p[i] = s->ip[order[i]];
    }
    for (uint32_t i = 0; !paired && i < s->nn; i++) {
        order[i] = i;
    }
    if (!paired) {
        keel_shuffle(order, s->nn, rng);
    }
    for (size_t i = 0; i < s->nn; i++) {
        n[i] = s->in[order[i]];
    }
    h->a = h->b = *s;
    h->a.ip = p;
    h->a.in = n;
    h->a.np = s->np / 2;
    h->a.nn = s->nn / 2;
    h->b.ip = p + h->a.np;
    h->b.in = n + h->a.nn;
    h->b.np = s->np - h->a.np;
    h->b.nn = s->nn - h->a.nn;
}

static double project(const float *row, const double *v, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (double)row[i] * v[i];
    }
    return sum;
}

void keel_project_sample(const struct keel_sample *s, const double *v, double *x)
{
    for (size_t i = 0; i < s->np; i++) {
        x[i] = project(s->pos + (size_t)s->ip[i] * s->width, v, s->width);
    }
    for (size_t i = 0; i < s->nn; i++) {
        x[s->np + i] = project(s->neg + (size_t)s->in[i] * s->width, v, s->width);
    }
}

// Distance of the class means in pooled standard deviations.
static double effect_of(const double *x, size_t np, size_t nn)
{
    double mp = 0, mn = 0, ss = 0;
    for (size_t i = 0; i < np + nn; i++) {
        mp += i < np ? x[i] / (double)np : 0;
        mn += i < np ? 0 : x[i] / (double)nn;
    }
    for (size_t i = 0; i < np + nn; i++) {
        const double d = x[i] - (i < np ? mp : mn);
        ss += d * d;
    }
    const double sd = sqrt(ss / (double)(np + nn > 2 ? np + nn - 2 : 1));
    return sd > 0 ? (mp - mn) / sd : mp > mn ? INFINITY : mp < mn ? -INFINITY : 0;
}

double keel_auc(const double *x, size_t np, size_t nn)
{
    double wins = 0;
    for (size_t i = 0; i < np; i++) {
        for (size_t j = np; j < np + nn; j++) {
            wins += x[i] > x[j] ? 1 : x[i] == x[j] ? 0.5 : 0;
        }
    }
    return wins / ((double)np * (double)nn);
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static keel_status massive(struct keel_gates *out, const struct keel_sample *s, const double *v)
{
    uint8_t *use = malloc(s->width);
    const keel_status st = use ? keel_massive_of(s->size, s->width, use) : KEEL_ERR_NO_MEMORY;
    double share = 0, all = 0;
    out->n_massive = 0;
    for (uint32_t c = 0; st == KEEL_OK && c < s->width; c++) {
        all += v[c] * v[c];
        share += use[c] ? v[c] * v[c] : 0;
        if (use[c] && out->n_massive++ < KEEL_COUNT(out->massive)) {
            out->massive[out->n_massive - 1] = c;
        }
    }
    out->massive_share = share / all;
    free(use);
    return st;
}

static void random_control(struct keel_gates *out, const struct keel_sample *s, double *v, double *x, struct keel_rng *rng)
{
    double effect[RANDOM];
    for (uint32_t i = 0; i < RANDOM; i++) {
        for (uint32_t c = 0; c < s->width; c++) {
            v[c] = keel_rng_normal(rng);
        }
        keel_project_sample(s, v, x);
        effect[i] = fabs(effect_of(x, s->np, s->nn));
    }
    qsort(effect, RANDOM, sizeof *effect, ascending);
    out->random_95 = effect[RANDOM * 95 / 100];
}

keel_status keel_gates_compute(struct keel_gates *out, const struct keel_sample *s, enum keel_method method, bool paired,
                               const double *v, uint64_t seed, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const size_t n = s->np + s->nn;
    const bool slow = method >= KEEL_LDA && n > 200;
    struct keel_rng rng = keel_rng_make(seed, 0x67617465);
    struct halves h = { .index = malloc(2 * n * sizeof *h.index) };
    double *va = malloc(s->width * sizeof *va), *vb = malloc(s->width * sizeof *vb), *x = malloc(n * sizeof *x);
    *out = (struct keel_gates){ .split_half = NAN, .effect = NAN, .auc = NAN };
    if (!h.index || !va || !vb || !x) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the checks of a direction");
    }
    KEEL_TRY(massive(out, s, v));
    if (s->np >= 4 && s->nn >= 4) {
        out->n_splits = slow ? SPLITS_SLOW : SPLITS;
        out->split_half = out->effect = out->auc = 0;
        for (uint32_t i = 0; i < out->n_splits; i++) {
            split(&h, s, paired, &rng);
            KEEL_TRY(keel_estimate(&h.a, method, 1, va, log));
            KEEL_TRY(keel_estimate(&h.b, method, 1, vb, log));
            out->split_half += keel_cosine(va, vb, s->width) / out->n_splits;
            keel_project_sample(&h.b, va, x);
            out->effect += effect_of(x, h.b.np, h.b.nn) / out->n_splits / 2;
            out->auc += keel_auc(x, h.b.np, h.b.nn) / out->n_splits / 2;
            keel_project_sample(&h.a, vb, x);
            out->effect += effect_of(x, h.a.np, h.a.nn) / out->n_splits / 2;
            out->auc += keel_auc(x, h.a.np, h.a.nn) / out->n_splits / 2;
        }
    }
    random_control(out, s, va, x, &rng);
    out->admissible = out->split_half >= MIN_SPLIT && out->massive_share < MAX_MASSIVE && out->effect > out->random_95;
out:
    free(h.index);
    free(va);
    free(vb);
    free(x);
    return st;
}
