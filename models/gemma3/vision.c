// SPDX-License-Identifier: MIT
// gemma3/vision.c: a vision tower as the public API sees it: opening, loading, encoding an image file through the disk cache.
// Owns the file map and the weights heap. The pass itself is vision_tower.c.
#include "vision_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// --- opening -------------------------------------------------------------------------------------

static void fill_info(keel_vision *v, const char *path)
{
    struct keel_vision_info *i = &v->info;
    const struct keel_siglip *c = &v->cfg;
    snprintf(i->path, sizeof i->path, "%s", path);
    i->image_size = c->image_size;
    i->patch = c->patch;
    i->width = c->width;
    i->ff_width = c->ff_width;
    i->n_layers = c->n_layers;
    i->n_heads = c->n_heads;
    i->n_tokens = c->n_tokens;
    i->out_width = c->out_width;
    i->eps = c->eps;
    i->file_bytes = v->map.len_bytes;
    for (size_t t = 0; t < keel_gguf_tensor_count(v->gguf); t++) {
        i->n_params += keel_gguf_tensor_at(v->gguf, t)->n_elems;
    }
}

keel_status keel_vision_open(keel_vision **out, const char *path, const keel_model *model, const keel_log *log)
{
    keel_status st = KEEL_OK;
    keel_vision *v = NULL;
    *out = NULL;
    if (!path || !*path || strlen(path) >= sizeof v->info.path) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "the path of the vision tower (mmproj) is empty or too long");
    }
    v = calloc(1, sizeof *v);
    if (!v) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory to open the vision tower", path);
    }
    v->log = log;
    KEEL_TRY(keel_map_open(&v->map, path, log));
    KEEL_TRY(keel_gguf_parse(&v->gguf, v->map.data, v->map.len_bytes, path, log));
    KEEL_TRY(keel_siglip_read(&v->cfg, &v->src, v->gguf, log));
    if (model && v->cfg.out_width != model->cfg.width) {
        KEEL_FAIL(log, KEEL_ERR_MISMATCH,
                  "%s: makes tokens of width %u, but %s is %u wide; take the mmproj file that belongs to the model", path,
                  v->cfg.out_width, model->info.path, model->cfg.width);
    }
    fill_info(v, path);
    *out = v;
    v = NULL;
out:
    keel_vision_close(&v);
    return st;
}

void keel_vision_close(keel_vision **vision)
{
    keel_vision *v = vision ? *vision : NULL;
    if (!v) {
        return;
    }
    keel_siglip_finish(&v->src);
    keel_gguf_destroy(&v->gguf);
    keel_map_close(&v->map);
    free(v);
    *vision = NULL;
}

const struct keel_vision_info *keel_vision_info(const keel_vision *vision)
{
    return &vision->info;
}

uint64_t keel_vision_hash(keel_vision *vision)
{
    if (vision->info.hash == 0) {
        vision->info.hash = keel_hash(KEEL_HASH_INIT, vision->map.data, vision->map.len_bytes);
        keel_map_done_with(&vision->map, 0, vision->map.len_bytes);
    }
    return vision->info.hash;
}
