// SPDX-License-Identifier: MIT
// models/model.c: a model as the public API sees it: opening, loading, tokens, names of projections.
// Owns the file map, the tokenizer and the weights heap.
#include "gemma3/gemma3.h"

#include <keel/convert.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const keel_proj_name[KEEL_N_PROJ] = {
    [KEEL_ATTN_Q] = "attn_q",           [KEEL_ATTN_K] = "attn_k",     [KEEL_ATTN_V] = "attn_v",
    [KEEL_ATTN_OUTPUT] = "attn_output", [KEEL_FFN_GATE] = "ffn_gate", [KEEL_FFN_UP] = "ffn_up",
    [KEEL_FFN_DOWN] = "ffn_down",
};

void keel_proj_shape(const keel_model *model, enum keel_proj proj, uint32_t *k, uint32_t *n)
{
    const struct keel_gguf_tensor *t = model->src.block[proj];
    *k = (uint32_t)t->dims[0];
    *n = (uint32_t)t->dims[1];
}

static const char *const vision_name[KEEL_N_VISION_MAPS] = {
    "vision.attn_q", "vision.attn_k", "vision.attn_v", "vision.attn_out", "vision.ffn_up", "vision.ffn_down", "vision.proj",
};

// Bits of one word of a list of targets; 0: unknown.
static uint32_t target_bits(const char *word, size_t len)
{
    const struct {
        const char *name;
        uint32_t bits;
    } group[] = { { "all", (1u << KEEL_N_PROJ) - 1 }, { "vision.*", KEEL_VISION_TARGETS } };
    for (size_t i = 0; i < KEEL_COUNT(group); i++) {
        if (strlen(group[i].name) == len && memcmp(group[i].name, word, len) == 0) {
            return group[i].bits;
        }
    }
    for (uint32_t i = 0; i < KEEL_N_PROJ + KEEL_N_VISION_MAPS; i++) {
        const char *name = i < KEEL_N_PROJ ? keel_proj_name[i] : vision_name[i - KEEL_N_PROJ];
        if (strlen(name) == len && memcmp(name, word, len) == 0) {
            return 1u << i;
        }
    }
    return 0;
}

keel_status keel_targets_parse(const char *text, uint32_t *bits, const keel_log *log)
{
    *bits = 0;
    if (!text) {
        text = "all";
    }
    for (const char *p = text; *p || p == text;) {
        const size_t len = strcspn(p, ",");
        const uint32_t word = target_bits(p, len);
        if (word == 0) {
            KEEL_ERROR(log,
                       "\"%.*s\" is no projection; targets are \"all\" or names from attn_q, attn_k, attn_v, attn_output, "
                       "ffn_gate, ffn_up, ffn_down with commas between, and for the vision tower \"vision.*\" or names from "
                       "vision.attn_q, vision.attn_k, vision.attn_v, vision.attn_out, vision.ffn_up, vision.ffn_down, vision.proj",
                       (int)len, p);
            *bits = 0;
            return KEEL_ERR_ARG;
        }
        *bits |= word;
        p += len;
        if (*p == ',' && *++p == 0) {
            KEEL_ERROR(log, "\"%s\" ends with a comma", text);
            *bits = 0;
            return KEEL_ERR_ARG;
        }
    }
    return KEEL_OK;
}

// --- opening -------------------------------------------------------------------------------------

static keel_status check_arch(const keel_gguf *g, const keel_log *log)
{
    const char *arch = keel_gguf_str(g, "general.architecture", NULL);
    const char *type = keel_gguf_str(g, "general.type", NULL);
    if (!arch) {
        KEEL_ERROR(log, "%s: metadata \"general.architecture\" is missing; this is no model file", keel_gguf_name(g));
        return KEEL_ERR_FORMAT;
    }
    if (strcmp(arch, "clip") == 0) {
        KEEL_ERROR(log, "%s: this is a vision tower (mmproj), not a model; give it with --mmproj beside its model", keel_gguf_name(g));
        return KEEL_ERR_UNSUPPORTED;
    }
    if (type && strcmp(type, "model") != 0) {
        KEEL_ERROR(log, "%s: this GGUF is of type \"%s\", not a model", keel_gguf_name(g), type);
        return KEEL_ERR_UNSUPPORTED;
    }
    if (strcmp(arch, "gemma3") != 0) {
        KEEL_ERROR(log, "%s: architecture \"%s\" is not supported; keel runs: gemma3", keel_gguf_name(g), arch);
        return KEEL_ERR_UNSUPPORTED;
    }
    return KEEL_OK;
}

