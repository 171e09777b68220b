// SPDX-License-Identifier: MIT
// gemma3/adapter_file.c: adapters in host memory, and llama.cpp's GGUF layout of them (convert_lora_to_gguf.py):
// general.type "adapter", adapter.type "lora", adapter.lora.alpha; tensors blk.N.PROJ.weight.lora_a [rank, K] and .lora_b [N, rank].
// Pairs of a vision tower stand beside them as v.blk.N.MAP and mm.input_projection, which llama.cpp does not know.
#include "vision_internal.h"

#include <stdlib.h>
#include <stdio.h>
#include <string.h>

keel_status keel_adapter_file_init(struct keel_adapter_file *f, const keel_model *model)
{
    *f = (struct keel_adapter_file){ .n_pairs = keel_adapter_n_pairs(model) };
    f->pair = calloc(f->n_pairs, sizeof *f->pair);
    if (!f->pair) {
        KEEL_ERROR(model->log, "no memory for an adapter");
        return KEEL_ERR_NO_MEMORY;
    }
    return KEEL_OK;
}

void keel_adapter_file_finish(struct keel_adapter_file *f)
{
    for (uint32_t i = 0; f->pair && i < f->n_pairs; i++) {
        free(f->pair[i].a);
        free(f->pair[i].b);
    }
    free(f->pair);
    *f = (struct keel_adapter_file){ 0 };
}

// The pair that a name means; UINT32_MAX: one of a tower that the model does not have.
static keel_status pair_of(uint32_t *out, const keel_model *model, const char *path, const char *name,
                           const struct keel_pair_name *which)
{
    const uint32_t text = model->cfg.n_layers * KEEL_N_PROJ;
    *out = UINT32_MAX;
    if (which->vision && !model->vision) {
        return KEEL_OK;
    }
    const uint32_t n_layers = which->vision ? model->vision->cfg.n_layers : model->cfg.n_layers;
    if (which->vision && which->layer == UINT32_MAX) {
        *out = text + n_layers * KEEL_V_N_PROJ;
        return KEEL_OK;
    }
    if (which->layer >= n_layers) {
        KEEL_ERROR(model->log, "%s: tensor \"%s\" belongs to layer %u, the model has %u layers", path, name, which->layer, n_layers);
        return KEEL_ERR_MISMATCH;
    }
    *out = which->vision ? text + which->layer * KEEL_V_N_PROJ + which->proj : which->layer * KEEL_N_PROJ + which->proj;
    return KEEL_OK;
}

keel_status keel_adapter_file_tensor(struct keel_adapter_file *f, const keel_model *model, const char *path, const char *name,
                                     const struct keel_pair_name *which, const uint64_t dims[2], uint32_t *pair, float **where)
{
    keel_status st = KEEL_OK;
    const bool is_b = which->is_b;
    uint32_t k, n;
    char map[64];
    *where = NULL;
    KEEL_TRY(pair_of(pair, model, path, name, which));
    if (*pair == UINT32_MAX) {
        f->n_skipped++;
        return KEEL_OK;
    }
    keel_adapter_pair_shape(model, *pair, &k, &n);
    keel_adapter_pair_name(model, *pair, map);
    struct keel_adapter_pair *p = &f->pair[*pair];
    const uint64_t wide = is_b ? dims[0] : dims[1], rank = is_b ? dims[1] : dims[0];
    if (wide != (is_b ? n : k) || rank == 0 || rank > 65536) {
        KEEL_FAIL(model->log, KEEL_ERR_MISMATCH,
                  "%s: tensor \"%s\" is [%llu, %llu], this model's %s needs %s; the adapter belongs to another model", path, name,
                  (unsigned long long)dims[0], (unsigned long long)dims[1], map,
                  is_b ? "[its output width, rank]" : "[rank, its input width]");
    }
    if (p->rank != 0 && p->rank != rank) {
        KEEL_FAIL(model->log, KEEL_ERR_MISMATCH, "%s: tensor \"%s\" has rank %llu, its partner %u", path, name,
                  (unsigned long long)rank, p->rank);
    }
    if (is_b ? p->b != NULL : p->a != NULL) {
        KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: tensor \"%s\" occurs twice", path, name);
    }
    p->rank = (uint32_t)rank;
    float **slot = is_b ? &p->b : &p->a;
    *slot = malloc((size_t)(wide * rank) * sizeof(float));
    if (!*slot) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "%s: no memory for tensor \"%s\"", path, name);
    }
    *where = *slot;
