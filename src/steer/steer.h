// SPDX-License-Identifier: MIT
// steer/steer.h: what the files of the steer room share.
#ifndef KEEL_STEER_ROOM_H
#define KEEL_STEER_ROOM_H

#include "base.h"
#include "platform.h"
#include "formats.h"
#include "models.h"

#include <keel/steer.h>

// Runs rows with the hooks set so that every token of every row passes through the model, and puts log-probabilities of responses
// into the rows. `hooks` is taken off the session again.
keel_status keel_steer_run(keel_session *session, struct keel_steer_rows *rows, keel_hooks *hooks,
                           bool (*progress)(void *user, uint64_t done, uint64_t total), void *user);
// Whether token t of the row is one of these positions.
bool keel_steer_marked(const struct keel_score_row *row, struct keel_positions at, uint32_t t);

// --- estimators (estimate.c) ---------------------------------------------------------------------

enum keel_method { KEEL_MEAN, KEEL_MEAN_Z, KEEL_MEAN_MASK, KEEL_LDA, KEEL_PROBE, KEEL_PCA_DIFF, KEEL_PCA_CENTER, KEEL_SVD, KEEL_N_METHODS };
extern const char *const keel_method_name[KEEL_N_METHODS];
static inline bool keel_method_needs_pairs(enum keel_method m)
{
    return m >= KEEL_PCA_DIFF;
}

// Rows of two classes at one layer; chosen by index, so that halves need no copy. Pairs: row ip[i] belongs to in[i].
struct keel_sample {
    const float *pos, *neg; // [.., width]
    const uint32_t *ip, *in;
    size_t np, nn;
    uint32_t width;
    const double *size; // [width] mean |h| of the captured tokens, for the massive channels; NULL where nothing asks for them
};
// v [k, width]; all 0 where the classes do not differ. Errors: DATA (fewer directions than k), NUMERIC, NO_MEMORY.
keel_status keel_estimate(const struct keel_sample *s, enum keel_method method, uint32_t k, double *v, const keel_log *log);
// Channels whose mean |h|, `size` [width], is above 20 × the median channel's: use[i] 1. Of tokens, not of the rows' means, in which
// the signs of a row's tokens cancel.
keel_status keel_massive_of(const double *size, uint32_t width, uint8_t *use);
// Probability that a random one of the first np values is above a random one of the nn after them; ties count half.
double keel_auc(const double *x, size_t np, size_t nn);
// Projections of the sample's rows on v [width], positives first: x [np + nn].
void keel_project_sample(const struct keel_sample *s, const double *v, double *x);
void keel_shuffle(uint32_t *x, size_t n, struct keel_rng *rng);
double keel_cosine(const double *a, const double *b, uint32_t n); // 0 where one of them is 0
// Gates of a direction v [width] (k = 1), or of the first of a subspace.
keel_status keel_gates_compute(struct keel_gates *out, const struct keel_sample *s, enum keel_method method, bool paired,
                               const double *v, uint64_t seed, const keel_log *log);

// --- algebra (algebra.c) -------------------------------------------------------------------------

// The k leading right singular vectors u [k, width] of x [n, width], and all min(n, width) squared singular values (descending) if
// `spectrum` is not NULL. Errors: NUMERIC, NO_MEMORY, DATA (rank below k).
keel_status keel_top_vectors(const double *x, size_t n, uint32_t width, uint32_t k, double *u, double *spectrum, const keel_log *log);
// Solves the symmetric system a [n, n] x = b in place of b; a is destroyed. Errors: NUMERIC, NO_MEMORY.
keel_status keel_solve_symmetric(double *a, double *b, uint32_t n, const keel_log *log);
// g [n, n] = x xᵀ, x [n, width]
void keel_gram(double *g, const double *x, size_t n, uint32_t width);

#endif
