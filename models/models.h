// SPDX-License-Identifier: MIT
// models/models.h: what the rooms above may use of a model besides the public API: adapters on the device, batches, and the
// forward and backward pass.
//
// The graph knows nothing of why it is run. Evaluation, generation and training all hand it a batch of tokens and say where
// logits are wanted.
#ifndef KEEL_MODELS_H
#define KEEL_MODELS_H

#include "base.h"
#include "device.h"
#include "ops.h"

#include <keel/hooks.h>
#include <keel/images.h>
#include <keel/model.h>
#include <keel/session.h>
#include <keel/vision.h>

// A matrix of a loaded model: of block `layer`, or with KEEL_N_PROJ the head.
const struct keel_matrix *keel_model_matrix(const keel_model *model, uint32_t layer, uint32_t proj);

// --- projections and adapters --------------------------------------------------------------------

// The seven linear projections of a block, in llama.cpp's order of names.
enum keel_proj { KEEL_ATTN_Q, KEEL_ATTN_K, KEEL_ATTN_V, KEEL_ATTN_OUTPUT, KEEL_FFN_GATE, KEEL_FFN_UP, KEEL_FFN_DOWN, KEEL_N_PROJ };
extern const char *const keel_proj_name[KEEL_N_PROJ]; // "attn_q", ...
// Input and output width of a projection.
void keel_proj_shape(const keel_model *model, enum keel_proj proj, uint32_t *k, uint32_t *n);
// The seven maps of a vision tower that adapters can change: six of each block, then the projector.
#define KEEL_N_VISION_MAPS 7
#define KEEL_VISION_TARGETS (((1u << KEEL_N_VISION_MAPS) - 1) << KEEL_N_PROJ)
// Parses a comma-separated list into a bit set: exact names of projections (bit i: keel_proj i), "all" for all seven of them,
// "vision.NAME" (the bits after those) and "vision.*". Errors: ARG, names the word.
keel_status keel_targets_parse(const char *text, uint32_t *bits, const keel_log *log);

// A LoRA adapter on the device. All its parameters lie in one span (f32), pair after pair, each tensor at a multiple of 256
// bytes with zeros between, so that optimiser and norms treat them as one vector.
typedef struct keel_adapter {
    uint32_t rank;         // of all pairs when made by keel_adapter_create(); pairs loaded from a file may differ
    float alpha, scale;    // scale: the user's factor
    uint32_t n_layers;
    struct keel_lora *pair; // [n_layers × KEEL_N_PROJ]; rank 0 where there is none
    struct keel_lora *vision; // [vision layers × 6 + 1]: maps of the tower's blocks, then the projector; NULL: a model without tower
    uint32_t n_pairs;         // of both together; they are one array
    uint32_t n_skipped;       // tensors of the file that belong to a tower the model does not have here
    struct keel_span params;
    uint64_t n_floats;     // floats in params, padding included
    uint64_t n_params;     // without padding
    struct keel_heap *heap;
} keel_adapter;

// Frobenius norm of one projection of a layer, as the file has it. Errors: NO_MEMORY.
keel_status keel_model_proj_norm(const keel_model *model, uint32_t layer, uint32_t proj, double *norm);
// A new adapter: A Kaiming-uniform as PEFT draws it (bound 1/sqrt(K)), each tensor from its own random stream; B zero. `layers`
// [n_layers]: the layers of the language model that take part; NULL: all.
keel_status keel_adapter_create(keel_adapter **out, keel_model *model, uint32_t rank, float alpha, uint32_t targets, const uint8_t *layers,
                                uint64_t seed);
