// SPDX-License-Identifier: MIT
// gemma3/adapter_file.c: adapters in host memory, and llama.cpp's GGUF layout of them (convert_lora_to_gguf.py):
// general.type "adapter", adapter.type "lora", adapter.lora.alpha; tensors blk.N.PROJ.weight.lora_a [rank, K] and .lora_b [N, rank].
#include "gemma3.h"

#include <stdlib.h>
#include <stdio.h>
#include <string.h>

keel_status keel_adapter_file_init(struct keel_adapter_file *f, const keel_model *model)
{
    *f = (struct keel_adapter_file){ .n_layers = model->cfg.n_layers };
    f->pair = calloc((size_t)f->n_layers * KEEL_N_PROJ, sizeof *f->pair);
    if (!f->pair) {
        KEEL_ERROR(model->log, "no memory for an adapter");
        return KEEL_ERR_NO_MEMORY;
    }
    return KEEL_OK;
}

void keel_adapter_file_finish(struct keel_adapter_file *f)
{
    for (size_t i = 0; f->pair && i < (size_t)f->n_layers * KEEL_N_PROJ; i++) {
        free(f->pair[i].a);
        free(f->pair[i].b);
    }
    free(f->pair);
    *f = (struct keel_adapter_file){ 0 };
}

keel_status keel_adapter_file_tensor(struct keel_adapter_file *f, const keel_model *model, const char *path, const char *name,
                                     uint32_t layer, uint32_t proj, bool is_b, const uint64_t dims[2], float **where)
{
    keel_status st = KEEL_OK;
    uint32_t k, n;
    *where = NULL;
    if (layer >= f->n_layers) {
        KEEL_FAIL(model->log, KEEL_ERR_MISMATCH, "%s: tensor \"%s\" belongs to layer %u, the model has %u layers", path, name, layer,
                  f->n_layers);
    }
    keel_proj_shape(model, proj, &k, &n);
    struct keel_adapter_pair *p = &f->pair[(size_t)layer * KEEL_N_PROJ + proj];
    const uint64_t wide = is_b ? dims[0] : dims[1], rank = is_b ? dims[1] : dims[0];
    if (wide != (is_b ? n : k) || rank == 0 || rank > 65536) {
        KEEL_FAIL(model->log, KEEL_ERR_MISMATCH,
                  "%s: tensor \"%s\" is [%llu, %llu], this model's %s needs %s; the adapter belongs to another model", path, name,
                  (unsigned long long)dims[0], (unsigned long long)dims[1], keel_proj_name[proj],
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
    for (size_t i = 0; i < (size_t)f->n_layers * KEEL_N_PROJ; i++) {
        struct keel_adapter_pair *p = &f->pair[i];
        if ((p->a != NULL) != (p->b != NULL)) {
            KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: layer %zu, %s has only one of its two LoRA matrices", path, i / KEEL_N_PROJ,
                      keel_proj_name[i % KEEL_N_PROJ]);
        }
        f->rank = KEEL_MAX(f->rank, p->rank);
        if (p->rank == 0) {
            continue;
        }
        uint32_t k, n;
        keel_proj_shape(model, (enum keel_proj)(i % KEEL_N_PROJ), &k, &n);
        double sum = (double)p->scale; // NaN and infinity survive a sum of magnitudes
        for (uint64_t e = 0; e < (uint64_t)p->rank * k; e++) {
            sum += (double)p->a[e] * 0.0;
        }
        for (uint64_t e = 0; e < (uint64_t)p->rank * n; e++) {
            sum += (double)p->b[e] * 0.0;
        }
        if (!(sum - sum == 0.0)) {
            KEEL_FAIL(model->log, KEEL_ERR_NUMERIC, "%s: layer %zu, %s holds NaN or infinity", path, i / KEEL_N_PROJ,
                      keel_proj_name[i % KEEL_N_PROJ]);
        }
    }
    if (f->rank == 0) {
        KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: no LoRA tensor in it", path);
    }
out:
    return st;
}

// "blk.3.attn_q.weight.lora_a" -> layer, projection, side.
static bool parse_name(const char *name, uint32_t *layer, uint32_t *proj, bool *is_b)
{
    int used = 0;
    if (sscanf(name, "blk.%u.%n", layer, &used) != 1 || used == 0) {
        return false;
    }
    const char *rest = name + used;
    for (uint32_t i = 0; i < KEEL_N_PROJ; i++) {
        const size_t len = strlen(keel_proj_name[i]);
        if (strncmp(rest, keel_proj_name[i], len) == 0) {
            const char *side = rest + len;
            *proj = i;
            *is_b = strcmp(side, ".weight.lora_b") == 0;
            if (*is_b || strcmp(side, ".weight.lora_a") == 0) {
                return true;
            }
        }
    }
    return false;
}

static keel_status read_tensors(struct keel_adapter_file *f, const keel_model *model, const keel_gguf *g, const char *path)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const struct keel_gguf_tensor *t = keel_gguf_tensor_at(g, i);
        uint32_t layer, proj;
        bool is_b;
        float *dst;
        if (!parse_name(t->name, &layer, &proj, &is_b) || t->n_dims > 2) {
            KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: tensor \"%s\" is no LoRA matrix of a projection that keel adapts", path,
                      t->name);
        }
        const uint64_t dims[2] = { t->dims[1], t->dims[0] };
        KEEL_TRY(keel_adapter_file_tensor(f, model, path, t->name, layer, proj, is_b, dims, &dst));
        keel_dequantize(t->type, t->data, dst, (size_t)t->n_elems);
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
    for (size_t i = 0; i < (size_t)f->n_layers * KEEL_N_PROJ; i++) {
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
        for (size_t i = 0; i < (size_t)f->n_layers * KEEL_N_PROJ; i++) {
            const struct keel_adapter_pair *p = &f->pair[i];
            uint32_t k, n;
            keel_proj_shape(model, (enum keel_proj)(i % KEEL_N_PROJ), &k, &n);
            for (int b = 0; b < 2 && p->rank > 0; b++) {
                char name[96];
                const uint64_t dims[2] = { b ? p->rank : k, b ? n : p->rank };
                snprintf(name, sizeof name, "blk.%zu.%s.weight.lora_%c", i / KEEL_N_PROJ, keel_proj_name[i % KEEL_N_PROJ],
                         b ? 'b' : 'a');
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
