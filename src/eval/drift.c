// SPDX-License-Identifier: MIT
// eval/drift.c: drift metrics from the records of the base and the adapted model (science notes: M1, M2, M4).
// Every change is paired by item; intervals are bootstraps over prompts, so that items that share a prompt move together.
#include "eval.h"

#include "platform.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const keel_metric_name[KEEL_N_METRICS] = {
    [KEEL_METRIC_MARGIN] = "margin",   [KEEL_METRIC_FLIP] = "flip_rate", [KEEL_METRIC_NARROW_LOSS] = "narrow_loss",
    [KEEL_METRIC_KL] = "kl",           [KEEL_METRIC_KL_REVERSE] = "kl_reverse",
    [KEEL_METRIC_KL_AT] = "kl_at",     [KEEL_METRIC_KL_REVERSE_AT] = "kl_reverse_at",
};
const char *const keel_metric_unit[KEEL_N_METRICS] = {
    [KEEL_METRIC_MARGIN] = "nats/token", [KEEL_METRIC_FLIP] = "share",      [KEEL_METRIC_NARROW_LOSS] = "nats/token",
    [KEEL_METRIC_KL] = "nats/token",     [KEEL_METRIC_KL_REVERSE] = "nats/token",
    [KEEL_METRIC_KL_AT] = "nats",        [KEEL_METRIC_KL_REVERSE_AT] = "nats",
};

// Items of one metric: a value before and after (before NULL for divergences), weight, cluster, domain.
struct series {
    size_t n;
    double *base, *tuned, *weight;
    uint32_t *cluster;
    const char **domain;
};

static bool series_init(struct series *s, size_t n)
{
    *s = (struct series){ 0 };
    s->base = calloc(n + 1, sizeof *s->base);
    s->tuned = calloc(n + 1, sizeof *s->tuned);
    s->weight = calloc(n + 1, sizeof *s->weight);
    s->cluster = calloc(n + 1, sizeof *s->cluster);
    s->domain = calloc(n + 1, sizeof *s->domain);
    return s->base && s->tuned && s->weight && s->cluster && s->domain;
}

