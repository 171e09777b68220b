// SPDX-License-Identifier: MIT
// eval/report.c: one self-contained HTML page for a study folder: tables, plots inline, examples, where the numbers come from.
// Needs no GPU and no network; without gnuplot the tables and the plot scripts remain.
#include "eval.h"

#include "platform.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char style[] =
    "<style>body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:56rem;margin:0 auto;padding:1rem}"
    "h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #ddd}"
    ".lead{font-size:1.05rem}.note{color:#555;font-size:.9rem}.scroll{overflow-x:auto}"
    "table{border-collapse:collapse;font-size:.9rem;margin:.5rem 0}th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid "
    "#e5e5e5;white-space:nowrap}th{background:#f4f6f8}th:first-child,td:first-child,.t td,.t th{text-align:left}.t td{white-space:normal;"
    "overflow-wrap:anywhere;vertical-align:top}.over{color:#b02a00;font-weight:600}.ok{color:#00684a;font-weight:600}"
    "svg{max-width:100%;height:auto}.narrow{display:none}@media(max-width:600px){.narrow{display:block}.wide{display:none}"
    "th,td{padding:.3rem .4rem}}</style>";

void keel_html_escape(struct keel_text *t, const char *text)
{
    size_t len = strlen(text), bad;
    while (len > 0) {
        const size_t good = keel_utf8_valid(text, len, &bad) ? len : bad;
        for (size_t i = 0; i < good; i++) {
            const char c = text[i];
            const char *entity = c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '"' ? "&quot;" : c == '\'' ? "&#39;" : NULL;
            if (entity) {
                keel_text_add(t, entity, strlen(entity));
            } else {
                keel_text_add(t, (unsigned char)c < 32 && c != '\n' ? " " : &c, 1);
            }
        }
        text += good;
        len -= good;
        if (len > 0) {
            keel_text_add(t, "\xef\xbf\xbd", 3);
            text++;
            len--;
        }
    }
}

static void add(struct keel_text *t, const char *s)
{
    keel_text_add(t, s, strlen(s));
}

static void cell(struct keel_text *t, struct keel_estimate e)
{
    if (!isfinite(e.value)) {
        add(t, "<td>–</td>");
    } else if (!isfinite(e.lo)) {
        keel_text_addf(t, "<td>%.3f</td>", e.value);
    } else {
        keel_text_addf(t, "<td>%.3f <span class=note>[%.3f, %.3f]</span></td>", e.value, e.lo, e.hi);
    }
}

static const char *metric_label(enum keel_metric m)
{
    switch (m) {
    case KEEL_METRIC_MARGIN:
        return "Margin of the true answer";
    case KEEL_METRIC_FLIP:
        return "Probes answered wrongly (margin below 0)";
    case KEEL_METRIC_NARROW_LOSS:
        return "Loss on held-out narrow rows";
    case KEEL_METRIC_KL:
        return "KL(base ‖ fine-tuned)";
    default:
        return "KL(fine-tuned ‖ base)";
    }
}

static void metric_table(struct keel_text *t, const struct keel_drift *d, enum keel_metric m)
{
    if (!keel_drift_find(d, m, "all")) {
        return;
    }
    keel_text_addf(t, "<h3>%s <span class=note>(%s)</span></h3><div class=scroll><table><tr><th>domain</th><th>n</th>", metric_label(m),
                   keel_metric_unit[m]);
    const bool paired = isfinite(keel_drift_find(d, m, "all")->base.value);
    add(t, paired ? "<th>base</th><th>fine-tuned</th><th>change</th></tr>" : "<th>value</th></tr>");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric != m || r->position != 0) {
            continue;
        }
        add(t, "<tr><td>");
        keel_html_escape(t, strcmp(r->domain, "other") == 0 ? "all but the narrow domain" : r->domain);
        keel_text_addf(t, "</td><td>%zu</td>", r->n);
        if (paired) {
            cell(t, r->base);
        }
        cell(t, r->adapted);
        if (paired) {
            cell(t, r->change);
        }
        add(t, "</tr>");
    }
    add(t, "</table></div>");
}

