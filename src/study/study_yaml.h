// SPDX-License-Identifier: MIT
// study/study_yaml.h: a study file as libcyaml gives it, checked against the schema, and how faults of its values are reported.
// Every optional number is a pointer: a key that is absent takes its default, a zero that was written is a zero.
#ifndef KEEL_STUDY_YAML_H
#define KEEL_STUDY_YAML_H

#include "study_file.h"

#define STUDY_MAX_DATA 64
#define STUDY_MAX_VALUES 32 // of one axis of a sweep, or of one scan
#define STUDY_MAX_SEEDS 16  // as many runs as the eval room pools
#define STUDY_MAX_STAGES 64
#define STUDY_MAX_DIRECTIONS 16

struct yaml_data {
    char *file;
    double *weight;
};
struct yaml_train {
    struct yaml_data *data;
    unsigned data_count;
    uint64_t *rank, *warmup, *steps, *batch, *accum, *seq_len;
    double *alpha, *alpha_per_rank, *lr, *epochs, *weight_decay, *grad_clip, *mixture;
    char *targets, *schedule, *filler;
    char *layers, *kl_data, *lisa_data, *monitor, *monitor_direction, **steer, **guard;
    double *kl_weight, *lisa_rho, *constrain;
    uint64_t *kl_rows, *lisa_steps, *monitor_every;
    unsigned steer_count, guard_count, constrain_count, lisa_steps_count;
};
struct yaml_projection {
    char *directions, *at;
    uint64_t *layer;
};
struct yaml_eval {
    char *margin, *narrow, *kl, *slots, *prompts, *kv;
    uint64_t *answer_tokens, *examples, *context_rows, *context_probes;
    struct yaml_projection *projection;
};
struct yaml_direction {
    char *name, *rows, *positive, *negative, *layers, *at, *method, *random_like, *shift;
    uint64_t *answers, *samples;
};
struct yaml_watch {
    uint64_t *every, *probes;
    double *above, *below;
    char *domain, *modality;
};
struct yaml_stage {
    char *name, *from, *adapter;
    struct yaml_train *train;
    struct yaml_watch *watch;
    char **steer;
    double *coef, *scale;
    char *layers;
    uint64_t *probes;
    bool *percent;
    unsigned steer_count, coef_count, scale_count;
};
struct yaml_sweep {
    uint64_t *rank, *seed;
    double *mixture;
    unsigned rank_count, seed_count, mixture_count;
    char *combine;
};
struct yaml_budget {
    double *kl_mean, *margin_drop, *flip_rate;
};
struct yaml_study {
    char *name, *model, *type, *mmproj, *narrow_domain, *narrow_modality;
    bool *pan_and_scan;
    uint64_t *seed;
    struct yaml_train train;
    struct yaml_eval eval;
    struct yaml_budget budget;
    struct yaml_sweep sweep;
    struct yaml_stage *stages;
    struct yaml_direction *directions;
    unsigned stages_count, directions_count;
};

// The text under check, for messages.
struct study_source {
    const char *data, *name;
    size_t len, from; // keys are looked for from here on; 0: from where their section begins
    const keel_log *log;
};

// Errors: FORMAT (said with file, line and key), NO_MEMORY. *out belongs to the caller: keel_study_yaml_free().
keel_status keel_study_yaml_load(struct yaml_study **out, const struct study_source *src);
void keel_study_yaml_free(struct yaml_study *y); // accepts NULL

// "FILE:LINE: SECTION: KEY: ", the place of the value of `key`.
void keel_study_place(char *out, size_t cap, const struct study_source *src, const char *section, const char *key);
// Says what is wrong with the value of `key` in `section` ("" is the top; "stages: NAME: train" and the like below it). Returns FORMAT.
keel_status keel_study_complain(const struct study_source *src, const char *section, const char *key, const char *reason);
// Reads an optional number; checks that it is finite and in [lo, hi].
keel_status keel_study_real(const struct study_source *src, const char *section, const char *key, const double *v, double lo, double hi,
                            double *out);
keel_status keel_study_count(const struct study_source *src, const char *section, const char *key, const uint64_t *v, uint32_t lo,
                             uint32_t hi, uint32_t *out);
// The source from where `text` first stands after `key` of the top on: the entry of a list that has it as its name.
struct study_source keel_study_entry(const struct study_source *src, const char *key, const char *text);

// What a training is when `y` (or NULL) says how it differs from `def`. t->data belongs to the caller (free()), also after an error.
keel_status keel_study_fill_train(const struct study_source *src, const char *section, const struct study_train *def, struct study_train *t,
                                  const struct yaml_train *y);
// The directions of the study.
keel_status keel_study_fill_directions(const struct study_source *src, struct study_file *f, const struct yaml_study *y);
// When each of them can be made, once the stages are there.
keel_status keel_study_order_directions(const struct study_source *src, struct study_file *f);
// What names a folder or a file: NULL, or why `name` cannot.
const char *keel_study_bad_name(const char *name);
// The stages of the study, which has its `train` and `eval` already.
keel_status keel_study_fill_stages(const struct study_source *src, struct study_file *f, const struct yaml_study *y);

#endif
