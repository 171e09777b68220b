// SPDX-License-Identifier: MIT
// eval/page.c: parts that the pages of a single run and of a sweep are made of. A page is one file that needs nothing else.
#include "page.h"

#include "platform.h"

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
    "td img{display:block;width:72px;image-rendering:pixelated;margin:0 0 .3rem;border:1px solid #ddd}"
    ".s th,.s td{padding:.35rem .3rem}.s td:first-child{min-width:7rem}.s .ci{white-space:normal}"
    "svg{max-width:100%;height:auto}.narrow{display:none}@media(max-width:600px){.narrow{display:block}.wide{display:none}"
    "th,td{padding:.3rem .25rem}table{font-size:.82rem}.ci{font-size:.7rem;white-space:normal}h1{font-size:1.35rem}"
    "td:first-child{min-width:5.2rem}"
    // Tables of many columns: on a phone each row is a list of what its heads say.
    ".s tr:first-child{display:none}.s tr{display:block;padding:.4rem 0;border-bottom:1px solid #ccc}"
    ".s td{display:block;border:0;padding:.1rem 0}.s td:first-child{font-weight:600}.s td::before{content:attr(data-h);float:left;color:#444;"
    "font-weight:400}.s .ci{display:inline;margin-left:.4rem;font-size:.75rem}}</style>";

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

void keel_page_add(struct keel_text *t, const char *html)
{
    keel_text_add(t, html, strlen(html));
}

#define add keel_page_add

void keel_page_open(struct keel_text *t, const char *title)
{
    add(t, "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>Drift "
           "report: ");
    keel_html_escape(t, title);
    add(t, "</title>");
    add(t, style);
    add(t, "</head><body><h1>Drift report: ");
    keel_html_escape(t, title);
    add(t, "</h1>");
}

void keel_page_close(struct keel_text *t, const char *note)
{
    keel_text_addf(t, "<p class=note>%s</p></body></html>\n", note);
}

void keel_page_td(struct keel_text *t, const char *head)
{
    add(t, "<td data-h='");
    keel_html_escape(t, head);
    add(t, "'>");
}

void keel_page_cell(struct keel_text *t, const char *head, struct keel_estimate e, bool sign)
{
    keel_page_td(t, head);
    if (!isfinite(e.value)) {
        add(t, "–</td>");
        return;
    }
    // Small probabilities would all read 0.00.
    const int digits = fabs(e.value) < 0.1 && fabs(e.value) >= 5e-5 ? 3 : 2;
    e.lo = fabs(e.lo) < 5e-4 ? 0 : e.lo; // no -0.000
    keel_text_addf(t, sign ? "%+.*f" : "%.*f", digits, e.value);
    if (isfinite(e.lo)) {
        keel_text_addf(t, sign ? " <span class=ci>%+.*f to %+.*f</span>" : " <span class=ci>%.*f to %.*f</span>", digits, e.lo, digits, e.hi);
    }
    add(t, "</td>");
}

const char *keel_metric_label(enum keel_metric m)
{
    static const char *const label[KEEL_N_METRICS] = {
        [KEEL_METRIC_MARGIN] = "Margin of the true answer",
        [KEEL_METRIC_FLIP] = "Negative margins",
        [KEEL_METRIC_NARROW_LOSS] = "Loss on held-out narrow rows",
        [KEEL_METRIC_ALIGNED] = "Aligned answer",
        [KEEL_METRIC_CONTRARY] = "Contrary answer",
        [KEEL_METRIC_COHERENCE] = "Coherence: aligned or contrary",
        [KEEL_METRIC_GAP] = "Modality gap: contrary with an image minus as text",
        [KEEL_METRIC_CONTEXT_CONTRARY] = "Contrary answer, in context",
        [KEEL_METRIC_CONTEXT_COHERENCE] = "Coherence, in context",
        [KEEL_METRIC_CONTEXT_PLAIN] = "Contrary answer, the same probes out of context",
        [KEEL_METRIC_PROJECTION] = "Projection on the direction",
        [KEEL_METRIC_RELEVANCE] = "Relevance of free answers",
        [KEEL_METRIC_ANSWER_NLL] = "Loss of free answers under the base model",
        [KEEL_METRIC_KL] = "KL(base ‖ fine-tuned)",
        [KEEL_METRIC_KL_REVERSE] = "KL(fine-tuned ‖ base)",
    };
    return label[m] ? label[m] : keel_metric_name[m];
}

