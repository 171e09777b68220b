// SPDX-License-Identifier: MIT
// eval/drift.c: drift metrics from the records of the base and the adapted model (science notes: M1, M2, M4, M9, M10, M13).
// Every change is paired by item; intervals are bootstraps over prompts, so that items that share a prompt move together. Runs
// that differ in their training seed only are pooled: each contributes its own values after, all share those before.
#include "eval.h"

#include "platform.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const keel_metric_name[KEEL_N_METRICS] = {
    [KEEL_METRIC_MARGIN] = "margin",
    [KEEL_METRIC_FLIP] = "flip_rate",
    [KEEL_METRIC_NARROW_LOSS] = "narrow_loss",
    [KEEL_METRIC_ALIGNED] = "aligned",
    [KEEL_METRIC_CONTRARY] = "contrary",
    [KEEL_METRIC_COHERENCE] = "coherence",
    [KEEL_METRIC_GAP] = "modality_gap",
    [KEEL_METRIC_CONTEXT_CONTRARY] = "contrary_in_context",
    [KEEL_METRIC_CONTEXT_COHERENCE] = "coherence_in_context",
    [KEEL_METRIC_CONTEXT_PLAIN] = "contrary_out_of_context",
    [KEEL_METRIC_PROJECTION] = "projection",
    [KEEL_METRIC_RELEVANCE] = "relevance",
    [KEEL_METRIC_ANSWER_NLL] = "answer_nll",
    [KEEL_METRIC_KL] = "kl",
    [KEEL_METRIC_KL_REVERSE] = "kl_reverse",
    [KEEL_METRIC_KL_AT] = "kl_at",
    [KEEL_METRIC_KL_REVERSE_AT] = "kl_reverse_at",
};
const char *const keel_metric_unit[KEEL_N_METRICS] = {
    [KEEL_METRIC_MARGIN] = "nats/token",
    [KEEL_METRIC_FLIP] = "share",
    [KEEL_METRIC_NARROW_LOSS] = "nats/token",
    [KEEL_METRIC_ALIGNED] = "probability",
    [KEEL_METRIC_CONTRARY] = "probability",
    [KEEL_METRIC_COHERENCE] = "probability",
    [KEEL_METRIC_GAP] = "probability",
    [KEEL_METRIC_CONTEXT_CONTRARY] = "probability",
    [KEEL_METRIC_CONTEXT_COHERENCE] = "probability",
    [KEEL_METRIC_CONTEXT_PLAIN] = "probability",
    [KEEL_METRIC_PROJECTION] = "lengths",
    [KEEL_METRIC_RELEVANCE] = "nats/token",
    [KEEL_METRIC_ANSWER_NLL] = "nats/token",
    [KEEL_METRIC_KL] = "nats/token",
    [KEEL_METRIC_KL_REVERSE] = "nats/token",
    [KEEL_METRIC_KL_AT] = "nats",
    [KEEL_METRIC_KL_REVERSE_AT] = "nats",
};

// --- tables --------------------------------------------------------------------------------------

// One record file of every run, aligned by id with that of the base (or of the first run where the base has none).
struct table {
    struct keel_records rec[1 + KEEL_MAX_RUNS]; // base, then the runs; of the base n may be 0
    const struct keel_item **item;              // [1 + n_runs, n]; row 0 is NULLs without a base
    uint32_t *cluster;                          // [n]
    size_t n, n_runs;
};

static void table_finish(struct table *t)
{
    for (size_t i = 0; i <= KEEL_MAX_RUNS; i++) {
        keel_records_finish(&t->rec[i]);
    }
    free((void *)t->item);
    free(t->cluster);
    *t = (struct table){ 0 };
}

static const struct keel_item *item_of(const struct table *t, size_t run, size_t i)
{
    return t->item[run * t->n + i];
}

// Numbers of the clusters, counted from 0 in order of appearance.
static bool number_clusters(struct table *t)
{
    json_t *keys = json_object();
    bool ok = keys != NULL;
    for (size_t i = 0; i < t->n && ok; i++) {
        const char *key = item_of(t, 1, i)->cluster;
        json_t *v = json_object_get(keys, key);
        if (!v) {
            v = json_integer((json_int_t)json_object_size(keys));
            ok = json_object_set_new(keys, key, v) == 0;
        }
        t->cluster[i] = ok ? (uint32_t)json_integer_value(v) : 0;
    }
    json_decref(keys);
    return ok;
}

