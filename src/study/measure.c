// SPDX-License-Identifier: MIT
// study/measure.c: contrastive probes, held-out rows, greedy answers and their divergence through a session into record files.
#include "probes.h"

#include <stdlib.h>
#include <string.h>

keel_status keel_measure_margin(const struct keel_measure *m, const char *in, const char *out)
{
    static const char *const fields[] = { "chosen", "rejected" };
    keel_status st = KEEL_OK;
    struct keel_probes p;
    KEEL_TRY(keel_probes_read(&p, in, NULL, true, m->log));
    for (size_t i = 0; i < 2 * keel_probes_count(&p); i++) {
        const struct keel_row row = keel_probes_row(&p, i / 2);
        struct keel_probe_parts parts = { .name = fields[i % 2] };
        KEEL_TRY(keel_row_str(&row, fields[i % 2], &parts.text, NULL));
        KEEL_TRY(keel_probes_add(&p, m, &row, &parts));
    }
    KEEL_TRY(keel_probes_score(&p, m));
    for (size_t i = 0; i < keel_probes_count(&p); i++) {
        json_t *row = json_array_get(p.rows, i);
        const struct keel_probe_seq *yes = &p.seq[2 * i], *no = &p.seq[2 * i + 1];
        const double a = keel_probe_sum(yes), b = keel_probe_sum(no);
        json_object_set_new(row, "logprob_chosen", json_real(a));
        json_object_set_new(row, "n_chosen", json_integer(keel_probe_count(yes)));
        json_object_set_new(row, "logprob_rejected", json_real(b));
        json_object_set_new(row, "n_rejected", json_integer(keel_probe_count(no)));
        json_object_set_new(row, "margin", json_real(a / (keel_probe_count(yes)) - b / (keel_probe_count(no))));
    }
    KEEL_TRY(keel_probes_write(p.rows, out, m->log));
out:
    keel_probes_finish(&p);
    return st;
}

keel_status keel_measure_narrow(const struct keel_measure *m, const char *in, const char *out)
{
    keel_status st = KEEL_OK;
    struct keel_probes p;
    KEEL_TRY(keel_probes_read(&p, in, NULL, true, m->log));
    for (size_t i = 0; i < keel_probes_count(&p); i++) {
        const struct keel_row row = keel_probes_row(&p, i);
        struct keel_probe_parts parts = { .name = "completion" };
        KEEL_TRY(keel_row_str(&row, "completion", &parts.text, NULL));
        KEEL_TRY(keel_probes_add(&p, m, &row, &parts));
    }
    KEEL_TRY(keel_probes_score(&p, m));
    for (size_t i = 0; i < keel_probes_count(&p); i++) {
        json_t *row = json_array_get(p.rows, i);
        json_object_set_new(row, "logprob", json_real(keel_probe_sum(&p.seq[i])));
        json_object_set_new(row, "n_tokens", json_integer(keel_probe_count(&p.seq[i])));
    }
    KEEL_TRY(keel_probes_write(p.rows, out, m->log));
out:
    keel_probes_finish(&p);
    return st;
}

// --- answers -------------------------------------------------------------------------------------

// Puts an answer into its row as "ids" and "text".
static keel_status set_answer(const struct keel_measure *m, json_t *row, const struct keel_generate_row *g)
{
    keel_status st = KEEL_OK;
    struct keel_text text = { 0 };
    json_t *list = json_array();
    for (uint32_t i = 0; i < g->n_out; i++) {
        size_t len;
        const char *bytes = keel_token_text(m->model, g->out[i], false, &len);
        keel_text_add(&text, bytes, len);
        json_array_append_new(list, json_integer(g->out[i]));
    }
    size_t bad = text.len;
    if (text.len > 0) {
        keel_utf8_valid(text.data, text.len, &bad); // an answer may end inside a character
    }
    json_object_set(row, "ids", list);
    json_object_set_new(row, "text", json_stringn(text.data ? text.data : "", KEEL_MIN(bad, text.len)));
    if (text.failed) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "no memory for an answer");
    }
out:
    json_decref(list);
    keel_text_finish(&text);
    return st;
}

// Greedy answers, up to the end of a turn, to the rows whose numbers are in `which`; writes only those.
static keel_status answer_rows(const struct keel_measure *m, const struct keel_probes *p, const size_t *which, size_t n, uint32_t n_tokens,
                               const char *path)
{
    static const struct keel_sample_params greedy = { KEEL_SAMPLE_DEFAULTS .temperature = 0.0f };
    keel_status st = KEEL_OK;
    struct keel_prompt *prompt = calloc(n + 1, sizeof *prompt);
    struct keel_generate_row *rows = calloc(n + 1, sizeof *rows);
    int32_t *out = calloc(n * n_tokens + 1, sizeof *out);
    json_t *done = json_array();
    if (!prompt || !rows || !out || !done) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "no memory for %zu answers", n);
    }
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(p, which[i]);
        KEEL_TRY(keel_probe_prompt(m, &row, &prompt[i]));
        rows[i] = (struct keel_generate_row){ .ids = prompt[i].ids, .n = prompt[i].n, .images = prompt[i].images,
                                              .n_images = prompt[i].n_images, .out = out + i * n_tokens, .cap = n_tokens };
    }
    KEEL_TRY(keel_session_generate(m->session, rows, n, &greedy, 0, m->progress, m->user));
    for (size_t i = 0; i < n; i++) {
        json_t *row = json_array_get(p->rows, which[i]);
        KEEL_TRY(set_answer(m, row, &rows[i]));
        json_array_append(done, row);
    }
    KEEL_TRY(keel_probes_write(done, path, m->log));
