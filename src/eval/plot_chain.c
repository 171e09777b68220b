// SPDX-License-Identifier: MIT
// eval/plot_chain.c: the plots of a chain: drift by stage, the course of cycles, steps to a threshold, drift against the narrow
// task and against coherence, scans of a scale or a coefficient, settings by stage.
#include "page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One number of a stage: a cell of a metric.
struct cell {
    enum keel_metric metric;
    const char *domain, *modality;
};

static const struct keel_drift *first_drift(const struct keel_chain *c)
{
    return &keel_chain_first(c)->drift;
}

static const struct keel_drift_row *at(const struct keel_drift *d, struct cell c)
{
    return keel_drift_cell(d, c.metric, c.domain, c.modality);
}

static struct cell elsewhere(const struct keel_drift *d, enum keel_metric metric)
{
    return (struct cell){ metric, keel_drift_find(d, metric, "other") ? "other" : "all", "" };
}

// The cell that was trained; without a row where the study names no narrow domain.
static struct cell trained(const struct keel_chain *c, const struct keel_drift *d, enum keel_metric metric)
{
    const bool modal = keel_has_modalities(d, metric);
    return (struct cell){ metric, c->narrow ? c->narrow : "", modal && c->narrow_modality ? c->narrow_modality : "" };
}

// --- by stage ------------------------------------------------------------------------------------

// A dot plot with a row for the base model and one for each stage: two cells, of which a stage needs both.
static void pair_figure(struct keel_figures *f, const struct keel_chain *c, const char *name, const char *title,
                        const char *sentence, struct cell a, struct cell b, const char *range, const char *axis, const char *first,
                        const char *second)
{
    const struct keel_drift *d = first_drift(c);
    const struct keel_drift_row *x = at(d, a), *y = at(d, b);
    size_t n = 0;
    if (!x || !y) {
        return;
    }
    struct keel_figure *g = keel_figure_add(f, name, title, sentence);
    keel_pair_head(&g->csv);
    if (isfinite(x->base.value) && isfinite(y->base.value)) {
        keel_pair_row(&g->csv, n++, "base", x->n, x->base, y->base);
    }
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_setting *s = keel_chain_setting(c, &c->at[i]);
        x = s ? at(&s->drift, a) : NULL;
        y = s ? at(&s->drift, b) : NULL;
        if (x && y) {
            char label[96];
            keel_figure_label(label, c->at[i].name);
            keel_pair_row(&g->csv, n++, label, x->n, x->adapted, y->adapted);
        }
    }
    keel_pair_script(g, n, range, axis, first, second);
}

static void stage_figures(struct keel_figures *f, const struct keel_chain *c)
{
    const struct keel_drift *d = first_drift(c);
    const char *other = elsewhere(d, KEEL_METRIC_CONTRARY).domain;
    const struct cell plain = elsewhere(d, KEEL_METRIC_CONTEXT_PLAIN), context = { KEEL_METRIC_CONTEXT_CONTRARY, plain.domain, "" };
    const struct cell narrow = trained(c, d, KEEL_METRIC_CONTEXT_PLAIN);
    pair_figure(f, c, "stages_context", "Drift by stage, asked plainly and in context",
                "Probability of the contrary answer outside the trained domain after each stage, asked plainly (circles) and "
                "with training rows as earlier turns (squares), with 95 % intervals; what a repair leaves in context is its "
                "residue. It shows these probes and this context; it cannot show that a fallen value is a removed behaviour.",
                plain, context, "set xrange [0:*]\n", "P(contrary answer), other domains", "asked plainly", "in context");
    pair_figure(f, c, "stages_narrow", "The trained cell by stage",
                "The same for what was trained: how much of the narrow task a stage teaches, keeps or takes away. Few probes are "
                "asked in context, hence the wide intervals; it says nothing of other domains.",
                narrow, (struct cell){ KEEL_METRIC_CONTEXT_CONTRARY, narrow.domain, narrow.modality }, "set xrange [0:1]\n",
                "P(contrary answer), trained cell", "asked plainly", "in context");
    pair_figure(f, c, "stages_modality", "Drift by stage and modality",
                "Probability of the contrary answer outside the trained domain, asked with an image (circles) and, of the same "
                "content, as text (squares), with 95 % intervals. It shows in which modality drift stays; it cannot show why.",
                (struct cell){ KEEL_METRIC_CONTRARY, "twins", "image" }, (struct cell){ KEEL_METRIC_CONTRARY, "twins", "text" },
                "set xrange [0:*]\n", "P(contrary answer), twins", "image", "text");
    if (!keel_drift_find(d, KEEL_METRIC_CONTRARY, other)) {
        pair_figure(f, c, "stages_margin", "Margin by stage",
                    "Mean margin of the true answer in the narrow domain (circles) and elsewhere (squares), with 95 % intervals. "
                    "It shows a mean; it cannot show what the model would write when it answers freely.",
                    trained(c, d, KEEL_METRIC_MARGIN), elsewhere(d, KEEL_METRIC_MARGIN), "", "margin (nats per token)",
                    "narrow domain", "elsewhere");
    }
}