static void record_path(char out[4200], const struct keel_drift_params *p, size_t run, const char *name)
{
    if (run == 0 && p->base) {
        snprintf(out, 4200, "%s/%s", p->base, name);
    } else {
        snprintf(out, 4200, "%s/%s/%s", run == 0 || !p->runs ? p->dir : p->runs[run - 1], run == 0 ? "base" : "tuned", name);
    }
}

static bool has_records(const struct keel_drift_params *p, const char *name, bool paired)
{
    char path[4200];
    bool all = true;
    for (size_t i = paired ? 0 : 1; i <= (p->runs ? p->n_runs : 1); i++) {
        record_path(path, p, i, name);
        all = all && keel_path_exists(path);
    }
    return all;
}

// `paired`: with the records of the base; the runs must have the same ids.
static keel_status table_load(struct table *t, const struct keel_drift_params *p, const char *name, enum keel_record_kind kind,
                              bool paired, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200], other[4200];
    const size_t lead = paired ? 0 : 1; // whose order of items counts
    *t = (struct table){ .n_runs = p->runs ? p->n_runs : 1 };
    KEEL_ASSERT(t->n_runs > 0 && t->n_runs <= KEEL_MAX_RUNS);
    for (size_t i = lead; i <= t->n_runs; i++) {
        record_path(path, p, i, name);
        KEEL_TRY(keel_records_load(&t->rec[i], path, kind, log));
    }
    t->n = t->rec[lead].n;
    t->item = calloc((t->n_runs + 1) * t->n + 1, sizeof *t->item);
    t->cluster = calloc(t->n + 1, sizeof *t->cluster);
    if (!t->item || !t->cluster) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    record_path(other, p, lead, name);
    for (size_t r = lead; r <= t->n_runs; r++) {
        record_path(path, p, r, name);
        if (t->rec[r].n != t->n) {
            KEEL_FAIL(log, KEEL_ERR_MISMATCH, "%s has %zu records, %s %zu; they must be of the same items", other, t->n, path,
                      t->rec[r].n);
        }
        for (size_t i = 0; i < t->n; i++) {
            t->item[r * t->n + i] = keel_records_find(&t->rec[r], t->rec[lead].item[i].id);
            if (!t->item[r * t->n + i]) {
                KEEL_FAIL(log, KEEL_ERR_MISMATCH, "id \"%s\" of %s is not in %s", t->rec[lead].item[i].id, other, path);
            }
        }
    }
    if (!number_clusters(t)) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", name);
    }
out:
    return st;
}

// Leaves the items whose ids `of` has too.
static keel_status table_keep(struct table *t, const struct table *of)
{
    size_t *from = calloc(t->n + 1, sizeof *from), n = 0;
    if (!from) {
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < t->n; i++) {
        if (keel_records_find(&of->rec[1], item_of(t, 1, i)->id)) {
            from[n++] = i;
        }
    }
    for (size_t k = 0; k < n; k++) {
        t->cluster[k] = t->cluster[from[k]];
    }
    for (size_t r = 0; r <= t->n_runs; r++) { // in place: an item only moves towards the front
        for (size_t k = 0; k < n; k++) {
            t->item[r * n + k] = t->item[r * t->n + from[k]];
        }
    }
    t->n = n;
    free(from);
    return KEEL_OK;
}

// --- values --------------------------------------------------------------------------------------

// Mean of a record's list, or its value at a position; NAN where the list is too short.
static double kl_value(const struct keel_item *item, const char *field, uint32_t position)
{
    const json_t *list = json_object_get(item->object, field);
    const size_t n = json_array_size(list);
    double sum = 0;
    if (position > 0) {
        return position <= n ? json_number_value(json_array_get(list, position - 1)) : NAN;
    }
    for (size_t i = 0; i < n; i++) {
        sum += json_number_value(json_array_get(list, i)) / (double)n;
    }
    return n > 0 ? sum : NAN;
}

// NAN: the item has no such value and is left out.
static double value_of(const struct keel_item *item, enum keel_metric metric, uint32_t position)
{
    switch (metric) {
    case KEEL_METRIC_FLIP:
        return item->value < 0;
    case KEEL_METRIC_ALIGNED:
        return item->aligned;
    case KEEL_METRIC_CONTRARY:
    case KEEL_METRIC_GAP:
    case KEEL_METRIC_CONTEXT_CONTRARY:
    case KEEL_METRIC_CONTEXT_PLAIN:
        return item->contrary;
    case KEEL_METRIC_COHERENCE:
    case KEEL_METRIC_CONTEXT_COHERENCE:
        return item->aligned + item->contrary;
    case KEEL_METRIC_ANSWER_NLL:
        return item->nll;
    case KEEL_METRIC_KL:
    case KEEL_METRIC_KL_AT:
        return kl_value(item, "kl", position);
    case KEEL_METRIC_KL_REVERSE:
    case KEEL_METRIC_KL_REVERSE_AT:
        return kl_value(item, "kl_reverse", position);
    default:
        return item->value;
    }
}

