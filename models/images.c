// SPDX-License-Identifier: MIT
// models/images.c: the images of a run: each file once, its soft tokens in host memory, filled in by the vision tower.
// Owns the tower. Addresses of tokens never change, so that rows can point at them before they are known.
#include "models.h"
#include "formats.h"
#include "platform.h"

#include <keel/vision.h>

#include <stdlib.h>
#include <string.h>

struct image {
    char *path;
    uint64_t hash;  // of the path
    uint64_t content; // hash of the file's bytes, once it was encoded
    uint32_t n_views;
    float *embeds;  // [n_views, n_tokens, width]
    bool done, failed;
    bool looked_at; // for which way up it is
};

struct keel_images {
    const keel_log *log;
    keel_vision *vision;
    uint32_t n_tokens, width;
    struct keel_pan_and_scan crops; // all zero: none
    struct image *at;
    size_t n, cap;
};

keel_status keel_images_create(keel_images **out, const keel_model *model, const char *mmproj, const keel_log *log)
{
    keel_status st = KEEL_OK;
    keel_images *s = calloc(1, sizeof *s);
    *out = NULL;
    if (!s) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for images");
    }
    s->log = log;
    KEEL_TRY(keel_vision_open(&s->vision, mmproj, model, log));
    s->n_tokens = keel_vision_info(s->vision)->n_tokens;
    s->width = keel_vision_info(s->vision)->out_width;
    *out = s;
    s = NULL;
out:
    keel_images_destroy(&s);
    return st;
}

void keel_images_destroy(keel_images **images)
{
    keel_images *s = images ? *images : NULL;
    if (!s) {
        return;
    }
    for (size_t i = 0; i < s->n; i++) {
        free(s->at[i].path);
        free(s->at[i].embeds);
    }
    free(s->at);
    keel_vision_close(&s->vision);
    free(s);
    *images = NULL;
}

uint32_t keel_images_tokens(const keel_images *images)
{
    return images->n_tokens;
}

uint32_t keel_images_layers(const keel_images *images)
{
    return keel_vision_info(images->vision)->n_layers;
}

keel_status keel_images_pan_and_scan(keel_images *s, const struct keel_pan_and_scan *params)
{
    KEEL_ASSERT(s->n == 0);
    const keel_status st = keel_vision_pan_and_scan(s->vision, params);
    if (st == KEEL_OK) {
        s->crops = params ? *params : (struct keel_pan_and_scan){ 0 };
    }
    return st;
}

// Floats of one view.
static size_t view_floats(const keel_images *s)
{
    return (size_t)s->n_tokens * s->width;
}

// Of an image that was added before.
static struct image *find(keel_images *s, const char *path, uint64_t hash)
{
    for (size_t i = 0; i < s->n; i++) {
        if (s->at[i].hash == hash && strcmp(s->at[i].path, path) == 0) {
            return &s->at[i];
        }
    }
    return NULL;
}

keel_status keel_images_add(keel_images *s, const char *path, const float **embeds, uint32_t *n_views)
{
    keel_status st = KEEL_OK;
    const uint64_t hash = keel_hash(KEEL_HASH_INIT, path, strlen(path));
    struct image im = { .path = NULL, .hash = hash };
    struct image *known = find(s, path, hash);
    *embeds = NULL;
    if (known) {
        known->failed = false;
        goto found;
    }
    KEEL_TRY(keel_vision_views(s->vision, path, &im.n_views));
    if (s->n == s->cap) {
        const size_t cap = s->cap ? s->cap * 2 : 16;
        struct image *at = realloc(s->at, cap * sizeof *at);
        if (!at) {
            KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for %zu images", cap);
        }
        s->at = at;
        s->cap = cap;
    }
    im.path = strdup(path);
    im.embeds = malloc(im.n_views * view_floats(s) * sizeof *im.embeds);
    if (!im.path || !im.embeds) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "%s: no memory for the soft tokens of %zu images", path, s->n + 1);
    }
    s->at[s->n] = im;
    known = &s->at[s->n++];
    im = (struct image){ 0 };
found:
    *embeds = known->embeds;
    if (n_views) {
        *n_views = known->n_views;
    }
out:
    free(im.path);
    free(im.embeds);
    return st;
}

