// SPDX-License-Identifier: MIT
// gemma3/gemma3.h: what the files of the models room share: shape of a Gemma 3 text model, its weights on the device, batches
// of tokens, the buffers of a pass and the pass itself. Not for the rooms above (they use models.h).
// Source: Gemma 3 technical report (2025), transformers' modeling_gemma3.py, llama.cpp's GGUF layout.
#ifndef KEEL_GEMMA3_H
#define KEEL_GEMMA3_H

#include "models.h"

#include "base.h"
#include "platform.h"
#include "formats.h"
#include "device.h"
#include "ops.h"

// Blocks come in two kinds; arrays of two are indexed by it.
enum keel_layer_kind { KEEL_LOCAL, KEEL_GLOBAL };

// --- shape (config.c) ----------------------------------------------------------------------------

struct keel_gemma3 {
    uint32_t n_layers, width, ff_width, n_heads, n_kv_heads, head_dim, vocab;
    uint32_t window;  // tokens a local layer sees, itself included; 0: every layer is global
    uint32_t context;
    uint32_t n_global;
    float eps, attn_scale, embed_scale;
    float rope_base[2];   // by kind
    float rope_factor[2]; // inverse frequencies are divided by it
    uint8_t *kind;        // [n_layers] enum keel_layer_kind
};
static inline uint32_t keel_q_width(const struct keel_gemma3 *c)
{
    return c->n_heads * c->head_dim;
}
static inline uint32_t keel_kv_width(const struct keel_gemma3 *c)
{
    return c->n_kv_heads * c->head_dim;
}

// Tensors of one block; the seven projections come first, in the order of enum keel_proj.
enum keel_block_tensor {
    KEEL_T_ATTN_NORM = KEEL_N_PROJ,
    KEEL_T_Q_NORM,
    KEEL_T_K_NORM,
    KEEL_T_POST_ATTN_NORM,
    KEEL_T_FFN_NORM,
    KEEL_T_POST_FFW_NORM,
    KEEL_N_BLOCK_TENSORS
};
// Where the weights lie in the file.
struct keel_gemma3_source {
    const struct keel_gguf_tensor *embd, *output_norm;
    const struct keel_gguf_tensor *output; // NULL: the head is the embedding
    const struct keel_gguf_tensor **block; // [n_layers × KEEL_N_BLOCK_TENSORS]
};

// Reads and checks metadata and the tensor table. Allocates c->kind and s->block. Errors: FORMAT, UNSUPPORTED, NO_MEMORY.
keel_status keel_gemma3_read(struct keel_gemma3 *c, struct keel_gemma3_source *s, const keel_gguf *g, const keel_log *log);
void keel_gemma3_finish(struct keel_gemma3 *c, struct keel_gemma3_source *s); // frees; accepts all-zero

// A count or a number of the metadata, which must lie in [lo, hi]. Errors: FORMAT (missing, another type, out of range). A
// number that is not required leaves *out as it is.
keel_status keel_meta_u32(const keel_gguf *g, const char *key, uint32_t lo, uint32_t hi, uint32_t *out, const keel_log *log);
keel_status keel_meta_f32(const keel_gguf *g, const char *key, bool required, double lo, double hi, float *out,
                          const keel_log *log);

// --- weights (weights.c) -------------------------------------------------------------------------

struct keel_gemma3_block {
    struct keel_matrix proj[KEEL_N_PROJ];
    struct keel_span norm[KEEL_N_BLOCK_TENSORS - KEEL_N_PROJ]; // index: keel_block_tensor - KEEL_N_PROJ
};
struct keel_gemma3_weights {
    struct keel_matrix embd, output;
    const struct keel_matrix *head; // &output or &embd
    struct keel_span output_norm;
    struct keel_gemma3_block *block; // [n_layers]
};

struct keel_model {
    const keel_log *log;
    struct keel_map map;
    keel_gguf *gguf;
    keel_tokenizer *tok;
    struct keel_token_ids special;
    struct keel_model_info info;
    struct keel_gemma3 cfg;
    struct keel_gemma3_source src;
    keel_device *dev;
    keel_heap *heap; // weights
    struct keel_gemma3_weights w;
    struct keel_vision *vision; // borrowed; the tower whose maps adapters may change, or NULL
};

