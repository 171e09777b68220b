// SPDX-License-Identifier: MIT
// cli/cmd_direction.c: directions between two sets of activations, with the checks that say whether they mean anything.
#include "cli.h"
#include "commands.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct direction_args {
    struct common common;
    const char *pairs, *positive, *negative, *data, *shift, *out, *method, *layers, *positions, *site, *benign;
    uint32_t k;
    uint64_t seed;
    bool json;
};

static const char *const methods[] = { "mean", "mean_z", "mean_mask", "lda", "probe", "pca_diff", "pca_center", "svd", NULL };

// What a direction is made of: rows of two classes, or one set of rows run twice.
struct sources {
    struct keel_steer_rows positive, negative, benign;
};

static keel_status read_sources(struct context *c, const struct direction_args *a, struct sources *s)
{
    const int given = (a->pairs != NULL) + (a->positive && a->negative) + (a->data && a->shift);
    keel_status st = KEEL_OK;
    if (given != 1 || !a->positive != !a->negative || !a->data != !a->shift) {
        say(c, KEEL_LOG_ERROR, "give one source: --pairs F, or --positive F and --negative F, or --data F and --shift ADAPTER");
        return KEEL_ERR_ARG;
    }
    if (a->pairs) {
        st = keel_steer_pairs_read(&s->positive, &s->negative, c->model, c->images, a->pairs, &c->log);
    } else if (a->data) {
        st = keel_steer_rows_read(&s->positive, c->model, c->images, a->data, &c->log);
    } else {
        st = keel_steer_rows_read(&s->positive, c->model, c->images, a->positive, &c->log);
        if (st == KEEL_OK) {
            st = keel_steer_rows_read(&s->negative, c->model, c->images, a->negative, &c->log);
        }
    }
    if (st == KEEL_OK && a->benign) {
        st = keel_steer_rows_read(&s->benign, c->model, c->images, a->benign, &c->log);
    }
    return st;
}

static keel_status add_shift(struct context *c, const char *text)
{
    double scale = 1;
    size_t len;
    char *path = args_split_number(text, &len, &scale) ? strndup(text, len) : NULL;
    const keel_status st = path ? keel_session_add_adapter(c->session, path, (float)scale) : KEEL_ERR_ARG;
    free(path);
    return st;
}

static keel_status capture(struct context *c, const struct direction_args *a, struct keel_steer_rows *rows,
                           const struct keel_capture_params *p, struct keel_capture *out)
{
    struct progress progress = { .what = "capture", .unit = "tokens", .off = a->common.quiet };
    struct keel_capture_params own = *p;
    keel_hooks *hooks = NULL; // a capture uses its list up: each has its own
    keel_status st = context_steer(c, &a->common, &hooks);
    own.hooks = hooks;
    if (st == KEEL_OK) {
        st = keel_capture_run(out, c->session, rows, &own, progress_tokens, &progress);
        progress_end(&progress);
    }
    keel_hooks_destroy(&hooks);
    return st;
}

// The negative side first: for a shift that is the model without the adapter.
static keel_status capture_both(struct context *c, const struct direction_args *a, struct sources *s, struct keel_capture_params *p,
                                struct keel_capture *pos, struct keel_capture *neg)
{
    const bool response = s->positive.n_responses == s->positive.n && s->negative.n_responses == s->negative.n;
    keel_status st = context_positions(c, a->positions, response, p);
    if (st == KEEL_OK) {
        st = capture(c, a, a->shift ? &s->positive : &s->negative, p, neg);
    }
    if (st == KEEL_OK && a->shift) {
        st = add_shift(c, a->shift);
    }
    if (st == KEEL_OK) {
        st = capture(c, a, &s->positive, p, pos);
    }
    return st;
}