// From a GGUF file or a PEFT folder. Pairs of a vision tower are left out where the model has none (keel_model_use_vision()).
// Errors as keel_session_add_adapter().
keel_status keel_adapter_load(keel_adapter **out, keel_model *model, const char *path, float scale);
// Writes a GGUF (path ends in ".gguf") that llama.cpp loads, or a PEFT folder that PeftModel.from_pretrained() loads. Atomic.
keel_status keel_adapter_save(const keel_adapter *adapter, const keel_model *model, const char *path);
// Only the vision pairs of a file, onto `dev`; the model need not be loaded. No pairs at all: an adapter without parameters.
keel_status keel_adapter_load_vision(keel_adapter **out, keel_model *model, keel_device *dev, const char *path, float scale);
void keel_adapter_destroy(keel_adapter **adapter);
// Name of a pair's map in GGUF files ("blk.3.attn_q", "v.blk.0.ffn_up", "mm.input_projection") and the bit of `targets` that asks
// for it. i below n_pairs.
void keel_adapter_pair_name(const keel_model *model, uint32_t i, char name[64]);
uint32_t keel_adapter_pair_target(const keel_model *model, uint32_t i);
// Whether an adapter of these targets and layers has pair i.
bool keel_adapter_pair_wanted(const keel_model *model, uint32_t i, uint32_t targets, const uint8_t *layers);
// Device bytes of the parameters of an adapter with this rank, these targets and layers.
uint64_t keel_adapter_bytes(const keel_model *model, uint32_t rank, uint32_t targets, const uint8_t *layers);

// The tower that targets "vision.*" belong to; adapters of `model` made from now on may hold pairs of it. Borrowed; NULL: none.
void keel_model_use_vision(keel_model *model, keel_vision *vision);

// Puts the vision pairs of an adapter (if it has any) in force for keel_vision_encode(), and takes them out again. Borrowed. Call
// use again after its parameters changed: cached tokens are found by them. `dev`: where they are. Errors: ARG (above 8), NO_MEMORY.
keel_status keel_vision_use_adapter(keel_vision *vision, keel_device *dev, const keel_adapter *adapter);
void keel_vision_drop_adapter(keel_vision *vision, const keel_adapter *adapter);
// Loads the vision pairs of a file, if it has any (*changed), and puts them in force until they are cleared or the tower is closed.
// `dev` must outlive that.
keel_status keel_vision_add_adapter(keel_vision *vision, keel_model *model, keel_device *dev, const char *path, float scale,
                                    bool *changed);
bool keel_vision_clear_adapters(keel_vision *vision); // whether there were any

// --- data rows (rows.c) --------------------------------------------------------------------------

struct keel_row; // formats.h
// The prompt of a row from a reader; as keel_prompt_row(), and messages begin with FILE:LINE.
keel_status keel_row_prompt(struct keel_prompt *out, const keel_model *model, keel_images *images, const struct keel_row *row,
                            bool open);

// --- batches -------------------------------------------------------------------------------------

// What a model predicts at a place: log-probabilities of its likeliest tokens, likeliest first, and of all others together
// (-FLT_MAX: there are none). Where the vocabulary is smaller than KEEL_TOP, only so many are set.
struct keel_top {
    uint32_t id[KEEL_TOP];
    float log_p[KEEL_TOP], tail;
};

// One row of a packed batch.
struct keel_seq {
    const int32_t *ids;
    uint32_t n;       // tokens
    uint32_t first;   // logits are wanted at the places that predict ids[first..n), first >= 1
    const uint8_t *mask; // [n], or NULL: of the places from `first` on only those with mask[i] != 0 are wanted (ids[i] is predicted)
    float weight;     // training: derivative of the loss with respect to each of those negative log-likelihoods
    const struct keel_image_tokens *images; // [n_images] or NULL; none of the wanted ids lies in one
    uint32_t n_images;
    // By wanted place. Constrained loss: β, and the token's log-probability under the base; of all rows of a batch or of none.
    const float *beta, *base_logprob;
    const struct keel_top *top; // the base's prediction, for divergences
};

// --- hooks ---------------------------------------------------------------------------------------

#define KEEL_MAX_POSITION_SETS 8

keel_model *keel_session_model(const keel_session *session);
const keel_log *keel_session_log(const keel_session *session);
uint32_t keel_session_batch_tokens(const keel_session *session); // tokens that a pass takes at most
// Takes the last n tokens of the sequence back; there are no logits until the next append. At most as many as a pass takes: the rings of
// local layers keep no more. Errors: ARG.
keel_status keel_session_take_back(keel_session *session, uint32_t n);