struct type_bytes {
    const char *name;
    uint64_t bytes;
};

static int by_bytes(const void *a, const void *b)
{
    const struct type_bytes *x = a, *y = b;
    return x->bytes < y->bytes ? 1 : x->bytes > y->bytes ? -1 : strcmp(x->name, y->name);
}

static void fill_info(keel_model *m, const char *path)
{
    struct keel_model_info *i = &m->info;
    const struct keel_gemma3 *c = &m->cfg;
    struct type_bytes types[16] = {{0}};
    size_t n_types = 0, at = 0;
    const char *name = keel_gguf_str(m->gguf, "general.name", NULL);
    snprintf(i->path, sizeof i->path, "%s", path);
    snprintf(i->name, sizeof i->name, "%s", name ? name : "");
    snprintf(i->arch, sizeof i->arch, "gemma3");
    i->n_layers = c->n_layers;
    i->width = c->width;
    i->ff_width = c->ff_width;
    i->n_heads = c->n_heads;
    i->n_kv_heads = c->n_kv_heads;
    i->head_dim = c->head_dim;
    i->vocab = c->vocab;
    i->window = c->window;
    i->context = c->context;
    i->n_global_layers = c->n_global;
    i->file_bytes = m->map.len_bytes;
    for (size_t t = 0; t < keel_gguf_tensor_count(m->gguf); t++) {
        const struct keel_gguf_tensor *x = keel_gguf_tensor_at(m->gguf, t);
        const char *type = keel_dtype_info((uint32_t)x->type)->name;
        size_t k = 0;
        while (k < n_types && strcmp(types[k].name, type) != 0) {
            k++;
        }
        if (k == n_types && n_types < KEEL_COUNT(types)) {
            types[n_types++].name = type;
        }
        types[k].bytes += x->bytes;
        i->n_params += x->n_elems;
    }
    qsort(types, n_types, sizeof types[0], by_bytes);
    for (size_t k = 0; k < n_types && at < sizeof i->types; k++) {
        at += (size_t)snprintf(i->types + at, sizeof i->types - at, "%s%s %.1f MB", k ? ", " : "", types[k].name,
                               (double)types[k].bytes / 1e6);
    }
}

keel_status keel_model_open(keel_model **out, const char *path, const keel_log *log)
{
    return keel_model_open_as(out, path, NULL, log);
}

keel_status keel_model_open_as(keel_model **out, const char *path, const char *type, const keel_log *log)
{
    keel_status st = KEEL_OK;
    keel_model *m = NULL;
    char converted[4096];
    const char *file = path;
    *out = NULL;
    if (!path || !*path || strlen(path) >= sizeof m->info.path) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "the path of the model is empty or too long");
    }
    if (keel_path_is_dir(path)) {
        KEEL_TRY(keel_convert_cached(path, type, false, converted, sizeof converted, log));
        file = converted;
    } else if (type) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: a type is for Hugging Face folders; keel quantize makes a GGUF of another type", path);
    }
    m = calloc(1, sizeof *m);
    if (!m) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory to open the model", path);
    }
    m->log = log;
    KEEL_TRY(keel_map_open(&m->map, file, log));
    KEEL_TRY(keel_gguf_parse(&m->gguf, m->map.data, m->map.len_bytes, file, log)); // a damaged conversion is not the folder's fault
    KEEL_TRY(check_arch(m->gguf, log));
    KEEL_TRY(keel_gemma3_read(&m->cfg, &m->src, m->gguf, log));
    KEEL_TRY(keel_tokenizer_create(&m->tok, m->gguf, log));
    if (keel_tokenizer_vocab(m->tok) != m->cfg.vocab) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the tokenizer has %u tokens, the embedding %u rows", path,
                  keel_tokenizer_vocab(m->tok), m->cfg.vocab);
    }
    m->special = keel_tokenizer_ids(m->tok);
    fill_info(m, path);
    *out = m;
    m = NULL;
out:
    keel_model_close(&m);
    return st;
}

void keel_model_close(keel_model **model)
{
    keel_model *m = model ? *model : NULL;
    if (!m) {
        return;
    }
    keel_heap_destroy(&m->heap);
    free(m->w.block);
    keel_tokenizer_destroy(&m->tok);
    keel_gemma3_finish(&m->cfg, &m->src);
    keel_gguf_destroy(&m->gguf);
    keel_map_close(&m->map);
    free(m);
    *model = NULL;
}

