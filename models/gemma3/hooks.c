// SPDX-License-Identifier: MIT
// gemma3/hooks.c: lists of hooks, the marks that say which tokens of a batch they are for, and their dispatches.
// Owns the directions on the device. A pass without hooks records nothing from here.
#include "vision_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const keel_site_name[KEEL_N_SITES + 1] = { "pre",       "post",       "attn",       "mlp",      "tower.pre",
                                                       "tower.post", "tower.attn", "tower.mlp", NULL };

#define CAPTURE UINT32_MAX // beside enum keel_hook_op
#define NO_FACTOR UINT32_MAX

struct hook {
    enum keel_site site;
    uint32_t layer, op, set, k;
    uint32_t factor; // number of its factor row in the batch: what the backward pass of a limit needs
    float amount;
    float *v;           // [k, width]; orthonormal unless op is ADD
    struct keel_span u; // its copy on the device
    void (*capture)(void *user, const struct keel_capture_call *call);
    void *user;
};

struct keel_hooks {
    keel_model *model;
    struct keel_vision *vision; // whose sites hooks may sit at, or NULL
    struct hook *hook;
    uint32_t n, n_factors, n_sets;
    struct keel_mark_set set[KEEL_MAX_POSITION_SETS];
    keel_heap *heap;
    bool uploaded;
    keel_status (*after)(void *user, const struct keel_batch_tokens *tokens);
    void *after_user;
    uint32_t after_set;
};

// --- words ---------------------------------------------------------------------------------------

keel_status keel_positions_parse(const char *text, struct keel_positions *out, const keel_log *log)
{
    static const char *const names[] = { "all", "prompt", "response", "last_prompt", "first", "image", "decode" };
    keel_status st = KEEL_OK;
    char *end = NULL;
    for (uint32_t i = 0; i < KEEL_COUNT(names); i++) {
        if (i != KEEL_AT_FIRST && strcmp(text, names[i]) == 0) {
            *out = (struct keel_positions){ .kind = (enum keel_position_kind)i };
            goto out;
        }
    }
    if (strncmp(text, "first:", 6) == 0 && text[6] >= '0' && text[6] <= '9') {
        const unsigned long k = strtoul(text + 6, &end, 10);
        if (*end == '\0' && k > 0 && k <= UINT32_MAX) {
            *out = (struct keel_positions){ .kind = KEEL_AT_FIRST, .k = (uint32_t)k };
            goto out;
        }
    }
    KEEL_FAIL(log, KEEL_ERR_ARG, "positions \"%s\" are unknown; use all, prompt, response, last_prompt, first:K, image or decode", text);
out:
    return st;
}

keel_status keel_hook_schedule_parse(const char *text, struct keel_hook_schedule *out, const keel_log *log)
{
    static const char *const names[] = { [KEEL_HOOK_FIRST] = "first:", "linear:", "decay:", "ramp:" };
    keel_status st = KEEL_OK;
    for (uint32_t i = KEEL_HOOK_FIRST; i < KEEL_COUNT(names); i++) {
        const size_t n = strlen(names[i]);
        if (strncmp(text, names[i], n) == 0 && text[n] >= '0' && text[n] <= '9') {
            char *end;
            const unsigned long count = strtoul(text + n, &end, 10);
            if (*end == '\0' && count > 0 && count <= UINT32_MAX) {
                *out = (struct keel_hook_schedule){ .kind = (enum keel_hook_schedule_kind)i, .n = (uint32_t)count };
                goto out;
            }
        }
    }
    KEEL_FAIL(log, KEEL_ERR_ARG, "schedule \"%s\" is unknown; use first:N, linear:N, decay:N or ramp:N with N above 0", text);
out:
    return st;
}

// One number of a list of layers; moves *at behind it.
static bool layer_number(const char **at, unsigned long *v)
{
    char *end;
    if (**at < '0' || **at > '9') {
        return false;
    }
    *v = strtoul(*at, &end, 10);
    *at = end;
    return true;
}

