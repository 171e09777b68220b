// SPDX-License-Identifier: MIT
// gemma3/hf_tensors.c: which tensor of a Hugging Face folder is which of a GGUF, with its shape. Owns the tables of names.
// Sources: transformers' modeling_gemma3.py and modeling_siglip.py of versions 4.50 to 5; llama.cpp's converter.
#include "convert.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// Sizes that shapes are made of.
enum dim { ONE, WIDTH, FF, Q_WIDTH, KV_WIDTH, HEAD, VOCAB, PATCH, CHANNELS, PATCHES, OUT };
struct rule {
    const char *from, *to; // %u: the layer
    uint32_t n_dims;
    enum dim dims[4]; // GGUF order
    float add;
};

static const struct rule text_rules[] = {
    {"embed_tokens.weight", "token_embd.weight", 2, {WIDTH, VOCAB}, 0},
    {"norm.weight", "output_norm.weight", 1, {WIDTH}, 1},
    {"layers.%u.self_attn.q_proj.weight", "blk.%u.attn_q.weight", 2, {WIDTH, Q_WIDTH}, 0},
    {"layers.%u.self_attn.k_proj.weight", "blk.%u.attn_k.weight", 2, {WIDTH, KV_WIDTH}, 0},
    {"layers.%u.self_attn.v_proj.weight", "blk.%u.attn_v.weight", 2, {WIDTH, KV_WIDTH}, 0},
    {"layers.%u.self_attn.o_proj.weight", "blk.%u.attn_output.weight", 2, {Q_WIDTH, WIDTH}, 0},
    {"layers.%u.mlp.gate_proj.weight", "blk.%u.ffn_gate.weight", 2, {WIDTH, FF}, 0},
    {"layers.%u.mlp.up_proj.weight", "blk.%u.ffn_up.weight", 2, {WIDTH, FF}, 0},
    {"layers.%u.mlp.down_proj.weight", "blk.%u.ffn_down.weight", 2, {FF, WIDTH}, 0},
    {"layers.%u.input_layernorm.weight", "blk.%u.attn_norm.weight", 1, {WIDTH}, 1},
    {"layers.%u.self_attn.q_norm.weight", "blk.%u.attn_q_norm.weight", 1, {HEAD}, 1},
    {"layers.%u.self_attn.k_norm.weight", "blk.%u.attn_k_norm.weight", 1, {HEAD}, 1},
    {"layers.%u.post_attention_layernorm.weight", "blk.%u.post_attention_norm.weight", 1, {WIDTH}, 1},
    {"layers.%u.pre_feedforward_layernorm.weight", "blk.%u.ffn_norm.weight", 1, {WIDTH}, 1},
    {"layers.%u.post_feedforward_layernorm.weight", "blk.%u.post_ffw_norm.weight", 1, {WIDTH}, 1},
};
static const struct rule head_rule = {"lm_head.weight", "output.weight", 2, {WIDTH, VOCAB}, 0};

