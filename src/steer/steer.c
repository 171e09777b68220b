// SPDX-License-Identifier: MIT
// steer/steer.c: hooks from words on a command line, and projections of rows on directions.
#include "steer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// --- words ---------------------------------------------------------------------------------------

static keel_status option(struct keel_steer_words *s, char *word, const keel_log *log)
{
    static const char *const ops[] = { "add", "ablate", "cap", "floor" };
    keel_status st = KEEL_OK;
    char *value = strchr(word, '=');
    bool found = false;
    if (!value) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "--steer %s: \"%s\" is no KEY=VALUE; keys are op, at, site, tokens and steps", s->words, word);
    }
    *value++ = '\0';
    if (strcmp(word, "at") == 0) {
        KEEL_TRY(keel_positions_parse(value, &s->at, log));
        found = true;
    }
    if (strcmp(word, "tokens") == 0 || strcmp(word, "steps") == 0) {
        KEEL_TRY(keel_hook_schedule_parse(value, word[0] == 't' ? &s->tokens : &s->steps, log));
        found = true;
    }
    for (uint32_t i = 0; strcmp(word, "op") == 0 && i < KEEL_COUNT(ops); i++) {
        if (strcmp(value, ops[i]) == 0) {
            s->op = (enum keel_hook_op)i;
            found = true;
        }
    }
    for (uint32_t i = 0; strcmp(word, "site") == 0 && i < KEEL_N_SITES; i++) {
        if (strcmp(value, keel_site_name[i]) == 0) {
            s->site = (int)i;
            found = true;
        }
    }
    if (!found) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "--steer %s: \"%s=%s\" is not understood; use op=add|ablate|cap|floor, at=POSITIONS, "
                  "site=pre|post|attn|mlp or tower.pre and so on, tokens=SCHEDULE, steps=SCHEDULE", s->words, word, value);
    }
out:
    return st;
}

// Ablation takes a component whole, so a strength beside it would be read and then forgotten.
static keel_status check_coef(const struct keel_steer_words *s, const keel_log *log)
{
    if (s->op == KEEL_HOOK_ABLATE && (s->coef != 1 || s->percent)) {
        KEEL_ERROR(log, "--steer %s: op=ablate takes the whole component and has no coefficient (%g%s); leave it out, or let tokens= or "
                   "steps= say how much of the component goes", s->words, s->coef, s->percent ? "%" : "");
        return KEEL_ERR_ARG;
    }
    return KEEL_OK;
}

// The longest beginning of the words that is a file and ends where a part may begin: a path may hold what parts begin with. 0: none.
static size_t file_length(char *words)
{
    for (size_t n = strlen(words); n > 0; n--) {
        const char next = words[n];
        if (strchr(":@,", next)) { // the end too
            words[n] = '\0';
            const bool file = keel_path_exists(words) && !keel_path_is_dir(words);
            words[n] = next;
            if (file) {
                return n;
            }
        }
    }
    return 0;
}

// FILE[:COEF[%]][@LAYERS][,KEY=VALUE]... Layers may hold commas, so a part without "=" belongs to what stands before it.
keel_status keel_steer_parse(struct keel_steer_words *s, const char *words, const keel_log *log)
{
    keel_status st = KEEL_OK;
    *s = (struct keel_steer_words){ .words = words, .text = strdup(words), .coef = 1, .site = -1 };
    if (!s->text) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for --steer %s", words);
    }
    char *const rest = s->text + file_length(s->text);
    for (char *comma; (comma = strrchr(rest, ',')) && strchr(comma, '=');) {
        *comma = '\0';
        KEEL_TRY(option(s, comma + 1, log));
    }
    s->file = s->text;
    char *layers = strrchr(rest, '@');
    if (layers) {
        *layers++ = '\0';
        s->layers = layers;
    }
    char *colon = strrchr(rest, ':');
    if (colon && strchr("+-.0123456789", colon[1]) && colon[1]) {
        char *end;
        s->coef = strtod(colon + 1, &end);
        s->percent = *end == '%';
        if (end[s->percent] != '\0' || !isfinite(s->coef)) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "--steer %s: \"%s\" is no coefficient; use a number like -1.5, or 8%% of the median norm", words,
                      colon + 1);
        }
        *colon = '\0';
    }
    if (s->file[0] == '\0') {
        KEEL_FAIL(log, KEEL_ERR_ARG, "--steer %s: names no file", words);
    }
    KEEL_TRY(check_coef(s, log));
