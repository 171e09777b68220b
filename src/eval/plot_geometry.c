// SPDX-License-Identifier: MIT
// eval/plot_geometry.c: the plots of a geometry.json as `keel geometry --out` writes it, and its page. All are lines over something:
// layers or components.
#include "page.h"

#include "platform.h"

#include <keel/study.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LINES 16u // more cannot be told apart

// A table of lines: column 1 is x, the others one line each; NAN where a line has no point.
struct lines {
    size_t n, rows;
    char title[MAX_LINES][96];
    bool dashed[MAX_LINES]; // a baseline
    double *value; // [rows, MAX_LINES], owned
    int *x;        // [rows], owned
};

static bool lines_make(struct lines *l, size_t rows)
{
    *l = (struct lines){ .value = malloc((rows + 1) * MAX_LINES * sizeof *l->value), .x = calloc(rows + 1, sizeof *l->x) };
    l->rows = l->value && l->x ? rows : 0;
    for (size_t i = 0; i < l->rows * MAX_LINES; i++) {
        l->value[i] = NAN;
    }
    return l->rows > 0;
}

static void lines_finish(struct lines *l)
{
    free(l->value);
    free(l->x);
}

static bool add_line(struct lines *l, const char *title, bool dashed)
{
    if (l->n == MAX_LINES || l->rows == 0) {
        return false;
    }
    l->dashed[l->n] = dashed;
    keel_figure_label(l->title[l->n++], title);
    return true;
}

static void set_last(struct lines *l, size_t row, double value)
{
    l->value[row * MAX_LINES + l->n - 1] = value;
}

struct look {
    const char *name, *title, *sentence, *x, *y, *extra;
};

static void draw(struct keel_figures *f, const struct lines *l, const struct look *look)
{
    static const char *const colours[] = { "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999" };
    if (l->n == 0) {
        return;
    }
    struct keel_figure *g = keel_figure_add(f, look->name, look->title, look->sentence);
    size_t longest = 0;
    keel_text_addf(&g->csv, "%s", look->x);
    for (size_t k = 0; k < l->n; k++) {
        longest = KEEL_MAX(longest, strlen(l->title[k]));
        keel_text_addf(&g->csv, ",%s", l->title[k]);
    }
    for (size_t i = 0; i < l->rows; i++) {
        keel_text_addf(&g->csv, "\n%d", l->x[i]);
        for (size_t k = 0; k < l->n; k++) {
            keel_text_addf(&g->csv, isnan(l->value[i * MAX_LINES + k]) ? "," : ",%.6g", l->value[i * MAX_LINES + k]);
        }
    }
    keel_text_addf(&g->csv, "\n");
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        g->height[narrow] += 20 * (int)l->n;
        keel_text_addf(gp, "set xlabel '%s'\nset ylabel '%s'\nset rmargin 3\nset key maxcols 1\n%s", look->x, look->y, look->extra);
        if (narrow && longest > 32) { // gnuplot leaves out a key that is too wide
            keel_text_addf(gp, "set key font ',%d'\n", KEEL_MAX(13 * 32 / (int)longest, 7));
        }
        for (size_t k = 0; k < l->n; k++) {
            keel_text_addf(gp, "%s'%s.csv' skip 1 using 1:%zu with linespoints lw 2 ps 0.6 pt %d dt %d lc rgb '%s' title '%s'", k ? ", " : "plot ",
                           g->name, k + 2, l->dashed[k] ? 0 : 7, l->dashed[k] ? 2 : 1 + (int)(k / KEEL_COUNT(colours)),
                           colours[k % KEEL_COUNT(colours)], l->title[k]);
        }
        keel_text_addf(gp, "\n");
    }
}

// --- reading -------------------------------------------------------------------------------------

static double number(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

static const char *text(const json_t *v)
{
    const char *s = json_string_value(v);
    return s ? s : "";
}

// The file's name without folders and ending: what a legend has room for. In a study every adapter has the same, and its folder's name
// says whose it is.
static void short_name(char out[96], const char *path)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    const size_t generic = strcspn(name, ".");
    if (slash && slash > path && generic == 7 && memcmp(name, "adapter", 7) == 0) {
        const char *from = slash;
        while (from > path && from[-1] != '/') {
            from--;
        }
        snprintf(out, 96, "%.*s", (int)(slash - from), from);
        return;
    }
    snprintf(out, 96, "%.95s", name);
    char *dot = strrchr(out, '.');
    if (dot && dot != out) {
        *dot = '\0';
    }
}

