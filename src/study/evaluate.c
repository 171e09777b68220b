// SPDX-License-Identifier: MIT
// study/evaluate.c: one evaluation: the base model, or a state that training and steering brought it to, over the study's probes.
#include "measure.h"
#include "platform.h"
#include "run.h"

#include <keel/steer.h>

#include <stdio.h>
#include <string.h>

// --- states --------------------------------------------------------------------------------------

keel_status keel_study_images(struct study *s, const struct study_state *state, size_t n)
{
    keel_status st = KEEL_OK;
    if (s->images) {
        keel_images_clear_adapters(s->images);
        for (size_t i = 0; i < n; i++) {
            KEEL_TRY(keel_images_add_adapter(s->images, s->model, s->dev, state->adapter[i].path, state->adapter[i].scale));
        }
        s->stage = "images";
        KEEL_TRY(keel_images_encode(s->images, s->dev, keel_study_tokens, s));
    }
out:
    return st;
}

keel_status keel_study_hooks(struct study *s, const struct study_state *state, keel_hooks **hooks)
{
    keel_status st = KEEL_OK;
    *hooks = NULL;
    for (size_t i = 0; i < state->n_steer; i++) {
        char words[4200];
        keel_study_direction_path(s, words, state->steer[i]);
        if (i == 0) {
            KEEL_TRY(keel_hooks_create(hooks, s->model));
        }
        KEEL_TRY(keel_steer_add(*hooks, s->model, words));
    }
out:
    return st;
}

keel_status keel_study_session(struct study *s, const struct study_state *state, keel_session **session, keel_hooks **hooks)
{
    keel_status st = KEEL_OK;
    const struct keel_session_params params = { .n_ctx = KEEL_MIN(1024u, keel_model_info(s->model)->context),
                                                .kv = s->file->eval.kv };
    KEEL_TRY(keel_session_create(session, s->model, &params));
    for (size_t i = 0; i < state->n_adapters; i++) {
        KEEL_TRY(keel_session_add_adapter(*session, state->adapter[i].path, state->adapter[i].scale));
    }
    KEEL_TRY(keel_study_hooks(s, state, hooks));
    if (*hooks) {
        KEEL_TRY(keel_session_set_hooks(*session, *hooks));
    }
    KEEL_TRY(keel_study_images(s, state, state->n_adapters));
out:
    return st;
}

// --- records -------------------------------------------------------------------------------------

struct evaluation {
    struct study *s;
    const struct study_folder *folder; // where its records go
    const char *stage;                 // "base" or "tuned"
    const struct study_state *state;
    bool base;
    struct keel_measure m;
};

static void record_path(char out[4200], const struct evaluation *e, const char *name)
{
    char rel[128];
    snprintf(rel, sizeof rel, "%s/%s", e->stage, name);
    keel_study_path(out, e->folder->path, rel);
}

// Whether a record file must still be measured; tells the user what comes.
static bool missing(const struct evaluation *e, char path[4200], const char *name, const char *what)
{
    record_path(path, e, name);
    e->s->stage = what;
    return !keel_path_exists(path);
}

static keel_status probes(const struct evaluation *e)
{
    keel_status st = KEEL_OK;
    char from[4200], to[4200];
    const struct study_eval *f = &e->s->file->eval;
    if (f->margin && missing(e, to, "margin.jsonl", "margins")) {
        keel_study_path(from, e->s->folder, f->margin);
        KEEL_TRY(keel_measure_margin(&e->m, from, to));
    }
    if (f->narrow && missing(e, to, "narrow.jsonl", "narrow task")) {
        keel_study_path(from, e->s->folder, f->narrow);
        KEEL_TRY(keel_measure_narrow(&e->m, from, to));
    }
out:
    return st;
}