out:
    if (st != KEEL_OK) {
        keel_steer_words_finish(s);
    }
    return st;
}

keel_status keel_steer_parse_one(struct keel_steer_words *s, const char *words, const keel_log *log)
{
    keel_status st = KEEL_OK;
    *s = (struct keel_steer_words){ .words = words, .text = strdup(words), .coef = 1, .site = -1 };
    if (!s->text) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the direction %s", words);
    }
    char *layer = strrchr(s->text + file_length(s->text), '@');
    if (layer) {
        *layer++ = '\0';
        if (!*layer || layer[strspn(layer, "0123456789")]) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "%s: what follows the @ is no layer", words);
        }
    }
    s->file = s->text;
    s->layers = layer;
    if (s->file[0] == '\0') {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: names no file", words);
    }
out:
    if (st != KEEL_OK) {
        keel_steer_words_finish(s);
    }
    return st;
}

keel_status keel_directions_one(const struct keel_direction **out, const struct keel_directions *d, const struct keel_steer_words *s,
                                const keel_log *log)
{
    keel_status st = KEEL_OK;
    *out = NULL;
    if (!s->layers && d->n != 1) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: has directions of several layers; name one with @LAYER", s->words);
    }
    for (uint32_t i = 0; i < d->n && !*out; i++) {
        *out = !s->layers || d->at[i].layer == strtoul(s->layers, NULL, 10) ? &d->at[i] : NULL;
    }
    if (!*out) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: has no direction for layer %s", s->words, s->layers);
    }
    if ((*out)->k != 1) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: layer %u has a subspace of %u directions; one direction is needed", s->words, (*out)->layer,
                  (*out)->k);
    }
out:
    return st;
}

void keel_steer_words_finish(struct keel_steer_words *s)
{
    free(s->text);
    *s = (struct keel_steer_words){ 0 };
}

double keel_direction_length(const float *v, uint32_t width)
{
    double sum = 0;
    for (uint32_t i = 0; i < width; i++) {
        sum += (double)v[i] * (double)v[i];
    }
    return sqrt(sum);
}

static keel_status add_layer(keel_hooks *hooks, const struct keel_steer_words *s, const struct keel_directions *d, const struct keel_direction *a,
                             const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_hook_params p = { .site = s->site < 0 ? d->site : (enum keel_site)s->site, .layer = a->layer, .op = s->op, .at = s->at,
                                  .v = a->v, .k = a->k, .amount = (float)s->coef, .tokens = s->tokens, .steps = s->steps };
    if (s->percent) {
        if (!(a->median_norm > 0)) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "--steer %s: %s does not say how long activations of layer %u are, so %% of it means nothing; give a "
                      "plain coefficient", s->words, s->file, a->layer);
        }
        const double unit = s->op == KEEL_HOOK_ADD ? keel_direction_length(a->v, d->width) : 1; // limits are for unit directions already
        p.amount = (float)(s->coef / 100 * a->median_norm / unit);
    }
    if (s->op == KEEL_HOOK_ADD && a->k > 1) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "--steer %s: layer %u has a subspace of %u directions, which can only be ablated (op=ablate)", s->words,
                  a->layer, a->k);
    }
    KEEL_TRY(keel_hooks_add(hooks, &p));
out:
    return st;
}

// The part of the model that the directions are for must be there and have their width and layers.
static keel_status check_fit(const struct keel_steer_words *s, const struct keel_directions *d, const char *part, uint32_t n_layers, uint32_t width,
                             const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (n_layers == 0) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "--steer %s: its directions are for a vision tower, and there is none; give --mmproj", s->words);
    }
    if (d->width != width) {
        KEEL_FAIL(log, KEEL_ERR_MISMATCH, "%s: directions of width %u, the %s's is %u; they belong to another model", s->file, d->width, part, width);
    }
    for (uint32_t i = 0; i < d->n; i++) {
        if (d->at[i].layer >= n_layers) {
            KEEL_FAIL(log, KEEL_ERR_MISMATCH, "%s: a direction for layer %u, the %s has layers 0 to %u", s->file, d->at[i].layer, part,
                      n_layers - 1);
        }
    }