// Tokens of a batch, for who captures them: caller's number of the row and place in it, and which belong to the hook's positions.
struct keel_batch_tokens {
    uint32_t n;
    const uint32_t *row, *at;
    const float *marks;
};
// One capture: x [n_rows, width] at a site; `marks` as in ops.h. Called while a pass is recorded; records what it needs.
struct keel_capture_call {
    keel_recorder *rec;
    enum keel_site site;
    uint32_t layer;
    struct keel_span x, marks;
    uint32_t n_rows, width;
    const struct keel_batch_tokens *tokens;
};
keel_status keel_hooks_add_capture(keel_hooks *hooks, enum keel_site site, uint32_t layer, struct keel_positions at,
                                   void (*fn)(void *user, const struct keel_capture_call *call), void *user);
// `fn` is called after each batch of keel_session_score() was computed, with the marks of these positions.
keel_status keel_hooks_after_batch(keel_hooks *hooks, struct keel_positions at,
                                   keel_status (*fn)(void *user, const struct keel_batch_tokens *tokens), void *user);
// One image that the tower is shown: a file, or one of its crops (keel_vision_views()).
struct keel_view {
    const char *path; // borrowed
    uint32_t index;
};
// Runs the tower over an image that rows have (its `embeds`), for the captures at its sites; its patches count as tokens first, first + 1,
// ... of the row. Nothing comes from or goes to the cache. The tower stays on the device. Errors: as keel_vision_encode().
keel_status keel_images_capture(keel_images *images, keel_device *dev, const float *embeds, uint32_t row, uint32_t first);
keel_status keel_vision_capture(keel_vision *vision, keel_device *dev, struct keel_view view, uint32_t row, uint32_t first);
uint32_t keel_vision_patch_count(const keel_vision *vision);
// The pass alone: tokens [n_tokens, out_width] from patches [n_patches, 3, patch, patch], both in host memory. Loads the tower if need be.
keel_status keel_vision_run(keel_vision *vision, keel_device *dev, const float *patches, float *tokens);
void keel_images_due(keel_images *images); // all are to be encoded again
const keel_log *keel_hooks_log(const keel_hooks *hooks);
uint64_t keel_hooks_hash(const keel_hooks *hooks, uint64_t hash); // of all that decides what they do; NULL: `hash`

// --- training pass -------------------------------------------------------------------------------

// Buffers for forward and backward over packed rows: at most `max_tokens` tokens in rows of at most `max_row`, and `max_loss` loss places.
// Owns: saved block inputs, one block's activations and gradients, attention probabilities, one chunk of logits.
typedef struct keel_trainer keel_trainer;
keel_status keel_trainer_create(keel_trainer **out, keel_model *model, uint32_t max_tokens, uint32_t max_row, uint32_t max_loss);
void keel_trainer_destroy(keel_trainer **trainer);
// Forward and backward over `seqs`; adds to `grads` (laid out like adapter->params) the gradient of Σ weight · nll, and writes the sum of the
// unweighted negative log-likelihoods to *nll_sum. Rows never see each other. Blocks until done.
keel_status keel_trainer_step(keel_trainer *trainer, const keel_adapter *adapter, struct keel_span grads, const struct keel_seq *seqs,
                              size_t n_seqs, double *nll_sum, uint64_t *n_loss);

// Σ weight · nll of the last keel_trainer_step(), with the weights that the constrained loss gave (keel_xent_constrain()).
double keel_trainer_weighted(const keel_trainer *trainer);
// The same for divergences from the base, without the trainer's hooks, which are not there either when the adapter is used: adds the gradient
// of Σ weight · KL(seqs[].top ‖ adapted) and writes the sum of the unweighted divergences, n of them.
keel_status keel_trainer_kl_step(keel_trainer *trainer, const keel_adapter *adapter, struct keel_span grads, const struct keel_seq *seqs,
                                 size_t n_seqs, double *kl_sum, uint64_t *n);
