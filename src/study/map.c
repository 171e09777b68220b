// SPDX-License-Identifier: MIT
// study/map.c: a map of doses: the slot probes under one direction, added at each of several layers with each of several coefficients
// (science notes 4, E6). One session serves all; a record file that exists is not measured again.
#include "measure.h"
#include "platform.h"
#include "run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct dose {
    double coef;
    uint32_t layer;
};

void keel_study_dose_words(char out[4200], const struct study_stage *stage, double coef, const char *layers)
{
    const char *words = stage->steer[0];
    const size_t file = strcspn(words, ",");
    snprintf(out, 4200, "%.*s:%g%s@%s%s", (int)file, words, coef, stage->percent ? "%" : "", layers, words + file);
}

struct map_run {
    struct study *s;
    const struct study_folder *folder;
    const struct study_stage *stage;
    struct study_state *state;
    struct keel_measure m;
    uint32_t cell, n_cells; // of those without a record file
};

static bool map_tokens(void *user, uint64_t done, uint64_t total)
{
    const struct map_run *r = user;
    return keel_study_tokens(r->s, r->cell * total + done, r->n_cells * total);
}

// The record file of a cell; without a dose of the state as it is.
static void cell_path(char out[4200], const struct map_run *r, const struct dose *d)
{
    char rel[96] = "map/unsteered.jsonl";
    if (d) {
        snprintf(rel, sizeof rel, "map/layer-%u_coef-%g.jsonl", d->layer, d->coef);
    }
    keel_study_path(out, r->folder->path, rel);
}

static keel_status measure_cell(struct map_run *r, const struct dose *d)
{
    keel_status st = KEEL_OK;
    const struct keel_measure_slots how = { .max_rows = r->stage->map.probes, .seed = r->s->file->seed };
    char from[4200], to[4200], words[4200], layer[16], *list[] = { words };
    keel_hooks *hooks = NULL;
    cell_path(to, r, d);
    if (keel_path_exists(to)) {
        return KEEL_OK;
    }
    if (d) {
        snprintf(layer, sizeof layer, "%u", d->layer);
        keel_study_dose_words(words, r->stage, d->coef, layer);
        r->state->steer = list;
        r->state->n_steer = 1;
    }
    keel_study_path(from, r->s->folder, r->s->file->eval.slots);
    KEEL_TRY(keel_study_hooks(r->s, r->state, &hooks));
    KEEL_TRY(keel_session_set_hooks(r->m.session, hooks));
    KEEL_TRY(keel_measure_slots(&r->m, from, to, &how));
    r->cell++;
out:
    r->state->steer = NULL;
    r->state->n_steer = 0;
    const keel_status off = keel_session_set_hooks(r->m.session, NULL);
    keel_hooks_destroy(&hooks);
    return st == KEEL_OK ? off : st;
}

static keel_status count_cell(struct map_run *r, const struct dose *d)
{
    char path[4200];
    cell_path(path, r, d);
    r->n_cells += !keel_path_exists(path);
    return KEEL_OK;
}

// All cells of the map, the one without a dose first.
static keel_status each_cell(struct map_run *r, const uint8_t *use, uint32_t n_layers, keel_status (*visit)(struct map_run *, const struct dose *))
{
    keel_status st = visit(r, NULL);
    for (uint32_t layer = 0; layer < n_layers; layer++) {
        for (unsigned k = 0; st == KEEL_OK && use[layer] && k < r->stage->map.n_coef; k++) {
            st = visit(r, &(struct dose){ r->stage->map.coef[k], layer });
        }
    }
    return st;
}

// What the map is of, for the report.
static void describe(struct study_folder *folder, const struct study_stage *stage, const uint8_t *use, uint32_t n_layers)
{
    json_t *coef = json_array(), *layer = json_array();
    for (unsigned i = 0; i < stage->map.n_coef; i++) {
        json_array_append_new(coef, json_real(stage->map.coef[i]));
    }
    for (uint32_t i = 0; i < n_layers; i++) {
        if (use[i]) {
            json_array_append_new(layer, json_integer(i));
        }
    }
    json_object_set_new(folder->manifest, "map", json_pack("{s:s, s:o, s:o, s:b}", "steer", stage->steer[0], "coef", coef, "layer", layer,
                                                           "percent", stage->percent));
}

keel_status keel_study_map(struct study *s, struct study_folder *folder, const struct study_stage *stage, struct study_state *state)
{
    keel_status st = KEEL_OK;
    keel_session *session = NULL;
    keel_hooks *none = NULL;
    const uint64_t t0 = keel_now_ns();
    const uint32_t n_layers = keel_model_info(s->model)->n_layers;
    uint8_t *use = calloc(n_layers + 1, 1);
    if (!use) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a map");
    }
    KEEL_TRY(keel_layers_parse(stage->map.layers, use, n_layers, s->log));
    describe(folder, stage, use, n_layers);
    KEEL_TRY(keel_study_folder_save(folder));
    keel_device_reset_peak(s->dev);
    KEEL_TRY(keel_study_session(s, state, &session, &none));
    struct map_run run = { .s = s, .folder = folder, .stage = stage, .state = state };
    run.m = (struct keel_measure){ session, s->model, s->images, s->file->eval.chat, map_tokens, &run, s->log };
    s->stage = "map";
    KEEL_TRY(each_cell(&run, use, n_layers, count_cell));
    KEEL_TRY(each_cell(&run, use, n_layers, measure_cell));
    KEEL_TRY(keel_study_folder_mark(folder, "map", t0, s->dev));
out:
    keel_session_destroy(&session);
    keel_hooks_destroy(&none);
    free(use);
    return st;
}
