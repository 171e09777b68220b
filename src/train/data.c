// SPDX-License-Identifier: MIT
// train/data.c: JSONL files to token rows with their loss places.
#include "data.h"
#include "models.h"
#include "platform.h"

#include <jansson.h>

#include <stdlib.h>
#include <string.h>

#define LINE(row) (row)->file, (unsigned long long)(row)->line

void keel_train_row_finish(struct keel_train_row *row)
{
    free(row->ids);
    free(row->mask);
    free(row->images);
    *row = (struct keel_train_row){ 0 };
}

void keel_train_row_adopt(struct keel_train_row *out, struct keel_prompt *prompt)
{
    out->ids = prompt->ids;
    out->n = prompt->n;
    out->images = prompt->images;
    out->n_images = prompt->n_images;
    prompt->ids = NULL;
    prompt->images = NULL;
}

static keel_status add_end(struct keel_train_row *out, const keel_model *model, const struct keel_row *row)
{
    keel_status st = KEEL_OK;
    const int32_t end = keel_token_eot(model) >= 0 ? keel_token_eot(model) : keel_token_eos(model);
    if (end < 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA,
                  "%s:%llu: \"eos\" is true but the model has no end-of-turn token; remove the field",
                  LINE(row));
    }
    int32_t *ids = realloc(out->ids, ((size_t)out->n + 1) * sizeof *ids);
    if (!ids) {
        KEEL_FAIL(row->log, KEEL_ERR_NO_MEMORY, "%s:%llu: out of memory", LINE(row));
    }
    out->ids = ids;
    out->ids[out->n++] = end;
out:
    return st;
}

static keel_status make_raw(struct keel_train_row *out, const keel_model *model, keel_images *images,
                            const struct keel_row *row)
{
    keel_status st = KEEL_OK;
    const char *prompt, *completion;
    size_t len;
    struct keel_prompt p = { 0 };
    bool eos = false;
    KEEL_TRY(keel_row_str(row, "prompt", &prompt, NULL));
    KEEL_TRY(keel_row_str(row, "completion", &completion, &len));
    KEEL_TRY(keel_row_opt_bool(row, "eos", &eos));
    KEEL_TRY(keel_row_prompt(&p, model, images, row, false));
    out->first = p.n;
    if (out->first == 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA,
                  "%s:%llu: the prompt is empty and the model has no BOS token, so nothing predicts the "
                  "first token; give a prompt",
                  LINE(row));
    }
    st = keel_prompt_complete(model, &p, completion, len);
    keel_train_row_adopt(out, &p);
    if (st != KEEL_OK) {
        KEEL_FAIL(row->log, st, "%s:%llu: the completion cannot be used (reason above)", LINE(row));
    }
    if (eos) {
        KEEL_TRY(add_end(out, model, row));
    }
    out->n_loss = out->n - out->first;
out:
    keel_prompt_finish(&p);
    return st;
}

static keel_status make_chat(struct keel_train_row *out, const keel_model *model, keel_images *images,
                             const struct keel_row *row)
{
    keel_status st = KEEL_OK;
    json_t *list = NULL;
    struct keel_prompt p = { 0 };
    KEEL_TRY(keel_row_array(row, "messages", &list));
    KEEL_TRY(keel_row_prompt(&p, model, images, row, false));
    keel_train_row_adopt(out, &p);
    out->mask = p.loss_mask;
    p.loss_mask = NULL;
    out->first = out->n;
    for (uint32_t i = 1; i < out->n; i++) {
        if (out->mask[i]) {
            out->first = KEEL_MIN(out->first, i);
            out->n_loss++;
        }
    }
out:
    keel_prompt_finish(&p);
    return st;
}

// A null counts as missing, as in keel_row_str() and its like.
static bool has(const struct keel_row *row, const char *field)
{
    const json_t *v = json_object_get(row->object, field);
    return v && !json_is_null(v);
}

