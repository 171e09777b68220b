// SPDX-License-Identifier: MIT
// study/measure.c: probe files through a session into record files. A prompt gets BOS; a completion is tokenized by itself and
// appended, as `score` and `train` do.
#include "measure.h"

#include "formats.h"
#include "platform.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

// The rows of a probe file with one or two sequences each.
struct seq {
    int32_t *ids;
    uint32_t n, first;
    float *a, *b;
};
struct probes {
    json_t *rows; // array of objects
    struct seq *seq;
    size_t n_seq, cap;
};

static void probes_finish(struct probes *p)
{
    for (size_t i = 0; i < p->n_seq; i++) {
        free(p->seq[i].ids);
        free(p->seq[i].a);
        free(p->seq[i].b);
    }
    free(p->seq);
    json_decref(p->rows);
}

static keel_status add_seq(struct probes *p, int32_t *ids, size_t n, size_t first)
{
    if (p->n_seq == p->cap) {
        const size_t cap = KEEL_MAX(p->cap * 2, (size_t)64);
        struct seq *q = realloc(p->seq, cap * sizeof *q);
        if (!q) {
            free(ids);
            return KEEL_ERR_NO_MEMORY;
        }
        p->seq = q;
        p->cap = cap;
    }
    struct seq *s = &p->seq[p->n_seq++];
    *s = (struct seq){ .ids = ids, .n = (uint32_t)n, .first = (uint32_t)first };
    s->a = calloc(n - first + 1, sizeof *s->a);
    s->b = calloc(n - first + 1, sizeof *s->b);
    return s->a && s->b ? KEEL_OK : KEEL_ERR_NO_MEMORY;
}

// BOS + prompt, then the completion's own tokens.
static keel_status encode(struct probes *p, const keel_model *m, const struct keel_row *row, const char *field)
{
    keel_status st = KEEL_OK;
    const char *prompt, *completion;
    size_t prompt_len, completion_len, n, more;
    int32_t *ids = NULL, *tail = NULL;
    KEEL_TRY(keel_row_str(row, "prompt", &prompt, &prompt_len));
    KEEL_TRY(keel_row_str(row, field, &completion, &completion_len));
    KEEL_TRY(keel_encode(m, prompt, prompt_len, NULL, &ids, &n));
    KEEL_TRY(keel_encode(m, completion, completion_len, &(struct keel_encode_params){ .bos = false }, &tail, &more));
    if (more == 0 || n == 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"%s\" is empty", row->file, (unsigned long long)row->line,
                  more == 0 ? field : "prompt");
    }
    int32_t *all = realloc(ids, (n + more) * sizeof *ids);
    if (!all) {
        KEEL_FAIL(row->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", row->file);
    }
    ids = NULL;
    memcpy(all + n, tail, more * sizeof *tail);
    KEEL_TRY(add_seq(p, all, n + more, n));
out:
    free(ids);
    free(tail);
    return st;
}

static keel_status read_probes(struct probes *p, const keel_model *m, const char *path, const char *const *fields, size_t n_fields,
                               const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    struct keel_row row = { 0 };
    *p = (struct probes){ .rows = json_array() };
    KEEL_TRY(keel_map_open(&map, path, log));
    struct keel_jsonl reader = keel_jsonl_make(map.data, map.len_bytes, path, log);
    for (;;) {
        const char *id;
        KEEL_TRY(keel_jsonl_next(&reader, &row));
        if (!row.object) {
            break;
        }
        KEEL_TRY(keel_row_str(&row, "id", &id, NULL));
        KEEL_TRY(keel_row_str(&row, "prompt", &id, NULL));
        for (size_t i = 0; i < n_fields; i++) {
            KEEL_TRY(encode(p, m, &row, fields[i]));
        }
        json_array_append(p->rows, row.object);
        json_decref(row.object);
        row.object = NULL;
    }
    if (json_array_size(p->rows) == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: no rows in it", path);
    }
out:
    json_decref(row.object);
    keel_map_close(&map);
    return st;
}