static void series_finish(struct series *s)
{
    free(s->base);
    free(s->tuned);
    free(s->weight);
    free(s->cluster);
    free(s->domain);
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

static bool in_domain(const char *domain, const char *want, const char *narrow)
{
    return strcmp(want, "all") == 0 || (strcmp(want, "other") == 0 ? strcmp(domain, narrow) != 0 : strcmp(domain, want) == 0);
}

// Estimates of the items of `domain`, added as one row.
static keel_status add_estimate(struct keel_drift *d, const struct keel_drift_params *p, const struct series *all,
                                enum keel_metric metric, const char *domain, uint32_t position)
{
    keel_status st = KEEL_OK;
    struct series s = { 0 };
    double *diff = calloc(all->n + 1, sizeof *diff);
    struct keel_drift_row row = { .metric = metric, .position = position, .base = KEEL_NO_ESTIMATE, .adapted = KEEL_NO_ESTIMATE,
                                  .change = KEEL_NO_ESTIMATE };
    uint32_t *renumber = calloc(all->n + 1, sizeof *renumber);
    if (!diff || !renumber || !series_init(&s, all->n)) {
        st = KEEL_ERR_NO_MEMORY;
        goto out;
    }
    snprintf(row.domain, sizeof row.domain, "%s", domain);
    for (size_t i = 0; i < all->n; i++) {
        if (!in_domain(all->domain[i], domain, p->narrow_domain ? p->narrow_domain : "")) {
            continue;
        }
        uint32_t *c = &renumber[all->cluster[i]];
        if (*c == 0) {
            *c = (uint32_t)++row.n_clusters;
        }
        s.base[s.n] = all->base[i];
        s.tuned[s.n] = all->tuned[i];
        s.weight[s.n] = all->weight[i];
        s.cluster[s.n] = *c - 1;
        diff[s.n] = all->tuned[i] - all->base[i];
        row.broken += diff[s.n] > 0 && metric == KEEL_METRIC_FLIP;
        row.mended += diff[s.n] < 0 && metric == KEEL_METRIC_FLIP;
        s.n++;
    }
    row.n = s.n;
    if (s.n == 0) {
        goto out;
    }
    const bool paired = metric == KEEL_METRIC_MARGIN || metric == KEEL_METRIC_FLIP || metric == KEEL_METRIC_NARROW_LOSS;
    const uint32_t nc = (uint32_t)row.n_clusters, b = KEEL_BOOTSTRAP_DRAWS;
    if (metric == KEEL_METRIC_FLIP) {
        row.base = keel_wilson((uint64_t)llround(keel_mean(s.base, s.n) * (double)s.n), s.n);
        row.adapted = keel_wilson((uint64_t)llround(keel_mean(s.tuned, s.n) * (double)s.n), s.n);
    } else {
        KEEL_TRY(keel_bootstrap(s.tuned, s.weight, s.cluster, s.n, nc, b, p->seed, &row.adapted));
        if (paired) {
            KEEL_TRY(keel_bootstrap(s.base, s.weight, s.cluster, s.n, nc, b, p->seed, &row.base));
        }
    }
    if (paired) {
        KEEL_TRY(keel_bootstrap(diff, s.weight, s.cluster, s.n, nc, b, p->seed, &row.change));
    }
    KEEL_TRY(add_row(d, &row));
out:
    free(diff);
    free(renumber);
    series_finish(&s);
    return st;
}

// The metric over all items, over all but the narrow domain, and by domain in the order of the data.
static keel_status add_metric(struct keel_drift *d, const struct keel_drift_params *p, const struct series *s, enum keel_metric metric)
{
    keel_status st = add_estimate(d, p, s, metric, "all", 0);
    bool narrow = false; // without an item of the narrow domain, "other" would repeat "all"
    for (size_t i = 0; p->narrow_domain && i < s->n; i++) {
        narrow = narrow || strcmp(s->domain[i], p->narrow_domain) == 0;
    }
    if (st == KEEL_OK && narrow) {
        st = add_estimate(d, p, s, metric, "other", 0);
    }
    for (size_t i = 0; st == KEEL_OK && i < s->n; i++) {
        bool seen = s->domain[i][0] == 0;
        for (size_t k = 0; k < i && !seen; k++) {
            seen = strcmp(s->domain[k], s->domain[i]) == 0;
        }
        if (!seen) {
            st = add_estimate(d, p, s, metric, s->domain[i], 0);
        }
    }
    return st;
}

// Number of a prompt, counted from 0 in order of appearance.
static uint32_t cluster_of(json_t *prompts, const char *prompt)
{
    json_t *v = json_object_get(prompts, prompt);
    if (!v) {
        v = json_integer((json_int_t)json_object_size(prompts));
        json_object_set_new(prompts, prompt, v);
    }
    return (uint32_t)json_integer_value(v);
}

// Pairs the items of base/NAME and tuned/NAME by id.
static keel_status load_pair(struct series *s, struct keel_records rec[2], const char *dir, const char *name,
                             enum keel_record_kind kind, const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_t *prompts = json_object();
    static const char *const side[2] = { "base", "tuned" };
    for (int i = 0; i < 2; i++) {
        char path[4200];
        snprintf(path, sizeof path, "%s/%s/%s", dir, side[i], name);
        KEEL_TRY(keel_records_load(&rec[i], path, kind, log));
    }
    if (rec[0].n != rec[1].n || !prompts || !series_init(s, rec[0].n)) {
        KEEL_FAIL(log, rec[0].n != rec[1].n ? KEEL_ERR_MISMATCH : KEEL_ERR_NO_MEMORY,
                  "%s: base/%s has %zu records, tuned/%s %zu; they must be of the same items", dir, name, rec[0].n, name, rec[1].n);
    }
    for (size_t i = 0; i < rec[0].n; i++) {
        const struct keel_item *b = &rec[0].item[i], *t = keel_records_find(&rec[1], b->id);
        if (!t) {
            KEEL_FAIL(log, KEEL_ERR_MISMATCH, "%s: id \"%s\" of base/%s is not in tuned/%s", dir, b->id, name, name);
        }
        s->base[i] = b->value;
        s->tuned[i] = t->value;
        s->weight[i] = b->weight;
        s->cluster[i] = cluster_of(prompts, b->prompt);
        s->domain[i] = b->domain;
    }
    s->n = rec[0].n;
out:
    json_decref(prompts);
    return st;
}

static keel_status margins(struct keel_drift *d, const struct keel_drift_params *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct series s = { 0 };
    struct keel_records rec[2] = { { 0 } };
    KEEL_TRY(load_pair(&s, rec, p->dir, "margin.jsonl", KEEL_REC_MARGIN, log));
    KEEL_TRY(add_metric(d, p, &s, KEEL_METRIC_MARGIN));
    for (size_t i = 0; i < s.n; i++) {
        s.base[i] = s.base[i] < 0;
        s.tuned[i] = s.tuned[i] < 0;
    }
    KEEL_TRY(add_metric(d, p, &s, KEEL_METRIC_FLIP));
out:
    series_finish(&s);
    keel_records_finish(&rec[0]);
    keel_records_finish(&rec[1]);
    return st;
}

static keel_status narrow(struct keel_drift *d, const struct keel_drift_params *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct series s = { 0 };
    struct keel_records rec[2] = { { 0 } };
    KEEL_TRY(load_pair(&s, rec, p->dir, "narrow.jsonl", KEEL_REC_NARROW, log));
    KEEL_TRY(add_estimate(d, p, &s, KEEL_METRIC_NARROW_LOSS, "all", 0));
out:
    series_finish(&s);
    keel_records_finish(&rec[0]);
    keel_records_finish(&rec[1]);
    return st;
}

// Mean of a record's list, or its value at a position; false where the list is too short.
static bool kl_value(const struct keel_item *item, const char *field, uint32_t position, double *out)
{
    const json_t *list = json_object_get(item->object, field);
    const size_t n = json_array_size(list);
    *out = 0;
    if (position > 0) {
        *out = json_number_value(json_array_get(list, position - 1));
        return position <= n;
    }
    for (size_t i = 0; i < n; i++) {
        *out += json_number_value(json_array_get(list, i)) / (double)n;
    }
    return n > 0;
}

static keel_status divergence(struct keel_drift *d, const struct keel_drift_params *p, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct series s = { 0 };
    struct keel_records rec = { 0 };
    json_t *prompts = json_object();
    KEEL_TRY(keel_records_load(&rec, path, KEEL_REC_KL, log));
    if (!prompts || !series_init(&s, rec.n)) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    for (int reverse = 0; reverse < 2; reverse++) {
        for (uint32_t pos = 0; pos <= KEEL_PROFILE_LEN; pos++) {
            s.n = 0;
            for (size_t i = 0; i < rec.n; i++) {
                if (kl_value(&rec.item[i], reverse ? "kl_reverse" : "kl", pos, &s.tuned[s.n])) {
                    s.weight[s.n] = 1;
                    s.cluster[s.n] = cluster_of(prompts, rec.item[i].prompt);
                    s.domain[s.n++] = rec.item[i].domain;
                }
            }
            if (pos == 0) {
                KEEL_TRY(add_metric(d, p, &s, reverse ? KEEL_METRIC_KL_REVERSE : KEEL_METRIC_KL));
            } else {
                KEEL_TRY(add_estimate(d, p, &s, reverse ? KEEL_METRIC_KL_REVERSE_AT : KEEL_METRIC_KL_AT, "all", pos));
            }
        }
    }
out:
    json_decref(prompts);
    series_finish(&s);
    keel_records_finish(&rec);
    return st;
}

static bool has_file(const char *dir, const char *name)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return keel_path_exists(path);
}