// A photograph that its camera marked as lying on its side is seen so by the model: worth a line, once an image.
static void note_orientation(const keel_images *s, struct image *im, const struct keel_map *map)
{
    const uint32_t turned = im->looked_at ? 1 : keel_image_orientation(map->data, map->len_bytes);
    if (turned > 1) {
        KEEL_INFO(s->log, "%s: EXIF says that the image is %s (orientation %u), which is ignored, as by transformers' processor; turn "
                          "the pixels upright if the model should see it so", im->path, turned == 2 ? "mirrored" : "turned", turned);
    }
    im->looked_at = true;
}

static keel_status encode(keel_images *s, keel_device *dev, struct image *im)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    for (uint32_t v = 0; v < im->n_views; v++) {
        KEEL_TRY(keel_vision_encode(s->vision, dev, im->path, v, im->embeds + v * view_floats(s)));
    }
    KEEL_TRY(keel_map_open(&map, im->path, s->log));
    im->content = keel_hash(KEEL_HASH_INIT, map.data, map.len_bytes);
    note_orientation(s, im, &map);
out:
    keel_map_close(&map);
    return st;
}

keel_status keel_images_encode(keel_images *s, keel_device *dev, bool (*progress)(void *user, uint64_t done, uint64_t total),
                               void *user)
{
    keel_status st = KEEL_OK;
    uint64_t total = 0, done = 0;
    for (size_t i = 0; i < s->n; i++) {
        total += !s->at[i].done && !s->at[i].failed;
    }
    for (size_t i = 0; i < s->n; i++) {
        if (s->at[i].done || s->at[i].failed) {
            continue;
        }
        st = encode(s, dev, &s->at[i]);
        s->at[i].done = st == KEEL_OK;
        s->at[i].failed = st != KEEL_OK;
        KEEL_TRY(st);
        done++;
        if ((progress && !progress(user, done, total)) || keel_interrupted()) {
            st = KEEL_INTERRUPTED;
            goto out;
        }
    }
out:
    keel_vision_unload(s->vision);
    return st;
}

uint64_t keel_images_hash(keel_images *s)
{
    const uint64_t tower = keel_vision_hash(s->vision);
    uint64_t hash = keel_hash(KEEL_HASH_INIT, &tower, sizeof tower);
    if (s->crops.max_crops > 0) { // field by field: what lies between fields is not defined
        hash = keel_hash(hash, &s->crops.min_crop, sizeof s->crops.min_crop);
        hash = keel_hash(hash, &s->crops.max_crops, sizeof s->crops.max_crops);
        hash = keel_hash(hash, &s->crops.min_ratio, sizeof s->crops.min_ratio);
    }
    for (size_t i = 0; i < s->n; i++) {
        if (s->at[i].done) {
            hash = keel_hash(hash, &s->at[i].content, sizeof s->at[i].content);
        }
    }
    return hash;
}

// --- for training and adapters -------------------------------------------------------------------

keel_vision *keel_images_vision(keel_images *images)
{
    return images->vision;
}

// The image and view whose soft tokens are at `embeds`; NULL: none.
static struct image *view_at(keel_images *s, const float *embeds, struct keel_view *view)
{
    for (size_t i = 0; i < s->n; i++) {
        for (uint32_t v = 0; v < s->at[i].n_views; v++) {
            if (s->at[i].embeds + v * view_floats(s) == embeds) {
                *view = (struct keel_view){ s->at[i].path, v };
                return &s->at[i];
            }
        }
    }
    return NULL;
}

keel_status keel_images_capture(keel_images *s, keel_device *dev, const float *embeds, uint32_t row, uint32_t first)
{
    struct keel_view view = { 0 };
    const struct image *im = view_at(s, embeds, &view);
    KEEL_ASSERT(im); // rows get their images from here
    return keel_vision_capture(s->vision, dev, view, row, first);
}

struct keel_view keel_images_retake(keel_images *s, const float *embeds)
{
    struct keel_view view = { 0 };
    struct image *im = view_at(s, embeds, &view);
    if (im) {
        im->done = false;
    }
    return view;
}

void keel_images_due(keel_images *s)
{
    for (size_t i = 0; i < s->n; i++) {
        s->at[i].done = false;
    }
}

keel_status keel_images_add_adapter(keel_images *s, keel_model *model, keel_device *dev, const char *path, float scale)
{
    bool changed = false;
    const keel_status st = keel_vision_add_adapter(s->vision, model, dev, path, scale, &changed);
    if (changed) {
        keel_images_due(s);
    }
    return st;
}

void keel_images_clear_adapters(keel_images *s)
{
    if (keel_vision_clear_adapters(s->vision)) {
        keel_images_due(s);
    }
}