static keel_status score(struct probes *p, keel_session *s, measure_progress progress, void *user)
{
    struct keel_score_row *rows = calloc(p->n_seq + 1, sizeof *rows);
    if (!rows) {
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < p->n_seq; i++) {
        rows[i] = (struct keel_score_row){ .ids = p->seq[i].ids, .n = p->seq[i].n, .first = p->seq[i].first, .logprobs = p->seq[i].a };
    }
    const keel_status st = keel_session_score(s, rows, p->n_seq, progress, user);
    free(rows);
    return st;
}

static double sum_of(const float *x, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (double)x[i];
    }
    return sum;
}

static keel_status write_rows(const json_t *rows, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_file_out out = { 0 };
    size_t i;
    json_t *row;
    KEEL_TRY(keel_file_create(&out, path, log));
    json_array_foreach((json_t *)(uintptr_t)rows, i, row)
    {
        json_dumpf(row, out.f, JSON_COMPACT | JSON_REAL_PRECISION(9)); // a failed write shows at commit
        fputc('\n', out.f);
    }
    KEEL_TRY(keel_file_commit(&out, log));
out:
    keel_file_abort(&out);
    return st;
}

keel_status keel_measure_margin(keel_session *s, const keel_model *m, const char *in, const char *out, measure_progress progress,
                                void *user, const keel_log *log)
{
    static const char *const fields[] = { "chosen", "rejected" };
    keel_status st = KEEL_OK;
    struct probes p;
    KEEL_TRY(read_probes(&p, m, in, fields, 2, log));
    KEEL_TRY(score(&p, s, progress, user));
    for (size_t i = 0; i < json_array_size(p.rows); i++) {
        json_t *row = json_array_get(p.rows, i);
        const struct seq *yes = &p.seq[2 * i], *no = &p.seq[2 * i + 1];
        const double a = sum_of(yes->a, yes->n - yes->first), b = sum_of(no->a, no->n - no->first);
        json_object_set_new(row, "logprob_chosen", json_real(a));
        json_object_set_new(row, "n_chosen", json_integer(yes->n - yes->first));
        json_object_set_new(row, "logprob_rejected", json_real(b));
        json_object_set_new(row, "n_rejected", json_integer(no->n - no->first));
        json_object_set_new(row, "margin", json_real(a / (yes->n - yes->first) - b / (no->n - no->first)));
    }
    KEEL_TRY(write_rows(p.rows, out, log));
out:
    probes_finish(&p);
    return st;
}

keel_status keel_measure_narrow(keel_session *s, const keel_model *m, const char *in, const char *out, measure_progress progress,
                                void *user, const keel_log *log)
{
    static const char *const fields[] = { "completion" };
    keel_status st = KEEL_OK;
    struct probes p;
    KEEL_TRY(read_probes(&p, m, in, fields, 1, log));
    KEEL_TRY(score(&p, s, progress, user));
    for (size_t i = 0; i < json_array_size(p.rows); i++) {
        json_t *row = json_array_get(p.rows, i);
        json_object_set_new(row, "logprob", json_real(sum_of(p.seq[i].a, p.seq[i].n - p.seq[i].first)));
        json_object_set_new(row, "n_tokens", json_integer(p.seq[i].n - p.seq[i].first));
    }
    KEEL_TRY(write_rows(p.rows, out, log));
out:
    probes_finish(&p);
    return st;
}

// One greedy answer, up to the end of a turn, into the row's "ids" and "text".
static keel_status answer(keel_session *s, const keel_model *m, json_t *row, uint32_t n_tokens, const keel_log *log)
{
    static const struct keel_sample_params greedy = { KEEL_SAMPLE_DEFAULTS .temperature = 0.0f };
    keel_status st = KEEL_OK;
    int32_t *ids = NULL;
    size_t n;
    struct keel_text text = { 0 };
    json_t *list = json_array();
    const char *prompt = json_string_value(json_object_get(row, "prompt"));
    KEEL_TRY(keel_encode(m, prompt, strlen(prompt), NULL, &ids, &n));
    keel_session_reset(s);
    KEEL_TRY(keel_session_append(s, ids, n));
    for (uint32_t i = 0; i < n_tokens; i++) {
        int32_t id;
        size_t len;
        KEEL_TRY(keel_session_sample(s, &greedy, &id));
        json_array_append_new(list, json_integer(id));
        if (keel_token_is_end(m, id)) {
            break;
        }
        const char *bytes = keel_token_text(m, id, false, &len);
        keel_text_add(&text, bytes, len);
        if (i + 1 < n_tokens) {
            KEEL_TRY(keel_session_append(s, &id, 1));
        }
    }
    size_t bad = text.len;
    if (text.len > 0) {
        keel_utf8_valid(text.data, text.len, &bad); // an answer may end inside a character
    }
    json_object_set(row, "ids", list);
    json_object_set_new(row, "text", json_stringn(text.data ? text.data : "", KEEL_MIN(bad, text.len)));
    if (text.failed) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for an answer");
    }
