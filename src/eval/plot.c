// SPDX-License-Identifier: MIT
// eval/plot.c: the plots of one run.
#include "page.h"

#include "formats.h"
#include "platform.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool keel_file_rows(const char *dir, const char *name, void (*row)(void *user, const struct json_t *object), void *user)
{
    static const keel_log quiet = { .level = 0 };
    char path[4200];
    struct keel_map map;
    bool any = false;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (keel_map_open(&map, path, &quiet) != KEEL_OK) {
        return false;
    }
    struct keel_jsonl r = keel_jsonl_make(map.data, map.len_bytes, path, &quiet);
    struct keel_row line;
    while (keel_jsonl_next(&r, &line) == KEEL_OK && line.object) {
        row(user, line.object);
        json_decref(line.object);
        any = true;
    }
    keel_map_close(&map);
    return any;
}

static double number(const struct json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

static void loss_row(void *user, const struct json_t *object)
{
    keel_text_addf(user, "%.0f,%.6g,%.6g,%.6g\n", number(object, "step"), number(object, "loss"), number(object, "lr"),
                   number(object, "grad_norm"));
}

static void loss_figure(struct keel_figures *f, const char *dir)
{
    struct keel_text csv = { 0 };
    keel_text_addf(&csv, "step,loss,lr,grad_norm\n");
    if (!keel_file_rows(dir, KEEL_TRAIN_LOG, loss_row, &csv)) {
        keel_text_finish(&csv);
        return;
    }
    struct keel_figure *g = keel_figure_add(f, "loss", "Training",
                                            "Loss of each optimiser step over its answer tokens. It shows whether the narrow task was learnt; it "
                                            "says nothing about other domains.");
    g->csv = csv;
    for (int narrow = 0; narrow < 2; narrow++) {
        keel_text_addf(&g->script[narrow], "set xlabel 'optimiser step'\nset ylabel 'loss (nats per answer token)'\nset yrange [0:*]\n"
                                           "plot 'loss.csv' skip 1 using 1:2 with linespoints lc rgb blue lw 2 pt 7 ps 0.4 title "
                                           "'training loss'\n");
    }
}

static void kl_figure(struct keel_figures *f, const struct keel_drift *d)
{
    struct keel_text csv = { 0 };
    size_t n = 0;
    keel_text_addf(&csv, "position,kl,lo,hi,n\n");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric == KEEL_METRIC_KL_AT && isfinite(r->adapted.lo)) {
            keel_text_addf(&csv, "%u,%.6g,%.6g,%.6g,%zu\n", r->position, r->adapted.value, r->adapted.lo, r->adapted.hi, r->n);
            n++;
        }
    }
    if (n == 0) {
        keel_text_finish(&csv);
        return;
    }
    struct keel_figure *g = keel_figure_add(f, "kl_profile", "Divergence along the answer",
                                            "Mean KL(base ‖ fine-tuned) over the whole vocabulary at each position of the base model's greedy "
                                            "answers; band: 95 % interval. It shows where in an answer the models part; it cannot show whether "
                                            "the change is for better or worse.");
    g->csv = csv;
    for (int narrow = 0; narrow < 2; narrow++) {
        keel_text_addf(&g->script[narrow],
                       "set xlabel 'position in the answer (tokens)'\nset ylabel 'KL to the base (nats)'\nset yrange [0:*]\nset xrange "
                       "[0.5:%u.5]\nset xtics %d\n"
                       "plot 'kl_profile.csv' skip 1 using 1:3:4 with filledcurves fc rgb blue fs transparent solid 0.2 noborder "
                       "title '95%% interval', '' skip 1 using 1:2 with linespoints lc rgb blue lw 2 pt 7 ps 0.6 title 'mean'\n",
                       KEEL_PROFILE_LEN, narrow ? 3 : 1);
    }
}

// --- rows of pairs -------------------------------------------------------------------------------

void keel_pair_head(struct keel_text *csv)
{
    keel_text_addf(csv, "row,label,n,first,first_lo,first_hi,second,second_lo,second_hi\n");
}

void keel_pair_row(struct keel_text *csv, size_t row, const char *label, size_t n, struct keel_estimate a, struct keel_estimate b)
{
    const struct keel_estimate e[2] = { a, b };
    char text[96];
    keel_figure_label(text, label);
    keel_text_addf(csv, "%zu,%s,%zu", row, text, n);
    for (int k = 0; k < 2; k++) { // without an interval the bar has no length
        keel_text_addf(csv, ",%.6g,%.6g,%.6g", e[k].value, isfinite(e[k].lo) ? e[k].lo : e[k].value,
                       isfinite(e[k].hi) ? e[k].hi : e[k].value);
    }
    keel_text_add(csv, "\n", 1);
}

void keel_few_tics(struct keel_text *gp, const char *name, const int lo[2], const int hi[2])
{
    keel_text_addf(gp, "a=1e9\nb=-1e9\n");
    for (int k = 0; k < 2; k++) {
        keel_text_addf(gp, "stats '%s.csv' skip 1 using %d nooutput\na=STATS_min<a?STATS_min:a\n", name, lo[k]);
        keel_text_addf(gp, "stats '%s.csv' skip 1 using %d nooutput\nb=STATS_max>b?STATS_max:b\n", name, hi[k]);
    }
    keel_text_addf(gp, "s=b>a?(b-a)/4:1\np=10.0**floor(log10(s))\nt=s<1.5*p?p:s<3.5*p?2*p:s<7.5*p?5*p:10*p\nset xtics t\n");
}