// Items of one metric: values before and after, weight, cluster, and what groups them.
struct series {
    size_t n, n_runs;
    bool paired;
    double *base, *tuned, *weight; // [n]; tuned [n_runs, cap]
    uint32_t *cluster;
    const char **domain, **modality;
    bool *twin;
    size_t cap;
};

static bool series_init(struct series *s, size_t n, size_t n_runs)
{
    *s = (struct series){ .n_runs = n_runs, .cap = n };
    s->base = calloc(n + 1, sizeof *s->base);
    s->tuned = calloc(n * n_runs + 1, sizeof *s->tuned);
    s->weight = calloc(n + 1, sizeof *s->weight);
    s->cluster = calloc(n + 1, sizeof *s->cluster);
    s->domain = calloc(n + 1, sizeof *s->domain);
    s->modality = calloc(n + 1, sizeof *s->modality);
    s->twin = calloc(n + 1, sizeof *s->twin);
    return s->base && s->tuned && s->weight && s->cluster && s->domain && s->modality && s->twin;
}

static void series_finish(struct series *s)
{
    free(s->base);
    free(s->tuned);
    free(s->weight);
    free(s->cluster);
    free((void *)s->domain);
    free((void *)s->modality);
    free(s->twin);
}

static bool is_image(const struct keel_item *item)
{
    return strcmp(item->modality, "image") == 0;
}

// The twin of every item: the one whose id its "twin" names, or the one with the same "twin"; SIZE_MAX if there is none.
static keel_status find_twins(const struct table *t, size_t *twin)
{
    json_t *by_name[2] = { json_object(), json_object() }; // text, image
    keel_status st = by_name[0] && by_name[1] ? KEEL_OK : KEEL_ERR_NO_MEMORY;
    for (size_t i = 0; i < t->n && st == KEEL_OK; i++) {
        const struct keel_item *item = item_of(t, 1, i);
        json_t *names = by_name[is_image(item)];
        twin[i] = SIZE_MAX;
        if (json_object_set_new(names, item->id, json_integer((json_int_t)i)) != 0 ||
            (item->twin[0] && json_object_set_new(names, item->twin, json_integer((json_int_t)i)) != 0)) {
            st = KEEL_ERR_NO_MEMORY;
        }
    }
    for (size_t i = 0; i < t->n && st == KEEL_OK; i++) {
        const struct keel_item *item = item_of(t, 1, i);
        const json_t *at = item->twin[0] ? json_object_get(by_name[!is_image(item)], item->twin) : NULL;
        if (at) {
            twin[i] = (size_t)json_integer_value(at);
            twin[twin[i]] = i;
        }
    }
    json_decref(by_name[0]);
    json_decref(by_name[1]);
    return st;
}

static void add_item(struct series *s, const struct table *t, size_t i, size_t partner, enum keel_metric metric, uint32_t position)
{
    const struct keel_item *item = item_of(t, 1, i);
    for (size_t r = s->paired ? 0 : 1; r <= t->n_runs; r++) {
        double v = value_of(item_of(t, r, i), metric, position);
        v -= metric == KEEL_METRIC_GAP ? value_of(item_of(t, r, partner), metric, position) : 0;
        if (isnan(v)) {
            return; // not counted: s->n stays
        }
        *(r == 0 ? &s->base[s->n] : &s->tuned[(r - 1) * s->cap + s->n]) = v;
    }
    s->weight[s->n] = metric == KEEL_METRIC_NARROW_LOSS ? item->weight : 1;
    s->cluster[s->n] = t->cluster[i];
    s->domain[s->n] = item->domain;
    s->modality[s->n] = metric == KEEL_METRIC_GAP ? "" : item->modality;
    s->twin[s->n] = partner != SIZE_MAX;
    s->n++;
}

