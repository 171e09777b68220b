// SPDX-License-Identifier: MIT
// models/rows.c: the prompt of a data row: a text or a conversation, with the image files it names.
// Knows the fields of rows and nothing of tokens; gemma3/chat.c makes those.
#include "models.h"
#include "formats.h"
#include "platform.h"

#include <jansson.h>

#include <stdlib.h>
#include <string.h>

// A row on its way to a prompt. Messages, parts and file names borrow from the JSON object.
struct parse {
    const struct keel_row *row;
    keel_images *images;
    char where[4200];     // "FILE:LINE: ", or empty for a row without a line
    const json_t *list;   // "images", or NULL
    size_t n_taken;       // of `list`
    const float **embeds; // images in the order of the prompt
    uint32_t *n_views;
    uint32_t n_embeds, cap_embeds;
    struct keel_message *messages;
    struct keel_part *parts; // of all messages
    size_t n_messages, n_parts;
};

static const json_t *field(const json_t *object, const char *name)
{
    const json_t *v = json_object_get(object, name);
    return json_is_null(v) ? NULL : v;
}

// --- images --------------------------------------------------------------------------------------

// Takes note of one image file; a relative path starts at the folder of the row's file.
static keel_status add_file(struct parse *p, const json_t *value)
{
    keel_status st = KEEL_OK;
    const char *name = json_string_value(value), *file = p->row->file;
    const char *slash = file && name && name[0] != '/' ? strrchr(file, '/') : NULL;
    struct keel_text path = { 0 };
    if (!name || !name[0] || strlen(name) != json_string_length(value)) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%san image must be the path of a file", p->where);
    }
    if (strstr(name, "://") || strncmp(name, "data:", 5) == 0) {
        KEEL_FAIL(p->row->log, KEEL_ERR_UNSUPPORTED, "%simage \"%.60s\": only paths of files are read; save it and name the file",
                  p->where, name);
    }
    if (!p->images) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%sthe row has images, but there is no vision tower to read them; give --mmproj",
                  p->where);
    }
    if (slash) {
        keel_text_add(&path, file, (size_t)(slash + 1 - file));
    }
    keel_text_add(&path, name, strlen(name));
    if (p->n_embeds == p->cap_embeds) {
        const uint32_t cap = p->cap_embeds ? p->cap_embeds * 2 : 4;
        const float **embeds = realloc(p->embeds, cap * sizeof *embeds);
        p->embeds = embeds ? embeds : p->embeds;
        uint32_t *n_views = realloc(p->n_views, cap * sizeof *n_views);
        p->n_views = n_views ? n_views : p->n_views;
        p->cap_embeds = embeds && n_views ? cap : p->cap_embeds;
    }
    if (path.failed || p->n_embeds == p->cap_embeds) {
        KEEL_FAIL(p->row->log, KEEL_ERR_NO_MEMORY, "%sno memory for the row's images", p->where);
    }
    if (!keel_path_exists(path.data) || keel_path_is_dir(path.data)) {
        KEEL_FAIL(p->row->log, KEEL_ERR_IO, "%simage %s: there is no such file; relative paths start at the folder of the rows",
                  p->where, path.data);
    }
    st = keel_images_add(p->images, path.data, &p->embeds[p->n_embeds], &p->n_views[p->n_embeds]);
    if (st != KEEL_OK) {
        KEEL_FAIL(p->row->log, st, "%simage %s cannot be used (reason above)", p->where, path.data);
    }
    p->n_embeds++;
out:
    keel_text_finish(&path);
    return st;
}

static keel_status take(struct parse *p)
{
    if (p->n_taken >= json_array_size(p->list)) {
        KEEL_ERROR(p->row->log, "%splace %zu for an image, but \"images\" names %zu", p->where, p->n_taken + 1,
                   json_array_size(p->list));
        return KEEL_ERR_DATA;
    }
    return add_file(p, json_array_get(p->list, p->n_taken++));
}

// Placeholders of a text take the next of "images". In a row without images they are text, unless there is a tower.
static keel_status take_placeholders(struct parse *p, const char *text)
{
    keel_status st = KEEL_OK;
    for (const char *at = text; st == KEEL_OK && (p->images || p->list) && (at = strstr(at, "<image>")); at++) {
        st = take(p);
    }
    return st;
}