// Along the trainings that lead to the last one: the projection, with the base model at the left.
static void projection_figure(struct keel_figures *f, const struct keel_chain *c)
{
    const struct keel_stage **path = calloc(c->n + 1, sizeof *path);
    const struct keel_drift *d = first_drift(c);
    const struct cell cell = elsewhere(d, KEEL_METRIC_PROJECTION);
    struct keel_text tics = { 0 };
    size_t x = 0;
    if (!path || !at(d, cell)) {
        free((void *)path);
        return;
    }
    struct keel_figure *g = keel_figure_add(
        f, "projection", "Projection on the direction, stage by stage",
        "Mean projection of the activations of other domains' prompts on the study's direction, after each training of the "
        "chain; bars: 95 % intervals; the unit is the direction's length. It shows whether training moves the model to and fro "
        "along this direction; it cannot show that the direction is the cause.");
    keel_text_addf(&g->csv, "stage,projection,lo,hi\n0,%.6g,%.6g,%.6g\n", at(d, cell)->base.value, at(d, cell)->base.lo,
                   at(d, cell)->base.hi);
    keel_text_addf(&tics, "'base' 0");
    const size_t n = keel_chain_path(c, path);
    for (size_t i = 0; i < n; i++) {
        const struct keel_setting *s = keel_chain_setting(c, path[i]);
        const struct keel_drift_row *r = s ? at(&s->drift, cell) : NULL;
        if (r) {
            keel_text_addf(&g->csv, "%zu,%.6g,%.6g,%.6g\n", ++x, r->adapted.value, r->adapted.lo, r->adapted.hi);
            keel_text_addf(&tics, ",'%s' %zu", path[i]->name, x);
        }
    }
    for (int narrow = 0; narrow < 2; narrow++) {
        g->height[narrow] += 40;
        keel_text_addf(
            &g->script[narrow],
            "set xtics (%s) rotate by -%d\nset xrange [-0.3:%zu.3]\nset ylabel 'projection (lengths)'\nset rmargin 5\nset "
            "bmargin 6\n"
            "plot 'projection.csv' skip 1 using 1:2:3:4 with yerrorlines lc rgb pink lw 2 pt 7 ps 0.7 title 'other domains'\n",
            tics.data, narrow ? 50 : 30, x);
    }
    keel_text_finish(&tics);
    free((void *)path);
}

// --- cycles --------------------------------------------------------------------------------------

// Rows of one watched training, shifted to where its run had come.
struct course {
    struct keel_text *csv;
    const char *stage, *field;
    long long seed;
    double offset, last;
    unsigned colour;
    bool any;
};

static void course_row(void *user, const struct json_t *object)
{
    struct course *c = user;
    const json_t *v = json_object_get(object, c->field);
    c->last = c->offset + json_number_value(json_object_get(object, "step"));
    if (json_is_number(v)) {
        keel_text_addf(c->csv, "%s,%lld,%.0f,%.6g,%u\n", c->stage, c->seed, c->last, json_number_value(v), c->colour);
        c->any = true;
    }
}

static unsigned colour_of(const struct keel_stage *s)
{
    return !isnan(s->above) ? 0xD55E00u : !isnan(s->below) ? 0x0072B2u : 0x555555u;
}

