// SPDX-License-Identifier: MIT
// eval/report_sweep.c: the page of a sweep: what changes with rank and mixture, pooled over seeds.
#include "page.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define add keel_page_add

// The cell whose drift the page is about: twins asked with an image, else everything outside the narrow domain.
struct cell {
    enum keel_metric metric;
    const char *domain, *modality;
};

static struct cell main_cell(const struct keel_drift *d)
{
    if (keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "image")) {
        return (struct cell){ KEEL_METRIC_CONTRARY, "twins", "image" };
    }
    const enum keel_metric m = keel_drift_find(d, KEEL_METRIC_CONTRARY, "all") ? KEEL_METRIC_CONTRARY
                               : keel_drift_find(d, KEEL_METRIC_MARGIN, "all") ? KEEL_METRIC_MARGIN
                                                                               : KEEL_METRIC_KL;
    return (struct cell){ m, keel_drift_find(d, m, "other") ? "other" : "all", "" };
}

static const struct keel_drift_row *at(const struct keel_setting *g, struct cell c)
{
    return keel_drift_cell(&g->drift, c.metric, c.domain, c.modality);
}

// The cell that was trained; of no row where the study names no narrow domain.
static struct cell trained_cell(const struct keel_sweep *s)
{
    const bool modal = keel_has_modalities(&s->at[0].drift, KEEL_METRIC_CONTRARY);
    return (struct cell){ KEEL_METRIC_CONTRARY, s->narrow ? s->narrow : "", modal && s->narrow_modality ? s->narrow_modality : "" };
}

// What the main setting showed, and the smallest rank beside it.
static void headline(struct keel_text *t, const json_t *m, const struct keel_sweep *s)
{
    const struct keel_setting *g = keel_sweep_main(s), *least_at = NULL;
    const struct cell c = main_cell(&g->drift);
    const struct keel_drift_row *r = at(g, c), *least = NULL, *trained = at(g, trained_cell(s));
    char label[96];
    keel_page_question(t, m);
    keel_setting_label(label, s, g);
    for (size_t i = 0; i < s->n && !least; i++) { // sorted: the smallest rank comes first
        least_at = &s->at[i];
        least = keel_in_rank_axis(s, least_at) ? at(least_at, c) : NULL;
    }
    if (!r) {
        return;
    }
    add(t, "<p>");
    if (c.metric == KEEL_METRIC_CONTRARY) {
        keel_text_addf(t, "At %s, outside what was trained, the contrary answer has a probability of <b>%.3f</b>%s; before the training it had "
                          "%.3f",
                       label, r->adapted.value, c.modality[0] ? " when asked with an image" : "", r->base.value);
        keel_page_interval(t, r->change, "change ");
        add(t, ". ");
        if (trained) {
            keel_text_addf(t, "Where it was trained it has %.3f. ", trained->adapted.value);
        }
        keel_page_gap(t, &g->drift);
    } else {
        keel_text_addf(t, "At %s the %s outside the narrow domain is <b>%.2f</b>", label,
                       c.metric == KEEL_METRIC_MARGIN ? "margin of the true answer" : "divergence from the base", r->adapted.value);
        keel_page_interval(t, r->change, "change ");
        add(t, ". ");
    }
    if (least && least_at != g && s->n_ranks > 1) {
        keel_text_addf(t, "At rank %u it is %.3f. ", least_at->rank, least->adapted.value);
    }
    add(t, "</p>");
}

// Spearman's correlation of rank and drift over all runs of the rank axis.
static void monotone(struct keel_text *t, const struct keel_sweep *s)
{
    double x[256], y[256], rho, p;
    size_t n = 0;
    const struct cell c = main_cell(&s->at[0].drift);
    for (size_t i = 0; i < s->n; i++) {
        const struct keel_drift_row *r = at(&s->at[i], c);
        for (size_t k = 0; r && keel_in_rank_axis(s, &s->at[i]) && k < r->n_runs && n < KEEL_COUNT(x); k++) {
            x[n] = s->at[i].rank;
            y[n++] = c.metric == KEEL_METRIC_MARGIN ? -r->run[k] : r->run[k];
        }
    }
    if (s->n_ranks < 3 || keel_spearman(x, y, n, KEEL_BOOTSTRAP_DRAWS, s->seed, &rho, &p) != KEEL_OK || !isfinite(rho)) {
        return;
    }
    keel_text_addf(t, "<p class=note>Does drift rise with rank? Spearman's ρ over %zu runs is %.2f; one-sided permutation p = %.3f%s.</p>", n,
                   rho, p, n < 5 ? " (with so few runs it cannot be small)" : "");
}

