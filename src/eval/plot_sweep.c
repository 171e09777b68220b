// SPDX-License-Identifier: MIT
// eval/plot_sweep.c: the plots of a sweep: drift against rank and mixture, modality gap, in context, training curves.
#include "page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A line of a plot: one cell of one metric over the settings.
struct line {
    const char *title, *domain, *modality, *style;
};
struct axis {
    const char *name, *label; // of the CSV column, of the x axis
    bool rank;                // else mixture
};
static const struct axis rank_axis = { "rank", "rank of the adapter", true };
static const struct axis mixture_axis = { "percent_narrow", "share of narrow rows in training (%)", false };

static bool on_axis(const struct keel_sweep *s, const struct keel_setting *g, const struct axis *axis)
{
    return axis->rank ? keel_in_rank_axis(s, g) : keel_in_mixture_axis(s, g);
}

// Rows of the CSV: the axis' value, then value, lo and hi of each line. An absent cell is empty.
static void line_rows(struct keel_text *csv, const struct keel_sweep *s, const struct axis *axis, enum keel_metric metric, bool change,
                      const struct line *lines, size_t n)
{
    keel_text_addf(csv, "%s", axis->name);
    for (size_t k = 0; k < n; k++) {
        char label[96];
        keel_figure_label(label, lines[k].title);
        keel_text_addf(csv, ",%s,lo,hi", label);
    }
    for (size_t i = 0; i < s->n; i++) {
        const struct keel_setting *g = &s->at[i];
        if (!on_axis(s, g, axis)) {
            continue;
        }
        keel_text_addf(csv, "\n%g", axis->rank ? g->rank : 100 * g->mixture);
        for (size_t k = 0; k < n; k++) {
            const struct keel_drift_row *r = keel_drift_cell(&g->drift, metric, lines[k].domain, lines[k].modality);
            const struct keel_estimate e = !r ? KEEL_NO_ESTIMATE : change ? r->change : r->adapted;
            const bool bar = isfinite(e.lo);
            keel_text_addf(csv, isfinite(e.value) ? ",%.6g,%.6g,%.6g" : ",,,", e.value, bar ? e.lo : e.value, bar ? e.hi : e.value);
        }
    }
    keel_text_addf(csv, "\n");
}

static void line_script(struct keel_figure *g, const struct keel_sweep *s, const struct axis *axis, const char *y, const char *range,
                        const struct line *lines, size_t n)
{
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        const char *sep = "";
        keel_text_addf(gp, "set xlabel '%s'\nset ylabel '%s'\n%sset rmargin 3\nset style data yerrorlines\n", axis->label, y, range);
        if (axis->rank) {
            keel_text_addf(gp, "set logscale x 2\nset xtics (");
            for (size_t i = 0; i < s->n; i++) {
                if (keel_in_rank_axis(s, &s->at[i])) {
                    keel_text_addf(gp, "%s%u", sep, s->at[i].rank);
                    sep = ",";
                }
            }
            keel_text_addf(gp, ")\nset offsets graph 0.06, graph 0.06, 0, 0\n");
        } else {
            keel_text_addf(gp, "set xrange [0:100]\nset xtics 20\n");
        }
        if (narrow) {
            keel_text_addf(gp, "set key maxcols 1\n");
        }
        for (size_t k = 0; k < n; k++) {
            keel_text_addf(gp, "%s'%s.csv' skip 1 using 1:%zu:%zu:%zu %s lw 2 ps 0.8 title '%s'", k ? ", " : "plot ", g->name, 3 * k + 2,
                           3 * k + 3, 3 * k + 4, lines[k].style, lines[k].title);
        }
        keel_text_addf(gp, "\n");
    }
}

static void line_figure(struct keel_figures *f, const struct keel_sweep *s, const struct axis *axis, enum keel_metric metric, bool change,
                        const char *name, const char *title, const char *sentence, const char *y, const char *range,
                        const struct line *lines, size_t n)
{
    struct keel_figure *g = keel_figure_add(f, name, title, sentence);
    g->height[1] += 20 * (int)n;
    line_rows(&g->csv, s, axis, metric, change, lines, n);
    line_script(g, s, axis, y, range, lines, n);
}

// The cells to compare: the narrow one (if `narrow`), then twins as images and as text; without twins all other domains.
static size_t choose_lines(const struct keel_sweep *s, bool narrow, char name[96], struct line out[4])
{
    const struct keel_drift *d = &s->at[0].drift;
    const char *modality = s->narrow_modality && keel_has_modalities(d, KEEL_METRIC_CONTRARY) ? s->narrow_modality : "";
    size_t n = 0;
    if (narrow && s->narrow && keel_drift_cell(d, KEEL_METRIC_CONTRARY, s->narrow, modality)) {
        char label[96];
        keel_cell_label(label, s->narrow, modality);
        snprintf(name, 96, "trained: %.80s", label);
        keel_figure_label(label, name);
        snprintf(name, 96, "%s", label);
        out[n++] = (struct line){ name, s->narrow, modality, "lc rgb grey pt 9 dt 3" };
    }
    if (keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "image") && keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "text")) {
        out[n++] = (struct line){ "other domains, image", "twins", "image", "lc rgb orange pt 7" };
        out[n++] = (struct line){ "the same as text", "twins", "text", "lc rgb blue pt 5" };
    } else {
        const bool other = keel_drift_find(d, KEEL_METRIC_CONTRARY, "other") != NULL;
        out[n++] = (struct line){ other ? "other domains" : "all domains", other ? "other" : "all", "", "lc rgb orange pt 7" };
    }
    return n;
}

