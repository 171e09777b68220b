// SPDX-License-Identifier: MIT
// study/study_file.h: the study file as a struct, with defaults filled in. The keys are explained in docs/studies.md.
#ifndef KEEL_STUDY_FILE_H
#define KEEL_STUDY_FILE_H

#include "base.h"

struct study_data {
    const char *file;
    double weight;
};
#define STUDY_MAX_GUARDS 8
struct study_train {
    struct study_data *data;
    unsigned data_count;
    const char *filler; // rows that dilute the narrow ones, or NULL
    double mixture;     // share of rows drawn from `data`; the rest are from `filler`
    uint32_t rank, warmup, batch, accum, seq_len;
    uint64_t steps; // 0: from epochs
    double alpha, alpha_per_rank; // 0: not given; both 0: twice the rank
    double lr, epochs, weight_decay, grad_clip;
    const char *targets, *schedule;
    // Against drift, as keel_train_params has it.
    const char *layers, *kl_data, *lisa_data; // NULL: all layers, off, off
    double kl_weight, lisa_rho, constrain[3];
    uint32_t kl_rows, lisa_align, lisa_task;
    char *const *steer; // [n_steer] words
    const char *monitor; // NULL: none
    uint32_t monitor_every;
    char *monitor_direction; // NAME or FILE, with @LAYER where there are several; NULL: none
    char *const *guard; // [n_guard] as keel_guard_parse() takes them
    unsigned n_steer, n_guard;
};
// What activations are projected on: the residual stream of the slot probes' prompts, on one direction of a file.
struct study_projection {
    const char *directions; // NULL: not measured
    const char *at;         // positions, as keel_positions_parse() takes them
    uint32_t layer;
    bool any_layer; // none was given: the file's only one
};
struct study_eval {
    const char *margin, *narrow, *kl, *slots; // NULL: not measured
    bool chat;                                // prompts are user turns of the chat template
    const char *kv;                           // as in keel_session_params
    uint32_t answer_tokens, examples;
    uint32_t context_rows;   // training rows before each slot probe when it is asked again in context; 0: it is not
    uint32_t context_probes; // how many of the slot probes are; 0: all
    struct study_projection projection;
};
struct study_setting { // what differs between the runs of a sweep
    uint32_t rank;
    double mixture;
    uint64_t seed;
};
// A direction that the study makes: of the base model between the same prompts under two system messages, from the base model to where
// a stage moved it on the same rows, or a random control.
#define STUDY_NO_STAGE SIZE_MAX
struct study_direction {
    const char *name;                       // words and projections name it in place of a file
    const char *rows, *positive, *negative; // prompts; the system messages that it points to and from
    const char *layers, *at, *method;       // as those of keel direction; at NULL: the response, or the prompt's end
    const char *random_like;                // NULL, or the direction before whose lengths a random one has
    const char *shift;                      // NULL, or the stage that it is the shift of
    uint32_t answers, samples;              // tokens of generated answers, 0: none; how many to a row
    size_t after;                           // stage after which it is made, in each run anew; STUDY_NO_STAGE: before all
};
// Small evaluations in the course of a training: P(contrary) of slot probes of one cell.
struct study_watch {
    uint32_t every;  // steps; 0: there are none
    uint32_t probes; // at most
    double above, below; // the stage ends when the mean reaches one of these; NAN: no such limit
    const char *domain, *modality; // "other": all but the narrow domain; "all". "": any modality
};
enum study_kind { STUDY_TRAIN, STUDY_STEER, STUDY_SCALE, STUDY_MAP };
// Doses of one direction at several layers, each by itself: the slot probes under each.
#define STUDY_MAX_DOSES 9 // as many columns as a phone shows
struct study_map {
    const double *coef; // [n_coef], ascending
    unsigned n_coef;
    const char *layers; // as keel_layers_parse() takes them
    uint32_t probes;    // at most; 0: all
};
// One stage of a chain: a state of the model, reached from that of an earlier stage, and its evaluation.
struct study_stage {
    char *name;  // of its folder; entries with several values make stages called NAME-VALUE
    char *group; // name of the entry
    enum study_kind kind;
    size_t from; // the TRAIN stage whose adapters it starts with, or STUDY_NO_STAGE: the base model
    bool stack;  // TRAIN: a new adapter on top of those, which stay as they are; else the last of them is trained further
    struct study_train train; // TRAIN
    bool own_rank, own_mixture; // not the sweep's
    struct study_watch watch;
    char **steer; // STEER: words as --steer takes them; MAP: one, without coefficient and layers
    size_t n_steer;
    bool percent; // coefficients are % of the residual stream's median norm
    struct study_map map; // MAP
    double value; // SCALE: factor of the adapters; STEER: the coefficient of a scan, NAN without
};
void keel_study_stage_finish(struct study_stage *s); // accepts all-zero

struct study_budget {
    double kl_mean, margin_drop, flip_rate; // NAN: no limit
};
struct study_file {
    bool pan_and_scan;
    const char *name, *model, *type, *mmproj, *narrow_domain, *narrow_modality; // all but the first may be NULL
    uint64_t seed;
    struct study_train train;
    struct study_eval eval;
    struct study_budget budget;
    bool sweep;                // several runs in folders of their own
    struct study_setting *run; // [n_runs] in the order they run; seeds of one setting stand together
    size_t n_runs;
    struct study_direction *direction; // [n_directions]
    size_t n_directions;
    struct study_stage *stage; // [n_stages] in order; none: base, train, evaluation
    size_t n_stages;
    void *yaml; // what libcyaml loaded; the strings above point into it
};

// Parses YAML of `len` bytes; unknown keys, values out of range, and names that training would refuse are errors.
// Errors: FORMAT ("NAME:LINE: reason"), NO_MEMORY.
keel_status keel_study_parse(struct study_file **out, const uint8_t *data, size_t len, const char *name, const keel_log *log);
void keel_study_free(struct study_file **f); // accepts pointers to NULL
// The direction that the study makes and that steering words, or a file name, begin with; NULL: none.
const struct study_direction *keel_study_find_direction(const struct study_file *f, const char *words);

#endif