keel_status keel_drift_compute(struct keel_drift *out, const struct keel_drift_params *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200];
    *out = (struct keel_drift){ 0 };
    if (has_file(p->dir, "base/margin.jsonl") && has_file(p->dir, "tuned/margin.jsonl")) {
        KEEL_TRY(margins(out, p, log));
    }
    if (has_file(p->dir, "base/narrow.jsonl") && has_file(p->dir, "tuned/narrow.jsonl")) {
        KEEL_TRY(narrow(out, p, log));
    }
    if (has_file(p->dir, "tuned/kl.jsonl")) {
        snprintf(path, sizeof path, "%s/tuned/kl.jsonl", p->dir);
        KEEL_TRY(divergence(out, p, path, log));
    }
    if (out->n == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: no records in it; expected base/ and tuned/ from keel study", p->dir);
    }
out:
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

const struct keel_drift_row *keel_drift_find(const struct keel_drift *d, enum keel_metric metric, const char *domain)
{
    for (size_t i = 0; i < d->n; i++) {
        if (d->row[i].metric == metric && d->row[i].position == 0 && strcmp(d->row[i].domain, domain) == 0) {
            return &d->row[i];
        }
    }
    return NULL;
}

// --- files ---------------------------------------------------------------------------------------

static void csv_number(struct keel_text *t, double v)
{
    if (isfinite(v)) {
        keel_text_addf(t, ",%.6g", v);
    } else {
        keel_text_add(t, ",", 1);
    }
}

