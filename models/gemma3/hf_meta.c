// SPDX-License-Identifier: MIT
// gemma3/hf_meta.c: the metadata of a GGUF from the JSON files of a Hugging Face folder. Key names and values are those that
// llama.cpp's converter writes.
#include "convert.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

// A file of the folder as JSON; *out is NULL if there is none.
static keel_status read_json(json_t **out, const char *folder, const char *name, const keel_log *log)
{
    char path[4096];
    struct keel_map map = {0};
    keel_status st = KEEL_OK;
    *out = NULL;
    if (!keel_hf_path(path, sizeof path, folder, name) || !keel_path_exists(path)) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_map_open(&map, path, log));
    KEEL_TRY(keel_hf_json(out, map.data, map.len_bytes, path, log));
out:
    keel_map_close(&map);
    return st;
}

static const char *folder_name(const char *path, int *len)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') {
        n--;
    }
    size_t at = n;
    while (at > 0 && path[at - 1] != '/') {
        at--;
    }
    *len = (int)(n - at);
    return path + at;
}

static void put_general(const struct keel_hf_folder *f, keel_gguf_writer *w, const char *arch, const char *type)
{
    int len;
    const char *name = folder_name(f->path, &len);
    const bool good = keel_utf8_valid(name, (size_t)len, NULL);
    keel_gguf_put_str(w, "general.architecture", arch);
    keel_gguf_put_str(w, "general.type", type);
    keel_gguf_put_strn(w, "general.name", good ? name : "model", good ? (size_t)len : 5);
    keel_gguf_put_u32(w, "general.quantization_version", 2);
}

// --- shape ---------------------------------------------------------------------------------------

static keel_status put_window(const struct keel_hf_folder *f, keel_gguf_writer *w, const keel_log *log)
{
    const struct keel_hf_text *t = &f->config.text;
    if (t->window == 0 || t->every == 1) {
        return KEEL_OK; // every layer is global
    }
    keel_gguf_put_u32(w, "gemma3.attention.sliding_window", t->window);
    if (t->every == 0) {
        // A GGUF may hold a list, but llama.cpp takes Gemma 3 to follow a rule: neither would be told that it reads another model.
        KEEL_ERROR(log, "%s/config.json: \"layer_types\" follow no rule \"every n-th layer is global\", which Gemma 3 in GGUF needs",
                   f->path);
        return KEEL_ERR_UNSUPPORTED;
    }
    if (t->every != 6) { // 6 is what readers assume
        keel_gguf_put_u32(w, "gemma3.attention.sliding_window_pattern", t->every);
    }
    return KEEL_OK;
}

static void put_rope(const struct keel_hf_text *t, keel_gguf_writer *w)
{
    keel_gguf_put_f32(w, "gemma3.rope.freq_base", (float)t->rope_base);
    if (t->rope_base_local != 10000.0) { // again what readers assume
        keel_gguf_put_f32(w, "gemma3.rope.freq_base_swa", (float)t->rope_base_local);
    }
    if (t->rope_factor != 1.0) {
        keel_gguf_put_str(w, "gemma3.rope.scaling.type", "linear");
        keel_gguf_put_f32(w, "gemma3.rope.scaling.factor", (float)t->rope_factor);
    }
}

// --- tokenizer -----------------------------------------------------------------------------------

// "<bos>", or an object with "content".
static const char *token_of(const json_t *config, const char *key)
{
    const json_t *v = json_object_get(config, key);
    return json_is_object(v) ? json_string_value(json_object_get(v, "content")) : json_string_value(v);
}

static keel_status put_id(keel_gguf_writer *w, const struct keel_hf_vocab *v, const char *key, const char *token, int64_t fallback,
                          const char *folder, const keel_log *log)
{
    const int64_t id = token ? keel_hf_vocab_find(v, token) : fallback;
    if (token && id < 0) {
        KEEL_ERROR(log, "%s/tokenizer_config.json: token \"%.64s\" is not in tokenizer.json", folder, token);
        return KEEL_ERR_FORMAT;
    }
    if (id >= v->n) {
        KEEL_ERROR(log, "%s/config.json: token id %" PRId64 " is beyond vocab_size %u", folder, id, v->n);
        return KEEL_ERR_FORMAT;
    }
    if (id >= 0) {
        keel_gguf_put_u32(w, key, (uint32_t)id);
    }
    return KEEL_OK;
}

