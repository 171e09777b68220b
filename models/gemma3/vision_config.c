// SPDX-License-Identifier: MIT
// gemma3/vision_config.c: reads the shape of a vision tower and projector from an mmproj GGUF and checks its tensors.
// Owns no tensor data. Source: llama.cpp's converter (Gemma3VisionModel) and clip loader for names and defaults.
#include "vision_internal.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// --- metadata ------------------------------------------------------------------------------------

static keel_status check_kind(const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const char *name = keel_gguf_name(g);
    const char *arch = keel_gguf_str(g, "general.architecture", NULL);
    const char *kind = keel_gguf_str(g, "clip.vision.projector_type", NULL);
    bool gelu = false, silu = false;
    if (!arch || strcmp(arch, "clip") != 0) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED,
                  "%s: architecture \"%s\" is no vision tower; an mmproj file has architecture \"clip\"", name, arch ? arch : "");
    }
    if (!kind) {
        kind = keel_gguf_str(g, "clip.projector_type", NULL);
    }
    if (!kind) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: metadata \"clip.projector_type\" is missing", name);
    }
    if (strcmp(kind, "gemma3") != 0) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: projector \"%s\" is not supported; keel runs: gemma3", name, kind);
    }
    // transformers' SigLIP uses GELU in its tanh form, which is what llama.cpp means by use_gelu.
    if ((keel_gguf_bool(g, "clip.use_silu", &silu) && silu) || !keel_gguf_bool(g, "clip.use_gelu", &gelu) || !gelu) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: metadata \"clip.use_gelu\" is not true; keel's tower computes GELU only", name);
    }
out:
    return st;
}

static keel_status read_colour(const keel_gguf *g, const char *key, double lo, float out[3], const keel_log *log)
{
    struct keel_gguf_array a = {0};
    if (!keel_gguf_array(g, key, &a) || !keel_gguf_type_is_float(a.type) || a.n != 3) {
        KEEL_ERROR(log, "%s: metadata \"%s\" is missing or not a list of 3 numbers", keel_gguf_name(g), key);
        return KEEL_ERR_FORMAT;
    }
    for (uint32_t i = 0; i < 3; i++) {
        const double v = keel_gguf_array_num(&a, i);
        if (!(v >= lo && v <= 1.0)) {
            KEEL_ERROR(log, "%s: metadata \"%s\" holds %g; keel accepts %g to 1", keel_gguf_name(g), key, v, lo);
            return KEEL_ERR_FORMAT;
        }
        out[i] = (float)v;
    }
    return KEEL_OK;
}

// How patches become tokens: squares of `kernel` × `kernel` patches; 4 unless the file says otherwise, as in llama.cpp.
static keel_status read_grid(struct keel_siglip *c, const keel_gguf *g, const keel_log *log)
{
    static const char key[] = "clip.vision.projector.scale_factor";
    keel_status st = KEEL_OK;
    uint64_t given = 0;
    if (c->image_size < c->patch) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: images of %u pixels hold no patch of %u", keel_gguf_name(g), c->image_size, c->patch);
    }
    c->grid = c->image_size / c->patch;
    c->n_patches = c->grid * c->grid;
    c->kernel = 4;
    if (keel_gguf_u64(g, key, &given)) {
        KEEL_TRY(keel_meta_u32(g, key, 1, c->grid, &c->kernel, log));
    }
    if (c->kernel > c->grid) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: %u × %u patches cannot be averaged %u × %u; metadata \"%s\" is missing",
                  keel_gguf_name(g), c->grid, c->grid, c->kernel, c->kernel, key);
    }
    c->side = c->grid / c->kernel;
    c->n_tokens = c->side * c->side;
out:
    return st;
}

