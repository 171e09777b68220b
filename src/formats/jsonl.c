// SPDX-License-Identifier: MIT
// formats/jsonl.c: one JSON object a line, through jansson, with file and line in every message.
#include "formats.h"

#include <jansson.h>

#include <math.h>
#include <string.h>

struct keel_jsonl keel_jsonl_make(const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    struct keel_jsonl r = { .data = (const char *)data, .name = name, .len = len, .log = log };
    if (len >= 3 && memcmp(data, "\xef\xbb\xbf", 3) == 0) { // a byte order mark is no part of the first line
        r.at = 3;
    }
    return r;
}

static bool blank(const char *s, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (s[i] != ' ' && s[i] != '\t' && s[i] != '\r') {
            return false;
        }
    }
    return true;
}

keel_status keel_jsonl_next(struct keel_jsonl *r, struct keel_row *row)
{
    *row = (struct keel_row){ .file = r->name, .log = r->log };
    while (r->at < r->len) {
        const char *s = r->data + r->at;
        const char *nl = memchr(s, '\n', r->len - r->at);
        const size_t len = nl ? (size_t)(nl - s) : r->len - r->at;
        json_error_t error;
        size_t bad;
        r->at += len + (nl ? 1 : 0);
        row->line = ++r->line;
        if (blank(s, len)) {
            continue;
        }
        if (!keel_utf8_valid(s, len, &bad)) {
            KEEL_ERROR(r->log, "%s:%llu: byte %zu of the line (0x%02x) is not valid UTF-8", r->name,
                       (unsigned long long)r->line, bad + 1, (uint8_t)s[bad]);
            return KEEL_ERR_DATA;
        }
        json_t *v = json_loadb(s, len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
        if (!v) {
            KEEL_ERROR(r->log, "%s:%llu: invalid JSON at column %d: %s", r->name, (unsigned long long)r->line,
                       error.column, error.text);
            return json_error_code(&error) == json_error_out_of_memory ? KEEL_ERR_NO_MEMORY : KEEL_ERR_DATA;
        }
        if (!json_is_object(v)) {
            json_decref(v);
            KEEL_ERROR(r->log, "%s:%llu: a JSON object {...} was expected", r->name,
                       (unsigned long long)r->line);
            return KEEL_ERR_DATA;
        }
        row->object = v;
        return KEEL_OK;
    }
    return KEEL_OK;
}

static keel_status fail(const struct keel_row *row, const char *field, const char *what)
{
    KEEL_ERROR(row->log, "%s:%llu: \"%s\" %s", row->file, (unsigned long long)row->line, field, what);
    return KEEL_ERR_DATA;
}

// The field, or NULL with *st OK if it may be missing and is.
static json_t *get(const struct keel_row *row, const char *field, bool optional, keel_status *st)
{
    json_t *v = json_object_get(row->object, field);
    *st = KEEL_OK;
    if (!v || json_is_null(v)) {
        *st = optional ? KEEL_OK : fail(row, field, "is missing");
        return NULL;
    }
    return v;
}

static keel_status get_str(const struct keel_row *row, const char *field, const char **out, size_t *len,
                           bool optional)
{
    keel_status st;
    const json_t *v = get(row, field, optional, &st);
    if (v && !json_is_string(v)) {
        return fail(row, field, "must be a string");
    }
    if (v) {
        *out = json_string_value(v);
        if (len) {
            *len = json_string_length(v);
        }
    }
    return st;
}

static keel_status get_num(const struct keel_row *row, const char *field, double *out, bool optional)
{
    keel_status st;
    const json_t *v = get(row, field, optional, &st);
    if (v && (!json_is_number(v) || !isfinite(json_number_value(v)))) {
        return fail(row, field, "must be a number");
    }
    if (v) {
        *out = json_number_value(v);
    }
    return st;
}

static keel_status get_int(const struct keel_row *row, const char *field, int64_t *out, bool optional)
{
    keel_status st;
    const json_t *v = get(row, field, optional, &st);
    if (v && !json_is_integer(v)) {
        return fail(row, field, "must be an integer");
    }
    if (v) {
        *out = json_integer_value(v);
    }
    return st;
}

static keel_status get_bool(const struct keel_row *row, const char *field, bool *out, bool optional)
{
    keel_status st;
    const json_t *v = get(row, field, optional, &st);
    if (v && !json_is_boolean(v)) {
        return fail(row, field, "must be true or false");
    }
    if (v) {
        *out = json_is_true(v);
    }
    return st;
}

static keel_status get_array(const struct keel_row *row, const char *field, json_t **out, bool optional)
{
    keel_status st;
    json_t *v = get(row, field, optional, &st);
    if (v && !json_is_array(v)) {
        return fail(row, field, "must be a list");
    }
    if (v) {
        *out = v;
    }
    return st;
}

keel_status keel_row_str(const struct keel_row *row, const char *field, const char **out, size_t *len)
{
    return get_str(row, field, out, len, false);
}

keel_status keel_row_num(const struct keel_row *row, const char *field, double *out)
{
    return get_num(row, field, out, false);
}

keel_status keel_row_int(const struct keel_row *row, const char *field, int64_t *out)
{
    return get_int(row, field, out, false);
}

keel_status keel_row_bool(const struct keel_row *row, const char *field, bool *out)
{
    return get_bool(row, field, out, false);
}

keel_status keel_row_array(const struct keel_row *row, const char *field, json_t **out)
{
    return get_array(row, field, out, false);
}

keel_status keel_row_opt_str(const struct keel_row *row, const char *field, const char **out, size_t *len)
{
    return get_str(row, field, out, len, true);
}

keel_status keel_row_opt_num(const struct keel_row *row, const char *field, double *out)
{
    return get_num(row, field, out, true);
}

keel_status keel_row_opt_int(const struct keel_row *row, const char *field, int64_t *out)
{
    return get_int(row, field, out, true);
}

keel_status keel_row_opt_bool(const struct keel_row *row, const char *field, bool *out)
{
    return get_bool(row, field, out, true);
}

keel_status keel_row_opt_array(const struct keel_row *row, const char *field, json_t **out)
{
    return get_array(row, field, out, true);
}
