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
#include <time.h>

static const char style[] =
    "<style>body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:54rem;margin:0 auto;padding:1rem}"
    "h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #ddd}"
    "p{margin:.5rem 0}.asked{color:#444}.note{color:#555;font-size:.9rem}.scroll{overflow-x:auto}"
    "table{border-collapse:collapse;font-size:.92rem;margin:.5rem 0;width:100%}"
    "th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #e5e5e5;vertical-align:top;font-variant-numeric:tabular-nums}"
    "th{background:#f4f6f8;font-weight:600}th:first-child,td:first-child,.t td,.t th{text-align:left}"
    ".t td{overflow-wrap:anywhere}.t td:first-child{min-width:6.5rem}.t .x{white-space:pre-wrap}.ci{display:block;color:#666;font-size:.8rem;"
    "white-space:nowrap}.u{color:#666;font-size:.8rem;font-weight:400}.over{color:#b02a00;font-weight:600}.ok{color:#00684a;font-weight:600}"
    "details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}pre{background:#f4f6f8;padding:.7rem;overflow-x:auto;font-size:.85rem}"
    "svg{max-width:100%;height:auto}.narrow{display:none}@media(max-width:600px){.narrow{display:block}.wide{display:none}"
    "th,td{padding:.3rem .25rem}table{font-size:.82rem}.ci{font-size:.7rem;white-space:normal}h1{font-size:1.35rem}"
    "td:first-child{min-width:5.2rem}}</style>";

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

static void cell(struct keel_text *t, struct keel_estimate e, bool sign)
{
    if (!isfinite(e.value)) {
        add(t, "<td>–</td>");
        return;
    }
    keel_text_addf(t, sign ? "<td>%+.2f" : "<td>%.2f", e.value);
    if (isfinite(e.lo)) {
        keel_text_addf(t, sign ? " <span class=ci>%+.2f to %+.2f</span>" : " <span class=ci>%.2f to %.2f</span>", e.lo, e.hi);
    }
    add(t, "</td>");
}

static const char *metric_label(enum keel_metric m)
{
    switch (m) {
    case KEEL_METRIC_MARGIN:
        return "Margin of the true answer";
    case KEEL_METRIC_FLIP:
        return "Negative margins";
    case KEEL_METRIC_NARROW_LOSS:
        return "Loss on held-out narrow rows";
    case KEEL_METRIC_KL:
        return "KL(base ‖ fine-tuned)";
    default:
        return "KL(fine-tuned ‖ base)";
    }
}

static void domain_name(struct keel_text *t, const char *domain)
{
    keel_html_escape(t, strcmp(domain, "other") == 0 ? "other domains" : domain);
}

static void metric_table(struct keel_text *t, const struct keel_drift *d, enum keel_metric m)
{
    const struct keel_drift_row *all = keel_drift_find(d, m, "all");
    if (!all) {
        return;
    }
    const bool paired = isfinite(all->base.value), flips = m == KEEL_METRIC_FLIP;
    keel_text_addf(t, "<details%s><summary>%s <span class=u>%s</span></summary><div class=scroll><table><tr><th>domain</th><th>n</th>%s%s</tr>",
                   m == KEEL_METRIC_MARGIN ? " open" : "", metric_label(m), keel_metric_unit[m],
                   paired ? "<th>base</th><th>fine-tuned</th><th>change</th>" : "<th>value</th>",
                   flips ? "<th>turned wrong</th><th>turned right</th>" : "");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric != m || r->position != 0) {
            continue;
        }
        add(t, "<tr><td>");
        domain_name(t, r->domain);
        keel_text_addf(t, "</td><td>%zu</td>", r->n);
        if (paired) {
            cell(t, r->base, false);
        }
        cell(t, r->adapted, false);
        if (paired) {
            cell(t, r->change, true);
        }
        if (flips) {
            keel_text_addf(t, "<td>%zu</td><td>%zu</td>", r->broken, r->mended);
        }
        add(t, "</tr>");
    }
    add(t, "</table></div></details>");
}

