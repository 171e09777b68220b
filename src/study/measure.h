// SPDX-License-Identifier: MIT
// study/measure.h: runs a session over probe files and writes the records that the eval room reads.
#ifndef KEEL_MEASURE_H
#define KEEL_MEASURE_H

#include "base.h"

#include <keel/images.h>
#include <keel/hooks.h>
#include <keel/session.h>

struct keel_measure {
    keel_session *session;
    const keel_model *model;
    keel_images *images; // of the rows, encoded; NULL: a row with images is an error
    bool chat; // a "prompt" is one user turn of the chat template, not plain text
    bool (*progress)(void *user, uint64_t done, uint64_t total); // told tokens; false stops with INTERRUPTED. May be NULL
    void *user;
    const keel_log *log;
};

// Every function reads the rows of `in` and writes `out`, a copy of the rows with the results. Errors: IO, DATA (file, line or
// id), INTERRUPTED, and those of the session.

// {"id","prompt","chosen","rejected","domain"} -> the same with log-probabilities and "margin" (science notes M4).
keel_status keel_measure_margin(const struct keel_measure *m, const char *in, const char *out);
// {"id","prompt","completion","domain"?} -> the same with "logprob" and "n_tokens".
keel_status keel_measure_narrow(const struct keel_measure *m, const char *in, const char *out);
// {"id","prompt","prefix"?,"aligned","contrary","domain","modality"?,"twin"?,"cluster"?} -> the same with "p_aligned",
// "p_contrary", "p_incoherent": probabilities of the two answers after prompt and prefix, and the rest.
struct keel_measure_slots {
    const char *context; // training file of which k rows stand before each probe as earlier turns (M13), or NULL: asked plainly
    uint32_t k;
    uint32_t max_rows; // as many rows, taken from each domain and modality in turn; 0: all
    uint64_t seed;     // of what is drawn
};
keel_status keel_measure_slots(const struct keel_measure *m, const char *in, const char *out, const struct keel_measure_slots *how);
// The prompts of {"id","prompt","domain",…} -> the same with "projection": of the residual stream at `at`, mean over those tokens, on a
// direction, in lengths of it (one is the distance of the classes that it was made of). Leaves the session without hooks.
// Errors also: ARG (positions; no such layer in the file).
struct keel_measure_along {
    const char *directions, *at; // file; positions as keel_positions_parse() takes them
    uint32_t layer;
    bool any_layer;    // the file's only one
    keel_hooks *hooks; // that steer at the same time: an own list, used up; or NULL
};
keel_status keel_measure_projection(const struct keel_measure *m, const char *in, const char *out, const struct keel_measure_along *how);
// Means over at most `max_rows` slot probes of one cell, plainly asked: a small evaluation in the course of a training. The cell is as
// in probes.h. `along`: project too, or NULL. Errors also: DATA (no such probe).
struct keel_measure_cell {
    const char *domain, *narrow, *modality;
    uint32_t max_rows;
    uint64_t seed; // of what is drawn
    const struct keel_measure_along *along;
};
struct keel_cell_means {
    size_t n;
    double contrary, coherence, projection; // the last NAN without `along`
};
keel_status keel_measure_cell(const struct keel_measure *m, const char *in, const struct keel_measure_cell *cell, struct keel_cell_means *out);
// Greedy answers to the first `max_rows` prompts (0: all) of {"id","prompt","domain"?}: adds "ids" and "text".
keel_status keel_measure_answers(const struct keel_measure *m, const char *in, const char *out, uint32_t n_tokens, uint32_t max_rows);
// Greedy answers to `max_rows` of the slot probes, taken from each domain and modality in turn. The records name copies of the images
// below `keep`, which are made; with NULL they are there already.
keel_status keel_measure_examples(const struct keel_measure *m, const char *in, const char *out, uint32_t n_tokens, uint32_t max_rows,
                                  uint64_t seed, const char *keep);
// Of `answers` (as keel_measure_answers() wrote them for the rows of `origin`), under m->session: "nll" a token, and "relevance": the mean log-probability of
// an answer after its own prompt minus that after other rows' prompts, a token (M10). The first `max_rows` rows (0: all).
keel_status keel_measure_relevance(const struct keel_measure *m, const char *answers, const char *origin, const char *out, uint32_t max_rows,
                                   uint64_t seed);
// Divergence of the session's adapted model from the base on `answers`: {"id","prompt","domain","n","kl","kl_reverse"}.
keel_status keel_measure_kl(const struct keel_measure *m, const char *answers, const char *origin, const char *out);

#endif
