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
    KEEL_TRY(keel_vision_cache_open(v));
    KEEL_TRY(keel_map_open(&v->map, file, log));
    KEEL_TRY(keel_gguf_parse(&v->gguf, v->map.data, v->map.len_bytes, file, log));
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
    keel_vision_clear_adapters(v);
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

static keel_status check_limits(const keel_vision *v, const keel_device *dev)
{
    const struct keel_siglip *c = &v->cfg;
    const uint64_t range = keel_device_caps(dev)->max_range;
    const uint64_t widest = KEEL_MAX(c->width, keel_patch_cols(c));
    if (4ull * c->n_patches * widest > range || 4ull * KEEL_ATTENTION_GROUP * c->n_heads * c->n_patches > range) {
        KEEL_ERROR(v->log, "%s: %u patches of an image do not fit this device's bindings of %.0f MB", v->info.path, c->n_patches,
                   (double)range / 1e6);
        return KEEL_ERR_UNSUPPORTED;
    }
    return KEEL_OK;
}

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
    KEEL_TRY(check_limits(vision, dev));
    KEEL_TRY(keel_heap_create(&vision->heap, dev, KEEL_HEAP_DEVICE, "vision weights"));
    KEEL_TRY(keel_heap_reserve(vision->heap, keel_siglip_weight_bytes(vision)));
    KEEL_TRY(keel_siglip_upload(vision));
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

// --- views of an image ---------------------------------------------------------------------------

keel_status keel_vision_pan_and_scan(keel_vision *vision, const struct keel_pan_and_scan *p)
{
    if (p && (p->min_crop == 0 || p->max_crops == 0 || p->max_crops > KEEL_MAX_CROPS || !(p->min_ratio >= 1))) {
        KEEL_ERROR(vision->log, "pan and scan: crops of at least 1 pixel, 1 to %d of them, from a ratio of at least 1", KEEL_MAX_CROPS);
        return KEEL_ERR_ARG;
    }
    vision->crops = p ? *p : (struct keel_pan_and_scan){0};
    return KEEL_OK;
}

// Source: transformers' Gemma3ImageProcessor.pan_and_scan; the same divisions in double, so that no ratio falls elsewhere.
uint32_t keel_crops(const struct keel_pan_and_scan *p, uint32_t width, uint32_t height, struct keel_box *box)
{
    const uint32_t longer = KEEL_MAX(width, height), shorter = KEEL_MIN(width, height);
    const double ratio = (double)longer / shorter;
    if (p->max_crops == 0 || ratio < p->min_ratio) {
        return 0;
    }
    uint32_t n = (uint32_t)KEEL_MIN(floor(ratio + 0.5), (double)(longer / p->min_crop));
    n = KEEL_MIN(KEEL_MAX(n, 2u), p->max_crops);
    const uint32_t step = keel_div_up(longer, n);
    if (KEEL_MIN(step, shorter) < p->min_crop) {
        return 0;
    }
    n = keel_div_up(longer, step); // fewer only where crops are a few pixels wide
    for (uint32_t i = 0; i < n; i++) { // the last is what is left of the image
        const uint32_t at = i * step, len = KEEL_MIN(step, longer - at);
        box[i] = width >= height ? (struct keel_box){at, 0, len, height} : (struct keel_box){0, at, width, len};
    }
    return n;
}

keel_status keel_vision_views(const keel_vision *vision, const char *image_path, uint32_t *n_views)
{
    keel_status st = KEEL_OK;
    struct keel_map map = {0};
    struct keel_box box[KEEL_MAX_CROPS];
    uint32_t width, height;
    *n_views = 1;
    if (vision->crops.max_crops == 0) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_map_open(&map, image_path, vision->log));
    KEEL_TRY(keel_image_size(&width, &height, map.data, map.len_bytes, image_path, vision->log));
    *n_views += keel_crops(&vision->crops, width, height, box);
out:
    keel_map_close(&map);
    return st;
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

