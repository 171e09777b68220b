// SPDX-License-Identifier: MIT
// gemma3/config.c: reads a Gemma 3 text model's shape from GGUF metadata and checks its tensors.
// Owns no tensor data. Source: llama.cpp's gemma3 loader for key names and defaults.
#include "gemma3.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// --- metadata ------------------------------------------------------------------------------------

keel_status keel_meta_u32(const keel_gguf *g, const char *key, uint32_t lo, uint32_t hi, uint32_t *out, const keel_log *log)
{
    uint64_t v = 0;
    if (!keel_gguf_u64(g, key, &v)) {
        KEEL_ERROR(log, "%s: metadata \"%s\" is missing or not a count; the file is no complete Gemma 3 model",
                   keel_gguf_name(g), key);
        return KEEL_ERR_FORMAT;
    }
    if (v < lo || v > hi) {
        KEEL_ERROR(log, "%s: metadata \"%s\" is %" PRIu64 "; keel accepts %u to %u", keel_gguf_name(g), key, v, lo, hi);
        return KEEL_ERR_FORMAT;
    }
    *out = (uint32_t)v;
    return KEEL_OK;
}

keel_status keel_meta_f32(const keel_gguf *g, const char *key, bool required, double lo, double hi, float *out,
                          const keel_log *log)
{
    double v = 0;
    if (!keel_gguf_f64(g, key, &v)) {
        if (!required) {
            return KEEL_OK;
        }
        KEEL_ERROR(log, "%s: metadata \"%s\" is missing or not a number", keel_gguf_name(g), key);
        return KEEL_ERR_FORMAT;
    }
    if (!(v >= lo && v <= hi)) {
        KEEL_ERROR(log, "%s: metadata \"%s\" is %g; keel accepts %g to %g", keel_gguf_name(g), key, v, lo, hi);
        return KEEL_ERR_FORMAT;
    }
    *out = (float)v;
    return KEEL_OK;
}

// Which layers see everything: every n-th, or a list of flags (true: sliding window).
static keel_status read_pattern(struct keel_gemma3 *c, const keel_gguf *g, const keel_log *log)
{
    static const char key[] = "gemma3.attention.sliding_window_pattern";
    keel_status st = KEEL_OK;
    struct keel_gguf_array flags = {0};
    uint64_t every = 6; // Gemma 3: five local layers, then a global one
    c->kind = calloc(c->n_layers, 1);
    if (!c->kind) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory for %u layers", keel_gguf_name(g), c->n_layers);
    }
    const bool listed = keel_gguf_array(g, key, &flags);
    if (listed && ((!keel_gguf_type_is_int(flags.type) && flags.type != KEEL_GGUF_BOOL) || flags.n != c->n_layers)) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: metadata \"%s\" has %" PRIu64 " entries of type %s for %u layers",
                  keel_gguf_name(g), key, flags.n, keel_gguf_type_name(flags.type), c->n_layers);
    }
    if (!listed && keel_gguf_u64(g, key, &every) && every > c->n_layers + 1u) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: metadata \"%s\" is %" PRIu64 " for %u layers", keel_gguf_name(g), key, every,
                  c->n_layers);
    }
    for (uint32_t i = 0; i < c->n_layers; i++) {
        const bool local = listed ? keel_gguf_array_int(&flags, i) != 0 : every > 0 && (i + 1) % every != 0;
        c->kind[i] = local && c->window > 0 ? KEEL_LOCAL : KEEL_GLOBAL;
        c->n_global += c->kind[i] == KEEL_GLOBAL;
    }
out:
    return st;
}