void keel_pair_script(struct keel_figure *g, size_t rows, const char *range, const char *axis, const char *first, const char *second)
{
    for (int narrow = 0; narrow < 2; narrow++) {
        g->height[narrow] = (narrow ? 150 : 130) + (int)rows * (narrow ? 34 : 32);
        if (narrow) {
            keel_few_tics(&g->script[narrow], g->name, (const int[2]){ 5, 8 }, (const int[2]){ 6, 9 });
        }
        keel_text_addf(&g->script[narrow],
                       "set xlabel '%s'\nset yrange [%zu.5:-0.5]\nset rmargin 3\n%s%s"
                       "set arrow from 0,graph 0 to 0,graph 1 nohead lc rgb '#555555' dt 2\n"
                       "plot '%s.csv' skip 1 using 4:($1-0.13):5:6:ytic(2) with xerrorbars lc rgb blue lw 2 pt 7 ps 0.7 title '%s', "
                       "'' skip 1 using 7:($1+0.13):8:9 with xerrorbars lc rgb orange lw 2 pt 5 ps 0.7 title '%s'\n",
                       axis, rows - 1, range, narrow ? "set key maxcols 1\n" : "", g->name, first, second);
    }
}

void keel_cell_label(char out[96], const char *domain, const char *modality)
{
    const char *name = strcmp(domain, "other") == 0 ? "other domains" : domain;
    snprintf(out, 96, "%.60s%s%.20s", name, modality[0] ? ", " : "", modality);
}

// A line of a pair plot for each row of `metric` that `wanted` keeps: base and fine-tuned. Returns how many; `csv` is empty if none.
static size_t pair_csv(struct keel_text *csv, const struct keel_drift *d, enum keel_metric metric,
                       bool (*wanted)(const struct keel_drift *d, const struct keel_drift_row *r))
{
    size_t n = 0;
    keel_pair_head(csv);
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric == metric && wanted(d, r)) {
            char label[96];
            keel_cell_label(label, r->domain, r->modality);
            keel_pair_row(csv, n++, label, r->n, r->base, r->adapted);
        }
    }
    if (n == 0) {
        keel_text_finish(csv);
    }
    return n;
}

static bool has_interval_alone(const struct keel_drift *d, const struct keel_drift_row *r)
{
    (void)d;
    return isfinite(r->base.lo) && !r->modality[0];
}

static void margin_figure(struct keel_figures *f, const struct keel_drift *d)
{
    struct keel_text csv = { 0 };
    const size_t n = pair_csv(&csv, d, KEEL_METRIC_MARGIN, has_interval_alone);
    if (n == 0) {
        return;
    }
    struct keel_figure *g = keel_figure_add(f, "margin", "Margin by domain",
                                            "Mean log-probability a token of the true answer minus that of a wrong one, before (circles) and "
                                            "after (squares), with 95 % intervals; right of 0 the model prefers the truth. It shows which domains "
                                            "moved; it cannot show what the model would write when it answers freely.");
    g->csv = csv;
    keel_pair_script(g, n, "", "margin (nats per token)", "base", "fine-tuned");
}

bool keel_has_modalities(const struct keel_drift *d, enum keel_metric metric)
{
    return keel_drift_cell(d, metric, "all", "image") != NULL || keel_drift_cell(d, metric, "all", "text") != NULL;
}

bool keel_is_cell(const struct keel_drift *d, const struct keel_drift_row *r)
{
    return !keel_domain_reserved(r->domain) && (r->modality[0] != 0) == keel_has_modalities(d, r->metric);
}

static void slot_figure(struct keel_figures *f, const struct keel_drift *d)
{
    struct keel_text csv = { 0 };
    const size_t n = pair_csv(&csv, d, KEEL_METRIC_CONTRARY, keel_is_cell);
    if (n == 0) {
        return;
    }
    struct keel_figure *g = keel_figure_add(f, "contrary", "Contrary answers by domain and modality",
                                            "Mean probability of the contrary answer at the answer slot, before (circles) and after (squares), "
                                            "with 95 % intervals. It shows exactly how likely that answer is at that place; it cannot show "
                                            "longer answers, or other ways of being wrong.");
    g->csv = csv;
    keel_pair_script(g, n, "set xrange [0:1]\n", "probability of the contrary answer", "base", "fine-tuned");
}

static void context_figure(struct keel_figures *f, const struct keel_drift *d)
{
    struct keel_text csv = { 0 };
    size_t n = 0;
    keel_pair_head(&csv);
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        const struct keel_drift_row *plain = keel_drift_cell(d, KEEL_METRIC_CONTEXT_PLAIN, r->domain, r->modality);
        if (r->metric != KEEL_METRIC_CONTEXT_CONTRARY || !plain || !keel_is_cell(d, r)) {
            continue;
        }
        char label[96];
        keel_cell_label(label, r->domain, r->modality);
        keel_pair_row(&csv, n++, label, r->n, plain->adapted, r->adapted);
    }
    if (n == 0) {
        keel_text_finish(&csv);
        return;
    }
    struct keel_figure *g = keel_figure_add(f, "context", "The same probes in context",
                                            "Probability of the contrary answer of the fine-tuned model, asked plainly (circles) and with training "
                                            "rows as earlier turns (squares), with 95 % intervals. It shows behaviour that plain questions do not "
                                            "bring out; part of it may be the base model following its context, which the table has.");
    g->csv = csv;
    keel_pair_script(g, n, "set xrange [0:*]\n", "probability of the contrary answer", "asked plainly", "in context");
}

void keel_figures_of_run(struct keel_figures *f, const struct keel_drift *d, const char *dir)
{
    slot_figure(f, d);
    context_figure(f, d);
    margin_figure(f, d);
    kl_figure(f, d);
    loss_figure(f, dir);
    char path[1][4200];
    snprintf(path[0], sizeof path[0], "%s", dir);
    keel_monitor_figure(f, "", (const char(*)[4200])path, 1);
}
