// SPDX-License-Identifier: MIT
// cli/cmd_geometry.c: dimensions of a shift of activations, angles between directions, norms of what an adapter adds.
#include "cli.h"
#include "commands.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct geometry_args {
    struct common common;
    const char *adapter, *data, *first, *second, *positions, *layers;
    bool json;
};

// --- what an adapter adds ------------------------------------------------------------------------

static keel_status adapter(const struct context *c, const struct geometry_args *a, json_t *list)
{
    struct keel_delta *delta;
    size_t n, len;
    double scale = 1;
    char *path = args_split_number(a->adapter, &len, &scale) ? strndup(a->adapter, len) : NULL;
    const keel_status st = path ? keel_geometry_adapter(&delta, &n, c->model, path, (float)scale) : KEEL_ERR_ARG;
    if (st == KEEL_OK && !a->json) {
        printf("layer  module        rank  |dW| Frobenius  |dW| spectral  stable rank\n");
    }
    for (size_t i = 0; st == KEEL_OK && i < n; i++) {
        if (!a->json) {
            printf("%5u  %-12s %5u %15.6g %14.6g %12.3f\n", delta[i].layer, delta[i].module, delta[i].rank, delta[i].frobenius, delta[i].spectral,
                   delta[i].stable_rank);
        }
        json_array_append_new(list, json_pack("{s:i, s:s, s:i, s:f, s:f, s:f}", "layer", (int)delta[i].layer, "module", delta[i].module, "rank",
                                              (int)delta[i].rank, "frobenius", delta[i].frobenius, "spectral", delta[i].spectral,
                                              "stable_rank", delta[i].stable_rank));
    }
    if (st == KEEL_OK) {
        free(delta);
    }
    free(path);
    return st;
}

// --- shift of activations ------------------------------------------------------------------------

static keel_status capture(struct context *c, const struct geometry_args *a, struct keel_steer_rows *rows,
                           const struct keel_capture_params *p, struct keel_capture *out)
{
    struct progress progress = { .what = "capture", .unit = "tokens", .off = a->common.quiet };
    const keel_status st = keel_capture_run(out, c->session, rows, p, progress_tokens, &progress);
    progress_end(&progress);
    return st;
}

static void print_shift(const struct geometry_args *a, const struct keel_shift_geometry *g, uint32_t n, json_t *list)
{
    if (!a->json) {
        printf("layer  components for 50/80/90/95 %%  participation  mean shift  %% of median norm\n");
    }
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t *k = g[i].components;
        if (!a->json) {
            printf("%5u  %7u %6u %6u %6u %14.3f %11.4g %17.3g\n", g[i].layer, k[0], k[1], k[2], k[3], g[i].participation, g[i].mean_shift,
                   100 * g[i].mean_shift / g[i].median_norm);
        }
        json_array_append_new(list, json_pack("{s:i, s:[i, i, i, i], s:f, s:f, s:f}", "layer", (int)g[i].layer, "components", (int)k[0], (int)k[1],
                                              (int)k[2], (int)k[3], "participation", g[i].participation, "mean_shift", g[i].mean_shift,
                                              "median_norm", g[i].median_norm));
    }
}

static keel_status shift(struct context *c, const struct geometry_args *a, struct keel_steer_rows *rows, json_t *list)
{
    struct keel_capture before = { 0 }, after = { 0 };
    struct keel_shift_geometry *g = NULL;
    const uint32_t n = keel_model_info(c->model)->n_layers;
    uint8_t *layers = calloc(n, 1);
    struct keel_capture_params p = { .site = KEEL_SITE_POST, .layers = layers };
    double scale = 1;
    size_t len;
    char *path = args_split_number(a->adapter, &len, &scale) ? strndup(a->adapter, len) : NULL;
    keel_status st = !path ? KEEL_ERR_ARG : layers ? keel_layers_parse(a->layers, layers, n, &c->log) : KEEL_ERR_NO_MEMORY;
    p.at.kind = rows->n_responses == rows->n ? KEEL_AT_RESPONSE : KEEL_AT_LAST_PROMPT;
    if (st == KEEL_OK && a->positions) {
        st = keel_positions_parse(a->positions, &p.at, &c->log);
    }
    if (st == KEEL_OK) {
        st = context_open_session(c, &a->common, a->common.ctx ? a->common.ctx : rows->longest + 1);
    }
    if (st == KEEL_OK) {
        st = capture(c, a, rows, &p, &before);
    }
    if (st == KEEL_OK) {
        st = keel_session_add_adapter(c->session, path, (float)scale);
    }
    if (st == KEEL_OK) {
        st = capture(c, a, rows, &p, &after);
    }
    if (st == KEEL_OK) {
        g = calloc(after.n_layers, sizeof *g);
        st = g ? keel_geometry_shift(g, &after, &before, &c->log) : KEEL_ERR_NO_MEMORY;
    }
    if (st == KEEL_OK) {
        print_shift(a, g, after.n_layers, list);
    }
    keel_capture_finish(&before);
    keel_capture_finish(&after);
    free(g);
    free(layers);
    free(path);
    return st;
}

// --- angles --------------------------------------------------------------------------------------

