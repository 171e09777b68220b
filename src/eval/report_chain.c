// SPDX-License-Identifier: MIT
// eval/report_chain.c: the page of a chain: what each stage did to the trained cell and elsewhere, what it left in context, what
// it cost.
#include "page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define add keel_page_add

// One column of the table of stages.
struct column {
    const char *head;
    enum keel_metric metric;
    const char *domain, *modality;
    bool change;
};

static const char *elsewhere(const struct keel_drift *d, enum keel_metric metric)
{
    return keel_drift_find(d, metric, "other") ? "other" : "all";
}

#define MAX_COLUMNS 12
// Those of which there are numbers.
static size_t choose_columns(const struct keel_chain *c, const struct keel_drift *d, struct column *out)
{
    const bool modal = keel_has_modalities(d, KEEL_METRIC_CONTRARY);
    const char *narrow = c->narrow ? c->narrow : "", *modality = modal && c->narrow_modality ? c->narrow_modality : "";
    const struct column all[MAX_COLUMNS] = {
        { "contrary: trained", KEEL_METRIC_CONTRARY, narrow, modality, false },
        { "other", KEEL_METRIC_CONTRARY, elsewhere(d, KEEL_METRIC_CONTRARY), "", false },
        { "other, in context", KEEL_METRIC_CONTEXT_CONTRARY, elsewhere(d, KEEL_METRIC_CONTEXT_CONTRARY), "", false },
        { "the same, plain", KEEL_METRIC_CONTEXT_PLAIN, elsewhere(d, KEEL_METRIC_CONTEXT_PLAIN), "", false },
        { "gap, change", KEEL_METRIC_GAP, elsewhere(d, KEEL_METRIC_GAP), "", true },
        { "coherent", KEEL_METRIC_COHERENCE, elsewhere(d, KEEL_METRIC_COHERENCE), "", false },
        { "projection, change", KEEL_METRIC_PROJECTION, elsewhere(d, KEEL_METRIC_PROJECTION), "", true },
        { "narrow loss", KEEL_METRIC_NARROW_LOSS, "all", "", false },
        { "margin, change", KEEL_METRIC_MARGIN, elsewhere(d, KEEL_METRIC_MARGIN), "", true },
        { "KL to base", KEEL_METRIC_KL, "all", "", false },
    };
    size_t n = 0;
    for (size_t i = 0; i < MAX_COLUMNS; i++) {
        if (all[i].head && keel_drift_cell(d, all[i].metric, all[i].domain, all[i].modality)) {
            out[n++] = all[i];
        }
    }
    return n;
}

static void base_row(struct keel_text *t, const struct keel_drift *d, const struct column *columns, size_t n)
{
    add(t, "<tr><td>base</td>");
    for (size_t k = 0; k < n; k++) {
        const struct keel_drift_row *r = keel_drift_cell(d, columns[k].metric, columns[k].domain, columns[k].modality);
        keel_page_cell(t, columns[k].head, columns[k].change ? KEEL_NO_ESTIMATE : r->base, false);
    }
    add(t, "</tr>");
}

static void stage_row(struct keel_text *t, const struct keel_chain *c, const struct keel_stage *s, const struct column *columns,
                      size_t n)
{
    const struct keel_setting *g = keel_chain_setting(c, s);
    add(t, "<tr><td>");
    keel_html_escape(t, s->name);
    add(t, "<br><span class=u>");
    keel_html_escape(t, s->kind);
    add(t, " from ");
    keel_html_escape(t, s->from);
    add(t, "</span></td>");
    for (size_t k = 0; k < n; k++) {
        const struct keel_drift_row *r =
            g ? keel_drift_cell(&g->drift, columns[k].metric, columns[k].domain, columns[k].modality) : NULL;
        keel_page_cell(t, columns[k].head, !r ? KEEL_NO_ESTIMATE : columns[k].change ? r->change : r->adapted, columns[k].change);
    }
    add(t, "</tr>");
}

static void setting_text(struct keel_text *t, const struct keel_chain *c)
{
    const struct keel_setting *g = keel_chain_first(c);
    keel_text_addf(t, "rank %u", c->rank);
    if (c->mixture < 1) {
        keel_text_addf(t, ", %g %% narrow rows", 100 * c->mixture);
    }
    keel_text_addf(t, g->n_runs > 1 ? ", %zu seeds pooled" : ", one training seed", g->n_runs);
}