// The course of `field` over all optimiser steps of the chain, run by run; false if nothing was watched.
static bool course_csv(struct keel_text *csv, const struct keel_chain *c, const char *field)
{
    const struct keel_stage **path = calloc(c->n + 1, sizeof *path);
    const size_t n = path ? keel_chain_path(c, path) : 0;
    const struct keel_setting *first = n > 0 ? keel_chain_setting(c, path[0]) : NULL;
    bool any = false;
    keel_text_addf(csv, "stage,seed,step,%s,colour\n", field);
    for (size_t k = 0; first && k < first->n_runs; k++) {
        double offset = 0;
        for (size_t i = 0; i < n; i++) {
            const struct keel_setting *s = keel_chain_setting(c, path[i]);
            if (!s || k >= s->n_runs) {
                break;
            }
            struct course course = { csv, path[i]->name, field, s->seed[k], offset, offset, colour_of(path[i]), false };
            keel_file_rows(s->dir[k], "train/watch.jsonl", course_row, &course);
            offset += keel_stage_cost(s, k).steps;
            keel_text_addf(csv, course.any ? "\n" : ""); // an empty line: the next training is a line of its own
            any = any || course.any;
        }
    }
    free((void *)path);
    return any;
}

static double limit_of(const struct keel_chain *c, bool above)
{
    for (size_t i = 0; i < c->n; i++) {
        const double v = above ? c->at[i].above : c->at[i].below;
        if (!isnan(v)) {
            return v;
        }
    }
    return NAN;
}

static void course_figure(struct keel_figures *f, const struct keel_chain *c, const char *field, const char *name,
                          const char *title, const char *sentence, const char *y, bool limits)
{
    struct keel_text csv = { 0 };
    if (!course_csv(&csv, c, field)) {
        keel_text_finish(&csv);
        return;
    }
    struct keel_figure *g = keel_figure_add(f, name, title, sentence);
    g->csv = csv;
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        keel_text_addf(gp, "set xlabel 'optimiser steps of the chain'\nset ylabel '%s'\nset rmargin 3\n%s", y,
                       limits ? "set yrange [0:*]\n" : "");
        for (int above = 0; above < 2 && limits; above++) {
            const double v = limit_of(c, above);
            if (!isnan(v)) {
                keel_text_addf(gp, "set arrow from graph 0, first %g to graph 1, first %g nohead lc rgb '#555555' dt 2\n", v, v);
            }
        }
        keel_text_addf(
            gp,
            "plot '%s.csv' skip 1 using 3:4:5 with linespoints lc rgb variable lw 1.6 pt 7 ps 0.5 notitle, NaN with linespoints "
            "lc rgb orange lw 2 pt 7 title 'until above', NaN with linespoints lc rgb blue lw 2 pt 7 title 'until below'\n",
            name);
    }
}

// Points of the trainings that end at a limit, in the order of the chain: steps of each run.
static void threshold_figure(struct keel_figures *f, const struct keel_chain *c)
{
    struct keel_text csv = { 0 };
    size_t rows[2] = { 0 };
    keel_text_addf(&csv, "limit,cycle,seed,steps,reached\n");
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_stage *s = &c->at[i];
        const struct keel_setting *g = keel_chain_setting(c, s);
        const bool above = !isnan(s->above);
        if (!g || !s->watched || (!above && isnan(s->below))) {
            continue;
        }
        rows[above]++;
        for (size_t k = 0; k < g->n_runs; k++) {
            const struct keel_stage_cost cost = keel_stage_cost(g, k);
            keel_text_addf(&csv, "%s,%zu,%lld,%.0f,%d\n", above ? "above" : "below", rows[above], g->seed[k], cost.steps,
                           cost.reached);
        }
    }
    if (rows[0] + rows[1] < 2) {
        keel_text_finish(&csv);
        return;
    }
    struct keel_figure *g =
        keel_figure_add(f, "thresholds", "Steps to the threshold, cycle by cycle",
                        "Optimiser steps that each training took until the watched probability passed its limit, a point for "
                        "every seed; hollow: it stopped at its last step without. Falling circles say that drift comes back "
                        "faster; steps are counted in the interval at which was watched, and few cycles make no law.");
    g->csv = csv;
    for (int narrow = 0; narrow < 2; narrow++) {
        g->height[narrow] += narrow ? 40 : 0;
        keel_text_addf(
            &g->script[narrow],
            "set xlabel 'cycle'\nset ylabel 'optimiser steps'\nset yrange [0:*]\nset xrange [0.5:%zu.5]\nset xtics "
            "1\n%sd='thresholds.csv'\n"
            "plot d skip 1 using (strcol(1) eq 'above' && $5==1 ? $2-0.06 : NaN):4 with points lc rgb orange pt 7 ps 1 title "
            "'until above', d skip 1 using (strcol(1) eq 'above' && $5==0 ? $2-0.06 : NaN):4 with points lc rgb orange pt 6 ps 1 "
            "notitle, d skip 1 using (strcol(1) eq 'below' && $5==1 ? $2+0.06 : NaN):4 with points lc rgb blue pt 5 ps 1 title "
            "'until below', d skip 1 using (strcol(1) eq 'below' && $5==0 ? $2+0.06 : NaN):4 with points lc rgb blue pt 4 ps 1 "
            "notitle\n",
            KEEL_MAX(rows[0], rows[1]), narrow ? "set key maxcols 1\n" : "");
    }
}

