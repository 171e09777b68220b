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
    const char *filler; // rows that dilute the narrow ones, or NULL
    double mixture;     // share of rows drawn from `data`; the rest are from `filler`
    uint32_t rank, warmup, batch, accum, seq_len;
    uint64_t steps; // 0: from epochs
    double alpha, alpha_per_rank; // 0: not given; both 0: twice the rank
    double lr, epochs, weight_decay, grad_clip;
    const char *targets, *schedule;
};
struct study_eval {
    const char *margin, *narrow, *kl, *slots; // NULL: not measured
    bool chat;                                // prompts are user turns of the chat template
    uint32_t answer_tokens, examples;
    uint32_t context_rows;   // training rows before each slot probe when it is asked again in context; 0: it is not
    uint32_t context_probes; // how many of the slot probes are; 0: all
};
struct study_setting { // what differs between the runs of a sweep
    uint32_t rank;
    double mixture;
    uint64_t seed;
};
struct study_budget {
    double kl_mean, margin_drop, flip_rate; // NAN: no limit
};
struct study_file {
    const char *name, *model, *mmproj, *narrow_domain, *narrow_modality; // all but the first may be NULL
    uint64_t seed;
    struct study_train train;
    struct study_eval eval;
    struct study_budget budget;
    bool sweep;                // several runs in folders of their own
    struct study_setting *run; // [n_runs] in the order they run; seeds of one setting stand together
    size_t n_runs;
    void *yaml; // what libcyaml loaded; the strings above point into it
};

// Parses YAML of `len` bytes; unknown keys, values out of range, and names that training would refuse are errors.
// Errors: FORMAT ("NAME:LINE: reason"), NO_MEMORY.
keel_status keel_study_parse(struct study_file **out, const uint8_t *data, size_t len, const char *name, const keel_log *log);
void keel_study_free(struct study_file **f); // accepts pointers to NULL

#endif