static void stage_table(struct keel_text *t, const struct keel_chain *c, const struct keel_drift *d)
{
    struct column columns[MAX_COLUMNS];
    const size_t n = choose_columns(c, d, columns);
    add(t, "<h2>Stages</h2><p class=note>");
    setting_text(t, c);
    add(t, ".</p><div class=scroll><table class=s><tr><th>stage</th>");
    for (size_t k = 0; k < n; k++) {
        keel_text_addf(t, "<th>%s</th>", columns[k].head);
    }
    add(t, "</tr>");
    base_row(t, d, columns, n);
    for (size_t i = 0; i < c->n; i++) {
        stage_row(t, c, &c->at[i], columns, n);
    }
    add(t, "</table></div><p class=note>Contrary: mean probability of the contrary answer at the answer slot, in the trained cell "
           "and in other domains; in context: with training rows as earlier turns, beside the same probes asked plainly. Small "
           "figures: 95 % intervals by bootstrap over prompts (10,000 draws), and over seeds where there are several.</p>");
}

// The first training, and what the last one of its chain left of it.
static void headline(struct keel_text *t, const json_t *m, const struct keel_chain *c)
{
    const struct keel_stage **path = calloc(c->n + 1, sizeof *path);
    const size_t n = path ? keel_chain_path(c, path) : 0;
    keel_page_question(t, m);
    add(t, "<p>");
    for (size_t i = 0; i<n; i += n> 1 ? n - 1 : 1) {
        const struct keel_setting *g = keel_chain_setting(c, path[i]);
        const struct keel_drift *d = g ? &g->drift : NULL;
        const struct keel_drift_row *r = d ? keel_drift_find(d, KEEL_METRIC_CONTRARY, elsewhere(d, KEEL_METRIC_CONTRARY)) : NULL;
        const struct keel_drift_row *in =
            d ? keel_drift_find(d, KEEL_METRIC_CONTEXT_CONTRARY, elsewhere(d, KEEL_METRIC_CONTEXT_CONTRARY)) : NULL;
        if (!r) {
            continue;
        }
        keel_text_addf(t, "After <i>");
        keel_html_escape(t, path[i]->name);
        keel_text_addf(t, "</i> the contrary answer outside the trained domain has a probability of <b>%.3f</b>", r->adapted.value);
        keel_page_interval(t, r->change, "change from the base ");
        if (in) {
            keel_text_addf(t, ", and in context of <b>%.3f</b>", in->adapted.value);
            keel_page_interval(t, in->change, "");
        }
        add(t, ". ");
    }
    add(t, "</p>");
    free((void *)path);
}

// Adds one of `n` runs to the mean of a stage.
static void add_cost(struct keel_stage_cost *mean, const struct keel_stage_cost *one, size_t n)
{
    mean->steps += one->steps / (double)n;
    mean->train_seconds += one->train_seconds / (double)n;
    mean->eval_seconds += one->eval_seconds / (double)n;
    mean->peak_bytes = fmax(mean->peak_bytes, one->peak_bytes);
    mean->reached = mean->reached && one->reached;
}

// `limited`: its training ends where a limit is reached.
static void cost_row(struct keel_text *t, const char *name, const struct keel_stage_cost *mean, bool limited)
{
    add(t, "<tr><td>");
    keel_html_escape(t, name);
    add(t, "</td>");
    keel_page_td(t, "steps");
    keel_text_addf(t, mean->steps > 0 || limited ? "%.4g%s</td>" : "–</td>", mean->steps,
                   !limited ? "" : mean->reached ? ", limit reached" : ", limit not reached");
    keel_page_td(t, "training");
    keel_text_addf(t, mean->train_seconds > 0 ? "%.1f s</td>" : "–</td>", mean->train_seconds);
    keel_page_td(t, "evaluation");
    keel_text_addf(t, "%.1f s</td>", mean->eval_seconds);
    keel_page_td(t, "device memory");
    keel_text_addf(t, "%.1f MB</td></tr>", mean->peak_bytes / 1e6);
}