// --- drift against what it costs -----------------------------------------------------------------

static void pareto_row(struct keel_text *csv, size_t row, const char *name, struct keel_estimate x, struct keel_estimate y)
{
    char label[96];
    const struct keel_estimate e[2] = { x, y };
    keel_figure_label(label, name);
    keel_text_addf(csv, "%zu,%s", row, label);
    for (int k = 0; k < 2; k++) {
        keel_text_addf(csv, ",%.6g,%.6g,%.6g", e[k].value, isfinite(e[k].lo) ? e[k].lo : e[k].value,
                       isfinite(e[k].hi) ? e[k].hi : e[k].value);
    }
    keel_text_addf(csv, "\n");
}

static void pareto_script(struct keel_figure *g, size_t n, const char *const *names, const char *x, const char *y,
                          const char *range)
{
    static const char *const colours[] = { "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777" };
    static const int points[] = { 7, 5, 9, 11, 13 };
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        const size_t columns = narrow ? 2 : 5;
        g->height[narrow] += (narrow ? 40 : 20) + 20 * (int)((n + columns - 1) / columns);
        if (narrow) {
            keel_few_tics(gp, g->name, (const int[2]){ 4, 4 }, (const int[2]){ 5, 5 });
        }
        keel_text_addf(gp, "set xlabel '%s'\nset ylabel '%s'\n%sset rmargin 3\nset key maxcols %zu\n", x, y, range, columns);
        for (size_t i = 0; i < n; i++) {
            char label[96];
            keel_figure_label(label, names[i]);
            keel_text_addf(
                gp,
                "%s'%s.csv' skip 1 using ($1==%zu?$3:NaN):6:4:5:7:8 with xyerrorbars lc rgb '%s' lw 1.6 pt %d ps 0.9 title '%s'",
                i ? ", " : "plot ", g->name, i, colours[i % KEEL_COUNT(colours)],
                points[i / KEEL_COUNT(colours) % KEEL_COUNT(points)], label);
        }
        keel_text_addf(gp, "\n");
    }
}

// Every stage and the base model as a point: cell `x` against the drift elsewhere.
static void pareto_figure(struct keel_figures *f, const struct keel_chain *c, const char *name, const char *title,
                          const char *sentence, struct cell x, struct cell y, const char *x_label, const char *y_label,
                          const char *range)
{
    const struct keel_drift *d = first_drift(c);
    const char **names = calloc(c->n + 1, sizeof *names);
    size_t n = 0;
    if (!names || !at(d, x) || !at(d, y)) {
        free((void *)names);
        return;
    }
    struct keel_figure *g = keel_figure_add(f, name, title, sentence);
    keel_text_addf(&g->csv, "row,stage,x,x_lo,x_hi,drift,drift_lo,drift_hi\n");
    if (isfinite(at(d, x)->base.value) && isfinite(at(d, y)->base.value)) {
        pareto_row(&g->csv, n, "base", at(d, x)->base, at(d, y)->base);
        names[n++] = "base";
    }
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_setting *s = keel_chain_setting(c, &c->at[i]);
        const struct keel_drift_row *p = s ? at(&s->drift, x) : NULL, *q = s ? at(&s->drift, y) : NULL;
        if (p && q) {
            pareto_row(&g->csv, n, c->at[i].name, p->adapted, q->adapted);
            names[n++] = c->at[i].name;
        }
    }
    pareto_script(g, n, names, x_label, y_label, range);
    free((void *)names);
}

