// SPDX-License-Identifier: MIT
// study/images.c: images of probe rows: their paths, and their soft tokens while rows run.
#include "platform.h"
#include "probes.h"

#include <stdlib.h>
#include <string.h>

// Enough for some hundred images of a 4B model (2.6 MB each), and little beside its weights.
#define STORE_BYTES (512u << 20)

#define PLACE(row) (row)->file, (unsigned long long)(row)->line

// --- paths ---------------------------------------------------------------------------------------

static keel_status add_file(json_t *files, const struct keel_row *row, const char *origin, const json_t *value)
{
    keel_status st = KEEL_OK;
    struct keel_text path = { 0 };
    const char *name = json_string_value(value), *slash = strrchr(origin, '/');
    if (!name || !name[0]) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: an image must be given as the path of a file", PLACE(row));
    }
    if (name[0] != '/' && slash) {
        keel_text_add(&path, origin, (size_t)(slash - origin) + 1);
    }
    keel_text_addf(&path, "%s", name);
    if (path.failed || json_array_append_new(files, json_string(path.data)) != 0) {
        KEEL_FAIL(row->log, KEEL_ERR_NO_MEMORY, "%s:%llu: out of memory", PLACE(row));
    }
out:
    keel_text_finish(&path);
    return st;
}

// The path in an image part: {"type": "image", "image": PATH} or {"type": "image_url", "image_url": {"url": PATH}}; NULL: it is in the
// row's "images".
static const json_t *part_path(const json_t *part)
{
    const json_t *url = json_object_get(json_object_get(part, "image_url"), "url");
    return url ? url : json_object_get(part, "image");
}

static keel_status add_parts(json_t *files, const struct keel_row *row, const char *origin, const json_t *messages)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < json_array_size(messages); i++) {
        const json_t *parts = json_object_get(json_array_get(messages, i), "content");
        for (size_t k = 0; k < json_array_size(parts); k++) {
            const json_t *path = part_path(json_array_get(parts, k));
            if (path) {
                KEEL_TRY(add_file(files, row, origin, path));
            }
        }
    }
out:
    return st;
}

keel_status keel_row_find_images(const struct keel_row *row, const char *origin)
{
    keel_status st = KEEL_OK;
    json_t *files = json_array(), *images = NULL;
    KEEL_TRY(keel_row_opt_array(row, "images", &images));
    KEEL_TRY(add_parts(files, row, origin, json_object_get(row->object, "messages")));
    if (json_array_size(files) > 0 && json_array_size(images) > 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: images both in \"images\" and as paths in the messages; use one of them", PLACE(row));
    }
    for (size_t i = 0; i < json_array_size(images); i++) {
        KEEL_TRY(add_file(files, row, origin, json_array_get(images, i)));
    }
    if (json_array_size(files) > 0 && json_object_set(row->object, KEEL_ROW_FILES, files) != 0) {
        KEEL_FAIL(row->log, KEEL_ERR_NO_MEMORY, "%s:%llu: out of memory", PLACE(row));
    }
out:
    json_decref(files);
    return st;
}

static keel_status copy_file(const char *from, const char *folder, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4300];
    struct keel_map map = { 0 };
    struct keel_file_out out = { 0 };
    snprintf(path, sizeof path, "%.4000s/images", folder);
    KEEL_TRY(keel_make_dirs(path, log));
    KEEL_TRY(keel_map_open(&map, from, log));
    snprintf(path, sizeof path, "%.4000s/%.200s", folder, name);
    KEEL_TRY(keel_file_create(&out, path, log));
    fwrite(map.data, 1, map.len_bytes, out.f); // a failed write shows at commit
    KEEL_TRY(keel_file_commit(&out, log));
out:
    keel_file_abort(&out);
    keel_map_close(&map);
    return st;
}

keel_status keel_row_keep_images(json_t *row, size_t number, const char *folder, const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_t *files = json_object_get(row, KEEL_ROW_FILES), *names = json_array();
    for (size_t i = 0; i < json_array_size(files); i++) {
        char name[200];
        const char *path = json_string_value(json_array_get(files, i)), *slash = strrchr(path, '/');
        snprintf(name, sizeof name, "images/%zu-%zu-%.120s", number, i, slash ? slash + 1 : path);
        json_array_append_new(names, json_string(name));
        if (folder) {
            KEEL_TRY(copy_file(path, folder, name, log));
        }
    }
    if (json_array_size(names) > 0) {
        json_object_set(row, "images", names);
    }
out:
    json_decref(names);
    return st;
}

// --- soft tokens ---------------------------------------------------------------------------------

void keel_image_store_finish(struct keel_image_store *store)
{
    for (size_t i = 0; i < store->n; i++) {
        free(store->embeds[i]);
    }
    free(store->embeds);
    json_decref(store->index);
    *store = (struct keel_image_store){ 0 };
}

bool keel_image_store_full(const struct keel_image_store *store)
{
    return store->bytes >= STORE_BYTES;
}

static keel_status add_image(struct keel_image_store *store, const struct keel_measure *m, const char *path)
{
    keel_status st = KEEL_OK;
    const struct keel_vision_info *info = keel_vision_info(m->vision);
    const size_t bytes = (size_t)info->n_tokens * info->out_width * sizeof(float);
    float *embeds = malloc(bytes);
    if (store->n == store->cap) {
        const size_t cap = KEEL_MAX(2 * store->cap, (size_t)64);
        float **grown = realloc(store->embeds, cap * sizeof *grown);
        store->embeds = grown ? grown : store->embeds;
        store->cap = grown ? cap : store->cap;
    }
    if (!embeds || store->n == store->cap) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory for the tokens of an image", path);
    }
    KEEL_TRY(keel_vision_encode(m->vision, keel_model_device(m->model), path, embeds));
    if (json_object_set_new(store->index, path, json_integer((json_int_t)store->n)) != 0) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory for the tokens of an image", path);
    }
    store->embeds[store->n++] = embeds;
    store->bytes += bytes;
    embeds = NULL;
out:
    free(embeds);
    return st;
}

keel_status keel_image_store_fill(struct keel_image_store *store, const struct keel_measure *m, struct keel_prompt *prompt, const json_t *files)
{
    keel_status st = KEEL_OK;
    if (prompt->n_images > 0 && !store->index) {
        store->index = json_object();
    }
    for (uint32_t i = 0; i < prompt->n_images; i++) {
        const char *path = json_string_value(json_array_get(files, i));
        if (!json_object_get(store->index, path)) {
            KEEL_TRY(add_image(store, m, path));
        }
        prompt->images[i].embeds = store->embeds[json_integer_value(json_object_get(store->index, path))];
    }
out:
    return st;
}