// The few numbers that answer the question, one a line.
static void summary(struct keel_text *t, const struct keel_drift *d, const char *narrow)
{
    const char *where = keel_drift_find(d, KEEL_METRIC_MARGIN, "other") ? "other" : "all";
    const struct {
        enum keel_metric metric;
        const char *domain;
    } rows[] = {
        { KEEL_METRIC_NARROW_LOSS, "all" }, { KEEL_METRIC_MARGIN, narrow ? narrow : "" }, { KEEL_METRIC_MARGIN, where },
        { KEEL_METRIC_FLIP, where },        { KEEL_METRIC_KL, "all" },
    };
    add(t, "<h2>Summary</h2><div class=scroll><table><tr><th>measure</th><th>n</th><th>base</th><th>fine-tuned</th><th>change</th></tr>");
    for (size_t i = 0; i < KEEL_COUNT(rows); i++) {
        const struct keel_drift_row *r = keel_drift_find(d, rows[i].metric, rows[i].domain);
        if (!r) {
            continue;
        }
        keel_text_addf(t, "<tr><td>%s", metric_label(r->metric));
        if (r->metric == KEEL_METRIC_MARGIN || r->metric == KEEL_METRIC_FLIP) {
            add(t, ", ");
            domain_name(t, r->domain);
        }
        keel_text_addf(t, "<br><span class=u>%s</span></td><td>%zu</td>", keel_metric_unit[r->metric], r->n);
        cell(t, r->base, false);
        cell(t, r->adapted, false);
        cell(t, r->change, true);
        add(t, "</tr>");
    }
    add(t, "</table></div><p class=note>Small figures: 95 % intervals. Paired bootstrap over prompts (10,000 draws); Wilson for shares. "
           "Negative margins: the share of probes for which the model prefers the wrong answer.</p>");
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

static void answer(struct keel_text *t, const struct keel_item *item)
{
    const char *text = item ? json_string_value(json_object_get(item->object, "text")) : "";
    keel_html_escape(t, text + strspn(text, " \n"));
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
            add(t, "<tr><td class=x>");
            keel_html_escape(t, rec[1].item[i].prompt);
            add(t, "</td><td class=x>");
            answer(t, before);
            add(t, "</td><td class=x>");
            answer(t, &rec[1].item[i]);
            add(t, "</td></tr>");
        }
        add(t, "</table></div><p class=note>Greedy continuations of the first prompts of the KL set. They show what the numbers mean in words; a few "
               "examples prove nothing.</p>");
    }
    keel_records_finish(&rec[0]);
    keel_records_finish(&rec[1]);
}

// --- where the numbers come from -----------------------------------------------------------------