// Uploads all weights into model->heap. Errors: NO_MEMORY, NUMERIC, DEVICE_LOST.
keel_status keel_gemma3_upload(keel_model *model);
// Where weights come from and go to, for the three functions below.
struct keel_uploader {
    const keel_log *log;
    const char *path;           // of the file, for messages
    const struct keel_map *map; // pages that are done with are given back
    keel_device *dev;
    keel_heap *heap;
};
// Errors: NUMERIC (NaN or infinity; names the tensor), NO_MEMORY.
keel_status keel_weights_finite(const struct keel_uploader *u, const struct keel_gguf_tensor *t);
// As a matrix of dims[1] rows. Errors: as above, DEVICE_LOST.
keel_status keel_upload_matrix(const struct keel_uploader *u, struct keel_matrix *m, const struct keel_gguf_tensor *t);
// As f32 whatever the file holds: norms, biases, positions. Errors: as above, DEVICE_LOST.
keel_status keel_upload_floats(const struct keel_uploader *u, struct keel_span *span, const struct keel_gguf_tensor *t);
// Device bytes of the embedding and head matrices, and of everything else.
void keel_gemma3_weight_bytes(const keel_model *model, uint64_t *embd, uint64_t *rest);

// --- layouts (plan.c) ----------------------------------------------------------------------------

// The memory plan and the allocations run the same code: with a heap spans are allocated, without one they are only counted.
struct keel_layout {
    keel_heap *heap;        // NULL: count only
    struct keel_span whole; // memory to cut spans from before asking the heap
    uint64_t bytes;
    keel_status st;         // sticky
};
void keel_want(struct keel_layout *l, struct keel_span *span, uint64_t bytes);

// Allocates a heap and everything `want` asks for in it: counts first, then takes the memory in one piece where the device
// allows it, so that plan and reality agree. `want` is called twice.
keel_status keel_layout_make(keel_heap **heap, keel_device *dev, enum keel_heap_kind kind, const char *label,
                             void (*want)(struct keel_layout *l, void *user), void *user);
// Rows of logits held at once: at most `want` and 64 MiB, at least 1.
uint32_t keel_logit_rows(const struct keel_gemma3 *c, uint32_t want, uint64_t max_range);

// --- batches (batch.c) ---------------------------------------------------------------------------

// Which tokens hooks are for, and how much of the hook each gets.
struct keel_mark_set {
    struct keel_positions at;
    struct keel_hook_schedule tokens, steps;
};

// Tokens of one pass with all that depends on where they stand. Causal order, sliding windows, packed rows and image blocks are
// all expressed by the spans.
struct keel_batch {
    const struct keel_gemma3 *c;
    uint32_t cap, n_tokens;
    struct keel_span ids;      // [cap] u32, host heap, as all below
    struct keel_span spans[2]; // [cap] struct keel_token_span
    struct keel_span rope[2];  // [cap, d/2, 2] f32
    // Groups: attention runs over each alone; spans count from the group's first token. A cached pass has one.
    struct keel_batch_group {
        uint32_t t0, n;
        uint32_t max_span[2], max_union[2], max_q_union[2];
    } *group;
    uint32_t n_groups, cap_groups;
    // Places where logits are wanted, in chunks that start on 256-byte borders.
    uint32_t cap_places, n_places, chunk;
    struct keel_span place;   // [cap_places] u32: token of the batch; in chunks of `chunk`
    struct keel_span target;  // [cap_places] u32
    struct keel_span weight;  // [cap_places] f32
    struct keel_span stats;   // [cap_places, 4] f32, written by the device
    // Embeddings of image tokens, which replace those of their ids. Nothing until a row with images comes.
    keel_heap *image_heap;
    struct keel_span image_rows;  // [cap, D] f32
    struct keel_span image_place; // [cap] u32: token of the batch
    uint32_t n_image_tokens;
    float *inv_freq[2];       // [d/2]
    // Marks of hooks: how much of a hook each token gets. Nothing without hooks.
    keel_heap *mark_heap;
    uint32_t n_sets, n_factors;
    struct keel_mark_set set[KEEL_MAX_POSITION_SETS];
    uint64_t step; // steps of training done
    struct keel_span mark[KEEL_MAX_POSITION_SETS]; // [cap] f32
    struct keel_span factor;                       // [n_factors] rows of [cap] f32, written by the device
    uint32_t *row_of, *token_of;                   // [cap] number of a token's row, and its place there
};
keel_status keel_batch_init(struct keel_batch *b, const struct keel_gemma3 *c, const keel_log *log);
void keel_batch_finish(struct keel_batch *b); // frees host memory and the room for images; other spans belong to their heap
void keel_batch_clear(struct keel_batch *b);
// `cap` tokens, `places` places handled in chunks of `chunk`. Spans for a heap that the host sees.
void keel_batch_layout(struct keel_layout *l, struct keel_batch *b, const struct keel_gemma3 *c, uint32_t cap, uint32_t places,
                       uint32_t chunk);
