// SPDX-License-Identifier: MIT
// gemma3/adapter.c: LoRA adapters on the device: made new, loaded, saved. Owns the layout of all parameters as one vector.
// Source: Hu et al. 2021; initialisation as PEFT's LoraLayer.reset_lora_parameters (A Kaiming-uniform with a = sqrt(5), B zero).
#include "vision_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t pair_bytes(uint32_t rank, uint32_t k, uint32_t n)
{
    return keel_align_up(4ull * rank * k, 256) + keel_align_up(4ull * rank * n, 256);
}

static uint32_t n_text_pairs(const keel_model *model)
{
    return model->cfg.n_layers * KEEL_N_PROJ;
}

uint32_t keel_adapter_n_pairs(const keel_model *model)
{
    return n_text_pairs(model) + (model->vision ? model->vision->cfg.n_layers * KEEL_V_N_PROJ + 1 : 0);
}

void keel_adapter_pair_shape(const keel_model *model, uint32_t pair, uint32_t *k, uint32_t *n)
{
    const uint32_t text = n_text_pairs(model);
    if (pair < text) {
        keel_proj_shape(model, pair % KEEL_N_PROJ, k, n);
        return;
    }
    const struct keel_siglip *c = &model->vision->cfg;
    const uint32_t proj = (pair - text) % KEEL_V_N_PROJ;
    const bool last = pair - text == c->n_layers * KEEL_V_N_PROJ;
    *k = !last && proj == KEEL_V_DOWN ? c->ff_width : c->width;
    *n = last ? c->out_width : proj == KEEL_V_UP ? c->ff_width : c->width;
}

static bool is_projector(const keel_model *model, uint32_t pair)
{
    return model->vision && pair + 1 == keel_adapter_n_pairs(model);
}

void keel_adapter_pair_name(const keel_model *model, uint32_t i, char name[64])
{
    static const char *const map[KEEL_V_N_PROJ] = { "attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down" };
    const uint32_t text = n_text_pairs(model);
    if (i < text) {
        snprintf(name, 64, "blk.%u.%s", i / KEEL_N_PROJ, keel_proj_name[i % KEEL_N_PROJ]);
    } else if (is_projector(model, i)) {
        snprintf(name, 64, "mm.input_projection");
    } else {
        snprintf(name, 64, "v.blk.%u.%s", (i - text) / KEEL_V_N_PROJ, map[(i - text) % KEEL_V_N_PROJ]);
    }
}

uint32_t keel_adapter_pair_target(const keel_model *model, uint32_t i)
{
    const uint32_t text = n_text_pairs(model);
    if (i < text) {
        return i % KEEL_N_PROJ;
    }
    return KEEL_N_PROJ + (is_projector(model, i) ? KEEL_V_N_PROJ : (i - text) % KEEL_V_N_PROJ);
}

bool keel_adapter_pair_wanted(const keel_model *model, uint32_t i, uint32_t targets, const uint8_t *layers)
{
    const bool text = i < n_text_pairs(model);
    return (targets >> keel_adapter_pair_target(model, i) & 1) && (!text || !layers || layers[i / KEEL_N_PROJ]);
}

uint64_t keel_adapter_bytes(const keel_model *model, uint32_t rank, uint32_t targets, const uint8_t *layers)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < keel_adapter_n_pairs(model); i++) {
        uint32_t k, n;
        keel_adapter_pair_shape(model, i, &k, &n);
        bytes += keel_adapter_pair_wanted(model, i, targets, layers) ? pair_bytes(rank, k, n) : 0;
    }
    return bytes;
}