static const char *text_of(const json_t *m, const char *section, const char *key)
{
    const json_t *o = section ? json_object_get(m, section) : m;
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

static void fact(struct keel_text *t, const char *label, const char *value, const char *note)
{
    if (!value[0]) {
        return;
    }
    keel_text_addf(t, "<tr><td>%s</td><td>", label);
    keel_html_escape(t, value);
    if (note[0]) {
        add(t, " <span class=u>");
        keel_html_escape(t, note);
        add(t, "</span>");
    }
    add(t, "</td></tr>");
}

static void data_facts(struct keel_text *t, const json_t *m)
{
    size_t i;
    json_t *file;
    json_array_foreach(json_object_get(m, "data"), i, file)
    {
        char hash[64];
        snprintf(hash, sizeof hash, "hash %.40s", text_of(file, NULL, "hash"));
        fact(t, i == 0 ? "data" : "", text_of(file, NULL, "file"), hash);
    }
}

static void time_facts(struct keel_text *t, const json_t *m)
{
    char value[200] = "";
    size_t used = 0;
    const char *stage;
    json_t *seconds;
    const time_t started = (time_t)json_integer_value(json_object_get(m, "started"));
    struct tm utc;
    if (started > 0 && gmtime_r(&started, &utc) && strftime(value, sizeof value, "%Y-%m-%d %H:%M UTC", &utc) > 0) {
        fact(t, "started", value, "");
    }
    value[0] = 0;
    json_object_foreach(json_object_get(m, "seconds"), stage, seconds)
    {
        const int n = snprintf(value + used, sizeof value - used, "%s%.20s %.0f s", used ? ", " : "", stage, json_number_value(seconds));
        used = n > 0 ? KEEL_MIN(used + (size_t)n, sizeof value - 1) : used;
    }
    fact(t, "time", value, "of the last run of each stage");
}

static void provenance(struct keel_text *t, const json_t *m)
{
    char value[200];
    const json_t *training = json_object_get(m, "training");
    add(t, "<h2>Where these numbers come from</h2><table class=t>");
    snprintf(value, sizeof value, "hash %.40s; %.120s", text_of(m, "model", "hash"), text_of(m, "model", "types"));
    fact(t, "model", text_of(m, "model", "name"), value);
    fact(t, "model file", text_of(m, "model", "path"), "");
    data_facts(t, m);
    if (training) {
        snprintf(value, sizeof value, "%lld steps on %lld rows, %lld parameters, loss %.3f at the first step, %.3f at the last",
                 (long long)json_integer_value(json_object_get(training, "steps")),
                 (long long)json_integer_value(json_object_get(training, "rows")),
                 (long long)json_integer_value(json_object_get(training, "parameters")),
                 json_number_value(json_object_get(training, "first_loss")), json_number_value(json_object_get(training, "last_loss")));
        fact(t, "training", value, "");
    }
    if (json_object_get(m, "seed")) {
        snprintf(value, sizeof value, "%lld", (long long)json_integer_value(json_object_get(m, "seed")));
        fact(t, "seed", value, "of training, and of the bootstrap");
    }
    fact(t, "device", text_of(m, "device", "name"), text_of(m, "device", "driver"));
    fact(t, "clamp profile", text_of(m, "device", "profile"), "");
    fact(t, "precision", text_of(m, NULL, "precision"), "");
    time_facts(t, m);
    fact(t, "keel", text_of(m, NULL, "keel"), "");
    fact(t, "run", text_of(m, NULL, "run"), "hash of study file, model and data");
    add(t, "</table>");
    if (text_of(m, NULL, "config")[0]) {
        add(t, "<details><summary>Study file</summary><pre>");
        keel_html_escape(t, text_of(m, NULL, "config"));
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
        add(t, "<h2>Drift budget</h2><div class=scroll><table><tr><th>limit on</th><th>limit</th><th>measured</th><th>verdict</th></tr>");
        for (size_t i = 0; i < n; i++) {
            keel_text_addf(t, "<tr><td>%s <span class=u>%s</span></td><td>%.4g</td><td>%.4g</td><td class=%s>%s</td></tr>", row[i].name, row[i].unit,
                           row[i].limit, row[i].value, row[i].over ? "over" : "ok", row[i].over ? "exceeded" : "held");
            over = over || row[i].over;
        }
        add(t, "</table></div>");
    }
    return over;
}

// What was asked, and the answer in three sentences.
static void headline(struct keel_text *t, const json_t *m, const struct keel_drift *d)
{
    const struct keel_drift_row *loss = keel_drift_find(d, KEEL_METRIC_NARROW_LOSS, "all");
    const struct keel_drift_row *other = keel_drift_find(d, KEEL_METRIC_MARGIN, "other");
    const struct keel_drift_row *margin = other ? other : keel_drift_find(d, KEEL_METRIC_MARGIN, "all");
    const struct keel_drift_row *kl = keel_drift_find(d, KEEL_METRIC_KL, "all");
    add(t, "<p class=asked>Asked: when ");
    keel_html_escape(t, text_of(m, "model", "name")[0] ? text_of(m, "model", "name") : "a model");
    add(t, " is fine-tuned on a narrow task");
    if (text_of(m, NULL, "narrow_domain")[0]) {
        add(t, " (");
        keel_html_escape(t, text_of(m, NULL, "narrow_domain"));
        add(t, ")");
    }
    add(t, ", how far do its answers move elsewhere?</p><p>");
    if (loss) {
        keel_text_addf(t, "The loss on held-out rows of the narrow task went from %.2f to %.2f nats a token. ", loss->base.value,
                       loss->adapted.value);
    }
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

static void body(struct keel_text *t, const char *dir, const json_t *m, const struct keel_drift *d, const struct keel_plots *p, bool *over)
{
    const char *name = text_of(m, NULL, "name"), *narrow = text_of(m, NULL, "narrow_domain");
    add(t, "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>Drift "
           "report: ");
    keel_html_escape(t, name[0] ? name : dir);
    add(t, "</title>");
    add(t, style);
    add(t, "</head><body><h1>Drift report: ");
    keel_html_escape(t, name[0] ? name : dir);
    add(t, "</h1>");
    headline(t, m, d);
    summary(t, d, narrow[0] ? narrow : NULL);
    *over = budget_part(t, m, d);
    plot(t, p, KEEL_PLOT_MARGIN, "Margin by domain",
         "Mean log-probability a token of the true answer minus that of a wrong one, before (circles) and after (squares), with 95 % intervals; right "
         "of 0 the model prefers the truth. It shows which domains moved; it cannot show what the model would write when it answers freely.");
    plot(t, p, KEEL_PLOT_KL, "Divergence along the answer",
         "Mean KL(base ‖ fine-tuned) over the whole vocabulary at each position of the base model's greedy answers; band: 95 % interval. It shows "
         "where in an answer the models part; it cannot show whether the change is for better or worse.");
    plot(t, p, KEEL_PLOT_LOSS, "Training",
         "Loss of each optimiser step over its answer tokens. It shows whether the narrow task was learnt; it says nothing about other domains.");
    examples(t, dir);
    add(t, "<h2>All numbers</h2>");
    static const enum keel_metric order[] = { KEEL_METRIC_MARGIN, KEEL_METRIC_FLIP, KEEL_METRIC_NARROW_LOSS, KEEL_METRIC_KL, KEEL_METRIC_KL_REVERSE };
    for (size_t i = 0; i < KEEL_COUNT(order); i++) {
        metric_table(t, d, order[i]);
    }
    provenance(t, m);
    add(t, "<p class=note>Per-item records: base/ and tuned/; all estimates: summary.csv and drift.json; data and scripts of the plots: "
           "plots/.</p></body></html>\n");
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
