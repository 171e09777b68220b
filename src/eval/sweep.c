// SPDX-License-Identifier: MIT
// eval/sweep.c: the runs of a sweep, pooled by setting (rank and mixture) over their seeds.
#include "page.h"

#include "platform.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool run_finished(const char *dir)
{
    char path[4300];
    snprintf(path, sizeof path, "%s/tuned/.done", dir);
    return keel_path_exists(path);
}

struct keel_setting *keel_sweep_find(const struct keel_sweep *s, uint32_t rank, double mixture)
{
    for (size_t i = 0; i < s->n; i++) {
        if (s->at[i].rank == rank && s->at[i].mixture == mixture) {
            return &s->at[i];
        }
    }
    return NULL;
}

static keel_status add_run(struct keel_sweep *s, const char *dir, const json_t *run, const char *stage, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200];
    const char *folder = json_string_value(json_object_get(run, "folder"));
    const json_int_t rank = json_integer_value(json_object_get(run, "rank"));
    const double mixture = json_number_value(json_object_get(run, "mixture"));
    if (!folder || rank < 1 || rank > UINT32_MAX || strstr(folder, "..")) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s/manifest.json: an entry of \"runs\" has no proper \"folder\" and \"rank\"", dir);
    }
    snprintf(path, sizeof path, "%.3900s/%.150s%s%.100s", dir, folder, stage ? "/stages/" : "", stage ? stage : "");
    if (!run_finished(path)) {
        s->n_missing++;
        return KEEL_OK;
    }
    struct keel_setting *g = keel_sweep_find(s, (uint32_t)rank, mixture);
    if (!g) {
        struct keel_setting *grown = realloc(s->at, (s->n + 1) * sizeof *grown);
        if (!grown) {
            return KEEL_ERR_NO_MEMORY;
        }
        s->at = grown;
        g = &s->at[s->n++];
        *g = (struct keel_setting){ .rank = (uint32_t)rank, .mixture = mixture, .dir = calloc(KEEL_MAX_RUNS, sizeof *g->dir) };
    }
    if (!g->dir || g->n_runs == KEEL_MAX_RUNS) {
        KEEL_FAIL(log, g->dir ? KEEL_ERR_FORMAT : KEEL_ERR_NO_MEMORY, "%s: %s", dir, g->dir ? "more seeds than keel pools" : "out of memory");
    }
    g->seed[g->n_runs] = json_integer_value(json_object_get(run, "seed"));
    memcpy(g->dir[g->n_runs++], path, sizeof path);
out:
    return st;
}

static keel_status pool(struct keel_sweep *s, struct keel_setting *g, const keel_log *log)
{
    const char *runs[KEEL_MAX_RUNS];
    for (size_t i = 0; i < g->n_runs; i++) {
        runs[i] = g->dir[i];
    }
    const struct keel_drift_params p = { .base = s->base, .runs = runs, .n_runs = g->n_runs, .narrow_domain = s->narrow, .seed = s->seed };
    return keel_drift_compute(&g->drift, &p, log);
}

// Settings that share a value with setting `k` on the other axis.
static size_t along(const struct keel_sweep *s, size_t k, bool ranks)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) {
        n += ranks ? s->at[i].mixture == s->at[k].mixture : s->at[i].rank == s->at[k].rank;
    }
    return n;
}

static int by_rank_then_mixture(const void *a, const void *b)
{
    const struct keel_setting *x = a, *y = b;
    return x->rank != y->rank ? (x->rank > y->rank) - (x->rank < y->rank) : (x->mixture > y->mixture) - (x->mixture < y->mixture);
}

// The axes to show: the mixture at which most ranks were run and the rank at which most mixtures were; of equals the largest.
static void choose_axes(struct keel_sweep *s)
{
    for (size_t i = 0; i < s->n; i++) {
        const struct keel_setting *g = &s->at[i];
        const size_t ranks = along(s, i, true), mixtures = along(s, i, false);
        if (ranks > s->n_ranks || (ranks == s->n_ranks && g->mixture > s->mixture)) {
            s->n_ranks = ranks;
            s->mixture = g->mixture;
        }
        if (mixtures > s->n_mixtures || (mixtures == s->n_mixtures && g->rank > s->rank)) {
            s->n_mixtures = mixtures;
            s->rank = g->rank;
        }
        s->n_seeds = KEEL_MAX(s->n_seeds, g->n_runs);
    }
}

