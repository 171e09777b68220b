// SPDX-License-Identifier: MIT
// gemma3/adapter_peft.c: PEFT folders: adapter_config.json and adapter_model.safetensors.
// Source: peft, src/peft/tuners/lora/config.py and utils/save_and_load.py.
#include "gemma3.h"

#include <jansson.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const module_name[KEEL_N_PROJ] = {
    [KEEL_ATTN_Q] = "self_attn.q_proj",      [KEEL_ATTN_K] = "self_attn.k_proj", [KEEL_ATTN_V] = "self_attn.v_proj",
    [KEEL_ATTN_OUTPUT] = "self_attn.o_proj", [KEEL_FFN_GATE] = "mlp.gate_proj",  [KEEL_FFN_UP] = "mlp.up_proj",
    [KEEL_FFN_DOWN] = "mlp.down_proj",
};

static keel_status join(char *out, size_t cap, const char *folder, const char *name, const keel_log *log)
{
    const int n = snprintf(out, cap, "%s/%s", folder, name);
    if (n < 0 || (size_t)n >= cap) {
        KEEL_ERROR(log, "%s: the path is too long", folder);
        return KEEL_ERR_ARG;
    }
    return KEEL_OK;
}

// "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"; what stands before "layers." differs between model classes.
static bool parse_name(const char *name, uint32_t *layer, uint32_t *proj, bool *is_b)
{
    const char *at = strstr(name, "layers.");
    int used = 0;
    if (!at || strstr(name, "vision_tower") || sscanf(at, "layers.%u.%n", layer, &used) != 1 || used == 0) {
        return false;
    }
    at += used;
    for (uint32_t i = 0; i < KEEL_N_PROJ; i++) {
        const size_t len = strlen(module_name[i]);
        if (strncmp(at, module_name[i], len) == 0) {
            const char *side = at + len;
            *proj = i;
            *is_b = strcmp(side, ".lora_B.weight") == 0;
            return *is_b || strcmp(side, ".lora_A.weight") == 0;
        }
    }
    return false;
}

static keel_status read_config(json_t **out, const keel_model *model, const char *folder)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_map map = { 0 };
    json_error_t error;
    *out = NULL;
    KEEL_TRY(join(path, sizeof path, folder, "adapter_config.json", model->log));
    KEEL_TRY(keel_map_open(&map, path, model->log));
    json_t *v = json_loadb((const char *)map.data, map.len_bytes, JSON_REJECT_DUPLICATES, &error);
    if (!v) {
        KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s:%d: invalid JSON: %s", path, error.line, error.text);
    }
    *out = v;
    const char *type = json_string_value(json_object_get(v, "peft_type"));
    if (!type || strcmp(type, "LORA") != 0) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: peft_type is \"%s\"; only LORA is supported", path, type ? type : "");
    }
    if (json_is_true(json_object_get(v, "use_dora"))) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: DoRA adapters are not supported", path);
    }
    const char *bias = json_string_value(json_object_get(v, "bias"));
    if (bias && strcmp(bias, "none") != 0) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: an adapter with trained biases is not supported", path);
    }
    if (!json_is_integer(json_object_get(v, "r")) || !json_is_number(json_object_get(v, "lora_alpha"))) {
        KEEL_FAIL(model->log, KEEL_ERR_FORMAT, "%s: \"r\" and \"lora_alpha\" must be numbers", path);
    }
out:
    keel_map_close(&map);
    return st;
}

// alpha of a module: a key of alpha_pattern that is the end of its name wins over lora_alpha.
static double alpha_of(const json_t *config, uint32_t layer, uint32_t proj)
{
    const json_t *pattern = json_object_get(config, "alpha_pattern");
    double alpha = json_number_value(json_object_get(config, "lora_alpha"));
    char name[128];
    const char *key;
    json_t *value;
    const int len = snprintf(name, sizeof name, "model.layers.%u.%s", layer, module_name[proj]);
    json_object_foreach((json_t *)(uintptr_t)pattern, key, value)
    {
        const size_t n = strlen(key);
        if (n <= (size_t)len && strcmp(name + len - n, key) == 0 && json_is_number(value)) {
            alpha = json_number_value(value);
        }
    }
    return alpha;
}

