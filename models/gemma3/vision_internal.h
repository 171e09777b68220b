// SPDX-License-Identifier: MIT
// gemma3/vision_internal.h: what the files of the vision tower share: its shape, its weights, the tower itself.
// Source: transformers' modeling_siglip.py and Gemma3MultiModalProjector; llama.cpp's GGUF layout for "clip" files.
#ifndef KEEL_GEMMA3_VISION_INTERNAL_H
#define KEEL_GEMMA3_VISION_INTERNAL_H

#include "gemma3.h"

#include <keel/vision.h>

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
    struct keel_tower *tower; // buffers and recorder of a pass; NULL until loaded
    bool cache_warned;
};

// Uploads all weights into vision->heap. Errors: NO_MEMORY, NUMERIC, DEVICE_LOST.
keel_status keel_siglip_upload(keel_vision *vision);
uint64_t keel_siglip_weight_bytes(const keel_vision *vision); // what it will allocate

// --- pass (vision_tower.c) -----------------------------------------------------------------------

// Buffers for one image on vision->dev. Errors: UNSUPPORTED (above the device's limits), NO_MEMORY.
keel_status keel_tower_create(struct keel_tower **out, const keel_vision *vision);
void keel_tower_destroy(struct keel_tower **tower); // accepts &NULL
uint64_t keel_tower_bytes(const struct keel_siglip *c); // device memory of those buffers
// tokens [n_tokens, out_width] from patches [n_patches, 3, patch, patch], both in host memory. Blocks until done.
// Errors: NUMERIC, DEVICE_LOST.
keel_status keel_tower_run(const keel_vision *vision, const float *patches, float *tokens);

// --- disk cache (vision_cache.c) ------------------------------------------------------------------

// `pixels`: hash of the decoded image; vision->info.hash must be known. False when there is no sound entry.
bool keel_vision_cache_read(const keel_vision *vision, uint64_t pixels, float *tokens);
// A failure is a warning, once.
void keel_vision_cache_write(keel_vision *vision, uint64_t pixels, const float *tokens);

#endif