static const struct rule vision_rules[] = {
    {"embeddings.patch_embedding.weight", "v.patch_embd.weight", 4, {PATCH, PATCH, CHANNELS, WIDTH}, 0},
    {"embeddings.patch_embedding.bias", "v.patch_embd.bias", 1, {WIDTH}, 0},
    {"embeddings.position_embedding.weight", "v.position_embd.weight", 2, {WIDTH, PATCHES}, 0},
    {"post_layernorm.weight", "v.post_ln.weight", 1, {WIDTH}, 0},
    {"post_layernorm.bias", "v.post_ln.bias", 1, {WIDTH}, 0},
    {"encoder.layers.%u.layer_norm1.weight", "v.blk.%u.ln1.weight", 1, {WIDTH}, 0},
    {"encoder.layers.%u.layer_norm1.bias", "v.blk.%u.ln1.bias", 1, {WIDTH}, 0},
    {"encoder.layers.%u.self_attn.q_proj.weight", "v.blk.%u.attn_q.weight", 2, {WIDTH, WIDTH}, 0},
    {"encoder.layers.%u.self_attn.q_proj.bias", "v.blk.%u.attn_q.bias", 1, {WIDTH}, 0},
    {"encoder.layers.%u.self_attn.k_proj.weight", "v.blk.%u.attn_k.weight", 2, {WIDTH, WIDTH}, 0},
    {"encoder.layers.%u.self_attn.k_proj.bias", "v.blk.%u.attn_k.bias", 1, {WIDTH}, 0},
    {"encoder.layers.%u.self_attn.v_proj.weight", "v.blk.%u.attn_v.weight", 2, {WIDTH, WIDTH}, 0},
    {"encoder.layers.%u.self_attn.v_proj.bias", "v.blk.%u.attn_v.bias", 1, {WIDTH}, 0},
    {"encoder.layers.%u.self_attn.out_proj.weight", "v.blk.%u.attn_out.weight", 2, {WIDTH, WIDTH}, 0},
    {"encoder.layers.%u.self_attn.out_proj.bias", "v.blk.%u.attn_out.bias", 1, {WIDTH}, 0},
    {"encoder.layers.%u.layer_norm2.weight", "v.blk.%u.ln2.weight", 1, {WIDTH}, 0},
    {"encoder.layers.%u.layer_norm2.bias", "v.blk.%u.ln2.bias", 1, {WIDTH}, 0},
    {"encoder.layers.%u.mlp.fc1.weight", "v.blk.%u.ffn_up.weight", 2, {WIDTH, FF}, 0},
    {"encoder.layers.%u.mlp.fc1.bias", "v.blk.%u.ffn_up.bias", 1, {FF}, 0},
    {"encoder.layers.%u.mlp.fc2.weight", "v.blk.%u.ffn_down.weight", 2, {FF, WIDTH}, 0},
    {"encoder.layers.%u.mlp.fc2.bias", "v.blk.%u.ffn_down.bias", 1, {WIDTH}, 0},
};
static const struct rule projector_rules[] = {
    {"mm_soft_emb_norm.weight", "mm.soft_emb_norm.weight", 1, {WIDTH}, 1},
    {"mm_input_projection_weight", "mm.input_projection.weight", 2, {OUT, WIDTH}, 0}, // a bare parameter, not transposed
};

// How the generations of transformers call a part of the model, the longest first. "" must come last.
static const char *const text_prefix[] = {"model.language_model.", "language_model.model.", "model.", NULL};
static const char *const head_prefix[] = {"language_model.", "model.", "", NULL};
static const char *const vision_prefix[] = {"model.vision_tower.vision_model.", "vision_tower.vision_model.",
                                            "model.vision_tower.", "vision_tower.", NULL};
static const char *const projector_prefix[] = {"model.multi_modal_projector.", "multi_modal_projector.", NULL};

// --- one tensor ----------------------------------------------------------------------------------

static uint64_t dim_of(const struct keel_hf_config *c, enum dim d, bool vision)
{
    const struct keel_hf_text *t = &c->text;
    const struct keel_hf_vision *v = &c->vision;
    switch (d) {
    case WIDTH:
        return vision ? v->width : t->width;
    case FF:
        return vision ? v->ff_width : t->ff_width;
    case Q_WIDTH:
        return (uint64_t)t->n_heads * t->head_dim;
    case KV_WIDTH:
        return (uint64_t)t->n_kv_heads * t->head_dim;
    case HEAD:
        return t->head_dim;
    case VOCAB:
        return t->vocab;
    case PATCH:
        return v->patch;
    case CHANNELS:
        return 3;
    case PATCHES:
        return (uint64_t)(v->image_size / v->patch) * (v->image_size / v->patch);
    case OUT:
        return t->width;
    case ONE:
        break;
    }
    return 1;
}