out:
    return st;
}

keel_status keel_adapter_file_check(struct keel_adapter_file *f, const keel_model *model, const char *path)
{
    keel_status st = KEEL_OK;
    f->rank = 0;
    for (uint32_t i = 0; i < f->n_pairs; i++) {
        struct keel_adapter_pair *p = &f->pair[i];
        char map[64];
        keel_adapter_pair_name(model, i, map);
        if ((p->a != NULL) != (p->b != NULL)) {
            KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: %s has only one of its two LoRA matrices", path, map);
        }
        f->rank = KEEL_MAX(f->rank, p->rank);
        if (p->rank == 0) {
            continue;
        }
        uint32_t k, n;
        keel_adapter_pair_shape(model, i, &k, &n);
        double sum = (double)p->scale; // NaN and infinity survive a sum of magnitudes
        for (uint64_t e = 0; e < (uint64_t)p->rank * k; e++) {
            sum += (double)p->a[e] * 0.0;
        }
        for (uint64_t e = 0; e < (uint64_t)p->rank * n; e++) {
            sum += (double)p->b[e] * 0.0;
        }
        if (!(sum - sum == 0.0)) {
            KEEL_FAIL(model->log, KEEL_ERR_NUMERIC, "%s: %s holds NaN or infinity", path, map);
        }
    }
    if (f->rank == 0 && f->n_skipped == 0) {
        KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: no LoRA tensor in it", path);
    }
out:
    return st;
}

// "attn_q.weight.lora_a" with a list of maps -> which of them, side.
static bool parse_map(const char *rest, const char *const *maps, uint32_t n_maps, struct keel_pair_name *which)
{
    for (uint32_t i = 0; i < n_maps; i++) {
        const size_t len = strlen(maps[i]);
        const char *side = rest + len;
        if (strncmp(rest, maps[i], len) == 0 && (strcmp(side, ".weight.lora_a") == 0 || strcmp(side, ".weight.lora_b") == 0)) {
            which->proj = i;
            which->is_b = side[strlen(side) - 1] == 'b';
            return true;
        }
    }
    return false;
}

// "blk.3.attn_q.weight.lora_a", "v.blk.3.attn_q.weight.lora_b", "mm.input_projection.weight.lora_a"
static bool parse_name(const char *name, struct keel_pair_name *which)
{
    static const char *const vision_map[] = { "attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down" };
    static const char *const projector = "mm.input_projection";
    int used = 0;
    *which = (struct keel_pair_name){ 0 };
    if (sscanf(name, "blk.%u.%n", &which->layer, &used) == 1 && used > 0) {
        return parse_map(name + used, keel_proj_name, KEEL_N_PROJ, which);
    }
    which->vision = true;
    if (sscanf(name, "v.blk.%u.%n", &which->layer, &used) == 1 && used > 0) {
        return parse_map(name + used, vision_map, KEEL_COUNT(vision_map), which);
    }
    which->layer = UINT32_MAX;
    return parse_map(name, &projector, 1, which);
}

static keel_status read_tensors(struct keel_adapter_file *f, const keel_model *model, const keel_gguf *g, const char *path)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const struct keel_gguf_tensor *t = keel_gguf_tensor_at(g, i);
        struct keel_pair_name which;
        uint32_t pair;
        float *dst;
        if (!parse_name(t->name, &which) || t->n_dims > 2) {
            KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: tensor \"%s\" is no LoRA matrix of a projection that keel adapts", path,
                      t->name);
        }
        const uint64_t dims[2] = { t->dims[1], t->dims[0] };
        KEEL_TRY(keel_adapter_file_tensor(f, model, path, t->name, &which, dims, &pair, &dst));
        if (dst) {
            keel_dequantize(t->type, t->data, dst, (size_t)t->n_elems);
        }
    }
out:
    return st;
}

