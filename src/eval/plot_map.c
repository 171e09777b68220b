// SPDX-License-Identifier: MIT
// eval/plot_map.c: heat maps of steering, dose by layer: drift outside the trained domain, coherence there, and the trained cell.
#include "page.h"

#include "platform.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum panel { DRIFT, COHERENCE, TRAINED, N_PANELS };

// One stage that maps doses, of the runs of the setting that the page is about.
struct map {
    const struct keel_chain *c;
    const char *name;
    char dir[KEEL_MAX_RUNS][4200]; // [n_runs]
    uint32_t n_runs;
    json_t *manifest; // of the first of them
    const json_t *coef, *layer;
    struct keel_draws draws;
};

// --- numbers -------------------------------------------------------------------------------------

static bool in_panel(const struct map *m, enum panel p, const struct keel_item *item)
{
    const bool narrow = m->c->narrow && strcmp(item->domain, m->c->narrow) == 0;
    const bool modal = !m->c->narrow_modality || strcmp(item->modality, m->c->narrow_modality) == 0;
    return p == TRAINED ? narrow && modal : !narrow;
}

// Values of the panel's items in every run, one run after the other, and the clusters of the items.
static keel_status collect(const struct map *m, enum panel p, const struct keel_records *r, double *value, uint32_t *cluster, size_t *n,
                           uint32_t *n_clusters)
{
    json_t *keys = json_object();
    size_t all = 0;
    bool ok = keys != NULL;
    *n = 0;
    for (uint32_t k = 0; k < m->n_runs && ok; k++) {
        for (size_t i = 0; i < r[k].n && ok; i++) {
            const struct keel_item *item = &r[k].item[i];
            ok = r[k].n == r[0].n && strcmp(item->id, r[0].item[i].id) == 0;
            if (!ok || !in_panel(m, p, item)) {
                continue;
            }
            value[all++] = p == COHERENCE ? item->aligned + item->contrary : item->contrary;
            if (k > 0) {
                continue;
            }
            if (!json_object_get(keys, item->cluster)) {
                json_object_set_new(keys, item->cluster, json_integer((json_int_t)json_object_size(keys)));
            }
            cluster[(*n)++] = (uint32_t)json_integer_value(json_object_get(keys, item->cluster));
        }
    }
    *n_clusters = (uint32_t)json_object_size(keys);
    json_decref(keys);
    return ok ? KEEL_OK : KEEL_ERR_MISMATCH;
}

// The panels' means over the records NAME of all runs; false if one is not there.
static bool measure(struct map *m, const char *name, struct keel_estimate out[N_PANELS])
{
    static const keel_log quiet = { .level = 0 };
    struct keel_records r[KEEL_MAX_RUNS] = { { 0 } };
    double *value = NULL;
    uint32_t *cluster = NULL;
    bool ok = true;
    for (uint32_t k = 0; k < m->n_runs && ok; k++) {
        char path[4300];
        snprintf(path, sizeof path, "%s/map/%s", m->dir[k], name);
        ok = keel_path_exists(path) && keel_records_load(&r[k], path, KEEL_REC_SLOT, &quiet) == KEEL_OK;
    }
    value = calloc(m->n_runs * r[0].n + 1, sizeof *value);
    cluster = calloc(r[0].n + 1, sizeof *cluster);
    ok = ok && value && cluster;
    for (enum panel p = 0; p < N_PANELS && ok; p++) {
        struct keel_estimate e[3];
        struct keel_pairs pairs = { .tuned = value, .cluster = cluster, .n_runs = m->n_runs };
        out[p] = KEEL_NO_ESTIMATE;
        ok = collect(m, p, r, value, cluster, &pairs.n, &pairs.n_clusters) == KEEL_OK;
        if (ok && pairs.n > 0 && keel_bootstrap_pairs(&m->draws, &pairs, e) == KEEL_OK) {
            out[p] = e[1];
        }
    }
    for (uint32_t k = 0; k < m->n_runs; k++) {
        keel_records_finish(&r[k]);
    }
    free(value);
    free(cluster);
    return ok;
}