static keel_status read_shape(struct keel_siglip *c, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(check_kind(g, log));
    KEEL_TRY(keel_meta_u32(g, "clip.vision.image_size", 1, 1792, &c->image_size, log));
    KEEL_TRY(keel_meta_u32(g, "clip.vision.patch_size", 1, 256, &c->patch, log));
    KEEL_TRY(keel_meta_u32(g, "clip.vision.embedding_length", 8, 1u << 16, &c->width, log));
    KEEL_TRY(keel_meta_u32(g, "clip.vision.feed_forward_length", 8, 1u << 18, &c->ff_width, log));
    KEEL_TRY(keel_meta_u32(g, "clip.vision.block_count", 1, 512, &c->n_layers, log));
    KEEL_TRY(keel_meta_u32(g, "clip.vision.attention.head_count", 1, 1024, &c->n_heads, log));
    KEEL_TRY(keel_meta_u32(g, "clip.vision.projection_dim", 8, 1u << 17, &c->out_width, log));
    KEEL_TRY(keel_meta_f32(g, "clip.vision.attention.layer_norm_epsilon", true, 1e-12, 1e-2, &c->eps, log));
    KEEL_TRY(read_colour(g, "clip.vision.image_mean", 0.0, c->mean, log));
    KEEL_TRY(read_colour(g, "clip.vision.image_std", 1e-3, c->std, log));
    if (c->width % c->n_heads != 0) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: a width of %u does not split into %u heads", keel_gguf_name(g), c->width, c->n_heads);
    }
    c->head_dim = c->width / c->n_heads;
    if (c->head_dim > 1024) { // a lane of the attention shaders holds at most 16 values of a head
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: heads of %u are above 1024", keel_gguf_name(g), c->head_dim);
    }
    KEEL_TRY(read_grid(c, g, log));
out:
    return st;
}

// --- tensors -------------------------------------------------------------------------------------

static const char *const proj_name[KEEL_V_N_PROJ] = {
    [KEEL_V_Q] = "attn_q",     [KEEL_V_K] = "attn_k",  [KEEL_V_V] = "attn_v",
    [KEEL_V_OUT] = "attn_out", [KEEL_V_UP] = "ffn_up", [KEEL_V_DOWN] = "ffn_down",
};
static const char *const norm_name[KEEL_V_N_NORM] = { [KEEL_V_LN1] = "ln1", [KEEL_V_LN2] = "ln2" };

struct reader {
    const keel_gguf *g;
    const keel_log *log;
    size_t n_found;
};

// Finds a tensor whose shape is `dims` in GGUF order.
static keel_status find(struct reader *r, const char *name, const uint64_t dims[4], const struct keel_gguf_tensor **out)
{
    const struct keel_gguf_tensor *t = keel_gguf_tensor_find(r->g, name);
    *out = t;
    if (!t) {
        KEEL_ERROR(r->log, "%s: tensor \"%s\" is missing", keel_gguf_name(r->g), name);
        return KEEL_ERR_FORMAT;
    }
    r->n_found++;
    if (memcmp(t->dims, dims, sizeof t->dims) != 0) {
        KEEL_ERROR(r->log,
                   "%s: tensor \"%s\" has shape [%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 "], the metadata ask for "
                   "[%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 "]",
                   keel_gguf_name(r->g), name, t->dims[0], t->dims[1], t->dims[2], t->dims[3], dims[0], dims[1], dims[2], dims[3]);
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

#define FIND(r, name, out, ...) find((r), (name), (const uint64_t[4]){__VA_ARGS__}, (out))

// llama.cpp's first converters called the two feed-forward matrices by each other's name, and files made by them are still
// about. The shapes tell, except where the two widths are the same: then the names are taken at their word.
static bool ffn_is_swapped(const keel_gguf *g, const struct keel_siglip *c, uint32_t layer)
{
    char name[96];
    snprintf(name, sizeof name, "v.blk.%u.ffn_down.weight", layer);
    const struct keel_gguf_tensor *t = keel_gguf_tensor_find(g, name);
    return t && c->width != c->ff_width && t->dims[0] == c->width && t->dims[1] == c->ff_width;
}

static keel_status read_block(struct reader *r, const struct keel_siglip *c, uint32_t layer, struct keel_siglip_block_source *b)
{
    keel_status st = KEEL_OK;
    char name[96];
    const bool swapped = ffn_is_swapped(r->g, c, layer);
    for (uint32_t i = 0; i < KEEL_V_N_PROJ; i++) {
        const uint64_t k = i == KEEL_V_DOWN ? c->ff_width : c->width, n = i == KEEL_V_UP ? c->ff_width : c->width;
        const uint32_t named = !swapped ? i : i == KEEL_V_UP ? KEEL_V_DOWN : i == KEEL_V_DOWN ? KEEL_V_UP : i;
        snprintf(name, sizeof name, "v.blk.%u.%s.weight", layer, proj_name[named]);
        KEEL_TRY(FIND(r, name, &b->w[i], k, n, 1, 1));
        snprintf(name, sizeof name, "v.blk.%u.%s.bias", layer, proj_name[named]);
        KEEL_TRY(FIND(r, name, &b->b[i], n, 1, 1, 1));
    }
    for (uint32_t i = 0; i < KEEL_V_N_NORM; i++) {
        snprintf(name, sizeof name, "v.blk.%u.%s.weight", layer, norm_name[i]);
        KEEL_TRY(FIND(r, name, &b->norm[i], c->width, 1, 1, 1));
        snprintf(name, sizeof name, "v.blk.%u.%s.bias", layer, norm_name[i]);
        KEEL_TRY(FIND(r, name, &b->norm_bias[i], c->width, 1, 1, 1));
    }
out:
    return st;
}

