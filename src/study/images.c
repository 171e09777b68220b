// SPDX-License-Identifier: MIT
// study/images.c: what a probe row asks, apart from its answers: prompt or conversation with the files of its images. Kept beside the
// row, so that rows of several files can be joined into one conversation.
#include "platform.h"
#include "probes.h"

#include <string.h>

#define PLACE(row) (row)->file, (unsigned long long)(row)->line

// A row on its way to what it asks.
struct parse {
    const struct keel_row *row;
    const char *origin;   // file whose folder relative paths start at
    const json_t *images; // of the row, or NULL
    size_t n_taken;
    json_t *files;        // in the order of their places
};

static keel_status add_file(struct parse *p, const json_t *value)
{
    keel_status st = KEEL_OK;
    struct keel_text path = { 0 };
    const char *name = json_string_value(value), *slash = strrchr(p->origin, '/');
    if (!name || !name[0]) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%s:%llu: an image must be the path of a file", PLACE(p->row));
    }
    if (name[0] != '/' && slash) {
        keel_text_add(&path, p->origin, (size_t)(slash - p->origin) + 1);
    }
    keel_text_addf(&path, "%s", name);
    if (path.failed || json_array_append_new(p->files, json_string(path.data)) != 0) {
        KEEL_FAIL(p->row->log, KEEL_ERR_NO_MEMORY, "%s:%llu: out of memory", PLACE(p->row));
    }
out:
    keel_text_finish(&path);
    return st;
}

// The next of "images"; whether places and images are as many is checked where prompts are made.
static keel_status take(struct parse *p)
{
    return p->n_taken < json_array_size(p->images) ? add_file(p, json_array_get(p->images, p->n_taken++)) : KEEL_OK;
}

static keel_status take_placeholders(struct parse *p, const char *text)
{
    keel_status st = KEEL_OK;
    for (const char *at = text; st == KEEL_OK && at && (at = strstr(at, "<image>")); at++) {
        st = take(p);
    }
    return st;
}

// Takes the files of a list of parts; *bare is the list without their paths.
static keel_status take_parts(struct parse *p, const json_t *parts, json_t **bare)
{
    keel_status st = KEEL_OK;
    *bare = json_array();
    for (size_t i = 0; i < json_array_size(parts); i++) {
        json_t *part = json_array_get(parts, i);
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!type || strncmp(type, "image", 5) != 0) {
            json_array_append(*bare, part);
            continue;
        }
        const json_t *path = json_object_get(part, type), *url = json_object_get(path, "url");
        json_array_append_new(*bare, json_pack("{s:s}", "type", "image"));
        KEEL_TRY(path && !json_is_null(path) ? add_file(p, url ? url : path) : take(p));
    }
out:
    return st;
}

static keel_status take_messages(struct parse *p, const json_t *messages, json_t *out)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < json_array_size(messages); i++) {
        json_t *message = json_array_get(messages, i);
        const json_t *content = json_object_get(message, "content");
        if (json_is_array(content)) {
            json_t *bare = NULL, *copy = json_copy(message);
            st = take_parts(p, content, &bare);
            json_object_set_new(copy, "content", bare);
            json_array_append_new(out, copy);
        } else {
            json_array_append(out, message);
            st = take_placeholders(p, json_string_value(content));
        }
        KEEL_TRY(st);
    }
out:
    return st;
}

keel_status keel_row_ask(const struct keel_row *row, const char *origin)
{
    keel_status st = KEEL_OK;
    json_t *images = NULL, *messages = NULL, *ask = json_object();
    struct parse p = { .row = row, .origin = origin, .files = json_array() };
    KEEL_TRY(keel_row_opt_array(row, "images", &images));
    KEEL_TRY(keel_row_opt_array(row, "messages", &messages));
    p.images = images;
    if (messages) {
        json_t *list = json_array();
        json_object_set_new(ask, "messages", list);
        KEEL_TRY(take_messages(&p, messages, list));
    } else {
        json_object_set(ask, "prompt", json_object_get(row->object, "prompt"));
        KEEL_TRY(take_placeholders(&p, json_string_value(json_object_get(row->object, "prompt"))));
    }
    while (p.n_taken < json_array_size(images)) {
        KEEL_TRY(take(&p));
    }
    if (json_array_size(p.files) > 0) {
        json_object_set(ask, "images", p.files);
    }
    if (json_object_set(row->object, KEEL_ROW_ASK, ask) != 0) {
        KEEL_FAIL(row->log, KEEL_ERR_NO_MEMORY, "%s:%llu: out of memory", PLACE(row));
    }
out:
    json_decref(p.files);
    json_decref(ask);
    return st;
}

json_t *keel_row_files(const json_t *row)
{
    return json_object_get(json_object_get(row, KEEL_ROW_ASK), "images");
}

// --- copies --------------------------------------------------------------------------------------

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
    const json_t *files = keel_row_files(row);
    json_t *names = json_array();
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
