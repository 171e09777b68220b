// SPDX-License-Identifier: MIT
// eval/report.c: one self-contained HTML page for a study folder: the answer, tables, plots inline, examples, where the numbers come
// from. Needs no GPU and no network; without gnuplot the tables and the plot scripts remain.
#include "page.h"

#include "platform.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define add keel_page_add

// The few numbers that answer the question, one a line.
static void summary(struct keel_text *t, const struct keel_drift *d, const char *narrow, const char *modality)
{
    const char *where = keel_drift_find(d, KEEL_METRIC_MARGIN, "other") ? "other" : "all";
    const char *slots = keel_drift_find(d, KEEL_METRIC_CONTRARY, "other") ? "other" : "all";
    const bool twins = keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "image") && keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "text");
    const struct {
        enum keel_metric metric;
        const char *domain, *modality;
    } rows[] = {
        { KEEL_METRIC_NARROW_LOSS, "all", "" },
        { KEEL_METRIC_CONTRARY, narrow ? narrow : "", modality ? modality : "" },
        { KEEL_METRIC_CONTRARY, twins ? "twins" : slots, twins ? "image" : "" },
        { KEEL_METRIC_CONTRARY, twins ? "twins" : "", twins ? "text" : "" },
        { KEEL_METRIC_GAP, keel_drift_find(d, KEEL_METRIC_GAP, "other") ? "other" : "all", "" },
        { KEEL_METRIC_COHERENCE, slots, "" },
        { KEEL_METRIC_CONTEXT_CONTRARY, keel_drift_find(d, KEEL_METRIC_CONTEXT_CONTRARY, "other") ? "other" : "all", "" },
        { KEEL_METRIC_MARGIN, narrow ? narrow : "", "" },
        { KEEL_METRIC_MARGIN, where, "" },
        { KEEL_METRIC_FLIP, where, "" },
        { KEEL_METRIC_KL, "all", "" },
        { KEEL_METRIC_RELEVANCE, "all", "" },
    };
    add(t, "<h2>Summary</h2><div class=scroll><table><tr><th>measure</th><th>n</th><th>base</th><th>fine-tuned</th><th>change</th></tr>");
    for (size_t i = 0; i < KEEL_COUNT(rows); i++) {
        const struct keel_drift_row *r = keel_drift_cell(d, rows[i].metric, rows[i].domain, rows[i].modality);
        if (!r) {
            continue;
        }
        keel_text_addf(t, "<tr><td>%s", keel_metric_label(r->metric));
        if (r->metric != KEEL_METRIC_NARROW_LOSS && r->metric != KEEL_METRIC_KL && r->metric != KEEL_METRIC_RELEVANCE) {
            add(t, ", ");
            keel_page_domain(t, r->domain, r->modality);
        }
        keel_text_addf(t, "<br><span class=u>%s</span></td><td>%zu</td>", keel_metric_unit[r->metric], r->n);
        keel_page_cell(t, "base", r->base, false);
        keel_page_cell(t, "fine-tuned", r->adapted, false);
        keel_page_cell(t, "change", r->change, true);
        add(t, "</tr>");
    }
    add(t, "</table></div><p class=note>Small figures: 95 % intervals. Paired bootstrap over prompts (10,000 draws); Wilson for shares.");
    if (keel_drift_find(d, KEEL_METRIC_FLIP, "all")) {
        add(t, " Negative margins: the share of probes for which the model prefers the wrong answer.");
    }
    if (keel_drift_find(d, KEEL_METRIC_CONTRARY, "all")) {
        add(t, " Contrary answer: its probability at the answer slot; coherence: that of the aligned and the contrary answer together.");
    }
    add(t, "</p>");
}

// What was asked, and the answer in a few sentences.
static void headline(struct keel_text *t, const json_t *m, const struct keel_drift *d)
{
    const struct keel_drift_row *loss = keel_drift_find(d, KEEL_METRIC_NARROW_LOSS, "all");
    const struct keel_drift_row *other = keel_drift_find(d, KEEL_METRIC_MARGIN, "other");
    const struct keel_drift_row *margin = other ? other : keel_drift_find(d, KEEL_METRIC_MARGIN, "all");
    const struct keel_drift_row *kl = keel_drift_find(d, KEEL_METRIC_KL, "all");
    const struct keel_drift_row *slot = keel_drift_find(d, KEEL_METRIC_CONTRARY, "other");
    const bool elsewhere = slot != NULL;
    slot = slot ? slot : keel_drift_find(d, KEEL_METRIC_CONTRARY, "all");
    keel_page_question(t, m);
    add(t, "<p>");
    if (loss) {
        keel_text_addf(t, "The loss on held-out rows of the narrow task went from %.2f to %.2f nats a token. ", loss->base.value,
                       loss->adapted.value);
    }
    if (slot) {
        keel_text_addf(t, "%s the contrary answer went from a probability of %.3f to <b>%.3f</b>", elsewhere ? "Outside the narrow domain" : "Over all probes",
                       slot->base.value, slot->adapted.value);
        keel_page_interval(t, slot->change, "change ");
        keel_text_addf(t, ", %zu probes. ", slot->n);
    }
    keel_page_gap(t, d);
    if (margin && isfinite(margin->change.lo)) {
        const bool clear = margin->change.hi < 0 || margin->change.lo > 0;
        keel_text_addf(t, "%s the margin of the true answer moved by <b>%+.2f</b> nats a token (95&nbsp;%% interval %+.2f to %+.2f, %zu probes)%s. ",
                       other ? "Outside the narrow domain" : "Over all probes", margin->change.value, margin->change.lo,
                       margin->change.hi, margin->n, clear ? "" : ": not distinguishable from no drift");
    }
    if (kl) {
        keel_text_addf(t, "On the base model's own answers the fine-tuned model diverges by %.2f nats a token.", kl->adapted.value);
    }
    add(t, "</p>");
}