static struct keel_hf_tensor *find(struct keel_hf_folder *f, const char *name)
{
    size_t lo = 0, hi = f->n_tensors;
    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        const int c = strcmp(f->tensor[mid].t->name, name);
        if (c == 0) {
            return &f->tensor[mid];
        }
        *(c < 0 ? &lo : &hi) = c < 0 ? mid + 1 : mid;
    }
    return NULL;
}

// "layers.%u.x" with its layer. The tables hold one %u at most.
static void fill_in(char out[96], const char *pattern, uint32_t layer)
{
    const char *at = strstr(pattern, "%u");
    if (at) {
        snprintf(out, 96, "%.*s%u%s", (int)(at - pattern), pattern, layer, at + 2);
    } else {
        snprintf(out, 96, "%s", pattern);
    }
}

static struct keel_hf_tensor *find_with(struct keel_hf_folder *f, const char *const *prefix, const char *rest)
{
    char name[160];
    struct keel_hf_tensor *t = NULL;
    for (size_t i = 0; prefix[i] && !t; i++) {
        snprintf(name, sizeof name, "%s%s", prefix[i], rest);
        t = find(f, name);
    }
    return t;
}

static bool to_dtype(enum keel_st_type type, enum keel_dtype *out)
{
    switch (type) {
    case KEEL_ST_F32:
        *out = KEEL_F32;
        return true;
    case KEEL_ST_F16:
        *out = KEEL_F16;
        return true;
    case KEEL_ST_BF16:
        *out = KEEL_BF16;
        return true;
    default:
        return false;
    }
}

static void shape_text(char out[96], const uint64_t *dims, uint32_t n, bool reverse)
{
    int at = snprintf(out, 96, "[");
    for (uint32_t i = 0; i < n && i < 4; i++) {
        at += snprintf(out + at, 96 - (size_t)at, "%s%" PRIu64, i ? ", " : "", dims[reverse ? n - 1 - i : i]);
    }
    snprintf(out + at, 96 - (size_t)at, "%s]", n > 4 ? ", ..." : "");
}

static keel_status add(struct keel_hf_folder *f, struct keel_pack *p, const struct rule *r, uint32_t layer,
                       const char *const *prefix, bool vision, const keel_log *log)
{
    char rest[96], want[96], have[96];
    struct keel_pack_tensor t = {.n_dims = r->n_dims, .dims = {1, 1, 1, 1}, .n_elems = 1, .add = r->add};
    fill_in(rest, r->from, layer);
    fill_in(t.name, r->to, layer);
    struct keel_hf_tensor *src = find_with(f, prefix, rest);
    for (uint32_t i = 0; i < r->n_dims; i++) {
        t.dims[i] = dim_of(&f->config, r->dims[i], vision);
        t.n_elems *= t.dims[i];
    }
    shape_text(want, t.dims, r->n_dims, true);
    if (!src) {
        KEEL_ERROR(log, "%s: tensor \"%s%s\" %s, which config.json asks for, is in none of the safetensors files", f->path,
                   prefix[0], rest, want);
        return KEEL_ERR_FORMAT;
    }
    const char *file = f->file[src->file].path;
    bool same = src->t->n_dims == r->n_dims;
    for (uint32_t i = 0; same && i < r->n_dims; i++) {
        same = src->t->dims[r->n_dims - 1 - i] == t.dims[i];
    }
    if (!same) {
        shape_text(have, src->t->dims, src->t->n_dims, false);
        KEEL_ERROR(log, "%s: tensor \"%s\" has shape %s, but %s/config.json asks for %s", file, src->t->name, have, f->path, want);
        return KEEL_ERR_FORMAT;
    }
    if (!to_dtype(src->t->type, &t.from)) {
        KEEL_ERROR(log, "%s: tensor \"%s\" is %s; keel converts F32, F16 and BF16 weights", file, src->t->name,
                   keel_st_type_name(src->t->type));
        return KEEL_ERR_UNSUPPORTED;
    }
    t.data = src->t->data;
    t.map = &f->file[src->file].map;
    src->used = true;
    return keel_pack_add(p, &t, log);
}