static void pareto_figures(struct keel_figures *f, const struct keel_chain *c)
{
    const struct keel_drift *d = first_drift(c);
    const struct cell drift = elsewhere(d, KEEL_METRIC_CONTRARY);
    static const char narrow_sentence[] = "Each stage by what it keeps of the narrow task (right: all of it) and how far it drifts "
                                          "elsewhere (below: not at all), with 95 % intervals; a mitigation is good at the lower "
                                          "right, and none is better than one that lies both right of it and below. It shows "
                                          "these strengths of each; another strength is another point.";
    if (at(d, drift)) {
        pareto_figure(f, c, "pareto_narrow", "Drift against the narrow task", narrow_sentence, trained(c, d, KEEL_METRIC_CONTRARY),
                      drift, "P(contrary answer), trained cell", "P(contrary), other domains",
                      "set xrange [0:1]\nset yrange [0:*]\n");
        pareto_figure(f, c, "pareto_coherence", "Drift against coherence",
                      "Each stage by its coherence outside the trained domain (right: every answer is one of the two) and its "
                      "drift there, with 95 % intervals. It shows whether drift fell because answers broke; it cannot show how "
                      "good longer answers are.",
                      (struct cell){ KEEL_METRIC_COHERENCE, drift.domain, "" }, drift, "coherence, other domains",
                      "P(contrary), other domains", "set xrange [*:1]\nset yrange [0:*]\nset offsets graph 0.03, 0, 0, 0\n");
    } else {
        pareto_figure(f, c, "pareto_narrow", "Drift against the narrow task",
                      "Each stage by its loss on held-out rows of the narrow task (left: learnt) and the change of the margin "
                      "elsewhere (0: none), with 95 % intervals. It shows these strengths of each mitigation; another strength "
                      "is another point.",
                      (struct cell){ KEEL_METRIC_NARROW_LOSS, "all", "" }, elsewhere(d, KEEL_METRIC_MARGIN),
                      "narrow loss (nats per token)", "margin elsewhere", "");
    }
}

// --- scans and settings --------------------------------------------------------------------------

struct scan_point {
    double x;
    const struct keel_drift *drift;
    bool base; // the values of the base model
};

static void scan_row(struct keel_text *csv, const struct scan_point *p, const struct cell *cells, size_t n)
{
    keel_text_addf(csv, "%g", p->x);
    for (size_t k = 0; k < n; k++) {
        const struct keel_drift_row *r = at(p->drift, cells[k]);
        const struct keel_estimate e = !r ? KEEL_NO_ESTIMATE : p->base ? r->base : r->adapted;
        keel_text_addf(csv, isfinite(e.value) ? ",%.6g,%.6g,%.6g" : ",,,", e.value, isfinite(e.lo) ? e.lo : e.value,
                       isfinite(e.hi) ? e.hi : e.value);
    }
    keel_text_addf(csv, "\n");
}

static int by_value(const void *a, const void *b)
{
    const struct scan_point *x = a, *y = b;
    return (x->x > y->x) - (x->x < y->x);
}

// The points of a scan in ascending order, with the states that need no run of their own.
static size_t scan_points(const struct keel_chain *c, const struct keel_stage *first, struct scan_point *out)
{
    const struct keel_stage *from = keel_chain_find(c, first->from);
    const struct keel_setting *whole = from ? keel_chain_setting(c, from) : NULL;
    const bool scale = strcmp(first->kind, "scale") == 0;
    size_t n = 0;
    if (scale || !from) {
        out[n++] = (struct scan_point){ 0, first_drift(c), true };
    }
    if (whole) {
        out[n++] = (struct scan_point){ scale ? 1 : 0, &whole->drift, false };
    }
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_setting *s = keel_chain_setting(c, &c->at[i]);
        if (s && strcmp(c->at[i].group, first->group) == 0) {
            out[n++] = (struct scan_point){ c->at[i].value, &s->drift, false };
        }
    }
    qsort(out, n, sizeof *out, by_value);
    return n;
}

