// SPDX-License-Identifier: MIT
// cli/cmd_capture.c: activations of a data set to a file, and projections of a data set on directions.
#include "cli.h"
#include "commands.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct capture_args {
    struct common common;
    const char *data, *out, *layers, *positions, *site, *raw, *direction;
    bool covariance, f16;
};


// Model, rows, their images, session.
static keel_status open_all(struct context *c, const struct capture_args *a, struct keel_steer_rows *rows)
{
    keel_status st = context_open_model(c, &a->common);
    if (st == KEEL_OK) {
        st = keel_steer_rows_read(rows, c->model, c->images, a->data, &c->log);
    }
    if (st == KEEL_OK) {
        st = context_open_device(c, &a->common);
    }
    if (st == KEEL_OK) {
        st = context_encode_images(c, &a->common);
    }
    if (st == KEEL_OK) {
        st = keel_model_load(c->model, c->dev);
    }
    if (st == KEEL_OK) {
        st = context_open_session(c, &a->common, a->common.ctx ? a->common.ctx : rows->longest + 1);
    }
    return st;
}

static int capture_run(const void *args)
{
    const struct capture_args *a = args;
    struct context c = { 0 };
    struct keel_steer_rows rows = { 0 };
    struct keel_capture capture = { 0 };
    struct keel_capture_params p = { .covariance = a->covariance, .raw = a->raw, .raw_f16 = a->f16 };
    struct progress progress = { .what = "capture", .unit = "tokens", .off = a->common.quiet };
    uint8_t *layers = NULL;
    keel_status st = open_all(&c, a, &rows);
    if (st == KEEL_OK) {
        st = context_site(&c, a->site, a->layers, &p, &layers);
    }
    if (st == KEEL_OK) {
        st = context_positions(&c, a->positions, rows.n_responses == rows.n, &p);
    }
    if (st == KEEL_OK) {
        p.hooks = c.hooks;
        st = keel_capture_run(&capture, c.session, &rows, &p, progress_tokens, &progress);
        progress_end(&progress);
    }
    if (st == KEEL_OK) {
        st = keel_capture_write(&capture, &rows, c.model, &p, a->out);
    }
    if (st == KEEL_OK) {
        say(&c, KEEL_LOG_INFO, "%s: %llu tokens of %zu rows at %u layers", a->out, (unsigned long long)capture.n_tokens, rows.n,
            capture.n_layers);
    }
    keel_capture_finish(&capture);
    keel_steer_rows_finish(&rows);
    free(layers);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct capture_args, field)
#define OPTION_POSITIONS                                                                                               \
    { .name = "--positions", .type = ARG_STR, .offset = AT(positions), .value = "P",                                   \
      .help = "all, prompt, response, last_prompt, first:K or image; without it the response, or last_prompt if a row has none" }
#define OPTION_ROWS                                                                                                    \
    { .name = "--data", .type = ARG_STR, .offset = AT(data), .file = ARG_IN, .value = "IN.jsonl", .needed = true,                      \
      .help = "rows {\"prompt\" or \"messages\", \"completion\"?, \"images\"?, \"id\"?}" }
