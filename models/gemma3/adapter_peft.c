// SPDX-License-Identifier: MIT
// gemma3/adapter_peft.c: PEFT folders: adapter_config.json and adapter_model.safetensors.
// With pairs of a vision tower names are those of transformers' Gemma3ForConditionalGeneration, else of Gemma3ForCausalLM.
// Source: peft, src/peft/tuners/lora/config.py and utils/save_and_load.py.
#include "vision_internal.h"

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

static const char *const vision_module[KEEL_V_N_PROJ] = {
    [KEEL_V_Q] = "self_attn.q_proj",     [KEEL_V_K] = "self_attn.k_proj", [KEEL_V_V] = "self_attn.v_proj",
    [KEEL_V_OUT] = "self_attn.out_proj", [KEEL_V_UP] = "mlp.fc1",         [KEEL_V_DOWN] = "mlp.fc2",
};

// "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"; what stands before "layers." differs between model classes and
// versions of transformers, except that a tower's layers are somewhere below "vision_tower".
static bool parse_name(const char *name, struct keel_pair_name *which)
{
    const char *at = strstr(name, "layers.");
    int used = 0;
    *which = (struct keel_pair_name){ .vision = strstr(name, "vision_tower") != NULL };
    if (!at || sscanf(at, "layers.%u.%n", &which->layer, &used) != 1 || used == 0) {
        return false;
    }
    const char *const *modules = which->vision ? vision_module : module_name;
    for (uint32_t i = 0; i < (which->vision ? (uint32_t)KEEL_V_N_PROJ : (uint32_t)KEEL_N_PROJ); i++) {
        const size_t len = strlen(modules[i]);
        if (strncmp(at + used, modules[i], len) == 0) {
            const char *side = at + used + len;
            which->proj = i;
            which->is_b = strcmp(side, ".lora_B.weight") == 0;
            return which->is_b || strcmp(side, ".lora_A.weight") == 0;
        }
    }
    return false;
}

static bool has_vision(const struct keel_adapter_file *f, const keel_model *model)
{
    for (uint32_t i = model->cfg.n_layers * KEEL_N_PROJ; i < f->n_pairs; i++) {
        if (f->pair[i].rank > 0) {
            return true;
        }
    }
    return false;
}