static keel_status put_ids(const struct keel_hf_folder *f, keel_gguf_writer *w, const struct keel_hf_vocab *v, const json_t *config,
                           const json_t *generation, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct keel_hf_text *t = &f->config.text;
    const json_t *stops = json_object_get(generation, "eos_token_id");
    int64_t eot = t->eos2;
    if (json_array_size(stops) > 1 && json_is_integer(json_array_get(stops, 1))) {
        eot = json_integer_value(json_array_get(stops, 1));
    }
    KEEL_TRY(put_id(w, v, "tokenizer.ggml.bos_token_id", token_of(config, "bos_token"), t->bos, f->path, log));
    KEEL_TRY(put_id(w, v, "tokenizer.ggml.eos_token_id", token_of(config, "eos_token"), t->eos, f->path, log));
    KEEL_TRY(put_id(w, v, "tokenizer.ggml.padding_token_id", token_of(config, "pad_token"), t->pad, f->path, log));
    KEEL_TRY(put_id(w, v, "tokenizer.ggml.unknown_token_id", token_of(config, "unk_token"), keel_hf_vocab_find(v, "<unk>"), f->path,
                    log));
    if (keel_hf_vocab_find(v, "<end_of_turn>") < 0) { // which readers find by its name
        KEEL_TRY(put_id(w, v, "tokenizer.ggml.eot_token_id", NULL, eot, f->path, log));
    }
out:
    return st;
}

// A template of its own file, or within tokenizer_config.json.
static keel_status put_template(const struct keel_hf_folder *f, keel_gguf_writer *w, const json_t *config, const keel_log *log)
{
    char path[4096];
    struct keel_map map = {0};
    const json_t *t = json_object_get(config, "chat_template");
    if (keel_hf_path(path, sizeof path, f->path, "chat_template.jinja") && keel_path_exists(path)) {
        const keel_status st = keel_map_open(&map, path, log);
        if (st != KEEL_OK) {
            return st;
        }
        keel_gguf_put_strn(w, "tokenizer.chat_template", (const char *)map.data, map.len_bytes);
        keel_map_close(&map);
    } else if (json_is_string(t)) {
        keel_gguf_put_strn(w, "tokenizer.chat_template", json_string_value(t), json_string_length(t));
    }
    return KEEL_OK;
}

static keel_status read_vocab(const struct keel_hf_folder *f, struct keel_hf_vocab *v, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4096];
    struct keel_map map = {0};
    if (!keel_hf_path(path, sizeof path, f->path, "tokenizer.json") || !keel_path_exists(path)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: tokenizer.json is missing; save the tokenizer beside the model (transformers' "
                                    "save_pretrained of a fast tokenizer writes it)", f->path);
    }
    KEEL_TRY(keel_map_open(&map, path, log));
    KEEL_TRY(keel_hf_vocab_parse(v, map.data, map.len_bytes, f->config.text.vocab, path, log));
out:
    keel_map_close(&map);
    return st;
}

static keel_status put_tokenizer(const struct keel_hf_folder *f, keel_gguf_writer *w, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_hf_vocab v = {0};
    json_t *config = NULL, *generation = NULL;
    KEEL_TRY(read_vocab(f, &v, log));
    KEEL_TRY(read_json(&config, f->path, "tokenizer_config.json", log));
    KEEL_TRY(read_json(&generation, f->path, "generation_config.json", log));
    const json_t *bos = json_object_get(config, "add_bos_token");
    keel_gguf_put_str(w, "tokenizer.ggml.model", "llama");
    keel_gguf_put_str(w, "tokenizer.ggml.pre", "default");
    keel_gguf_put_strns(w, "tokenizer.ggml.tokens", v.text, v.len, v.n);
    keel_gguf_put_f32s(w, "tokenizer.ggml.scores", v.score, v.n);
    keel_gguf_put_i32s(w, "tokenizer.ggml.token_type", v.type, v.n);
    KEEL_TRY(put_ids(f, w, &v, config, generation, log));
    keel_gguf_put_bool(w, "tokenizer.ggml.add_bos_token", json_is_boolean(bos) ? json_is_true(bos) : v.adds_bos);
    keel_gguf_put_bool(w, "tokenizer.ggml.add_eos_token", json_is_true(json_object_get(config, "add_eos_token")));
    keel_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", v.space_prefix);
    KEEL_TRY(put_template(f, w, config, log));
out:
    keel_hf_vocab_finish(&v);
    json_decref(config);
    json_decref(generation);
    return st;
}