// Allocates the device side for the pairs' ranks and scales that are already set.
static keel_status place_pairs(keel_adapter *a, const keel_model *model, keel_device *dev)
{
    keel_status st = KEEL_OK;
    uint64_t at = 0;
    for (uint32_t i = 0; i < a->n_pairs; i++) {
        keel_adapter_pair_shape(model, i, &a->pair[i].k, &a->pair[i].n);
        at += a->pair[i].rank ? pair_bytes(a->pair[i].rank, a->pair[i].k, a->pair[i].n) : 0;
    }
    if (at == 0 || at > keel_device_caps(dev)->max_buffer) {
        KEEL_FAIL(model->log, at ? KEEL_ERR_UNSUPPORTED : KEEL_ERR_ARG,
                  at ? "an adapter of %.0f MB does not fit one buffer of this device; lower the rank or choose fewer targets"
                     : "the adapter has no parameters%.0f",
                  (double)at / 1e6);
    }
    KEEL_TRY(keel_heap_create(&a->heap, dev, KEEL_HEAP_DEVICE, "LoRA weights"));
    KEEL_TRY(keel_heap_alloc(a->heap, at, &a->params));
    a->n_floats = at / 4;
    at = 0;
    for (uint32_t i = 0; i < a->n_pairs; i++) {
        struct keel_lora *p = &a->pair[i];
        if (p->rank == 0) {
            continue;
        }
        p->a = keel_span_sub(a->params, at, 4ull * p->rank * p->k);
        at += keel_align_up(p->a.bytes, 256);
        p->b = keel_span_sub(a->params, at, 4ull * p->rank * p->n);
        at += keel_align_up(p->b.bytes, 256);
        a->n_params += (uint64_t)p->rank * (p->k + p->n);
    }
out:
    return st;
}

static keel_status new_adapter(keel_adapter **out, const keel_model *model)
{
    keel_adapter *a = calloc(1, sizeof *a);
    *out = NULL;
    if (a) {
        a->n_layers = model->cfg.n_layers;
        a->scale = 1.0f;
        a->n_pairs = keel_adapter_n_pairs(model);
        a->pair = calloc(a->n_pairs, sizeof *a->pair);
        a->vision = a->pair && model->vision ? a->pair + n_text_pairs(model) : NULL;
    }
    if (!a || !a->pair) {
        free(a);
        KEEL_ERROR(model->log, "no memory for an adapter");
        return KEEL_ERR_NO_MEMORY;
    }
    *out = a;
    return KEEL_OK;
}

keel_status keel_adapter_create(keel_adapter **out, keel_model *model, uint32_t rank, float alpha, uint32_t targets, const uint8_t *layers,
                                uint64_t seed)
{
    keel_status st = KEEL_OK;
    keel_adapter *a = NULL;
    float *host = NULL;
    *out = NULL;
    if ((targets & KEEL_VISION_TARGETS) && !model->vision) {
        KEEL_FAIL(model->log, KEEL_ERR_ARG, "targets of the vision tower need one; give its file with --mmproj");
    }
    KEEL_TRY(new_adapter(&a, model));
    a->rank = rank;
    a->alpha = alpha;
    for (uint32_t i = 0; i < a->n_pairs; i++) {
        a->pair[i].rank = keel_adapter_pair_wanted(model, i, targets, layers) ? rank : 0;
        a->pair[i].scale = alpha / (float)rank;
    }
    KEEL_TRY(place_pairs(a, model, model->dev));
    host = calloc(a->n_floats, sizeof *host);
    if (!host) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "no memory for an adapter of %.1f MB", (double)a->n_floats * 4e-6);
    }
    for (uint32_t i = 0; i < a->n_pairs; i++) {
        const struct keel_lora *p = &a->pair[i];
        struct keel_rng rng = keel_rng_make(seed, UINT64_C(0x4c6f5241) << 32 | i); // a stream of its own for each tensor
        const double bound = 1.0 / sqrt((double)p->k);
        float *dst = host + (p->rank ? (p->a.offset - a->params.offset) / 4 : 0);
        for (uint64_t e = 0; e < (uint64_t)p->rank * p->k; e++) {
            dst[e] = (float)((2.0 * keel_rng_uniform(&rng) - 1.0) * bound);
        }
    }
    KEEL_TRY(keel_upload(model->dev, a->params, host, a->n_floats * sizeof *host));
    *out = a;
    a = NULL;
