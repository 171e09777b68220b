// SPDX-License-Identifier: MIT
// study/along.h: prompts of probe rows as the steer room takes rows, for projections and directions.
#ifndef KEEL_ALONG_H
#define KEEL_ALONG_H

#include "probes.h"

#include <keel/steer.h>

struct keel_along {
    struct keel_steer_rows rows; // without responses; borrow the prompts' tokens
    struct keel_prompt *prompt;  // [rows.n]
};
// The prompts of rows `which` [n] (NULL: of the first n). The caller calls keel_along_finish() also after an error.
keel_status keel_along_rows(struct keel_along *out, const struct keel_measure *m, const struct keel_probes *p, const size_t *which,
                            size_t n);
void keel_along_finish(struct keel_along *a); // accepts all-zero

#endif
