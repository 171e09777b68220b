// SPDX-License-Identifier: MIT
// study/measure.h: runs a session over probe files and writes the records that the eval room reads.
#ifndef KEEL_MEASURE_H
#define KEEL_MEASURE_H

#include "base.h"

#include <keel/session.h>

// Told tokens done and in total; false stops with INTERRUPTED.
typedef bool (*measure_progress)(void *user, uint64_t done, uint64_t total);

// {"id","prompt","chosen","rejected","domain"} -> the same with log-probabilities and "margin" (science notes M4).
keel_status keel_measure_margin(keel_session *s, const keel_model *m, const char *in, const char *out, measure_progress progress,
                                void *user, const keel_log *log);
// {"id","prompt","completion","domain"?} -> {"id","prompt","domain","logprob","n_tokens"}.
keel_status keel_measure_narrow(keel_session *s, const keel_model *m, const char *in, const char *out, measure_progress progress,
                                void *user, const keel_log *log);
// Greedy answers to the first `max_rows` prompts (0: all) of {"id","prompt","domain"?}: adds "ids" and "text".
keel_status keel_measure_answers(keel_session *s, const keel_model *m, const char *in, const char *out, uint32_t n_tokens,
                                 uint32_t max_rows, measure_progress progress, void *user, const keel_log *log);
// Divergence from the base model on `answers` (as keel_measure_answers() wrote them): {"id","prompt","domain","n","kl","kl_reverse"}.
keel_status keel_measure_kl(keel_session *s, const keel_model *m, const char *answers, const char *out, measure_progress progress,
                            void *user, const keel_log *log);

#endif