static const struct arg_option capture_options[] = {
    OPTION_MODEL,
    OPTION_ROWS,
    { .name = "--out", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT, .value = "F.safetensors", .needed = true,
      .help = "sums and row means: mean.L, var.L, abs.L, rows.L, row_tokens, logprob" },
    { .name = "--layers", .type = ARG_STR, .offset = AT(layers), .value = "L", .def = "all", .help = "3, 3-7, 1,4-6 or all" },
    OPTION_POSITIONS,
    { .name = "--site", .type = ARG_STR, .offset = AT(site), .value = "S", .def = "post", .choice = keel_site_name,
      .help = "residual stream before (pre) or after (post) a layer, or what attention (attn) or the MLP (mlp) adds to it; "
              "tower.pre and so on: the same of the vision tower, for rows with images" },
    { .name = "--covariance", .type = ARG_FLAG, .offset = AT(covariance), .help = "also cov.L, added up on the device" },
    { .name = "--raw", .type = ARG_STR, .offset = AT(raw), .file = ARG_OUT, .value = "F.safetensors",
      .help = "also every captured token: hidden.L, row, position, token, and the texts" },
    { .name = "--f16", .needs = "--raw", .type = ARG_FLAG, .offset = AT(f16), .help = "--raw as F16; Gemma's largest channels may not fit it" },
    OPTION_LORA,
    OPTION_STEER,
    OPTIONS_IMAGES,
    OPTIONS_SESSION,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_capture = {
    .name = "capture", .summary = "activations of a data set", .usage = "-m MODEL --data IN.jsonl --out F.safetensors [--raw F]",
    .options = capture_options, .n_options = sizeof capture_options / sizeof capture_options[0],
    .args_bytes = sizeof(struct capture_args), .run = capture_run,
};

// --- project -------------------------------------------------------------------------------------

static json_t *projection_json(const struct keel_directions *d, const double *mean, uint32_t max_k)
{
    json_t *o = json_object();
    for (uint32_t i = 0; i < d->n; i++) {
        char layer[16];
        json_t *list = json_array();
        snprintf(layer, sizeof layer, "%u", d->at[i].layer);
        for (uint32_t j = 0; j < d->at[i].k; j++) {
            json_array_append_new(list, json_real(mean[i * max_k + j]));
        }
        json_object_set_new(o, layer, d->at[i].k == 1 ? json_incref(json_array_get(list, 0)) : json_incref(list));
        json_decref(list);
    }
    return o;
}

static keel_status project(struct context *c, const struct capture_args *a, struct keel_steer_rows *rows,
                           const struct keel_directions *d, struct out_file *out)
{
    struct progress progress = { .what = "project", .unit = "tokens", .off = a->common.quiet };
    struct keel_capture_params p = { .site = d->site };
    uint32_t max_k = 1;
    for (uint32_t i = 0; i < d->n; i++) {
        max_k = d->at[i].k > max_k ? d->at[i].k : max_k;
    }
    double *mean = calloc(rows->n * d->n * max_k, sizeof *mean);
    keel_status st = mean ? context_positions(c, a->positions, rows->n_responses == rows->n, &p) : KEEL_ERR_NO_MEMORY;
    if (st == KEEL_OK) {
        st = keel_steer_project(c->session, rows, d, p.at, c->hooks, mean, max_k, progress_tokens, &progress);
        progress_end(&progress);
    }
    for (size_t i = 0; st == KEEL_OK && i < rows->n; i++) {
        json_t *o = json_object();
        json_object_set_new(o, "id", json_loads(rows->id[i], JSON_DECODE_ANY, NULL));
        json_object_set_new(o, "projection", projection_json(d, mean + i * d->n * max_k, max_k));
        print_json(out->f, o);
    }
    free(mean);
    return st == KEEL_OK && !out_commit(out) ? KEEL_ERR_IO : st;
}

static int project_run(const void *args)
{
    const struct capture_args *a = args;
    struct context c = { 0 };
    struct keel_steer_rows rows = { 0 };
    struct keel_directions d = { 0 };
    struct out_file out = { 0 };
    keel_status st = open_all(&c, a, &rows);
    if (st == KEEL_OK) {
        st = keel_directions_read(&d, a->direction, &c.log);
    }
    if (st == KEEL_OK && !out_open(&out, a->out)) {
        st = KEEL_ERR_IO;
    }
    if (st == KEEL_OK) {
        st = project(&c, a, &rows, &d, &out);
    }
    out_abort(&out);
    keel_directions_finish(&d);
    keel_steer_rows_finish(&rows);
    return context_close(&c, st);
}

static const struct arg_option project_options[] = {
    OPTION_MODEL,
    { .name = "--direction", .type = ARG_STR, .offset = AT(direction), .file = ARG_IN, .value = "V", .needed = true,
      .help = "control vector (.gguf) or directions (.safetensors)" },
    OPTION_ROWS,
    { .name = "--out", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT, .value = "OUT.jsonl", .def = "-",
      .help = "rows {\"id\", \"projection\": {LAYER: mean over the positions}}; - is standard output" },
    OPTION_POSITIONS,
    OPTION_LORA,
    OPTION_STEER,
    OPTIONS_IMAGES,
    OPTIONS_SESSION,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_project = {
    .name = "project", .summary = "projections of a data set on directions", .usage = "-m MODEL --direction V --data IN.jsonl --out OUT.jsonl",
    .notes = "Projections are on unit directions, in units of the activations.",
    .options = project_options, .n_options = sizeof project_options / sizeof project_options[0],
    .args_bytes = sizeof(struct capture_args), .run = project_run,
};
