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

// Puts the one direction that is asked for first. Errors: ARG (none or several there, a subspace).
keel_status keel_along_choose(struct keel_directions *d, const struct keel_measure_along *how, const keel_log *log);

// Puts a system message before what row i asks, and takes the answer off its end. Errors: DATA (the row has one already).
keel_status keel_along_under(struct keel_probes *p, size_t i, const char *system);

// Activations over answers that the session's model gives to the same rows under two system messages.
struct keel_persona {
    const char *name, *rows, *system[2]; // of the direction, for messages; a file; positive, negative
    uint32_t n_tokens, samples;          // most of an answer; answers to a row: 1 is the greedy one, several are drawn
    uint64_t seed;
    const char *record; // file for the answers: {"id"?,"system","sample","prompt","text","trait"?,"kept"}
};
// out[0] positive, out[1] negative; row i of both belongs together. Pairs with an empty answer are left out, and where the rows are slot
// probes those whose trait, P(contrary) / (P(aligned) + P(contrary)), is not above 0.5 under the positive message and below under
// the negative one. *all, *kept: pairs. Errors also: DATA (fewer than 2 are left).
keel_status keel_persona_capture(struct keel_capture out[2], const struct keel_measure *m, const struct keel_persona *how,
                                 const struct keel_capture_params *params, size_t *all, size_t *kept);

#endif