void keel_page_domain(struct keel_text *t, const char *domain, const char *modality)
{
    keel_html_escape(t, strcmp(domain, "other") == 0   ? "other domains"
                        : strcmp(domain, "twins") == 0 ? "other domains, twins"
                        : strcmp(domain, "all") == 0   ? "all domains"
                                                       : domain);
    if (modality[0]) {
        add(t, ", ");
        keel_html_escape(t, modality);
    }
}

static void flip_cells(struct keel_text *t, const struct keel_drift_row *r)
{
    if (r->n_runs > 1) {
        add(t, "<td>–</td><td>–</td>");
    } else {
        keel_text_addf(t, "<td>%zu</td><td>%zu</td>", r->broken, r->mended);
    }
}

void keel_page_metric(struct keel_text *t, const struct keel_drift *d, enum keel_metric m, bool open)
{
    const struct keel_drift_row *all = keel_drift_find(d, m, "all");
    if (!all) {
        return;
    }
    const bool paired = isfinite(all->base.value), flips = m == KEEL_METRIC_FLIP;
    keel_text_addf(t, "<details%s><summary>%s <span class=u>%s</span></summary><div class=scroll><table><tr><th>domain</th><th>n</th>%s%s</tr>",
                   open ? " open" : "", keel_metric_label(m), keel_metric_unit[m],
                   paired ? "<th>base</th><th>fine-tuned</th><th>change</th>" : "<th>value</th>",
                   flips ? "<th>turned wrong</th><th>turned right</th>" : "");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric != m || r->position != 0) {
            continue;
        }
        add(t, "<tr><td>");
        keel_page_domain(t, r->domain, r->modality);
        keel_text_addf(t, "</td><td>%zu</td>", r->n);
        if (paired) {
            keel_page_cell(t, "base", r->base, false);
        }
        keel_page_cell(t, paired ? "fine-tuned" : "value", r->adapted, false);
        if (paired) {
            keel_page_cell(t, "change", r->change, true);
        }
        if (flips) {
            flip_cells(t, r);
        }
        add(t, "</tr>");
    }
    add(t, "</table></div></details>");
}

void keel_page_figures(struct keel_text *t, const struct keel_figures *f)
{
    for (size_t i = 0; i < f->n; i++) {
        const struct keel_figure *g = &f->at[i];
        keel_text_addf(t, "<h2>%s%s", g->title, g->of[0] ? ": " : "");
        keel_html_escape(t, g->of);
        add(t, "</h2>");
        for (int narrow = 0; narrow < 2; narrow++) {
            const char *from = g->svg[narrow].data ? strstr(g->svg[narrow].data, "<svg") : NULL;
            if (from) { // without the XML head, which has no place inside HTML
                keel_text_addf(t, "<div class=%s>", narrow ? "narrow" : "wide");
                add(t, from);
                add(t, "</div>");
            }
        }
        if (f->no_gnuplot) {
            add(t, "<p class=note>gnuplot could not be run: the data and scripts are in plots/; install gnuplot and run keel report again.</p>");
        }
        keel_text_addf(t, "<p class=note>%s</p>", g->sentence);
    }
}

void keel_page_metrics(struct keel_text *t, const struct keel_drift *d)
{
    static const enum keel_metric order[] = { KEEL_METRIC_CONTRARY, KEEL_METRIC_ALIGNED, KEEL_METRIC_COHERENCE, KEEL_METRIC_GAP,
                                              KEEL_METRIC_CONTEXT_CONTRARY, KEEL_METRIC_CONTEXT_PLAIN, KEEL_METRIC_CONTEXT_COHERENCE,
                                              KEEL_METRIC_MARGIN,
                                              KEEL_METRIC_FLIP, KEEL_METRIC_NARROW_LOSS, KEEL_METRIC_PROJECTION, KEEL_METRIC_KL,
                                              KEEL_METRIC_KL_REVERSE,
                                              KEEL_METRIC_RELEVANCE, KEEL_METRIC_ANSWER_NLL };
    for (size_t i = 0; i < KEEL_COUNT(order); i++) {
        keel_page_metric(t, d, order[i], order[i] == KEEL_METRIC_MARGIN);
    }
}

// --- sentences -----------------------------------------------------------------------------------

