// SPDX-License-Identifier: MIT
// steer/rows.c: rows of a data file, and pairs of them, as the model will see them.
#include "steer.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

void keel_steer_rows_finish(struct keel_steer_rows *r)
{
    for (size_t i = 0; i < r->n; i++) {
        free((void *)(uintptr_t)r->row[i].ids);
        free((void *)(uintptr_t)r->row[i].images);
        free(r->row[i].logprobs);
        free(r->id[i]);
    }
    free(r->row);
    free(r->id);
    *r = (struct keel_steer_rows){ 0 };
}

static keel_status grow(struct keel_steer_rows *r, const keel_log *log)
{
    const size_t cap = r->n < r->cap ? r->cap : r->cap ? 2 * r->cap : 64;
    struct keel_score_row *row = cap == r->cap ? r->row : realloc(r->row, cap * sizeof *row);
    r->row = row ? row : r->row;
    char **id = cap == r->cap ? r->id : realloc(r->id, cap * sizeof *id);
    r->id = id ? id : r->id;
    if (!row || !id) {
        KEEL_ERROR(log, "no memory for %zu rows", cap);
        return KEEL_ERR_NO_MEMORY;
    }
    r->cap = cap;
    return KEEL_OK;
}

// Takes the ids and images of the prompt; tokens from `first` on are the response.
static keel_status take(struct keel_steer_rows *r, struct keel_prompt *p, uint32_t first, const json_t *id, const keel_model *model,
                        const keel_log *log)
{
    keel_status st = KEEL_OK;
    char number[24];
    const uint32_t context = keel_model_info(model)->context;
    if (p->n + 1 > context) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "the row has %u tokens, the model's context is %u; shorten it", p->n, context);
    }
    KEEL_TRY(grow(r, log));
    float *logprobs = calloc(p->n - first + 1, sizeof *logprobs);
    snprintf(number, sizeof number, "%zu", r->n);
    char *text = id ? json_dumps(id, JSON_ENCODE_ANY | JSON_COMPACT) : strdup(number);
    if (!logprobs || !text) {
        free(logprobs);
        free(text);
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a row of %u tokens", p->n);
    }
    r->id[r->n] = text;
    r->row[r->n++] = (struct keel_score_row){ .ids = p->ids, .n = p->n, .first = first, .logprobs = logprobs, .images = p->images,
                                              .n_images = p->n_images };
    r->longest = KEEL_MAX(r->longest, p->n);
    r->n_responses += first < p->n;
    p->ids = NULL;
    p->images = NULL;
out:
    return st;
}

static bool ends_with_answer(const json_t *messages)
{
    const json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    const char *role = json_string_value(json_object_get(last, "role"));
    return role && (strcmp(role, "assistant") == 0 || strcmp(role, "model") == 0);
}

// First token of the last run of loss tokens: where the conversation's last answer begins.
static uint32_t answer_begins(const struct keel_prompt *p)
{
    uint32_t i = p->n;
    while (i > 0 && !p->loss_mask[i - 1]) {
        i--;
    }
    while (i > 0 && p->loss_mask[i - 1]) {
        i--;
    }
    return i;
}

static keel_status add_object(struct keel_steer_rows *out, const keel_model *model, keel_images *images, struct keel_row *row)
{
    keel_status st = KEEL_OK;
    struct keel_prompt p = { 0 };
    const json_t *completion = json_object_get(row->object, "completion"), *messages = json_object_get(row->object, "messages");
    const bool answered = !completion && ends_with_answer(messages);
    if (completion && !json_is_string(completion)) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"completion\" is no string", row->file, (unsigned long long)row->line);
    }
    KEEL_TRY(keel_row_prompt(&p, model, images, row, !answered));
    uint32_t first = answered ? answer_begins(&p) : p.n;
    if (completion) {
        KEEL_TRY(keel_prompt_complete(model, &p, json_string_value(completion), json_string_length(completion)));
    }
    if (first == 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: the prompt is empty", row->file, (unsigned long long)row->line);
    }
    st = take(out, &p, first, json_object_get(row->object, "id"), model, row->log);
    if (st != KEEL_OK) {
        KEEL_FAIL(row->log, st, "%s:%llu: the row cannot be used (reason above)", row->file, (unsigned long long)row->line);
    }
out:
    keel_prompt_finish(&p);
    return st;
}

