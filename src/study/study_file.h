// SPDX-License-Identifier: MIT
// study/study_file.h: the study file as a struct, with defaults filled in. The keys are explained in docs/studies.md.
#ifndef KEEL_STUDY_FILE_H
#define KEEL_STUDY_FILE_H

#include "base.h"

struct study_data {
    const char *file;
    double weight;
};
struct study_train {
    struct study_data *data;
    unsigned data_count;
    uint32_t rank, warmup, batch, accum, seq_len;
    uint64_t steps; // 0: from epochs
    double alpha, lr, epochs, weight_decay, grad_clip;
    const char *targets, *schedule;
};
struct study_eval {
    const char *margin, *narrow, *kl; // NULL: not measured
    uint32_t answer_tokens, examples;
};
struct study_budget {
    double kl_mean, margin_drop, flip_rate; // NAN: no limit
};
struct study_file {
    const char *name, *model, *narrow_domain; // the last two may be NULL
    uint64_t seed;
    struct study_train train;
    struct study_eval eval;
    struct study_budget budget;
    void *yaml; // what libcyaml loaded; the strings above point into it
};

// Parses YAML of `len` bytes; unknown keys, values out of range, and names that training would refuse are errors.
// Errors: FORMAT ("NAME:LINE: reason"), NO_MEMORY.
keel_status keel_study_parse(struct study_file **out, const uint8_t *data, size_t len, const char *name, const keel_log *log);
void keel_study_free(struct study_file **f); // accepts pointers to NULL

#endif
