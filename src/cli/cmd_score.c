// SPDX-License-Identifier: MIT
// cli/cmd_score.c: log-likelihood of completions, row by row.
#include "cli.h"
#include "commands.h"

#include <stdlib.h>
#include <string.h>

struct score_args {
    struct common common;
    const char *data, *out;
};

struct rows {
    struct keel_score_row *row;
    json_t **id;
    size_t n, cap;
    uint32_t longest;
    const char *name;
};

static keel_status bad_row(const struct context *c, const char *what)
{
    say(c, KEEL_LOG_ERROR, "%s", what);
    return KEEL_ERR_DATA;
}

static keel_status grow(struct rows *rows)
{
    if (rows->n < rows->cap) {
        return KEEL_OK;
    }
    const size_t cap = rows->cap ? rows->cap * 2 : 256;
    struct keel_score_row *row = realloc(rows->row, cap * sizeof *row);
    rows->row = row ? row : rows->row;
    json_t **id = realloc(rows->id, cap * sizeof *id);
    rows->id = id ? id : rows->id;
    if (!row || !id) {
        return KEEL_ERR_NO_MEMORY;
    }
    rows->cap = cap;
    return KEEL_OK;
}

// `text`: the row as it stands in the file.
static keel_status add_row(const struct context *c, struct rows *rows, json_t *o, const char *text, size_t len)
{
    const json_t *completion = json_object_get(o, "completion");
    struct keel_prompt p = { 0 };
    if (!json_is_string(completion)) {
        return bad_row(c, "\"completion\" is missing or no string");
    }
    keel_status st = grow(rows);
    if (st == KEEL_OK) {
        st = keel_prompt_row(&p, c->model, c->images, text, len, rows->name, true, &c->log);
    }
    const uint32_t first = p.n;
    if (st == KEEL_OK) {
        st = keel_prompt_complete(c->model, &p, json_string_value(completion), json_string_length(completion));
    }
    if (st == KEEL_OK && (first == 0 || p.n == first)) {
        st = bad_row(c, p.n == first ? "\"completion\" is empty: nothing to score" : "\"prompt\" is empty");
    }
    const uint32_t limit = keel_model_info(c->model)->context;
    if (st == KEEL_OK && p.n > limit) {
        say(c, KEEL_LOG_ERROR, "the row has %u tokens, the model's context is %u; shorten it", p.n, limit);
        st = KEEL_ERR_DATA;
    }
    float *logprobs = st == KEEL_OK ? calloc(p.n - first, sizeof *logprobs) : NULL;
    if (st == KEEL_OK && !logprobs) {
        st = KEEL_ERR_NO_MEMORY;
    }
    if (st == KEEL_OK) {
        rows->id[rows->n] = json_incref(json_object_get(o, "id"));
        rows->row[rows->n++] = (struct keel_score_row){ .ids = p.ids, .n = p.n, .first = first, .logprobs = logprobs,
                                                        .images = p.images, .n_images = p.n_images };
        rows->longest = p.n > rows->longest ? p.n : rows->longest;
        p.ids = NULL;
        p.images = NULL;
    }
    keel_prompt_finish(&p);
    return st;
}

static keel_status read_row(const struct context *c, struct rows *rows, const char *text, size_t len)
{
    json_error_t err;
    json_t *o = json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &err);
    if (!json_is_object(o)) {
        const keel_status st = bad_row(c, o ? "not a JSON object" : err.text);
        json_decref(o);
        return st;
    }
    const keel_status st = add_row(c, rows, o, text, len);
    json_decref(o);
    return st;
}

static keel_status read_rows(const struct context *c, struct rows *rows, const char *data, size_t len)
{
    keel_status st = KEEL_OK;
    size_t line = 0;
    for (size_t at = 0; st == KEEL_OK && at < len;) {
        const char *end = memchr(data + at, '\n', len - at);
        const size_t n = end ? (size_t)(end - (data + at)) : len - at;
        line++;
        if (strspn(data + at, " \t\r") < n) {
            log_at(rows->name, line);
            st = read_row(c, rows, data + at, n);
            log_at(NULL, 0);
        }
        at += n + 1;
    }
    if (st == KEEL_OK && rows->n == 0) {
        say(c, KEEL_LOG_ERROR, "%s: no rows; each line should be {\"id\", \"prompt\" or \"messages\", \"completion\"}", rows->name);
        st = KEEL_ERR_DATA;
    }
    return st;
}

