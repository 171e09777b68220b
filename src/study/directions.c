// SPDX-License-Identifier: MIT
// study/directions.c: the directions that a study makes: between the same prompts under two system messages (persona vectors, arXiv
// 2507.21509, at the prompt's end or over answers: persona.c), from the base model to where a stage moved it on the same rows (science notes 2.2, base-referenced
// shift), and random ones of the same lengths as their control. Methods and checks: steer room.
#include "along.h"
#include "platform.h"
#include "run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Those of a stage are of a run.
static const struct study_folder *folder_of(const struct study *s, const struct study_direction *d)
{
    return d->after == STUDY_NO_STAGE ? &s->top : s->run;
}

static void direction_file(const struct study *s, char out[4200], const struct study_direction *d)
{
    char rel[80];
    snprintf(rel, sizeof rel, "directions/%.40s.safetensors", d->name);
    keel_study_path(out, folder_of(s, d)->path, rel);
}

void keel_study_direction_path(const struct study *s, char out[4200], const char *words)
{
    const struct study_direction *d = keel_study_find_direction(s->file, words);
    if (!d) {
        keel_study_path(out, s->folder, words);
        return;
    }
    direction_file(s, out, d);
    const size_t used = strlen(out);
    snprintf(out + used, 4200 - used, "%s", words + strlen(d->name));
}

// --- rows ----------------------------------------------------------------------------------------

keel_status keel_along_under(struct keel_probes *p, size_t i, const char *system)
{
    const struct keel_row row = keel_probes_row(p, i);
    json_t *ask = json_object_get(row.object, KEEL_ROW_ASK), *list = json_object_get(ask, "messages");
    json_t *turns = json_pack("[{s:s, s:s}]", "role", "system", "content", system), *turn;
    size_t k;
    json_array_foreach(list, k, turn)
    {
        const char *role = json_string_value(json_object_get(turn, "role"));
        const bool answer = k + 1 == json_array_size(list) && role && strcmp(role, "assistant") == 0;
        if (role && strcmp(role, "system") == 0) {
            json_decref(turns);
            KEEL_ERROR(row.log, "%s:%llu: has a system message of its own, beside those of the study's directions", row.file,
                       (unsigned long long)row.line);
            return KEEL_ERR_DATA;
        }
        if (!answer) {
            json_array_append(turns, turn);
        }
    }
    if (!list) {
        json_array_append_new(turns, json_pack("{s:s, s:O}", "role", "user", "content", json_object_get(ask, "prompt")));
        json_object_del(ask, "prompt");
    }
    json_object_set_new(ask, "messages", turns);
    return KEEL_OK;
}

static keel_status capture(struct keel_capture *out, const struct keel_measure *m, const char *rows, const char *system,
                           const struct keel_capture_params *params)
{
    keel_status st = KEEL_OK;
    struct keel_probes p = { 0 };
    struct keel_along a = { 0 };
    KEEL_TRY(keel_probes_read(&p, rows, NULL, false, m->log));
    for (size_t i = 0; i < keel_probes_count(&p); i++) {
        KEEL_TRY(keel_along_under(&p, i, system));
    }
    KEEL_TRY(keel_along_rows(&a, m, &p, NULL, keel_probes_count(&p)));
    KEEL_TRY(keel_capture_run(out, m->session, &a.rows, params, m->progress, m->user));
out:
    keel_along_finish(&a);
    keel_probes_finish(&p);
    return st;
}

// --- making --------------------------------------------------------------------------------------