static keel_status crop(const keel_vision *v, const char *path, uint32_t view, struct keel_image *image)
{
    keel_status st = KEEL_OK;
    struct keel_box box[KEEL_MAX_CROPS];
    struct keel_image whole = *image;
    const uint32_t n = keel_crops(&v->crops, image->width, image->height, box);
    if (view > n) {
        KEEL_FAIL(v->log, KEEL_ERR_DATA, "%s: the image of %u × %u pixels has %u crops, not %u; did the file change?", path,
                  image->width, image->height, n, view);
    }
    KEEL_TRY(keel_image_crop(image, &whole, box[view - 1], v->log));
    keel_image_finish(&whole);
out:
    return st;
}

static keel_status read_view(const keel_vision *v, const char *path, uint32_t view, struct keel_image *image)
{
    keel_status st = KEEL_OK;
    struct keel_map map = {0};
    memset(image, 0, sizeof *image);
    KEEL_TRY(keel_map_open(&map, path, v->log));
    KEEL_TRY(keel_image_decode(image, map.data, map.len_bytes, path, v->log));
    if (view > 0) {
        KEEL_TRY(crop(v, path, view, image));
    }
out:
    keel_map_close(&map);
    return st;
}

static keel_status patches_of(const keel_vision *v, const struct keel_image *image, float **patches)
{
    keel_status st = KEEL_OK;
    const struct keel_siglip *c = &v->cfg;
    struct keel_image square = {0};
    float *out = malloc((size_t)c->n_patches * keel_patch_cols(c) * sizeof *out);
    *patches = NULL;
    if (!out) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "no memory for the patches of an image");
    }
    KEEL_TRY(keel_image_resize(&square, image, c->image_size, c->image_size, v->log));
    cut_patches(c, &square, out);
    *patches = out;
    out = NULL;
out:
    keel_image_finish(&square);
    free(out);
    return st;
}

keel_status keel_vision_patches(const keel_vision *vision, const char *image_path, uint32_t view, float **patches)
{
    keel_status st = KEEL_OK;
    struct keel_image image = {0};
    *patches = NULL;
    KEEL_TRY(read_view(vision, image_path, view, &image));
    KEEL_TRY(patches_of(vision, &image, patches));
out:
    keel_image_finish(&image);
    return st;
}

keel_status keel_vision_run(keel_vision *v, keel_device *dev, const float *patches, float *tokens)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_vision_load(v, dev));
    if (!v->tower) {
        KEEL_TRY(keel_tower_create(&v->tower, v));
    }
    KEEL_TRY(keel_tower_run(v, patches, tokens));
out:
    return st;
}

static keel_status compute(keel_vision *v, keel_device *dev, const struct keel_image *image, float *tokens)
{
    keel_status st = KEEL_OK;
    float *patches = NULL;
    KEEL_TRY(patches_of(v, image, &patches));
    KEEL_TRY(keel_vision_run(v, dev, patches, tokens));
out:
    free(patches);
    return st;
}

static uint64_t pixel_hash(const struct keel_image *image)
{
    const uint32_t size[2] = {image->width, image->height};
    return keel_hash(keel_hash(KEEL_HASH_INIT, size, sizeof size), image->rgb, (size_t)image->width * image->height * 3);
}

keel_status keel_vision_encode(keel_vision *vision, keel_device *dev, const char *image_path, uint32_t view, float *tokens)
{
    keel_status st = KEEL_OK;
    struct keel_image image = {0};
    KEEL_TRY(read_view(vision, image_path, view, &image));
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
    return st;
}

keel_status keel_vision_capture(keel_vision *vision, keel_device *dev, struct keel_view view, uint32_t row, uint32_t first)
{
    keel_status st = KEEL_OK;
    struct keel_image image = {0};
    float *unused = malloc((size_t)vision->cfg.n_tokens * vision->cfg.out_width * sizeof *unused);
    if (!unused) {
        KEEL_FAIL(vision->log, KEEL_ERR_NO_MEMORY, "%s: no memory for its soft tokens", view.path);
    }
    KEEL_TRY(read_view(vision, view.path, view.index, &image));
    vision->capture_row = row;
    vision->capture_first = first;
    KEEL_TRY(compute(vision, dev, &image, unused));
out:
    keel_image_finish(&image);
    free(unused);
    return st;
}