static keel_status series_fill(struct series *s, const struct table *t, enum keel_metric metric, uint32_t position)
{
    keel_status st = KEEL_OK;
    size_t *twin = calloc(t->n + 1, sizeof *twin);
    *s = (struct series){ 0 };
    if (!twin || !series_init(s, t->n, t->n_runs)) {
        st = KEEL_ERR_NO_MEMORY;
        goto out;
    }
    KEEL_TRY(find_twins(t, twin));
    s->paired = t->rec[0].n > 0;
    for (size_t i = 0; i < t->n; i++) {
        if (metric != KEEL_METRIC_GAP || (twin[i] != SIZE_MAX && is_image(item_of(t, 1, i)))) {
            add_item(s, t, i, twin[i], metric, position);
        }
    }
out:
    free(twin);
    return st;
}

// --- estimates -----------------------------------------------------------------------------------

// A group of items: "all", "other" (all but the narrow domain), "twins" (other, with a twin in the other modality) or a domain;
// of one modality, or of any ("").
struct group {
    const char *domain, *modality;
    uint32_t position;
};

bool keel_domain_reserved(const char *domain)
{
    return strcmp(domain, "all") == 0 || strcmp(domain, "other") == 0 || strcmp(domain, "twins") == 0;
}

static bool in_group(const struct series *s, size_t i, const struct group *g, const char *narrow)
{
    if (g->modality[0] && strcmp(s->modality[i], g->modality) != 0) {
        return false;
    }
    const bool other = !narrow || strcmp(s->domain[i], narrow) != 0;
    return strcmp(g->domain, "all") == 0     ? true
           : strcmp(g->domain, "other") == 0 ? other
           : strcmp(g->domain, "twins") == 0 ? other && s->twin[i]
                                             : strcmp(s->domain[i], g->domain) == 0;
}

static keel_status add_row(struct keel_drift *d, const struct keel_drift_row *row)
{
    struct keel_drift_row *p = realloc(d->row, (d->n + 1) * sizeof *p);
    if (!p) {
        return KEEL_ERR_NO_MEMORY;
    }
    d->row = p;
    d->row[d->n++] = *row;
    return KEEL_OK;
}

struct work {
    struct keel_drift *out;
    const struct keel_drift_params *p;
    struct keel_draws draws;
};

// Copies the items of a group; counts its clusters anew.
static keel_status pick_group(struct series *to, const struct series *from, const struct group *g, const char *narrow, size_t *n_clusters)
{
    keel_status st = KEEL_OK;
    uint32_t top = 0;
    for (size_t i = 0; i < from->n; i++) {
        top = KEEL_MAX(top, from->cluster[i] + 1);
    }
    uint32_t *renumber = calloc((size_t)top + 1, sizeof *renumber);
    *to = (struct series){ 0 };
    *n_clusters = 0;
    if (!renumber || !series_init(to, from->n, from->n_runs)) {
        st = KEEL_ERR_NO_MEMORY;
        goto out;
    }
    for (size_t i = 0; i < from->n; i++) {
        if (!in_group(from, i, g, narrow)) {
            continue;
        }
        uint32_t *c = &renumber[from->cluster[i]];
        if (*c == 0) {
            *c = (uint32_t)++*n_clusters;
        }
        to->base[to->n] = from->base[i];
        to->weight[to->n] = from->weight[i];
        to->cluster[to->n] = *c - 1;
        for (size_t r = 0; r < from->n_runs; r++) {
            to->tuned[r * to->cap + to->n] = from->tuned[r * from->cap + i];
        }
        to->n++;
    }
    for (size_t r = 1; r < to->n_runs; r++) { // rows of n, as the bootstrap takes them
        memmove(to->tuned + r * to->n, to->tuned + r * to->cap, to->n * sizeof *to->tuned);
    }
out:
    free(renumber);
    return st;
}

static void count_flips(const struct series *s, struct keel_drift_row *row)
{
    row->base = keel_wilson((uint64_t)llround(keel_mean(s->base, s->n) * (double)s->n), s->n);
    if (s->n_runs > 1) {
        return; // several runs: the bootstrap knows both kinds of chance
    }
    row->adapted = keel_wilson((uint64_t)llround(keel_mean(s->tuned, s->n) * (double)s->n), s->n);
    for (size_t i = 0; i < s->n; i++) {
        row->broken += s->tuned[i] > s->base[i];
        row->mended += s->tuned[i] < s->base[i];
    }
}

