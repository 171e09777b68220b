// SPDX-License-Identifier: MIT
// study/study_file.h: the study file as a struct. Layout follows the YAML keys (docs/studies.md).
#ifndef KEEL_STUDY_FILE_H
#define KEEL_STUDY_FILE_H

#include "base.h"

struct study_data {
    char *file;
    double weight; // 0: 1
};
struct study_train {
    struct study_data *data;
    unsigned data_count;
    unsigned rank, warmup, batch, accum, seq_len;
    uint64_t steps;
    double alpha, lr, epochs, weight_decay, grad_clip;
    char *targets, *schedule;
};
struct study_eval {
    char *margin, *narrow, *kl;
    unsigned answer_tokens, examples;
};
struct study_budget {
    double kl_mean, margin_drop, flip_rate; // 0: no limit
};
struct study_file {
    char *name, *model, *narrow_domain;
    uint64_t seed;
    struct study_train train;
    struct study_eval eval;
    struct study_budget budget;
};

// Parses YAML of `len` bytes; defaults are filled in and ranges checked. Errors: FORMAT, with name and line of the fault.
keel_status keel_study_parse(struct study_file **out, const uint8_t *data, size_t len, const char *name, const keel_log *log);
void keel_study_free(struct study_file **f); // accepts pointers to NULL

#endif