static keel_status read_rope(struct keel_gemma3 *c, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    c->rope_base[KEEL_LOCAL] = 10000.0f; // Gemma 3 report, section 2
    c->rope_base[KEEL_GLOBAL] = 1000000.0f;
    c->rope_factor[KEEL_LOCAL] = c->rope_factor[KEEL_GLOBAL] = 1.0f;
    KEEL_TRY(keel_meta_f32(g, "gemma3.rope.freq_base", false, 1.0, 1e12, &c->rope_base[KEEL_GLOBAL], log));
    KEEL_TRY(keel_meta_f32(g, "gemma3.rope.freq_base_swa", false, 1.0, 1e12, &c->rope_base[KEEL_LOCAL], log));
    const char *type = keel_gguf_str(g, "gemma3.rope.scaling.type", NULL);
    if (type && strcmp(type, "linear") == 0) {
        KEEL_TRY(keel_meta_f32(g, "gemma3.rope.scaling.factor", true, 1.0, 1e6, &c->rope_factor[KEEL_GLOBAL], log));
    } else if (type && strcmp(type, "none") != 0) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: rope scaling \"%s\" is not supported; keel knows \"linear\" and \"none\"",
                  keel_gguf_name(g), type);
    }
    uint64_t dim = c->head_dim;
    if (keel_gguf_u64(g, "gemma3.rope.dimension_count", &dim) && dim != c->head_dim) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: partial rotary embedding (%" PRIu64 " of %u) is not supported",
                  keel_gguf_name(g), dim, c->head_dim);
    }
out:
    return st;
}

static keel_status read_shape(struct keel_gemma3 *c, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    uint32_t value_dim = 0;
    uint64_t window = 0;
    double cap = 0;
    KEEL_TRY(keel_meta_u32(g, "gemma3.block_count", 1, 512, &c->n_layers, log));
    KEEL_TRY(keel_meta_u32(g, "gemma3.embedding_length", 8, 1u << 17, &c->width, log));
    KEEL_TRY(keel_meta_u32(g, "gemma3.feed_forward_length", 8, 1u << 20, &c->ff_width, log));
    KEEL_TRY(keel_meta_u32(g, "gemma3.context_length", 1, 1u << 24, &c->context, log));
    KEEL_TRY(keel_meta_u32(g, "gemma3.attention.head_count", 1, 1024, &c->n_heads, log));
    c->n_kv_heads = c->n_heads;
    if (keel_gguf_u64(g, "gemma3.attention.head_count_kv", &window)) {
        KEEL_TRY(keel_meta_u32(g, "gemma3.attention.head_count_kv", 1, c->n_heads, &c->n_kv_heads, log));
    }
    if (c->n_heads % c->n_kv_heads != 0) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: %u attention heads cannot share %u key/value heads evenly", keel_gguf_name(g),
                  c->n_heads, c->n_kv_heads);
    }
    c->head_dim = c->width / c->n_heads;
    if (keel_gguf_u64(g, "gemma3.attention.key_length", &window)) {
        KEEL_TRY(keel_meta_u32(g, "gemma3.attention.key_length", 2, 1024, &c->head_dim, log));
    }
    value_dim = c->head_dim;
    if (keel_gguf_u64(g, "gemma3.attention.value_length", &window)) {
        KEEL_TRY(keel_meta_u32(g, "gemma3.attention.value_length", 2, 1024, &value_dim, log));
    }
    if (value_dim != c->head_dim || c->head_dim % 2 != 0 || c->head_dim == 0) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: head sizes %u (keys) and %u (values); keel needs one even size",
                  keel_gguf_name(g), c->head_dim, value_dim);
    }
    if (keel_gguf_u64(g, "gemma3.attention.sliding_window", &window) && window > 0) {
        KEEL_TRY(keel_meta_u32(g, "gemma3.attention.sliding_window", 1, 1u << 24, &c->window, log));
    }
    KEEL_TRY(keel_meta_f32(g, "gemma3.attention.layer_norm_rms_epsilon", true, 1e-12, 1e-2, &c->eps, log));
    if (keel_gguf_f64(g, "gemma3.final_logit_softcapping", &cap) && cap != 0) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: logit softcapping (%g) belongs to Gemma 2, which keel does not run",
                  keel_gguf_name(g), cap);
    }
    // The 27B normalises queries by width / heads (168) rather than by the head size (128).
    c->attn_scale = 1.0f / sqrtf(c->n_layers == 62 ? (float)c->width / (float)c->n_heads : (float)c->head_dim);
    c->embed_scale = sqrtf((float)c->width);
    KEEL_TRY(read_pattern(c, g, log));
    KEEL_TRY(read_rope(c, g, log));
