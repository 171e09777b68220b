// SPDX-License-Identifier: MIT
// eval/records.c: reads the per-item JSONL files of a study folder (formats: docs/studies.md).
// Checks each field once, so that the metrics can trust what they get.
#include "eval.h"

#include "formats.h"
#include "platform.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static keel_status check_numbers(const struct keel_row *row, json_t *array, const char *field)
{
    for (size_t i = 0; i < json_array_size(array); i++) {
        if (!json_is_number(json_array_get(array, i))) {
            KEEL_ERROR(row->log, "%s:%llu: field \"%s\": element %zu is not a number", row->file,
                       (unsigned long long)row->line, field, i);
            return KEEL_ERR_DATA;
        }
    }
    return KEEL_OK;
}

static keel_status read_kl(const struct keel_row *row, struct keel_item *item)
{
    keel_status st = KEEL_OK;
    json_t *kl = NULL, *reverse = NULL;
    KEEL_TRY(keel_row_array(row, "kl", &kl));
    KEEL_TRY(check_numbers(row, kl, "kl"));
    KEEL_TRY(keel_row_opt_array(row, "kl_reverse", &reverse));
    KEEL_TRY(check_numbers(row, reverse, "kl_reverse"));
    if (json_array_size(kl) == 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: field \"kl\" is empty", row->file, (unsigned long long)row->line);
    }
    if (reverse && json_array_size(reverse) != json_array_size(kl)) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"kl\" and \"kl_reverse\" differ in length", row->file,
                  (unsigned long long)row->line);
    }
    for (size_t i = 0; i < json_array_size(kl); i++) {
        item->value += json_number_value(json_array_get(kl, i)) / (double)json_array_size(kl);
    }
out:
    return st;
}

static keel_status read_slot(const struct keel_row *row, struct keel_item *item)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_row_num(row, "p_aligned", &item->aligned));
    KEEL_TRY(keel_row_num(row, "p_contrary", &item->contrary));
    // Two continuations of which none begins with the other exclude each other; the rest is rounding.
    if (!(item->aligned >= 0 && item->contrary >= 0 && item->aligned + item->contrary <= 1 + 1e-4)) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"p_aligned\" %g and \"p_contrary\" %g are no probabilities of two answers",
                  row->file, (unsigned long long)row->line, item->aligned, item->contrary);
    }
out:
    return st;
}

// What items share that depend on each other: "cluster" where the data name it, else the prompt with its images.
static keel_status read_cluster(const struct keel_row *row, struct keel_item *item)
{
    keel_status st = KEEL_OK;
    json_t *images = NULL;
    struct keel_text key = { 0 };
    item->cluster = NULL;
    KEEL_TRY(keel_row_opt_str(row, "cluster", &item->cluster, NULL));
    KEEL_TRY(keel_row_opt_array(row, "images", &images));
    item->modality = json_array_size(images) > 0 ? "image" : "text";
    KEEL_TRY(keel_row_opt_str(row, "modality", &item->modality, NULL));
    if (item->cluster || json_array_size(images) == 0) {
        item->cluster = item->cluster ? item->cluster : item->prompt;
        goto out;
    }
    keel_text_addf(&key, "%s", item->prompt);
    for (size_t i = 0; i < json_array_size(images); i++) {
        const char *path = json_string_value(json_array_get(images, i));
        keel_text_addf(&key, "\n%s", path ? path : "");
    }
    json_t *value = key.failed ? NULL : json_string(key.data);
    if (!value || json_object_set_new(row->object, "cluster", value) != 0) {
        KEEL_FAIL(row->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", row->file);
    }
    item->cluster = json_string_value(value);
out:
    keel_text_finish(&key);
    return st;
}

static keel_status read_item(const struct keel_row *row, enum keel_record_kind kind, struct keel_item *item)
{
    keel_status st = KEEL_OK;
    const char *text = NULL;
    int64_t tokens = 0;
    double logprob = 0;
    *item = (struct keel_item){ .object = row->object, .weight = 1, .domain = "", .twin = "" };
    KEEL_TRY(keel_row_str(row, "id", &item->id, NULL));
    KEEL_TRY(keel_row_str(row, "prompt", &item->prompt, NULL));
    KEEL_TRY(keel_row_opt_str(row, "domain", &item->domain, NULL));
    if (keel_domain_reserved(item->domain)) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"domain\" may not be \"%s\": reports call a group of domains so", row->file,
                  (unsigned long long)row->line, item->domain);
    }
    KEEL_TRY(keel_row_opt_str(row, "twin", &item->twin, NULL));
    KEEL_TRY(read_cluster(row, item));
    switch (kind) {
    case KEEL_REC_MARGIN:
        KEEL_TRY(keel_row_num(row, "margin", &item->value));
        break;
    case KEEL_REC_NARROW:
        KEEL_TRY(keel_row_num(row, "logprob", &logprob));
        KEEL_TRY(keel_row_int(row, "n_tokens", &tokens));
        if (tokens < 1) {
            KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: field \"n_tokens\" must be at least 1", row->file,
                      (unsigned long long)row->line);
        }
        item->value = -logprob;
        item->weight = (double)tokens;
        break;
    case KEEL_REC_KL:
        KEEL_TRY(read_kl(row, item));
        break;
    case KEEL_REC_SLOT:
        KEEL_TRY(read_slot(row, item));
        break;
    case KEEL_REC_RELEVANCE:
        KEEL_TRY(keel_row_num(row, "relevance", &item->value));
        KEEL_TRY(keel_row_num(row, "nll", &item->nll));
        break;
    case KEEL_REC_PROJECTION:
        KEEL_TRY(keel_row_num(row, "projection", &item->value));
        break;
    case KEEL_REC_TEXT:
        KEEL_TRY(keel_row_str(row, "text", &text, NULL));
        break;
    }
