// SPDX-License-Identifier: MIT
// eval/monitor.c: what the monitor of a training measured, as a plot, and what became of its guards, in words. From the log and the
// manifest of each run.
#include "page.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum unit { NATS, SHARE, SHIFT, N_UNITS };
#define N_METRICS 6
static const struct {
    const char *name, *title, *style;
    enum unit unit;
} metrics[N_METRICS] = {
    { "kl_mean", "KL to the base (kl_mean)", "lc rgb blue pt 7", NATS },
    { "margin_drop", "margin lost (margin_drop)", "lc rgb orange pt 5", NATS },
    { "flip_rate", "negative margins (flip_rate)", "lc rgb blue pt 7", SHARE },
    { "p_contrary", "contrary answer (p_contrary)", "lc rgb orange pt 5", SHARE },
    { "p_incoherent", "neither answer (p_incoherent)", "lc rgb green pt 9", SHARE },
    { "projection_shift", "projection_shift", "lc rgb pink pt 7", SHIFT },
};
static const char *const axes[N_UNITS] = { "nats per token", "share or probability", "shift (mean norms)" };

// The runs of one training, read.
struct monitor {
    struct keel_text csv;
    double lo[N_METRICS], hi[N_METRICS]; // of what was measured, of all runs; lo above hi: nothing
    double limit[N_METRICS];             // NAN: none
    bool broken[N_METRICS], kept[N_METRICS]; // in one of the runs, at a step that the log has
    size_t run, rows;
    int breach; // metric that the run at hand broke, or -1; at which step, and to which it went back
    double breach_step, kept_step;
};

// --- reading -------------------------------------------------------------------------------------

static int metric_of(const char *text, size_t len)
{
    for (int i = 0; i < N_METRICS; i++) {
        if (strlen(metrics[i].name) == len && memcmp(metrics[i].name, text, len) == 0) {
            return i;
        }
    }
    return -1;
}

static void monitor_row(void *user, const struct json_t *object)
{
    struct monitor *m = user;
    const json_t *values = json_object_get(object, "monitor");
    const double step = json_number_value(json_object_get(object, "step"));
    if (!values) {
        return;
    }
    const bool broke = m->breach >= 0 && step == m->breach_step, kept = m->breach >= 0 && step == m->kept_step;
    keel_text_addf(&m->csv, "%zu,%.0f", m->run, step);
    for (int i = 0; i < N_METRICS; i++) {
        const json_t *v = json_object_get(values, metrics[i].name);
        if (json_is_number(v)) {
            m->lo[i] = fmin(m->lo[i], json_number_value(v));
            m->hi[i] = fmax(m->hi[i], json_number_value(v));
            keel_text_addf(&m->csv, ",%.6g", json_number_value(v));
        } else {
            keel_text_addf(&m->csv, ",");
        }
    }
    keel_text_addf(&m->csv, ",%d,%d\n", broke ? m->breach + 1 : 0, kept ? m->breach + 1 : 0);
    if (m->breach >= 0) {
        m->broken[m->breach] = m->broken[m->breach] || broke;
        m->kept[m->breach] = m->kept[m->breach] || kept;
    }
    m->rows++;
}

static void read_guards(struct monitor *m, const json_t *training)
{
    size_t i;
    const json_t *guard;
    const json_t *breach = json_object_get(training, "breach");
    json_array_foreach(json_object_get(json_object_get(training, "monitor"), "guard"), i, guard)
    {
        const char *text = json_string_value(guard), *limit = text ? strstr(text, "<=") : NULL;
        const int k = limit ? metric_of(text, (size_t)(limit - text)) : -1;
        if (k >= 0) {
            m->limit[k] = fmin(strtod(limit + 2, NULL), isnan(m->limit[k]) ? INFINITY : m->limit[k]);
        }
    }
    const char *name = keel_manifest_text(breach, NULL, "metric");
    m->breach = metric_of(name, strlen(name));
    m->breach_step = json_number_value(json_object_get(breach, "step"));
    m->kept_step = json_number_value(json_object_get(training, "steps"));
}

static void read_run(struct monitor *m, const char *dir)
{
    static const keel_log quiet = { .level = 0 };
    json_t *manifest = NULL;
    m->breach = -1;
    if (keel_manifest_load(&manifest, dir, &quiet) == KEEL_OK) {
        read_guards(m, json_object_get(manifest, "training"));
    }
    json_decref(manifest);
    keel_text_addf(&m->csv, m->rows > 0 ? "\n" : ""); // an empty line: a run is a line of its own
    keel_file_rows(dir, KEEL_TRAIN_LOG, monitor_row, m);
    m->run++;
}

