// SPDX-License-Identifier: MIT
// cli/cmd_geometry.c: dimensions of shifts of activations, angles between them and between directions, linear probes, what adapters
// add to the weights.
#include "cli.h"
#include "commands.h"
#include "geometry.h"

#include <keel/study.h>

#include <stdlib.h>
#include <string.h>

struct geometry_args {
    struct common common;
    struct arg_list adapter, data, positive, negative;
    const char *first, *second, *positions, *layers, *site, *out;
    uint32_t k;
    uint64_t seed;
    bool probe, json;
};


// Everything that is run through the model.
struct inputs {
    struct keel_steer_rows *data, *positive, *negative;  // as many as the lists of the arguments
    struct keel_capture *before, *after, *high, *low;    // of data; of data under each adapter, [adapters × data]; of the two classes
    struct keel_directions *spaces;                      // [adapters × data]
    char **name;                                         // [adapters × data] "ADAPTER on DATA"
    size_t n_shifts;
};

// --- what adapters add ---------------------------------------------------------------------------

static char *split_scale(const char *word, double *scale)
{
    size_t len;
    *scale = 1;
    return args_split_number(word, &len, scale) ? strndup(word, len) : NULL;
}

static keel_status adapter(const struct context *c, const char *word, json_t *list)
{
    struct keel_delta *delta = NULL;
    size_t n = 0;
    double scale;
    char *path = split_scale(word, &scale);
    json_t *layers = json_array();
    const keel_status st = path ? keel_geometry_adapter(&delta, &n, c->model, path, (float)scale) : KEEL_ERR_ARG;
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(layers, json_pack("{s:i, s:s, s:i, s:f, s:f, s:f, s:f}", "layer", (int)delta[i].layer, "module", delta[i].module,
                                                "rank", (int)delta[i].rank, "frobenius", delta[i].frobenius, "relative",
                                                delta[i].base > 0 ? delta[i].frobenius / delta[i].base : 0, "spectral", delta[i].spectral,
                                                "stable_rank", delta[i].stable_rank));
    }
    json_array_append_new(list, json_pack("{s:s, s:o}", "adapter", word, "layers", layers));
    free(delta);
    free(path);
    return st;
}

static keel_status overlap(const struct context *c, const char *first, const char *second, json_t *list)
{
    struct keel_delta_overlap *o = NULL;
    size_t n = 0;
    double scale[2]; // its sign says where they point
    char *a = split_scale(first, &scale[0]), *b = split_scale(second, &scale[1]);
    json_t *layers = json_array();
    const keel_status st = a && b ? keel_geometry_adapters(&o, &n, c->model, a, b, (const float[]){ (float)scale[0], (float)scale[1] }) : KEEL_ERR_ARG;
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(layers, json_pack("{s:i, s:s, s:[i, i], s:f, s:f, s:f, s:f, s:f}", "layer", (int)o[i].layer, "module", o[i].module,
                                                "rank", (int)o[i].rank[0], (int)o[i].rank[1], "cosine",
                                                o[i].cosine, "in", o[i].in, "random_in", o[i].random_in, "out", o[i].out, "random_out",
                                                o[i].random_out));
    }
    json_array_append_new(list, json_pack("{s:[s, s], s:o}", "of", first, second, "layers", layers));
    free(o);
    free(a);
    free(b);
    return st;
}

static keel_status weights(const struct context *c, const struct arg_list *adapters, json_t *result)
{
    json_t *norms = json_array(), *pairs = json_array();
    keel_status st = KEEL_OK;
    json_object_set_new(result, "adapters", norms);
    json_object_set_new(result, "overlaps", pairs);
    for (size_t i = 0; st == KEEL_OK && i < adapters->n; i++) {
        st = adapter(c, adapters->at[i], norms);
        for (size_t j = 0; st == KEEL_OK && j < i; j++) {
            st = overlap(c, adapters->at[j], adapters->at[i], pairs);
        }
    }
    return st;
}