// "ADAPTER on DATA" without folders
static void shift_name(char out[96], const json_t *shift)
{
    char adapter[96], data[96];
    short_name(adapter, text(json_object_get(shift, "adapter")));
    short_name(data, text(json_object_get(shift, "data")));
    snprintf(out, 96, "%.44s on %.44s", adapter, data);
}

// Lines over the layers of the items of a list, with one value of each layer's object.
static void layer_lines(struct lines *l, const json_t *list, void (*name)(char out[96], const json_t *item), double (*value)(const json_t *layer))
{
    size_t i, k;
    json_t *item, *layer;
    const json_t *first = json_object_get(json_array_get(list, 0), "layers");
    if (!lines_make(l, json_array_size(first))) {
        return;
    }
    json_array_foreach(list, i, item) {
        char title[96];
        name(title, item);
        if (!add_line(l, title, false)) {
            return;
        }
        json_array_foreach(json_object_get(item, "layers"), k, layer) {
            if (k < l->rows) {
                l->x[k] = (int)number(layer, "layer");
                set_last(l, k, value(layer));
            }
        }
    }
}

// --- shifts --------------------------------------------------------------------------------------

static double relative_shift(const json_t *layer)
{
    return 100 * number(layer, "mean_shift") / number(layer, "median_norm");
}

static double components_90(const json_t *layer)
{
    return json_number_value(json_array_get(json_object_get(layer, "components"), 2));
}

static const json_t *largest_shift(const json_t *shift)
{
    size_t k;
    json_t *layer;
    const json_t *best = json_array_get(json_object_get(shift, "layers"), 0);
    json_array_foreach(json_object_get(shift, "layers"), k, layer) {
        if (relative_shift(layer) > relative_shift(best)) {
            best = layer;
        }
    }
    return best;
}

static void scree_figure(struct keel_figures *f, const json_t *shifts)
{
    size_t i;
    json_t *shift;
    struct lines l;
    size_t longest = 0;
    json_array_foreach(shifts, i, shift) {
        longest = KEEL_MAX(longest, json_array_size(json_object_get(largest_shift(shift), "scree")));
    }
    lines_make(&l, longest);
    json_array_foreach(shifts, i, shift) {
        char name[96], title[128];
        double sum = 0;
        const json_t *layer = largest_shift(shift), *scree = json_object_get(layer, "scree");
        shift_name(name, shift);
        snprintf(title, sizeof title, "%.80s, layer %d", name, (int)number(layer, "layer"));
        if (!add_line(&l, title, false)) {
            break;
        }
        for (size_t k = 0; k < json_array_size(scree); k++) {
            l.x[k] = (int)k + 1;
            sum += json_number_value(json_array_get(scree, k));
            set_last(&l, k, 100 * sum);
        }
    }
    draw(f, &l, &(struct look){ "geometry_scree", "How many dimensions the shift has",
                                "Share of the summed squares of the rows' shifts that the leading directions hold, at the layer where each "
                                "shift is largest beside the residual stream. It shows how low-dimensional the shift is; a shared mean alone gives one "
                                "dimension, and the share says nothing of what the directions do.",
                                "leading directions", "share (%)", "set yrange [0:100]\n" });
    lines_finish(&l);
}

static void shift_figures(struct keel_figures *f, const json_t *shifts)
{
    struct lines l = { 0 };
    if (json_array_size(shifts) == 0) {
        return;
    }
    scree_figure(f, shifts);
    layer_lines(&l, shifts, shift_name, relative_shift);
    draw(f, &l, &(struct look){ "geometry_shift", "Where the activations moved",
                                "Length of the mean shift at each layer, in percent of the residual stream's median length. It shows where the "
                                "fine-tune acts on these rows; a long shift need not change behaviour, nor a short one leave it.",
                                "layer", "mean shift (%)", "set yrange [0:*]\n" });
    lines_finish(&l);
    l = (struct lines){ 0 };
    layer_lines(&l, shifts, shift_name, components_90);
    draw(f, &l, &(struct look){ "geometry_components", "Dimensions of the shift by layer",
                                "Leading directions that hold 90 % of the summed squares of the rows' shifts. It shows whether layers or modalities differ; "
                                "the count is bounded by the rows and grows with how varied they are.",
                                "layer", "directions for 90 %", "set yrange [0:*]\n" });
    lines_finish(&l);
}

// --- adapters ------------------------------------------------------------------------------------

static void adapter_name(char out[96], const json_t *adapter)
{
    short_name(out, text(json_object_get(adapter, "adapter")));
}