// --- plot ----------------------------------------------------------------------------------------

static bool measured(const struct monitor *m, int k)
{
    return m->lo[k] <= m->hi[k];
}

// What was measured in one unit: how many metrics, lines of their key, the least (at most 0) and the largest value.
struct panel {
    int n, entries;
    double lo, top;
};

static struct panel panel_of(const struct monitor *m, enum unit u)
{
    struct panel p = { 0 };
    for (int k = 0; k < N_METRICS; k++) {
        if (metrics[k].unit == u && measured(m, k)) {
            p.n++;
            p.entries += 1 + !isnan(m->limit[k]) + m->broken[k] + m->kept[k];
            p.lo = fmin(p.lo, m->lo[k]);
            p.top = fmax(p.top, m->hi[k]);
        }
    }
    return p;
}

// The lines, limit and marks of a metric. A limit far above `top`, the largest value of the panel, would press the lines flat and is
// only named.
static void metric_script(struct keel_text *gp, const struct monitor *m, const char *file, int k, double top, const char **sep, bool *marked)
{
    keel_text_addf(gp, "%s'%s.csv' skip 1 using 2:%d with linespoints %s lw 2 ps 0.7 title '%s' noenhanced", *sep, file, k + 3, metrics[k].style,
                   metrics[k].title);
    *sep = ", ";
    if (!isnan(m->limit[k])) {
        const bool far = m->limit[k] > 0 && m->limit[k] > 3 * top;
        char at[40];
        snprintf(at, sizeof at, "%.9g", m->limit[k]);
        keel_text_addf(gp, ", %s with lines %.*s dt 2 lw 1.6 title '%s <= %g%s' noenhanced", far ? "NaN" : at,
                       (int)(strstr(metrics[k].style, " pt") - metrics[k].style), metrics[k].style, metrics[k].name, m->limit[k],
                       far ? " (above)" : "");
    }
    if (m->broken[k]) {
        keel_text_addf(gp, ", '%s.csv' skip 1 using ($9==%d?$2:NaN):%d with points lc rgb '#000000' pt 2 ps 1.7 lw 2.5 %s", file, k + 1, k + 3,
                       *marked ? "notitle" : "title 'limit broken'");
    }
    if (m->kept[k]) {
        keel_text_addf(gp, ", '%s.csv' skip 1 using ($10==%d?$2:NaN):%d with points lc rgb '#000000' pt 6 ps 1.9 lw 2 %s", file, k + 1, k + 3,
                       *marked ? "notitle" : "title 'rolled back to'");
    }
    *marked = *marked || m->broken[k];
}

// A panel for each unit, one below the other.
static void script(struct keel_figure *g, const struct monitor *m)
{
    for (int narrow = 0; narrow < 2; narrow++) {
        struct keel_text *gp = &g->script[narrow];
        int panels = 0, most = 0;
        for (enum unit u = 0; u < N_UNITS; u++) {
            const struct panel p = panel_of(m, u);
            panels += p.n > 0;
            most = KEEL_MAX(most, p.entries);
        }
        g->height[narrow] = panels * (240 + 20 * (narrow ? most : (most + 1) / 2));
        keel_text_addf(gp, "set rmargin 3\nset key maxcols %d\nset xrange [0:*]\nset xlabel 'optimiser step'\n", narrow ? 1 : 2);
        keel_text_addf(gp, panels > 1 ? "set multiplot layout %d,1\n" : "", panels);
        for (enum unit u = 0; u < N_UNITS; u++) {
            const struct panel p = panel_of(m, u);
            const char *sep = "plot ";
            bool marked = false;
            keel_text_addf(gp, p.n > 0 ? "set ylabel '%s'\nset yrange [%s:*]\n" : "", axes[u], p.lo < 0 ? "*" : "0");
            for (int k = 0; k < N_METRICS; k++) {
                if (metrics[k].unit == u && measured(m, k)) {
                    metric_script(gp, m, g->name, k, p.top, &sep, &marked);
                }
            }
            keel_text_addf(gp, "\n");
        }
        keel_text_addf(gp, panels > 1 ? "unset multiplot\n" : "");
    }
}

#define DRIFT                                                                                                                              \
    "Drift from the base model on the monitor's rows at the steps of its measurements, a line for each run (shift: in mean norms of the " \
    "base's activations)"