keel_status keel_sweep_load(struct keel_sweep *out, const char *dir, const json_t *manifest, const char *stage, const keel_log *log)
{
    keel_status st = KEEL_OK;
    size_t i;
    json_t *run;
    *out = (struct keel_sweep){ .narrow = json_string_value(json_object_get(manifest, "narrow_domain")),
                                .narrow_modality = json_string_value(json_object_get(manifest, "narrow_modality")),
                                .seed = (uint64_t)json_integer_value(json_object_get(manifest, "seed")) };
    keel_manifest_base(out->base, dir, manifest);
    json_array_foreach(json_object_get(manifest, "runs"), i, run)
    {
        KEEL_TRY(add_run(out, dir, run, stage, log));
    }
    if (out->n == 0 && !stage) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: no run of the sweep is finished; start keel study again with the same arguments", dir);
    }
    for (size_t k = 0; k < out->n; k++) {
        KEEL_TRY(pool(out, &out->at[k], log));
    }
    qsort(out->at, out->n, sizeof *out->at, by_rank_then_mixture); // plots join points in this order
    choose_axes(out);
out:
    if (st != KEEL_OK) {
        keel_sweep_finish(out);
    }
    return st;
}

void keel_sweep_finish(struct keel_sweep *s)
{
    for (size_t i = 0; i < s->n; i++) {
        free(s->at[i].dir);
        keel_drift_finish(&s->at[i].drift);
    }
    free(s->at);
    *s = (struct keel_sweep){ 0 };
}

bool keel_in_rank_axis(const struct keel_sweep *s, const struct keel_setting *g)
{
    return g->mixture == s->mixture;
}

bool keel_in_mixture_axis(const struct keel_sweep *s, const struct keel_setting *g)
{
    return g->rank == s->rank;
}

void keel_setting_label(char out[96], const struct keel_sweep *s, const struct keel_setting *g)
{
    if (s->n_mixtures < 2 || (s->n_ranks > 1 && g->mixture == 1)) {
        snprintf(out, 96, "rank %u", g->rank);
    } else if (s->n_ranks < 2) {
        snprintf(out, 96, "%g %% narrow", 100 * g->mixture);
    } else {
        snprintf(out, 96, "rank %u, %g %% narrow", g->rank, 100 * g->mixture);
    }
}

const struct keel_setting *keel_sweep_main(const struct keel_sweep *s)
{
    const struct keel_setting *best = &s->at[0];
    for (size_t i = 1; i < s->n; i++) {
        const struct keel_setting *g = &s->at[i];
        if (g->mixture > best->mixture || (g->mixture == best->mixture && g->rank > best->rank)) {
            best = g;
        }
    }
    return best;
}

// One line a run: the value after, and before where there is one; intervals are of the pooled estimates.
static void run_lines(struct keel_text *csv, const char *lead, const struct keel_setting *g, const struct keel_drift_row *r)
{
    for (size_t k = 0; k < r->n_runs; k++) {
        struct keel_drift_row one = *r;
        one.base.lo = one.base.hi = NAN;
        one.adapted = (struct keel_estimate){ r->run[k], NAN, NAN };
        one.change = (struct keel_estimate){ r->run[k] - r->base.value, NAN, NAN };
        keel_text_addf(csv, "%s%u,%g,%lld,", lead, g->rank, g->mixture, g->seed[k]);
        keel_drift_csv_row(csv, &one);
    }
}

void keel_sweep_lines(struct keel_text *pooled, struct keel_text *runs, const char *lead, const struct keel_sweep *s)
{
    for (size_t i = 0; i < s->n; i++) {
        const struct keel_setting *g = &s->at[i];
        for (size_t k = 0; k < g->drift.n; k++) {
            keel_text_addf(pooled, "%s%u,%g,%zu,", lead, g->rank, g->mixture, g->n_runs);
            keel_drift_csv_row(pooled, &g->drift.row[k]);
            run_lines(runs, lead, g, &g->drift.row[k]);
        }
    }
}

void keel_sweep_head(struct keel_text *pooled, struct keel_text *runs, const char *lead)
{
    keel_text_addf(pooled, "%srank,mixture,seeds,", lead);
    keel_drift_csv_head(pooled);
    keel_text_addf(runs, "%srank,mixture,seed,", lead);
    keel_drift_csv_head(runs);
}

keel_status keel_estimates_save(const struct keel_text *pooled, const struct keel_text *runs, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200];
    snprintf(path, sizeof path, "%s/summary.csv", dir);
    KEEL_TRY(keel_text_save(pooled, path, log));
    snprintf(path, sizeof path, "%s/runs.csv", dir);
    KEEL_TRY(keel_text_save(runs, path, log));
out:
    return st;
}

keel_status keel_sweep_write(const struct keel_sweep *s, const char *dir, const keel_log *log)
{
    struct keel_text pooled = { 0 }, runs = { 0 };
    keel_sweep_head(&pooled, &runs, "");
    keel_sweep_lines(&pooled, &runs, "", s);
    const keel_status st = keel_estimates_save(&pooled, &runs, dir, log);
    keel_text_finish(&pooled);
    keel_text_finish(&runs);
    return st;
}
