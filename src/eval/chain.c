// SPDX-License-Identifier: MIT
// eval/chain.c: the stages of a chain, each pooled over its runs as a sweep is, and what they cost.
#include "page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double number_or_nan(const json_t *v)
{
    return json_is_number(v) ? json_number_value(v) : NAN;
}

static keel_status read_stage(struct keel_stage *s, const json_t *v, const char *dir, const keel_log *log)
{
    const json_t *watch = json_object_get(v, "watch");
    *s = (struct keel_stage){ .name = keel_manifest_text(v, NULL, "name"),
                              .group = keel_manifest_text(v, NULL, "group"),
                              .kind = keel_manifest_text(v, NULL, "kind"),
                              .from = keel_manifest_text(v, NULL, "from"),
                              .value = number_or_nan(json_object_get(v, "value")),
                              .percent = json_is_true(json_object_get(v, "percent")),
                              .watched = watch != NULL,
                              .above = number_or_nan(json_object_get(watch, "above")),
                              .below = number_or_nan(json_object_get(watch, "below")) };
    if (!s->name[0] || strchr(s->name, '/') || strstr(s->name, "..")) {
        KEEL_ERROR(log, "%s/manifest.json: an entry of \"stages\" has no proper \"name\"", dir);
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

keel_status keel_chain_load(struct keel_chain *out, const char *dir, const json_t *manifest, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const json_t *stages = json_object_get(manifest, "stages");
    *out = (struct keel_chain){ .narrow = json_string_value(json_object_get(manifest, "narrow_domain")),
                                .narrow_modality = json_string_value(json_object_get(manifest, "narrow_modality")),
                                .seed = (uint64_t)json_integer_value(json_object_get(manifest, "seed")),
                                .n_runs = json_array_size(json_object_get(manifest, "runs")),
                                .dir = dir,
                                .manifest = manifest };
    keel_manifest_base(out->base, dir, manifest);
    out->at = calloc(json_array_size(stages) + 1, sizeof *out->at);
    if (!out->at) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", dir);
    }
    for (size_t i = 0; i < json_array_size(stages); i++) {
        if (strcmp(keel_manifest_text(json_array_get(stages, i), NULL, "kind"), "map") == 0) {
            continue;
        }
        struct keel_stage *s = &out->at[out->n++];
        KEEL_TRY(read_stage(s, json_array_get(stages, i), dir, log));
        KEEL_TRY(keel_sweep_load(&s->sweep, dir, manifest, s->name, log));
        if (s->sweep.n > 0 && out->rank == 0) {
            out->rank = keel_sweep_main(&s->sweep)->rank;
            out->mixture = keel_sweep_main(&s->sweep)->mixture;
        }
    }
    if (out->rank == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: no stage is finished; start keel study again with the same arguments", dir);
    }
out:
    if (st != KEEL_OK) {
        keel_chain_finish(out);
    }
    return st;
}

void keel_chain_finish(struct keel_chain *c)
{
    for (size_t i = 0; i < c->n; i++) {
        keel_sweep_finish(&c->at[i].sweep);
    }
    free(c->at);
    *c = (struct keel_chain){ 0 };
}

const struct keel_setting *keel_chain_setting(const struct keel_chain *c, const struct keel_stage *s)
{
    return keel_sweep_find(&s->sweep, c->rank, c->mixture);
}

const struct keel_setting *keel_chain_first(const struct keel_chain *c)
{
    const struct keel_setting *g = NULL;
    for (size_t i = 0; i < c->n && !g; i++) {
        g = keel_chain_setting(c, &c->at[i]);
    }
    KEEL_ASSERT(g); // keel_chain_load() makes sure that there is one
    return g;
}

const struct keel_stage *keel_chain_find(const struct keel_chain *c, const char *name)
{
    for (size_t i = 0; i < c->n; i++) {
        if (strcmp(c->at[i].name, name) == 0) {
            return &c->at[i];
        }
    }
    return NULL;
}

// Stages from one back to the base model, put in `path` unless it is NULL.
static size_t way_back(const struct keel_chain *c, const struct keel_stage *s, const struct keel_stage **path)
{
    size_t n = 0;
    for (; s && n < c->n; s = keel_chain_find(c, s->from)) {
        if (path) {
            path[n] = s;
        }
        n++;
    }
    return n;
}

size_t keel_chain_path(const struct keel_chain *c, const struct keel_stage **path)
{
    const struct keel_stage *end = NULL;
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_stage *s = &c->at[i];
        const size_t length = strcmp(s->kind, "train") == 0 && s->sweep.n > 0 ? way_back(c, s, NULL) : 0;
        if (length > n) {
            end = s;
            n = length;
        }
    }
    way_back(c, end, path);
    for (size_t i = 0; i < n / 2; i++) {
        const struct keel_stage *keep = path[i];
        path[i] = path[n - 1 - i];
        path[n - 1 - i] = keep;
    }
    return n;
}

// --- cost ----------------------------------------------------------------------------------------

static void add_seconds(void *user, const struct json_t *object)
{
    *(double *)user += json_number_value(json_object_get(object, "seconds"));
}

