// SPDX-License-Identifier: MIT
// gemma3/convert.c: conversion as the public API sees it: from a folder or a GGUF, into a GGUF, directly or through the cache.
#include "convert.h"
#include "gemma3.h"
#include "vision_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// --- sources -------------------------------------------------------------------------------------

struct source {
    struct keel_hf_folder folder;
    struct keel_map map; // of a GGUF
    keel_gguf *gguf;
    struct keel_pack pack;
};

static void source_close(struct source *s)
{
    keel_pack_finish(&s->pack);
    keel_hf_close(&s->folder);
    keel_gguf_destroy(&s->gguf);
    keel_map_close(&s->map);
}

static keel_status check_gguf(const struct source *s, const char *from, bool vision, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_gemma3 cfg;
    struct keel_gemma3_source src;
    struct keel_siglip tower;
    struct keel_siglip_source tower_src;
    const char *arch = keel_gguf_str(s->gguf, "general.architecture", NULL);
    const char *want = vision ? "clip" : "gemma3";
    if (!arch || strcmp(arch, want) != 0) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: architecture \"%s\"; keel converts Gemma 3 models (\"gemma3\") and their vision "
                                             "towers (\"clip\", with --mmproj-out)", from, arch ? arch : "");
    }
    if (vision) {
        KEEL_TRY(keel_siglip_read(&tower, &tower_src, s->gguf, log));
        keel_siglip_finish(&tower_src);
    } else {
        KEEL_TRY(keel_gemma3_read(&cfg, &src, s->gguf, log));
        keel_gemma3_finish(&cfg, &src);
    }
out:
    return st;
}

static keel_status open_gguf(struct source *s, const char *from, bool vision, keel_gguf_writer *w, const keel_log *log)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_map_open(&s->map, from, log));
    KEEL_TRY(keel_gguf_parse(&s->gguf, s->map.data, s->map.len_bytes, from, log));
    KEEL_TRY(check_gguf(s, from, vision, log));
    KEEL_TRY(keel_pack_gguf(&s->pack, w, s->gguf, &s->map, log));
out:
    return st;
}

static keel_status open_folder(struct source *s, const char *from, bool vision, keel_gguf_writer *w, const keel_log *log)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_hf_open(&s->folder, from, log));
    KEEL_TRY(vision ? keel_hf_vision_tensors(&s->folder, &s->pack, log) : keel_hf_text_tensors(&s->folder, &s->pack, log));
    KEEL_TRY(vision ? keel_hf_put_vision(&s->folder, w, log) : keel_hf_put_text(&s->folder, w, log));
out:
    return st;
}

// --- conversion ----------------------------------------------------------------------------------

static keel_status convert(const char *from, const char *to, bool vision, const struct keel_convert_params *params,
                           const keel_log *log)
{
    static const struct keel_convert_params none = {0};
    keel_status st = KEEL_OK;
    struct source s = {0};
    struct keel_file_out out = {0};
    keel_gguf_writer *w = NULL;
    const struct keel_recipe *recipe;
    params = params ? params : &none;
    KEEL_TRY(keel_recipe_of(&recipe, params->type, log));
    if (strcmp(from, to) == 0) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: is both what is read and what is to be written; give the result another name", from);
    }
    KEEL_TRY(keel_gguf_writer_create(&w, log));
    KEEL_TRY(keel_path_is_dir(from) ? open_folder(&s, from, vision, w, log) : open_gguf(&s, from, vision, w, log));
    if (vision) {
        keel_recipe_apply_vision(recipe, &s.pack);
    } else {
        keel_recipe_apply(recipe, &s.pack, log);
    }
    keel_gguf_put_u32(w, "general.file_type", keel_recipe_file_type(recipe, &s.pack));
    KEEL_TRY(keel_file_create(&out, to, log));
    KEEL_TRY(keel_pack_write(&s.pack, w, out.f, params, from, log));
    KEEL_TRY(keel_file_commit(&out, log));
out:
    keel_file_abort(&out);
    keel_gguf_writer_destroy(&w);
    source_close(&s);
    return st;
}

