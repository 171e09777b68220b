// SPDX-License-Identifier: MIT
// eval/plot.c: plots of a study by gnuplot: CSV data, a script, an SVG in a wide and a narrow form. Colours: Okabe & Ito 2008.
#include "eval.h"

#include "formats.h"
#include "platform.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const plot_name[KEEL_N_PLOTS] = {
    [KEEL_PLOT_LOSS] = "loss", [KEEL_PLOT_KL] = "kl_profile", [KEEL_PLOT_MARGIN] = "margin",
};

keel_status keel_text_add_file(struct keel_text *t, const char *path, const keel_log *log)
{
    struct keel_map map;
    const keel_status st = keel_map_open(&map, path, log);
    if (st == KEEL_OK) {
        keel_text_add(t, map.data, map.len_bytes);
        keel_map_close(&map);
    }
    return st;
}

static bool loss_data(struct keel_text *csv, const char *dir)
{
    static const keel_log quiet = { .level = 0 };
    char path[4200];
    struct keel_map map;
    size_t n = 0;
    snprintf(path, sizeof path, "%s/train/log.jsonl", dir);
    if (keel_map_open(&map, path, &quiet) != KEEL_OK) {
        return false;
    }
    keel_text_addf(csv, "step,loss,lr,grad_norm\n");
    struct keel_jsonl r = keel_jsonl_make(map.data, map.len_bytes, path, &quiet);
    struct keel_row row;
    while (keel_jsonl_next(&r, &row) == KEEL_OK && row.object) {
        keel_text_addf(csv, "%lld,%.6g,%.6g,%.6g\n", (long long)json_integer_value(json_object_get(row.object, "step")),
                       json_number_value(json_object_get(row.object, "loss")), json_number_value(json_object_get(row.object, "lr")),
                       json_number_value(json_object_get(row.object, "grad_norm")));
        json_decref(row.object);
        n++;
    }
    keel_map_close(&map);
    return n > 0;
}

static bool kl_data(struct keel_text *csv, const struct keel_drift *d)
{
    size_t n = 0;
    keel_text_addf(csv, "position,kl,lo,hi,n\n");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric == KEEL_METRIC_KL_AT && isfinite(r->adapted.lo)) {
            keel_text_addf(csv, "%u,%.6g,%.6g,%.6g,%zu\n", r->position, r->adapted.value, r->adapted.lo, r->adapted.hi, r->n);
            n++;
        }
    }
    return n > 0;
}

static bool margin_data(struct keel_text *csv, const struct keel_drift *d)
{
    size_t n = 0;
    keel_text_addf(csv, "row,domain,n,base,base_lo,base_hi,adapted,adapted_lo,adapted_hi\n");
    for (size_t i = 0; i < d->n; i++) {
        const struct keel_drift_row *r = &d->row[i];
        if (r->metric != KEEL_METRIC_MARGIN || !isfinite(r->base.lo)) {
            continue;
        }
        char label[64];
        snprintf(label, sizeof label, "%s", strcmp(r->domain, "other") == 0 ? "other domains" : r->domain);
        for (char *c = label; *c; c++) {
            *c = *c == '"' || *c == ',' || *c == '_' || *c == '\\' ? ' ' : *c; // nothing that CSV or gnuplot takes for markup
        }
        keel_text_addf(csv, "%zu,%s,%zu,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g\n", n++, label, r->n, r->base.value, r->base.lo, r->base.hi,
                       r->adapted.value, r->adapted.lo, r->adapted.hi);
    }
    return n > 0;
}