// Rows: cells of the finest kind; columns: settings.
static void cell_table(struct keel_text *t, const struct keel_sweep *s, enum keel_metric metric, const char *title, bool change)
{
    const struct keel_drift *d = &s->at[0].drift;
    const struct keel_drift_row *any = keel_drift_find(d, metric, "all");
    if (!any) {
        return;
    }
    keel_text_addf(t, "<h2>%s <span class=u>%s</span></h2><div class=scroll><table class=s><tr><th>asked about</th>", title, keel_metric_unit[metric]);
    if (!change && isfinite(any->base.value)) {
        add(t, "<th>base</th>");
    }
    for (size_t i = 0; i < s->n; i++) {
        char label[96];
        keel_setting_label(label, s, &s->at[i]);
        keel_text_addf(t, "<th>%s</th>", label);
    }
    add(t, "</tr>");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric != metric || r->position != 0 || !(keel_is_cell(d, r) || r == any)) {
            continue;
        }
        add(t, "<tr><td>");
        keel_page_domain(t, r->domain, r->modality);
        add(t, "</td>");
        if (!change && isfinite(any->base.value)) {
            keel_page_cell(t, "base", r->base, false);
        }
        for (size_t k = 0; k < s->n; k++) {
            const struct keel_drift_row *v = keel_drift_cell(&s->at[k].drift, metric, r->domain, r->modality);
            char label[96];
            keel_setting_label(label, s, &s->at[k]);
            keel_page_cell(t, label, !v ? KEEL_NO_ESTIMATE : change ? v->change : v->adapted, change);
        }
        add(t, "</tr>");
    }
    add(t, "</table></div>");
}

// One line a setting: how well the task was learnt and what it cost elsewhere.
static void setting_table(struct keel_text *t, const struct keel_sweep *s)
{
    const struct keel_drift *d = &s->at[0].drift;
    const bool twins = keel_drift_cell(d, KEEL_METRIC_CONTRARY, "twins", "image") != NULL;
    const char *other = keel_drift_find(d, KEEL_METRIC_CONTRARY, "other") ? "other" : "all";
    const char *margin = keel_drift_find(d, KEEL_METRIC_MARGIN, "other") ? "other" : "all";
    const struct {
        const char *head;
        struct cell cell;
        bool change;
    } all[] = {
        { "narrow loss", { KEEL_METRIC_NARROW_LOSS, "all", "" }, false },
        { "contrary: trained", trained_cell(s), false },
        { "other, image", { KEEL_METRIC_CONTRARY, twins ? "twins" : "", "image" }, false },
        { "other, as text", { KEEL_METRIC_CONTRARY, twins ? "twins" : "", "text" }, false },
        { "contrary: other", { KEEL_METRIC_CONTRARY, twins ? "" : other, "" }, false },
        { "gap, change", { KEEL_METRIC_GAP, keel_drift_find(d, KEEL_METRIC_GAP, "other") ? "other" : "all", "" }, true },
        { "coherent", { KEEL_METRIC_COHERENCE, other, "" }, false },
        { "margin, change", { KEEL_METRIC_MARGIN, margin, "" }, true },
        { "KL to base", { KEEL_METRIC_KL, "all", "" }, false },
    };
    add(t, "<h2>Summary</h2><div class=scroll><table class=s><tr><th>setting</th>");
    for (size_t k = 0; k < KEEL_COUNT(all); k++) {
        if (at(&s->at[0], all[k].cell)) {
            keel_text_addf(t, "<th>%s</th>", all[k].head);
        }
    }
    add(t, "</tr>");
    for (size_t i = 0; i < s->n; i++) {
        char label[96];
        keel_setting_label(label, s, &s->at[i]);
        keel_text_addf(t, "<tr><td>%s</td>", label);
        for (size_t k = 0; k < KEEL_COUNT(all); k++) {
            const struct keel_drift_row *r = at(&s->at[i], all[k].cell);
            if (at(&s->at[0], all[k].cell)) {
                keel_page_cell(t, all[k].head, !r ? KEEL_NO_ESTIMATE : all[k].change ? r->change : r->adapted, all[k].change);
            }
        }
        add(t, "</tr>");
    }
    keel_text_addf(t, "</table></div><p class=note>Small figures: 95 %% intervals by bootstrap over prompts (10,000 draws)%s.",
                   s->n_seeds > 1 ? " and over training seeds" : "; one training seed, whose chance they do not hold");
    if (keel_drift_find(d, KEEL_METRIC_NARROW_LOSS, "all")) {
        add(t, " Narrow loss: of held-out rows of the task, nats a token.");
    }
    if (keel_drift_find(d, KEEL_METRIC_CONTRARY, "all")) {
        add(t, " Contrary: mean probability of the contrary answer at the answer slot, in the trained cell and in other domains; gap: that with an "
               "image minus that as text; coherent: aligned or contrary.");
    }
    add(t, "</p>");
    if (s->n_missing) {
        keel_text_addf(t, "<p class=over>%zu runs of the sweep are not finished; the same keel study command goes on with them.</p>", s->n_missing);
    }
}