// Makes room for the embeddings of as many image tokens as the batch takes, if there is none yet. Needed before rows with images
// are added. Errors: NO_MEMORY.
keel_status keel_batch_make_image_room(struct keel_batch *b, keel_device *dev);
void keel_batch_image_layout(struct keel_layout *l, struct keel_batch *b);

struct keel_batch_row {
    const int32_t *ids;
    uint32_t n;
    const struct keel_image_tokens *images; // [n_images], of the row that ids[0] is token `from` of; none is cut by these tokens
    uint32_t n_images, from;
    uint32_t pos;  // position of ids[0] in its sequence
    bool cached;   // keys and values go to a cache, position 0 at its row `slot0`; otherwise rows are packed into the batch
    uint32_t slot0;
    bool split;    // start a new group with this row
    // For hooks:
    uint32_t prompt;     // tokens of the sequence before the response
    const uint8_t *mask; // [n] or NULL: instead, the tokens that belong to responses
    bool decode;         // the model wrote these tokens
    uint32_t number;     // of the row in the caller's list
};
// Adds tokens; returns the batch index of the first. There must be room. Errors: NO_MEMORY.
keel_status keel_batch_add(struct keel_batch *b, const struct keel_batch_row *row, uint32_t *first);
// Makes room for the marks of these hooks, uploads their directions; NULL: no hooks. Rows added before are not marked. Errors:
// NO_MEMORY, DEVICE_LOST.
keel_status keel_batch_set_hooks(struct keel_batch *b, const keel_hooks *hooks);
void keel_batch_forget_hooks(struct keel_batch *b);
void keel_batch_mark(struct keel_batch *b, const struct keel_batch_row *row, uint32_t first); // the row that begins at `first`
bool keel_hooks_count_steps(const keel_hooks *hooks); // whether one has a schedule over training steps; NULL: no
// End of the longest part [from, end) with end <= to that cuts no image; above `from` if images are no longer than to - from.
uint32_t keel_batch_cut(const struct keel_image_tokens *images, uint32_t n_images, uint32_t from, uint32_t to);
// Checks the images of a row of `n` tokens, which will be computed in parts of up to `n_batch`. `what` begins the messages.
// Errors: ARG.
keel_status keel_images_check(const struct keel_image_tokens *images, uint32_t n_images, uint32_t n, uint32_t n_batch,
                              const char *what, const keel_log *log);
// Adds a place: logits after token `t` of the batch, compared with `target`.
void keel_batch_place(struct keel_batch *b, uint32_t t, int32_t target, float weight);
// Computes group limits and makes all visible to the device.
void keel_batch_ready(struct keel_batch *b, keel_device *dev);
static inline uint32_t keel_batch_room(const struct keel_batch *b)
{
    return b->cap - b->n_tokens;
}
// Part of a per-place array (elements of `size` bytes) that belongs to the chunk beginning at place `p`.
struct keel_span keel_place_span(const struct keel_batch *b, struct keel_span s, uint32_t p, uint32_t n, uint32_t size);