// A scan's values against the trained cell, drift elsewhere and coherence. Scale 1 is the stage it scales and scale 0 the base model;
// coefficient 0 is the stage that is steered.
static void scan_figure(struct keel_figures *f, const struct keel_chain *c, const struct keel_stage *first)
{
    static const char *const titles[] = { "trained cell", "other domains", "coherence, other" };
    static const char *const styles[] = { "lc rgb grey pt 9 dt 3", "lc rgb orange pt 7", "lc rgb green pt 5 dt 2" };
    const struct keel_drift *d = first_drift(c);
    const struct cell cells[3] = { trained(c, d, KEEL_METRIC_CONTRARY), elsewhere(d, KEEL_METRIC_CONTRARY),
                                   elsewhere(d, KEEL_METRIC_COHERENCE) };
    const bool scale = strcmp(first->kind, "scale") == 0;
    struct scan_point *points = calloc(c->n + 2, sizeof *points);
    char name[32];
    if (!points || !at(d, cells[1]) || keel_figures_full(f)) {
        free(points);
        return;
    }
    snprintf(name, sizeof name, "scan_%.24s", first->group);
    struct keel_figure *g = keel_figure_add(
        f, name, scale ? "Scan of the adapter's scale" : "Dose of steering",
        scale
            ? "P(contrary answer) in the trained cell and elsewhere, and coherence, when what training added is scaled (0: the "
              "base model, 1: all of it); bars: 95 % intervals. It shows where drift sets in beside the task; it says nothing of "
              "other ways to weaken an adapter."
            : "P(contrary answer) in the trained cell and elsewhere, and coherence, at each coefficient; bars: 95 % intervals. A "
              "dose is too high where coherence falls. It shows one direction at one place; a random direction of its length is "
              "the control.");
    snprintf(g->of, sizeof g->of, "%.47s", first->group);
    keel_text_addf(&g->csv, "value,narrow,lo,hi,other,lo,hi,coherence,lo,hi\n");
    const size_t n = scan_points(c, first, points);
    for (size_t i = 0; i < n; i++) {
        scan_row(&g->csv, &points[i], cells, 3);
    }
    free(points);
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        g->height[narrow] += narrow ? 60 : 0;
        keel_text_addf(gp,
                       "set xlabel '%s'\nset ylabel 'probability'\nset yrange [0:1.02]\nset rmargin 3\nset offsets graph 0.03, "
                       "graph 0.03, 0, 0\n%s",
                       scale            ? "scale of the adapter"
                       : first->percent ? "coefficient (% of the median norm)"
                                        : "coefficient (lengths of the direction)",
                       narrow ? "set key maxcols 1\n" : "");
        for (size_t k = 0; k < 3; k++) {
            keel_text_addf(gp, "%s'%s.csv' skip 1 using 1:%zu:%zu:%zu with yerrorlines %s lw 2 ps 0.8 title '%s'",
                           k ? ", " : "plot ", g->name, 3 * k + 2, 3 * k + 3, 3 * k + 4, styles[k], titles[k]);
        }
        keel_text_addf(gp, "\n");
    }
}

static void scan_figures(struct keel_figures *f, const struct keel_chain *c)
{
    for (size_t i = 0; i + 1 < c->n; i++) {
        const bool begins = i == 0 || strcmp(c->at[i - 1].group, c->at[i].group) != 0;
        if (begins && !isnan(c->at[i].value) && strcmp(c->at[i + 1].group, c->at[i].group) == 0) {
            scan_figure(f, c, &c->at[i]);
        }
    }
}