out:
    return st;
}

keel_status keel_steer_add_directions(keel_hooks *hooks, keel_model *model, const struct keel_steer_words *s, const struct keel_directions *d)
{
    keel_status st = KEEL_OK;
    const keel_log *log = keel_hooks_log(hooks);
    const enum keel_site site = s->site < 0 ? d->site : (enum keel_site)s->site;
    uint8_t *use = NULL;
    uint32_t n_layers, width;
    keel_hooks_shape(hooks, site, &n_layers, &width);
    KEEL_TRY(check_fit(s, d, site >= KEEL_SITE_TOWER ? "tower" : "model", n_layers, width, log));
    use = malloc(n_layers);
    if (!use) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for --steer %s", s->words);
    }
    KEEL_TRY(keel_layers_parse(s->layers ? s->layers : "all", use, n_layers, log));
    if (d->model_hash != 0 && d->model_hash != keel_model_hash(model)) {
        KEEL_WARN(log, "%s: was made with another model file than %s; its directions may mean something else here", s->file,
                  keel_model_info(model)->path);
    }
    for (uint32_t i = 0; i < d->n; i++) {
        if (use[d->at[i].layer]) {
            KEEL_TRY(add_layer(hooks, s, d, &d->at[i], log));
            use[d->at[i].layer] = 2;
        }
    }
    for (uint32_t i = 0; s->layers && strcmp(s->layers, "all") != 0 && i < n_layers; i++) {
        if (use[i] == 1) {
            KEEL_FAIL(log, KEEL_ERR_MISMATCH, "--steer %s: %s has no direction for layer %u", s->words, s->file, i);
        }
    }
out:
    free(use);
    return st;
}

keel_status keel_steer_add(keel_hooks *hooks, keel_model *model, const char *words)
{
    keel_status st = KEEL_OK;
    const keel_log *log = keel_hooks_log(hooks);
    struct keel_steer_words s = { 0 };
    struct keel_directions d = { 0 };
    KEEL_TRY(keel_steer_parse(&s, words, log));
    KEEL_TRY(keel_directions_read(&d, s.file, log));
    KEEL_TRY(keel_steer_add_directions(hooks, model, &s, &d));
out:
    keel_steer_words_finish(&s);
    keel_directions_finish(&d);
    return st;
}

// --- projections ---------------------------------------------------------------------------------

struct dots {
    struct project *project;
    struct keel_span u, y; // [k, width] on the device; [cap, k] in host memory
    uint32_t k;
};

struct project {
    keel_device *dev;
    struct dots *layer;
    uint32_t n, max_k;
    double *sum;     // [n_rows, n, max_k]
    uint32_t *count; // [n_rows]
};

static void capture(void *user, const struct keel_capture_call *c)
{
    const struct dots *l = user;
    keel_rows_dot(c->rec, c->x, l->u, l->y, c->n_rows, l->k, c->width);
}

static keel_status after_batch(void *user, const struct keel_batch_tokens *t)
{
    struct project *p = user;
    for (uint32_t i = 0; i < p->n; i++) {
        const struct dots *l = &p->layer[i];
        const float *y = keel_span_host(l->y);
        keel_span_fetch(p->dev, l->y);
        for (uint32_t k = 0; k < t->n; k++) {
            for (uint32_t j = 0; t->marks[k] != 0 && j < l->k; j++) {
                p->sum[((size_t)t->row[k] * p->n + i) * p->max_k + j] += (double)y[(size_t)k * l->k + j];
            }
        }
    }
    for (uint32_t k = 0; k < t->n; k++) {
        p->count[t->row[k]] += t->marks[k] != 0;
    }
    return KEEL_OK;
}