static keel_status write_rows(const struct rows *rows, struct out_file *out)
{
    for (size_t i = 0; i < rows->n; i++) {
        const struct keel_score_row *r = &rows->row[i];
        json_t *o = json_object(), *ids = json_array(), *lps = json_array();
        double sum = 0;
        for (uint32_t k = r->first; k < r->n; k++) {
            json_array_append_new(ids, json_integer(r->ids[k]));
            json_array_append_new(lps, json_real((double)r->logprobs[k - r->first]));
            sum += (double)r->logprobs[k - r->first];
        }
        json_object_set_new(o, "id", rows->id[i] ? json_incref(rows->id[i]) : json_integer((json_int_t)i));
        json_object_set_new(o, "logprob", json_real(sum));
        json_object_set_new(o, "n_tokens", json_integer(r->n - r->first));
        json_object_set_new(o, "token_ids", ids);
        json_object_set_new(o, "token_logprobs", lps);
        print_json(out->f, o);
    }
    return out_commit(out) ? KEEL_OK : KEEL_ERR_IO;
}

static void rows_free(struct rows *rows)
{
    for (size_t i = 0; i < rows->n; i++) {
        free((void *)rows->row[i].ids);
        free((void *)rows->row[i].images);
        free(rows->row[i].logprobs);
        json_decref(rows->id[i]);
    }
    free(rows->row);
    free(rows->id);
}

// A row above an explicit --ctx would be cut off by nobody: it is an error that names the option.
static keel_status check_ctx(const struct context *c, const struct score_args *a, const struct rows *rows)
{
    if (a->common.ctx && rows->longest > a->common.ctx) {
        say(c, KEEL_LOG_ERROR, "%s: the longest row has %u tokens, --ctx is %u; raise --ctx", rows->name, rows->longest,
            a->common.ctx);
        return KEEL_ERR_DATA;
    }
    return KEEL_OK;
}

static int score_run(const void *args)
{
    const struct score_args *a = args;
    struct context c = { 0 };
    struct rows rows = { .name = a->data };
    struct out_file out = { 0 };
    char *data = NULL;
    size_t len = 0;
    keel_status st = context_open_model(&c, &a->common);
    if (st == KEEL_OK && !read_all(a->data, &data, &len)) {
        st = KEEL_ERR_IO;
    }
    if (st == KEEL_OK) {
        st = read_rows(&c, &rows, data, len);
    }
    if (st == KEEL_OK) {
        st = check_ctx(&c, a, &rows);
    }
    if (st == KEEL_OK && !out_open(&out, a->out)) { // before the work, not after it
        st = KEEL_ERR_IO;
    }
    if (st == KEEL_OK) {
        st = context_open_device(&c, &a->common);
    }
    if (st == KEEL_OK) {
        st = context_encode_images(&c, &a->common);
    }
    if (st == KEEL_OK) {
        st = keel_model_load(c.model, c.dev);
    }
    if (st == KEEL_OK) {
        st = context_open_session(&c, &a->common, a->common.ctx ? a->common.ctx : rows.longest);
    }
    if (st == KEEL_OK) {
        struct progress p = { .what = "score", .unit = "tokens", .off = a->common.quiet };
        st = keel_session_score(c.session, rows.row, rows.n, progress_tokens, &p);
        progress_end(&p);
    }
    if (st == KEEL_OK) {
        st = write_rows(&rows, &out);
    }
    out_abort(&out);
    rows_free(&rows);
    free(data);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct score_args, field)
static const struct arg_option options[] = {
    OPTION_MODEL,
    { .name = "--data", .type = ARG_STR, .offset = AT(data), .file = ARG_IN, .value = "IN.jsonl", .needed = true,
      .help = "rows {\"id\", \"prompt\" or \"messages\", \"completion\", \"images\"?}; - is standard input" },
    { .name = "--out", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT, .value = "OUT.jsonl", .def = "-",
      .help = "rows {\"id\", \"logprob\", \"n_tokens\", \"token_ids\", \"token_logprobs\"}; - is standard output" },
    OPTION_LORA,
    OPTION_STEER,
    OPTIONS_IMAGES,
    OPTIONS_SESSION,
    OPTION_KV,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_score = {
    .name = "score", .summary = "log-likelihood of completions", .usage = "-m MODEL [--lora A] [--mmproj P] --data IN.jsonl --out OUT.jsonl",
    .notes = "A prompt gets BOS; prompt and completion are tokenised apart and joined, as train does. Log-likelihoods are in nats.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct score_args),
    .run = score_run,
};