// --- angles --------------------------------------------------------------------------------------

static keel_status angles_of_layer(const struct context *c, const struct keel_direction *x, const struct keel_direction *y, uint32_t width,
                                   json_t *list)
{
    uint32_t rank[2];
    double *cosines = calloc(x->k < y->k ? x->k : y->k, sizeof *cosines), value;
    const keel_status st = cosines ? keel_geometry_overlap(x, y, width, cosines, &value, rank, &c->log) : KEEL_ERR_NO_MEMORY;
    if (st == KEEL_OK) {
        json_t *all = json_array();
        for (uint32_t i = 0; i < rank[0] && i < rank[1]; i++) {
            json_array_append_new(all, json_real(cosines[i]));
        }
        json_array_append_new(list, json_pack("{s:i, s:[i, i], s:f, s:f, s:o}", "layer", (int)x->layer, "rank", (int)rank[0], (int)rank[1],
                                              "overlap", value, "random", (double)(rank[0] > rank[1] ? rank[0] : rank[1]) / width,
                                              "cosines", all));
    }
    free(cosines);
    return st;
}

// Layers that both have.
static keel_status angles(const struct context *c, const struct keel_directions *x, const struct keel_directions *y, const char *first,
                          const char *second, json_t *list)
{
    keel_status st = KEEL_OK;
    json_t *layers = json_array();
    for (uint32_t i = 0, j = 0; st == KEEL_OK && i < x->n && j < y->n;) {
        if (x->at[i].layer == y->at[j].layer) {
            st = angles_of_layer(c, &x->at[i++], &y->at[j++], x->width, layers);
        } else if (x->at[i].layer < y->at[j].layer) {
            i++;
        } else {
            j++;
        }
    }
    json_array_append_new(list, json_pack("{s:[s, s], s:o}", "of", first, second, "layers", layers));
    return st;
}

static keel_status angles_of_files(const struct context *c, const struct geometry_args *a, json_t *result)
{
    struct keel_directions x = { 0 }, y = { 0 };
    json_t *list = json_array();
    keel_status st = keel_directions_read(&x, a->first, &c->log);
    json_object_set_new(result, "angles", list);
    if (st == KEEL_OK) {
        st = keel_directions_read(&y, a->second, &c->log);
    }
    if (st == KEEL_OK && x.width != y.width) {
        say(c, KEEL_LOG_ERROR, "%s has directions of width %u, %s of %u: no angles between them", a->first, x.width, a->second, y.width);
        st = KEEL_ERR_MISMATCH;
    }
    if (st == KEEL_OK) {
        st = angles(c, &x, &y, a->first, a->second, list);
    }
    keel_directions_finish(&x);
    keel_directions_finish(&y);
    return st;
}

// --- captures ------------------------------------------------------------------------------------

static keel_status capture(struct context *c, const struct geometry_args *a, struct keel_steer_rows *rows,
                           const struct keel_capture_params *p, struct keel_capture *out)
{
    struct progress progress = { .what = "capture", .unit = "tokens", .off = a->common.quiet };
    const keel_status st = keel_capture_run(out, c->session, rows, p, progress_tokens, &progress);
    progress_end(&progress);
    return st;
}

static keel_status capture_adapter(struct context *c, const struct geometry_args *a, struct inputs *in, size_t i,
                                   const struct keel_capture_params *p)
{
    double scale;
    char *path = split_scale(a->adapter.at[i], &scale);
    keel_status st = path ? keel_session_add_adapter(c->session, path, (float)scale) : KEEL_ERR_ARG;
    for (size_t k = 0; st == KEEL_OK && k < a->data.n; k++) {
        st = capture(c, a, &in->data[k], p, &in->after[i * a->data.n + k]);
    }
    keel_session_clear_adapters(c->session);
    free(path);
    return st;
}