// One side of a pair: a text, or a row of its own.
static keel_status add_side(struct keel_steer_rows *out, const keel_model *model, keel_images *images, const struct keel_row *pair,
                            const char *side)
{
    keel_status st = KEEL_OK;
    json_t *value = json_object_get(pair->object, side);
    struct keel_row row = *pair;
    json_t *object = json_is_string(value) ? json_pack("{s:O}", "prompt", value) : json_incref(value);
    row.object = object;
    if (!json_is_object(object)) {
        KEEL_FAIL(pair->log, KEEL_ERR_DATA, "%s:%llu: a pair needs \"%s\": a text, or an object like {\"prompt\", \"completion\"}", pair->file,
                  (unsigned long long)pair->line, side);
    }
    KEEL_TRY(add_object(out, model, images, &row));
out:
    json_decref(object);
    return st;
}

static keel_status read_file(struct keel_steer_rows *a, struct keel_steer_rows *b, const keel_model *model, keel_images *images,
                             const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    struct keel_row row = { 0 };
    *a = (struct keel_steer_rows){ 0 };
    KEEL_TRY(keel_map_open(&map, path, log));
    struct keel_jsonl reader = keel_jsonl_make(map.data, map.len_bytes, path, log);
    for (;;) {
        KEEL_TRY(keel_jsonl_next(&reader, &row));
        if (!row.object) {
            break;
        }
        if (b) {
            KEEL_TRY(add_side(a, model, images, &row, "positive"));
            KEEL_TRY(add_side(b, model, images, &row, "negative"));
        } else {
            KEEL_TRY(add_object(a, model, images, &row));
        }
        json_decref(row.object);
        row.object = NULL;
    }
    if (a->n == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, b ? "%s: no pairs; each line should be {\"positive\": ..., \"negative\": ...}"
                                        : "%s: no rows; each line should be {\"prompt\" or \"messages\", \"completion\"?}", path);
    }
out:
    json_decref(row.object);
    keel_map_close(&map);
    if (st != KEEL_OK) {
        keel_steer_rows_finish(a);
    }
    return st;
}

keel_status keel_steer_rows_read(struct keel_steer_rows *out, const keel_model *model, keel_images *images, const char *path,
                                 const keel_log *log)
{
    return read_file(out, NULL, model, images, path, log);
}

keel_status keel_steer_pairs_read(struct keel_steer_rows *positive, struct keel_steer_rows *negative, const keel_model *model,
                                  keel_images *images, const char *path, const keel_log *log)
{
    *negative = (struct keel_steer_rows){ 0 };
    const keel_status st = read_file(positive, negative, model, images, path, log);
    if (st != KEEL_OK) {
        keel_steer_rows_finish(negative);
    }
    return st;
}

// --- running -------------------------------------------------------------------------------------

bool keel_steer_marked(const struct keel_score_row *row, struct keel_positions at, uint32_t t)
{
    bool image = false;
    const uint32_t prompt = row->prompt ? row->prompt : row->first;
    for (uint32_t i = 0; i < row->n_images; i++) {
        image |= t >= row->images[i].at && t < row->images[i].at + row->images[i].n;
    }
    switch (at.kind) {
    case KEEL_AT_ALL: return true;
    case KEEL_AT_PROMPT: return t < prompt;
    case KEEL_AT_RESPONSE: return t >= prompt;
    case KEEL_AT_LAST_PROMPT: return t + 1 == prompt;
    case KEEL_AT_FIRST: return t >= prompt && t - prompt < at.k;
    case KEEL_AT_IMAGE: return image;
    case KEEL_AT_DECODE: return false;
    }
    return false;
}

// Scoring leaves the last token of a row out, since it predicts nothing. Here it matters, so each row gets one token more.
keel_status keel_steer_run(keel_session *session, struct keel_steer_rows *rows, keel_hooks *hooks,
                           bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    keel_status st = KEEL_OK;
    const keel_log *log = keel_session_log(session);
    struct keel_score_row *run = calloc(rows->n, sizeof *run);
    for (size_t i = 0; run && i < rows->n; i++) {
        const struct keel_score_row *r = &rows->row[i];
        int32_t *ids = malloc((r->n + 1) * sizeof *ids);
        if (!ids) {
            KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for %zu rows", rows->n);
        }
        memcpy(ids, r->ids, r->n * sizeof *ids);
        ids[r->n] = r->ids[0];
        run[i] = *r;
        run[i].ids = ids;
        run[i].n++;
    }
    if (!run) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for %zu rows", rows->n);
    }
    KEEL_TRY(keel_session_set_hooks(session, hooks));
    KEEL_TRY(keel_session_score(session, run, rows->n, progress, user));
out:
    keel_session_set_hooks(session, NULL);
    for (size_t i = 0; run && i < rows->n; i++) {
        free((void *)(uintptr_t)run[i].ids);
    }
    free(run);
    return st;
}