// --- pass (forward.c) ----------------------------------------------------------------------------

// A key/value cache: one row a position, local layers as a ring.
struct keel_kv {
    enum keel_dtype type;
    uint32_t rows[2];       // by kind
    struct keel_span *k, *v; // [n_layers], of [rows, G, d]
};
// "f32", "f16" or "q8_0"; NULL: f32. Errors: ARG.
keel_status keel_kv_type_parse(const char *text, enum keel_dtype *type, const keel_log *log);
uint64_t keel_kv_row_bytes(const struct keel_gemma3 *c, enum keel_dtype type); // of the keys of a position in one layer
// Rows of a cache for `n_ctx` tokens in passes of up to `n_batch`; a ring must not overwrite what a pass still reads.
void keel_kv_rows(const struct keel_gemma3 *c, uint32_t n_ctx, uint32_t n_batch, uint32_t rows[2]);
// kv->type is set already.
void keel_kv_layout(struct keel_layout *l, struct keel_kv *kv, const struct keel_gemma3 *c, uint32_t n_ctx, uint32_t n_batch);

// Records that a new cache becomes zero. Attention multiplies keys that a token does not see by zero probabilities: those of
// other sequences in its group, and rows that nothing was written to yet. Memory as it comes may hold NaN there.
void keel_kv_clear(keel_recorder *rec, const struct keel_kv *kv, const struct keel_gemma3 *c);

// What score and kl need beside a pass: normalised rows at the places, logits, statistics scratch. `n_models` 2 for kl.
struct keel_scorer {
    uint32_t places, chunk;
    struct keel_span rows[2];    // [places, D]
    struct keel_span logits[2];  // [chunk, V]
    struct keel_span partial;
    struct keel_span stats;      // of the second model
};
void keel_scorer_layout(struct keel_layout *l, struct keel_scorer *s, const struct keel_gemma3 *c, uint32_t places,
                        uint32_t chunk, uint32_t n_models);

// Activations of one block for `cap` tokens. Where the backward pass needs nothing, fields share memory.
struct keel_acts {
    uint32_t cap;
    struct keel_span x;         // [T, D] residual stream
    struct keel_span xn, q, k, v, qr, kr, o, ao, x1, fn, gate, up, act, down;
    struct keel_span p;         // attention probabilities
    struct keel_span h[KEEL_N_PROJ]; // [T, r] of the adapters; shared by all adapters of a pass
};
void keel_acts_layout(struct keel_layout *l, struct keel_acts *a, const struct keel_gemma3 *c, uint32_t cap, uint32_t max_span,
                      bool keep, uint64_t max_range);
void keel_lora_layout(struct keel_layout *l, struct keel_acts *a, uint32_t cap, uint32_t rank);

struct keel_pass {
    keel_recorder *rec;
    const keel_model *model;
    const struct keel_batch *batch;
    const struct keel_acts *acts;
    const keel_adapter *const *adapters;
    uint32_t n_adapters;
    const struct keel_kv *kv; // NULL: keys and values of the batch itself
    uint32_t bucket;          // above 0: record for spans of up to this many tokens rather than for those of the batch
    uint32_t seq_rows;        // with bucket, where a group holds one token of each of several sequences: cache rows of a sequence
    const keel_hooks *hooks;  // those that the batch was made for; NULL: none
};
// acts->x = scaled embedding of the batch's ids; at image tokens their own embeddings, which are not scaled.
void keel_pass_embed(const struct keel_pass *p);
// One block: y [T, D] = block(x). y may be x when acts were laid out without `keep`. With `y` nothing the last norm is left out
// (the backward pass only needs what lies before it): x then has been through its hooks already.
void keel_pass_block(const struct keel_pass *p, uint32_t layer, struct keel_span x, struct keel_span y);
// Attention of one group; also used by the backward pass to get the probabilities of a group back.
void keel_pass_attention(const struct keel_pass *p, uint32_t layer, const struct keel_batch_group *g);
// All blocks in place on acts->x.
void keel_pass_blocks(const struct keel_pass *p);
// Hooks of a site, on x [T, D] in place; whether there are any; what they do to a gradient.
void keel_pass_hooks(const struct keel_pass *p, enum keel_site site, uint32_t layer, struct keel_span x);
bool keel_pass_hooked(const struct keel_pass *p, enum keel_site site, uint32_t layer);
void keel_pass_hooks_back(const struct keel_pass *p, enum keel_site site, uint32_t layer, struct keel_span dx);
keel_status keel_pass_after(const struct keel_pass *p); // tells who captures that the batch was computed
// logits [n, V] = head(rows), rows [n, D] already normalised.
void keel_pass_head(const struct keel_pass *p, struct keel_span rows, struct keel_span logits, uint32_t n);