static keel_status slots(const struct evaluation *e)
{
    keel_status st = KEEL_OK;
    char from[4200], to[4200], context[4200], keep[4200];
    const struct study_file *file = e->s->file;
    struct keel_measure_slots how = { .k = file->eval.context_rows, .seed = file->seed };
    if (!file->eval.slots) {
        return KEEL_OK;
    }
    keel_study_path(from, e->s->folder, file->eval.slots);
    if (missing(e, to, "slots.jsonl", "slots")) {
        KEEL_TRY(keel_measure_slots(&e->m, from, to, &how));
    }
    if (file->eval.context_rows > 0 && missing(e, to, "slots_incontext.jsonl", "slots in context")) {
        keel_study_path(context, e->s->folder, file->train.data[0].file);
        how.context = context;
        how.max_rows = file->eval.context_probes;
        KEEL_TRY(keel_measure_slots(&e->m, from, to, &how));
    }
    if (file->eval.examples > 0 && missing(e, to, "examples.jsonl", "examples")) {
        keel_study_path(keep, e->s->top.path, "base");
        KEEL_TRY(keel_measure_examples(&e->m, from, to, file->eval.answer_tokens, file->eval.examples, file->seed,
                                       e->base ? keep : NULL));
    }
out:
    return st;
}

// Takes the session's hooks off.
static keel_status projection(const struct evaluation *e)
{
    keel_status st = KEEL_OK;
    char from[4200], to[4200], file[4200];
    const struct study_eval *f = &e->s->file->eval;
    keel_hooks *hooks = NULL;
    if (!f->projection.directions || !missing(e, to, "projection.jsonl", "projection")) {
        return KEEL_OK;
    }
    keel_study_path(from, e->s->folder, f->slots);
    keel_study_direction_path(e->s, file, f->projection.directions);
    KEEL_TRY(keel_study_hooks(e->s, e->state, &hooks));
    KEEL_TRY(keel_measure_projection(&e->m, from, to,
                                     &(struct keel_measure_along){ .directions = file,
                                                                   .at = f->projection.at,
                                                                   .layer = f->projection.layer,
                                                                   .any_layer = f->projection.any_layer,
                                                                   .hooks = hooks }));
out:
    keel_hooks_destroy(&hooks);
    return st;
}

static keel_status answers(const struct evaluation *e)
{
    keel_status st = KEEL_OK;
    char prompts[4200], from[4200], to[4200], base_answers[4200];
    const struct study_file *f = e->s->file;
    const uint32_t examples = f->eval.examples;
    if (!f->eval.kl) {
        return KEEL_OK;
    }
    keel_study_path(base_answers, e->s->top.path, "base/answers.jsonl");
    keel_study_path(prompts, e->s->folder, f->eval.kl);
    if ((e->base || examples > 0) && missing(e, to, "answers.jsonl", "answers")) {
        KEEL_TRY(keel_measure_answers(&e->m, prompts, to, f->eval.answer_tokens, e->base ? 0 : examples));
    }
    if (!e->base && missing(e, to, "kl.jsonl", "divergence")) {
        KEEL_TRY(keel_measure_kl(&e->m, base_answers, prompts, to));
    }
    if (examples > 0 && missing(e, to, "relevance.jsonl", "relevance")) {
        record_path(from, e, "answers.jsonl");
        keel_session_clear_adapters(e->m.session); // the base judges the answers of both
        KEEL_TRY(keel_session_set_hooks(e->m.session, NULL));
        KEEL_TRY(keel_study_images(e->s, NULL, 0));
        e->s->stage = "relevance";
        KEEL_TRY(keel_measure_relevance(&e->m, from, prompts, to, examples, f->seed));
    }
out:
    return st;
}

keel_status keel_study_evaluate(struct study *s, struct study_folder *folder, const char *stage, const struct study_state *state)
{
    keel_status st = KEEL_OK;
    keel_session *session = NULL;
    keel_hooks *hooks = NULL;
    const uint64_t t0 = keel_now_ns();
    if (keel_study_folder_done(folder, stage)) {
        return KEEL_OK;
    }
    keel_device_reset_peak(s->dev);
    KEEL_TRY(keel_study_session(s, state, &session, &hooks));
    const struct evaluation e = { s,
                                  folder,
                                  stage,
                                  state,
                                  strcmp(stage, "base") == 0,
                                  { session, s->model, s->images, s->file->eval.chat, keel_study_tokens, s, s->log } };
    KEEL_TRY(probes(&e));
    KEEL_TRY(slots(&e));
    KEEL_TRY(projection(&e));
    if (hooks) {
        KEEL_TRY(keel_session_set_hooks(session, hooks));
    }
    KEEL_TRY(answers(&e));
    KEEL_TRY(keel_study_folder_mark(folder, stage, t0, s->dev));
out:
    keel_session_destroy(&session);
    keel_hooks_destroy(&hooks);
    return st;
}
