// SPDX-License-Identifier: MIT
// study/check.c: what a study says of steering, directions, layers and watches, held against model and files before anything runs:
// what is wrong in a late stage must not be found when the trainings before it are done. Hooks are made of all words and thrown away;
// directions that the study has yet to make are stood in for.
#include "along.h"
#include "run.h"
#include "study_yaml.h"

#include <keel/steer.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// --- places --------------------------------------------------------------------------------------

// Messages from now on begin with the line and name of `key` of an entry of a list ("stages", "directions"), or, with `list` NULL, of
// the section `sub`.
static void look_at(struct study *s, const char *list, const char *name, const char *sub, const char *key)
{
    const struct study_source whole = { .data = s->config.data, .name = s->p->file, .len = s->config.len };
    const struct study_source from = list ? keel_study_entry(&whole, list, name) : whole;
    char section[80];
    snprintf(section, sizeof section, list ? "%s: %.40s%s%s" : "%.0s%.0s%.0s%s", list ? list : "", list ? name : "", list && sub ? ": " : "",
             sub ? sub : "");
    keel_study_place(s->place, sizeof s->place, &from, section, key);
}

// As a function that ends a check, with its result.
static keel_status looked(struct study *s, keel_status st)
{
    s->place[0] = 0;
    return st;
}

// --- words ---------------------------------------------------------------------------------------

static keel_status parse(const struct study *s, struct keel_steer_words *w, const char *words)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_steer_parse(w, words, s->log));
    if (w->site >= KEEL_SITE_TOWER) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: site=%s is in the vision tower, and a study steers the language model only", words,
                  keel_site_name[w->site]);
    }
out:
    return st;
}

static keel_status parse_all(struct study *s, char *const *words, size_t n)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < n && st == KEEL_OK; i++) {
        struct keel_steer_words w = { 0 };
        st = parse(s, &w, words[i]);
        keel_steer_words_finish(&w);
    }
    return st;
}

// What the directions that `d` will make are known to have: layers, width, a median norm, and none along another's.
static keel_status stand_in(struct keel_directions *out, const struct study *s, const struct study_direction *d)
{
    keel_status st = KEEL_OK;
    const struct keel_model_info *info = keel_model_info(s->model);
    const uint32_t number = (uint32_t)(d - s->file->direction);
    uint8_t *use = calloc(info->n_layers + 1, 1);
    *out = (struct keel_directions){ .width = info->width, .site = KEEL_SITE_POST, .at = calloc(info->n_layers + 1, sizeof *out->at) };
    if (!use || !out->at) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a direction");
    }
    while (d->random_like) {
        d = keel_study_find_direction(s->file, d->random_like);
    }
    KEEL_TRY(keel_layers_parse(d->layers, use, info->n_layers, s->log));
    for (uint32_t i = 0; i < info->n_layers; i++) {
        float *v = use[i] ? calloc(info->width, sizeof *v) : NULL;
        if (use[i] && !v) {
            KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a direction");
        }
        if (use[i]) {
            v[number % info->width] = 1;
            out->at[out->n++] = (struct keel_direction){ .layer = i, .k = 1, .v = v, .median_norm = 1 };
        }
    }
out:
    free(use);
    return st;
}

// The directions that words or a file name begin with. The caller finishes them, also after an error.
static keel_status directions_of(struct keel_directions *out, const struct study *s, const char *words, const char *file)
{
    const struct study_direction *made = keel_study_find_direction(s->file, words);
    char path[4200];
    if (made) {
        return stand_in(out, s, made);
    }
    keel_study_path(path, s->folder, file);
    return keel_directions_read(out, path, s->log);
}

static keel_status hook_one(const struct study *s, keel_hooks *hooks, const char *words)
{
    keel_status st = KEEL_OK;
    struct keel_steer_words w = { 0 };
    struct keel_directions d = { 0 };
    KEEL_TRY(parse(s, &w, words));
    KEEL_TRY(directions_of(&d, s, words, w.file));
    if (w.site < 0 && d.site >= KEEL_SITE_TOWER) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: its directions are at %s in the vision tower, and a study steers the language model only", words,
                  keel_site_name[d.site]);
    }
    KEEL_TRY(keel_steer_add_directions(hooks, s->model, &w, &d));
out:
    keel_steer_words_finish(&w);
    keel_directions_finish(&d);
    return st;
}

static keel_status hook_all(struct study *s, char *const *words, size_t n)
{
    keel_status st = KEEL_OK;
    keel_hooks *hooks = NULL;
    KEEL_TRY(keel_hooks_create(&hooks, s->model));
    for (size_t i = 0; i < n; i++) {
        KEEL_TRY(hook_one(s, hooks, words[i]));
    }
out:
    keel_hooks_destroy(&hooks);
    return st;
}

// All lists of words of the study, each with its place. Those that a stage takes over from `train` count once.
static keel_status each_list(struct study *s, keel_status (*fn)(struct study *s, char *const *words, size_t n))
{
    keel_status st = KEEL_OK;
    const struct study_file *f = s->file;
    look_at(s, NULL, NULL, "train", "steer");
    KEEL_TRY(fn(s, f->train.steer, f->train.n_steer));
    for (size_t i = 0; i < f->n_stages; i++) {
        const struct study_stage *stage = &f->stage[i];
        char words[4200], layers[24], *dose[] = { words };
        look_at(s, "stages", stage->group, NULL, "steer");
        if (stage->kind == STUDY_MAP) { // "all" are here those of the model, each of which gets its doses
            const bool all = s->model && strcmp(stage->map.layers, "all") == 0;
            snprintf(layers, sizeof layers, "0-%u", s->model ? keel_model_info(s->model)->n_layers - 1 : 0);
            keel_study_dose_words(words, stage, stage->map.coef[0], all ? layers : stage->map.layers);
        }
        KEEL_TRY(stage->kind == STUDY_MAP ? fn(s, dose, 1) : fn(s, stage->steer, stage->n_steer));
        if (stage->train.steer != f->train.steer) {
            look_at(s, "stages", stage->group, "train", "steer");
            KEEL_TRY(fn(s, stage->train.steer, stage->train.n_steer));
        }
    }
out:
    return looked(s, st);
}