// Every seed by itself, and Student's interval over their means.
static void seed_table(struct keel_text *t, const struct keel_sweep *s)
{
    const struct cell c = main_cell(&s->at[0].drift);
    if (s->n_seeds < 2) {
        return;
    }
    add(t, "<details><summary>Seed by seed</summary><div class=scroll><table><tr><th>setting</th><th>each seed</th><th>mean, t interval</th></tr>");
    for (size_t i = 0; i < s->n; i++) {
        const struct keel_drift_row *r = at(&s->at[i], c);
        char label[96];
        if (!r) {
            continue;
        }
        keel_setting_label(label, s, &s->at[i]);
        keel_text_addf(t, "<tr><td>%s</td><td>", label);
        for (size_t k = 0; k < r->n_runs; k++) {
            keel_text_addf(t, "%s%lld: %.3f", k ? "<br>" : "", s->at[i].seed[k], r->run[k]);
        }
        add(t, "</td>");
        keel_page_cell(t, "mean", keel_t_interval(r->run, r->n_runs), false);
        add(t, "</tr>");
    }
    keel_text_addf(t, "</table></div><p class=note>%s, ", keel_metric_label(c.metric));
    keel_page_domain(t, c.domain, c.modality);
    add(t, ". The t interval takes the seeds' means as independent draws and knows nothing of prompts.</p></details>");
}

static void guard_section(struct keel_text *t, const struct keel_sweep *s)
{
    struct keel_text items = { 0 };
    for (size_t i = 0; i < s->n; i++) {
        for (size_t k = 0; k < s->at[i].n_runs; k++) {
            char setting[96], label[128];
            keel_setting_label(setting, s, &s->at[i]);
            snprintf(label, sizeof label, s->n_seeds > 1 ? "%s, seed %lld" : "%s", setting, s->at[i].seed[k]);
            keel_guard_item(&items, label, s->at[i].dir[k]);
        }
    }
    keel_page_guards(t, &items);
}

void keel_sweep_page(struct keel_text *t, const char *dir, const json_t *m, const struct keel_sweep *s, const struct keel_figures *f,
                     bool *over)
{
    const char *name = keel_manifest_text(m, NULL, "name");
    const struct keel_setting *g = keel_sweep_main(s);
    char label[96];
    keel_page_open(t, name[0] ? name : dir);
    headline(t, m, s);
    setting_table(t, s);
    monotone(t, s);
    *over = keel_page_budget(t, m, &g->drift);
    guard_section(t, s);
    keel_page_figures(t, f);
    keel_setting_label(label, s, g);
    keel_page_answers(t, s->base, g->dir[0], "examples.jsonl", "Probes before and after", label, KEEL_EXAMPLES_NOTE);
    keel_page_answers(t, s->base, g->dir[0], "answers.jsonl", "Answers before and after", label,
                      "Greedy continuations of the first prompts of the KL set.");
    cell_table(t, s, KEEL_METRIC_CONTRARY, "Contrary answer by domain and modality", false);
    cell_table(t, s, KEEL_METRIC_MARGIN, "Margin by domain", false);
    seed_table(t, s);
    keel_text_addf(t, "<h2>All numbers of %s</h2>", label);
    keel_page_metrics(t, &g->drift);
    keel_page_provenance(t, m);
    keel_page_close(t, "Records of the base: base/; of each run: runs/*/tuned/ (keel report runs/NAME writes its page); all estimates: summary.csv "
                       "(pooled), runs.csv; data and scripts of the plots: plots/.");
}