keel_status keel_layers_parse(const char *text, uint8_t *use, uint32_t n, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const char *at = text;
    const bool all = strcmp(text, "all") == 0;
    memset(use, all, n);
    while (!all) {
        unsigned long lo, hi;
        if (!layer_number(&at, &lo)) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "layers \"%s\" are not understood; use all, 3, 3-7 or 1,4-6", text);
        }
        hi = lo;
        if (*at == '-') {
            at++;
            if (!layer_number(&at, &hi) || hi < lo) {
                KEEL_FAIL(log, KEEL_ERR_ARG, "layers \"%s\": a range runs from the lower to the higher layer, like 3-7", text);
            }
        }
        if (hi >= n) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "layers \"%s\": there is no layer %lu; the model has layers 0 to %u", text, hi, n - 1);
        }
        memset(use + lo, 1, hi - lo + 1);
        if (*at == '\0') {
            break;
        }
        if (*at++ != ',') {
            KEEL_FAIL(log, KEEL_ERR_ARG, "layers \"%s\" are not understood; use all, 3, 3-7 or 1,4-6", text);
        }
    }
out:
    return st;
}

// --- the list ------------------------------------------------------------------------------------

keel_status keel_hooks_create(keel_hooks **out, keel_model *model)
{
    keel_status st = KEEL_OK;
    *out = calloc(1, sizeof **out);
    if (!*out) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "no memory for hooks");
    }
    (*out)->model = model;
out:
    return st;
}

void keel_hooks_destroy(keel_hooks **hooks)
{
    keel_hooks *h = hooks ? *hooks : NULL;
    if (!h) {
        return;
    }
    for (uint32_t i = 0; i < h->n; i++) {
        free(h->hook[i].v);
    }
    if (h->vision && h->vision->hooks == h) {
        h->vision->hooks = NULL;
    }
    keel_heap_destroy(&h->heap);
    free(h->hook);
    free(h);
    *hooks = NULL;
}

size_t keel_hooks_count(const keel_hooks *hooks)
{
    return hooks->n;
}

const keel_log *keel_hooks_log(const keel_hooks *hooks)
{
    return hooks->model->log;
}

void keel_hooks_use_images(keel_hooks *hooks, keel_images *images)
{
    struct keel_vision *v = keel_images_vision(images);
    hooks->vision = v;
    v->hooks = hooks;
    keel_images_due(images);
}

void keel_hooks_shape(const keel_hooks *h, enum keel_site site, uint32_t *n_layers, uint32_t *width)
{
    const bool tower = site >= KEEL_SITE_TOWER;
    *n_layers = !tower ? h->model->cfg.n_layers : h->vision ? h->vision->cfg.n_layers : 0;
    *width = !tower ? h->model->cfg.width : h->vision ? h->vision->cfg.width : 0;
}

static uint32_t width_at(const keel_hooks *h, enum keel_site site)
{
    uint32_t n_layers, width;
    keel_hooks_shape(h, site, &n_layers, &width);
    return width;
}

static size_t floats_of(const keel_hooks *h, const struct hook *hook)
{
    return (size_t)hook->k * width_at(h, hook->site);
}