#define LIMITS                                                                                                                           \
    ". It shows drift on these few rows; it cannot show what happened between two measurements, nor drift on anything else."

void keel_monitor_figure(struct keel_figures *f, const char *stage, const char (*dir)[4200], size_t n)
{
    struct monitor m = { .rows = 0 };
    bool guarded = false;
    char name[32] = "monitor";
    keel_text_addf(&m.csv, "run,step");
    for (int k = 0; k < N_METRICS; k++) {
        m.lo[k] = INFINITY;
        m.hi[k] = -INFINITY;
        m.limit[k] = NAN;
        keel_text_addf(&m.csv, ",%s", metrics[k].name);
    }
    keel_text_addf(&m.csv, ",broken,kept\n");
    for (size_t i = 0; i < n; i++) {
        read_run(&m, dir[i]);
    }
    for (int k = 0; k < N_METRICS; k++) {
        guarded = guarded || !isnan(m.limit[k]);
    }
    if (m.rows == 0 || keel_figures_full(f)) {
        keel_text_finish(&m.csv);
        return;
    }
    if (stage[0]) {
        snprintf(name, sizeof name, "monitor_%.23s", stage);
    }
    for (char *s = name; *s; s++) {
        *s = isalnum((unsigned char)*s) || strchr("-_.", *s) ? *s : '_';
    }
    struct keel_figure *g = keel_figure_add(
        f, name, "What the monitor measured while training",
        guarded ? DRIFT "; dashed: the guard's limits, cross: the measurement that broke one, circle: the one that the adapter was taken back to"
                  LIMITS
                : DRIFT LIMITS);
    snprintf(g->of, sizeof g->of, "%.47s", stage);
    g->csv = m.csv;
    script(g, &m);
}

// --- words ---------------------------------------------------------------------------------------

// "guard kl_mean<=0.1 was broken at step 15 (measured: 0.12 nats per token); rolled back to step 10"
static void broken_words(struct keel_text *t, const json_t *training)
{
    const json_t *breach = json_object_get(training, "breach"), *value = json_object_get(breach, "value");
    const char *name = keel_manifest_text(breach, NULL, "metric");
    const int k = metric_of(name, strlen(name));
    const long long back = (long long)json_integer_value(json_object_get(training, "steps"));
    if (k < 0) { // of an older keel, which kept no more
        keel_text_addf(t, "a guard was <b>broken</b>; rolled back to step %lld", back);
        return;
    }
    keel_text_addf(t, "guard %s&lt;=%g was <b>broken</b> at step %lld ", name, json_number_value(json_object_get(breach, "limit")),
                   (long long)json_integer_value(json_object_get(breach, "step")));
    if (json_is_number(value)) {
        keel_text_addf(t, "(measured: %.6g%s)", json_number_value(value), metrics[k].unit == NATS ? " nats per token" : "");
    } else {
        keel_page_add(t, "(it could not be measured)");
    }
    keel_text_addf(t, "; rolled back to step %lld%s", back, back == 0 ? ", before any training" : "");
}

void keel_guard_item(struct keel_text *items, const char *label, const char *dir)
{
    static const keel_log quiet = { .level = 0 };
    json_t *m = NULL;
    size_t i;
    const json_t *guard;
    if (keel_manifest_load(&m, dir, &quiet) != KEEL_OK) {
        return;
    }
    const json_t *training = json_object_get(m, "training"), *guards = json_object_get(json_object_get(training, "monitor"), "guard");
    const bool broken = json_is_true(json_object_get(training, "breached"));
    if (broken || json_array_size(guards) > 0) {
        keel_page_add(items, "<li>");
        keel_html_escape(items, label);
        keel_page_add(items, label[0] ? ": " : "");
        if (broken) {
            broken_words(items, training);
        } else {
            json_array_foreach(guards, i, guard)
            {
                keel_page_add(items, i ? ", " : "guard ");
                keel_html_escape(items, json_string_value(guard) ? json_string_value(guard) : "");
            }
            keel_page_add(items, " held at every measurement");
        }
        keel_page_add(items, "</li>");
    }
    json_decref(m);
}

void keel_page_guards(struct keel_text *t, struct keel_text *items)
{
    if (items->len > 0) {
        keel_page_add(t, "<h2>Guard</h2><ul>");
        keel_page_add(t, items->data);
        keel_page_add(t, "</ul><p class=note>Limits on what the monitor measures; they are looked at when it measures, not between. After a breach "
                         "the adapter is the one of the last measurement within all limits.</p>");
    }
    keel_text_finish(items);
}