// Module of a pair: "model.layers.3.self_attn.q_proj", or with `vision` the names of the class that has a tower too.
static void module_of(const keel_model *model, uint32_t pair, bool vision, char name[96])
{
    const uint32_t text = model->cfg.n_layers * KEEL_N_PROJ;
    if (pair < text) {
        snprintf(name, 96, "model.%slayers.%u.%s", vision ? "language_model." : "", pair / KEEL_N_PROJ,
                 module_name[pair % KEEL_N_PROJ]);
    } else {
        snprintf(name, 96, "model.vision_tower.encoder.layers.%u.%s", (pair - text) / KEEL_V_N_PROJ,
                 vision_module[(pair - text) % KEEL_V_N_PROJ]);
    }
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
static double alpha_of(const json_t *config, const keel_model *model, uint32_t pair)
{
    const json_t *pattern = json_object_get(config, "alpha_pattern");
    double alpha = json_number_value(json_object_get(config, "lora_alpha"));
    char name[96];
    const char *key;
    json_t *value;
    module_of(model, pair, false, name);
    const size_t len = strlen(name);
    json_object_foreach((json_t *)(uintptr_t)pattern, key, value)
    {
        const size_t n = strlen(key);
        if (n <= len && strcmp(name + len - n, key) == 0 && json_is_number(value)) {
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
        struct keel_pair_name which;
        uint32_t pair;
        float *dst;
        if (!parse_name(t->name, &which) || t->n_dims != 2) {
            KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: tensor \"%s\" is no LoRA matrix of a projection that keel adapts", path,
                      t->name);
        }
        KEEL_TRY(keel_adapter_file_tensor(f, model, path, t->name, &which, t->dims, &pair, &dst));
        if (!dst) {
            continue;
        }
        keel_st_to_f32(t, dst);
        struct keel_adapter_pair *p = &f->pair[pair];
        const double alpha = alpha_of(config, model, pair);
        p->scale = (float)(rs ? alpha / sqrt((double)p->rank) : alpha / (double)p->rank); // rsLoRA: Kalajdzievski 2023
    }
out:
    keel_st_destroy(&tensors);
    keel_map_close(&map);
    json_decref(config);
    return st;
}

// --- writing -------------------------------------------------------------------------------------

// The last parts of modules, each once; with a tower, whose modules end like those of the language model, whole names.
static json_t *targets_of(const struct keel_adapter_file *f, const keel_model *model)
{
    const bool vision = has_vision(f, model);
    json_t *targets = json_array();
    bool named[KEEL_N_PROJ] = { false };
    for (uint32_t i = 0; i < f->n_pairs; i++) {
        char name[96];
        module_of(model, i, vision, name);
        if (f->pair[i].rank > 0 && vision) {
            json_array_append_new(targets, json_string(name));
        } else if (f->pair[i].rank > 0 && !named[i % KEEL_N_PROJ]) {
            named[i % KEEL_N_PROJ] = true;
            json_array_append_new(targets, json_string(strrchr(name, '.') + 1));
        }
    }
    return targets;
}

// Numbers of the layers with an adapter, or null where all have one; beside a tower the whole names say it.
static json_t *layers_of(const struct keel_adapter_file *f, const keel_model *model)
{
    json_t *layers = json_array();
    for (uint32_t layer = 0; layer < model->cfg.n_layers; layer++) {
        bool any = false;
        for (uint32_t k = 0; k < KEEL_N_PROJ; k++) {
            any = any || f->pair[layer * KEEL_N_PROJ + k].rank > 0;
        }
        if (any) {
            json_array_append_new(layers, json_integer(layer));
        }
    }
    if (json_array_size(layers) < model->cfg.n_layers && !has_vision(f, model)) {
        return layers;
    }
    json_decref(layers);
    return json_null();
}

static keel_status write_config(const struct keel_adapter_file *f, const keel_model *model, const char *folder)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    json_t *targets = targets_of(f, model), *layers = layers_of(f, model);
    json_t *v = json_pack("{s:s, s:s, s:s, s:i, s:f, s:f, s:s, s:b, s:b, s:b, s:b, s:n, s:O, s:{}, s:{}, s:O}", "peft_type", "LORA",
                          "task_type", "CAUSAL_LM", "base_model_name_or_path", model->info.name, "r", (int)f->rank, "lora_alpha",
                          (double)f->alpha, "lora_dropout", 0.0, "bias", "none", "inference_mode", 1, "use_rslora", 0, "use_dora", 0,
                          "fan_in_fan_out", 0, "modules_to_save", "layers_to_transform", layers, "rank_pattern", "alpha_pattern",
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
    json_decref(layers);
    return st;
}

static keel_status write_tensors(const struct keel_adapter_file *f, const keel_model *model, const char *folder)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    const size_t n_pairs = f->n_pairs;
    const bool vision = has_vision(f, model);
    const struct keel_pair meta = { "format", "pt" };
    struct keel_st_tensor *t = calloc(2 * n_pairs, sizeof *t);
    char(*names)[128] = calloc(2 * n_pairs, sizeof *names);
    size_t n = 0;
    if (!t || !names) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "%s: no memory for the tensor list", folder);
    }
    for (uint32_t i = 0; i < n_pairs; i++) {
        const struct keel_adapter_pair *p = &f->pair[i];
        uint32_t k, width;
        char module[96];
        keel_adapter_pair_shape(model, i, &k, &width);
        module_of(model, i, vision, module);
        for (int b = 0; b < 2 && p->rank > 0; b++, n++) {
            snprintf(names[n], sizeof names[n], "base_model.model.%s.lora_%c.weight", module, b ? 'B' : 'A');
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
    if (model->vision && f->pair[f->n_pairs - 1].rank > 0) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED,
                  "%s: PEFT has no name for an adapter of the projector (vision.proj); write a .gguf, or leave that target out", folder);
    }
    KEEL_TRY(keel_make_dirs(folder, model->log));
    KEEL_TRY(write_tensors(f, model, folder)); // the config comes last: a folder with one is complete
    KEEL_TRY(write_config(f, model, folder));
out:
    return st;
}