static keel_status angles_of_layer(const struct context *c, const struct geometry_args *a, const struct keel_direction *x,
                                   const struct keel_direction *y, uint32_t width, json_t *list)
{
    const uint32_t n = x->k < y->k ? x->k : y->k;
    double *cosines = calloc(n, sizeof *cosines), overlap;
    keel_status st = cosines ? keel_geometry_overlap(x, y, width, cosines, &overlap, &c->log) : KEEL_ERR_NO_MEMORY;
    if (st == KEEL_OK) {
        const double random = (double)(x->k > y->k ? x->k : y->k) / width;
        json_t *all = json_array();
        for (uint32_t i = 0; i < n; i++) {
            json_array_append_new(all, json_real(cosines[i]));
        }
        if (!a->json) {
            printf("%5u %8.4f %13.4f %15.4f %13.4f\n", x->layer, overlap, random, cosines[0], cosines[n - 1]);
        }
        json_array_append_new(list, json_pack("{s:i, s:f, s:f, s:o}", "layer", (int)x->layer, "overlap", overlap, "random", random, "cosines", all));
    }
    free(cosines);
    return st;
}

static keel_status angles(const struct context *c, const struct geometry_args *a, json_t *list)
{
    struct keel_directions x = { 0 }, y = { 0 };
    keel_status st = keel_directions_read(&x, a->first, &c->log);
    if (st == KEEL_OK) {
        st = keel_directions_read(&y, a->second, &c->log);
    }
    if (st == KEEL_OK && x.width != y.width) {
        say(c, KEEL_LOG_ERROR, "%s has directions of width %u, %s of %u: no angles between them", a->first, x.width, a->second, y.width);
        st = KEEL_ERR_MISMATCH;
    }
    if (st == KEEL_OK && !a->json) {
        printf("layer  overlap  of random ones  largest cosine  smallest\n");
    }
    for (uint32_t i = 0, j = 0; st == KEEL_OK && i < x.n && j < y.n;) {
        if (x.at[i].layer == y.at[j].layer) {
            st = angles_of_layer(c, a, &x.at[i++], &y.at[j++], x.width, list);
        } else if (x.at[i].layer < y.at[j].layer) {
            i++;
        } else {
            j++;
        }
    }
    keel_directions_finish(&x);
    keel_directions_finish(&y);
    return st;
}

// --- the command ---------------------------------------------------------------------------------

static int geometry_run(const void *args)
{
    const struct geometry_args *a = args;
    struct context c = { .log = cli_log(&a->common) };
    struct keel_steer_rows rows = { 0 };
    json_t *list = json_array();
    keel_status st = KEEL_OK;
    if (!a->first != !a->second || !a->first == !a->adapter || (a->data && !a->adapter) || (a->adapter && !a->common.model)) {
        say(&c, KEEL_LOG_ERROR, "give -m M --adapter A, or -m M --adapter A --data F, or --direction V --other W");
        st = KEEL_ERR_ARG;
    } else if (a->first) {
        st = angles(&c, a, list);
    } else {
        st = context_open_model(&c, &a->common);
        if (st == KEEL_OK && a->data) {
            st = keel_steer_rows_read(&rows, c.model, c.images, a->data, &c.log);
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
            st = a->data ? shift(&c, a, &rows, list) : adapter(&c, a, list);
        }
    }
    if (st == KEEL_OK && a->json) {
        print_json(stdout, json_pack("{s:O}", "layers", list));
    }
    json_decref(list);
    keel_steer_rows_finish(&rows);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct geometry_args, field)
static const struct arg_option options[] = {
    { .name = "--model", .brief = "-m", .type = ARG_STR, .offset = OPT_COMMON(model), .value = "MODEL", .help = "model; not for --direction" },
    OPTION_TYPE,
    { .name = "--adapter", .type = ARG_STR, .offset = AT(adapter), .value = "A[:SCALE]",
      .help = "norms and stable rank of what it adds to each matrix" },
    { .name = "--data", .type = ARG_STR, .offset = AT(data), .value = "F",
      .help = "JSONL rows: with --adapter, dimensions of the shift of their activations" },
    { .name = "--direction", .type = ARG_STR, .offset = AT(first), .value = "V", .help = "principal angles between these directions ..." },
    { .name = "--other", .type = ARG_STR, .offset = AT(second), .value = "W", .help = "... and these, layer by layer" },
    { .name = "--positions", .type = ARG_STR, .offset = AT(positions), .value = "P",
      .help = "all, prompt, response, last_prompt, first:K or image; without it the response, or last_prompt if a row has none" },
    { .name = "--layers", .type = ARG_STR, .offset = AT(layers), .value = "L", .def = "all", .help = "3, 3-7, 1,4-6 or all" },
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print {\"layers\": [...]}" },
    OPTION_MMPROJ,
    OPTIONS_SESSION,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_geometry = {
    .name = "geometry", .summary = "dimensions and angles of shifts, directions and adapters",
    .usage = "-m MODEL --adapter A [--data F] | --direction V --other W",
    .notes = "Components and participation ratio are of the rows' differences as they are, their mean included (docs/steering.md).",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct geometry_args), .run = geometry_run,
};