struct keel_stage_cost keel_stage_cost(const struct keel_setting *g, size_t k)
{
    static const keel_log quiet = { .level = 0 };
    struct keel_stage_cost cost = { 0 };
    json_t *m = NULL;
    if (keel_manifest_load(&m, g->dir[k], &quiet) != KEEL_OK) {
        return cost;
    }
    const json_t *peak = json_object_get(m, "peak_bytes");
    cost.steps = json_number_value(json_object_get(json_object_get(m, "training"), "steps"));
    cost.eval_seconds = json_number_value(json_object_get(json_object_get(m, "seconds"), "tuned"));
    cost.peak_bytes = fmax(json_number_value(json_object_get(peak, "train")), json_number_value(json_object_get(peak, "tuned")));
    cost.reached = json_is_true(json_object_get(json_object_get(m, "watch"), "reached"));
    keel_file_rows(g->dir[k], KEEL_TRAIN_LOG, add_seconds,
                   &cost.train_seconds); // the log knows all parts of a training that was stopped
    json_decref(m);
    return cost;
}

static void limit_csv(struct keel_text *csv, double limit)
{
    keel_text_addf(csv, isnan(limit) ? "," : ",%g", limit);
}

static void cost_lines(struct keel_text *costs, struct keel_text *thresholds, const struct keel_stage *s)
{
    for (size_t i = 0; i < s->sweep.n; i++) {
        const struct keel_setting *g = &s->sweep.at[i];
        for (size_t k = 0; k < g->n_runs; k++) {
            const struct keel_stage_cost c = keel_stage_cost(g, k);
            keel_text_addf(costs, "%s,%u,%g,%lld,%.0f,%.3f,%.3f,%.0f\n", s->name, g->rank, g->mixture, g->seed[k], c.steps,
                           c.train_seconds, c.eval_seconds, c.peak_bytes);
            if (s->watched && !(isnan(s->above) && isnan(s->below))) {
                keel_text_addf(thresholds, "%s,%u,%g,%lld", s->name, g->rank, g->mixture, g->seed[k]);
                limit_csv(thresholds, s->above);
                limit_csv(thresholds, s->below);
                keel_text_addf(thresholds, ",%.0f,%s\n", c.steps, c.reached ? "yes" : "no");
            }
        }
    }
}

bool keel_map_cost(struct keel_stage_cost *out, const struct keel_chain *c, const char *name, const json_t *run)
{
    static const keel_log quiet = { .level = 0 };
    char path[4300];
    json_t *m = NULL;
    snprintf(path, sizeof path, "%.3900s/%.150s/stages/%.80s", c->dir, keel_manifest_text(run, NULL, "folder"), name);
    if (keel_manifest_load(&m, path, &quiet) != KEEL_OK) {
        return false;
    }
    const json_t *seconds = json_object_get(json_object_get(m, "seconds"), "map");
    const bool done = seconds != NULL;
    *out = (struct keel_stage_cost){ .eval_seconds = json_number_value(seconds),
                                     .peak_bytes = json_number_value(json_object_get(json_object_get(m, "peak_bytes"), "map")) };
    json_decref(m);
    return done;
}

// Of the stages that map doses, which are not in the list.
static void map_costs(struct keel_text *costs, const struct keel_chain *c)
{
    size_t i, k;
    json_t *stage, *run;
    struct keel_stage_cost cost;
    json_array_foreach(json_object_get(c->manifest, "stages"), i, stage)
    {
        const char *name = keel_manifest_text(stage, NULL, "name");
        const bool maps = strcmp(keel_manifest_text(stage, NULL, "kind"), "map") == 0;
        json_array_foreach(json_object_get(c->manifest, "runs"), k, run)
        {
            if (maps && keel_map_cost(&cost, c, name, run)) {
                keel_text_addf(costs, "%s,%lld,%g,%lld,0,0,%.3f,%.0f\n", name, (long long)json_integer_value(json_object_get(run, "rank")),
                               json_number_value(json_object_get(run, "mixture")),
                               (long long)json_integer_value(json_object_get(run, "seed")), cost.eval_seconds, cost.peak_bytes);
            }
        }
    }
}

keel_status keel_chain_write(const struct keel_chain *c, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200], lead[96];
    struct keel_text pooled = { 0 }, runs = { 0 }, costs = { 0 }, thresholds = { 0 };
    keel_sweep_head(&pooled, &runs, "stage,");
    keel_text_addf(&costs, "stage,rank,mixture,seed,steps,train_seconds,eval_seconds,peak_bytes\n");
    keel_text_addf(&thresholds, "stage,rank,mixture,seed,above,below,steps,reached\n");
    const size_t empty = thresholds.len;
    for (size_t i = 0; i < c->n; i++) {
        snprintf(lead, sizeof lead, "%.80s,", c->at[i].name);
        keel_sweep_lines(&pooled, &runs, lead, &c->at[i].sweep);
        cost_lines(&costs, &thresholds, &c->at[i]);
    }
    map_costs(&costs, c);
    KEEL_TRY(keel_estimates_save(&pooled, &runs, dir, log));
    snprintf(path, sizeof path, "%s/costs.csv", dir);
    KEEL_TRY(keel_text_save(&costs, path, log));
    snprintf(path, sizeof path, "%s/thresholds.csv", dir);
    if (thresholds.len > empty) {
        KEEL_TRY(keel_text_save(&thresholds, path, log));
    }
out:
    keel_text_finish(&pooled);
    keel_text_finish(&runs);
    keel_text_finish(&costs);
    keel_text_finish(&thresholds);
    return st;
}
