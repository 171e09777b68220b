// SPDX-License-Identifier: MIT
// doctor/cases.h: what the doctor runs on a bed: every op that has variants, and the plain ones that everything rests on.
#ifndef KEEL_DOCTOR_CASES_H
#define KEEL_DOCTOR_CASES_H

#include "bed.h"
#include "variants.h"

// A group of cases of one op.
struct check {
    const char *op;
    int family; // enum keel_family, or -1: the op has one variant
    // Runs its cases, counting them in *n, until one is wrong; what was wrong is in b->result. Quick: few cases, one weight type.
    // False if one was wrong. b->result.worst is that of the last case.
    bool (*run)(struct bed *b, bool quick, uint32_t *n, double *worst);
};
// All checks; `*n` is how many.
const struct check *doctor_checks(size_t *n);

// --- timing --------------------------------------------------------------------------------------

// A product that a model does: its matrix on the device, and how often it does it.
struct timed_matrix {
    const struct keel_matrix *w;
    double count;
};
#define MAX_TIMED 32u
struct timing {
    struct timed_matrix matrix[MAX_TIMED];
    uint32_t n_matrices;
    uint32_t n_heads, n_kv_heads, head_dim;
    uint32_t rows, keys, rank; // tokens of a batch, keys in the context, LoRA rank
};
// Nanoseconds that a family takes with the variant in force for all that `t` lists; 0 if it could not run.
double doctor_time(struct bed *b, enum keel_family family, const struct timing *t);

#endif