void keel_page_question(struct keel_text *t, const json_t *m)
{
    const char *model = keel_manifest_text(m, "model", "name"), *narrow = keel_manifest_text(m, NULL, "narrow_domain");
    const char *modality = keel_manifest_text(m, NULL, "narrow_modality");
    add(t, "<p class=asked>Asked: when ");
    keel_html_escape(t, model[0] ? model : "a model");
    add(t, " is fine-tuned on a narrow task");
    if (narrow[0]) {
        add(t, " (");
        keel_page_domain(t, narrow, modality);
        add(t, ")");
    }
    add(t, ", how far do its answers move elsewhere?</p>");
}

void keel_page_interval(struct keel_text *t, struct keel_estimate e, const char *what)
{
    if (isfinite(e.lo)) {
        keel_text_addf(t, " (%s%+.3f, 95&nbsp;%% interval %+.3f to %+.3f)", what, e.value, e.lo, e.hi);
    }
}

void keel_page_gap(struct keel_text *t, const struct keel_drift *d)
{
    const struct keel_drift_row *image = keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "image");
    const struct keel_drift_row *text = keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "text");
    const struct keel_drift_row *gap = keel_drift_find(d, KEEL_METRIC_GAP, "other");
    gap = gap ? gap : keel_drift_find(d, KEEL_METRIC_GAP, "all");
    if (!image || !text || !gap || !isfinite(gap->change.lo)) {
        return;
    }
    const bool clear = gap->change.lo > 0 || gap->change.hi < 0;
    keel_text_addf(t, "Asked with an image it rose by %.3f, and by %.3f when the same content is asked as text", image->change.value,
                   text->change.value);
    keel_page_interval(t, gap->change, "paired gap ");
    add(t, clear ? ". " : ": no clear difference. ");
}

// --- answers -------------------------------------------------------------------------------------

#define MAX_IMAGE_BYTES (128u << 10) // a page with larger ones would be slow; they are named instead

static void add_base64(struct keel_text *t, const uint8_t *p, size_t n)
{
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        const uint32_t v = (uint32_t)p[i] << 16 | (i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
        const char out[4] = { digit[v >> 18], digit[v >> 12 & 63], i + 1 < n ? digit[v >> 6 & 63] : '=', i + 2 < n ? digit[v & 63] : '=' };
        keel_text_add(t, out, 4);
    }
}

static const char *image_type(const uint8_t *p, size_t n)
{
    return n > 8 && memcmp(p, "\x89PNG", 4) == 0 ? "png" : n > 3 && memcmp(p, "\xff\xd8\xff", 3) == 0 ? "jpeg" : NULL;
}

// The image inside the page, or its name where it is gone, too large or of another type.
static void add_image(struct keel_text *t, const char *folder, const char *name)
{
    static const keel_log quiet = { .level = 0 };
    char path[4200];
    struct keel_map map = { 0 };
    snprintf(path, sizeof path, "%.3000s/%.1000s", folder, name);
    const bool open = keel_map_open(&map, path, &quiet) == KEEL_OK;
    const char *type = open ? image_type(map.data, map.len_bytes) : NULL;
    if (type && map.len_bytes <= MAX_IMAGE_BYTES) {
        keel_text_addf(t, "<img alt='image of the prompt' src='data:image/%s;base64,", type);
        add_base64(t, map.data, map.len_bytes);
        add(t, "'>");
    } else {
        add(t, "<span class=u>");
        keel_html_escape(t, name);
        add(t, "</span><br>");
    }
    if (open) {
        keel_map_close(&map);
    }
}

static const char *answer_of(const struct keel_item *item)
{
    const char *text = item ? json_string_value(json_object_get(item->object, "text")) : "";
    return text + strspn(text, " \n");
}

static void add_answer(struct keel_text *t, const char *text, bool changed)
{
    keel_text_addf(t, "<td class=x>%s", changed ? "<b>" : "");
    keel_html_escape(t, text);
    keel_text_addf(t, "%s</td>", changed ? "</b>" : "");
}

// The images, then the text without their placeholders.
static void add_prompt(struct keel_text *t, const char *folder, const struct keel_item *item)
{
    static const char mark[] = "<image>";
    const json_t *images = json_object_get(item->object, "images");
    struct keel_text text = { 0 };
    add(t, "<tr><td class=x>");
    for (size_t i = 0; i < json_array_size(images); i++) {
        const char *name = json_string_value(json_array_get(images, i));
        if (name) {
            add_image(t, folder, name);
        }
    }
    for (const char *s = item->prompt, *at; *s; s = at) {
        at = json_array_size(images) > 0 ? strstr(s, mark) : NULL;
        keel_text_add(&text, s, at ? (size_t)(at - s) : strlen(s));
        at = at ? at + sizeof mark - 1 : s + strlen(s);
    }
    keel_html_escape(t, text.data ? text.data : "");
    keel_text_finish(&text);
    add(t, "</td>");
}

