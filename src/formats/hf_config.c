// SPDX-License-Identifier: MIT
// formats/hf_config.c: config.json and the shard index of a Hugging Face folder. Owns defaults and what is refused.
// Source: transformers, configuration_gemma3.py and configuration_siglip.py, of versions 4.50 to 5.
#include "hf.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

keel_status keel_hf_json(json_t **out, const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    json_error_t err;
    *out = json_loadb((const char *)data, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &err);
    if (!*out) {
        const bool memory = json_error_code(&err) == json_error_out_of_memory;
        KEEL_ERROR(log, "%s:%d: %s", name, err.line, err.text);
        return memory ? KEEL_ERR_NO_MEMORY : KEEL_ERR_FORMAT;
    }
    if (!json_is_object(*out)) {
        KEEL_ERROR(log, "%s: is not a JSON object", name);
        json_decref(*out);
        *out = NULL;
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

// --- fields --------------------------------------------------------------------------------------

// One JSON object with its place, for messages. A missing key and null are the same: transformers writes either.
struct fields {
    const json_t *object;
    const char *file, *where; // where: "", "text_config.", ...
    const keel_log *log;
};

static const json_t *get(const struct fields *f, const char *key)
{
    const json_t *v = json_object_get(f->object, key);
    return json_is_null(v) ? NULL : v;
}

static keel_status get_u32(const struct fields *f, const char *key, uint32_t def, uint32_t lo, uint32_t hi, uint32_t *out)
{
    const json_t *v = get(f, key);
    const int64_t i = v ? json_integer_value(v) : (int64_t)def;
    if ((v && !json_is_integer(v)) || i < lo || i > hi) {
        KEEL_ERROR(f->log, "%s: \"%s%s\" must be an integer from %u to %u", f->file, f->where, key, lo, hi);
        return KEEL_ERR_FORMAT;
    }
    *out = (uint32_t)i;
    return KEEL_OK;
}

static keel_status get_num(const struct fields *f, const char *key, double def, double lo, double hi, double *out)
{
    const json_t *v = get(f, key);
    const double d = v ? json_number_value(v) : def;
    if ((v && !json_is_number(v)) || !(d >= lo && d <= hi)) {
        KEEL_ERROR(f->log, "%s: \"%s%s\" must be a number from %g to %g", f->file, f->where, key, lo, hi);
        return KEEL_ERR_FORMAT;
    }
    *out = d;
    return KEEL_OK;
}

// A setting of which keel knows one value only.
static keel_status expect_str(const struct fields *f, const char *key, const char *want)
{
    const json_t *v = get(f, key);
    const char *s = json_string_value(v);
    if (v && (!s || strcmp(s, want) != 0)) {
        KEEL_ERROR(f->log, "%s: \"%s%s\" is \"%s\"; keel knows \"%s\" only", f->file, f->where, key, s ? s : "(no string)", want);
        return KEEL_ERR_UNSUPPORTED;
    }
    return KEEL_OK;
}

static keel_status expect_off(const struct fields *f, const char *key)
{
    const json_t *v = get(f, key);
    if (v && !json_is_false(v) && !(json_is_number(v) && json_number_value(v) == 0)) {
        KEEL_ERROR(f->log, "%s: \"%s%s\" is set, which is not supported for Gemma 3", f->file, f->where, key);
        return KEEL_ERR_UNSUPPORTED;
    }
    return KEEL_OK;
}

static keel_status get_object(const struct fields *f, const char *key, struct fields *out, const char *where)
{
    *out = (struct fields){get(f, key), f->file, where, f->log};
    if (out->object && !json_is_object(out->object)) {
        KEEL_ERROR(f->log, "%s: \"%s%s\" is not an object", f->file, f->where, key);
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

// --- text ----------------------------------------------------------------------------------------

static keel_status read_layers(struct keel_hf_text *t, const struct fields *f)
{
    keel_status st = KEEL_OK;
    const json_t *types = get(f, "layer_types");
    uint32_t every = 6; // Gemma 3: five local layers, then a global one
    KEEL_TRY(get_u32(f, "_sliding_window_pattern", every, 1, KEEL_HF_MAX_LAYERS, &every));
    KEEL_TRY(get_u32(f, "sliding_window_pattern", every, 1, KEEL_HF_MAX_LAYERS, &every));
    if (types && json_array_size(types) != t->n_layers) {
        KEEL_FAIL(f->log, KEEL_ERR_FORMAT, "%s: \"%slayer_types\" must be a list of %u, one a layer", f->file, f->where,
                  t->n_layers);
    }
    for (uint32_t i = 0; i < t->n_layers; i++) {
        const char *s = json_string_value(json_array_get(types, i));
        if (types && (!s || (strcmp(s, "sliding_attention") != 0 && strcmp(s, "full_attention") != 0))) {
            KEEL_FAIL(f->log, KEEL_ERR_UNSUPPORTED,
                      "%s: \"%slayer_types\"[%u] is \"%s\"; keel knows sliding_attention and full_attention", f->file, f->where,
                      i, s ? s : "(no string)");
        }
        t->local[i] = t->window > 0 && (types ? s[0] == 's' : (i + 1) % every != 0);
    }
    // The rule that the list follows, Gemma's own first: a list shorter than six layers fits several.
    const uint32_t first[] = {6, every};
    for (uint32_t k = 0; k < KEEL_COUNT(first) + t->n_layers + 1 && t->every == 0; k++) {
        const uint32_t n = k < KEEL_COUNT(first) ? first[k] : k - (uint32_t)KEEL_COUNT(first) + 1;
        bool fits = true;
        for (uint32_t i = 0; i < t->n_layers; i++) {
            fits = fits && t->local[i] == ((i + 1) % n != 0);
        }
        t->every = fits ? n : 0;
    }
out:
    return st;
}

static keel_status read_rope_type(struct keel_hf_text *t, const struct fields *f, bool global)
{
    const json_t *v = get(f, "rope_type") ? get(f, "rope_type") : get(f, "type");
    const char *s = json_string_value(v);
    if (!v || (s && strcmp(s, "default") == 0)) {
        return KEEL_OK;
    }
    if (global && s && strcmp(s, "linear") == 0) {
        return get_num(f, "factor", 0, 1.0, 1e6, &t->rope_factor);
    }
    KEEL_ERROR(f->log, "%s: \"%srope_type\" is \"%s\"; keel knows \"default\"%s", f->file, f->where, s ? s : "(no string)",
               global ? " and \"linear\"" : " in layers with a window");
    return KEEL_ERR_UNSUPPORTED;
}

static keel_status read_rope(struct keel_hf_text *t, const struct fields *f)
{
    keel_status st = KEEL_OK;
    struct fields all, full, local, old;
    KEEL_TRY(get_num(f, "rope_theta", 1e6, 1, 1e12, &t->rope_base));
    KEEL_TRY(get_num(f, "rope_local_base_freq", 1e4, 1, 1e12, &t->rope_base_local));
    KEEL_TRY(get_object(f, "rope_parameters", &all, "rope_parameters."));
    KEEL_TRY(get_object(f, "rope_scaling", &old, "rope_scaling."));
    KEEL_TRY(get_object(&all, "full_attention", &full, "rope_parameters.full_attention."));
    KEEL_TRY(get_object(&all, "sliding_attention", &local, "rope_parameters.sliding_attention."));
    if (all.object && !full.object && !local.object) {
        full = all; // one set for all layers, as other models have it
    }
    KEEL_TRY(get_num(&full, "rope_theta", t->rope_base, 1, 1e12, &t->rope_base));
    KEEL_TRY(get_num(&local, "rope_theta", t->rope_base_local, 1, 1e12, &t->rope_base_local));
    t->rope_factor = 1;
    KEEL_TRY(read_rope_type(t, &full, true));
    KEEL_TRY(read_rope_type(t, &local, false));
    KEEL_TRY(read_rope_type(t, &old, true));
out:
    return st;
}

// GGUF has no key for it: readers derive it from the shape, as keel_gemma3_read() does.
static keel_status check_query_scale(const struct keel_hf_text *t, const struct fields *f)
{
    double scalar;
    const double want = t->n_layers == 62 ? (double)t->width / t->n_heads : (double)t->head_dim;
    const keel_status st = get_num(f, "query_pre_attn_scalar", 256, 1e-6, 1e9, &scalar);
    if (st == KEEL_OK && fabs(scalar - want) > 1e-6 * want) {
        KEEL_ERROR(f->log, "%s: \"%squery_pre_attn_scalar\" is %g; a GGUF of these sizes means %g, so the model would be another",
                   f->file, f->where, scalar, want);
        return KEEL_ERR_UNSUPPORTED;
    }
    return st;
}

static void read_ids(struct keel_hf_text *t, const struct fields *f)
{
    const json_t *eos = get(f, "eos_token_id"), *bos = get(f, "bos_token_id"), *pad = get(f, "pad_token_id");
    const json_t *first = json_is_array(eos) ? json_array_get(eos, 0) : eos, *second = json_array_get(eos, 1);
    t->bos = json_is_integer(bos) ? json_integer_value(bos) : -1;
    t->pad = json_is_integer(pad) ? json_integer_value(pad) : -1;
    t->eos = json_is_integer(first) ? json_integer_value(first) : -1;
    t->eos2 = json_is_integer(second) ? json_integer_value(second) : -1;
}

static keel_status read_text(struct keel_hf_text *t, const struct fields *f)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(get_u32(f, "num_hidden_layers", 26, 1, KEEL_HF_MAX_LAYERS, &t->n_layers));
    KEEL_TRY(get_u32(f, "hidden_size", 2304, 8, 1u << 17, &t->width));
    KEEL_TRY(get_u32(f, "intermediate_size", 9216, 8, 1u << 20, &t->ff_width));
    KEEL_TRY(get_u32(f, "num_attention_heads", 8, 1, 1024, &t->n_heads));
    KEEL_TRY(get_u32(f, "num_key_value_heads", 4, 1, t->n_heads, &t->n_kv_heads));
    KEEL_TRY(get_u32(f, "head_dim", 256, 2, 1024, &t->head_dim));
    KEEL_TRY(get_u32(f, "vocab_size", 262208, 1, 1u << 24, &t->vocab));
    KEEL_TRY(get_u32(f, "max_position_embeddings", 131072, 1, 1u << 24, &t->context));
    KEEL_TRY(get_num(f, "rms_norm_eps", 1e-6, 1e-12, 1e-2, &t->eps));
    // transformers' default is 4096, but null is "no window".
    if (!json_is_null(json_object_get(f->object, "sliding_window"))) {
        KEEL_TRY(get_u32(f, "sliding_window", 4096, 0, 1u << 24, &t->window));
    }
    KEEL_TRY(expect_str(f, "hidden_activation", "gelu_pytorch_tanh"));
    KEEL_TRY(expect_off(f, "attention_bias"));
    KEEL_TRY(expect_off(f, "final_logit_softcapping"));
    KEEL_TRY(expect_off(f, "attn_logit_softcapping"));
    KEEL_TRY(expect_off(f, "use_bidirectional_attention"));
    KEEL_TRY(check_query_scale(t, f));
    KEEL_TRY(read_layers(t, f));
    KEEL_TRY(read_rope(t, f));
    read_ids(t, f);
out:
    return st;
}

// --- vision --------------------------------------------------------------------------------------

static keel_status read_vision(struct keel_hf_vision *v, const struct fields *f, const struct fields *top)
{
    keel_status st = KEEL_OK;
    uint32_t channels;
    KEEL_TRY(get_u32(f, "num_hidden_layers", 12, 1, KEEL_HF_MAX_LAYERS, &v->n_layers));
    KEEL_TRY(get_u32(f, "hidden_size", 768, 8, 1u << 16, &v->width));
    KEEL_TRY(get_u32(f, "intermediate_size", 3072, 8, 1u << 18, &v->ff_width));
    KEEL_TRY(get_u32(f, "num_attention_heads", 12, 1, 1024, &v->n_heads));
    KEEL_TRY(get_u32(f, "image_size", 224, 1, 1u << 14, &v->image_size));
    KEEL_TRY(get_u32(f, "patch_size", 16, 1, v->image_size, &v->patch));
    KEEL_TRY(get_u32(f, "num_channels", 3, 3, 3, &channels));
    KEEL_TRY(get_num(f, "layer_norm_eps", 1e-6, 1e-12, 1e-2, &v->eps));
    KEEL_TRY(expect_str(f, "hidden_act", "gelu_pytorch_tanh"));
    KEEL_TRY(get_u32(top, "mm_tokens_per_image", 256, 1, 1u << 16, &v->n_tokens));
    const uint32_t grid = v->image_size / v->patch, side = (uint32_t)lround(sqrt((double)v->n_tokens));
    if (side * side != v->n_tokens || side > grid || grid % side != 0) {
        KEEL_FAIL(f->log, KEEL_ERR_FORMAT,
                  "%s: \"mm_tokens_per_image\" is %u, which %u × %u patches (vision_config: image_size %u, patch_size %u) cannot "
                  "be averaged to",
                  f->file, v->n_tokens, grid, grid, v->image_size, v->patch);
    }
    if (v->width % v->n_heads != 0) {
        KEEL_FAIL(f->log, KEEL_ERR_FORMAT, "%s: \"%shidden_size\" %u does not split into %u heads", f->file, f->where, v->width,
                  v->n_heads);
    }
out:
    return st;
}

// --- the file ------------------------------------------------------------------------------------

keel_status keel_hf_config_parse(struct keel_hf_config *c, const uint8_t *data, size_t len, const char *name,
                                 const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_t *root = NULL;
    struct fields text, vision;
    memset(c, 0, sizeof *c);
    KEEL_TRY(keel_hf_json(&root, data, len, name, log));
    const struct fields top = {root, name, "", log};
    const char *type = json_string_value(get(&top, "model_type"));
    const json_t *archs = get(&top, "architectures");
    const char *arch = json_string_value(json_array_get(archs, 0));
    const bool whole = type ? strcmp(type, "gemma3") == 0 : arch && strcmp(arch, "Gemma3ForConditionalGeneration") == 0;
    const bool text_only = type ? strcmp(type, "gemma3_text") == 0 : arch && strcmp(arch, "Gemma3ForCausalLM") == 0;
    if ((!whole && !text_only) ||
        (arch && strcmp(arch, "Gemma3ForConditionalGeneration") != 0 && strcmp(arch, "Gemma3ForCausalLM") != 0)) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED,
                  "%s: model_type \"%s\", architecture \"%s\" is not supported; keel reads Gemma3ForCausalLM and "
                  "Gemma3ForConditionalGeneration",
                  name, type ? type : "", arch ? arch : "");
    }
    KEEL_TRY(get_object(&top, "text_config", &text, "text_config."));
    KEEL_TRY(get_object(&top, "vision_config", &vision, "vision_config."));
    if (!text.object) {
        text = top;
    }
    KEEL_TRY(read_text(&c->text, &text));
    const json_t *tied = get(&top, "tie_word_embeddings") ? get(&top, "tie_word_embeddings") : get(&text, "tie_word_embeddings");
    c->text.tied = !json_is_false(tied);
    c->has_vision = whole && vision.object;
    if (c->has_vision) {
        KEEL_TRY(read_vision(&c->vision, &vision, &top));
    }
out:
    json_decref(root);
    return st;
}

// --- the shard index -----------------------------------------------------------------------------

keel_status keel_hf_index_parse(struct keel_hf_index *x, const uint8_t *data, size_t len, const char *name,
                                const keel_log *log)
{
    keel_status st = KEEL_OK;
    const char *tensor;
    json_t *file;
    *x = (struct keel_hf_index){0};
    KEEL_TRY(keel_hf_json(&x->root, data, len, name, log));
    json_t *map = json_object_get(x->root, "weight_map");
    if (!json_is_object(map) || json_object_size(map) == 0) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: \"weight_map\" is missing or empty", name);
    }
    x->place = calloc(json_object_size(map), sizeof *x->place);
    if (!x->place) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    json_object_foreach(map, tensor, file)
    {
        const char *s = json_string_value(file);
        if (!s || !*s || strlen(s) != json_string_length(file) || strchr(s, '/') || s[0] == '.') {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the file of tensor \"%s\" must be the name of a file in the same folder", name,
                      tensor);
        }
        x->place[x->n++] = (struct keel_hf_place){tensor, s};
    }
out:
    if (st != KEEL_OK) {
        keel_hf_index_finish(x);
    }
    return st;
}

void keel_hf_index_finish(struct keel_hf_index *x)
{
    json_decref(x->root);
    free(x->place);
    *x = (struct keel_hf_index){0};
}