static keel_status capture_all(struct context *c, const struct geometry_args *a, struct inputs *in, const struct keel_capture_params *p)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; st == KEEL_OK && i < a->data.n; i++) {
        st = capture(c, a, &in->data[i], p, &in->before[i]);
    }
    for (size_t i = 0; st == KEEL_OK && i < a->positive.n; i++) {
        st = capture(c, a, &in->positive[i], p, &in->high[i]);
        if (st == KEEL_OK) {
            st = capture(c, a, &in->negative[i], p, &in->low[i]);
        }
    }
    for (size_t i = 0; st == KEEL_OK && a->data.n > 0 && i < a->adapter.n; i++) {
        st = capture_adapter(c, a, in, i, p);
    }
    return st;
}

// --- shifts --------------------------------------------------------------------------------------

static json_t *shift_layer(const struct keel_shift_geometry *g)
{
    json_t *massive = json_array(), *scree = json_array();
    const uint32_t *k = g->components;
    for (uint32_t i = 0; i < g->n_massive && i < sizeof g->massive / sizeof g->massive[0]; i++) {
        json_array_append_new(massive, json_integer(g->massive[i]));
    }
    for (uint32_t i = 0; i < KEEL_SCREE && g->scree[i] > 0; i++) {
        json_array_append_new(scree, json_real(g->scree[i]));
    }
    return json_pack("{s:i, s:[i, i, i, i], s:f, s:f, s:f, s:o, s:i, s:o}", "layer", (int)g->layer, "components", (int)k[0], (int)k[1], (int)k[2],
                     (int)k[3], "participation", g->participation, "mean_shift", g->mean_shift, "median_norm", g->median_norm, "massive", massive,
                     "n_massive", (int)g->n_massive, "scree", scree);
}

static keel_status shifts(const struct context *c, const struct geometry_args *a, struct inputs *in, json_t *result)
{
    json_t *list = json_array(), *pairs = json_array();
    keel_status st = KEEL_OK;
    json_object_set_new(result, "shifts", list);
    json_object_set_new(result, "angles", pairs);
    for (size_t i = 0; st == KEEL_OK && i < in->n_shifts; i++) {
        const struct keel_capture *after = &in->after[i];
        struct keel_shift_geometry *g = calloc(after->n_layers, sizeof *g);
        json_t *layers = json_array();
        st = g ? keel_geometry_shift(g, &in->spaces[i], a->k, after, &in->before[i % a->data.n], &c->log) : KEEL_ERR_NO_MEMORY;
        for (uint32_t k = 0; st == KEEL_OK && k < after->n_layers; k++) {
            json_array_append_new(layers, shift_layer(&g[k]));
        }
        json_array_append_new(list, json_pack("{s:s, s:s, s:i, s:o}", "adapter", a->adapter.at[i / a->data.n], "data", a->data.at[i % a->data.n],
                                              "rows", (int)after->n_rows, "layers", layers));
        for (size_t j = 0; st == KEEL_OK && j < i; j++) {
            st = angles(c, &in->spaces[j], &in->spaces[i], in->name[j], in->name[i], pairs);
        }
        free(g);
    }
    return st;
}

// --- probes --------------------------------------------------------------------------------------

static json_t *probe_layer(const struct keel_probe_layer *l, size_t n)
{
    json_t *auc = json_array(), *shuffled = json_array();
    for (size_t i = 0; i < n; i++) {
        json_t *row = json_array();
        for (size_t j = 0; j < n; j++) {
            json_array_append_new(row, json_real(l->auc[i * n + j]));
        }
        json_array_append_new(auc, row);
        json_array_append_new(shuffled, json_real(l->shuffled[i]));
    }
    return json_pack("{s:i, s:o, s:o}", "layer", (int)l->layer, "auc", auc, "shuffled", shuffled);
}