static double dot(const float *a, const float *b, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

// Orthonormal rows that span what the k rows of v span (Gram and Schmidt, twice for the last digits).
static keel_status orthonormal(const keel_hooks *h, float *v, uint32_t k, uint32_t width)
{
    keel_status st = KEEL_OK;
    for (uint32_t j = 0; j < k; j++) {
        float *row = v + (size_t)j * width;
        const double before = sqrt(dot(row, row, width));
        for (uint32_t i = 0; i < 2 * j; i++) {
            const float *u = v + (size_t)(i % j) * width;
            const double c = dot(row, u, width);
            for (uint32_t x = 0; x < width; x++) {
                row[x] = (float)((double)row[x] - c * (double)u[x]);
            }
        }
        const double norm = sqrt(dot(row, row, width));
        if (!(norm > 1e-5 * before) || norm < 1e-30) {
            KEEL_FAIL(h->model->log, KEEL_ERR_ARG, j ? "direction %u of a subspace lies in the space of those before it; leave it out"
                      : "direction %u has length 0: there is nothing to steer along", j);
        }
        for (uint32_t x = 0; x < width; x++) {
            row[x] = (float)((double)row[x] / norm);
        }
    }
out:
    return st;
}

static keel_status check(const keel_hooks *h, const struct keel_hook_params *p)
{
    keel_status st = KEEL_OK;
    const keel_log *log = h->model->log;
    const bool tower = p->site >= KEEL_SITE_TOWER;
    uint32_t n_layers, width;
    if (tower && !h->vision) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "a hook at %s: there is no vision tower; give --mmproj", keel_site_name[p->site]);
    }
    keel_hooks_shape(h, p->site, &n_layers, &width);
    if (p->layer >= n_layers) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "a hook for layer %u: the %s has layers 0 to %u", p->layer, tower ? "tower" : "model", n_layers - 1);
    }
    if (tower && p->at.kind != KEEL_AT_ALL && p->at.kind != KEEL_AT_IMAGE) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "a hook at %s: the tower has no prompt and no response; positions there are all or image",
                  keel_site_name[p->site]);
    }
    if (tower && (p->tokens.kind != KEEL_HOOK_ALWAYS || p->steps.kind != KEEL_HOOK_ALWAYS)) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "a hook at %s: an image is encoded once, so there is no schedule in the tower", keel_site_name[p->site]);
    }
    if (p->site >= KEEL_N_SITES || p->op > KEEL_HOOK_FLOOR || p->at.kind > KEEL_AT_DECODE || p->k == 0 || p->k > width ||
        (p->k > 1 && p->op != KEEL_HOOK_ABLATE)) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "a hook for layer %u: %u directions for this operation; only ablation takes more than one, and "
                  "no more than the width of %u", p->layer, p->k, width);
    }
    if (!isfinite(p->amount)) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "a hook for layer %u: its amount is not a finite number", p->layer);
    }
    for (size_t i = 0; i < (size_t)p->k * width; i++) {
        if (!isfinite(p->v[i])) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "a hook for layer %u: element %zu of its direction is NaN or infinity", p->layer, i);
        }
    }
out:
    return st;
}

// Whether a token can be one of both. Images stand in prompts.
static bool can_meet(const struct keel_positions *a, const struct keel_positions *b)
{
    const enum keel_position_kind kind[2] = { a->kind, b->kind };
    bool response[2];
    for (int i = 0; i < 2; i++) {
        if (kind[i] == KEEL_AT_ALL) {
            return true;
        }
        response[i] = kind[i] == KEEL_AT_RESPONSE || kind[i] == KEEL_AT_FIRST || kind[i] == KEEL_AT_DECODE;
    }
    return response[0] == response[1];
}

// Limits of one place that no activation keeps at once. `v` is normalised; a cap along the opposite direction is a floor along v.
static keel_status check_others(const keel_hooks *h, const struct keel_hook_params *p, const float *v)
{
    static const char *const name[] = { [KEEL_HOOK_CAP] = "cap", [KEEL_HOOK_FLOOR] = "floor" };
    keel_status st = KEEL_OK;
    const uint32_t width = width_at(h, p->site);
    for (uint32_t i = 0; i < h->n && (p->op == KEEL_HOOK_CAP || p->op == KEEL_HOOK_FLOOR); i++) {
        const struct hook *o = &h->hook[i];
        if ((o->op != KEEL_HOOK_CAP && o->op != KEEL_HOOK_FLOOR) || o->site != p->site || o->layer != p->layer ||
            !can_meet(&h->set[o->set].at, &p->at)) {
            continue;
        }
        const double cosine = dot(o->v, v, width), theirs = (cosine < 0 ? -1.0 : 1.0) * (double)o->amount, ours = (double)p->amount;
        const bool above = (o->op == KEEL_HOOK_CAP) == (cosine > 0), cap = p->op == KEEL_HOOK_CAP; // what each limits along v from above
        if (fabs(cosine) >= 0.999 && above != cap && (cap ? theirs > ours : ours > theirs)) {
            KEEL_FAIL(h->model->log, KEEL_ERR_ARG, "layer %u, %s: a %s of %g and a %s of %g along %s direction contradict each other: no "
                      "activation keeps both; change one, or give them tokens that do not meet (at=prompt, at=response)", p->layer,
                      keel_site_name[p->site], name[o->op], (double)o->amount, name[p->op], (double)p->amount,
                      cosine > 0 ? "the same" : "the opposite");
        }
    }
out:
    return st;
}