static keel_status read_gguf(struct keel_adapter_file *f, const keel_model *model, const char *path)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    keel_gguf *g = NULL;
    double alpha;
    KEEL_TRY(keel_map_open(&map, path, model->log));
    KEEL_TRY(keel_gguf_parse(&g, map.data, map.len_bytes, path, model->log));
    const char *type = keel_gguf_str(g, "general.type", NULL), *lora = keel_gguf_str(g, "adapter.type", NULL);
    const char *arch = keel_gguf_str(g, "general.architecture", NULL);
    if (!type || strcmp(type, "adapter") != 0 || !lora || strcmp(lora, "lora") != 0) {
        KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: this GGUF is no LoRA adapter (general.type is \"%s\")", path, type ? type : "");
    }
    if (!arch || strcmp(arch, "gemma3") != 0) {
        KEEL_FAIL(model->log, KEEL_ERR_MISMATCH, "%s: the adapter is for architecture \"%s\", the model is gemma3", path,
                  arch ? arch : "");
    }
    if (!keel_gguf_f64(g, "adapter.lora.alpha", &alpha)) {
        KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: adapter.lora.alpha is missing or no number", path);
    }
    f->alpha = (float)alpha;
    KEEL_TRY(read_tensors(f, model, g, path));
    for (uint32_t i = 0; i < f->n_pairs; i++) {
        // llama.cpp: an alpha of 0 means a scale of 1
        f->pair[i].scale = f->pair[i].rank == 0 ? 0.0f : f->alpha != 0.0f ? f->alpha / (float)f->pair[i].rank : 1.0f;
    }
out:
    keel_gguf_destroy(&g);
    keel_map_close(&map);
    return st;
}

keel_status keel_adapter_file_read(struct keel_adapter_file *f, const keel_model *model, const char *path)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_adapter_file_init(f, model));
    KEEL_TRY(keel_path_is_dir(path) ? keel_peft_read(f, model, path) : read_gguf(f, model, path));
    KEEL_TRY(keel_adapter_file_check(f, model, path));
out:
    return st;
}

static keel_status write_tensors(const struct keel_adapter_file *f, const keel_model *model, keel_gguf_writer *w, FILE *out)
{
    keel_status st = KEEL_OK;
    for (int pass = 0; pass < 2; pass++) { // declarations, then data
        for (uint32_t i = 0; i < f->n_pairs; i++) {
            const struct keel_adapter_pair *p = &f->pair[i];
            uint32_t k, n;
            char map[64];
            keel_adapter_pair_shape(model, i, &k, &n);
            keel_adapter_pair_name(model, i, map);
            for (int b = 0; b < 2 && p->rank > 0; b++) {
                char name[96];
                const uint64_t dims[2] = { b ? p->rank : k, b ? n : p->rank };
                snprintf(name, sizeof name, "%s.weight.lora_%c", map, b ? 'b' : 'a');
                if (pass == 0) {
                    keel_gguf_put_tensor(w, name, KEEL_F32, 2, dims);
                } else {
                    KEEL_TRY(keel_gguf_writer_data(w, b ? p->b : p->a, (size_t)(4 * dims[0] * dims[1])));
                }
            }
        }
        if (pass == 0) {
            KEEL_TRY(keel_gguf_writer_begin(w, out));
        }
    }
    KEEL_TRY(keel_gguf_writer_end(w));
out:
    return st;
}

static keel_status write_gguf(const struct keel_adapter_file *f, const keel_model *model, const char *path)
{
    keel_status st = KEEL_OK;
    struct keel_file_out out = { 0 };
    keel_gguf_writer *w = NULL;
    KEEL_TRY(keel_gguf_writer_create(&w, model->log));
    KEEL_TRY(keel_file_create(&out, path, model->log));
    keel_gguf_put_str(w, "general.architecture", "gemma3");
    keel_gguf_put_str(w, "general.type", "adapter");
    keel_gguf_put_str(w, "general.name", "keel LoRA adapter");
    keel_gguf_put_str(w, "adapter.type", "lora");
    keel_gguf_put_f32(w, "adapter.lora.alpha", f->alpha);
    KEEL_TRY(write_tensors(f, model, w, out.f));
    KEEL_TRY(keel_file_commit(&out, model->log));
out:
    keel_file_abort(&out);
    keel_gguf_writer_destroy(&w);
    return st;
}

keel_status keel_adapter_file_write(const struct keel_adapter_file *f, const keel_model *model, const char *path)
{
    const size_t len = strlen(path);
    if (len > 5 && strcmp(path + len - 5, ".gguf") == 0) {
        return write_gguf(f, model, path);
    }
    return keel_peft_write(f, model, path);
}