uint32_t keel_vision_patch_count(const keel_vision *vision)
{
    return vision->cfg.n_patches;
}

// --- adapters ------------------------------------------------------------------------------------

void keel_model_use_vision(keel_model *model, keel_vision *vision)
{
    KEEL_ASSERT(!vision || vision->cfg.out_width == model->cfg.width);
    model->vision = vision;
}

uint32_t keel_vision_rank(const struct keel_tower_pass *p)
{
    uint32_t rank = 0;
    for (uint32_t i = 0; i < p->n_adapters; i++) {
        const keel_adapter *a = p->adapters[i];
        for (uint32_t k = 0; a->vision && a->vision + k < a->pair + a->n_pairs; k++) {
            rank = KEEL_MAX(rank, a->vision[k].rank);
        }
    }
    return rank;
}

static bool has_vision_pairs(const keel_adapter *a)
{
    const struct keel_tower_pass p = {.adapters = &a, .n_adapters = 1};
    return keel_vision_rank(&p) > 0;
}

static keel_status hash_adapter(const keel_vision *v, keel_device *dev, const keel_adapter *a, uint64_t *out)
{
    keel_status st = KEEL_OK;
    const size_t bytes = a->n_floats * sizeof(float);
    float *host = malloc(bytes);
    if (!host) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "no memory to hash an adapter of %.1f MB", (double)bytes / 1e6);
    }
    KEEL_TRY(keel_download(dev, host, a->params, bytes));
    *out = keel_hash(KEEL_HASH_INIT, host, bytes);
    for (uint32_t k = 0; k < a->n_pairs; k++) {
        *out = keel_hash(*out, &a->pair[k].rank, sizeof a->pair[k].rank);
        *out = keel_hash(*out, &a->pair[k].scale, sizeof a->pair[k].scale);
    }
out:
    free(host);
    return st;
}

keel_status keel_vision_use_adapter(keel_vision *v, keel_device *dev, const keel_adapter *adapter)
{
    keel_status st = KEEL_OK;
    keel_vision_drop_adapter(v, adapter);
    if (!has_vision_pairs(adapter)) {
        return KEEL_OK;
    }
    if (v->n_adapters == KEEL_COUNT(v->adapters)) {
        KEEL_FAIL(v->log, KEEL_ERR_ARG, "%s: more than %zu adapters of a vision tower", v->info.path, KEEL_COUNT(v->adapters));
    }
    KEEL_TRY(hash_adapter(v, dev, adapter, &v->adapter_hash[v->n_adapters]));
    v->adapters[v->n_adapters++] = adapter;
out:
    return st;
}

void keel_vision_drop_adapter(keel_vision *v, const keel_adapter *adapter)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < v->n_adapters; i++) {
        if (v->adapters[i] != adapter) {
            v->adapters[n] = v->adapters[i];
            v->adapter_hash[n++] = v->adapter_hash[i];
        }
    }
    v->n_adapters = n;
}

bool keel_vision_clear_adapters(keel_vision *v)
{
    const bool any = v->n_owned > 0;
    for (uint32_t i = 0; i < v->n_owned; i++) {
        keel_vision_drop_adapter(v, v->owned[i]);
        keel_adapter_destroy(&v->owned[i]);
    }
    v->n_owned = 0;
    return any;
}

keel_status keel_vision_add_adapter(keel_vision *v, keel_model *model, keel_device *dev, const char *path, float scale, bool *changed)
{
    keel_status st = KEEL_OK;
    keel_adapter *a = NULL;
    struct keel_vision *before = model->vision;
    *changed = false;
    keel_model_use_vision(model, v); // so that the file's tensors of the tower are checked and kept
    KEEL_TRY(keel_adapter_load_vision(&a, model, dev, path, scale));
    if (!has_vision_pairs(a)) {
        goto out;
    }
    KEEL_TRY(keel_vision_use_adapter(v, dev, a));
    v->owned[v->n_owned++] = a;
    a = NULL;
    *changed = true;
out:
    keel_adapter_destroy(&a);
    model->vision = before;
    return st;
}