static keel_status check_all_taken(const struct parse *p)
{
    if (p->n_taken < json_array_size(p->list)) {
        KEEL_ERROR(p->row->log, "%s\"images\" names %zu, but there %s %zu place%s for them; put <image> where each belongs", p->where,
                   json_array_size(p->list), p->n_taken == 1 ? "is" : "are", p->n_taken, p->n_taken == 1 ? "" : "s");
        return KEEL_ERR_DATA;
    }
    return KEEL_OK;
}

// --- messages ------------------------------------------------------------------------------------

static const char *plain(const json_t *v)
{
    const char *s = json_string_value(v);
    return s && strlen(s) == json_string_length(v) ? s : NULL;
}

// One part of a content in OpenAI's form.
static keel_status add_part(struct parse *p, const json_t *part, size_t message)
{
    keel_status st = KEEL_OK;
    const char *type = json_string_value(json_object_get(part, "type"));
    struct keel_part *out = &p->parts[p->n_parts++];
    *out = (struct keel_part){ 0 };
    if (type && strcmp(type, "text") == 0) {
        out->text = plain(json_object_get(part, "text"));
        if (!out->text) {
            KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%smessage %zu: a part of type \"text\" needs a \"text\" (without \\u0000)", p->where,
                      message);
        }
    } else if (type && (strcmp(type, "image") == 0 || strcmp(type, "image_url") == 0)) {
        // OpenAI's {"image_url": {"url": PATH}}, a path itself, or what the chat templates of transformers know: {"url": PATH}, {"path": PATH}.
        const json_t *file = field(part, type);
        file = json_is_object(file) ? field(file, "url") : file ? file : field(part, "url") ? field(part, "url") : field(part, "path");
        if (field(part, "base64")) {
            KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%smessage %zu: an image in \"base64\"; give the path of a file", p->where, message);
        }
        KEEL_TRY(file ? add_file(p, file) : take(p));
    } else {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%smessage %zu: a part must have \"type\" \"text\", \"image\" or \"image_url\"", p->where,
                  message);
    }
out:
    return st;
}

static keel_status add_message(struct parse *p, const json_t *m)
{
    keel_status st = KEEL_OK;
    const json_t *content = json_object_get(m, "content");
    struct keel_message *out = &p->messages[p->n_messages++];
    *out = (struct keel_message){ .role = plain(json_object_get(m, "role")), .content = plain(content) };
    if (json_is_array(content)) {
        out->parts = p->parts + p->n_parts;
        out->n_parts = json_array_size(content);
    }
    if (!out->role || (!out->content && out->n_parts == 0)) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%smessage %zu needs \"role\", a string, and \"content\", a string or a list of parts "
                  "(without \\u0000)", p->where, p->n_messages);
    }
    for (size_t i = 0; i < out->n_parts; i++) {
        KEEL_TRY(add_part(p, json_array_get(content, i), p->n_messages));
    }
    KEEL_TRY(out->content ? take_placeholders(p, out->content) : KEEL_OK);
out:
    return st;
}

static keel_status read_messages(struct parse *p, const json_t *list)
{
    keel_status st = KEEL_OK;
    const size_t n = json_array_size(list);
    size_t n_parts = 0;
    if (n == 0) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%s\"messages\" must be a list of {\"role\", \"content\"} with at least one",
                  p->where);
    }
    for (size_t i = 0; i < n; i++) {
        n_parts += json_array_size(json_object_get(json_array_get(list, i), "content"));
    }
    p->messages = calloc(n, sizeof *p->messages);
    p->parts = calloc(n_parts + 1, sizeof *p->parts);
    if (!p->messages || !p->parts) {
        KEEL_FAIL(p->row->log, KEEL_ERR_NO_MEMORY, "%sno memory for %zu messages", p->where, n);
    }
    for (size_t i = 0; i < n; i++) {
        KEEL_TRY(add_message(p, json_array_get(list, i)));
    }
out:
    return st;
}

