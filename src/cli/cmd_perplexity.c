// SPDX-License-Identifier: MIT
// cli/cmd_perplexity.c: perplexity of a text over windows that do not overlap.
#include "cli.h"
#include "commands.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct perplexity_args {
    struct common common;
    const char *file;
    bool json;
};

struct windows {
    struct keel_score_row *row;
    int32_t *ids;    // windows one after another, each with its BOS
    float *logprobs; // one a text token
    size_t n;
};

static keel_status cut(const struct context *c, struct windows *w, const int32_t *text, size_t n, uint32_t ctx)
{
    const size_t per = ctx - 1;
    w->n = (n + per - 1) / per;
    w->row = calloc(w->n, sizeof *w->row);
    w->ids = malloc((n + w->n) * sizeof *w->ids);
    w->logprobs = calloc(n, sizeof *w->logprobs);
    if (!w->row || !w->ids || !w->logprobs) {
        say(c, KEEL_LOG_ERROR, "out of memory");
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0, at = 0; i < w->n; i++) {
        const size_t len = n - i * per < per ? n - i * per : per;
        w->ids[at] = keel_token_bos(c->model);
        memcpy(w->ids + at + 1, text + i * per, len * sizeof *text);
        w->row[i] = (struct keel_score_row){
            .ids = w->ids + at, .n = (uint32_t)len + 1, .first = 1, .logprobs = w->logprobs + i * per
        };
        at += len + 1;
    }
    return KEEL_OK;
}

static void print_result(const struct perplexity_args *a, const struct windows *w, size_t n)
{
    double sum = 0, sq = 0;
    for (size_t i = 0; i < n; i++) {
        sum -= (double)w->logprobs[i];
    }
    const double nll = sum / (double)n;
    for (size_t i = 0; i < n; i++) {
        const double d = -(double)w->logprobs[i] - nll;
        sq += d * d;
    }
    const double err = n > 1 ? sqrt(sq / (double)(n - 1) / (double)n) : 0;
    const double ppl = exp(nll);
    if (a->json) {
        print_json(stdout, json_pack("{s:f, s:f, s:f, s:f, s:I, s:I, s:i}", "ppl", ppl, "nll", nll, "stderr", err, "ppl_stderr",
                                     ppl * err, "n_tokens", (json_int_t)n, "windows", (json_int_t)w->n, "ctx",
                                     (int)a->common.ctx));
        return;
    }
    printf("perplexity %.4f ± %.4f   nll %.6f ± %.6f nats   %zu tokens in %zu windows of %u\n", ppl, ppl * err, nll, err, n, w->n,
           a->common.ctx);
}

static keel_status measure(struct context *c, const struct perplexity_args *a, const int32_t *text, size_t n)
{
    struct windows w = { 0 };
    struct progress p = { .what = "perplexity", .unit = "tokens", .off = a->common.quiet };
    keel_status st = cut(c, &w, text, n, a->common.ctx);
    if (st == KEEL_OK) {
        st = context_open_device(c, &a->common);
    }
    if (st == KEEL_OK) {
        st = keel_model_load(c->model, c->dev);
    }
    if (st == KEEL_OK) {
        st = context_open_session(c, &a->common, a->common.ctx);
    }
    if (st == KEEL_OK) {
        st = keel_session_score(c->session, w.row, w.n, progress_tokens, &p);
        progress_end(&p);
    }
    if (st == KEEL_OK) {
        print_result(a, &w, n);
    }
    free(w.row);
    free(w.ids);
    free(w.logprobs);
    return st;
}

static int perplexity_run(const void *args)
{
    const struct perplexity_args *a = args;
    struct context c = { 0 };
    char *data = NULL;
    size_t len = 0, n = 0;
    int32_t *text = NULL;
    keel_status st = context_open_model(&c, &a->common);
    if (st == KEEL_OK && !read_all(a->file, &data, &len)) {
        st = KEEL_ERR_IO;
    }
    if (st == KEEL_OK) {
        st = keel_encode(c.model, data, len, &(struct keel_encode_params){ .bos = false }, &text, &n);
    }
    if (st == KEEL_OK && n == 0) {
        say(&c, KEEL_LOG_ERROR, "%s: no text", a->file);
        st = KEEL_ERR_DATA;
    }
    if (st == KEEL_OK && keel_token_bos(c.model) < 0) {
        say(&c, KEEL_LOG_ERROR, "%s: the model has no BOS token, which every window begins with", a->common.model);
        st = KEEL_ERR_UNSUPPORTED;
    }
    if (st == KEEL_OK) {
        st = measure(&c, a, text, n);
    }
    free(text);
    free(data);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct perplexity_args, field)
static const struct arg_option options[] = {
    OPTION_MODEL,
    { .name = "--file", .brief = "-f", .type = ARG_STR, .offset = AT(file), .value = "FILE", .needed = true,
      .help = "UTF-8 text; - is standard input" },
    { .name = "--ctx", .type = ARG_U32, .offset = OPT_COMMON(ctx), .value = "N", .def = "512", .min = 2, .max = 1 << 24,
      .help = "tokens of a window, its BOS included" },
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print {\"ppl\", \"nll\", \"stderr\", \"n_tokens\", ...}" },
    OPTION_LORA,
    OPTION_STEER,
    { .name = "--batch-tokens", .type = ARG_U32, .offset = OPT_COMMON(batch_tokens), .value = "N", .def = "256", .min = 1,
      .max = 65536, .help = "tokens a pass takes at once" },
    OPTION_KV,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_perplexity = {
    .name = "perplexity", .summary = "perplexity of a text", .usage = "-m MODEL --file F [--ctx N] [--json]",
    .notes = "The text is cut into windows of N-1 tokens that do not overlap; each begins with BOS and every text token is scored,\n"
             "those of a shorter last window too. The error is the standard error over tokens, taken as independent.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct perplexity_args),
    .run = perplexity_run,
};