keel_status keel_study_check_words(struct study *s)
{
    return each_list(s, parse_all);
}

// --- layers --------------------------------------------------------------------------------------

static keel_status check_layers(const struct study *s, const char *layers)
{
    keel_status st = KEEL_OK;
    const uint32_t n = keel_model_info(s->model)->n_layers;
    uint8_t *use = calloc(n + 1, 1);
    if (!use) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a list of layers");
    }
    KEEL_TRY(keel_layers_parse(layers, use, n, s->log));
out:
    free(use);
    return st;
}

static keel_status check_monitor(const struct study *s, const char *words)
{
    keel_status st = KEEL_OK;
    struct keel_steer_words w = { 0 };
    struct keel_directions d = { 0 };
    const struct keel_direction *one;
    KEEL_TRY(keel_steer_parse_one(&w, words, s->log));
    KEEL_TRY(directions_of(&d, s, words, w.file));
    KEEL_TRY(keel_steer_project_check(&d, s->model, s->log));
    KEEL_TRY(keel_directions_one(&one, &d, &w, s->log));
out:
    keel_steer_words_finish(&w);
    keel_directions_finish(&d);
    return st;
}

static keel_status check_train(struct study *s, const char *stage, const struct study_train *t)
{
    keel_status st = KEEL_OK;
    const uint32_t context = keel_model_info(s->model)->context;
    const char *list = stage ? "stages" : NULL;
    if (t->layers) {
        look_at(s, list, stage, "train", "layers");
        KEEL_TRY(check_layers(s, t->layers));
    }
    if (t->monitor_direction) {
        look_at(s, list, stage, "train", "monitor_direction");
        KEEL_TRY(check_monitor(s, t->monitor_direction));
    }
    look_at(s, list, stage, "train", "seq_len");
    if (context > 0 && t->seq_len > context) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%u is above the model's context of %u tokens", t->seq_len, context);
    }
out:
    return st;
}

static keel_status check_trainings(struct study *s)
{
    keel_status st = KEEL_OK;
    const struct study_file *f = s->file;
    KEEL_TRY(check_train(s, NULL, &f->train));
    for (size_t i = 0; i < f->n_stages; i++) {
        if (f->stage[i].kind == STUDY_TRAIN) {
            KEEL_TRY(check_train(s, f->stage[i].group, &f->stage[i].train));
        }
    }
out:
    return st;
}

static keel_status check_directions(struct study *s)
{
    keel_status st = KEEL_OK;
    struct keel_positions at;
    for (size_t i = 0; i < s->file->n_directions; i++) {
        const struct study_direction *d = &s->file->direction[i];
        const struct keel_direction_params how = { .method = d->method, .k = 1, .paired = true };
        look_at(s, "directions", d->name, NULL, "layers");
        KEEL_TRY(check_layers(s, d->layers));
        look_at(s, "directions", d->name, NULL, "at");
        KEEL_TRY(d->at ? keel_positions_parse(d->at, &at, s->log) : KEEL_OK);
        look_at(s, "directions", d->name, NULL, "method");
        KEEL_TRY(keel_directions_check(&how, s->log));
    }
out:
    return st;
}

static keel_status check_projection(struct study *s)
{
    keel_status st = KEEL_OK;
    const struct study_projection *p = &s->file->eval.projection;
    struct keel_directions d = { 0 };
    struct keel_positions at;
    if (!p->directions) {
        return KEEL_OK;
    }
    look_at(s, NULL, NULL, "eval", "projection");
    KEEL_TRY(keel_positions_parse(p->at, &at, s->log));
    KEEL_TRY(directions_of(&d, s, p->directions, p->directions));
    KEEL_TRY(keel_steer_project_check(&d, s->model, s->log));
    KEEL_TRY(keel_along_choose(&d, &(struct keel_measure_along){ .directions = p->directions, .layer = p->layer, .any_layer = p->any_layer },
                               s->log));
out:
    keel_directions_finish(&d);
    return st;
}

static keel_status check_watch(struct study *s, const struct study_stage *stage)
{
    keel_status st = KEEL_OK;
    const struct study_watch *w = &stage->watch;
    struct keel_probes p = { 0 };
    char path[4200];
    keel_study_path(path, s->folder, s->file->eval.slots);
    look_at(s, "stages", stage->group, "watch", "domain");
    KEEL_TRY(keel_probes_read(&p, path, NULL, true, s->log));
    KEEL_TRY(keel_probes_keep(&p, &(struct keel_probe_cell){ w->domain, s->file->narrow_domain, w->modality }));
out:
    keel_probes_finish(&p);
    return st;
}

keel_status keel_study_check_model(struct study *s)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(check_directions(s));
    KEEL_TRY(check_trainings(s));
    KEEL_TRY(check_projection(s));
    for (size_t i = 0; i < s->file->n_stages; i++) {
        KEEL_TRY(s->file->stage[i].watch.every > 0 ? check_watch(s, &s->file->stage[i]) : KEEL_OK);
    }
    KEEL_TRY(each_list(s, hook_all));
out:
    return looked(s, st);
}