static keel_status probes(const struct context *c, const struct geometry_args *a, struct inputs *in, json_t *result)
{
    struct keel_probe_set set[KEEL_MAX_PROBE_SETS];
    json_t *names = json_array(), *layers = json_array();
    const size_t n_shifts = a->probe ? in->n_shifts : 0, n = n_shifts + a->positive.n;
    keel_status st = KEEL_OK;
    json_object_set_new(result, "probes", json_pack("{s:o, s:o}", "sets", names, "layers", layers));
    if (n > KEEL_MAX_PROBE_SETS) {
        say(c, KEEL_LOG_ERROR, "probes between %zu sets of rows; the most are %u", n, KEEL_MAX_PROBE_SETS);
        return KEEL_ERR_ARG;
    }
    for (size_t i = 0; i < n_shifts; i++) {
        set[i] = (struct keel_probe_set){ &in->after[i], &in->before[i % a->data.n] };
        json_array_append_new(names, json_string(in->name[i]));
    }
    for (size_t i = n_shifts; i < n; i++) {
        set[i] = (struct keel_probe_set){ &in->high[i - n_shifts], &in->low[i - n_shifts] };
        json_array_append_new(names, json_sprintf("%s against %s", a->positive.at[i - n_shifts], a->negative.at[i - n_shifts]));
    }
    struct keel_probe_layer *l = calloc(set[0].positive->n_layers, sizeof *l);
    st = l ? keel_geometry_probe(l, set, n, a->seed, &c->log) : KEEL_ERR_NO_MEMORY;
    for (uint32_t k = 0; st == KEEL_OK && k < set[0].positive->n_layers; k++) {
        json_array_append_new(layers, probe_layer(&l[k], n));
    }
    free(l);
    return st;
}

// --- the command ---------------------------------------------------------------------------------

static keel_status inputs_make(struct inputs *in, const struct geometry_args *a)
{
    in->n_shifts = a->adapter.n * a->data.n;
    in->data = calloc(a->data.n + 1, sizeof *in->data);
    in->before = calloc(a->data.n + 1, sizeof *in->before);
    in->after = calloc(in->n_shifts + 1, sizeof *in->after);
    in->spaces = calloc(in->n_shifts + 1, sizeof *in->spaces);
    in->name = calloc(in->n_shifts + 1, sizeof *in->name);
    in->positive = calloc(a->positive.n + 1, sizeof *in->positive);
    in->negative = calloc(a->positive.n + 1, sizeof *in->negative);
    in->high = calloc(a->positive.n + 1, sizeof *in->high);
    in->low = calloc(a->positive.n + 1, sizeof *in->low);
    if (!in->data || !in->before || !in->after || !in->spaces || !in->name || !in->positive || !in->negative || !in->high || !in->low) {
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < in->n_shifts; i++) {
        const char *adapter = a->adapter.at[i / a->data.n], *data = a->data.at[i % a->data.n];
        in->name[i] = malloc(strlen(adapter) + strlen(data) + 5);
        if (!in->name[i]) {
            return KEEL_ERR_NO_MEMORY;
        }
        sprintf(in->name[i], "%s on %s", adapter, data);
    }
    return KEEL_OK;
}

static void inputs_finish(struct inputs *in, const struct geometry_args *a)
{
    for (size_t i = 0; in->data && in->before && i < a->data.n; i++) {
        keel_steer_rows_finish(&in->data[i]);
        keel_capture_finish(&in->before[i]);
    }
    for (size_t i = 0; in->after && in->spaces && in->name && i < in->n_shifts; i++) {
        keel_capture_finish(&in->after[i]);
        keel_directions_finish(&in->spaces[i]);
        free(in->name[i]);
    }
    for (size_t i = 0; in->positive && in->negative && in->high && in->low && i < a->positive.n; i++) {
        keel_steer_rows_finish(&in->positive[i]);
        keel_steer_rows_finish(&in->negative[i]);
        keel_capture_finish(&in->high[i]);
        keel_capture_finish(&in->low[i]);
    }
    void *const all[] = { in->data, in->before, in->after, in->spaces, in->name, in->positive, in->negative, in->high, in->low };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

// Reads a list of files; *longest and *responses go on from what they are.
static keel_status read_rows(struct context *c, const struct arg_list *files, struct keel_steer_rows *rows, uint32_t *longest, bool *responses)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; st == KEEL_OK && i < files->n; i++) {
        st = keel_steer_rows_read(&rows[i], c->model, c->images, files->at[i], &c->log);
        *longest = rows[i].longest > *longest ? rows[i].longest : *longest;
        *responses = *responses && rows[i].n_responses == rows[i].n;
    }
    return st;
}

