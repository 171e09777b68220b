// SPDX-License-Identifier: MIT
// eval/figure.c: draws figures by gnuplot: CSV data, a script, an SVG in a wide and a narrow form. Colours: Okabe & Ito 2008.
#include "eval.h"

#include "platform.h"

#include <stdio.h>
#include <string.h>

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

struct keel_figure *keel_figure_add(struct keel_figures *f, const char *name, const char *title, const char *sentence)
{
    KEEL_ASSERT(f->n < KEEL_COUNT(f->at));
    struct keel_figure *g = &f->at[f->n++];
    *g = (struct keel_figure){ .title = title, .sentence = sentence, .height = { 340, 340 } };
    snprintf(g->name, sizeof g->name, "%s", name);
    return g;
}

bool keel_figures_full(const struct keel_figures *f)
{
    return f->n + 24 >= KEEL_COUNT(f->at);
}

void keel_figure_label(char out[96], const char *text)
{
    size_t n = 0;
    for (; *text && n < 95; text++) {
        const bool space = strchr(" \",_\\^{}@&~'", *text) || (unsigned char)*text < 32;
        if (!space || (n > 0 && out[n - 1] != ' ')) {
            out[n++] = space ? ' ' : *text;
        }
    }
    out[n] = 0;
}

static void head(struct keel_text *gp, const struct keel_figure *g, bool narrow)
{
    const char *form = narrow ? "narrow" : "wide";
    keel_text_addf(gp,
                   "# run inside this folder: gnuplot %s-%s.gp\n"
                   "set terminal svg size %d,%d dynamic font 'sans-serif,%d' background '#ffffff'\n"
                   "set output '%s-%s.svg'\nset datafile separator ','\nset border 3 lc rgb '#555555'\nset tics nomirror\n"
                   "set grid back lc rgb '#dddddd'\nset key outside top left horizontal samplen 1.5 width -1\n"
                   "blue='#0072B2'\norange='#D55E00'\ngreen='#009E73'\npink='#CC79A7'\ngrey='#555555'\n",
                   g->name, form, narrow ? 380 : 860, g->height[narrow], narrow ? 13 : 14, g->name, form);
}

// Writes one script that changes into the plot folder, and runs it.
static keel_status draw(struct keel_figures *f, struct keel_figure *g, const char *dir, bool narrow, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_text gp = { 0 }, cd = { 0 };
    char path[4200], svg[4300];
    head(&gp, g, narrow);
    keel_text_add(&gp, g->script[narrow].data, g->script[narrow].len);
    snprintf(path, sizeof path, "%s/plots/%s-%s.gp", dir, g->name, narrow ? "narrow" : "wide");
    snprintf(svg, sizeof svg, "%s/plots/%s-%s.svg", dir, g->name, narrow ? "narrow" : "wide");
    KEEL_TRY(keel_text_save(&gp, path, log));
    keel_text_addf(&cd, "cd '%s/plots'", dir);
    char *argv[] = { "gnuplot", "-e", cd.data, strrchr(path, '/') + 1, NULL };
    remove(svg);
    if (strchr(dir, '\'') || keel_run_program(argv) != 0 || !keel_path_exists(svg)) {
        f->no_gnuplot = true;
        goto out;
    }
    KEEL_TRY(keel_text_add_file(&g->svg[narrow], svg, log));
out:
    keel_text_finish(&gp);
    keel_text_finish(&cd);
    return st;
}

keel_status keel_figures_draw(struct keel_figures *f, const char *dir, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200];
    snprintf(path, sizeof path, "%s/plots", dir);
    KEEL_TRY(keel_make_dirs(path, log));
    for (size_t i = 0; i < f->n; i++) {
        snprintf(path, sizeof path, "%s/plots/%s.csv", dir, f->at[i].name);
        KEEL_TRY(keel_text_save(&f->at[i].csv, path, log));
        for (int narrow = 0; narrow < 2; narrow++) {
            KEEL_TRY(draw(f, &f->at[i], dir, narrow, log));
        }
    }
out:
    return st;
}

void keel_figures_finish(struct keel_figures *f)
{
    for (size_t i = 0; i < f->n; i++) {
        struct keel_figure *g = &f->at[i];
        keel_text_finish(&g->csv);
        for (int k = 0; k < 2; k++) {
            keel_text_finish(&g->script[k]);
            keel_text_finish(&g->svg[k]);
        }
    }
    f->n = 0;
}