static keel_status upload_units(struct dots *l, const struct keel_direction *a, uint32_t width, keel_device *dev)
{
    float *u = malloc((size_t)a->k * width * sizeof *u);
    for (uint32_t j = 0; u && j < a->k; j++) {
        const double norm = keel_direction_length(a->v + (size_t)j * width, width);
        for (uint32_t c = 0; c < width; c++) {
            u[(size_t)j * width + c] = (float)((double)a->v[(size_t)j * width + c] / (norm > 0 ? norm : 1));
        }
    }
    const keel_status st = u ? keel_upload(dev, l->u, u, 4ull * a->k * width) : KEEL_ERR_NO_MEMORY;
    free(u);
    return st;
}

keel_status keel_steer_project_check(const struct keel_directions *d, const keel_model *model, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct keel_model_info *info = keel_model_info(model);
    if (d->site >= KEEL_SITE_TOWER) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "directions at %s: projections are of the language model; capture the tower's rows instead",
                  keel_site_name[d->site]);
    }
    if (d->width != info->width || d->at[d->n - 1].layer >= info->n_layers) {
        KEEL_FAIL(log, KEEL_ERR_MISMATCH, "directions of width %u up to layer %u do not fit a model of width %u with %u layers", d->width,
                  d->at[d->n - 1].layer, info->width, info->n_layers);
    }
out:
    return st;
}

keel_status keel_steer_project(keel_session *session, struct keel_steer_rows *rows, const struct keel_directions *d,
                               struct keel_positions at, keel_hooks *hooks, double *mean, uint32_t max_k,
                               bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    keel_status st = KEEL_OK;
    keel_model *model = keel_session_model(session);
    const keel_log *log = keel_session_log(session);
    keel_heap *device = NULL, *host = NULL;
    keel_hooks *own = NULL;
    struct project p = { .dev = keel_model_device(model), .n = d->n, .max_k = max_k, .sum = mean };
    p.layer = calloc(d->n, sizeof *p.layer);
    p.count = calloc(rows->n, sizeof *p.count);
    if (!p.layer || !p.count) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for projections of %zu rows", rows->n);
    }
    KEEL_TRY(keel_steer_project_check(d, model, log));
    KEEL_TRY(keel_heap_create(&device, p.dev, KEEL_HEAP_DEVICE, "directions"));
    KEEL_TRY(keel_heap_create(&host, p.dev, KEEL_HEAP_HOST, "projections"));
    if (!hooks) {
        KEEL_TRY(keel_hooks_create(&own, model));
        hooks = own;
    }
    for (uint32_t i = 0; i < d->n; i++) {
        p.layer[i] = (struct dots){ .project = &p, .k = d->at[i].k };
        KEEL_ASSERT(d->at[i].k <= max_k);
        KEEL_TRY(keel_heap_alloc(device, 4ull * d->at[i].k * d->width, &p.layer[i].u));
        KEEL_TRY(keel_heap_alloc(host, 4ull * d->at[i].k * keel_session_batch_tokens(session), &p.layer[i].y));
        KEEL_TRY(upload_units(&p.layer[i], &d->at[i], d->width, p.dev));
        KEEL_TRY(keel_hooks_add_capture(hooks, d->site, d->at[i].layer, at, capture, &p.layer[i]));
    }
    KEEL_TRY(keel_hooks_after_batch(hooks, at, after_batch, &p));
    for (size_t i = 0; i < rows->n * d->n * max_k; i++) {
        mean[i] = i % max_k < d->at[i / max_k % d->n].k ? 0 : NAN;
    }
    KEEL_TRY(keel_steer_run(session, rows, hooks, progress, user));
    for (size_t i = 0; i < rows->n * d->n * max_k; i++) {
        const uint32_t n = p.count[i / max_k / d->n];
        if (n == 0) {
            KEEL_FAIL(log, KEEL_ERR_DATA, "row %zu has no token at the positions asked for", i / max_k / d->n + 1);
        }
        mean[i] /= n;
    }
out:
    keel_hooks_destroy(&own);
    keel_heap_destroy(&device);
    keel_heap_destroy(&host);
    free(p.layer);
    free(p.count);
    return st;
}