out:
    free(host);
    keel_adapter_destroy(&a);
    return st;
}

// `vision_only`: pairs of the language model are left out.
static keel_status load(keel_adapter **out, keel_model *model, keel_device *dev, const char *path, float scale, bool vision_only)
{
    keel_status st = KEEL_OK;
    keel_adapter *a = NULL;
    float *host = NULL;
    struct keel_adapter_file f = { 0 };
    bool any = false;
    *out = NULL;
    KEEL_TRY(keel_adapter_file_read(&f, model, path));
    KEEL_TRY(new_adapter(&a, model));
    a->rank = f.rank;
    a->alpha = f.alpha;
    a->scale = scale;
    a->n_skipped = f.n_skipped;
    for (uint32_t i = 0; i < a->n_pairs; i++) {
        a->pair[i].rank = vision_only && i < n_text_pairs(model) ? 0 : f.pair[i].rank;
        a->pair[i].scale = f.pair[i].scale * scale;
        any |= a->pair[i].rank > 0;
    }
    if (any) {
        KEEL_TRY(place_pairs(a, model, dev));
        host = calloc(a->n_floats, sizeof *host);
        if (!host) {
            KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "%s: no memory for an adapter of %.1f MB", path, (double)a->n_floats * 4e-6);
        }
        for (uint32_t i = 0; i < a->n_pairs; i++) {
            const struct keel_lora *p = &a->pair[i];
            if (p->rank > 0) {
                memcpy(host + (p->a.offset - a->params.offset) / 4, f.pair[i].a, p->a.bytes);
                memcpy(host + (p->b.offset - a->params.offset) / 4, f.pair[i].b, p->b.bytes);
            }
        }
        KEEL_TRY(keel_upload(dev, a->params, host, a->n_floats * sizeof *host));
    }
    *out = a;
    a = NULL;
out:
    free(host);
    keel_adapter_file_finish(&f);
    keel_adapter_destroy(&a);
    return st;
}

keel_status keel_adapter_load(keel_adapter **out, keel_model *model, const char *path, float scale)
{
    return load(out, model, model->dev, path, scale, false);
}

keel_status keel_adapter_load_vision(keel_adapter **out, keel_model *model, keel_device *dev, const char *path, float scale)
{
    return load(out, model, dev, path, scale, true);
}

keel_status keel_adapter_save(const keel_adapter *a, const keel_model *model, const char *path)
{
    keel_status st = KEEL_OK;
    struct keel_adapter_file f = { 0 };
    KEEL_TRY(keel_adapter_file_init(&f, model));
    KEEL_ASSERT(f.n_pairs == a->n_pairs);
    f.alpha = a->alpha;
    f.rank = a->rank;
    for (uint32_t i = 0; i < a->n_pairs; i++) {
        const struct keel_lora *p = &a->pair[i];
        struct keel_adapter_pair *to = &f.pair[i];
        if (p->rank == 0) {
            continue;
        }
        to->rank = p->rank;
        to->scale = p->scale / (a->scale != 0.0f ? a->scale : 1.0f); // the user's factor is no part of the adapter
        to->a = malloc(p->a.bytes);
        to->b = malloc(p->b.bytes);
        if (!to->a || !to->b) {
            KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "%s: no memory for the adapter", path);
        }
        KEEL_TRY(keel_download(model->dev, to->a, p->a, p->a.bytes));
        KEEL_TRY(keel_download(model->dev, to->b, p->b, p->b.bytes));
    }
    KEEL_TRY(keel_adapter_file_write(&f, model, path));
out:
    keel_adapter_file_finish(&f);
    return st;
}

void keel_adapter_destroy(keel_adapter **adapter)
{
    keel_adapter *a = adapter ? *adapter : NULL;
    if (!a) {
        return;
    }
    keel_heap_destroy(&a->heap);
    free(a->pair);
    free(a);
    *adapter = NULL;
}