static keel_status load(struct context *c, const struct geometry_args *a)
{
    keel_status st = context_open_device(c, &a->common);
    if (st == KEEL_OK) {
        st = context_encode_images(c, &a->common);
    }
    return st == KEEL_OK ? keel_model_load(c->model, c->dev) : st;
}

static keel_status activations(struct context *c, const struct geometry_args *a, struct inputs *in, uint32_t longest, bool responses,
                               json_t *result)
{
    uint8_t *layers = NULL;
    struct keel_capture_params p = { 0 };
    keel_status st = context_site(c, a->site, a->layers, &p, &layers);
    if (st == KEEL_OK) {
        st = context_positions(c, a->positions, responses, &p);
    }
    if (st == KEEL_OK) {
        st = context_open_session(c, &a->common, a->common.ctx ? a->common.ctx : longest + 1);
    }
    if (st == KEEL_OK) {
        st = capture_all(c, a, in, &p);
    }
    if (st == KEEL_OK && in->n_shifts > 0) {
        st = shifts(c, a, in, result);
    }
    if (st == KEEL_OK && (a->probe || a->positive.n > 0)) {
        st = probes(c, a, in, result);
    }
    free(layers);
    return st;
}

static keel_status with_model(struct context *c, const struct geometry_args *a, json_t *result)
{
    struct inputs in = { 0 };
    uint32_t longest = 0;
    bool responses = true;
    keel_status st = inputs_make(&in, a);
    if (st == KEEL_OK) {
        st = context_open_model(c, &a->common);
    }
    if (st == KEEL_OK) {
        st = read_rows(c, &a->data, in.data, &longest, &responses);
    }
    if (st == KEEL_OK) {
        st = read_rows(c, &a->positive, in.positive, &longest, &responses);
    }
    if (st == KEEL_OK) {
        st = read_rows(c, &a->negative, in.negative, &longest, &responses);
    }
    if (st == KEEL_OK) {
        st = load(c, a);
    }
    if (st == KEEL_OK) {
        st = weights(c, &a->adapter, result);
    }
    if (st == KEEL_OK && longest > 0) {
        st = activations(c, a, &in, longest, responses, result);
    }
    inputs_finish(&in, a);
    return st;
}

static bool sensible(const struct context *c, const struct geometry_args *a)
{
    const bool files = a->first || a->second, model = a->adapter.n > 0 || a->positive.n > 0;
    if (files == model || !a->first != !a->second || (files && (a->data.n > 0 || a->negative.n > 0))) {
        say(c, KEEL_LOG_ERROR, "give -m M --adapter A, with --data F for the activations, or -m M --positive F --negative G, or --direction V "
            "--other W");
    } else if (model && !a->common.model) {
        say(c, KEEL_LOG_ERROR, "--adapter, --positive and --negative need a model: -m M");
    } else if (a->positive.n != a->negative.n) {
        say(c, KEEL_LOG_ERROR, "--positive and --negative belong together: there are %zu and %zu", a->positive.n, a->negative.n);
    } else if ((a->data.n > 0 || a->probe) && (a->adapter.n == 0 || a->data.n == 0)) {
        say(c, KEEL_LOG_ERROR, "--data and --probe are about what an adapter moves: give --adapter A and --data F");
    } else {
        return true;
    }
    return false;
}