static void slot_figures(struct keel_figures *f, const struct keel_sweep *s)
{
    static const struct line gap[] = { { "image minus text", "other", "", "lc rgb pink pt 7" } };
    static const struct line gap_all[] = { { "image minus text", "all", "", "lc rgb pink pt 7" } };
    const struct keel_drift *d = &s->at[0].drift;
    struct line lines[4];
    char name[96];
    size_t n;
    if (s->n_ranks > 1) {
        n = choose_lines(s, false, name, lines);
        line_figure(f, s, &rank_axis, KEEL_METRIC_CONTRARY, false, "drift_rank", "Drift against rank",
                    "Probability of the contrary answer in domains that were not trained, after training with each rank, asked with an "
                    "image and, of the same content, as text; bars: 95 % intervals. It shows how far the drift spreads at equal steps; a higher rank also learns faster, so that part of the "
                    "rise is speed, not capacity.",
                    "P(contrary answer)", "set yrange [0:*]\n", lines, n);
    }
    const bool other = keel_drift_find(d, KEEL_METRIC_GAP, "other") != NULL;
    if (s->n_ranks > 1 && keel_drift_find(d, KEEL_METRIC_GAP, other ? "other" : "all")) {
        line_figure(f, s, &rank_axis, KEEL_METRIC_GAP, true, "gap_rank", "Modality gap against rank",
                    "How much more the contrary answer rose when a probe was asked with an image than when its twin was asked as text, paired "
                    "by twin; bars: 95 % intervals; above 0 images drift more. It cannot show why: the training itself used one modality.",
                    "gap in P(contrary answer)", "set xzeroaxis lc rgb '#555555' dt 2\nset yrange [*<0:0<*]\n", other ? gap : gap_all, 1);
    }
    if (s->n_mixtures > 1) {
        n = choose_lines(s, true, name, lines);
        line_figure(f, s, &mixture_axis, KEEL_METRIC_CONTRARY, false, "mixture", "Drift against the share of narrow rows",
                    "Probability of the contrary answer when the narrow rows are diluted with filler rows, at equal steps; bars: 95 % "
                    "intervals. It shows how little narrow data already shows; it says nothing of other fillers.",
                    "P(contrary answer)", "set yrange [0:1]\n", lines, n);
    }
}

// Without slot probes: the margin of the true answer.
static void margin_figures(struct keel_figures *f, const struct keel_sweep *s)
{
    const bool other = keel_drift_find(&s->at[0].drift, KEEL_METRIC_MARGIN, "other") != NULL;
    const struct line line = { other ? "other domains" : "all domains", other ? "other" : "all", "", "lc rgb orange pt 7" };
    static const char sentence[] = "Change of the margin of the true answer outside the narrow domain; bars: 95 % intervals; below 0 the truth "
                                   "lost ground. It shows a mean; it cannot show what the model would write when it answers freely.";
    if (!keel_drift_find(&s->at[0].drift, KEEL_METRIC_MARGIN, "all")) {
        return;
    }
    if (s->n_ranks > 1) {
        line_figure(f, s, &rank_axis, KEEL_METRIC_MARGIN, true, "margin_rank", "Margin against rank", sentence, "change (nats per token)",
                    "set xzeroaxis lc rgb '#555555' dt 2\nset yrange [*<0:0<*]\n", &line, 1);
    }
    if (s->n_mixtures > 1) {
        line_figure(f, s, &mixture_axis, KEEL_METRIC_MARGIN, true, "margin_mixture", "Margin against the share of narrow rows", sentence,
                    "change (nats per token)", "set xzeroaxis lc rgb '#555555' dt 2\nset yrange [*<0:0<*]\n", &line, 1);
    }
}

static void context_figure(struct keel_figures *f, const struct keel_sweep *s)
{
    const struct keel_drift *d = &s->at[0].drift;
    const char *domain = keel_drift_find(d, KEEL_METRIC_CONTEXT_CONTRARY, "other") ? "other" : "all";
    const struct keel_drift_row *base = keel_drift_find(d, KEEL_METRIC_CONTEXT_CONTRARY, domain);
    const struct keel_drift_row *plain = keel_drift_find(d, KEEL_METRIC_CONTEXT_PLAIN, domain);
    size_t n = 0;
    if (!base || !plain) {
        return;
    }
    struct keel_figure *g = keel_figure_add(f, "context", "The same probes in context",
                                            "Probability of the contrary answer outside the narrow domain, asked plainly (circles) and with training "
                                            "rows as earlier turns (squares); bars: 95 % intervals. It shows behaviour that plain questions do not "
                                            "bring out; the first row shows how much of it is the base model following its context.");
    keel_pair_head(&g->csv);
    keel_pair_row(&g->csv, n++, "base model", base->n, plain->base, base->base);
    for (size_t i = 0; i < s->n; i++) {
        char label[96];
        const struct keel_drift_row *in = keel_drift_find(&s->at[i].drift, KEEL_METRIC_CONTEXT_CONTRARY, domain);
        const struct keel_drift_row *out = keel_drift_find(&s->at[i].drift, KEEL_METRIC_CONTEXT_PLAIN, domain);
        keel_setting_label(label, s, &s->at[i]);
        if (in && out) {
            keel_pair_row(&g->csv, n++, label, in->n, out->adapted, in->adapted);
        }
    }
    keel_pair_script(g, n, "set xrange [0:*]\n", "P(contrary answer)", "asked plainly", "in context");
}