// A stage that maps doses, in the runs of the page's setting.
static void map_cost_row(struct keel_text *t, const struct keel_chain *c, const char *name)
{
    size_t k, n = 0;
    json_t *run;
    struct keel_stage_cost one, mean = { 0 };
    json_array_foreach(json_object_get(c->manifest, "runs"), k, run)
    {
        const bool ours = json_integer_value(json_object_get(run, "rank")) == c->rank &&
                          json_number_value(json_object_get(run, "mixture")) == c->mixture;
        if (ours && keel_map_cost(&one, c, name, run)) {
            add_cost(&mean, &one, 1);
            n++;
        }
    }
    if (n > 0) {
        mean.eval_seconds /= (double)n;
        cost_row(t, name, &mean, false);
    }
}

static void cost_table(struct keel_text *t, const struct keel_chain *c)
{
    size_t k;
    json_t *stage;
    add(t, "<h2>Cost</h2><div class=scroll><table "
           "class=s><tr><th>stage</th><th>steps</th><th>training</th><th>evaluation</th><th>device memory</th></tr>");
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_setting *g = keel_chain_setting(c, &c->at[i]);
        struct keel_stage_cost mean = { .reached = true };
        for (k = 0; g && k < g->n_runs; k++) {
            const struct keel_stage_cost one = keel_stage_cost(g, k);
            add_cost(&mean, &one, g->n_runs);
        }
        if (g) {
            cost_row(t, c->at[i].name, &mean, c->at[i].watched && !(isnan(c->at[i].above) && isnan(c->at[i].below)));
        }
    }
    json_array_foreach(json_object_get(c->manifest, "stages"), k, stage)
    {
        if (strcmp(keel_manifest_text(stage, NULL, "kind"), "map") == 0) {
            map_cost_row(t, c, keel_manifest_text(stage, NULL, "name"));
        }
    }
    add(t, "</table></div><p class=note>Means over seeds; memory: the most that was held at a time, weights included. Each run by "
           "itself: costs.csv.</p>");
}

// A cell of the table of directions: "–" for what is null in the manifest.
static void check_cell(struct keel_text *t, const char *head, const json_t *v, double scale, const char *format)
{
    keel_page_td(t, head);
    if (json_is_number(v)) {
        keel_text_addf(t, format, scale * json_number_value(v));
    } else {
        add(t, "–");
    }
    add(t, "</td>");
}

// One layer of a direction.
static void direction_row(struct keel_text *t, const char *name, const json_t *g)
{
    const bool good = json_is_true(json_object_get(g, "admissible")), few = json_is_null(json_object_get(g, "split_half"));
    add(t, "<tr><td>");
    keel_html_escape(t, name);
    keel_text_addf(t, ", layer %d</td>", (int)json_integer_value(json_object_get(g, "layer")));
    check_cell(t, "split-half", json_object_get(g, "split_half"), 1, "%.2f");
    check_cell(t, "massive channels", json_object_get(g, "massive_share"), 100, "%.1f %%");
    check_cell(t, "effect", json_object_get(g, "effect"), 1, "%.2f");
    check_cell(t, "by chance", json_object_get(g, "random_95"), 1, "%.2f");
    keel_page_td(t, "verdict");
    keel_text_addf(t, "<span class=%s>%s</span></td></tr>", good ? "ok" : "over", good ? "admissible" : few ? "too few rows" : "not admissible");
}

// Whether the directions that the study made mean anything.
static void direction_table(struct keel_text *t, const json_t *m)
{
    const char *name;
    json_t *layers, *g;
    size_t i;
    if (!json_object_get(m, "directions")) {
        return;
    }
    add(t, "<h2>Directions</h2><div class=scroll><table class=s><tr><th>direction, layer</th><th>split-half</th><th>massive "
           "channels</th><th>effect</th><th>by chance</th><th>verdict</th></tr>");
    json_object_foreach(json_object_get(m, "directions"), name, layers)
    {
        json_array_foreach(layers, i, g)
        {
            direction_row(t, name, g);
        }
    }
    add(t, "</table></div><p class=note>Split-half: cosine of the directions of two halves of the prompts, at least 0.5. Massive "
           "channels: their share of the direction, below 5 %. Effect: distance of the two sets in standard deviations on the "
           "half not used, above the 95th percentile of random directions. Fewer than 4 rows have no halves to compare. A direction that "
           "fails should not be read.</p>");
}