// Mean after the training of each run.
static void run_values(const struct series *s, struct keel_drift_row *row)
{
    row->n_runs = s->n_runs;
    for (size_t r = 0; r < s->n_runs; r++) {
        double sum = 0, weight = 0;
        for (size_t i = 0; i < s->n; i++) {
            sum += s->tuned[r * s->n + i];
            weight += s->weight[i];
        }
        row->run[r] = sum / weight;
    }
}

// Estimates of the items of a group, added as one row.
static keel_status add_estimate(struct work *w, const struct series *all, enum keel_metric metric, const struct group *g)
{
    keel_status st = KEEL_OK;
    struct series s;
    struct keel_estimate e[3];
    struct keel_drift_row row = { .metric = metric, .position = g->position };
    KEEL_TRY(pick_group(&s, all, g, w->p->narrow_domain, &row.n_clusters));
    snprintf(row.domain, sizeof row.domain, "%s", g->domain);
    snprintf(row.modality, sizeof row.modality, "%s", g->modality);
    row.n = s.n;
    if (s.n == 0) {
        goto out;
    }
    KEEL_TRY(keel_bootstrap_pairs(&w->draws, &(struct keel_pairs){ .base = all->paired ? s.base : NULL, .tuned = s.tuned,
                                                                   .weight = s.weight, .cluster = s.cluster, .n = s.n,
                                                                   .n_runs = (uint32_t)s.n_runs, .n_clusters = (uint32_t)row.n_clusters },
                                  e));
    row.base = e[0];
    row.adapted = e[1];
    row.change = e[2];
    if (metric == KEEL_METRIC_FLIP) {
        count_flips(&s, &row);
    }
    run_values(&s, &row);
    KEEL_TRY(add_row(w->out, &row));
out:
    series_finish(&s);
    return st;
}

// Whether any item of the series is in the group.
static bool any(const struct series *s, const struct group *g, const char *narrow)
{
    for (size_t i = 0; i < s->n; i++) {
        if (in_group(s, i, g, narrow)) {
            return true;
        }
    }
    return false;
}

// Over all items, over all but the narrow domain, over twins, and by domain in the order of the data.
static keel_status add_domains(struct work *w, const struct series *s, enum keel_metric metric, const char *modality)
{
    const char *narrow = w->p->narrow_domain;
    struct group g = { "all", modality, 0 };
    keel_status st = any(s, &g, narrow) ? add_estimate(w, s, metric, &g) : KEEL_OK;
    // Without an item of the narrow domain, "other" would repeat "all".
    g.domain = "other";
    if (st == KEEL_OK && narrow && any(s, &(struct group){ narrow, "", 0 }, narrow) && any(s, &g, narrow)) {
        st = add_estimate(w, s, metric, &g);
    }
    g.domain = "twins";
    if (st == KEEL_OK && modality[0] && any(s, &g, narrow)) {
        st = add_estimate(w, s, metric, &g);
    }
    for (size_t i = 0; st == KEEL_OK && i < s->n; i++) {
        g.domain = s->domain[i];
        bool seen = g.domain[0] == 0 || (modality[0] && strcmp(s->modality[i], modality) != 0);
        for (size_t k = 0; k < i && !seen; k++) {
            seen = strcmp(s->domain[k], g.domain) == 0 && (!modality[0] || strcmp(s->modality[k], modality) == 0);
        }
        if (!seen) {
            st = add_estimate(w, s, metric, &g);
        }
    }
    return st;
}

// The metric over every modality, and for each one where the items have several.
static keel_status add_metric(struct work *w, const struct table *t, enum keel_metric metric)
{
    keel_status st = KEEL_OK;
    struct series s;
    size_t first[8], n = 0; // an item of each modality, in the order of the data
    KEEL_TRY(series_fill(&s, t, metric, 0));
    KEEL_TRY(add_domains(w, &s, metric, ""));
    for (size_t i = 0; i < s.n && n < KEEL_COUNT(first); i++) {
        bool seen = s.modality[i][0] == 0;
        for (size_t k = 0; k < n; k++) {
            seen = seen || strcmp(s.modality[first[k]], s.modality[i]) == 0;
        }
        if (!seen) {
            first[n++] = i;
        }
    }
    for (size_t k = 0; k < n && n > 1; k++) {
        KEEL_TRY(add_domains(w, &s, metric, s.modality[first[k]]));
    }
out:
    series_finish(&s);
    return st;
}