keel_status keel_train_row_make(struct keel_train_row *out, const keel_model *model, keel_images *images,
                                const struct keel_row *row, uint32_t seq_len)
{
    keel_status st = KEEL_OK;
    const bool chat = has(row, "messages");
    *out = (struct keel_train_row){ 0 };
    if (chat && (has(row, "prompt") || has(row, "completion"))) {
        KEEL_FAIL(
            row->log, KEEL_ERR_DATA,
            "%s:%llu: \"messages\" beside \"prompt\" or \"completion\"; put the answer into the last message",
            LINE(row));
    }
    if (!chat && !has(row, "prompt") && !has(row, "completion")) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: neither \"prompt\" and \"completion\" nor \"messages\"",
                  LINE(row));
    }
    KEEL_TRY(chat ? make_chat(out, model, images, row) : make_raw(out, model, images, row));
    if (out->n_loss == 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: nothing to learn: %s", LINE(row),
                  chat ? "no assistant message" : "the completion is empty and \"eos\" is not true");
    }
    if (out->n > seq_len) {
        KEEL_FAIL(
            row->log, KEEL_ERR_DATA,
            "%s:%llu: the row has %u tokens, more than --seq-len %u; raise --seq-len or shorten the row",
            LINE(row), out->n, seq_len);
    }
out:
    if (st != KEEL_OK) {
        keel_train_row_finish(out);
    }
    return st;
}

keel_status keel_train_set_add(struct keel_train_set *set, struct keel_train_row row, const keel_log *log)
{
    if (set->n_rows == set->cap) {
        const uint64_t cap = set->cap ? set->cap * 2 : 256;
        struct keel_train_row *grown = realloc(set->rows, cap * sizeof *grown);
        if (!grown) {
            KEEL_ERROR(log, "out of memory for %llu training rows", (unsigned long long)cap);
            keel_train_row_finish(&row);
            return KEEL_ERR_NO_MEMORY;
        }
        set->rows = grown;
        set->cap = cap;
    }
    row.place0 = set->n_loss;
    set->n_loss += row.n_loss;
    set->rows[set->n_rows++] = row;
    set->longest = KEEL_MAX(set->longest, row.n);
    set->most_loss = KEEL_MAX(set->most_loss, row.n_loss);
    return KEEL_OK;
}

static keel_status load_file(struct keel_train_set *set, struct keel_train_file *file,
                             const keel_model *model, keel_images *images, uint32_t seq_len,
                             const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    file->row0 = set->n_rows;
    KEEL_TRY(keel_map_open(&map, file->path, log));
    set->hash = keel_hash(set->hash, map.data, map.len_bytes);
    struct keel_jsonl reader = keel_jsonl_make(map.data, map.len_bytes, file->path, log);
    for (;;) {
        struct keel_row row;
        struct keel_train_row made;
        KEEL_TRY(keel_jsonl_next(&reader, &row));
        if (!row.object) {
            break;
        }
        st = keel_train_row_make(&made, model, images, &row, seq_len);
        json_decref(row.object);
        if (st != KEEL_OK) {
            goto out;
        }
        KEEL_TRY(keel_train_set_add(set, made, log));
    }
    file->n_rows = set->n_rows - file->row0;
    if (file->n_rows == 0 || file->n_rows > UINT32_MAX) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: %s", file->path,
                  file->n_rows ? "more rows than keel counts (2^32)"
                               : "no rows; one JSON object a line is expected");
    }
out:
    keel_map_close(&map);
    return st;
}

keel_status keel_train_set_load(struct keel_train_set *set, const keel_model *model, keel_images *images,
                                const struct keel_train_data *data, size_t n_data, uint32_t seq_len,
                                const keel_log *log)
{
    keel_status st = KEEL_OK;
    double sum = 0;
    *set = (struct keel_train_set){ .hash = KEEL_HASH_INIT };
    set->files = calloc(n_data, sizeof *set->files);
    if (!set->files) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "out of memory for %zu data files", n_data);
    }
    set->n_files = n_data;
    for (size_t i = 0; i < n_data; i++) {
        sum += (double)data[i].weight;
    }
    for (size_t i = 0; i < n_data; i++) {
        set->files[i].path = data[i].path;
        set->files[i].share = (double)data[i].weight / sum;
        KEEL_TRY(load_file(set, &set->files[i], model, images, seq_len, log));
    }
out:
    if (st != KEEL_OK) {
        keel_train_set_finish(set);
    }
    return st;
}

void keel_train_set_finish(struct keel_train_set *set)
{
    for (uint64_t i = 0; i < set->n_rows; i++) {
        keel_train_row_finish(&set->rows[i]);
    }
    free(set->rows);
    free(set->files);
    *set = (struct keel_train_set){ 0 };
}