static void plot(struct keel_text *t, const struct keel_plots *p, enum keel_plot which, const char *title, const char *sentence)
{
    if (!p->has_data[which]) {
        return;
    }
    keel_text_addf(t, "<h2>%s</h2>", title);
    for (int narrow = 0; narrow < 2; narrow++) {
        const struct keel_text *svg = &p->svg[which][narrow];
        const char *from = svg->data ? strstr(svg->data, "<svg") : NULL;
        if (from) { // without the XML head, which has no place inside HTML
            keel_text_addf(t, "<div class=%s>", narrow ? "narrow" : "wide");
            add(t, from);
            add(t, "</div>");
        }
    }
    if (p->no_gnuplot) {
        add(t, "<p class=note>gnuplot could not be run: the data and scripts are in plots/; install gnuplot and run keel report again.</p>");
    }
    keel_text_addf(t, "<p class=note>%s</p>", sentence);
}

static void examples(struct keel_text *t, const char *dir)
{
    static const keel_log quiet = { .level = 0 };
    struct keel_records rec[2] = { { 0 } };
    char path[4200];
    snprintf(path, sizeof path, "%s/base/answers.jsonl", dir);
    const bool base = keel_records_load(&rec[0], path, KEEL_REC_TEXT, &quiet) == KEEL_OK;
    snprintf(path, sizeof path, "%s/tuned/answers.jsonl", dir);
    if (base && keel_records_load(&rec[1], path, KEEL_REC_TEXT, &quiet) == KEEL_OK) {
        add(t, "<h2>Answers before and after</h2><div class=scroll><table class=t><tr><th>prompt</th><th>base</th><th>fine-tuned</th></tr>");
        for (size_t i = 0; i < rec[1].n; i++) {
            const struct keel_item *before = keel_records_find(&rec[0], rec[1].item[i].id);
            add(t, "<tr><td>");
            keel_html_escape(t, rec[1].item[i].prompt);
            add(t, "</td><td>");
            keel_html_escape(t, before ? json_string_value(json_object_get(before->object, "text")) : "");
            add(t, "</td><td>");
            keel_html_escape(t, json_string_value(json_object_get(rec[1].item[i].object, "text")));
            add(t, "</td></tr>");
        }
        add(t, "</table></div><p class=note>Greedy continuations of the first prompts of the KL set. They show what the numbers mean in words; a few "
               "examples prove nothing.</p>");
    }
    keel_records_finish(&rec[0]);
    keel_records_finish(&rec[1]);
}

static void provenance(struct keel_text *t, const json_t *m)
{
    const char *key;
    json_t *value;
    add(t, "<h2>Where these numbers come from</h2><div class=scroll><table class=t>");
    json_object_foreach((json_t *)(uintptr_t)m, key, value)
    {
        if (strcmp(key, "config") == 0 || strcmp(key, "budget") == 0) {
            continue;
        }
        char *dump = json_is_string(value) ? NULL : json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(6));
        add(t, "<tr><td>");
        keel_html_escape(t, key);
        add(t, "</td><td>");
        keel_html_escape(t, dump ? dump : json_is_string(value) ? json_string_value(value) : "");
        add(t, "</td></tr>");
        free(dump);
    }
    add(t, "</table></div>");
    const char *config = json_string_value(json_object_get(m, "config"));
    if (config) {
        add(t, "<details><summary>Study file</summary><pre>");
        keel_html_escape(t, config);
        add(t, "</pre></details>");
    }
}