static bool same_schedule(struct keel_hook_schedule a, struct keel_hook_schedule b)
{
    return a.kind == b.kind && a.n == b.n;
}

static keel_status find_set(keel_hooks *h, const struct keel_mark_set *want, uint32_t *set)
{
    for (*set = 0; *set < h->n_sets; ++*set) {
        const struct keel_mark_set *s = &h->set[*set];
        if (s->at.kind == want->at.kind && s->at.k == want->at.k && same_schedule(s->tokens, want->tokens) &&
            same_schedule(s->steps, want->steps)) {
            return KEEL_OK;
        }
    }
    if (h->n_sets == KEEL_MAX_POSITION_SETS) {
        KEEL_ERROR(h->model->log, "hooks for more than %u different positions and schedules at once", KEEL_MAX_POSITION_SETS);
        return KEEL_ERR_ARG;
    }
    h->set[h->n_sets++] = *want;
    return KEEL_OK;
}

static keel_status append(keel_hooks *h, const struct hook *hook)
{
    struct hook *p = realloc(h->hook, (h->n + 1) * sizeof *p);
    if (!p) {
        KEEL_ERROR(h->model->log, "no memory for hooks");
        return KEEL_ERR_NO_MEMORY;
    }
    h->hook = p;
    p[h->n++] = *hook;
    h->uploaded = false;
    return KEEL_OK;
}

keel_status keel_hooks_add(keel_hooks *h, const struct keel_hook_params *p)
{
    keel_status st = KEEL_OK;
    struct hook hook = { .site = p->site, .layer = p->layer, .op = p->op, .k = p->k, .amount = p->amount, .factor = NO_FACTOR };
    KEEL_TRY(check(h, p));
    const size_t bytes = floats_of(h, &hook) * sizeof *hook.v;
    hook.v = malloc(bytes);
    if (!hook.v) {
        KEEL_FAIL(h->model->log, KEEL_ERR_NO_MEMORY, "no memory for hooks");
    }
    memcpy(hook.v, p->v, bytes);
    if (p->op != KEEL_HOOK_ADD) {
        KEEL_TRY(orthonormal(h, hook.v, p->k, width_at(h, p->site)));
        KEEL_TRY(check_others(h, p, hook.v));
    }
    KEEL_TRY(find_set(h, &(struct keel_mark_set){ p->at, p->tokens, p->steps }, &hook.set));
    if ((p->op == KEEL_HOOK_CAP || p->op == KEEL_HOOK_FLOOR) && p->site < KEEL_SITE_TOWER) {
        hook.factor = h->n_factors++;
    }
    KEEL_TRY(append(h, &hook));
    hook.v = NULL;
out:
    free(hook.v);
    return st;
}

keel_status keel_hooks_add_capture(keel_hooks *h, enum keel_site site, uint32_t layer, struct keel_positions at,
                                   void (*fn)(void *user, const struct keel_capture_call *call), void *user)
{
    struct hook hook = { .site = site, .layer = layer, .op = CAPTURE, .factor = NO_FACTOR, .capture = fn, .user = user };
    KEEL_ASSERT(site < KEEL_N_SITES);
    const keel_status st = find_set(h, &(struct keel_mark_set){ .at = at }, &hook.set);
    return st == KEEL_OK ? append(h, &hook) : st;
}

