// SPDX-License-Identifier: MIT
// gemma3/session_internal.h: what session.c, score.c and generate.c share.
#ifndef KEEL_SESSION_INTERNAL_H
#define KEEL_SESSION_INTERNAL_H

#include "gemma3.h"

struct session_cache {
    keel_heap *heap;
    struct keel_kv kv;
};

struct keel_session {
    keel_model *model;
    uint32_t n_ctx, n_batch, chunk; // chunk: rows of logits held at once
    enum keel_dtype kv_type;        // of all caches
    keel_heap *host, *heap, *lora, *second;
    struct keel_batch batch;
    struct keel_acts acts;
    struct keel_scorer scorer;
    struct keel_span kl;           // [n_batch, 2] f32, in `second`
    struct session_cache cache[3]; // the sequence; long rows of an evaluation; the same for the second model of a divergence
    keel_adapter **adapters;
    uint32_t n_adapters, lora_rank;
    const keel_hooks *hooks;
    keel_recorder *rec, *step; // step: one token, replayed
    bool compiled;             // the first pass of a prompt was noted
    uint32_t bucket;           // contexts that `step` was recorded for; 0: not recorded
    int32_t *ids;              // [n_ctx] the sequence
    uint32_t n_ids, n_prompt; // n_prompt: tokens before the present response
    float *logits_host;        // [V]
    bool has_logits;
    struct keel_candidate *candidates; // [V]
};

// The cache number `which`, made at first use.
keel_status keel_session_cache(keel_session *s, uint32_t which, const struct keel_kv **kv);
// A pass over the session's batch, with its adapters and hooks if `adapted`.
struct keel_pass keel_session_pass(const keel_session *s, keel_recorder *rec, bool adapted);
// Logits of the batch's first n places, at most s->chunk, into the rows of scorer.logits[0].
void keel_session_record_logits(const keel_session *s, const struct keel_pass *p, uint32_t n);
// The context that a step for `n` tokens is recorded for: the next power of two.
uint32_t keel_session_bucket(uint32_t n);

#endif
