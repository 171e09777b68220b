// SPDX-License-Identifier: MIT
// study/run.h: a study while it runs: what its parts share, states of the model, their evaluation and training.
#ifndef KEEL_STUDY_RUN_H
#define KEEL_STUDY_RUN_H

#include "folder.h"

#include <keel/study.h>

#include <jansson.h>

struct study {
    const struct keel_study_params *p;
    const keel_log *log;                      // to the caller, with `place` before each message
    char place[4400];                         // of the study file; "": none
    struct study_file *file;
    char folder[4096];                        // of the study file
    char model_path[4096], mmproj_path[4096]; // the latter may be empty
    struct keel_text config;                  // text of the study file
    keel_device *dev;
    keel_model *model;
    keel_images *images;     // NULL: no row has images
    struct study_folder top; // OUT
    struct study_folder *run; // of the run at hand: OUT, or below it in a sweep; NULL before
    const char *stage;
    uint64_t n_steps;             // of the training, where it is done in parts; 0: not
    char prefix[240], label[320]; // "rank-16_seed-1 (2 of 6), attack, "; with what is done
};
// For callbacks with a struct study as their user: tells the caller's progress function; false: stop.
bool keel_study_tokens(void *user, uint64_t done, uint64_t total);
bool keel_study_step(void *user, const struct keel_step_info *info);

// The base model with adapters and steering: what is evaluated.
#define STUDY_MAX_ADAPTERS 8
struct study_state {
    struct {
        char path[4200];
        float scale;
    } adapter[STUDY_MAX_ADAPTERS];
    size_t n_adapters;
    char *const *steer; // [n_steer] words, borrowed
    size_t n_steer;
};

// Opens the folder of the whole study, of a run of its sweep (`run`) or of a stage of one. `sub`: its subfolders, ends with NULL.
keel_status keel_study_open(struct study *s, struct study_folder *folder, const char *path, const struct study_setting *run,
                            const struct study_stage *stage, const char *const *sub);
// Makes the study's directions that can be made after stage `after` (STUDY_NO_STAGE: of the base model), those that are not there yet: in
// OUT/directions or, of a stage, in that of the run, whose manifest says how they fared. `state`: after that stage, or NULL.
keel_status keel_study_directions(struct study *s, size_t after, const struct study_state *state);
// Words or a file name that begin with the name of such a direction, with its file; others begin in the study file's folder.
void keel_study_direction_path(const struct study *s, char out[4200], const char *words);
// Images, then weights, unless they are there: the tower and the model are not on the device together.
keel_status keel_study_load(struct study *s);
// Soft tokens under what the first `n` adapters of a state change in the vision tower. Most change nothing there, then nothing happens.
keel_status keel_study_images(struct study *s, const struct study_state *state, size_t n);
// A new list of the hooks that steer in this state; NULL if it does not. Paths in the words start at the study file's folder.
keel_status keel_study_hooks(struct study *s, const struct study_state *state, keel_hooks **hooks);
// A session in this state; *hooks must be destroyed after it.
keel_status keel_study_session(struct study *s, const struct study_state *state, keel_session **session, keel_hooks **hooks);
// Everything the study file asks for, in this state, as records in `folder`/`stage` ("base", "tuned"), which is then marked.
keel_status keel_study_evaluate(struct study *s, struct study_folder *folder, const char *stage, const struct study_state *state);

// A training as the study file describes it, in the setting of a run.
struct study_training {
    const struct study_train *train;
    uint32_t rank;
    double mixture;
    uint64_t seed, steps;           // steps: in place of the file's, for trainings in parts; 0: the file's
    const struct study_state *from; // the state it starts from
    bool no_steps;                  // takes none: `adapter` is what training would start with
    bool go_on;                     // the last adapter of `from` is trained further; the others stay as they are
};
// Trains `adapter` with state and log in `folder`/train, from where it stopped if it was begun. Does not mark the folder.
keel_status keel_study_train(struct study *s, struct study_folder *folder, const struct study_training *t, const char *adapter);

// The same in parts, watched: ends at t->train->steps or where a limit is reached, which may be before the first step; t->steps is
// then where. `after`: the state with `adapter`.
keel_status keel_study_watched(struct study *s, struct study_folder *folder, const struct study_watch *w, struct study_training *t,
                               const char *adapter, const struct study_state *after);

// The doses of a MAP stage in this state, a record file each in `folder`/map, which is then marked. `state` is steered meanwhile.
keel_status keel_study_map(struct study *s, struct study_folder *folder, const struct study_stage *stage, struct study_state *state);
// The words of such a dose: FILE[,KEY=VALUE]... with coefficient and layers after FILE.
void keel_study_dose_words(char out[4200], const struct study_stage *stage, double coef, const char *layers);

// What can be known of the study's steering, directions and layers before anything runs (check.c): of the words by themselves, then with
// the model open. Errors: ARG, IO, FORMAT, MISMATCH ("FILE:LINE: KEY: reason").
keel_status keel_study_check_words(struct study *s);
keel_status keel_study_check_model(struct study *s);
// The probe sets (sets.c): fields, ids that are there once, domains with names of their own, twins in pairs, and whether there is what the
// study calls narrow. Errors: DATA (file and line), IO.
keel_status keel_study_check_sets(struct study *s);

// The stages of the study in the setting of a run, each in `folder`/stages/NAME.
keel_status keel_study_chain(struct study *s, struct study_folder *folder, const struct study_setting *run);

#endif
