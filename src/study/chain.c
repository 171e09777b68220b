// SPDX-License-Identifier: MIT
// study/chain.c: a study's chain of stages: each a state of the model, reached by training, steering or scaling, and its evaluation
// in a folder of its own. A stage that is done is not repeated, so a chain goes on after a kill.
#include "platform.h"
#include "run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void stage_path(char out[4200], const struct study_folder *run, const struct study_stage *stage, const char *name)
{
    char rel[160];
    snprintf(rel, sizeof rel, "stages/%.80s%s%.40s", stage->name, name[0] ? "/" : "", name);
    keel_study_path(out, run->path, rel);
}

// The adapters in force after stage `i`, or none for the base model.
static void adapters_after(const struct study *s, const struct study_folder *run, size_t i, struct study_state *state)
{
    size_t way[64], n = 0; // the file allows no more stages
    *state = (struct study_state){ .n_adapters = 0 };
    for (; i != STUDY_NO_STAGE; i = s->file->stage[i].from) {
        way[n++] = i;
    }
    while (n-- > 0) {
        const struct study_stage *stage = &s->file->stage[way[n]];
        state->n_adapters += stage->stack || stage->from == STUDY_NO_STAGE;
        stage_path(state->adapter[state->n_adapters - 1].path, run, stage, "adapter.gguf");
        state->adapter[state->n_adapters - 1].scale = 1.0f;
    }
}

static struct study_training training_of(const struct study *s, const struct study_stage *stage, const struct study_setting *run,
                                         const struct study_state *from)
{
    const size_t number = (size_t)(stage - s->file->stage);
    return (struct study_training){
        .train = &stage->train,
        .rank = stage->own_rank ? stage->train.rank : run->rank,
        .mixture = stage->own_mixture ? stage->train.mixture : run->mixture,
        .seed = run->seed + 1000 * number, // another order of rows in each stage, and no seed of another run
        .from = from,
        .go_on = stage->from != STUDY_NO_STAGE && !stage->stack,
    };
}

static keel_status train_stage(struct study *s, struct study_folder *folder, const struct study_stage *stage,
                               const struct study_setting *run, const struct study_state *from, const char *adapter,
                               const struct study_state *after)
{
    keel_status st = KEEL_OK;
    const uint64_t t0 = keel_now_ns();
    struct study_training t = training_of(s, stage, run, from);
    if (keel_study_folder_done(folder, "train")) {
        return KEEL_OK;
    }
    keel_device_reset_peak(s->dev);
    KEEL_TRY(stage->watch.every > 0 ? keel_study_watched(s, folder, &stage->watch, &t, adapter, after)
                                    : keel_study_train(s, folder, &t, adapter));
    KEEL_TRY(keel_study_folder_mark(folder, "train", t0, s->dev));
out:
    return st;
}

// The state of a stage, which is trained first if it has to be.
static keel_status reach(struct study *s, const struct study_folder *run_folder, struct study_folder *folder, size_t i,
                         const struct study_setting *run, struct study_state *state)
{
    keel_status st = KEEL_OK;
    const struct study_stage *stage = &s->file->stage[i];
    adapters_after(s, run_folder, stage->kind == STUDY_TRAIN ? i : stage->from, state);
    if (stage->kind == STUDY_TRAIN) {
        char adapter[4200];
        struct study_state *from = malloc(sizeof *from);
        if (!from) {
            KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a stage");
        }
        adapters_after(s, run_folder, stage->from, from);
        stage_path(adapter, run_folder, stage, "adapter.gguf");
        st = train_stage(s, folder, stage, run, from, adapter, state);
        free(from);
        KEEL_TRY(st);
    }
    for (size_t k = 0; k < state->n_adapters && stage->kind == STUDY_SCALE; k++) {
        state->adapter[k].scale = (float)stage->value;
    }
    if (stage->kind == STUDY_STEER) {
        state->steer = stage->steer;
        state->n_steer = stage->n_steer;
    }
out:
    return st;
}

static keel_status run_stage(struct study *s, const struct study_folder *run_folder, size_t i, const struct study_setting *run)
{
    static const char *const trained[] = { "train", "tuned", NULL }, *const other[] = { "tuned", NULL }, *const map[] = { "map", NULL };
    keel_status st = KEEL_OK;
    const struct study_stage *stage = &s->file->stage[i];
    struct study_folder folder = { 0 };
    struct study_state *state = malloc(sizeof *state);
    char path[4200];
    if (!state) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a stage");
    }
    stage_path(path, run_folder, stage, "");
    const bool maps = stage->kind == STUDY_MAP;
    KEEL_TRY(keel_study_open(s, &folder, path, run, stage, stage->kind == STUDY_TRAIN ? trained : maps ? map : other));
    if (keel_study_folder_done(&folder, maps ? "map" : "tuned")) {
        goto out;
    }
    KEEL_TRY(keel_study_load(s));
    KEEL_TRY(reach(s, run_folder, &folder, i, run, state));
    KEEL_TRY(maps ? keel_study_map(s, &folder, stage, state) : keel_study_evaluate(s, &folder, "tuned", state));
out:
    keel_study_folder_close(&folder);
    free(state);
    return st;
}

keel_status keel_study_chain(struct study *s, struct study_folder *folder, const struct study_setting *run)
{
    keel_status st = KEEL_OK;
    const size_t used = strlen(s->prefix);
    struct study_state *state = malloc(sizeof *state);
    if (!state) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for a stage");
    }
    s->run = folder;
    for (size_t i = 0; i < s->file->n_stages; i++) {
        snprintf(s->prefix + used, sizeof s->prefix - used, "%.80s, ", s->file->stage[i].name);
        KEEL_TRY(run_stage(s, folder, i, run));
        adapters_after(s, folder, i, state);
        KEEL_TRY(keel_study_directions(s, i, state));
    }
out:
    s->prefix[used] = 0;
    s->run = NULL;
    free(state);
    return st;
}