// Forward only, under the trainer's hooks: logprob [places] of the wanted ids and, unless NULL, kl [places] from seqs[].top. `adapter` NULL: the
// base, without frozen adapters.
keel_status keel_trainer_eval(keel_trainer *trainer, const keel_adapter *adapter, const struct keel_seq *seqs, size_t n_seqs,
                              float *logprob, float *kl);
// out [places]: what the base predicts, without adapters and hooks. Errors: NUMERIC.
keel_status keel_trainer_top(keel_trainer *trainer, const struct keel_seq *seqs, size_t n_seqs, struct keel_top *out);

// Trains under these hooks from now on, with exact gradients through them; NULL: without. Borrowed.
keel_status keel_trainer_set_hooks(keel_trainer *trainer, const keel_hooks *hooks);
void keel_trainer_set_step(keel_trainer *trainer, uint64_t done); // steps done, for schedules of hooks; 0 at first

// Adapters that are in force in every step and stay as they are; what is trained is added to them. Borrowed; n 0: none.
#define KEEL_MAX_FROZEN 8
void keel_trainer_set_frozen(keel_trainer *trainer, keel_adapter *const *adapters, uint32_t n);

// Whether a step also computes the gradient with respect to what enters the lowest block: for image tokens that is the gradient
// of their embeddings. Off at first; costs the blocks below the lowest adapter and one more projection.
void keel_trainer_want_input_grads(keel_trainer *trainer, bool on);
// [T, width] f32 on the device, tokens of the last step's rows one row after the other; valid until the next step.
struct keel_span keel_trainer_input_grads(const keel_trainer *trainer);

// --- training through the vision tower ------------------------------------------------------------

// Buffers for forward and backward of one view through tower and projector. Loads the tower. Errors: NO_MEMORY, UNSUPPORTED.
typedef struct keel_vision_trainer keel_vision_trainer;
keel_status keel_vision_trainer_create(keel_vision_trainer **out, keel_vision *vision, keel_device *dev);
void keel_vision_trainer_destroy(keel_vision_trainer **trainer);
uint64_t keel_vision_trainer_bytes(const keel_vision *vision, uint32_t rank); // device memory, weights not included
// Soft tokens [n_tokens, out_width] of a view under the adapter's vision pairs; no cache. Errors: as keel_vision_encode().
keel_status keel_vision_trainer_forward(keel_vision_trainer *trainer, const keel_adapter *adapter, struct keel_view view,
                                        float *tokens);
// Adds to `grads` (laid out like adapter->params) the gradient of Σ d_tokens · tokens with respect to the vision pairs. Computes
// the forward pass again, so images may come in any order. Blocks until done.
keel_status keel_vision_trainer_backward(keel_vision_trainer *trainer, const keel_adapter *adapter, struct keel_span grads,
                                         struct keel_view view, const float *d_tokens);

// The tower in the training of a language model on rows with images. Around each keel_trainer_step(), for the same rows:
typedef struct keel_image_trainer keel_image_trainer;
// All three outlive it; sets keel_trainer_want_input_grads(). Errors: as keel_vision_trainer_create().
keel_status keel_image_trainer_create(keel_image_trainer **out, keel_model *model, keel_images *images, keel_trainer *trainer);
void keel_image_trainer_destroy(keel_image_trainer **trainer);
// Before: the soft tokens of the rows' images under the adapter as it is now, written where the rows point.
keel_status keel_image_trainer_forward(keel_image_trainer *trainer, const keel_adapter *adapter, const struct keel_seq *seqs,
                                       size_t n_seqs);
// After: adds the gradients of the vision pairs to `grads`.
keel_status keel_image_trainer_backward(keel_image_trainer *trainer, const keel_adapter *adapter, struct keel_span grads,
                                        const struct keel_seq *seqs, size_t n_seqs);

// The tower of a run's images, and the view that soft tokens at `embeds` belong to; its path is NULL if they belong to none. They
// will be overwritten: keel_images_encode() computes them anew.
keel_vision *keel_images_vision(keel_images *images);
struct keel_view keel_images_retake(keel_images *images, const float *embeds);

#endif