out:
    for (size_t i = 0; prompt && i < n; i++) {
        keel_prompt_finish(&prompt[i]);
    }
    free(prompt);
    free(rows);
    free(out);
    json_decref(done);
    return st;
}

keel_status keel_measure_answers(const struct keel_measure *m, const char *in, const char *out, uint32_t n_tokens, uint32_t max_rows)
{
    keel_status st = KEEL_OK;
    struct keel_probes p;
    size_t *which = NULL;
    KEEL_TRY(keel_probes_read(&p, in, NULL, true, m->log));
    const size_t n = max_rows > 0 ? KEEL_MIN(max_rows, keel_probes_count(&p)) : keel_probes_count(&p);
    which = calloc(n, sizeof *which);
    if (!which) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", in);
    }
    for (size_t i = 0; i < n; i++) {
        which[i] = i;
    }
    KEEL_TRY(answer_rows(m, &p, which, n, n_tokens, out));
out:
    free(which);
    keel_probes_finish(&p);
    return st;
}

keel_status keel_measure_examples(const struct keel_measure *m, const char *in, const char *out, uint32_t n_tokens, uint32_t max_rows,
                                  uint64_t seed, const char *keep)
{
    keel_status st = KEEL_OK;
    struct keel_probes p;
    size_t n, *which = NULL;
    KEEL_TRY(keel_probes_read(&p, in, NULL, true, m->log));
    KEEL_TRY(keel_probes_spread(&p, max_rows, seed, &which, &n));
    for (size_t i = 0; i < n; i++) {
        KEEL_TRY(keel_row_keep_images(json_array_get(p.rows, which[i]), i, keep, m->log));
    }
    KEEL_TRY(answer_rows(m, &p, which, n, n_tokens, out));
out:
    free(which);
    keel_probes_finish(&p);
    return st;
}

// --- answers under the base model ----------------------------------------------------------------

#define OTHER_PROMPTS 4 // prompts of other rows that an answer is held against

static keel_status add_answer(struct keel_probes *p, const struct keel_measure *m, size_t prompt, size_t from)
{
    const struct keel_row row = keel_probes_row(p, prompt);
    return keel_probes_add(p, m, &row, &(struct keel_probe_parts){ .more = json_object_get(json_array_get(p->rows, from), "ids") });
}

keel_status keel_measure_relevance(const struct keel_measure *m, const char *answers, const char *origin, const char *out, uint32_t max_rows,
                                   uint64_t seed)
{
    keel_status st = KEEL_OK;
    struct keel_probes p;
    struct keel_rng rng = keel_rng_make(seed, 2000);
    KEEL_TRY(keel_probes_read(&p, answers, origin, true, m->log));
    while (max_rows > 0 && keel_probes_count(&p) > max_rows) {
        json_array_remove(p.rows, keel_probes_count(&p) - 1);
    }
    const uint32_t n = (uint32_t)keel_probes_count(&p), others = n > 1 ? OTHER_PROMPTS : 0;
    for (uint32_t i = 0; i < n; i++) {
        KEEL_TRY(add_answer(&p, m, i, i));
        for (uint32_t k = 0; k < others; k++) {
            KEEL_TRY(add_answer(&p, m, (i + 1 + keel_rng_below(&rng, n - 1)) % n, i));
        }
    }
    KEEL_TRY(keel_probes_score(&p, m));
    for (uint32_t i = 0; i < n; i++) {
        json_t *row = json_array_get(p.rows, i);
        const struct keel_probe_seq *own = &p.seq[(size_t)i * (1 + others)];
        const double tokens = keel_probe_count(own);
        double other = 0;
        for (uint32_t k = 1; k <= others; k++) {
            other += keel_probe_sum(own + k) / others;
        }
        json_object_set_new(row, "nll", json_real(-keel_probe_sum(own) / tokens));
        json_object_set_new(row, "relevance", json_real(others ? (keel_probe_sum(own) - other) / tokens : 0));
    }
    KEEL_TRY(keel_probes_write(p.rows, out, m->log));
out:
    keel_probes_finish(&p);
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

keel_status keel_measure_kl(const struct keel_measure *m, const char *answers, const char *origin, const char *out)
{
    keel_status st = KEEL_OK;
    struct keel_probes p;
    KEEL_TRY(keel_probes_read(&p, answers, origin, true, m->log));
    for (size_t i = 0; i < keel_probes_count(&p); i++) {
        KEEL_TRY(add_answer(&p, m, i, i));
    }
    KEEL_TRY(keel_probes_divergence(&p, m));
    for (size_t i = 0; i < p.n_seq; i++) {
        json_t *row = json_array_get(p.rows, i);
        const uint32_t n = keel_probe_count(&p.seq[i]);
        json_object_del(row, "text");
        json_object_set_new(row, "n", json_integer(n));
        json_object_set_new(row, "kl", float_list(p.seq[i].a, n));
        json_object_set_new(row, "kl_reverse", float_list(p.seq[i].b, n));
    }
    KEEL_TRY(keel_probes_write(p.rows, out, m->log));
out:
    keel_probes_finish(&p);
    return st;
}