keel_status keel_convert(const char *from, const char *to, const struct keel_convert_params *params, const keel_log *log)
{
    return convert(from, to, false, params, log);
}

keel_status keel_convert_vision(const char *from, const char *to, const struct keel_convert_params *params, const keel_log *log)
{
    return convert(from, to, true, params, log);
}

// --- cache ---------------------------------------------------------------------------------------

struct stamp {
    const char *folder;
    uint64_t hash;
};

static keel_status add_stamp(void *user, const char *name, const char *tensor)
{
    struct stamp *s = user;
    char path[4096];
    uint64_t info[2] = {0};
    (void)tensor;
    if (keel_hf_path(path, sizeof path, s->folder, name)) {
        keel_path_stamp(path, &info[0], &info[1]); // zeros for a file that is not there
    }
    s->hash = keel_hash(s->hash, name, strlen(name) + 1);
    s->hash = keel_hash(s->hash, info, sizeof info);
    return KEEL_OK;
}

// All that a conversion reads, by name, size and time of change.
static keel_status folder_hash(const char *folder, const char *type, bool vision, uint64_t *hash, const keel_log *log)
{
    static const char *const files[] = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                        "chat_template.jinja", "processor_config.json", "preprocessor_config.json",
                                        "model.safetensors.index.json"};
    static const char layout[] = "keel-convert-2"; // changes when conversion does
    struct stamp s = {folder, keel_hash(KEEL_HASH_INIT, layout, sizeof layout)};
    s.hash = keel_hash(s.hash, folder, strlen(folder));
    s.hash = keel_hash(s.hash, type ? type : "", type ? strlen(type) : 0);
    s.hash = keel_hash(s.hash, vision ? "v" : "t", 1);
    for (size_t i = 0; i < KEEL_COUNT(files); i++) {
        add_stamp(&s, files[i], NULL);
    }
    const keel_status st = keel_hf_each_shard(folder, add_stamp, &s, log);
    *hash = s.hash;
    return st;
}

// Whether what is in the cache has all its tensors: a disk that was full or a copy cut short is no reason to blame the folder.
static bool is_whole(const char *path)
{
    const keel_log silent = {0};
    struct keel_map map = {0};
    keel_gguf *g = NULL;
    const bool whole = keel_map_open(&map, path, &silent) == KEEL_OK && keel_gguf_parse(&g, map.data, map.len_bytes, path, &silent) == KEEL_OK;
    keel_gguf_destroy(&g);
    keel_map_close(&map);
    return whole;
}

keel_status keel_convert_cached(const char *folder, const char *type, bool vision, char *path, size_t path_bytes,
                                const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct keel_convert_params params = {.type = type};
    const struct keel_recipe *recipe;
    char cache[4096], dir[4096], config[4096];
    uint64_t hash;
    KEEL_TRY(keel_recipe_of(&recipe, type, log));
    if (!keel_hf_path(config, sizeof config, folder, "config.json") || !keel_path_exists(config)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: is a folder without config.json, so no Hugging Face model; give a GGUF file or such a folder",
                  folder);
    }
    KEEL_TRY(folder_hash(folder, recipe ? recipe->name : NULL, vision, &hash, log));
    if (!keel_cache_dir(cache, sizeof cache) || !keel_hf_path(dir, sizeof dir, cache, "models")) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: there is no cache folder to put the converted model in; set XDG_CACHE_HOME, or convert it "
                                    "once with keel convert", folder);
    }
    KEEL_TRY(keel_make_dirs(dir, log));
    const int n = snprintf(path, path_bytes, "%s/%016" PRIx64 ".gguf", dir, hash);
    if (n < 0 || (size_t)n >= path_bytes) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: the path of the cache folder is too long", dir);
    }
    if (!is_whole(path)) {
        KEEL_INFO(log, "%s: converting %s into %s", folder, keel_path_exists(path) ? "again, the copy is damaged," : "once", path);
        KEEL_TRY(convert(folder, path, vision, &params, log));
    }
out:
    return st;
}
