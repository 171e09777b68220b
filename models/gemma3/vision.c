// SPDX-License-Identifier: MIT
// gemma3/vision.c: a vision tower as the public API sees it: opening, loading, encoding an image file through the disk cache.
// Owns the file map and the weights heap. The pass itself is vision_tower.c.
#include "vision_internal.h"

#include <keel/convert.h>

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
    char converted[4096];
    const char *file = path;
    *out = NULL;
    if (!path || !*path || strlen(path) >= sizeof v->info.path) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "the path of the vision tower (mmproj) is empty or too long");
    }
    if (keel_path_is_dir(path)) {
        KEEL_TRY(keel_convert_cached(path, NULL, true, converted, sizeof converted, log));
        file = converted;
    }
    v = calloc(1, sizeof *v);
    if (!v) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory to open the vision tower", path);
    }
    v->log = log;
    KEEL_TRY(keel_map_open(&v->map, file, log));
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

bool keel_vision_is_file(const char *path)
{
    const keel_log silent = {0};
    struct keel_map map = {0};
    keel_gguf *g = NULL;
    bool is = false;
    if (keel_map_open(&map, path, &silent) == KEEL_OK && keel_gguf_parse(&g, map.data, map.len_bytes, path, &silent) == KEEL_OK) {
        const char *arch = keel_gguf_str(g, "general.architecture", NULL);
        is = arch && strcmp(arch, "clip") == 0;
    }
    keel_gguf_destroy(&g);
    keel_map_close(&map);
    return is;
}

void keel_vision_close(keel_vision **vision)
{
    keel_vision *v = vision ? *vision : NULL;
    if (!v) {
        return;
    }
    keel_vision_unload(v);
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

keel_status keel_vision_plan(const keel_vision *vision, struct keel_plan *out)
{
    memset(out, 0, sizeof *out);
    out->row[0] = (struct keel_plan_row){"vision weights", keel_siglip_weight_bytes(vision), false};
    out->row[1] = (struct keel_plan_row){"vision activations", keel_tower_bytes(&vision->cfg), false};
    out->n_rows = 2;
    out->device_bytes = out->row[0].bytes + out->row[1].bytes;
    return KEEL_OK;
}

// --- loading -------------------------------------------------------------------------------------

keel_status keel_vision_load(keel_vision *vision, keel_device *dev)
{
    keel_status st = KEEL_OK;
    if (vision->dev && vision->dev != dev) {
        KEEL_ERROR(vision->log, "%s is loaded on another device; unload it first", vision->info.path);
        return KEEL_ERR_ARG;
    }
    if (vision->dev) {
        return KEEL_OK;
    }
    vision->dev = dev;
    KEEL_TRY(keel_heap_create(&vision->heap, dev, KEEL_HEAP_DEVICE, "vision weights"));
    KEEL_TRY(keel_heap_reserve(vision->heap, keel_siglip_weight_bytes(vision)));
    KEEL_TRY(keel_siglip_upload(vision));
    KEEL_TRY(keel_tower_create(&vision->tower, vision));
out:
    if (st != KEEL_OK) {
        keel_vision_unload(vision);
    }
    return st;
}

void keel_vision_unload(keel_vision *vision)
{
    keel_tower_destroy(&vision->tower);
    keel_heap_destroy(&vision->heap);
    free(vision->w.block);
    memset(&vision->w, 0, sizeof vision->w);
    vision->dev = NULL;
}

// --- encoding ------------------------------------------------------------------------------------

// Values of all patches in the order of the patch embedding's columns: [n_patches, 3, patch, patch]. Gathering them is a
// thousandth of the work of the tower, so it is done here rather than in a shader. Pixels beyond the last whole patch are left
// out, as by a convolution.
static void cut_patches(const struct keel_siglip *c, const struct keel_image *image, float *out)
{
    for (uint32_t i = 0; i < c->n_patches; i++) {
        for (uint32_t ch = 0; ch < 3; ch++) {
            for (uint32_t y = 0; y < c->patch; y++) {
                const size_t row = (size_t)(i / c->grid) * c->patch + y, col = (size_t)(i % c->grid) * c->patch;
                const uint8_t *p = image->rgb + (row * image->width + col) * 3 + ch;
                for (uint32_t x = 0; x < c->patch; x++) {
                    *out++ = ((float)p[3 * x] / 255.0f - c->mean[ch]) / c->std[ch];
                }
            }
        }
    }
}

static keel_status compute(keel_vision *v, keel_device *dev, const struct keel_image *image, float *tokens)
{
    keel_status st = KEEL_OK;
    const struct keel_siglip *c = &v->cfg;
    struct keel_image square = {0};
    float *patches = malloc((size_t)c->n_patches * keel_patch_cols(c) * sizeof *patches);
    if (!patches) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "no memory for the patches of an image");
    }
    KEEL_TRY(keel_vision_load(v, dev));
    KEEL_TRY(keel_image_resize(&square, image, c->image_size, c->image_size, v->log));
    cut_patches(c, &square, patches);
    KEEL_TRY(keel_tower_run(v, patches, tokens));
out:
    keel_image_finish(&square);
    free(patches);
    return st;
}

static uint64_t pixel_hash(const struct keel_image *image)
{
    const uint32_t size[2] = {image->width, image->height};
    return keel_hash(keel_hash(KEEL_HASH_INIT, size, sizeof size), image->rgb, (size_t)image->width * image->height * 3);
}

keel_status keel_vision_encode(keel_vision *vision, keel_device *dev, const char *image_path, float *tokens)
{
    keel_status st = KEEL_OK;
    struct keel_map map = {0};
    struct keel_image image = {0};
    KEEL_TRY(keel_map_open(&map, image_path, vision->log));
    KEEL_TRY(keel_image_decode(&image, map.data, map.len_bytes, image_path, vision->log));
    keel_vision_hash(vision);
    const uint64_t pixels = pixel_hash(&image);
    if (keel_vision_cache_read(vision, pixels, tokens)) {
        goto out;
    }
    if (!dev) {
        KEEL_FAIL(vision->log, KEEL_ERR_ARG, "%s: its tokens are not in the cache, and there is no device to compute them", image_path);
    }
    KEEL_TRY(compute(vision, dev, &image, tokens));
    keel_vision_cache_write(vision, pixels, tokens);
out:
    keel_image_finish(&image);
    keel_map_close(&map);
    return st;
}