keel_status keel_hooks_after_batch(keel_hooks *h, struct keel_positions at,
                                   keel_status (*fn)(void *user, const struct keel_batch_tokens *tokens), void *user)
{
    h->after = fn;
    h->after_user = user;
    return find_set(h, &(struct keel_mark_set){ .at = at }, &h->after_set);
}

static uint64_t hash_hooks(const keel_hooks *h, uint64_t hash, bool tower_only)
{
    for (uint32_t i = 0; h && i < h->n; i++) {
        const struct hook *k = &h->hook[i];
        const struct keel_mark_set *set = &h->set[k->set];
        if (tower_only && k->site < KEEL_SITE_TOWER) {
            continue;
        }
        const uint32_t words[] = { k->site, k->layer, k->op, set->at.kind, set->at.k, k->k,
                                   set->tokens.kind, set->tokens.n, set->steps.kind, set->steps.n };
        hash = keel_hash(hash, words, sizeof words);
        hash = keel_hash(hash, &k->amount, sizeof k->amount);
        hash = keel_hash(hash, k->v, floats_of(h, k) * sizeof *k->v);
    }
    return hash;
}

uint64_t keel_hooks_hash(const keel_hooks *h, uint64_t hash)
{
    return hash_hooks(h, hash, false);
}

uint64_t keel_hooks_tower_hash(const keel_hooks *h, uint64_t hash)
{
    return hash_hooks(h, hash, true);
}

bool keel_hooks_count_steps(const keel_hooks *h)
{
    for (uint32_t i = 0; h && i < h->n_sets; i++) {
        if (h->set[i].steps.kind != KEEL_HOOK_ALWAYS) {
            return true;
        }
    }
    return false;
}

bool keel_hooks_tower_captures(const keel_hooks *h)
{
    for (uint32_t i = 0; h && i < h->n; i++) {
        if (h->hook[i].site >= KEEL_SITE_TOWER && h->hook[i].op == CAPTURE) {
            return true;
        }
    }
    return false;
}

// --- on the device -------------------------------------------------------------------------------

static void want_directions(struct keel_layout *l, void *user)
{
    keel_hooks *h = user;
    for (uint32_t i = 0; i < h->n; i++) {
        if (h->hook[i].k > 0) {
            keel_want(l, &h->hook[i].u, 4ull * floats_of(h, &h->hook[i]));
        }
    }
}

static keel_status upload(keel_hooks *h, keel_device *dev)
{
    keel_status st = KEEL_OK;
    uint32_t with_vectors = 0;
    for (uint32_t i = 0; i < h->n; i++) {
        with_vectors += h->hook[i].k > 0;
    }
    if (h->uploaded || with_vectors == 0) {
        goto out;
    }
    keel_heap_destroy(&h->heap);
    KEEL_TRY(keel_layout_make(&h->heap, dev, KEEL_HEAP_DEVICE, "steering directions", want_directions, h));
    for (uint32_t i = 0; i < h->n; i++) {
        if (h->hook[i].k > 0) {
            KEEL_TRY(keel_upload(dev, h->hook[i].u, h->hook[i].v, 4ull * floats_of(h, &h->hook[i])));
        }
    }
    h->uploaded = true;
out:
    return st;
}

static void want_marks(struct keel_layout *l, void *user)
{
    struct keel_batch *b = user;
    for (uint32_t i = 0; i < b->n_sets; i++) {
        keel_want(l, &b->mark[i], 4ull * b->cap);
    }
    keel_want(l, &b->factor, KEEL_MAX(b->n_factors, 1) * keel_align_up(4ull * b->cap, 256));
}