// Activations of the rows in a state of the model.
static keel_status capture_in(struct keel_capture *out, struct study *s, const struct study_state *state, const struct study_direction *y,
                              struct keel_capture_params *params)
{
    keel_status st = KEEL_OK;
    char file[4200];
    keel_session *session = NULL;
    keel_hooks *hooks = NULL;
    struct keel_steer_rows rows = { 0 };
    keel_study_path(file, s->folder, y->rows);
    KEEL_TRY(keel_study_session(s, state, &session, &hooks)); // before the rows are read: their images may change with the state
    KEEL_TRY(keel_steer_rows_read(&rows, s->model, s->images, file, s->log));
    KEEL_TRY(keel_positions_parse(y->at ? y->at : rows.n_responses == rows.n ? "response" : "last_prompt", &params->at, s->log));
    s->stage = "directions";
    KEEL_TRY(keel_capture_run(out, session, &rows, params, keel_study_tokens, s));
out:
    keel_session_destroy(&session);
    keel_hooks_destroy(&hooks);
    keel_steer_rows_finish(&rows);
    return st;
}

// Over answers under the two system messages.
static keel_status capture_answers(struct keel_capture out[2], struct study *s, const struct keel_measure *m, const struct study_direction *y,
                                   const char *rows, const struct keel_capture_params *params)
{
    keel_status st = KEEL_OK;
    char rel[96], record[4200];
    size_t all, kept;
    snprintf(rel, sizeof rel, "directions/%.40s.answers.jsonl", y->name);
    keel_study_path(record, folder_of(s, y)->path, rel);
    KEEL_TRY(keel_persona_capture(out, m,
                                  &(struct keel_persona){ .name = y->name,
                                                          .rows = rows,
                                                          .system = { y->positive, y->negative },
                                                          .n_tokens = y->answers,
                                                          .samples = y->samples,
                                                          .seed = s->file->seed,
                                                          .record = record },
                                  params, &all, &kept));
    KEEL_INFO(s->log, "direction %s: of %zu of %zu pairs of answers", y->name, kept, all);
out:
    return st;
}

// Between two system messages, or between a stage and the base model.
static keel_status between(struct keel_directions *d, struct study *s, const struct study_direction *y, const struct study_state *state)
{
    static const struct study_state base = { .n_adapters = 0 };
    keel_status st = KEEL_OK;
    char rows[4200];
    const uint32_t n_layers = keel_model_info(s->model)->n_layers;
    uint8_t *layers = calloc(n_layers + 1, 1);
    struct keel_capture_params params = { .site = KEEL_SITE_POST, .layers = layers };
    const struct keel_direction_params how = { .method = y->method, .k = 1, .paired = true, .seed = s->file->seed };
    struct keel_capture side[2] = { { 0 } }, *positive = &side[0], *negative = &side[1];
    keel_session *session = NULL;
    keel_hooks *hooks = NULL;
    if (!layers) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a direction");
    }
    KEEL_TRY(keel_layers_parse(y->layers, layers, n_layers, s->log));
    if (y->shift) {
        KEEL_TRY(capture_in(negative, s, &base, y, &params));
        KEEL_TRY(capture_in(positive, s, state, y, &params));
    } else {
        KEEL_TRY(keel_positions_parse(y->at, &params.at, s->log));
        keel_study_path(rows, s->folder, y->rows);
        KEEL_TRY(keel_study_session(s, &base, &session, &hooks));
        const struct keel_measure m = { session, s->model, s->images, true, keel_study_tokens, s, s->log };
        s->stage = "directions";
        if (y->answers > 0) {
            KEEL_TRY(capture_answers(side, s, &m, y, rows, &params));
        } else {
            KEEL_TRY(capture(positive, &m, rows, y->positive, &params));
            KEEL_TRY(capture(negative, &m, rows, y->negative, &params));
        }
    }
    KEEL_TRY(keel_directions_estimate(d, positive, negative, &how, s->log));
    d->model_hash = keel_model_hash(s->model);
out:
    keel_session_destroy(&session);
    keel_hooks_destroy(&hooks);
    keel_capture_finish(positive);
    keel_capture_finish(negative);
    free(layers);
    return st;
}