const struct keel_model_info *keel_model_info(const keel_model *model)
{
    return &model->info;
}

uint64_t keel_model_hash(keel_model *model)
{
    if (model->info.hash == 0) {
        const size_t len = model->map.len_bytes, piece = 16u << 20; // in pieces, so that the file never lies in memory whole
        uint64_t h = KEEL_HASH_INIT;
        for (size_t at = 0; at < len; at += piece) {
            const size_t n = KEEL_MIN(piece, len - at);
            h = keel_hash(h, model->map.data + at, n);
            keel_map_done_with(&model->map, at, n);
        }
        model->info.hash = h;
    }
    return model->info.hash;
}

// --- loading -------------------------------------------------------------------------------------

static void log_plan(const keel_model *m)
{
    struct keel_plan plan;
    const struct keel_plan_params p = {.n_ctx = KEEL_MIN(4096u, m->cfg.context), .n_batch = 256};
    if (keel_model_plan(m, &p, &plan) != KEEL_OK) {
        return;
    }
    for (uint32_t i = 0; i < plan.n_rows; i++) {
        KEEL_ERROR(m->log, "  plan: %-28s %10.1f MB%s", plan.row[i].what, (double)plan.row[i].bytes / 1e6,
                   plan.row[i].host ? " (host)" : "");
    }
    KEEL_ERROR(m->log, "  plan: %-28s %10.1f MB", "device, in all", (double)plan.device_bytes / 1e6);
}

keel_status keel_model_load(keel_model *model, keel_device *dev)
{
    keel_status st = KEEL_OK;
    uint64_t embd, rest;
    if (model->dev) {
        KEEL_ERROR(model->log, "%s is loaded already", model->info.path);
        return KEEL_ERR_ARG;
    }
    model->dev = dev;
    KEEL_TRY(keel_heap_create(&model->heap, dev, KEEL_HEAP_DEVICE, "weights"));
    keel_gemma3_weight_bytes(model, &embd, &rest);
    KEEL_TRY(keel_heap_reserve(model->heap, embd + rest));
    KEEL_TRY(keel_gemma3_upload(model));
out:
    if (st != KEEL_OK) {
        if (st == KEEL_ERR_NO_MEMORY) {
            log_plan(model);
        }
        keel_heap_destroy(&model->heap);
        free(model->w.block);
        memset(&model->w, 0, sizeof model->w);
        model->dev = NULL;
    }
    return st;
}

keel_device *keel_model_device(const keel_model *model)
{
    return model->dev;
}

// --- tokens --------------------------------------------------------------------------------------

keel_status keel_encode(const keel_model *model, const char *text, size_t len, const struct keel_encode_params *params,
                        int32_t **ids, size_t *n)
{
    struct keel_tokens out = {0};
    const struct keel_tokenize_params p = {
        .bos = (!params || params->bos) && keel_tokenizer_adds_bos(model->tok) && model->special.bos >= 0,
        .special = params && params->special,
    };
    *ids = NULL;
    *n = 0;
    const keel_status st = keel_tokenize(model->tok, text, len, p, &out);
    if (st != KEEL_OK) {
        keel_tokens_finish(&out);
        return st;
    }
    *ids = out.ids;
    *n = out.n;
    return KEEL_OK;
}

const char *keel_token_text(const keel_model *model, int32_t id, bool special, size_t *len)
{
    size_t unused = 0;
    size_t *n = len ? len : &unused;
    *n = 0;
    if (id < 0 || (uint32_t)id >= model->cfg.vocab) {
        return NULL;
    }
    if (special && keel_token_is_control(model->tok, id)) {
        const char *name = keel_token_name(model->tok, id);
        *n = strlen(name);
        return name;
    }
    return keel_token_bytes(model->tok, id, n);
}

int32_t keel_token_bos(const keel_model *model)
{
    return model->special.bos;
}

int32_t keel_token_eos(const keel_model *model)
{
    return model->special.eos;
}

int32_t keel_token_eot(const keel_model *model)
{
    return model->special.eot;
}

bool keel_token_is_end(const keel_model *model, int32_t id)
{
    return id >= 0 && (uint32_t)id < model->cfg.vocab && keel_tokenizer_is_eog(model->tok, id);
}