// --- parts ---------------------------------------------------------------------------------------

// Rules without a layer once, those with one for every layer, in the order of the layers.
static keel_status add_all(struct keel_hf_folder *f, struct keel_pack *p, const struct rule *rules, size_t n_rules,
                           uint32_t n_layers, const char *const *prefix, bool vision, const keel_log *log)
{
    keel_status st = KEEL_OK;
    for (size_t k = 0; k < n_rules; k++) {
        if (!strchr(rules[k].from, '%')) {
            KEEL_TRY(add(f, p, &rules[k], 0, prefix, vision, log));
        }
    }
    for (uint32_t i = 0; i < n_layers; i++) {
        for (size_t k = 0; k < n_rules; k++) {
            if (strchr(rules[k].from, '%')) {
                KEEL_TRY(add(f, p, &rules[k], i, prefix, vision, log));
            }
        }
    }
out:
    return st;
}

static bool starts_with_any(const char *name, const char *const *prefix)
{
    for (size_t i = 0; prefix[i]; i++) {
        if (strncmp(name, prefix[i], strlen(prefix[i])) == 0) {
            return true;
        }
    }
    return false;
}

// SigLIP's pooling head is saved with the tower but has no part in Gemma 3; a tied head is a copy of the embedding.
static bool has_no_part(const struct keel_hf_folder *f, const char *name)
{
    const char *tower = strstr(name, "vision_tower.");
    const char *rest = tower ? tower + strlen("vision_tower.") : NULL;
    if (rest && strncmp(rest, "vision_model.", 13) == 0) {
        rest += 13;
    }
    const size_t len = strlen(name);
    return (rest && strncmp(rest, "head.", 5) == 0) || strstr(name, "rotary_emb.inv_freq") ||
           (rest && strcmp(rest, "embeddings.position_ids") == 0) ||
           (f->config.text.tied && len >= 14 && strcmp(name + len - 14, "lm_head.weight") == 0);
}

// A tensor that neither table names would be left out of the computation, so the results would be wrong.
static keel_status reject_unknown(const struct keel_hf_folder *f, bool vision, const keel_log *log)
{
    for (size_t i = 0; i < f->n_tensors; i++) {
        const char *name = f->tensor[i].t->name;
        const bool of_vision = starts_with_any(name, vision_prefix) || starts_with_any(name, projector_prefix);
        if (!f->tensor[i].used && of_vision == vision && !has_no_part(f, name)) {
            KEEL_ERROR(log, "%s: tensor \"%s\" is no part of the Gemma 3 model that %s/config.json describes",
                       f->file[f->tensor[i].file].path, name, f->path);
            return KEEL_ERR_UNSUPPORTED;
        }
    }
    return KEEL_OK;
}

keel_status keel_hf_text_tensors(struct keel_hf_folder *f, struct keel_pack *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(add_all(f, p, text_rules, KEEL_COUNT(text_rules), f->config.text.n_layers, text_prefix, false, log));
    if (!f->config.text.tied) {
        KEEL_TRY(add(f, p, &head_rule, 0, head_prefix, false, log));
    }
    KEEL_TRY(reject_unknown(f, false, log));
out:
    return st;
}

keel_status keel_hf_vision_tensors(struct keel_hf_folder *f, struct keel_pack *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (!f->config.has_vision) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: the model has no vision tower (config.json has no \"vision_config\")", f->path);
    }
    KEEL_TRY(add_all(f, p, vision_rules, KEEL_COUNT(vision_rules), f->config.vision.n_layers, vision_prefix, true, log));
    KEEL_TRY(add_all(f, p, projector_rules, KEEL_COUNT(projector_rules), 0, projector_prefix, true, log));
    KEEL_TRY(reject_unknown(f, true, log));
out:
    return st;
}