// --- loading -------------------------------------------------------------------------------------

static bool open_map(struct map *m, const struct keel_chain *c, const char *name)
{
    static const keel_log quiet = { .level = 0 };
    size_t i;
    json_t *run;
    *m = (struct map){ .c = c, .name = name, .draws = keel_draws_make(KEEL_BOOTSTRAP_DRAWS, c->seed) };
    json_array_foreach(json_object_get(c->manifest, "runs"), i, run)
    {
        char path[4300];
        const bool ours = json_integer_value(json_object_get(run, "rank")) == c->rank &&
                          json_number_value(json_object_get(run, "mixture")) == c->mixture;
        const char *folder = keel_manifest_text(run, NULL, "folder");
        snprintf(m->dir[m->n_runs], sizeof m->dir[0], "%.3900s/%.150s/stages/%.80s", c->dir, folder, name);
        snprintf(path, sizeof path, "%s/map/.done", m->dir[m->n_runs]);
        m->n_runs += ours && !strstr(folder, "..") && m->n_runs < KEEL_MAX_RUNS - 1 && keel_path_exists(path);
    }
    if (m->n_runs == 0 || keel_manifest_load(&m->manifest, m->dir[0], &quiet) != KEEL_OK) {
        return false;
    }
    const json_t *map = json_object_get(m->manifest, "map");
    m->coef = json_object_get(map, "coef");
    m->layer = json_object_get(map, "layer");
    return json_array_size(m->coef) > 0 && json_array_size(m->layer) > 0;
}

static void close_map(struct map *m)
{
    keel_draws_finish(&m->draws);
    json_decref(m->manifest);
}

// --- plot ----------------------------------------------------------------------------------------

struct range {
    double max, error; // largest value and half interval of a panel
};

static void cell_row(struct keel_text *csv, size_t x, size_t y, double coef, json_int_t layer, const struct keel_estimate *e, struct range *range)
{
    keel_text_addf(csv, "%zu,%zu,%g,%lld", x, y, coef, (long long)layer);
    for (int p = 0; p < N_PANELS; p++) {
        keel_text_addf(csv, isfinite(e[p].value) ? ",%.6g,%.6g,%.6g" : ",,,", e[p].value, e[p].lo, e[p].hi);
        range[p].max = isfinite(e[p].value) ? fmax(range[p].max, e[p].value) : range[p].max;
        range[p].error = isfinite(e[p].lo) ? fmax(range[p].error, (e[p].hi - e[p].lo) / 2) : range[p].error;
    }
    keel_text_addf(csv, "\n");
}

static bool map_csv(struct map *m, struct keel_text *csv, struct keel_estimate none[N_PANELS], struct range *range)
{
    size_t x, y;
    json_t *coef, *layer;
    if (!measure(m, "unsteered.jsonl", none)) {
        return false;
    }
    keel_text_addf(csv, "x,y,coef,layer,drift,lo,hi,coherence,lo,hi,trained,lo,hi\n");
    json_array_foreach(m->layer, y, layer)
    {
        json_array_foreach(m->coef, x, coef)
        {
            struct keel_estimate e[N_PANELS];
            char name[96];
            snprintf(name, sizeof name, "layer-%lld_coef-%g.jsonl", (long long)json_integer_value(layer), json_number_value(coef));
            if (measure(m, name, e)) {
                cell_row(csv, x, y, json_number_value(coef), json_integer_value(layer), e, range);
            }
        }
    }
    return true;
}

static void tics(struct keel_text *gp, const char *axis, const json_t *values)
{
    size_t i;
    json_t *v;
    keel_text_addf(gp, "set %stics (", axis);
    json_array_foreach(values, i, v)
    {
        keel_text_addf(gp, "%s'%g' %zu", i ? "," : "", json_number_value(v), i);
    }
    keel_text_addf(gp, ")\nset %srange [-0.5:%zu.5]\n", axis, json_array_size(values) - 1);
}