// Mean KL(without ‖ with) at the benign rows' responses when one layer's direction is added at all tokens of the base model.
static keel_status benign_kl(struct context *c, const struct sources *s, const struct keel_directions *d, double *kl)
{
    keel_status st = KEEL_OK;
    struct keel_kl_row *row = calloc(s->benign.n, sizeof *row);
    keel_session_clear_adapters(c->session);
    for (size_t i = 0; row && i < s->benign.n; i++) {
        const struct keel_score_row *r = &s->benign.row[i];
        row[i] = (struct keel_kl_row){ .ids = r->ids, .n = r->n, .first = r->first < r->n ? r->first : r->n > 1 ? 1 : r->n, .images = r->images,
                                       .n_images = r->n_images };
        row[i].kl = calloc(r->n, sizeof(float));
        st = row[i].kl ? st : KEEL_ERR_NO_MEMORY;
    }
    for (uint32_t k = 0; row && st == KEEL_OK && k < d->n; k++) {
        keel_hooks *hooks = NULL;
        double sum = 0, n = 0;
        st = keel_hooks_create(&hooks, c->model);
        const struct keel_hook_params p = { .site = d->site, .layer = d->at[k].layer, .v = d->at[k].v, .k = 1, .amount = 1 };
        st = st == KEEL_OK ? keel_hooks_add(hooks, &p) : st;
        st = st == KEEL_OK ? keel_session_set_hooks(c->session, hooks) : st;
        st = st == KEEL_OK ? keel_session_kl(c->session, row, s->benign.n, NULL, NULL) : st;
        for (size_t i = 0; i < s->benign.n; i++) {
            for (uint32_t t = row[i].first; t < row[i].n; t++) {
                sum += (double)row[i].kl[t - row[i].first];
                n++;
            }
        }
        kl[k] = sum / n;
        keel_session_set_hooks(c->session, NULL);
        keel_hooks_destroy(&hooks);
    }
    for (size_t i = 0; row && i < s->benign.n; i++) {
        free(row[i].kl);
    }
    free(row);
    return row ? st : KEEL_ERR_NO_MEMORY;
}

// --- results -------------------------------------------------------------------------------------