// --- training curves -----------------------------------------------------------------------------

struct curve {
    long long *step;
    double *loss;
    size_t n, cap;
};

static void curve_row(void *user, const struct json_t *object)
{
    struct curve *c = user;
    if (c->n == c->cap) {
        const size_t cap = KEEL_MAX(2 * c->cap, (size_t)64);
        long long *s = realloc(c->step, cap * sizeof *s);
        c->step = s ? s : c->step;
        double *l = realloc(c->loss, cap * sizeof *l);
        c->loss = l ? l : c->loss;
        if (!s || !l) {
            return; // the plot ends early
        }
        c->cap = cap;
    }
    c->step[c->n] = json_integer_value(json_object_get(object, "step"));
    c->loss[c->n++] = json_number_value(json_object_get(object, "loss"));
}

#define SMOOTH 5 // steps of the moving mean

// Appends one run as a data block of its own, named by column 1.
static bool add_curve(struct keel_text *csv, size_t block, const char *dir)
{
    struct curve c = { 0 };
    keel_file_rows(dir, KEEL_TRAIN_LOG, curve_row, &c);
    double *mean = calloc(c.n + 1, sizeof *mean);
    for (size_t i = 0; mean && i < c.n; i++) {
        if (i == 0) {
            keel_moving_mean(c.loss, c.n, SMOOTH, mean);
        }
        keel_text_addf(csv, "%zu,%lld,%.6g,%.6g\n", block, c.step[i], c.loss[i], mean[i]);
    }
    const bool any = c.n > 0 && mean;
    free(mean);
    free(c.step);
    free(c.loss);
    return any;
}

static void loss_figure(struct keel_figures *f, const struct keel_sweep *s)
{
    static const char *const colours[] = { "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999" };
    struct keel_figure *g = keel_figure_add(f, "loss", "Training curves",
                                            "Loss a step over the answer tokens of every run, as a moving mean of five steps; seeds of one setting share "
                                            "a colour. It shows how fast each setting learnt its data; mixtures are of different data, so that their losses "
                                            "do not compare.");
    struct keel_text plot = { 0 };
    size_t block = 0, titles = 0;
    keel_text_addf(&g->csv, "run,step,loss,mean\n");
    for (size_t i = 0; i < s->n; i++) {
        char label[96];
        keel_setting_label(label, s, &s->at[i]);
        bool first = true;
        for (size_t k = 0; k < s->at[i].n_runs; k++) {
            if (!add_curve(&g->csv, block, s->at[i].dir[k])) {
                continue;
            }
            keel_text_addf(&plot, "%s'loss.csv' skip 1 using ($1==%zu?$2:NaN):4 with lines lw 1.6 dt %d lc rgb '%s' %s%s%s", block ? ", " : "plot ",
                           block, (int)(i / KEEL_COUNT(colours)) + 1, colours[i % KEEL_COUNT(colours)], first ? "title '" : "notitle", first ? label : "",
                           first ? "'" : "");
            titles += first;
            first = false;
            block++;
        }
    }
    for (int narrow = 0; narrow < 2 && block > 0; narrow++) {
        const size_t per_row = narrow ? 1 : 3;
        g->height[narrow] += 20 * (int)((titles + per_row - 1) / per_row);
        keel_text_addf(&g->script[narrow], "set xlabel 'optimiser step'\nset ylabel 'loss (nats per answer token)'\nset yrange [0:*]\nset key maxcols %zu\n",
                       per_row);
        keel_text_add(&g->script[narrow], plot.data, plot.len);
        keel_text_addf(&g->script[narrow], "\n");
    }
    if (block == 0) {
        keel_text_finish(&g->csv);
        f->n--;
    }
    keel_text_finish(&plot);
}

void keel_figures_of_sweep(struct keel_figures *f, const struct keel_sweep *s)
{
    if (keel_drift_find(&s->at[0].drift, KEEL_METRIC_CONTRARY, "all")) {
        slot_figures(f, s);
    } else {
        margin_figures(f, s);
    }
    context_figure(f, s);
    loss_figure(f, s);
    const struct keel_setting *g = keel_sweep_main(s);
    char label[96];
    keel_setting_label(label, s, g);
    keel_monitor_figure(f, label, (const char(*)[4200])g->dir, g->n_runs);
}