static void body(struct keel_text *t, const char *dir, const char *base, const json_t *m, const struct keel_drift *d,
                 const struct keel_figures *f, bool *over)
{
    const char *name = keel_manifest_text(m, NULL, "name");
    struct keel_text guards = { 0 };
    keel_page_open(t, name[0] ? name : dir);
    headline(t, m, d);
    summary(t, d, json_string_value(json_object_get(m, "narrow_domain")), json_string_value(json_object_get(m, "narrow_modality")));
    *over = keel_page_budget(t, m, d);
    keel_guard_item(&guards, "", dir);
    keel_page_guards(t, &guards);
    keel_page_figures(t, f);
    keel_page_answers(t, base, dir, "examples.jsonl", "Probes before and after", "fine-tuned", KEEL_EXAMPLES_NOTE);
    keel_page_answers(t, base, dir, "answers.jsonl", "Answers before and after", "fine-tuned",
                      "Greedy continuations of the first prompts of the KL set. They show what the numbers mean in words; a few examples prove "
                      "nothing.");
    add(t, "<h2>All numbers</h2>");
    keel_page_metrics(t, d);
    keel_page_provenance(t, m);
    keel_page_close(t, "Per-item records: base/ and tuned/; all estimates: summary.csv and drift.json; data and scripts of the plots: plots/.");
}

keel_status keel_manifest_load(json_t **out, const char *dir, const keel_log *log)
{
    char path[4200];
    json_error_t error;
    snprintf(path, sizeof path, "%s/manifest.json", dir);
    *out = NULL;
    if (!keel_path_exists(path)) {
        *out = json_object();
        return KEEL_OK;
    }
    *out = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        KEEL_ERROR(log, "%s:%d: invalid manifest: %s", path, error.line, error.text);
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

void keel_manifest_base(char out[4200], const char *dir, const json_t *m)
{
    const char *shared = json_string_value(json_object_get(m, "base")); // of a run of a sweep, or of a stage
    snprintf(out, 4200, "%.4000s/%.100s", dir, shared ? shared : "base");
}

static keel_status single(struct keel_text *t, const char *dir, const json_t *m, bool *over, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_drift d = { 0 };
    struct keel_figures figures = { 0 };
    char base[4200];
    keel_manifest_base(base, dir, m);
    const struct keel_drift_params p = { .dir = dir, .base = base, .narrow_domain = json_string_value(json_object_get(m, "narrow_domain")),
                                         .seed = (uint64_t)json_integer_value(json_object_get(m, "seed")) };
    KEEL_TRY(keel_drift_compute(&d, &p, log));
    KEEL_TRY(keel_drift_write(&d, dir, log));
    keel_figures_of_run(&figures, &d, dir);
    keel_figures_of_geometry(&figures, dir);
    KEEL_TRY(keel_figures_draw(&figures, dir, log));
    body(t, dir, base, m, &d, &figures, over);
out:
    keel_drift_finish(&d);
    keel_figures_finish(&figures);
    return st;
}

static keel_status pooled(struct keel_text *t, const char *dir, const json_t *m, bool *over, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_sweep s = { 0 };
    struct keel_figures figures = { 0 };
    KEEL_TRY(keel_sweep_load(&s, dir, m, NULL, log));
    KEEL_TRY(keel_sweep_write(&s, dir, log));
    keel_figures_of_sweep(&figures, &s);
    keel_figures_of_geometry(&figures, dir);
    KEEL_TRY(keel_figures_draw(&figures, dir, log));
    keel_sweep_page(t, dir, m, &s, &figures, over);
out:
    keel_sweep_finish(&s);
    keel_figures_finish(&figures);
    return st;
}

static keel_status chained(struct keel_text *t, const char *dir, const json_t *m, bool *over, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_chain c = { 0 };
    struct keel_figures figures = { 0 };
    KEEL_TRY(keel_chain_load(&c, dir, m, log));
    KEEL_TRY(keel_chain_write(&c, dir, log));
    keel_figures_of_chain(&figures, &c);
    keel_figures_of_geometry(&figures, dir);
    KEEL_TRY(keel_figures_draw(&figures, dir, log));
    keel_chain_page(t, dir, m, &c, &figures, over);
out:
    keel_chain_finish(&c);
    keel_figures_finish(&figures);
    return st;
}

keel_status keel_report_write(const char *dir, bool *over, const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_t *m = NULL;
    struct keel_text t = { 0 };
    char path[4200];
    bool exceeded = false;
    if (!keel_path_is_dir(dir)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: no such folder; give the --out folder of keel study", dir);
    }
    KEEL_TRY(keel_manifest_load(&m, dir, log));
    KEEL_TRY(keel_geometry_alone(dir) ? keel_geometry_page(&t, dir, log)
             : (json_object_get(m, "stages") ? chained : json_object_get(m, "runs") ? pooled : single)(&t, dir, m, &exceeded, log));
    snprintf(path, sizeof path, "%s/report.html", dir);
    KEEL_TRY(keel_text_save(&t, path, log));
    if (over) {
        *over = exceeded;
    }
out:
    json_decref(m);
    keel_text_finish(&t);
    return st;
}