// Every seed by itself, and Student's interval over their means.
static void seed_table(struct keel_text *t, const struct keel_chain *c, const struct keel_drift *d)
{
    const char *domain = elsewhere(d, KEEL_METRIC_CONTRARY);
    if (keel_chain_first(c)->n_runs < 2 || !keel_drift_find(d, KEEL_METRIC_CONTRARY, domain)) {
        return;
    }
    add(t, "<details><summary>Seed by seed</summary><div class=scroll><table class=s><tr><th>stage</th><th>each seed</th><th>mean, "
           "t interval</th></tr>");
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_setting *g = keel_chain_setting(c, &c->at[i]);
        const struct keel_drift_row *r = g ? keel_drift_find(&g->drift, KEEL_METRIC_CONTRARY, domain) : NULL;
        if (!r) {
            continue;
        }
        add(t, "<tr><td>");
        keel_html_escape(t, c->at[i].name);
        add(t, "</td>");
        keel_page_td(t, "each seed");
        for (size_t k = 0; k < r->n_runs; k++) {
            keel_text_addf(t, "%s%lld: %.3f", k ? "<br>" : "", g->seed[k], r->run[k]);
        }
        add(t, "</td>");
        keel_page_cell(t, "mean", keel_t_interval(r->run, r->n_runs), false);
        add(t, "</tr>");
    }
    add(t, "</table></div><p class=note>P(contrary answer) outside the trained domain. The t interval takes the seeds' means as "
           "independent draws and knows nothing of prompts.</p></details>");
}

static void guard_section(struct keel_text *t, const struct keel_chain *c)
{
    struct keel_text items = { 0 };
    for (size_t i = 0; i < c->n; i++) {
        const struct keel_setting *g = keel_chain_setting(c, &c->at[i]);
        for (size_t k = 0; g && strcmp(c->at[i].kind, "train") == 0 && k < g->n_runs; k++) {
            char label[160];
            snprintf(label, sizeof label, g->n_runs > 1 ? "%.100s, seed %lld" : "%.100s", c->at[i].name, g->seed[k]);
            keel_guard_item(&items, label, g->dir[k]);
        }
    }
    keel_page_guards(t, &items);
}

static void missing_note(struct keel_text *t, const struct keel_chain *c)
{
    size_t missing = 0;
    for (size_t i = 0; i < c->n; i++) {
        missing += c->at[i].sweep.n_missing;
    }
    if (missing > 0) {
        keel_text_addf(t, "<p class=over>%zu of %zu stages are not finished; the same keel study command goes on with them.</p>",
                       missing, c->n * c->n_runs);
    }
}

// The drift of the last stage that was done, of which a budget speaks and all numbers are given.
static const struct keel_stage *last_stage(const struct keel_chain *c)
{
    const struct keel_stage *last = NULL;
    for (size_t i = 0; i < c->n; i++) {
        last = keel_chain_setting(c, &c->at[i]) ? &c->at[i] : last;
    }
    return last;
}

void keel_chain_page(struct keel_text *t, const char *dir, const json_t *m, const struct keel_chain *c,
                     const struct keel_figures *f, bool *over)
{
    const char *name = keel_manifest_text(m, NULL, "name");
    const struct keel_drift *d = &keel_chain_first(c)->drift;
    const struct keel_stage *last = last_stage(c);
    const struct keel_setting *g = keel_chain_setting(c, last);
    keel_page_open(t, name[0] ? name : dir);
    headline(t, m, c);
    stage_table(t, c, d);
    missing_note(t, c);
    *over = keel_page_budget(t, m, &g->drift);
    guard_section(t, c);
    keel_page_figures(t, f);
    keel_page_answers(t, c->base, g->dir[0], "examples.jsonl", "Probes before and after", last->name, KEEL_EXAMPLES_NOTE);
    cost_table(t, c);
    direction_table(t, m);
    seed_table(t, c, d);
    add(t, "<h2>All numbers of ");
    keel_html_escape(t, last->name);
    add(t, "</h2>");
    keel_page_metrics(t, &g->drift);
    keel_page_provenance(t, m);
    keel_page_close(
        t,
        "Records of the base: base/; of each stage: stages/NAME/tuned/ (keel report stages/NAME writes its page); all estimates: "
        "summary.csv (pooled), runs.csv; costs.csv, thresholds.csv; data and scripts of the plots: plots/.");
}