static void script(struct keel_text *gp, enum keel_plot plot, bool narrow, size_t rows)
{
    const int height = plot == KEEL_PLOT_MARGIN ? 130 + (int)rows * (narrow ? 34 : 32) : 340;
    keel_text_addf(gp,
                   "set terminal svg size %d,%d dynamic font 'sans-serif,%d' background '#ffffff'\n"
                   "set output '%s-%s.svg'\nset datafile separator ','\nset border 3 lc rgb '#555555'\nset tics nomirror\n"
                   "set grid back lc rgb '#dddddd'\nset key %s\nblue='#0072B2'\norange='#D55E00'\n",
                   narrow ? 380 : 860, height, narrow ? 13 : 14, plot_name[plot], narrow ? "narrow" : "wide",
                   "outside top left horizontal samplen 1.5 width -1");
    switch (plot) {
    case KEEL_PLOT_LOSS:
        keel_text_addf(gp, "set xlabel 'optimiser step'\nset ylabel 'loss (nats per answer token)'\nset yrange [0:*]\n"
                           "plot 'loss.csv' skip 1 using 1:2 with linespoints lc rgb blue lw 2 pt 7 ps 0.4 title 'training loss'\n");
        break;
    case KEEL_PLOT_KL:
        keel_text_addf(gp, "set xlabel 'position in the answer (tokens)'\nset ylabel 'KL to the base (nats)'\nset yrange [0:*]\nset xrange "
                           "[0.5:%u.5]\nset xtics %d\n"
                           "plot 'kl_profile.csv' skip 1 using 1:3:4 with filledcurves fc rgb blue fs transparent solid 0.2 noborder "
                           "title '95%% interval', '' skip 1 using 1:2 with linespoints lc rgb blue lw 2 pt 7 ps 0.6 title 'mean'\n",
                       KEEL_PROFILE_LEN, narrow ? 3 : 1);
        break;
    default:
        keel_text_addf(gp, "set xlabel 'margin (nats per token)'\nset yrange [%zu.5:-0.5]\nset rmargin 3\n"
                           "set arrow from 0,graph 0 to 0,graph 1 nohead lc rgb '#555555' dt 2\n"
                           "plot 'margin.csv' skip 1 using 4:($1-0.13):5:6:ytic(2) with xerrorbars lc rgb blue lw 2 pt 7 ps 0.7 title 'base', "
                           "'' skip 1 using 7:($1+0.13):8:9 with xerrorbars lc rgb orange lw 2 pt 5 ps 0.7 title 'fine-tuned'\n",
                       rows - 1);
    }
}

static size_t count_lines(const struct keel_text *t)
{
    size_t n = 0;
    for (size_t i = 0; i < t->len; i++) {
        n += t->data[i] == '\n';
    }
    return n;
}

// Writes one script that changes into the plot folder, and runs it.
static keel_status draw(struct keel_plots *out, const char *dir, enum keel_plot plot, bool narrow, size_t rows, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_text gp = { 0 }, cd = { 0 };
    char path[4200], svg[4300];
    keel_text_addf(&gp, "# run inside this folder: gnuplot %s-%s.gp\n", plot_name[plot], narrow ? "narrow" : "wide");
    script(&gp, plot, narrow, rows);
    snprintf(path, sizeof path, "%s/plots/%s-%s.gp", dir, plot_name[plot], narrow ? "narrow" : "wide");
    snprintf(svg, sizeof svg, "%s/plots/%s-%s.svg", dir, plot_name[plot], narrow ? "narrow" : "wide");
    KEEL_TRY(keel_text_save(&gp, path, log));
    keel_text_addf(&cd, "cd '%s/plots'", dir);
    char *argv[] = { "gnuplot", "-e", cd.data, strrchr(path, '/') + 1, NULL };
    remove(svg);
    if (strchr(dir, '\'') || keel_run_program(argv) != 0 || !keel_path_exists(svg)) {
        out->no_gnuplot = true;
        goto out;
    }
    KEEL_TRY(keel_text_add_file(&out->svg[plot][narrow], svg, log));
out:
    keel_text_finish(&gp);
    keel_text_finish(&cd);
    return st;
}

keel_status keel_plots_make(struct keel_plots *out, const struct keel_drift *d, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_text csv = { 0 };
    *out = (struct keel_plots){ 0 };
    snprintf(path, sizeof path, "%s/plots", dir);
    KEEL_TRY(keel_make_dirs(path, log));
    for (int i = 0; i < KEEL_N_PLOTS; i++) {
        keel_text_finish(&csv);
        out->has_data[i] = i == KEEL_PLOT_LOSS ? loss_data(&csv, dir) : i == KEEL_PLOT_KL ? kl_data(&csv, d) : margin_data(&csv, d);
        if (!out->has_data[i]) {
            continue;
        }
        snprintf(path, sizeof path, "%s/plots/%s.csv", dir, plot_name[i]);
        KEEL_TRY(keel_text_save(&csv, path, log));
        for (int narrow = 0; narrow < 2; narrow++) {
            KEEL_TRY(draw(out, dir, (enum keel_plot)i, narrow, count_lines(&csv) - 1, log));
        }
    }
out:
    keel_text_finish(&csv);
    return st;
}

void keel_plots_finish(struct keel_plots *p)
{
    for (int i = 0; i < KEEL_N_PLOTS; i++) {
        keel_text_finish(&p->svg[i][0]);
        keel_text_finish(&p->svg[i][1]);
    }
}