// --- training (trainer.c) -------------------------------------------------------------------------

// Adds the trainer's part of a memory plan through `row`.
void keel_trainer_plan(const keel_model *model, uint32_t tokens, uint32_t max_row, uint32_t rank, struct keel_plan *out,
                       void (*row)(struct keel_plan *p, const char *what, uint64_t bytes, bool host));

// Host memory that constrained losses or divergences at up to `max_loss` places take on top.
uint64_t keel_trainer_extra_bytes(const keel_model *model, uint32_t max_loss, bool divergence);

// --- adapters in host memory (adapter_file.c, adapter_peft.c) -------------------------------------

// Pairs that an adapter of this model can have, those of its vision tower after its own, and their shapes.
uint32_t keel_adapter_n_pairs(const keel_model *model);
void keel_adapter_pair_shape(const keel_model *model, uint32_t pair, uint32_t *k, uint32_t *n);

struct keel_adapter_file {
    float alpha;
    uint32_t rank;
    uint32_t n_pairs;   // keel_adapter_n_pairs()
    uint32_t n_skipped; // tensors of a vision tower, which the model does not have
    struct keel_adapter_pair {
        uint32_t rank;
        float scale; // alpha / rank, or what the file says instead
        float *a, *b; // [rank, K], [N, rank]
    } *pair; // [n_pairs]
};
keel_status keel_adapter_file_read(struct keel_adapter_file *f, const keel_model *model, const char *path);
keel_status keel_adapter_file_write(const struct keel_adapter_file *f, const keel_model *model, const char *path);
void keel_adapter_file_finish(struct keel_adapter_file *f);
keel_status keel_adapter_file_init(struct keel_adapter_file *f, const keel_model *model);
// The parts of the PEFT layout.
keel_status keel_peft_read(struct keel_adapter_file *f, const keel_model *model, const char *path);
keel_status keel_peft_write(const struct keel_adapter_file *f, const keel_model *model, const char *path);
// What the name of a tensor says: a map of a block, or (vision, layer UINT32_MAX) the projector; which of the two matrices.
struct keel_pair_name {
    bool vision, is_b;
    uint32_t layer, proj;
};
// Checks one tensor, `dims` [rows, columns] as PyTorch has it, and makes room for it in its pair: `*where` is to be filled, NULL: to
// be skipped, as it belongs to a tower that the model does not have. `*pair`: its index.
keel_status keel_adapter_file_tensor(struct keel_adapter_file *f, const keel_model *model, const char *path, const char *name,
                                     const struct keel_pair_name *which, const uint64_t dims[2], uint32_t *pair, float **where);
// After all tensors: every pair is complete and finite; sets f->rank to the largest.
keel_status keel_adapter_file_check(struct keel_adapter_file *f, const keel_model *model, const char *path);

// --- sampling (sample.c) -------------------------------------------------------------------------

// Draws a token. `seen`: the last tokens for the repetition penalty. `scratch` holds 2 × vocab floats' worth of bytes.
struct keel_candidate {
    int32_t id;
    float logit;
};
int32_t keel_sample(const float *logits, uint32_t vocab, const struct keel_sample_params *params, const int32_t *seen,
                    size_t n_seen, uint64_t position, struct keel_candidate *scratch);

#endif