keel_status keel_peft_read(struct keel_adapter_file *f, const keel_model *model, const char *folder)
{
    keel_status st = KEEL_OK;
    char path[4200];
    json_t *config = NULL;
    struct keel_map map = { 0 };
    keel_st *tensors = NULL;
    KEEL_TRY(read_config(&config, model, folder));
    KEEL_TRY(join(path, sizeof path, folder, "adapter_model.safetensors", model->log));
    KEEL_TRY(keel_map_open(&map, path, model->log));
    KEEL_TRY(keel_st_parse(&tensors, map.data, map.len_bytes, path, model->log));
    f->alpha = (float)json_number_value(json_object_get(config, "lora_alpha"));
    const bool rs = json_is_true(json_object_get(config, "use_rslora"));
    for (size_t i = 0; i < keel_st_count(tensors); i++) {
        const struct keel_st_tensor *t = keel_st_at(tensors, i);
        uint32_t layer, proj;
        bool is_b;
        float *dst;
        if (!parse_name(t->name, &layer, &proj, &is_b) || t->n_dims != 2) {
            KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: tensor \"%s\" is no LoRA matrix of a projection that keel adapts", path,
                      t->name);
        }
        KEEL_TRY(keel_adapter_file_tensor(f, model, path, t->name, layer, proj, is_b, t->dims, &dst));
        keel_st_to_f32(t, dst);
        struct keel_adapter_pair *p = &f->pair[(size_t)layer * KEEL_N_PROJ + proj];
        const double alpha = alpha_of(config, layer, proj);
        p->scale = (float)(rs ? alpha / sqrt((double)p->rank) : alpha / (double)p->rank); // rsLoRA: Kalajdzievski 2023
    }
out:
    keel_st_destroy(&tensors);
    keel_map_close(&map);
    json_decref(config);
    return st;
}

// --- writing -------------------------------------------------------------------------------------

static keel_status write_config(const struct keel_adapter_file *f, const keel_model *model, const char *folder)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    json_t *targets = json_array();
    for (uint32_t proj = 0; proj < KEEL_N_PROJ; proj++) {
        for (uint32_t layer = 0; layer < f->n_layers; layer++) {
            if (f->pair[(size_t)layer * KEEL_N_PROJ + proj].rank > 0) {
                json_array_append_new(targets, json_string(strchr(module_name[proj], '.') + 1));
                break;
            }
        }
    }
    json_t *v = json_pack("{s:s, s:s, s:s, s:i, s:f, s:f, s:s, s:b, s:b, s:b, s:b, s:n, s:n, s:{}, s:{}, s:O}", "peft_type", "LORA",
                          "task_type", "CAUSAL_LM", "base_model_name_or_path", model->info.name, "r", (int)f->rank, "lora_alpha",
                          (double)f->alpha, "lora_dropout", 0.0, "bias", "none", "inference_mode", 1, "use_rslora", 0, "use_dora", 0,
                          "fan_in_fan_out", 0, "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern",
                          "target_modules", targets);
    if (!v) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "%s: no memory for adapter_config.json", folder);
    }
    KEEL_TRY(join(path, sizeof path, folder, "adapter_config.json", model->log));
    KEEL_TRY(keel_file_create(&out, path, model->log));
    json_dumpf(v, out.f, JSON_INDENT(2) | JSON_SORT_KEYS); // a failed write shows at commit
    KEEL_TRY(keel_file_commit(&out, model->log));
out:
    keel_file_abort(&out);
    json_decref(v);
    json_decref(targets);
    return st;
}

static keel_status write_tensors(const struct keel_adapter_file *f, const keel_model *model, const char *folder)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    const size_t n_pairs = (size_t)f->n_layers * KEEL_N_PROJ;
    const struct keel_pair meta = { "format", "pt" };
    struct keel_st_tensor *t = calloc(2 * n_pairs, sizeof *t);
    char(*names)[128] = calloc(2 * n_pairs, sizeof *names);
    size_t n = 0;
    if (!t || !names) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "%s: no memory for the tensor list", folder);
    }
    for (size_t i = 0; i < n_pairs; i++) {
        const struct keel_adapter_pair *p = &f->pair[i];
        uint32_t k, width;
        keel_proj_shape(model, (enum keel_proj)(i % KEEL_N_PROJ), &k, &width);
        for (int b = 0; b < 2 && p->rank > 0; b++, n++) {
            snprintf(names[n], sizeof names[n], "base_model.model.model.layers.%zu.%s.lora_%c.weight", i / KEEL_N_PROJ,
                     module_name[i % KEEL_N_PROJ], b ? 'B' : 'A');
            t[n] = (struct keel_st_tensor){ .name = names[n], .type = KEEL_ST_F32, .n_dims = 2,
                                            .dims = { b ? width : p->rank, b ? p->rank : k },
                                            .data = (const uint8_t *)(b ? p->b : p->a) };
            t[n].n_elems = t[n].dims[0] * t[n].dims[1];
            t[n].bytes = 4 * t[n].n_elems;
        }
    }
    KEEL_TRY(join(path, sizeof path, folder, "adapter_model.safetensors", model->log));
    KEEL_TRY(keel_file_create(&out, path, model->log));
    KEEL_TRY(keel_st_write(out.f, t, n, &meta, 1, model->log));
    KEEL_TRY(keel_file_commit(&out, model->log));
out:
    keel_file_abort(&out);
    free(t);
    free(names);
    return st;
}

keel_status keel_peft_write(const struct keel_adapter_file *f, const keel_model *model, const char *folder)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_make_dirs(folder, model->log));
    KEEL_TRY(write_tensors(f, model, folder)); // the config comes last: a folder with one is complete
    KEEL_TRY(write_config(f, model, folder));
out:
    return st;
}