// A domain comes from a data file: quoted as RFC 4180 says.
static void csv_text(struct keel_text *t, const char *s)
{
    keel_text_add(t, "\"", 1);
    for (; *s; s++) {
        keel_text_add(t, "\"\"", *s == '"' ? 1 : 0);
        keel_text_add(t, s, 1);
    }
    keel_text_add(t, "\"", 1);
}

static json_t *json_estimate(struct keel_estimate e)
{
    if (!isfinite(e.value)) {
        return json_null();
    }
    json_t *v = json_object();
    json_object_set_new(v, "value", json_real(e.value));
    json_object_set_new(v, "lo", isfinite(e.lo) ? json_real(e.lo) : json_null());
    json_object_set_new(v, "hi", isfinite(e.hi) ? json_real(e.hi) : json_null());
    return v;
}

keel_status keel_text_save(const struct keel_text *t, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_file_out out = { 0 };
    if (t->failed) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    KEEL_TRY(keel_file_create(&out, path, log));
    fwrite(t->data ? t->data : "", 1, t->len, out.f); // a failed write shows at commit
    KEEL_TRY(keel_file_commit(&out, log));
out:
    keel_file_abort(&out);
    return st;
}

keel_status keel_drift_write(const struct keel_drift *d, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_text csv = { 0 }, text = { 0 };
    json_t *rows = json_array();
    keel_text_addf(&csv, "metric,unit,domain,position,n,n_prompts,base,base_lo,base_hi,adapted,adapted_lo,adapted_hi,change,change_lo,"
                         "change_hi\n");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        const struct keel_estimate e[3] = { r->base, r->adapted, r->change };
        keel_text_addf(&csv, "%s,%s,", keel_metric_name[r->metric], keel_metric_unit[r->metric]);
        csv_text(&csv, r->domain);
        keel_text_addf(&csv, ",%u,%zu,%zu", r->position, r->n, r->n_clusters);
        for (int k = 0; k < 3; k++) {
            csv_number(&csv, e[k].value);
            csv_number(&csv, e[k].lo);
            csv_number(&csv, e[k].hi);
        }
        keel_text_add(&csv, "\n", 1);
        json_array_append_new(rows, json_pack("{s:s, s:s, s:s, s:i, s:I, s:I, s:o, s:o, s:o}", "metric", keel_metric_name[r->metric],
                                              "unit", keel_metric_unit[r->metric], "domain", r->domain, "position", (int)r->position,
                                              "n", (json_int_t)r->n, "n_prompts", (json_int_t)r->n_clusters, "base",
                                              json_estimate(r->base), "adapted", json_estimate(r->adapted), "change",
                                              json_estimate(r->change)));
    }
    char *dump = json_dumps(rows, JSON_INDENT(1) | JSON_REAL_PRECISION(7));
    if (!dump) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory for drift.json", dir);
    }
    keel_text_addf(&text, "%s\n", dump);
    free(dump);
    snprintf(path, sizeof path, "%s/summary.csv", dir);
    KEEL_TRY(keel_text_save(&csv, path, log));
    snprintf(path, sizeof path, "%s/drift.json", dir);
    KEEL_TRY(keel_text_save(&text, path, log));
out:
    json_decref(rows);
    keel_text_finish(&csv);
    keel_text_finish(&text);
    return st;
}

// --- budget --------------------------------------------------------------------------------------

size_t keel_budget_check(const struct keel_budget *b, const struct keel_drift *d, struct keel_budget_row out[3])
{
    const char *domain = keel_drift_find(d, KEEL_METRIC_MARGIN, "other") ? "other" : "all";
    const struct keel_drift_row *kl = keel_drift_find(d, KEEL_METRIC_KL, "all");
    const struct keel_drift_row *margin = keel_drift_find(d, KEEL_METRIC_MARGIN, domain);
    const struct keel_drift_row *flip = keel_drift_find(d, KEEL_METRIC_FLIP, domain);
    const struct keel_budget_row all[3] = {
        { "kl_mean", "nats/token", b->kl_mean, kl ? kl->adapted.value : NAN, false },
        { "margin_drop", "nats/token", b->margin_drop, margin ? -margin->change.value : NAN, false },
        { "flip_rate", "share", b->flip_rate, flip ? flip->adapted.value : NAN, false },
    };
    size_t n = 0;
    for (int i = 0; i < 3; i++) {
        if (isfinite(all[i].limit)) {
            out[n] = all[i];
            out[n++].over = !(all[i].value <= all[i].limit);
        }
    }
    return n;
}