keel_status keel_batch_set_hooks(struct keel_batch *b, const keel_hooks *hooks)
{
    keel_status st = KEEL_OK;
    keel_hooks *h = (keel_hooks *)(uintptr_t)hooks; // only its copy on the device is brought up to date
    keel_batch_forget_hooks(b);
    if (!h || h->n == 0) {
        goto out;
    }
    KEEL_TRY(upload(h, h->model->dev));
    b->row_of = malloc(b->cap * sizeof *b->row_of);
    b->token_of = malloc(b->cap * sizeof *b->token_of);
    if (!b->row_of || !b->token_of) {
        KEEL_FAIL(h->model->log, KEEL_ERR_NO_MEMORY, "no memory for hooks");
    }
    b->n_sets = h->n_sets;
    b->n_factors = h->n_factors;
    memcpy(b->set, h->set, sizeof b->set);
    KEEL_TRY(keel_layout_make(&b->mark_heap, h->model->dev, KEEL_HEAP_HOST, "marks of hooks", want_marks, b));
out:
    if (st != KEEL_OK) {
        keel_batch_forget_hooks(b);
    }
    return st;
}

void keel_batch_forget_hooks(struct keel_batch *b)
{
    keel_heap_destroy(&b->mark_heap);
    free(b->row_of);
    free(b->token_of);
    b->row_of = b->token_of = NULL;
    b->n_sets = b->n_factors = 0;
}

// --- marks ---------------------------------------------------------------------------------------

// What a token is in its row.
struct role {
    bool response, last_prompt, image, decode;
    uint32_t place; // in the response
};

static bool in_set(const struct role *r, const struct keel_positions *set)
{
    switch (set->kind) {
    case KEEL_AT_ALL: return true;
    case KEEL_AT_PROMPT: return !r->response;
    case KEEL_AT_RESPONSE: return r->response;
    case KEEL_AT_LAST_PROMPT: return r->last_prompt;
    case KEEL_AT_FIRST: return r->response && r->place < set->k;
    case KEEL_AT_IMAGE: return r->image;
    case KEEL_AT_DECODE: return r->decode;
    }
    return false;
}

static float share_at(const struct keel_hook_schedule *s, uint64_t t)
{
    const double part = (double)t / KEEL_MAX(s->n, 1u);
    switch (s->kind) {
    case KEEL_HOOK_ALWAYS: return 1;
    case KEEL_HOOK_FIRST: return part < 1;
    case KEEL_HOOK_LINEAR: return part < 1 ? (float)(1 - part) : 0;
    case KEEL_HOOK_DECAY: return (float)exp2(-part);
    case KEEL_HOOK_RAMP: return part < 1 ? (float)part : 1;
    }
    return 0;
}

static bool in_image(const struct keel_batch_row *row, uint32_t at)
{
    for (uint32_t i = 0; i < row->n_images; i++) {
        if (at >= row->images[i].at && at < row->images[i].at + row->images[i].n) {
            return true;
        }
    }
    return false;
}

void keel_batch_mark(struct keel_batch *b, const struct keel_batch_row *row, uint32_t first)
{
    const uint8_t *mask = row->mask;
    uint32_t place = 0;
    for (uint32_t i = 0; i < row->n; i++) {
        const uint32_t at = row->pos + i;
        struct role r = { .response = mask ? mask[i] != 0 : at >= row->prompt, .image = in_image(row, row->from + i) };
        r.last_prompt = !r.response && (mask ? i + 1 < row->n && mask[i + 1] : at + 1 == row->prompt);
        r.place = mask ? place : at - row->prompt;
        place = mask && r.response ? place + 1 : 0;
        r.decode = r.response && row->decode;
        for (uint32_t s = 0; s < b->n_sets; s++) {
            const struct keel_mark_set *set = &b->set[s];
            ((float *)keel_span_host(b->mark[s]))[first + i] =
                in_set(&r, &set->at) ? share_at(&set->tokens, r.response ? r.place : 0) * share_at(&set->steps, b->step) : 0.0f;
        }
        b->row_of[first + i] = row->number;
        b->token_of[first + i] = at;
    }
}