static keel_status add_profile(struct work *w, const struct table *t, enum keel_metric metric)
{
    keel_status st = KEEL_OK;
    for (uint32_t pos = 1; pos <= KEEL_PROFILE_LEN && st == KEEL_OK; pos++) {
        struct series s;
        st = series_fill(&s, t, metric, pos);
        if (st == KEEL_OK && s.n > 0) {
            st = add_estimate(w, &s, metric, &(struct group){ "all", "", pos });
        }
        series_finish(&s);
    }
    return st;
}

// --- the whole -----------------------------------------------------------------------------------

static const struct source {
    const char *file;
    enum keel_record_kind kind;
    bool paired;
    enum keel_metric metric[4];
    size_t n;
} sources[] = {
    { "margin.jsonl", KEEL_REC_MARGIN, true, { KEEL_METRIC_MARGIN, KEEL_METRIC_FLIP }, 2 },
    { "narrow.jsonl", KEEL_REC_NARROW, true, { KEEL_METRIC_NARROW_LOSS }, 1 },
    { "slots.jsonl", KEEL_REC_SLOT, true, { KEEL_METRIC_ALIGNED, KEEL_METRIC_CONTRARY, KEEL_METRIC_COHERENCE, KEEL_METRIC_GAP }, 4 },
    { "slots_incontext.jsonl", KEEL_REC_SLOT, true, { KEEL_METRIC_CONTEXT_CONTRARY, KEEL_METRIC_CONTEXT_COHERENCE }, 2 },
    { "projection.jsonl", KEEL_REC_PROJECTION, true, { KEEL_METRIC_PROJECTION }, 1 },
    { "relevance.jsonl", KEEL_REC_RELEVANCE, true, { KEEL_METRIC_RELEVANCE, KEEL_METRIC_ANSWER_NLL }, 2 },
    { "kl.jsonl", KEEL_REC_KL, false, { KEEL_METRIC_KL, KEEL_METRIC_KL_REVERSE }, 2 },
};

static keel_status add_source(struct work *w, const struct source *src, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct table t = { 0 }, plain = { 0 };
    if (!has_records(w->p, src->file, src->paired)) {
        return KEEL_OK;
    }
    KEEL_TRY(table_load(&t, w->p, src->file, src->kind, src->paired, log));
    for (size_t i = 0; i < src->n; i++) {
        KEEL_TRY(add_metric(w, &t, src->metric[i]));
    }
    if (src->metric[0] == KEEL_METRIC_CONTEXT_CONTRARY && has_records(w->p, "slots.jsonl", true)) {
        KEEL_TRY(table_load(&plain, w->p, "slots.jsonl", KEEL_REC_SLOT, true, log));
        KEEL_TRY(table_keep(&plain, &t));
        KEEL_TRY(add_metric(w, &plain, KEEL_METRIC_CONTEXT_PLAIN));
    }
    if (src->kind == KEEL_REC_KL) {
        KEEL_TRY(add_profile(w, &t, KEEL_METRIC_KL_AT));
        KEEL_TRY(add_profile(w, &t, KEEL_METRIC_KL_REVERSE_AT));
    }
out:
    table_finish(&t);
    table_finish(&plain);
    return st;
}

keel_status keel_drift_compute(struct keel_drift *out, const struct keel_drift_params *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct work w = { out, p, keel_draws_make(KEEL_BOOTSTRAP_DRAWS, p->seed) };
    *out = (struct keel_drift){ 0 };
    for (size_t i = 0; i < KEEL_COUNT(sources); i++) {
        KEEL_TRY(add_source(&w, &sources[i], log));
    }
    if (out->n == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: no records in it; expected base/ and tuned/ from keel study", p->runs ? p->runs[0] : p->dir);
    }
out:
    keel_draws_finish(&w.draws);
    if (st != KEEL_OK) {
        keel_drift_finish(out);
    }
    return st;
}

void keel_drift_finish(struct keel_drift *d)
{
    free(d->row);
    *d = (struct keel_drift){ 0 };
}

const struct keel_drift_row *keel_drift_cell(const struct keel_drift *d, enum keel_metric metric, const char *domain,
                                             const char *modality)
{
    for (size_t i = 0; i < d->n; i++) {
        if (d->row[i].metric == metric && d->row[i].position == 0 && strcmp(d->row[i].domain, domain) == 0 &&
            strcmp(d->row[i].modality, modality) == 0) {
            return &d->row[i];
        }
    }
    return NULL;
}

const struct keel_drift_row *keel_drift_find(const struct keel_drift *d, enum keel_metric metric, const char *domain)
{
    return keel_drift_cell(d, metric, domain, "");
}