// Random vectors of the lengths of another file's.
static keel_status random_like(struct keel_directions *d, const struct study *s, const struct study_direction *y)
{
    keel_status st = KEEL_OK;
    char path[4200];
    direction_file(s, path, keel_study_find_direction(s->file, y->random_like));
    KEEL_TRY(keel_directions_read(d, path, s->log));
    snprintf(d->method, sizeof d->method, "random");
    for (uint32_t i = 0; i < d->n; i++) {
        struct keel_rng rng = keel_rng_make(s->file->seed, 4000 + i);
        float *v = d->at[i].v;
        const double length = keel_direction_length(v, d->width);
        d->at[i].has_gates = false;
        for (uint32_t k = 0; k < d->width; k++) { // normal, so that every direction is as likely
            v[k] = (float)keel_rng_normal(&rng);
        }
        const double now = keel_direction_length(v, d->width);
        for (uint32_t k = 0; k < d->width; k++) {
            v[k] = (float)((double)v[k] * length / now);
        }
    }
out:
    return st;
}

// JSON has no NaN and no infinity: null for what was not measured, and for a distance between sets that do not spread at all.
static json_t *finite_or_null(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

// Says what is wrong with a direction that is not admissible.
static void warn_of(const struct study *s, const struct study_direction *y, uint32_t layer, const struct keel_gates *g)
{
    if (g->n_splits == 0) {
        KEEL_WARN(s->log, "direction %s, layer %u: made of fewer than 4 rows, too few to check; what is steered or projected along it may mean "
                  "little", y->name, layer);
    } else if (!g->admissible) {
        KEEL_WARN(s->log,
                  "direction %s, layer %u: fails its checks (split-half %.2f, massive channels %.0f %%, effect %.2f against %.2f "
                  "by chance); what is steered or projected along it means little",
                  y->name, layer, g->split_half, 100 * g->massive_share, g->effect, g->random_95);
    }
}

// The checks of each layer, for the manifest.
static json_t *gates_of(const struct study *s, const struct study_direction *y, const struct keel_directions *d)
{
    json_t *layers = json_array();
    for (uint32_t i = 0; i < d->n; i++) {
        const struct keel_gates *g = &d->at[i].gates;
        if (!d->at[i].has_gates) {
            continue;
        }
        json_array_append_new(layers, json_pack("{s:i, s:o, s:o, s:o, s:o, s:b}", "layer", (int)d->at[i].layer, "split_half",
                                                finite_or_null(g->split_half), "massive_share", finite_or_null(g->massive_share),
                                                "effect", finite_or_null(g->effect), "random_95", finite_or_null(g->random_95),
                                                "admissible", g->admissible));
        warn_of(s, y, d->at[i].layer, g);
    }
    return layers;
}

static keel_status make(struct study *s, const struct study_direction *y, const struct study_state *state, const char *path)
{
    keel_status st = KEEL_OK;
    struct keel_directions d = { 0 };
    const struct study_folder *folder = folder_of(s, y);
    KEEL_TRY(y->random_like ? random_like(&d, s, y) : between(&d, s, y, state));
    json_t *all = json_object_get(folder->manifest, "directions");
    if (!all) {
        all = json_object();
        json_object_set_new(folder->manifest, "directions", all);
    }
    json_object_set_new(all, y->name, gates_of(s, y, &d));
    KEEL_TRY(keel_study_folder_save(folder));
    KEEL_TRY(keel_directions_write(&d, path, s->log));
out:
    keel_directions_finish(&d);
    return st;
}

keel_status keel_study_directions(struct study *s, size_t after, const struct study_state *state)
{
    keel_status st = KEEL_OK;
    char path[4200], folder[4200];
    for (size_t i = 0; i < s->file->n_directions; i++) {
        const struct study_direction *y = &s->file->direction[i];
        if (y->after != after) {
            continue;
        }
        direction_file(s, path, y);
        if (keel_path_exists(path)) {
            continue;
        }
        keel_study_path(folder, folder_of(s, y)->path, "directions");
        KEEL_TRY(keel_make_dirs(folder, s->log));
        KEEL_TRY(keel_study_load(s));
        KEEL_TRY(make(s, y, state, path));
    }
out:
    return st;
}
