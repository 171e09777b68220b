// SPDX-License-Identifier: MIT
// keel/session.h: running a loaded model: generation, log-probabilities, divergence between base and adapted model.
//
// Thread safety: one thread at a time for a model and all its sessions.
#ifndef KEEL_SESSION_H
#define KEEL_SESSION_H

#include <keel/model.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct keel_session keel_session;

struct keel_session_params {
    uint32_t n_ctx;   // tokens a sequence may have; 0: 4096 or the model's context if that is smaller
    uint32_t n_batch; // tokens a forward pass takes at once; 0: 256
    const char *kv;   // how caches hold keys and values: "f32" (also NULL), "f16", "q8_0"; docs/numerics.md says what that does.
                      // Rows of an evaluation that fit a pass and share no beginning need no cache.
};
// NULL params: the defaults. Errors: NO_MEMORY, ARG (context above the model's, unknown kv).
KEEL_API keel_status keel_session_create(keel_session **out, keel_model *model, const struct keel_session_params *params);
KEEL_API void keel_session_destroy(keel_session **session); // accepts NULL and pointers to NULL

// --- images --------------------------------------------------------------------------------------

// The soft tokens of one image inside a row of tokens: `embeds` take the place of the embeddings of ids[at..at + n), which may be
// any ids of the vocabulary. Every list of them is sorted by `at`; images do not overlap.
struct keel_image_tokens {
    uint32_t at, n;
    const float *embeds; // [n, width], as keel_vision_encode() gives them; borrowed
};

// --- adapters ------------------------------------------------------------------------------------

// Adds a LoRA adapter from a GGUF file (llama.cpp's layout) or a PEFT folder; several add up. `scale` multiplies alpha/rank.
// Errors: IO, FORMAT, MISMATCH (names the tensor and both shapes).
KEEL_API keel_status keel_session_add_adapter(keel_session *session, const char *path, float scale);
KEEL_API void keel_session_clear_adapters(keel_session *session);

// --- generation ----------------------------------------------------------------------------------

struct keel_sample_params {
    float temperature;    // 0: greedy
    uint32_t top_k;       // 0: off
    float top_p;          // 1: off
    float min_p;          // 0: off
    float repeat_penalty; // 1: off; divides positive and multiplies negative logits of tokens seen lately
    uint32_t repeat_last; // how many tokens count as lately
    uint64_t seed;
};
#define KEEL_SAMPLE_DEFAULTS .temperature = 1.0f, .top_k = 64, .top_p = 0.95f, .min_p = 0.0f, .repeat_penalty = 1.0f, .repeat_last = 64,

// Appends tokens to the session's sequence and computes the logits after the last one. Errors: ARG (nothing to append, or the
// context would overflow: the message says how much room is left), DEVICE_LOST, NUMERIC.
KEEL_API keel_status keel_session_append(keel_session *session, const int32_t *ids, size_t n);
// The same for tokens of which some belong to images. Tokens of one image attend to each other in both directions, so an image
// is computed in one pass: Errors as above, and ARG (images that overlap, are out of order or outside the ids, or have more
// tokens than a pass takes).
KEEL_API keel_status keel_session_append_images(keel_session *session, const int32_t *ids, size_t n,
                                                const struct keel_image_tokens *images, uint32_t n_images);
// Logits [vocab] after the last appended token; valid until the next call with this session.
KEEL_API const float *keel_session_logits(keel_session *session);
// Draws the next token from the current logits without appending it. The random number depends on the seed and the length of
// the sequence only, so that a text is reproducible.
KEEL_API keel_status keel_session_sample(keel_session *session, const struct keel_sample_params *params, int32_t *id);
KEEL_API uint32_t keel_session_length(const keel_session *session); // tokens in the sequence
KEEL_API void keel_session_reset(keel_session *session);            // empties the sequence, keeps adapters

// A prompt to be continued, and the answer.
struct keel_generate_row {
    const int32_t *ids;
    uint32_t n;
    const struct keel_image_tokens *images; // [n_images], or NULL
    uint32_t n_images;
    int32_t *out;   // [cap] filled in; ends with the end-of-turn or EOS token where the model ended
    uint32_t cap;   // most tokens of the answer, at least 1
    uint32_t n_out; // set
};
// Continues many prompts, up to `n_parallel` together (0: 16; fewer where their cache would exceed 256 MB), which costs little
// more than one. Row i is what a session of its own would draw with seed + i, up to rounding. Adapters count. The session's own
// sequence is kept. `progress` as for keel_session_score(), in answer tokens. NULL params: the defaults.
// Errors: DATA (a row that does not fit the context: its number), ARG, NO_MEMORY, NUMERIC, DEVICE_LOST, INTERRUPTED.
KEEL_API keel_status keel_session_generate(keel_session *session, struct keel_generate_row *rows, size_t n_rows,
                                           const struct keel_sample_params *params, uint32_t n_parallel,
                                           bool (*progress)(void *user, uint64_t done, uint64_t total), void *user);

// --- evaluation ----------------------------------------------------------------------------------

// A row whose tokens from `first` on are scored: token i gets log p(ids[i] | ids[0..i)). first >= 1; images end before it.
struct keel_score_row {
    const int32_t *ids;
    uint32_t n, first;
    float *logprobs;  // [n - first], filled in, nats
    float *entropy;   // [n - first] or NULL: entropy of the distribution at the same places, nats
    const struct keel_image_tokens *images; // [n_images], or NULL
    uint32_t n_images;
    const int32_t *alt;   // [n_alt] other tokens in the place of the last one, or NULL; n_alt < first
    uint32_t n_alt;
    float *alt_logprobs;  // [n_alt], filled in, nats: log p(alt[i] | ids[0..n - 1)). Costs no pass of its own
    uint32_t prompt;      // tokens before the response, for hooks: at most `first`, below it where the response begins with words that
                          // are not scored (a prefix). 0: `first`
};
// Rows are packed into batches; logits are computed only where a token is scored. Neighbouring rows that begin with the same tokens
// and images (the same embeds) share their computation where that is cheaper, unless there are hooks. Adapters count. The session's own sequence is
// kept. Errors: DATA (a row longer than the context: its number, from 1), NUMERIC, DEVICE_LOST.
// `progress`, unless NULL, is told tokens done and in total; returning false stops with INTERRUPTED.
KEEL_API keel_status keel_session_score(keel_session *session, struct keel_score_row *rows, size_t n_rows,
                                        bool (*progress)(void *user, uint64_t done, uint64_t total), void *user);

// Divergence between the base model and the model with the session's adapters, over the whole vocabulary, at the places that
// predict ids[first..n).
struct keel_kl_row {
    const int32_t *ids;
    uint32_t n, first;
    float *kl;         // [n - first] KL(base ‖ adapted), nats
    float *kl_reverse; // [n - first] KL(adapted ‖ base), nats, or NULL
    const struct keel_image_tokens *images; // [n_images], or NULL
    uint32_t n_images;
};
KEEL_API keel_status keel_session_kl(keel_session *session, struct keel_kl_row *rows, size_t n_rows,
                                     bool (*progress)(void *user, uint64_t done, uint64_t total), void *user);

#ifdef __cplusplus
}
#endif
#endif