// --- the two files -------------------------------------------------------------------------------

keel_status keel_hf_put_text(const struct keel_hf_folder *f, keel_gguf_writer *w, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct keel_hf_text *t = &f->config.text;
    put_general(f, w, "gemma3", "model");
    keel_gguf_put_u32(w, "gemma3.context_length", t->context);
    keel_gguf_put_u32(w, "gemma3.embedding_length", t->width);
    keel_gguf_put_u32(w, "gemma3.block_count", t->n_layers);
    keel_gguf_put_u32(w, "gemma3.feed_forward_length", t->ff_width);
    keel_gguf_put_u32(w, "gemma3.attention.head_count", t->n_heads);
    keel_gguf_put_u32(w, "gemma3.attention.head_count_kv", t->n_kv_heads);
    keel_gguf_put_u32(w, "gemma3.attention.key_length", t->head_dim);
    keel_gguf_put_u32(w, "gemma3.attention.value_length", t->head_dim);
    keel_gguf_put_f32(w, "gemma3.attention.layer_norm_rms_epsilon", (float)t->eps);
    KEEL_TRY(put_window(f, w, log));
    put_rope(t, w);
    KEEL_TRY(put_tokenizer(f, w, log));
out:
    return st;
}

// What the folder says of its images, and where; without either file all is as in Gemma 3.
struct processor {
    json_t *json; // of which `settings` is a part
    const json_t *settings; // or NULL
    char where[64];
};

// transformers 5 saves the settings inside of processor_config.json, and where both are there it takes those (image_processing_base.py).
static keel_status read_processor(struct processor *p, const char *folder, const keel_log *log)
{
    keel_status st = KEEL_OK;
    *p = (struct processor){0};
    KEEL_TRY(read_json(&p->json, folder, "processor_config.json", log));
    p->settings = json_object_get(p->json, "image_processor");
    snprintf(p->where, sizeof p->where, "processor_config.json: image_processor");
    if (!p->settings || json_is_null(p->settings)) {
        json_decref(p->json);
        KEEL_TRY(read_json(&p->json, folder, "preprocessor_config.json", log));
        p->settings = p->json;
        snprintf(p->where, sizeof p->where, "preprocessor_config.json");
    } else if (!json_is_object(p->settings)) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s/%s: must be an object", folder, p->where);
    }
out:
    return st;
}

static keel_status refuse(const struct processor *p, const char *folder, const char *key, const char *want, const keel_log *log)
{
    char *value = json_dumps(json_object_get(p->settings, key), JSON_ENCODE_ANY | JSON_SORT_KEYS | JSON_REAL_PRECISION(7));
    KEEL_ERROR(log, "%s/%s: \"%s\" is %.200s, not %s, and keel prepares images in no other way", folder, p->where, key,
               value ? value : "another value", want);
    free(value);
    return KEEL_ERR_UNSUPPORTED;
}

static bool near(const json_t *v, double want)
{
    return json_is_number(v) && fabs(json_number_value(v) - want) <= 1e-6 * want;
}

// The tower's square, {"height": n, "width": n} or n. {"shortest_edge": n} keeps the shape of a picture that is no square.
static bool is_square(const json_t *size, double side)
{
    return json_is_object(size) ? near(json_object_get(size, "height"), side) && near(json_object_get(size, "width"), side) : near(size, side);
}

