// SPDX-License-Identifier: MIT
// gemma3/vision_internal.h: what the files of the vision tower share: its shape, its weights, the tower itself.
// Source: transformers' modeling_siglip.py and Gemma3MultiModalProjector; llama.cpp's GGUF layout for "clip" files.
#ifndef KEEL_GEMMA3_VISION_INTERNAL_H
#define KEEL_GEMMA3_VISION_INTERNAL_H

#include "gemma3.h"

#include <keel/vision.h>

#include <math.h>

// --- shape and file (vision_config.c) ------------------------------------------------------------

struct keel_siglip {
    uint32_t image_size, patch;
    uint32_t grid;     // patches along a side
    uint32_t n_patches; // grid²
    uint32_t kernel;   // patches along the side of the square that is averaged into one token
    uint32_t side;     // tokens along a side
    uint32_t n_tokens; // side²
    uint32_t width, ff_width, n_layers, n_heads, head_dim;
    uint32_t out_width;
    float eps;
    float mean[3], std[3]; // of channels scaled to [0, 1]
};
// Values of one patch: columns of the patch embedding, [3, patch, patch].
static inline uint32_t keel_patch_cols(const struct keel_siglip *c)
{
    return 3 * c->patch * c->patch;
}

static inline float keel_siglip_scale(const struct keel_siglip *c)
{
    return 1.0f / sqrtf((float)c->head_dim);
}

// Linear maps of a block with a bias each, then the two norms.
enum keel_siglip_proj { KEEL_V_Q, KEEL_V_K, KEEL_V_V, KEEL_V_OUT, KEEL_V_UP, KEEL_V_DOWN, KEEL_V_N_PROJ };
enum keel_siglip_norm { KEEL_V_LN1, KEEL_V_LN2, KEEL_V_N_NORM };

struct keel_siglip_source {
    const struct keel_gguf_tensor *patch, *patch_bias, *position, *post_norm, *post_norm_bias;
    const struct keel_gguf_tensor *soft_norm;
    const struct keel_gguf_tensor *proj; // [out_width, width] in GGUF order: transposed against all other matrices
    struct keel_siglip_block_source {
        const struct keel_gguf_tensor *w[KEEL_V_N_PROJ], *b[KEEL_V_N_PROJ];
        const struct keel_gguf_tensor *norm[KEEL_V_N_NORM], *norm_bias[KEEL_V_N_NORM];
    } *block; // [n_layers]
};

// Reads and checks metadata and the tensor table. Allocates s->block. Errors: FORMAT, UNSUPPORTED, NO_MEMORY.
keel_status keel_siglip_read(struct keel_siglip *c, struct keel_siglip_source *s, const keel_gguf *g, const keel_log *log);
void keel_siglip_finish(struct keel_siglip_source *s); // frees; accepts all-zero

// --- weights (vision_weights.c) ------------------------------------------------------------------

struct keel_siglip_weights {
    struct keel_matrix patch, proj;
    struct keel_span patch_bias, position, post_norm, post_norm_bias, soft_norm;
    struct keel_siglip_block {
        struct keel_matrix w[KEEL_V_N_PROJ];
        struct keel_span b[KEEL_V_N_PROJ], norm[KEEL_V_N_NORM], norm_bias[KEEL_V_N_NORM];
    } *block; // [n_layers]
};

struct keel_vision {
    const keel_log *log;
    struct keel_map map;
    keel_gguf *gguf;
    struct keel_vision_info info;
    struct keel_siglip cfg;
    struct keel_siglip_source src;
    keel_device *dev;
    keel_heap *heap; // weights
    struct keel_siglip_weights w;
    struct keel_tower *tower; // buffers and recorder of a pass; NULL until the first image
    const keel_adapter *adapters[8]; // borrowed: those whose vision pairs are in force
    uint64_t adapter_hash[8];        // of their parameters and scales
    uint32_t n_adapters;
    keel_adapter *owned[8];          // those of them that this object loaded
    uint32_t n_owned;
    struct keel_pan_and_scan crops;  // max_crops 0: whole images only
    bool cache_warned;
    uint64_t cache_limit, cache_bytes; // what entries may take; about what they take, 0 until one was written
    keel_hooks *hooks; // borrowed: those at sites of the tower are in force; NULL: none
    uint32_t capture_row, capture_first; // number of the row whose image is run, of the image's first patch in it: for captures
};

// Uploads all weights into vision->heap. Errors: NO_MEMORY, NUMERIC, DEVICE_LOST.
keel_status keel_siglip_upload(keel_vision *vision);
uint64_t keel_siglip_weight_bytes(const keel_vision *vision); // what it will allocate

// --- pass (vision_tower.c) -----------------------------------------------------------------------

// Patches that go through a feed-forward layer at once: 4304 wide, all 4096 would take 70 MB. A multiple of 64, so that parts of
// a span begin where bindings may.
#define KEEL_FFN_ROWS 512u
static inline struct keel_span keel_rows(struct keel_span s, uint32_t first, uint32_t n, uint32_t width)
{
    return keel_span_sub(s, 4ull * first * width, 4ull * n * width);
}