out:
    return st;
}

// --- tensors -------------------------------------------------------------------------------------

enum dim { DIM_NONE, DIM_WIDTH, DIM_FF, DIM_Q, DIM_KV, DIM_HEAD, DIM_VOCAB };
struct rule {
    const char *name; // of a block tensor: what follows "blk.N."
    enum dim dims[2]; // GGUF order
    bool optional;
};

static const struct rule block_rule[KEEL_N_BLOCK_TENSORS] = {
    [KEEL_ATTN_Q] = {"attn_q.weight", {DIM_WIDTH, DIM_Q}, false},
    [KEEL_ATTN_K] = {"attn_k.weight", {DIM_WIDTH, DIM_KV}, false},
    [KEEL_ATTN_V] = {"attn_v.weight", {DIM_WIDTH, DIM_KV}, false},
    [KEEL_ATTN_OUTPUT] = {"attn_output.weight", {DIM_Q, DIM_WIDTH}, false},
    [KEEL_FFN_GATE] = {"ffn_gate.weight", {DIM_WIDTH, DIM_FF}, false},
    [KEEL_FFN_UP] = {"ffn_up.weight", {DIM_WIDTH, DIM_FF}, false},
    [KEEL_FFN_DOWN] = {"ffn_down.weight", {DIM_FF, DIM_WIDTH}, false},
    [KEEL_T_ATTN_NORM] = {"attn_norm.weight", {DIM_WIDTH, DIM_NONE}, false},
    [KEEL_T_Q_NORM] = {"attn_q_norm.weight", {DIM_HEAD, DIM_NONE}, false},
    [KEEL_T_K_NORM] = {"attn_k_norm.weight", {DIM_HEAD, DIM_NONE}, false},
    [KEEL_T_POST_ATTN_NORM] = {"post_attention_norm.weight", {DIM_WIDTH, DIM_NONE}, false},
    [KEEL_T_FFN_NORM] = {"ffn_norm.weight", {DIM_WIDTH, DIM_NONE}, false},
    [KEEL_T_POST_FFW_NORM] = {"post_ffw_norm.weight", {DIM_WIDTH, DIM_NONE}, false},
};
static const struct rule embd_rule = {"token_embd.weight", {DIM_WIDTH, DIM_VOCAB}, false};
static const struct rule norm_rule = {"output_norm.weight", {DIM_WIDTH, DIM_NONE}, false};
static const struct rule head_rule = {"output.weight", {DIM_WIDTH, DIM_VOCAB}, true};

static uint64_t dim_of(const struct keel_gemma3 *c, enum dim d)
{
    switch (d) {
    case DIM_WIDTH:
        return c->width;
    case DIM_FF:
        return c->ff_width;
    case DIM_Q:
        return keel_q_width(c);
    case DIM_KV:
        return keel_kv_width(c);
    case DIM_HEAD:
        return c->head_dim;
    case DIM_VOCAB:
        return c->vocab;
    case DIM_NONE:
        break;
    }
    return 1;
}