// The line of this title, made if need be; NULL if there are too many.
static double *line_of(struct lines *l, const char *title)
{
    size_t k = 0;
    char label[96];
    keel_figure_label(label, title); // as it is kept
    while (k < l->n && strcmp(l->title[k], label) != 0) {
        k++;
    }
    return k < l->n || add_line(l, title, false) ? l->value + k : NULL;
}

static void add_deltas(struct lines *l, const json_t *adapter, bool by_module)
{
    size_t k;
    json_t *d;
    char name[96];
    adapter_name(name, adapter);
    double *own = !by_module && add_line(l, name, false) ? l->value + l->n - 1 : NULL; // two may have one name
    json_array_foreach(json_object_get(adapter, "layers"), k, d) {
        const double relative = 100 * number(d, "relative");
        double *line = by_module ? line_of(l, text(json_object_get(d, "module"))) : own;
        if (line) {
            line += (size_t)number(d, "layer") * MAX_LINES;
            *line = isnan(*line) ? relative : KEEL_MAX(*line, relative);
        }
    }
}

// One adapter: a line for each matrix of a layer; several: a line each, the matrix that changed most.
static void delta_lines(struct lines *l, const json_t *adapters)
{
    size_t i, k, n = 0;
    json_t *adapter, *d;
    json_array_foreach(adapters, i, adapter) {
        json_array_foreach(json_object_get(adapter, "layers"), k, d) {
            n = KEEL_MAX(n, (size_t)number(d, "layer") + 1);
        }
    }
    lines_make(l, n);
    for (i = 0; i < l->rows; i++) {
        l->x[i] = (int)i;
    }
    json_array_foreach(adapters, i, adapter) {
        add_deltas(l, adapter, json_array_size(adapters) == 1);
    }
}

static void delta_figure(struct keel_figures *f, const json_t *adapters)
{
    struct lines l = { 0 };
    if (json_array_size(adapters) == 0) {
        return;
    }
    delta_lines(&l, adapters);
    draw(f, &l, &(struct look){ "geometry_delta", "What the adapters add to the weights",
                                "Frobenius norm of what an adapter adds, in percent of the norm of the matrix it is added to; of several adapters, the "
                                "matrix of each layer that changed most. It shows where the training wrote; norms do not say which change matters.",
                                "layer", "|dW| / |W| (%)", "set yrange [0:*]\n" });
    lines_finish(&l);
}

// --- angles --------------------------------------------------------------------------------------

static void pair_name(char out[96], const json_t *item)
{
    const char *name[2];
    char part[2][96];
    for (size_t i = 0; i < 2; i++) {
        name[i] = text(json_array_get(json_object_get(item, "of"), i));
        const char *on = strstr(name[i], " on ");
        char adapter[96], data[96] = "";
        if (on) {
            char first[4200];
            snprintf(first, sizeof first, "%.*s", (int)(on - name[i]), name[i]);
            short_name(adapter, first);
            short_name(data, on + 4);
        } else {
            short_name(adapter, name[i]);
        }
        snprintf(part[i], sizeof part[i], "%.20s%s%.20s", adapter, on ? " on " : "", data);
    }
    snprintf(out, 96, "%.45s / %.45s", part[0], part[1]);
}

static double overlap(const json_t *layer)
{
    return number(layer, "overlap");
}

static void angle_figure(struct keel_figures *f, const json_t *angles)
{
    struct lines l = { 0 };
    size_t k;
    json_t *layer;
    layer_lines(&l, angles, pair_name, overlap);
    if (l.n > 0 && add_line(&l, "random spaces", true)) {
        json_array_foreach(json_object_get(json_array_get(angles, 0), "layers"), k, layer) {
            set_last(&l, k, number(layer, "random"));
        }
    }
    draw(f, &l, &(struct look){ "geometry_angles", "Do shifts point the same way?",
                                "Overlap of the spaces of two shifts' leading directions: mean squared cosine of their principal angles, 1 for the same space; "
                                "dashed: what random spaces of that size share. It shows whether runs, data or modalities move activations along the same "
                                "directions; it cannot show that these directions carry the behaviour.",
                                "layer", "overlap", "set yrange [0:1]\n" });
    lines_finish(&l);
}

// --- probes --------------------------------------------------------------------------------------