// Activations of one image, P patches. Where nothing is needed on the way back, fields share memory.
struct keel_tower_acts {
    struct keel_span spans;   // [P] struct keel_token_span: every patch sees all
    struct keel_span patches; // [P, 3·patch²]
    struct keel_span x;       // [P, D] residual stream
    struct keel_span xn, q, k, v, o, half, x1, fn; // [P, D]; half: a half block's output before it is added to the stream
    struct keel_span up, act; // [KEEL_FFN_ROWS, F]
    struct keel_span p;       // attention probabilities of a chunk of patches
    struct keel_span pooled, normed; // [n_tokens, D]
    struct keel_span tokens;  // [n_tokens, out_width]
    struct keel_span h[KEEL_V_N_PROJ + 1]; // [P, r] of the adapters; the last one, [n_tokens, r], of the projector
};
// `keep`: for the backward pass.
void keel_tower_layout(struct keel_layout *l, struct keel_tower_acts *a, const struct keel_siglip *c, bool keep);
void keel_tower_lora_layout(struct keel_layout *l, struct keel_tower_acts *a, const struct keel_siglip *c, uint32_t rank);
keel_status keel_tower_spans(const struct keel_tower_acts *a, keel_device *dev, uint32_t n_patches); // fills a->spans

// Hooks in force during a pass over one image, and what they need on the device. All-zero: none.
struct keel_tower_hooks {
    const keel_hooks *hooks;
    keel_heap *heap;
    uint32_t n;                     // patches
    struct keel_span marks, factor; // [n]: all 1; room for what limits leave
    float *ones;                    // [n] the marks in host memory
    uint32_t *row;                  // [2, n] row of each patch, and its place there
};

struct keel_tower_pass {
    keel_recorder *rec;
    const keel_vision *v;
    const struct keel_tower_acts *a;
    const keel_adapter *const *adapters;
    uint32_t n_adapters;
    const struct keel_tower_hooks *hooks; // NULL: none; for passes of which nothing is kept
};
// The pair of an adapter for a map of a block, or for the projector (layer n_layers, proj 0). NULL where there is none.
static inline const struct keel_lora *keel_vision_pair(const keel_adapter *a, uint32_t layer, uint32_t proj)
{
    const struct keel_lora *pair = a->vision ? &a->vision[(size_t)layer * KEEL_V_N_PROJ + proj] : NULL;
    return pair && pair->rank > 0 ? pair : NULL;
}
uint32_t keel_vision_rank(const struct keel_tower_pass *p); // the largest rank of any pair, 0 if there is none

void keel_tower_embed(const struct keel_tower_pass *p, struct keel_span x);   // x from a->patches
void keel_tower_project(const struct keel_tower_pass *p, struct keel_span x); // a->tokens from the last block's output
void keel_tower_block(const struct keel_tower_pass *p, uint32_t layer, struct keel_span x, struct keel_span y); // y may be x unless kept
// The parts of a block: everything up to a->fn; a->act of `n` rows of the feed-forward layer.
void keel_tower_attention_half(const struct keel_tower_pass *p, uint32_t layer, struct keel_span x);
void keel_tower_ffn_rows(const struct keel_tower_pass *p, uint32_t layer, uint32_t first, uint32_t n);
// Hooks at a site of the tower (hooks.c). make: for the vision's list, if it has any there; frees what was there before.
keel_status keel_tower_hooks_make(struct keel_tower_hooks *t, const keel_vision *vision);
void keel_tower_hooks_finish(struct keel_tower_hooks *t); // accepts all-zero
bool keel_tower_hooked(const struct keel_tower_pass *p, enum keel_site site, uint32_t layer);
void keel_tower_apply(const struct keel_tower_pass *p, enum keel_site site, uint32_t layer, struct keel_span x);
keel_status keel_tower_after(const struct keel_tower_pass *p); // tells a capture that the pass is done
uint64_t keel_hooks_tower_hash(const keel_hooks *hooks, uint64_t hash); // of those in the tower; without any: `hash`
bool keel_hooks_tower_captures(const keel_hooks *hooks);
// Submits, waits, and copies a->tokens. Errors: NUMERIC, DEVICE_LOST.
keel_status keel_tower_read(const struct keel_tower_pass *p, float *tokens);

// Buffers for inference of one image on vision->dev. Errors: NO_MEMORY.
keel_status keel_tower_create(struct keel_tower **out, const keel_vision *vision);
void keel_tower_destroy(struct keel_tower **tower); // accepts &NULL
uint64_t keel_tower_bytes(const struct keel_siglip *c); // device memory of those buffers
// tokens [n_tokens, out_width] from patches [n_patches, 3, patch, patch], both in host memory, under vision->adapters. Blocks.
// Errors: NUMERIC, NO_MEMORY, DEVICE_LOST.
keel_status keel_tower_run(const keel_vision *vision, const float *patches, float *tokens);

// --- images (vision.c) ---------------------------------------------------------------------------

// Boxes of the crops of an image, left to right or top to bottom; 0: it is shown whole only. box: room for KEEL_MAX_CROPS.
uint32_t keel_crops(const struct keel_pan_and_scan *params, uint32_t width, uint32_t height, struct keel_box *box);
// Patches of a view of an image file, resized and normalised: [n_patches, 3, patch, patch], malloc'ed. Errors: as keel_vision_encode().
keel_status keel_vision_patches(const keel_vision *vision, const char *image_path, uint32_t view, float **patches);

// --- disk cache (vision_cache.c) ------------------------------------------------------------------

// Reads the size that entries may take from the environment. Errors: ARG (not a size).
keel_status keel_vision_cache_open(keel_vision *vision);
// `pixels`: hash of the decoded image; vision->info.hash must be known. False when there is no sound entry.
bool keel_vision_cache_read(const keel_vision *vision, uint64_t pixels, float *tokens);
// A failure is a warning, once.
void keel_vision_cache_write(keel_vision *vision, uint64_t pixels, const float *tokens);

#endif
