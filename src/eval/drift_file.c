// SPDX-License-Identifier: MIT
// eval/drift_file.c: drift metrics as files (CSV, JSON), and the drift budget.
#include "eval.h"

#include "platform.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

void keel_drift_csv_head(struct keel_text *csv)
{
    keel_text_addf(csv, "metric,unit,domain,modality,position,n,n_prompts,base,base_lo,base_hi,adapted,adapted_lo,adapted_hi,change,"
                        "change_lo,change_hi\n");
}

void keel_drift_csv_row(struct keel_text *csv, const struct keel_drift_row *r)
{
    const struct keel_estimate e[3] = { r->base, r->adapted, r->change };
    keel_text_addf(csv, "%s,%s,", keel_metric_name[r->metric], keel_metric_unit[r->metric]);
    csv_text(csv, r->domain);
    keel_text_add(csv, ",", 1);
    csv_text(csv, r->modality);
    keel_text_addf(csv, ",%u,%zu,%zu", r->position, r->n, r->n_clusters);
    for (int k = 0; k < 3; k++) {
        csv_number(csv, e[k].value);
        csv_number(csv, e[k].lo);
        csv_number(csv, e[k].hi);
    }
    keel_text_add(csv, "\n", 1);
}

struct json_t *keel_drift_json(const struct keel_drift *d)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        json_array_append_new(rows, json_pack("{s:s, s:s, s:s, s:s, s:i, s:I, s:I, s:o, s:o, s:o}", "metric",
                                              keel_metric_name[r->metric], "unit", keel_metric_unit[r->metric], "domain", r->domain,
                                              "modality", r->modality, "position", (int)r->position, "n", (json_int_t)r->n,
                                              "n_prompts", (json_int_t)r->n_clusters, "base", json_estimate(r->base), "adapted",
                                              json_estimate(r->adapted), "change", json_estimate(r->change)));
    }
    return rows;
}

keel_status keel_drift_write(const struct keel_drift *d, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_text csv = { 0 }, text = { 0 };
    json_t *rows = keel_drift_json(d);
    keel_drift_csv_head(&csv);
    for (size_t i = 0; i < d->n; i++) {
        keel_drift_csv_row(&csv, &d->row[i]);
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
