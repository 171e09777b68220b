// SPDX-License-Identifier: MIT
// steer/probe.c: how well a linear probe tells two classes of rows apart at each layer, within one set of rows and from one set to
// another, such as text and images. Source: science notes 3.1, M8.
#include "steer.h"

#include <stdlib.h>
#include <string.h>

#define FOLDS 5u

// Both classes of a set at one layer in one matrix, so that labels can be shuffled: a sample picks rows by index.
struct pool {
    float *x; // [np + nn, width]
    size_t np, nn;
    uint32_t width;
};

static keel_status pool_make(struct pool *p, const struct keel_probe_set *set, uint32_t layer, const keel_log *log)
{
    const size_t row = set->positive->width;
    *p = (struct pool){ .np = set->positive->n_rows, .nn = set->negative->n_rows, .width = set->positive->width };
    p->x = malloc((p->np + p->nn) * row * sizeof *p->x);
    if (!p->x) {
        KEEL_ERROR(log, "no memory for the rows of a probe");
        return KEEL_ERR_NO_MEMORY;
    }
    memcpy(p->x, set->positive->layer[layer].rows, p->np * row * sizeof *p->x);
    memcpy(p->x + p->np * row, set->negative->layer[layer].rows, p->nn * row * sizeof *p->x);
    return KEEL_OK;
}

// A sample of those of the labelled rows `order` [np + nn] (the first np are positive) whose fold is, or is not, `fold`. Rows i of
// both classes are of one fold, so that what a pair shares is never learnt from one and tested on the other.
static struct keel_sample pick(const struct pool *p, const uint32_t *order, uint32_t fold, bool held_out, uint32_t *index)
{
    struct keel_sample s = { .pos = p->x, .neg = p->x, .width = p->width, .ip = index };
    for (size_t i = 0; i < p->np + p->nn; i++) {
        const uint32_t row = order[i];
        const size_t group = row < p->np ? row : row - p->np;
        if ((group % FOLDS == fold) == held_out) {
            index[s.np + s.nn] = row;
            s.np += i < p->np;
            s.nn += i >= p->np;
        }
    }
    s.in = index + s.np;
    return s;
}

// Mean AUC over the folds. A fold that lacks a class on either side says nothing and is left out. Works in place of `index` and `x`,
// [np + nn] each, and v [width].
static keel_status cross_validate(double *auc, const struct pool *p, const uint32_t *order, uint32_t *index, double *v, double *x,
                                  const keel_log *log)
{
    keel_status st = KEEL_OK;
    double sum = 0;
    uint32_t n = 0;
    for (uint32_t fold = 0; fold < FOLDS; fold++) {
        const struct keel_sample train = pick(p, order, fold, false, index);
        if (train.np < 2 || train.nn < 2) {
            continue;
        }
        KEEL_TRY(keel_estimate(&train, KEEL_PROBE, 1, v, log));
        const struct keel_sample test = pick(p, order, fold, true, index);
        if (test.np > 0 && test.nn > 0) {
            keel_project_sample(&test, v, x);
            sum += keel_auc(x, test.np, test.nn);
            n++;
        }
    }
    if (n == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "a probe needs at least %u rows of each class, here are %zu and %zu", FOLDS, p->np, p->nn);
    }
    *auc = sum / n;
out:
    return st;
}

static keel_status probe_layer(struct keel_probe_layer *out, const struct pool *pool, size_t n, uint64_t seed, const keel_log *log)
{
    keel_status st = KEEL_OK;
    size_t most = 0;
    for (size_t i = 0; i < n; i++) {
        most = KEEL_MAX(most, pool[i].np + pool[i].nn);
    }
    uint32_t *order = malloc(2 * most * sizeof *order), *index = order ? order + most : NULL;
    double *v = malloc(pool[0].width * sizeof *v), *x = malloc(most * sizeof *x);
    if (!order || !v || !x) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a probe of %zu rows", most);
    }
    for (size_t i = 0; i < n; i++) {
        const struct pool *p = &pool[i];
        struct keel_rng rng = keel_rng_make(seed, i);
        for (uint32_t k = 0; k < p->np + p->nn; k++) {
            order[k] = k;
        }
        KEEL_TRY(cross_validate(&out->auc[i * n + i], p, order, index, v, x, log));
        const struct keel_sample all = { .pos = p->x, .neg = p->x, .ip = order, .in = order + p->np, .np = p->np, .nn = p->nn, .width = p->width };
        KEEL_TRY(keel_estimate(&all, KEEL_PROBE, 1, v, log));
        for (size_t j = 0; j < n; j++) {
            if (j == i) {
                continue;
            }
            for (uint32_t k = 0; k < pool[j].np + pool[j].nn; k++) {
                index[k] = k;
            }
            const struct keel_sample other = { .pos = pool[j].x, .neg = pool[j].x, .ip = index, .in = index + pool[j].np, .np = pool[j].np,
                                               .nn = pool[j].nn, .width = p->width };
            keel_project_sample(&other, v, x);
            out->auc[i * n + j] = keel_auc(x, other.np, other.nn);
        }
        keel_shuffle(order, p->np + p->nn, &rng);
        KEEL_TRY(cross_validate(&out->shuffled[i], p, order, index, v, x, log));
    }
out:
    free(order);
    free(v);
    free(x);
    return st;
}

keel_status keel_geometry_probe(struct keel_probe_layer *out, const struct keel_probe_set *sets, size_t n, uint64_t seed, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct pool pool[KEEL_MAX_PROBE_SETS] = { 0 };
    KEEL_ASSERT(n > 0 && n <= KEEL_MAX_PROBE_SETS);
    for (uint32_t k = 0; k < sets[0].positive->n_layers; k++) {
        out[k] = (struct keel_probe_layer){ .layer = sets[0].positive->layer[k].layer };
        for (size_t i = 0; i < n; i++) {
            KEEL_TRY(pool_make(&pool[i], &sets[i], k, log));
        }
        KEEL_TRY(probe_layer(&out[k], pool, n, seed, log));
        for (size_t i = 0; i < n; i++) {
            free(pool[i].x);
            pool[i].x = NULL;
        }
    }
out:
    for (size_t i = 0; i < n; i++) {
        free(pool[i].x);
    }
    return st;
}
