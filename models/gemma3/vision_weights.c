// SPDX-License-Identifier: MIT
// gemma3/vision_weights.c: uploads the weights of a vision tower and its projector.
// Owns the order of uploads and the turning of the projector, which files hold transposed.
#include "vision_internal.h"

#include <stdlib.h>

// The patch embedding is a convolution whose stride is its kernel: a linear map of the [3, patch, patch] values of a patch.
static struct keel_gguf_tensor flat_patch(const struct keel_vision *v)
{
    struct keel_gguf_tensor t = *v->src.patch;
    t.n_dims = 2;
    t.dims[0] = keel_patch_cols(&v->cfg);
    t.dims[1] = v->cfg.width;
    t.dims[2] = t.dims[3] = 1;
    return t;
}

// Halves stay halves; other types, quantised along the wrong axis for us, become f32.
static enum keel_dtype proj_type(const struct keel_vision *v)
{
    return v->src.proj->type == KEEL_F16 || v->src.proj->type == KEEL_BF16 ? v->src.proj->type : KEEL_F32;
}

static keel_status upload_proj(struct keel_vision *v, const struct keel_uploader *u)
{
    keel_status st = KEEL_OK;
    const struct keel_gguf_tensor *t = v->src.proj;
    const uint32_t k = v->cfg.width, n = v->cfg.out_width;
    const enum keel_dtype type = proj_type(v);
    float *f = malloc((size_t)k * n * sizeof *f);
    uint32_t *turned = malloc((size_t)k * n * sizeof *turned); // halves use the first half
    if (!f || !turned) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "%s: no memory for tensor \"%s\"", v->info.path, t->name);
    }
    KEEL_TRY(keel_weights_finite(u, t));
    if (type == KEEL_F32) {
        keel_dequantize(t->type, t->data, f, (size_t)t->n_elems);
    }
    for (size_t i = 0; i < k; i++) {
        for (size_t j = 0; j < n; j++) {
            if (type == KEEL_F32) {
                ((float *)turned)[j * k + i] = f[i * n + j];
            } else {
                ((uint16_t *)turned)[j * k + i] = ((const uint16_t *)t->data)[i * n + j];
            }
        }
    }
    KEEL_TRY(keel_matrix_create(&v->w.proj, u->dev, u->heap, type, n, k, turned, NULL));
    KEEL_TRY(keel_stage_finish(u->dev)); // `turned` is read until then
out:
    free(f);
    free(turned);
    return st;
}

keel_status keel_siglip_upload(keel_vision *v)
{
    keel_status st = KEEL_OK;
    struct keel_siglip_weights *w = &v->w;
    const struct keel_siglip_source *s = &v->src;
    const struct keel_uploader u = {v->log, v->info.path, &v->map, v->dev, v->heap};
    const struct keel_gguf_tensor patch = flat_patch(v);
    w->block = calloc(v->cfg.n_layers, sizeof *w->block);
    if (!w->block) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "%s: no memory for the weights table", v->info.path);
    }
    KEEL_TRY(keel_upload_matrix(&u, &w->patch, &patch));
    KEEL_TRY(keel_upload_floats(&u, &w->patch_bias, s->patch_bias));
    KEEL_TRY(keel_upload_floats(&u, &w->position, s->position));
    KEEL_TRY(keel_upload_floats(&u, &w->post_norm, s->post_norm));
    KEEL_TRY(keel_upload_floats(&u, &w->post_norm_bias, s->post_norm_bias));
    KEEL_TRY(keel_upload_floats(&u, &w->soft_norm, s->soft_norm));
    KEEL_TRY(upload_proj(v, &u));
    for (uint32_t i = 0; i < v->cfg.n_layers; i++) {
        const struct keel_siglip_block_source *b = &s->block[i];
        for (uint32_t k = 0; k < KEEL_V_N_PROJ; k++) {
            KEEL_TRY(keel_upload_matrix(&u, &w->block[i].w[k], b->w[k]));
            KEEL_TRY(keel_upload_floats(&u, &w->block[i].b[k], b->b[k]));
        }
        for (uint32_t k = 0; k < KEEL_V_N_NORM; k++) {
            KEEL_TRY(keel_upload_floats(&u, &w->block[i].norm[k], b->norm[k]));
            KEEL_TRY(keel_upload_floats(&u, &w->block[i].norm_bias[k], b->norm_bias[k]));
        }
    }
    KEEL_TRY(keel_stage_finish(v->dev));
out:
    return st;
}

static uint64_t matrix_bytes(const struct keel_gguf_tensor *t)
{
    return keel_matrix_bytes(t->type, t->dims[1], t->dims[0]);
}

static uint64_t float_bytes(const struct keel_gguf_tensor *t)
{
    return keel_align_up(t->n_elems * 4, 256);
}

uint64_t keel_siglip_weight_bytes(const keel_vision *v)
{
    const struct keel_siglip_source *s = &v->src;
    const struct keel_gguf_tensor patch = flat_patch(v);
    uint64_t n = matrix_bytes(&patch) + keel_matrix_bytes(proj_type(v), v->cfg.out_width, v->cfg.width);
    n += float_bytes(s->patch_bias) + float_bytes(s->position) + float_bytes(s->post_norm) + float_bytes(s->post_norm_bias) +
         float_bytes(s->soft_norm);
    for (uint32_t i = 0; i < v->cfg.n_layers; i++) {
        const struct keel_siglip_block_source *b = &s->block[i];
        for (uint32_t k = 0; k < KEEL_V_N_PROJ; k++) {
            n += matrix_bytes(b->w[k]) + float_bytes(b->b[k]);
        }
        for (uint32_t k = 0; k < KEEL_V_N_NORM; k++) {
            n += float_bytes(b->norm[k]) + float_bytes(b->norm_bias[k]);
        }
    }
    return n;
}