static int geometry_run(const void *args)
{
    const struct geometry_args *a = args;
    struct context c = { .log = cli_log(&a->common) };
    json_t *result = json_object();
    keel_status st = !sensible(&c, a) ? KEEL_ERR_ARG : a->first ? angles_of_files(&c, a, result) : with_model(&c, a, result);
    if (st == KEEL_OK && a->out) {
        char *text = json_dumps(result, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
        st = text ? keel_geometry_write(text, a->out, &c.log) : KEEL_ERR_NO_MEMORY;
        free(text);
    }
    if (st == KEEL_OK && a->json) {
        print_json(stdout, json_incref(result));
    } else if (st == KEEL_OK) {
        geometry_print(result);
    }
    json_decref(result);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct geometry_args, field)
static const struct arg_option options[] = {
    { .name = "--model", .brief = "-m", .type = ARG_STR, .offset = OPT_COMMON(model), .file = ARG_IN, .value = "MODEL", .help = "model; not for --direction" },
    OPTION_TYPE,
    { .name = "--adapter", .type = ARG_LIST, .offset = AT(adapter), .file = ARG_IN, .value = "A[:SCALE]",
      .help = "norms and stable rank of what it adds to each matrix; of several also how they lie to each other" },
    { .name = "--data", .type = ARG_LIST, .offset = AT(data), .file = ARG_IN, .value = "F",
      .help = "JSONL rows: dimensions of the shift of their activations by each adapter; of several also the angles between shifts" },
    { .name = "--rank", .type = ARG_U32, .offset = AT(k), .value = "K", .def = "10", .min = 1, .max = 1024,
      .help = "leading directions of each shift that are compared" },
    { .name = "--probe", .type = ARG_FLAG, .offset = AT(probe),
      .help = "with --data: how well a linear probe tells activations with an adapter from those without, from each set to each" },
    { .name = "--positive", .type = ARG_LIST, .offset = AT(positive), .file = ARG_IN, .value = "F",
      .help = "JSONL rows of one class: probes that tell them from the rows of the other; several are trained on each and tested on all" },
    { .name = "--negative", .type = ARG_LIST, .offset = AT(negative), .file = ARG_IN, .value = "G", .help = "the other class, one for each --positive" },
    { .name = "--direction", .type = ARG_STR, .offset = AT(first), .file = ARG_IN, .value = "V", .help = "principal angles between these directions ..." },
    { .name = "--other", .type = ARG_STR, .offset = AT(second), .file = ARG_IN, .value = "W", .help = "... and these, layer by layer" },
    { .name = "--positions", .type = ARG_STR, .offset = AT(positions), .value = "P",
      .help = "all, prompt, response, last_prompt, first:K or image; without it the response, or last_prompt if a row has none" },
    { .name = "--layers", .type = ARG_STR, .offset = AT(layers), .value = "L", .def = "all", .help = "3, 3-7, 1,4-6 or all" },
    { .name = "--site", .type = ARG_STR, .offset = AT(site), .value = "S", .def = "post", .choice = keel_site_name,
      .help = "residual stream before (pre) or after (post) a layer, or what attention (attn) or the MLP (mlp) adds to it; "
              "tower.pre and so on: the same of the vision tower, for rows with images" },
    { .name = "--seed", .type = ARG_U64, .offset = AT(seed), .value = "N", .def = "1", .help = "of the shuffled labels" },
    { .name = "--out", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT_MADE, .value = "DIR", .help = "write geometry.json and plots there; keel report shows them" },
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print the result as JSON (docs/steering.md)" },
    OPTIONS_IMAGES,
    OPTIONS_SESSION,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_geometry = {
    .name = "geometry", .summary = "dimensions and angles of shifts, directions and adapters",
    .usage = "-m MODEL --adapter A... [--data F...] | -m MODEL --positive F --negative G | --direction V --other W",
    .notes = "Components and participation ratio are of the rows' differences as they are, their mean included (docs/steering.md).",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct geometry_args), .run = geometry_run,
};
