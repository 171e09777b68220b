// SPDX-License-Identifier: MIT
// study/watch.c: a training that is watched: done in parts of some steps, with a small evaluation after each, until a limit is
// reached or the steps are done. State on disk makes the parts one training, so that it may be stopped anywhere.
#include "measure.h"
#include "probes.h"
#include "run.h"

#include <math.h>
#include <string.h>

#define WATCH_FILE "train/watch.jsonl"

// Lines of the file, which is there or not: {"step","n","contrary","coherence","projection"?}.
static json_t *read_lines(const struct study_folder *folder)
{
    char path[4200];
    json_t *list = json_array(), *line;
    keel_study_path(path, folder->path, WATCH_FILE);
    FILE *f = fopen(path, "rbe");
    while (f && (line = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL))) {
        json_array_append_new(list, line);
    }
    if (f) {
        fclose(f);
    }
    return list;
}

// The line of a step, or NULL.
static const json_t *find_line(const json_t *lines, uint64_t step)
{
    size_t i;
    const json_t *line;
    json_array_foreach(lines, i, line)
    {
        if ((uint64_t)json_integer_value(json_object_get(line, "step")) == step) {
            return line;
        }
    }
    return NULL;
}

static keel_status save_lines(const struct study_folder *folder, const json_t *lines, const keel_log *log)
{
    char path[4200];
    keel_study_path(path, folder->path, WATCH_FILE);
    return keel_probes_write(lines, path, log);
}

// Adds the line of a step, measured in `state`.
static keel_status measure(struct study *s, const struct study_folder *folder, const struct study_watch *w, uint64_t step,
                           const struct study_state *state, json_t *lines)
{
    keel_status st = KEEL_OK;
    keel_session *session = NULL;
    keel_hooks *hooks = NULL;
    char probes[4200], directions[4200];
    struct keel_cell_means mean;
    const struct study_projection *p = &s->file->eval.projection;
    const struct keel_measure_along along = { .directions = directions, .at = p->at, .layer = p->layer, .any_layer = p->any_layer };
    const struct keel_measure_cell cell = { .domain = w->domain,
                                            .narrow = s->file->narrow_domain,
                                            .modality = w->modality,
                                            .max_rows = w->probes,
                                            .seed = s->file->seed,
                                            .along = p->directions ? &along : NULL };
    keel_study_path(probes, s->folder, s->file->eval.slots);
    keel_study_direction_path(s, directions, p->directions ? p->directions : "");
    KEEL_TRY(keel_study_session(s, state, &session, &hooks));
    s->stage = "watch";
    const struct keel_measure m = { session, s->model, s->images, s->file->eval.chat, NULL, NULL, s->log };
    KEEL_TRY(keel_measure_cell(&m, probes, &cell, &mean));
    json_t *line = json_pack("{s:I, s:I, s:f, s:f}", "step", (json_int_t)step, "n", (json_int_t)mean.n, "contrary", mean.contrary,
                             "coherence", mean.coherence);
    if (!isnan(mean.projection)) {
        json_object_set_new(line, "projection", json_real(mean.projection));
    }
    json_array_append_new(lines, line);
    KEEL_TRY(save_lines(folder, lines, s->log));
out:
    keel_session_destroy(&session);
    keel_hooks_destroy(&hooks);
    return st;
}

static bool reached(const struct study_watch *w, const json_t *line)
{
    const double v = json_number_value(json_object_get(line, "contrary"));
    return v >= w->above || v <= w->below; // false for a limit that is NAN
}

keel_status keel_study_watched(struct study *s, struct study_folder *folder, const struct study_watch *w, struct study_training *t,
                               const char *adapter, const struct study_state *after)
{
    keel_status st = KEEL_OK;
    json_t *lines = read_lines(folder);
    const uint64_t n = t->train->steps;
    s->n_steps = n;
    t->steps = 0;
    if (!find_line(lines, 0)) {
        KEEL_TRY(measure(s, folder, w, 0, t->from, lines));
    }
    t->no_steps = reached(w, find_line(lines, 0));
    while (t->steps < n && !reached(w, find_line(lines, t->steps))) {
        t->steps = KEEL_MIN(t->steps + w->every, n);
        if (!find_line(lines, t->steps)) {
            KEEL_TRY(keel_study_train(s, folder, t, adapter));
            KEEL_TRY(measure(s, folder, w, t->steps, after, lines));
        }
    }
    if (!json_object_get(folder->manifest, "training")) { // no step was needed, or all were done when the study was stopped: says what it was
        KEEL_TRY(keel_study_train(s, folder, t, adapter));
    }
    json_object_set_new(folder->manifest, "watch",
                        json_pack("{s:b, s:I}", "reached", reached(w, find_line(lines, t->steps)), "steps", (json_int_t)t->steps));
out:
    s->n_steps = 0;
    json_decref(lines);
    return st;
}