static json_t *number(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

static double norm(const struct keel_directions *d, uint32_t i)
{
    double sum = 0;
    for (uint32_t c = 0; c < d->width; c++) {
        sum += (double)d->at[i].v[c] * (double)d->at[i].v[c];
    }
    return sqrt(sum);
}

static void print_table(const struct keel_directions *d, const double *kl)
{
    printf("layer   norm  %% median  split-half  massive  effect  random 95%%   AUC  %sadmissible\n", kl ? "benign KL  " : "");
    for (uint32_t i = 0; i < d->n; i++) {
        const struct keel_gates *g = &d->at[i].gates;
        printf("%5u %6.3g %9.3g %11.3f %7.1f%% %7.2f %11.2f %5.3f  ", d->at[i].layer, norm(d, i), 100 * norm(d, i) / d->at[i].median_norm,
               g->split_half, 100 * g->massive_share, g->effect, g->random_95, g->auc);
        if (kl) {
            printf("%9.4f  ", kl[i]);
        }
        printf("%s\n", g->admissible && !(kl && kl[i] > 0.1) ? "yes" : "no");
    }
    for (uint32_t i = 0; i < d->n; i++) {
        const struct keel_gates *g = &d->at[i].gates;
        if (g->n_massive > 0) {
            printf("layer %u: %u massive channels:", d->at[i].layer, g->n_massive);
            for (uint32_t j = 0; j < g->n_massive && j < sizeof g->massive / sizeof g->massive[0]; j++) {
                printf(" %u", g->massive[j]);
            }
            printf("\n");
        }
    }
}

static void print_gates(const struct direction_args *a, const struct keel_directions *d, const double *kl)
{
    json_t *list = json_array();
    if (!a->json) {
        print_table(d, kl);
        json_decref(list);
        return;
    }
    for (uint32_t i = 0; i < d->n; i++) {
        const struct keel_gates *g = &d->at[i].gates;
        json_t *o = json_object(), *massive = json_array();
        for (uint32_t j = 0; j < g->n_massive && j < sizeof g->massive / sizeof g->massive[0]; j++) {
            json_array_append_new(massive, json_integer(g->massive[j]));
        }
        json_object_set_new(o, "layer", json_integer(d->at[i].layer));
        json_object_set_new(o, "norm", number(norm(d, i)));
        json_object_set_new(o, "median_norm", number(d->at[i].median_norm));
        json_object_set_new(o, "split_half", number(g->split_half));
        json_object_set_new(o, "n_splits", json_integer(g->n_splits));
        json_object_set_new(o, "massive_share", number(g->massive_share));
        json_object_set_new(o, "n_massive", json_integer(g->n_massive));
        json_object_set_new(o, "massive", massive);
        json_object_set_new(o, "effect", number(g->effect));
        json_object_set_new(o, "auc", number(g->auc));
        json_object_set_new(o, "random_95", number(g->random_95));
        if (kl) {
            json_object_set_new(o, "benign_kl", number(kl[i]));
        }
        json_object_set_new(o, "admissible", json_boolean(g->admissible && !(kl && kl[i] > 0.1)));
        json_array_append_new(list, o);
    }
    print_json(stdout, json_pack("{s:s, s:s, s:o}", "out", a->out, "method", d->method, "layers", list));
}

static void warn(const struct context *c, const struct keel_directions *d, const double *kl)
{
    uint32_t bad = 0;
    for (uint32_t i = 0; i < d->n; i++) {
        bad += !d->at[i].gates.admissible || (kl && kl[i] > 0.1);
    }
    if (bad > 0) {
        say(c, KEEL_LOG_WARN, "%u of %u directions fail a check (split-half cosine >= 0.5, massive channels < 5 %%, effect above "
            "random, benign KL <= 0.1): effects of these say little", bad, d->n);
    }
}

// --- the command ---------------------------------------------------------------------------------

static struct keel_direction_params params_of(const struct direction_args *a)
{
    return (struct keel_direction_params){ .method = a->method, .k = a->k, .paired = !a->positive, .seed = a->seed };
}

// Whether the layers that `p` names fit the file.
static keel_status check_out(const struct context *c, const struct direction_args *a, const struct keel_capture_params *p)
{
    const uint32_t n = p->site >= KEEL_SITE_TOWER ? keel_images_layers(c->images) : keel_model_info(c->model)->n_layers;
    struct keel_directions d = { .site = p->site, .at = calloc(n, sizeof *d.at) };
    for (uint32_t i = 0; d.at && i < n; i++) {
        if (p->layers[i]) {
            d.at[d.n++] = (struct keel_direction){ .layer = i, .k = a->k };
        }
    }
    const keel_status st = d.at ? keel_directions_writable(&d, a->out, &c->log) : KEEL_ERR_NO_MEMORY;
    free(d.at);
    return st;
}

// What can be refused before rows are captured.
static keel_status check_args(const struct context *c, const struct direction_args *a)
{
    const struct keel_direction_params how = params_of(a);
    struct keel_capture_params p = { 0 };
    uint8_t *layers = NULL;
    keel_status st = keel_directions_check(&how, &c->log);
    if (st == KEEL_OK) {
        st = context_site(c, a->site, a->layers, &p, &layers);
    }
    if (st == KEEL_OK) {
        st = check_out(c, a, &p);
    }
    if (st == KEEL_OK && a->benign && p.site >= KEEL_SITE_TOWER) {
        say(c, KEEL_LOG_ERROR, "--benign measures directions of the language model, --site %s is in the vision tower", a->site);
        st = KEEL_ERR_ARG;
    }
    if (st == KEEL_OK && a->benign && a->k > 1) {
        say(c, KEEL_LOG_ERROR, "--benign adds each direction once, and nothing can be added along the subspaces of --rank %u; leave one away", a->k);
        st = KEEL_ERR_ARG;
    }
    free(layers);
    return st;
}

static keel_status make(struct context *c, const struct direction_args *a, struct sources *s, struct keel_directions *d)
{
    struct keel_capture pos = { 0 }, neg = { 0 };
    struct keel_capture_params p = { 0 };
    uint8_t *layers = NULL;
    keel_status st = context_site(c, a->site, a->layers, &p, &layers);
    if (st == KEEL_OK) {
        st = capture_both(c, a, s, &p, &pos, &neg);
    }
    if (st == KEEL_OK) {
        const struct keel_direction_params how = params_of(a);
        st = keel_directions_estimate(d, &pos, &neg, &how, &c->log);
        d->model_hash = keel_model_hash(c->model);
    }
    keel_capture_finish(&pos);
    keel_capture_finish(&neg);
    free(layers);
    return st;
}

static int direction_run(const void *args)
{
    const struct direction_args *a = args;
    struct context c = { 0 };
    struct sources s = { 0 };
    struct keel_directions d = { 0 };
    double *kl = NULL;
    uint32_t longest = 0;
    keel_status st = context_open_model(&c, &a->common);
    if (st == KEEL_OK) {
        st = check_args(&c, a);
    }
    if (st == KEEL_OK) {
        st = read_sources(&c, a, &s);
    }
    const struct keel_steer_rows *all[] = { &s.positive, &s.negative, &s.benign };
    for (int i = 0; i < 3; i++) {
        longest = all[i]->longest > longest ? all[i]->longest : longest;
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
        st = context_open_session(&c, &a->common, a->common.ctx ? a->common.ctx : longest + 1);
    }
    if (st == KEEL_OK) {
        st = make(&c, a, &s, &d);
    }
    if (st == KEEL_OK && a->benign) {
        kl = calloc(d.n, sizeof *kl);
        st = kl ? benign_kl(&c, &s, &d, kl) : KEEL_ERR_NO_MEMORY;
    }
    if (st == KEEL_OK) {
        st = keel_directions_write(&d, a->out, &c.log);
    }
    if (st == KEEL_OK) {
        print_gates(a, &d, kl);
        warn(&c, &d, kl);
    }
    free(kl);
    keel_directions_finish(&d);
    keel_steer_rows_finish(&s.positive);
    keel_steer_rows_finish(&s.negative);
    keel_steer_rows_finish(&s.benign);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct direction_args, field)
static const struct arg_option options[] = {
    OPTION_MODEL,
    { .name = "--out", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT, .value = "V", .needed = true,
      .help = "V.gguf: a control vector for keel, llama.cpp and repeng; V.safetensors: any site, subspaces" },
    { .type = ARG_HEAD, .help = "Source (one)" },
    { .name = "--pairs", .type = ARG_STR, .offset = AT(pairs), .file = ARG_IN, .value = "F",
      .help = "JSONL {\"positive\": P, \"negative\": N}: texts, or rows {\"prompt\" or \"messages\", \"completion\"?}" },
    { .name = "--positive", .type = ARG_STR, .offset = AT(positive), .file = ARG_IN, .value = "F", .help = "JSONL rows of one class ..." },
    { .name = "--negative", .type = ARG_STR, .offset = AT(negative), .file = ARG_IN, .value = "F", .help = "... and of the other" },
    { .name = "--data", .type = ARG_STR, .offset = AT(data), .file = ARG_IN, .value = "F", .help = "JSONL rows, run with and without ..." },
    { .name = "--shift", .type = ARG_STR, .offset = AT(shift), .file = ARG_IN, .value = "A[:SCALE]", .help = "... this adapter" },
    { .type = ARG_HEAD, .help = "Direction" },
    { .name = "--method", .type = ARG_STR, .offset = AT(method), .value = "M", .def = "mean_mask", .choice = methods,
      .help = "mean, mean_z, mean_mask, lda, probe; of pairs also pca_diff, pca_center, svd" },
    { .name = "--rank", .type = ARG_U32, .offset = AT(k), .value = "K", .def = "1", .min = 1, .max = 4096,
      .help = "svd: directions of the subspace" },
    { .name = "--layers", .type = ARG_STR, .offset = AT(layers), .value = "L", .def = "all", .help = "3, 3-7, 1,4-6 or all" },
    { .name = "--positions", .type = ARG_STR, .offset = AT(positions), .value = "P",
      .help = "all, prompt, response, last_prompt, first:K or image; without it the response, or last_prompt if a row has none" },
    { .name = "--site", .type = ARG_STR, .offset = AT(site), .value = "S", .def = "post", .choice = keel_site_name, .help = "residual stream before (pre) or after (post) a layer, what attention (attn) or the MLP (mlp) adds; tower.pre ...: of the tower" },
    { .name = "--seed", .type = ARG_U64, .offset = AT(seed), .value = "N", .def = "1", .help = "of the checks' halves and random directions" },
    { .name = "--benign", .type = ARG_STR, .offset = AT(benign), .file = ARG_IN, .value = "F",
      .help = "JSONL rows that steering should not disturb: prints the KL when each direction is added once" },
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print the checks as JSON" },
    OPTION_LORA,
    OPTION_STEER,
    OPTIONS_IMAGES,
    OPTIONS_SESSION,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_direction = {
    .name = "direction", .summary = "a direction between two sets of activations", .usage = "-m MODEL --pairs F --out V.gguf [options]",
    .notes = "Adding a direction once (--steer V:1) moves by the distance of the two sets along it. Checks: docs/steering.md.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct direction_args),
    .run = direction_run,
};