static const char *const whole_name[] = {
    "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight",     "v.post_ln.weight",
    "v.post_ln.bias",      "mm.soft_emb_norm.weight", "mm.input_projection.weight",
};

// A tensor that is not computed with would make the results wrong.
static keel_status reject_unknown(const struct reader *r, const struct keel_siglip *c)
{
    for (size_t i = 0; i < keel_gguf_tensor_count(r->g); i++) {
        const char *name = keel_gguf_tensor_at(r->g, i)->name;
        bool known = false;
        unsigned layer = 0;
        int at = 0;
        for (size_t k = 0; k < KEEL_COUNT(whole_name) && !known; k++) {
            known = strcmp(name, whole_name[k]) == 0;
        }
        if (!known && sscanf(name, "v.blk.%u.%n", &layer, &at) == 1 && at > 0 && layer < c->n_layers) {
            const size_t len = strcspn(name + at, ".");
            const char *end = name + at + len;
            for (uint32_t k = 0; k < KEEL_V_N_PROJ + KEEL_V_N_NORM && !known; k++) {
                const char *want = k < KEEL_V_N_PROJ ? proj_name[k] : norm_name[k - KEEL_V_N_PROJ];
                known = strlen(want) == len && memcmp(want, name + at, len) == 0 &&
                        (strcmp(end, ".weight") == 0 || strcmp(end, ".bias") == 0);
            }
        }
        if (!known) {
            KEEL_ERROR(r->log, "%s: tensor \"%s\" is no part of a Gemma 3 vision tower of %u layers", keel_gguf_name(r->g), name,
                       c->n_layers);
            return KEEL_ERR_UNSUPPORTED;
        }
    }
    return KEEL_OK;
}

static keel_status read_tensors(struct keel_siglip *c, struct keel_siglip_source *s, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct reader r = {.g = g, .log = log};
    KEEL_TRY(FIND(&r, "v.patch_embd.weight", &s->patch, c->patch, c->patch, 3, c->width));
    KEEL_TRY(FIND(&r, "v.patch_embd.bias", &s->patch_bias, c->width, 1, 1, 1));
    KEEL_TRY(FIND(&r, "v.position_embd.weight", &s->position, c->width, c->n_patches, 1, 1));
    KEEL_TRY(FIND(&r, "v.post_ln.weight", &s->post_norm, c->width, 1, 1, 1));
    KEEL_TRY(FIND(&r, "v.post_ln.bias", &s->post_norm_bias, c->width, 1, 1, 1));
    KEEL_TRY(FIND(&r, "mm.soft_emb_norm.weight", &s->soft_norm, c->width, 1, 1, 1));
    KEEL_TRY(FIND(&r, "mm.input_projection.weight", &s->proj, c->out_width, c->width, 1, 1));
    s->block = calloc(c->n_layers, sizeof *s->block);
    if (!s->block) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory for the tensor table", keel_gguf_name(g));
    }
    for (uint32_t i = 0; i < c->n_layers; i++) {
        KEEL_TRY(read_block(&r, c, i, &s->block[i]));
    }
    if (r.n_found != keel_gguf_tensor_count(g)) {
        KEEL_TRY(reject_unknown(&r, c));
    }
out:
    return st;
}

keel_status keel_siglip_read(struct keel_siglip *c, struct keel_siglip_source *s, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    memset(c, 0, sizeof *c);
    memset(s, 0, sizeof *s);
    KEEL_TRY(read_shape(c, g, log));
    KEEL_TRY(read_tensors(c, s, g, log));
out:
    if (st != KEEL_OK) {
        keel_siglip_finish(s);
    }
    return st;
}

void keel_siglip_finish(struct keel_siglip_source *s)
{
    free(s->block);
    s->block = NULL;
}