// --- dispatches ----------------------------------------------------------------------------------

static struct keel_span factor_of(const struct keel_pass *p, const struct hook *h)
{
    const uint64_t row = keel_align_up(4ull * p->batch->cap, 256);
    return keel_span_sub(p->batch->factor, h->factor * row, row);
}

static struct keel_batch_tokens tokens_of(const struct keel_batch *b, uint32_t set)
{
    return (struct keel_batch_tokens){ .n = b->n_tokens, .row = b->row_of, .at = b->token_of, .marks = keel_span_host(b->mark[set]) };
}

// What a hook works on: rows of a recorded pass.
struct place {
    keel_recorder *rec;
    uint32_t n, width;
    struct keel_span marks, factor; // [n] each
    struct keel_batch_tokens tokens;
};

static void apply(const struct place *p, const struct hook *h, struct keel_span x)
{
    if (h->op == CAPTURE) {
        h->capture(h->user, &(struct keel_capture_call){ .rec = p->rec, .site = h->site, .layer = h->layer, .x = x, .marks = p->marks,
                                                         .n_rows = p->n, .width = p->width, .tokens = &p->tokens });
    } else if (h->op == KEEL_HOOK_ADD) {
        keel_rows_add(p->rec, &(struct keel_rows_add_params){ .x = x, .v = h->u, .marks = p->marks, .n_rows = p->n, .width = p->width,
                                                              .a = h->amount });
    } else {
        keel_rows_project(p->rec, &(struct keel_rows_project_params){
            .x = x, .u = h->u, .marks = p->marks, .factor = p->factor, .n_rows = p->n, .width = p->width, .k = h->k, .limit = h->amount,
            .mode = h->op == KEEL_HOOK_ABLATE ? KEEL_ABLATE : h->op == KEEL_HOOK_CAP ? KEEL_CAP : KEEL_FLOOR });
    }
}

bool keel_pass_hooked(const struct keel_pass *p, enum keel_site site, uint32_t layer)
{
    for (uint32_t i = 0; p->hooks && i < p->hooks->n; i++) {
        if (p->hooks->hook[i].site == site && p->hooks->hook[i].layer == layer) {
            return true;
        }
    }
    return false;
}

void keel_pass_hooks(const struct keel_pass *p, enum keel_site site, uint32_t layer, struct keel_span x)
{
    for (uint32_t i = 0; p->hooks && i < p->hooks->n; i++) {
        const struct hook *h = &p->hooks->hook[i];
        if (h->site == site && h->layer == layer) {
            apply(&(struct place){ .rec = p->rec, .n = p->batch->n_tokens, .width = p->model->cfg.width, .marks = p->batch->mark[h->set],
                                   .factor = h->factor == NO_FACTOR ? (struct keel_span){ 0 } : factor_of(p, h),
                                   .tokens = tokens_of(p->batch, h->set) }, h, x);
        }
    }
}

void keel_pass_hooks_back(const struct keel_pass *p, enum keel_site site, uint32_t layer, struct keel_span dx)
{
    for (uint32_t i = p->hooks ? p->hooks->n : 0; i-- > 0;) {
        const struct hook *h = &p->hooks->hook[i];
        if (h->site != site || h->layer != layer || h->op == KEEL_HOOK_ADD || h->op == CAPTURE) {
            continue; // the gradient of both is that of the identity
        }
        keel_rows_project(p->rec, &(struct keel_rows_project_params){
            .x = dx, .u = h->u, .marks = h->op == KEEL_HOOK_ABLATE ? p->batch->mark[h->set] : factor_of(p, h),
            .n_rows = p->batch->n_tokens, .width = p->model->cfg.width, .k = h->k, .mode = KEEL_ABLATE });
    }
}