out:
    json_decref(list);
    keel_text_finish(&text);
    free(ids);
    return st;
}

keel_status keel_measure_answers(keel_session *s, const keel_model *m, const char *in, const char *out, uint32_t n_tokens,
                                 uint32_t max_rows, measure_progress progress, void *user, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct probes p;
    KEEL_TRY(read_probes(&p, m, in, NULL, 0, log));
    while (max_rows > 0 && json_array_size(p.rows) > max_rows) {
        json_array_remove(p.rows, json_array_size(p.rows) - 1);
    }
    for (size_t i = 0; i < json_array_size(p.rows); i++) {
        KEEL_TRY(answer(s, m, json_array_get(p.rows, i), n_tokens, log));
        if (progress && !progress(user, (i + 1) * n_tokens, json_array_size(p.rows) * n_tokens)) {
            st = KEEL_INTERRUPTED;
            goto out;
        }
    }
    KEEL_TRY(write_rows(p.rows, out, log));
out:
    probes_finish(&p);
    return st;
}

static json_t *float_list(const float *x, uint32_t n)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_array_append_new(list, json_real((double)x[i]));
    }
    return list;
}

static keel_status answer_seq(struct probes *p, const keel_model *m, const json_t *row)
{
    keel_status st = KEEL_OK;
    const char *prompt = json_string_value(json_object_get(row, "prompt"));
    const json_t *list = json_object_get(row, "ids");
    const size_t more = json_array_size(list);
    int32_t *ids = NULL;
    size_t n;
    KEEL_TRY(keel_encode(m, prompt, strlen(prompt), NULL, &ids, &n));
    int32_t *all = realloc(ids, (n + more + 1) * sizeof *ids);
    if (!all) {
        st = KEEL_ERR_NO_MEMORY;
        goto out;
    }
    ids = NULL;
    for (size_t i = 0; i < more; i++) {
        all[n + i] = (int32_t)json_integer_value(json_array_get(list, i));
    }
    KEEL_TRY(add_seq(p, all, n + more, n));
out:
    free(ids);
    return st;
}

keel_status keel_measure_kl(keel_session *s, const keel_model *m, const char *answers, const char *out, measure_progress progress,
                            void *user, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct probes p;
    struct keel_kl_row *rows = NULL;
    KEEL_TRY(read_probes(&p, m, answers, NULL, 0, log));
    for (size_t i = 0; i < json_array_size(p.rows); i++) {
        KEEL_TRY(answer_seq(&p, m, json_array_get(p.rows, i)));
    }
    rows = calloc(p.n_seq + 1, sizeof *rows);
    if (!rows) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", answers);
    }
    for (size_t i = 0; i < p.n_seq; i++) {
        rows[i] = (struct keel_kl_row){ .ids = p.seq[i].ids, .n = p.seq[i].n, .first = p.seq[i].first, .kl = p.seq[i].a,
                                        .kl_reverse = p.seq[i].b };
    }
    KEEL_TRY(keel_session_kl(s, rows, p.n_seq, progress, user));
    for (size_t i = 0; i < p.n_seq; i++) {
        json_t *row = json_array_get(p.rows, i);
        const uint32_t n = p.seq[i].n - p.seq[i].first;
        json_object_del(row, "text");
        json_object_set_new(row, "n", json_integer(n));
        json_object_set_new(row, "kl", float_list(p.seq[i].a, n));
        json_object_set_new(row, "kl_reverse", float_list(p.seq[i].b, n));
    }
    KEEL_TRY(write_rows(p.rows, out, log));
out:
    free(rows);
    probes_finish(&p);
    return st;
}