// A panel a measure: its shade is the value that stands in the cell, light to dark in one hue.
static void map_script(struct keel_figure *g, const struct map *m, const struct keel_estimate *none, const struct range *range)
{
    static const char *const titles[N_PANELS] = { "P(contrary answer), other domains", "coherence, other domains",
                                                  "P(contrary answer), trained cell" };
    static const char *const hues[N_PANELS] = { "#F0A070", "#7FB9DA", "#F0A070" };
    const int panels = isfinite(none[TRAINED].value) ? 3 : 2, rows = (int)json_array_size(m->layer);
    const bool percent = json_is_true(json_object_get(json_object_get(m->manifest, "map"), "percent"));
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        const int lines = narrow ? panels : (panels + 1) / 2;
        g->height[narrow] = lines * (130 + KEEL_MAX(rows, 2) * 26);
        keel_text_addf(gp, "unset key\nunset grid\nunset colorbox\nset tics scale 0\nset border 0\nset lmargin 8\nset rmargin 1\n"
                           "set tmargin 3.2\nset bmargin 3.4\nset ylabel 'layer' offset 0.5,0\nset xlabel '%s'\n",
                       percent ? "coefficient (% of the median norm)" : "coefficient (lengths of the direction)");
        tics(gp, "x", m->coef);
        tics(gp, "y", m->layer);
        keel_text_addf(gp, "set multiplot layout %d,%d\n", lines, narrow ? 1 : 2);
        for (int p = 0; p < panels; p++) {
            keel_text_addf(gp, "set title \"%s\\nunsteered %.2f; 95 %% intervals within ±%.2f\" noenhanced\n", titles[p],
                           none[p].value, range[p].error);
            keel_text_addf(gp, "set palette defined (0 '#ffffff', 1 '%s')\nset cbrange [0:%g]\n", hues[p],
                           p == DRIFT ? fmax(range[p].max, 0.01) : 1);
            keel_text_addf(gp, "plot '%s.csv' skip 1 using 1:2:(0.5):(0.5):%d with boxxyerror fs solid noborder lc palette, '' skip 1 using 1:2:(sprintf('%%.2f',$%d)) with labels "
                               "tc rgb '#000000'\n",
                           g->name, 5 + 3 * p, 5 + 3 * p);
        }
        keel_text_addf(gp, "unset multiplot\n");
    }
}

static void map_figure(struct keel_figures *f, const struct keel_chain *c, const char *name)
{
    struct map m;
    struct keel_text csv = { 0 };
    struct keel_estimate none[N_PANELS];
    struct range range[N_PANELS] = { { 0 } };
    if (!open_map(&m, c, name) || keel_figures_full(f) || !map_csv(&m, &csv, none, range)) {
        keel_text_finish(&csv);
        close_map(&m);
        return;
    }
    char file[32];
    snprintf(file, sizeof file, "map_%.26s", name);
    struct keel_figure *g = keel_figure_add(
        f, file, "Steering by dose and layer",
        "Each cell: the direction added at that one layer with that coefficient; the mean over slot probes stands in it. It shows where "
        "pushing along this direction moves the drift, and where it breaks answers (coherence below the unsteered one) or unlearns the "
        "task; it cannot show that the direction is the cause, which a map of a random one of its length is the control for, nor what "
        "several layers at once would do.");
    snprintf(g->of, sizeof g->of, "%.47s", name);
    g->csv = csv;
    map_script(g, &m, none, range);
    close_map(&m);
}

void keel_figures_of_maps(struct keel_figures *f, const struct keel_chain *c)
{
    size_t i;
    json_t *stage;
    json_array_foreach(json_object_get(c->manifest, "stages"), i, stage)
    {
        if (strcmp(keel_manifest_text(stage, NULL, "kind"), "map") == 0) {
            map_figure(f, c, keel_manifest_text(stage, NULL, "name"));
        }
    }
}