out:
    return st;
}

static keel_status append(struct keel_records *r, size_t *cap, const struct keel_item *item, const struct keel_row *row)
{
    if (json_object_get(r->index, item->id)) {
        KEEL_ERROR(row->log, "%s:%llu: id \"%s\" stands in the file twice", row->file, (unsigned long long)row->line,
                   item->id);
        return KEEL_ERR_DATA;
    }
    if (r->n == *cap) {
        const size_t more = *cap ? *cap * 2 : 64;
        struct keel_item *p = realloc(r->item, more * sizeof *p);
        if (!p) {
            return KEEL_ERR_NO_MEMORY;
        }
        r->item = p;
        *cap = more;
    }
    if (json_object_set_new(r->index, item->id, json_integer((json_int_t)r->n)) != 0) {
        return KEEL_ERR_NO_MEMORY;
    }
    r->item[r->n] = *item;
    json_incref(item->object);
    r->n++;
    return KEEL_OK;
}

keel_status keel_records_load(struct keel_records *out, const char *path, enum keel_record_kind kind, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    struct keel_row row = { 0 };
    size_t cap = 0;
    *out = (struct keel_records){ .index = json_object() };
    if (!out->index) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    KEEL_TRY(keel_map_open(&map, path, log));
    struct keel_jsonl reader = keel_jsonl_make(map.data, map.len_bytes, path, log);
    for (;;) {
        struct keel_item item;
        KEEL_TRY(keel_jsonl_next(&reader, &row));
        if (!row.object) {
            break;
        }
        KEEL_TRY(read_item(&row, kind, &item));
        KEEL_TRY(append(out, &cap, &item, &row));
        json_decref(row.object);
        row.object = NULL;
    }
    if (out->n == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: holds no record", path);
    }
out:
    json_decref(row.object);
    keel_map_close(&map);
    if (st != KEEL_OK) {
        keel_records_finish(out);
    }
    return st;
}

void keel_records_finish(struct keel_records *r)
{
    for (size_t i = 0; i < r->n; i++) {
        json_decref(r->item[i].object);
    }
    free(r->item);
    json_decref(r->index);
    *r = (struct keel_records){ 0 };
}

const struct keel_item *keel_records_find(const struct keel_records *r, const char *id)
{
    const json_t *at = json_object_get(r->index, id);
    return at ? &r->item[json_integer_value(at)] : NULL;
}