keel_status keel_pass_after(const struct keel_pass *p)
{
    if (!p->hooks || !p->hooks->after) {
        return KEEL_OK;
    }
    const struct keel_batch_tokens tokens = tokens_of(p->batch, p->hooks->after_set);
    return p->hooks->after(p->hooks->after_user, &tokens);
}

// --- in the vision tower -------------------------------------------------------------------------

static uint32_t count_tower(const keel_hooks *h)
{
    uint32_t n = 0;
    for (uint32_t i = 0; h && i < h->n; i++) {
        n += h->hook[i].site >= KEEL_SITE_TOWER;
    }
    return n;
}

static void want_tower(struct keel_layout *l, void *user)
{
    struct keel_tower_hooks *t = user;
    keel_want(l, &t->marks, 4ull * t->n);
    keel_want(l, &t->factor, 4ull * t->n);
}

keel_status keel_tower_hooks_make(struct keel_tower_hooks *t, const keel_vision *v)
{
    keel_status st = KEEL_OK;
    const uint32_t n = v->cfg.n_patches;
    keel_tower_hooks_finish(t);
    if (count_tower(v->hooks) == 0) {
        goto out;
    }
    t->n = n;
    t->ones = malloc(n * sizeof *t->ones);
    t->row = malloc(2 * (size_t)n * sizeof *t->row);
    if (!t->ones || !t->row) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "no memory for hooks");
    }
    for (uint32_t i = 0; i < n; i++) {
        t->ones[i] = 1;
        t->row[i] = v->capture_row;
        t->row[n + i] = v->capture_first + i;
    }
    KEEL_TRY(upload(v->hooks, v->dev));
    KEEL_TRY(keel_layout_make(&t->heap, v->dev, KEEL_HEAP_DEVICE, "marks of hooks", want_tower, t));
    KEEL_TRY(keel_upload(v->dev, t->marks, t->ones, n * sizeof *t->ones));
    t->hooks = v->hooks;
out:
    if (st != KEEL_OK) {
        keel_tower_hooks_finish(t);
    }
    return st;
}

void keel_tower_hooks_finish(struct keel_tower_hooks *t)
{
    keel_heap_destroy(&t->heap);
    free(t->ones);
    free(t->row);
    *t = (struct keel_tower_hooks){ 0 };
}

static struct keel_batch_tokens patches_of(const struct keel_tower_hooks *t)
{
    return (struct keel_batch_tokens){ .n = t->n, .row = t->row, .at = t->row + t->n, .marks = t->ones };
}

bool keel_tower_hooked(const struct keel_tower_pass *p, enum keel_site site, uint32_t layer)
{
    const keel_hooks *h = p->hooks ? p->hooks->hooks : NULL;
    for (uint32_t i = 0; h && i < h->n; i++) {
        if (h->hook[i].site == site && h->hook[i].layer == layer) {
            return true;
        }
    }
    return false;
}

void keel_tower_apply(const struct keel_tower_pass *p, enum keel_site site, uint32_t layer, struct keel_span x)
{
    const struct keel_tower_hooks *t = p->hooks;
    for (uint32_t i = 0; t && t->hooks && i < t->hooks->n; i++) {
        const struct hook *h = &t->hooks->hook[i];
        if (h->site == site && h->layer == layer) {
            apply(&(struct place){ .rec = p->rec, .n = t->n, .width = p->v->cfg.width, .marks = t->marks, .factor = t->factor,
                                   .tokens = patches_of(t) }, h, x);
        }
    }
}

keel_status keel_tower_after(const struct keel_tower_pass *p)
{
    const keel_hooks *h = p->hooks ? p->hooks->hooks : NULL;
    const struct keel_batch_tokens tokens = h ? patches_of(p->hooks) : (struct keel_batch_tokens){ 0 };
    return h && h->after && keel_hooks_tower_captures(h) ? h->after(h->after_user, &tokens) : KEEL_OK;
}