// --- the row -------------------------------------------------------------------------------------

static keel_status start(struct parse *p)
{
    keel_status st = KEEL_OK;
    p->list = field(p->row->object, "images");
    if (p->row->line > 0) {
        snprintf(p->where, sizeof p->where, "%s:%llu: ", p->row->file, (unsigned long long)p->row->line);
    }
    if (p->list && !json_is_array(p->list)) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%s\"images\" must be a list of paths", p->where);
    }
    if (json_array_size(p->list) > 0 && !p->images) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%sthe row has \"images\", but there is no vision tower to read them; give --mmproj",
                  p->where);
    }
out:
    return st;
}

static void parse_finish(struct parse *p)
{
    free(p->embeds);
    free(p->n_views);
    free(p->messages);
    free(p->parts);
}

// Files and messages of the row; `prompt`, unless there are messages.
static keel_status read_row(struct parse *p, const json_t **prompt)
{
    keel_status st = KEEL_OK;
    const json_t *messages = field(p->row->object, "messages");
    *prompt = field(p->row->object, "prompt");
    KEEL_TRY(start(p));
    if (!*prompt == !messages) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%sneeds either \"prompt\" or \"messages\"", p->where);
    }
    if (*prompt && !json_is_string(*prompt)) {
        KEEL_FAIL(p->row->log, KEEL_ERR_DATA, "%s\"prompt\" must be a string", p->where);
    }
    KEEL_TRY(*prompt ? take_placeholders(p, json_string_value(*prompt)) : read_messages(p, messages));
    KEEL_TRY(check_all_taken(p));
out:
    return st;
}

keel_status keel_row_prompt(struct keel_prompt *out, const keel_model *model, keel_images *images, const struct keel_row *row,
                            bool open)
{
    keel_status st = KEEL_OK;
    struct parse p = { .row = row, .images = images };
    const json_t *prompt;
    *out = (struct keel_prompt){ 0 };
    KEEL_TRY(read_row(&p, &prompt));
    const struct keel_prompt_images list = { .embeds = p.embeds, .n_views = p.n_views, .n = p.n_embeds,
                                             .n_tokens = images ? keel_images_tokens(images) : 0 };
    const struct keel_prompt_images *const given = images ? &list : NULL;
    if (prompt) {
        st = keel_prompt_encode(model, json_string_value(prompt), json_string_length(prompt), given, out);
    } else {
        st = keel_prompt_chat(model, p.messages, p.n_messages, open, given, out);
    }
    if (st != KEEL_OK && row->line > 0) {
        KEEL_FAIL(row->log, st, "%sthe %s cannot be used (reason above)", p.where, prompt ? "prompt" : "conversation");
    }
out:
    parse_finish(&p);
    return st;
}

keel_status keel_prompt_row(struct keel_prompt *out, const keel_model *model, keel_images *images, const char *json, size_t len,
                            const char *file, bool open, const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_error_t err;
    struct keel_row row = { .file = file ? file : "", .log = log };
    *out = (struct keel_prompt){ 0 };
    row.object = json_loadb(json, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &err);
    if (!json_is_object(row.object)) {
        KEEL_FAIL(row.log, KEEL_ERR_DATA, "%s", row.object ? "not a JSON object" : err.text);
    }
    KEEL_TRY(keel_row_prompt(out, model, images, &row, open));
out:
    json_decref(row.object);
    return st;
}

keel_status keel_images_scan(keel_images *images, const char *jsonl, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    struct keel_row row = { 0 };
    KEEL_TRY(keel_map_open(&map, jsonl, log));
    struct keel_jsonl reader = keel_jsonl_make(map.data, map.len_bytes, jsonl, log);
    for (;;) {
        KEEL_TRY(keel_jsonl_next(&reader, &row));
        if (!row.object) {
            break;
        }
        struct parse p = { .row = &row, .images = images };
        const json_t *prompt;
        st = read_row(&p, &prompt);
        parse_finish(&p);
        json_decref(row.object);
        row.object = NULL;
        KEEL_TRY(st);
    }
out:
    json_decref(row.object);
    keel_map_close(&map);
    return st;
}