static keel_status find_tensor(const struct keel_gemma3 *c, const keel_gguf *g, const struct rule *r, const char *name,
                               const struct keel_gguf_tensor **out, uint32_t *n_found, const keel_log *log)
{
    const struct keel_gguf_tensor *t = keel_gguf_tensor_find(g, name);
    const uint64_t want[2] = {dim_of(c, r->dims[0]), dim_of(c, r->dims[1])};
    *out = t;
    if (!t) {
        if (r->optional) {
            return KEEL_OK;
        }
        KEEL_ERROR(log, "%s: tensor \"%s\" [%" PRIu64 ", %" PRIu64 "] is missing", keel_gguf_name(g), name, want[0],
                   want[1]);
        return KEEL_ERR_FORMAT;
    }
    (*n_found)++;
    if (t->dims[0] != want[0] || t->dims[1] != want[1] || t->dims[2] != 1 || t->dims[3] != 1) {
        KEEL_ERROR(log,
                   "%s: tensor \"%s\" has shape [%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64
                   "], the metadata ask for [%" PRIu64 ", %" PRIu64 "]",
                   keel_gguf_name(g), name, t->dims[0], t->dims[1], t->dims[2], t->dims[3], want[0], want[1]);
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

// A tensor that no rule names would be left out of the computation, so the results would be wrong.
static keel_status reject_unknown(const struct keel_gemma3 *c, const keel_gguf *g, const keel_log *log)
{
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const char *name = keel_gguf_tensor_at(g, i)->name;
        bool known = strcmp(name, embd_rule.name) == 0 || strcmp(name, norm_rule.name) == 0 ||
                     strcmp(name, head_rule.name) == 0;
        unsigned layer = 0;
        int at = 0;
        if (!known && sscanf(name, "blk.%u.%n", &layer, &at) == 1 && at > 0 && layer < c->n_layers) {
            for (uint32_t r = 0; r < KEEL_N_BLOCK_TENSORS && !known; r++) {
                known = strcmp(name + at, block_rule[r].name) == 0;
            }
        }
        if (!known) {
            KEEL_ERROR(log, "%s: tensor \"%s\" is no part of a Gemma 3 text model of %u layers", keel_gguf_name(g), name,
                       c->n_layers);
            return KEEL_ERR_UNSUPPORTED;
        }
    }
    return KEEL_OK;
}

static keel_status read_tensors(struct keel_gemma3 *c, struct keel_gemma3_source *s, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    uint32_t n_found = 0;
    char name[96];
    const struct keel_gguf_tensor *embd = keel_gguf_tensor_find(g, embd_rule.name);
    if (!embd) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: tensor \"%s\" is missing", keel_gguf_name(g), embd_rule.name);
    }
    if (embd->dims[1] == 0 || embd->dims[1] > 1u << 24) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: tensor \"%s\" has %" PRIu64 " rows; keel accepts 1 to %u", keel_gguf_name(g),
                  embd_rule.name, embd->dims[1], 1u << 24);
    }
    c->vocab = (uint32_t)embd->dims[1];
    KEEL_TRY(find_tensor(c, g, &embd_rule, embd_rule.name, &s->embd, &n_found, log));
    KEEL_TRY(find_tensor(c, g, &norm_rule, norm_rule.name, &s->output_norm, &n_found, log));
    KEEL_TRY(find_tensor(c, g, &head_rule, head_rule.name, &s->output, &n_found, log));
    s->block = calloc((size_t)c->n_layers * KEEL_N_BLOCK_TENSORS, sizeof *s->block);
    if (!s->block) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory for the tensor table", keel_gguf_name(g));
    }
    for (uint32_t i = 0; i < c->n_layers; i++) {
        for (uint32_t r = 0; r < KEEL_N_BLOCK_TENSORS; r++) {
            snprintf(name, sizeof name, "blk.%u.%s", i, block_rule[r].name);
            KEEL_TRY(find_tensor(c, g, &block_rule[r], name, &s->block[(size_t)i * KEEL_N_BLOCK_TENSORS + r], &n_found, log));
        }
    }
    if (n_found != keel_gguf_tensor_count(g)) {
        KEEL_TRY(reject_unknown(c, g, log));
    }
out:
    return st;
}

keel_status keel_gemma3_read(struct keel_gemma3 *c, struct keel_gemma3_source *s, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    memset(c, 0, sizeof *c);
    memset(s, 0, sizeof *s);
    KEEL_TRY(read_shape(c, g, log));
    KEEL_TRY(read_tensors(c, s, g, log));
out:
    if (st != KEEL_OK) {
        keel_gemma3_finish(c, s);
    }
    return st;
}

void keel_gemma3_finish(struct keel_gemma3 *c, struct keel_gemma3_source *s)
{
    free(c->kind);
    free(s->block);
    c->kind = NULL;
    s->block = NULL;
}