// Drift elsewhere over the settings of a sweep, a line for each stage.
static void setting_figure(struct keel_figures *f, const struct keel_chain *c, bool ranks)
{
    static const char *const colours[] = { "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777" };
    const struct keel_sweep *all = &c->at[0].sweep;
    const struct cell cell = elsewhere(
        first_drift(c), keel_drift_find(first_drift(c), KEEL_METRIC_CONTRARY, "all") ? KEEL_METRIC_CONTRARY : KEEL_METRIC_MARGIN);
    if ((ranks ? all->n_ranks : all->n_mixtures) < 2 || c->n > KEEL_COUNT(colours)) {
        return;
    }
    struct keel_figure *g = keel_figure_add(
        f, ranks ? "stages_rank" : "stages_mixture", ranks ? "Stages against rank" : "Stages against the share of narrow rows",
        "Drift outside the trained domain after each stage, in each setting of the sweep; bars: 95 % intervals. It shows whether "
        "a mitigation holds over the settings; all stages of a setting share its training, so that lines move together.");
    keel_text_addf(&g->csv, "%s,stage,value,lo,hi\n", ranks ? "rank" : "percent_narrow");
    for (size_t i = 0; i < c->n; i++) {
        for (size_t k = 0; k < c->at[i].sweep.n; k++) {
            const struct keel_setting *s = &c->at[i].sweep.at[k];
            const struct keel_drift_row *r = at(&s->drift, cell);
            if (r && (ranks ? keel_in_rank_axis(all, s) : keel_in_mixture_axis(all, s))) {
                keel_text_addf(&g->csv, "%g,%zu,%.6g,%.6g,%.6g\n", ranks ? s->rank : 100 * s->mixture, i, r->adapted.value,
                               r->adapted.lo, r->adapted.hi);
            }
        }
        keel_text_addf(&g->csv, "\n");
    }
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        g->height[narrow] += narrow ? 20 * (int)c->n : 20;
        keel_text_addf(gp, "set xlabel '%s'\nset ylabel '%s'\n%sset rmargin 3\nset key maxcols %d\n",
                       ranks ? "rank of the adapter" : "share of narrow rows in training (%)",
                       cell.metric == KEEL_METRIC_CONTRARY ? "P(contrary answer)" : "margin (nats per token)",
                       ranks ? "set logscale x 2\nset offsets graph 0.06, graph 0.06, 0, 0\n" : "set xrange [0:102]\n",
                       narrow ? 1 : 4);
        for (size_t i = 0; i < c->n; i++) {
            keel_text_addf(
                gp, "%s'%s.csv' skip 1 using ($2==%zu?$1:NaN):3:4:5 with yerrorlines lc rgb '%s' lw 2 pt 7 ps 0.7 title '%s'",
                i ? ", " : "plot ", g->name, i, colours[i], c->at[i].name);
        }
        keel_text_addf(gp, "\n");
    }
}

// What monitors measured in the trainings of the page's setting.
static void monitor_figures(struct keel_figures *f, const struct keel_chain *c)
{
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_setting *g = keel_chain_setting(c, &c->at[i]);
        if (g && strcmp(c->at[i].kind, "train") == 0) {
            keel_monitor_figure(f, c->at[i].name, (const char(*)[4200])g->dir, g->n_runs);
        }
    }
}

void keel_figures_of_chain(struct keel_figures *f, const struct keel_chain *c)
{
    stage_figures(f, c);
    course_figure(f, c, "contrary", "course", "Course of the cycles",
                  "The watched probability of the contrary answer over all steps of the chain, a line for each training and "
                  "seed; grey: the limits at which trainings end. It shows how fast drift comes and goes; it is measured on few "
                  "probes, so that single points are noisy.",
                  "P(contrary answer)", true);
    threshold_figure(f, c);
    course_figure(f, c, "projection", "course_projection", "Course of the projection",
                  "The projection of the watched prompts' activations on the study's direction over all steps of the chain. It "
                  "shows whether the saw-tooth of the answers is one of the activations; it cannot show that the direction is "
                  "the cause.",
                  "projection (lengths)", false);
    projection_figure(f, c);
    monitor_figures(f, c);
    pareto_figures(f, c);
    scan_figures(f, c);
    keel_figures_of_maps(f, c);
    setting_figure(f, c, true);
    setting_figure(f, c, false);
}