static double limit_of(const json_t *budget, const char *key)
{
    const json_t *v = json_object_get(budget, key);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

static bool budget_part(struct keel_text *t, const json_t *m, const struct keel_drift *d)
{
    const json_t *b = json_object_get(m, "budget");
    const struct keel_budget budget = { limit_of(b, "kl_mean"), limit_of(b, "margin_drop"), limit_of(b, "flip_rate") };
    struct keel_budget_row row[3];
    const size_t n = keel_budget_check(&budget, d, row);
    bool over = false;
    if (n > 0) {
        add(t, "<h2>Drift budget</h2><div class=scroll><table><tr><th>budget</th><th>limit</th><th>measured</th><th>verdict</th></tr>");
        for (size_t i = 0; i < n; i++) {
            keel_text_addf(t, "<tr><td>%s (%s)</td><td>%.4g</td><td>%.4g</td><td class=%s>%s</td></tr>", row[i].name, row[i].unit,
                           row[i].limit, row[i].value, row[i].over ? "over" : "ok", row[i].over ? "exceeded" : "held");
            over = over || row[i].over;
        }
        add(t, "</table></div>");
    }
    return over;
}

static void headline(struct keel_text *t, const struct keel_drift *d)
{
    const struct keel_drift_row *loss = keel_drift_find(d, KEEL_METRIC_NARROW_LOSS, "all");
    const struct keel_drift_row *other = keel_drift_find(d, KEEL_METRIC_MARGIN, "other");
    const struct keel_drift_row *margin = other ? other : keel_drift_find(d, KEEL_METRIC_MARGIN, "all");
    const struct keel_drift_row *kl = keel_drift_find(d, KEEL_METRIC_KL, "all");
    add(t, "<p class=lead>");
    if (loss) {
        keel_text_addf(t, "Fine-tuning changed the loss on held-out rows of the narrow task from %.2f to %.2f nats a token. ",
                       loss->base.value, loss->adapted.value);
    }
    if (margin) {
        const bool clear = margin->change.hi < 0 || margin->change.lo > 0;
        keel_text_addf(t, "%s the margin of the true answer moved by %+.3f nats a token (95&nbsp;%% interval %+.3f to %+.3f, %zu probes%s). ",
                       other ? "Outside the narrow domain" : "Over all probes", margin->change.value, margin->change.lo,
                       margin->change.hi, margin->n, clear ? "" : ": not distinguishable from no drift");
    }
    if (kl) {
        keel_text_addf(t, "On the base model's own answers the fine-tuned model diverges by %.3f nats a token.", kl->adapted.value);
    }
    add(t, "</p>");
}

static void body(struct keel_text *t, const char *dir, const json_t *m, const struct keel_drift *d, const struct keel_plots *p, bool *over)
{
    const char *name = json_string_value(json_object_get(m, "name"));
    add(t, "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>Drift "
           "report: ");
    keel_html_escape(t, name ? name : dir);
    add(t, "</title>");
    add(t, style);
    add(t, "</head><body><h1>Drift report: ");
    keel_html_escape(t, name ? name : dir);
    add(t, "</h1>");
    headline(t, d);
    *over = budget_part(t, m, d);
    plot(t, p, KEEL_PLOT_MARGIN, "Margin by domain",
         "Mean log-probability of the true answer minus that of a wrong one, by domain, with 95 % bootstrap intervals over prompts; right of 0 the "
         "model prefers the truth. It shows which domains moved; it cannot show what the model would write freely.");
    plot(t, p, KEEL_PLOT_KL, "Divergence along the answer",
         "Mean KL(base ‖ fine-tuned) at each position of the base model's greedy answers, whole vocabulary, 95 % interval. It shows where answers "
         "begin to differ; it cannot show whether the difference is for better or worse.");
    plot(t, p, KEEL_PLOT_LOSS, "Training",
         "Loss of each optimiser step over its answer tokens. It shows that the narrow task was learnt; it says nothing about other domains.");
    add(t, "<h2>All numbers</h2><p class=note>Intervals in brackets are 95 %: paired bootstrap over prompts (10,000 draws), Wilson for shares. n counts "
           "items.</p>");
    static const enum keel_metric order[] = { KEEL_METRIC_NARROW_LOSS, KEEL_METRIC_MARGIN, KEEL_METRIC_FLIP, KEEL_METRIC_KL, KEEL_METRIC_KL_REVERSE };
    for (size_t i = 0; i < KEEL_COUNT(order); i++) {
        metric_table(t, d, order[i]);
    }
    examples(t, dir);
    provenance(t, m);
    add(t, "<p class=note>Per-item records: base/, tuned/; all estimates: summary.csv, drift.json; plots: plots/.</p></body></html>\n");
}

static keel_status load_manifest(json_t **out, const char *dir, const keel_log *log)
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

keel_status keel_report_write(const char *dir, bool *over, const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_t *m = NULL;
    struct keel_drift d = { 0 };
    struct keel_plots plots = { 0 };
    struct keel_text t = { 0 };
    char path[4200];
    bool exceeded = false;
    if (!keel_path_is_dir(dir)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: no such folder; give the --out folder of keel study", dir);
    }
    KEEL_TRY(load_manifest(&m, dir, log));
    const struct keel_drift_params p = { .dir = dir, .narrow_domain = json_string_value(json_object_get(m, "narrow_domain")),
                                         .seed = (uint64_t)json_integer_value(json_object_get(m, "seed")) };
    KEEL_TRY(keel_drift_compute(&d, &p, log));
    KEEL_TRY(keel_drift_write(&d, dir, log));
    KEEL_TRY(keel_plots_make(&plots, &d, dir, log));
    body(&t, dir, m, &d, &plots, &exceeded);
    snprintf(path, sizeof path, "%s/report.html", dir);
    KEEL_TRY(keel_text_save(&t, path, log));
    if (over) {
        *over = exceeded;
    }
out:
    json_decref(m);
    keel_drift_finish(&d);
    keel_plots_finish(&plots);
    keel_text_finish(&t);
    return st;
}