// Everything that would make transformers' pixels differ from ours. What is not there has Gemma 3's value; a null is not the same:
// a step that is null is not done.
static keel_status check_processor(const struct processor *p, const struct keel_hf_folder *f, const keel_log *log)
{
    static const char *const yes[] = {"do_resize", "do_rescale", "do_normalize"};
    const uint32_t side = f->config.vision.image_size;
    const json_t *filter = json_object_get(p->settings, "resample"), *factor = json_object_get(p->settings, "rescale_factor");
    const json_t *size = json_object_get(p->settings, "size");
    char want[48];
    for (size_t i = 0; i < KEEL_COUNT(yes); i++) {
        const json_t *v = json_object_get(p->settings, yes[i]);
        if (v && !json_is_true(v)) {
            return refuse(p, f->path, yes[i], "true", log);
        }
    }
    if (filter && !near(filter, 2)) {
        return refuse(p, f->path, "resample", "2 (bilinear)", log);
    }
    if (factor && !near(factor, 1.0 / 255)) {
        return refuse(p, f->path, "rescale_factor", "1/255", log);
    }
    snprintf(want, sizeof want, "the tower's %" PRIu32 " by %" PRIu32, side, side);
    if (size && !is_square(size, side)) {
        return refuse(p, f->path, "size", want, log);
    }
    if (json_is_true(json_object_get(p->settings, "do_pan_and_scan"))) {
        KEEL_WARN(log, "%s/%s: \"do_pan_and_scan\" is on; keel does it with --pan-and-scan only", f->path, p->where);
    }
    return KEEL_OK;
}

static keel_status put_colours(const struct processor *p, keel_gguf_writer *w, const char *field, const char *key, double least,
                               const char *folder, const keel_log *log)
{
    float value[3] = {0.5f, 0.5f, 0.5f};
    const json_t *list = json_object_get(p->settings, field);
    for (size_t i = 0; list && !json_is_null(list) && i < 3; i++) {
        const json_t *v = json_array_get(list, i);
        if (json_array_size(list) != 3 || !json_is_number(v) || !(json_number_value(v) >= least && json_number_value(v) <= 1)) {
            KEEL_ERROR(log, "%s/%s: \"%s\" must be a list of 3 numbers from %g to 1", folder, p->where, field, least);
            return KEEL_ERR_FORMAT;
        }
        value[i] = (float)json_number_value(v);
    }
    keel_gguf_put_f32s(w, key, value, 3);
    return KEEL_OK;
}

keel_status keel_hf_put_vision(const struct keel_hf_folder *f, keel_gguf_writer *w, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct keel_hf_vision *v = &f->config.vision;
    struct processor processor;
    KEEL_TRY(read_processor(&processor, f->path, log));
    KEEL_TRY(check_processor(&processor, f, log));
    put_general(f, w, "clip", "mmproj");
    keel_gguf_put_bool(w, "clip.has_vision_encoder", true);
    keel_gguf_put_str(w, "clip.projector_type", "gemma3");
    keel_gguf_put_bool(w, "clip.use_gelu", true);
    keel_gguf_put_u32(w, "clip.vision.projection_dim", f->config.text.width);
    keel_gguf_put_u32(w, "clip.vision.image_size", v->image_size);
    keel_gguf_put_u32(w, "clip.vision.patch_size", v->patch);
    keel_gguf_put_u32(w, "clip.vision.embedding_length", v->width);
    keel_gguf_put_u32(w, "clip.vision.feed_forward_length", v->ff_width);
    keel_gguf_put_u32(w, "clip.vision.block_count", v->n_layers);
    keel_gguf_put_u32(w, "clip.vision.attention.head_count", v->n_heads);
    keel_gguf_put_f32(w, "clip.vision.attention.layer_norm_epsilon", (float)v->eps);
    KEEL_TRY(put_colours(&processor, w, "image_mean", "clip.vision.image_mean", 0, f->path, log));
    KEEL_TRY(put_colours(&processor, w, "image_std", "clip.vision.image_std", 1e-3, f->path, log));
    // Squares of patches that become one token; readers assume 4 × 4.
    const uint32_t grid = v->image_size / v->patch;
    uint32_t side = 1;
    while (side * side < v->n_tokens) {
        side++;
    }
    if (grid / side != 4) {
        keel_gguf_put_u32(w, "clip.vision.projector.scale_factor", grid / side);
    }
out:
    json_decref(processor.json);
    return st;
}