static void probe_figure(struct keel_figures *f, const json_t *probes)
{
    struct lines l = { 0 };
    const json_t *layers = json_object_get(probes, "layers");
    const size_t n = json_array_size(json_object_get(probes, "sets"));
    lines_make(&l, json_array_size(layers));
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j <= n; j++) { // the last: shuffled labels
            char title[96];
            snprintf(title, sizeof title, j == n ? "set %zu, shuffled labels" : i == j ? "set %zu, held out" : "set %zu to set %zu", i + 1, j + 1);
            if (!add_line(&l, title, j == n)) {
                break;
            }
            for (size_t k = 0; k < l.rows; k++) {
                const json_t *layer = json_array_get(layers, k), *row = json_array_get(json_object_get(layer, "auc"), i);
                l.x[k] = (int)number(layer, "layer");
                set_last(&l, k, json_number_value(j == n ? json_array_get(json_object_get(layer, "shuffled"), i) : json_array_get(row, j)));
            }
        }
    }
    draw(f, &l, &(struct look){ "geometry_probes", "What a linear probe can tell",
                                "Area under the ROC curve of linear probes trained on one set of rows and tested on held-out rows or on another set; dashed: "
                                "shuffled labels. It shows where the difference can be read and whether it reads the same in other rows; being "
                                "readable does not mean that the model uses it.",
                                "layer", "AUC", "set yrange [0:1]\n" });
    lines_finish(&l);
}

// --- all -----------------------------------------------------------------------------------------

static void add_figures(struct keel_figures *f, const json_t *g)
{
    shift_figures(f, json_object_get(g, "shifts"));
    angle_figure(f, json_object_get(g, "angles"));
    delta_figure(f, json_object_get(g, "adapters"));
    probe_figure(f, json_object_get(g, "probes"));
}

void keel_figures_of_geometry(struct keel_figures *f, const char *dir)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/geometry.json", dir);
    json_t *g = json_load_file(path, 0, NULL);
    if (g) {
        add_figures(f, g);
    }
    json_decref(g);
}

// Every plot that a geometry.json may have.
static const char *const names[] = { "geometry_scree", "geometry_shift", "geometry_components", "geometry_angles", "geometry_delta",
                                     "geometry_probes" };

// Plots of an earlier result in this folder that this one does not have, which would pass for its own.
static void remove_others(const struct keel_figures *f, const char *dir)
{
    static const char *const ends[] = { ".csv", "-wide.gp", "-narrow.gp", "-wide.svg", "-narrow.svg" };
    for (size_t i = 0; i < KEEL_COUNT(names); i++) {
        bool drawn = false;
        for (size_t k = 0; k < f->n; k++) {
            drawn = drawn || strcmp(f->at[k].name, names[i]) == 0;
        }
        for (size_t k = 0; k < KEEL_COUNT(ends) && !drawn; k++) {
            char path[4300];
            snprintf(path, sizeof path, "%.4200s/plots/%s%s", dir, names[i], ends[k]);
            remove(path);
        }
    }
}

bool keel_geometry_alone(const char *dir)
{
    static const char *const study[] = { "manifest.json", "base", "tuned" };
    char path[4300];
    for (size_t i = 0; i < KEEL_COUNT(study); i++) {
        snprintf(path, sizeof path, "%.4200s/%s", dir, study[i]);
        if (keel_path_exists(path)) {
            return false;
        }
    }
    snprintf(path, sizeof path, "%.4200s/geometry.json", dir);
    return keel_path_exists(path);
}

keel_status keel_geometry_page(struct keel_text *t, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_figures f = { 0 };
    json_error_t error;
    char path[4300];
    snprintf(path, sizeof path, "%.4200s/geometry.json", dir);
    json_t *g = json_load_file(path, 0, &error);
    if (!g) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s:%d: invalid geometry: %s; write it again with keel geometry --out %s", path, error.line, error.text,
                  dir);
    }
    add_figures(&f, g);
    KEEL_TRY(keel_figures_draw(&f, dir, log));
    remove_others(&f, dir);
    keel_page_open(t, "Geometry");
    keel_page_figures(t, &f);
    keel_page_add(t, f.n == 0 ? "<p>There is nothing to plot in geometry.json.</p>" : "");
    keel_page_close(t, "Numbers: geometry.json and plots/*.csv beside this page.");
out:
    json_decref(g);
    keel_figures_finish(&f);
    return st;
}

keel_status keel_geometry_write(const char *json, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_text result = { 0 }, page = { 0 };
    char path[4200];
    KEEL_TRY(keel_make_dirs(dir, log));
    keel_text_addf(&result, "%s\n", json);
    snprintf(path, sizeof path, "%s/geometry.json", dir);
    KEEL_TRY(keel_text_save(&result, path, log));
    KEEL_TRY(keel_geometry_page(&page, dir, log));
    snprintf(path, sizeof path, "%s/geometry.html", dir);
    KEEL_TRY(keel_text_save(&page, path, log));
out:
    keel_text_finish(&result);
    keel_text_finish(&page);
    return st;
}