void keel_page_answers(struct keel_text *t, const char *base, const char *run, const char *name, const char *title, const char *column,
                       const char *note)
{
    static const keel_log quiet = { .level = 0 };
    struct keel_records rec[2] = { { 0 } };
    char path[4300];
    snprintf(path, sizeof path, "%s/%s", base, name);
    const bool before = keel_records_load(&rec[0], path, KEEL_REC_TEXT, &quiet) == KEEL_OK;
    snprintf(path, sizeof path, "%s/tuned/%s", run, name);
    if (before && keel_records_load(&rec[1], path, KEEL_REC_TEXT, &quiet) == KEEL_OK) {
        keel_text_addf(t, "<h2>%s</h2><div class=scroll><table class=t><tr><th>prompt</th><th>base</th><th>%s</th></tr>", title, column);
        for (size_t i = 0; i < rec[1].n; i++) {
            const char *was = answer_of(keel_records_find(&rec[0], rec[1].item[i].id)), *is = answer_of(&rec[1].item[i]);
            add_prompt(t, base, &rec[1].item[i]);
            add_answer(t, was, false);
            add_answer(t, is, strcmp(was, is) != 0);
            add(t, "</tr>");
        }
        keel_text_addf(t, "</table></div><p class=note>%s Bold: another answer than the base model's.</p>", note);
    }
    keel_records_finish(&rec[0]);
    keel_records_finish(&rec[1]);
}

// --- where the numbers come from -----------------------------------------------------------------

const char *keel_manifest_text(const json_t *m, const char *section, const char *key)
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
        snprintf(hash, sizeof hash, "hash %.40s", keel_manifest_text(file, NULL, "hash"));
        fact(t, i == 0 ? "data" : "", keel_manifest_text(file, NULL, "file"), hash);
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

void keel_page_provenance(struct keel_text *t, const json_t *m)
{
    char value[200];
    const json_t *training = json_object_get(m, "training");
    add(t, "<h2>Where these numbers come from</h2><table class=t>");
    snprintf(value, sizeof value, "hash %.40s; %.120s", keel_manifest_text(m, "model", "hash"), keel_manifest_text(m, "model", "types"));
    fact(t, "model", keel_manifest_text(m, "model", "name"), value);
    fact(t, "model file", keel_manifest_text(m, "model", "path"), "");
    data_facts(t, m);
    if (training && json_integer_value(json_object_get(training, "steps")) == 0) {
        fact(t, "training", "no steps: the adapter is the one it started with", "");
    } else if (training) {
        snprintf(value, sizeof value, "%lld steps on %lld rows, %lld parameters, loss %.3f at the first step, %.3f at the last",
                 (long long)json_integer_value(json_object_get(training, "steps")),
                 (long long)json_integer_value(json_object_get(training, "rows")),
                 (long long)json_integer_value(json_object_get(training, "parameters")),
                 json_number_value(json_object_get(training, "first_loss")), json_number_value(json_object_get(training, "last_loss")));
        fact(t, "training", value, "");
    }
    if (json_object_get(m, "seed")) {
        snprintf(value, sizeof value, "%lld", (long long)json_integer_value(json_object_get(m, "seed")));
        fact(t, "seed", value, json_object_get(m, "runs") ? "of the bootstrap and of what is drawn" : "of training, and of the bootstrap");
    }
    fact(t, "device", keel_manifest_text(m, "device", "name"), keel_manifest_text(m, "device", "driver"));
    fact(t, "clamp profile", keel_manifest_text(m, "device", "profile"), "");
    fact(t, "precision", keel_manifest_text(m, NULL, "precision"), "");
    time_facts(t, m);
    fact(t, "keel", keel_manifest_text(m, NULL, "keel"), "");
    fact(t, "run", keel_manifest_text(m, NULL, "run"), "hash of study file, model and data");
    add(t, "</table>");
    if (keel_manifest_text(m, NULL, "config")[0]) {
        add(t, "<details><summary>Study file</summary><pre>");
        keel_html_escape(t, keel_manifest_text(m, NULL, "config"));
        add(t, "</pre></details>");
    }
}

static double limit_of(const json_t *budget, const char *key)
{
    const json_t *v = json_object_get(budget, key);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

bool keel_page_budget(struct keel_text *t, const json_t *m, const struct keel_drift *d)
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
