// SPDX-License-Identifier: MIT
// gemma3/score.c: log-probabilities and divergences over many rows. Rows are packed into batches; a row longer than a batch goes
// through a cache of its own in parts, and so do neighbours that begin with the same tokens, which are then computed once. Logits
// are computed only where a token is scored, a chunk at a time.
#include "session_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What a pass of its own costs beyond its tokens, in tokens of a full batch: on the devices at hand a pass of a few tokens takes
// as long as 16 to 40 in a batch of 256.
#define PASS_TOKENS 32u

// One row of either kind of evaluation, and how far it got.
struct item {
    const int32_t *ids;
    uint32_t n, first, prompt; // prompt: tokens before the response, which may begin before what is scored
    size_t row;   // its number in the caller's list, for messages
    float *a, *b; // results [n - first]: log-probability and entropy, or divergence and its reverse; b may be NULL
    const struct keel_image_tokens *images;
    uint32_t n_images;
    const int32_t *alt; // [n_alt] scored in place of the last token, into alt_out
    uint32_t n_alt;
    float *alt_out;
};

struct place {
    struct item *item;
    uint32_t i; // index into a and b; from n - first on, into alt_out
};

struct run {
    keel_session *s;
    bool divergence;
    struct place *place; // [n_batch] by place of the batch
    float *kl_host;      // [n_batch, 2]
    uint64_t done, total;
    bool (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
};

static void want_second(struct keel_layout *l, void *user)
{
    keel_session *s = user;
    const struct keel_gemma3 *c = &s->model->cfg;
    keel_want(l, &s->scorer.rows[1], 4ull * s->n_batch * c->width);
    keel_want(l, &s->scorer.logits[1], 4ull * s->chunk * c->vocab);
    keel_want(l, &s->kl, keel_div_up(s->n_batch, s->chunk) * keel_align_up(8ull * s->chunk, 256));
}

// --- recording -----------------------------------------------------------------------------------

// Normalised final residual at the places into scorer.rows[which].
static void record_rows(const struct run *r, const struct keel_kv *kv, bool adapted, uint32_t which)
{
    keel_session *s = r->s;
    const struct keel_gemma3 *c = &s->model->cfg;
    const uint32_t n = s->batch.n_places;
    struct keel_pass p = keel_session_pass(s, s->rec, adapted);
    p.kv = kv;
    keel_pass_embed(&p);
    keel_pass_blocks(&p);
    if (n > 0) {
        keel_gather_rows(s->rec, s->acts.x, s->batch.place, s->scorer.rows[which], n, c->width);
        keel_rmsnorm(s->rec, &(struct keel_rmsnorm_params){ .x = s->scorer.rows[which], .w = s->model->w.output_norm,
                                                            .y = s->scorer.rows[which], .n_rows = n, .width = c->width,
                                                            .eps = c->eps });
    }
}

// Logits and statistics of one chunk of model `which`.
static void record_chunk(const struct run *r, uint32_t which, uint32_t p, uint32_t m, struct keel_span stats)
{
    keel_session *s = r->s;
    const struct keel_gemma3 *c = &s->model->cfg;
    const struct keel_pass pass = keel_session_pass(s, s->rec, false); // the head has no adapter
    const struct keel_span rows = keel_span_sub(s->scorer.rows[which], 4ull * p * c->width, 4ull * m * c->width);
    keel_pass_head(&pass, rows, s->scorer.logits[which], m);
    keel_xent(s->rec, &(struct keel_xent_params){ .logits = s->scorer.logits[which],
                                                  .targets = keel_place_span(&s->batch, s->batch.target, p, m, 4),
                                                  .stats = stats, .partial = s->scorer.partial, .n_rows = m, .vocab = c->vocab });
}

static struct keel_span kl_span(const keel_session *s, uint32_t p, uint32_t m)
{
    return keel_span_sub(s->kl, p / s->chunk * keel_align_up(8ull * s->chunk, 256), 8ull * m);
}

static void record_results(const struct run *r)
{
    keel_session *s = r->s;
    for (uint32_t p = 0; p < s->batch.n_places; p += s->chunk) {
        const uint32_t m = KEEL_MIN(s->chunk, s->batch.n_places - p);
        record_chunk(r, 0, p, m, keel_place_span(&s->batch, s->batch.stats, p, m, 16));
        if (r->divergence) {
            record_chunk(r, 1, p, m, s->scorer.stats);
            keel_kl(s->rec, &(struct keel_kl_params){ .logits_p = s->scorer.logits[0], .logits_q = s->scorer.logits[1],
                                                      .stats_p = keel_place_span(&s->batch, s->batch.stats, p, m, 16),
                                                      .stats_q = s->scorer.stats, .kl = kl_span(s, p, m),
                                                      .partial = s->scorer.partial, .n_rows = m, .vocab = s->model->cfg.vocab });
        }
    }
}

// --- results -------------------------------------------------------------------------------------

static keel_status store_results(const struct run *r)
{
    keel_status st = KEEL_OK;
    keel_session *s = r->s;
    keel_span_fetch(s->model->dev, s->batch.stats);
    for (uint32_t p = 0; p < s->batch.n_places; p += s->chunk) {
        const uint32_t m = KEEL_MIN(s->chunk, s->batch.n_places - p);
        const float *stats = keel_span_host(keel_place_span(&s->batch, s->batch.stats, p, m, 16));
        if (r->divergence) {
            KEEL_TRY(keel_download(s->model->dev, r->kl_host, kl_span(s, p, m), 8ull * m));
        }
        for (uint32_t i = 0; i < m; i++) {
            const struct place *at = &r->place[p + i];
            const float a = r->divergence ? r->kl_host[2 * i] : stats[4 * i + 2] - stats[4 * i + 1];
            const float b = r->divergence ? r->kl_host[2 * i + 1] : stats[4 * i + 3];
            if (!isfinite(a) || !isfinite(b)) {
                KEEL_FAIL(s->model->log, KEEL_ERR_NUMERIC, "row %zu, token %u: NaN or infinity; run `keel devices` and report the driver",
                          at->item->row + 1, at->item->first + at->i);
            }
            const uint32_t scored = at->item->n - at->item->first;
            if (at->i >= scored) {
                at->item->alt_out[at->i - scored] = a;
                continue;
            }
            at->item->a[at->i] = a;
            if (at->item->b) {
                at->item->b[at->i] = b;
            }
        }
    }
out:
    return st;
}

// Runs the batch that was put together. `kv`: caches of the models for a part of a long row, else NULL.
static keel_status run_batch(struct run *r, const struct keel_kv *const kv[2])
{
    keel_status st = KEEL_OK;
    keel_session *s = r->s;
    keel_batch_ready(&s->batch, s->model->dev);
    record_rows(r, kv ? kv[0] : NULL, !r->divergence, 0);
    if (r->divergence) {
        record_rows(r, kv ? kv[1] : NULL, true, 1);
    }
    record_results(r);
    KEEL_TRY(keel_recorder_submit(s->rec));
    KEEL_TRY(keel_recorder_wait(s->rec));
    KEEL_TRY(store_results(r));
    const struct keel_pass pass = keel_session_pass(s, s->rec, true);
    KEEL_TRY(keel_pass_after(&pass));
    r->done += s->batch.n_tokens;
    keel_batch_clear(&s->batch);
    if (r->progress && !r->progress(r->user, r->done, r->total)) {
        st = KEEL_INTERRUPTED;
    }
out:
    if (st != KEEL_OK) {
        keel_recorder_reset(s->rec);
        keel_batch_clear(&s->batch);
    }
    return st;
}

// Adds tokens [from, to) of a row, with the places that predict its scored tokens. The last token predicts nothing: it is left out.
static keel_status add_part(struct run *r, struct item *it, uint32_t from, uint32_t to, bool cached)
{
    keel_session *s = r->s;
    const struct keel_batch_row row = { .ids = it->ids + from, .n = to - from, .images = it->images, .n_images = it->n_images,
                                        .from = from, .pos = from, .cached = cached, .prompt = it->prompt,
                                        .number = (uint32_t)it->row };
    uint32_t t0;
    const keel_status st = keel_batch_add(&s->batch, &row, &t0);
    for (uint32_t i = from; st == KEEL_OK && i < to; i++) {
        if (i + 1 >= it->first && i + 1 < it->n) {
            r->place[s->batch.n_places] = (struct place){ it, i + 1 - it->first };
            keel_batch_place(&s->batch, t0 + i - from, it->ids[i + 1], 0.0f);
        }
    }
    for (uint32_t k = 0; st == KEEL_OK && to == it->n - 1 && k < it->n_alt; k++) {
        r->place[s->batch.n_places] = (struct place){ it, it->n - it->first + k };
        keel_batch_place(&s->batch, t0 + to - 1 - from, it->alt[k], 0.0f);
    }
    return st;
}

// Tokens [from, end) of a row through the caches, which hold those before.
static keel_status cached_part(struct run *r, struct item *it, uint32_t from, uint32_t end)
{
    keel_status st = KEEL_OK;
    const struct keel_kv *kv[2] = { NULL, NULL };
    KEEL_TRY(keel_session_cache(r->s, 1, &kv[0]));
    if (r->divergence) {
        KEEL_TRY(keel_session_cache(r->s, 2, &kv[1]));
    }
    for (uint32_t to; from < end; from = to) {
        to = keel_batch_cut(it->images, it->n_images, from, KEEL_MIN(from + r->s->n_batch, end));
        if (to == it->n - 1 && to - KEEL_MAX(from, it->first - 1) + it->n_alt > r->s->n_batch) {
            to -= it->n_alt; // nearly every token of the part has a place: there is no room for those of the alternatives
        }
        KEEL_TRY(add_part(r, it, from, to, true));
        KEEL_TRY(run_batch(r, kv));
    }
out:
    return st;
}

// --- shared prefixes -----------------------------------------------------------------------------

static bool same_images(const struct item *a, const struct item *b)
{
    bool same = a->n_images == b->n_images;
    for (uint32_t i = 0; same && i < a->n_images; i++) {
        same = a->images[i].at == b->images[i].at && a->images[i].n == b->images[i].n && a->images[i].embeds == b->images[i].embeds;
    }
    return same;
}

// First tokens of both rows that are equal, up to `most`, and before anything is scored; 0 where an image is not among them.
static uint32_t shared_prefix(const struct item *a, const struct item *b, uint32_t most)
{
    uint32_t n = 0;
    most = KEEL_MIN(most, KEEL_MIN(a->first, b->first) - 1);
    while (n < most && a->ids[n] == b->ids[n]) {
        n++;
    }
    const struct keel_image_tokens *last = a->n_images ? &a->images[a->n_images - 1] : NULL;
    return same_images(a, b) && (!last || last->at + last->n <= n) ? n : 0;
}

// How many rows from the first on are cheaper together, and the prefix that they share. 1: none.
static size_t rows_together(const keel_session *s, const struct item *items, size_t n_items, uint32_t *prefix)
{
    size_t best = 1;
    uint64_t saved = 0;
    uint32_t shared = items[0].n;
    for (size_t i = 1; i < n_items; i++) {
        shared = shared_prefix(&items[0], &items[i], shared);
        // A ring of the cache keeps what the rest of one row overwrites only up to the length of a batch.
        if (items[0].n - 1 - KEEL_MIN(shared, items[0].n - 1) > s->n_batch || items[i].n - 1 - shared > s->n_batch) {
            break;
        }
        const uint64_t passes = PASS_TOKENS * (i + 2), gain = (uint64_t)shared * i;
        if (gain <= passes) {
            if (shared <= PASS_TOKENS) {
                break; // more rows would not help
            }
            continue;
        }
        if (gain - passes > saved) {
            saved = gain - passes;
            best = i + 1;
            *prefix = shared;
        }
    }
    return best;
}

static keel_status run_together(struct run *r, struct item *items, size_t n, uint32_t prefix)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(cached_part(r, &items[0], 0, prefix));
    for (size_t i = 0; i < n; i++) {
        r->done += i > 0 ? prefix : 0;
        if (items[i].first < items[i].n) {
            KEEL_TRY(cached_part(r, &items[i], prefix, items[i].n - 1));
        }
    }
out:
    return st;
}

// --- rows ----------------------------------------------------------------------------------------

static keel_status check_images(const struct run *r, const struct item *it, size_t row)
{
    keel_status st = KEEL_OK;
    const keel_log *log = r->s->model->log;
    char what[32];
    snprintf(what, sizeof what, "row %zu", row + 1);
    KEEL_TRY(keel_images_check(it->images, it->n_images, it->n, r->s->n_batch, what, log));
    const struct keel_image_tokens *last = it->n_images ? &it->images[it->n_images - 1] : NULL;
    if (last && last->at + last->n > it->first) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: scoring starts at token %u, inside or before an image; image tokens have no likelihood",
                  what, it->first);
    }
out:
    return st;
}

static keel_status check_rows(const struct run *r, const struct item *items, size_t n_items)
{
    keel_status st = KEEL_OK;
    const keel_log *log = r->s->model->log;
    for (size_t i = 0; i < n_items; i++) {
        const struct item *it = &items[i];
        if (it->first < 1 || it->first > it->n) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "row %zu: scoring starts at token %u of %u; there must be one before it", i + 1, it->first, it->n);
        }
        if (it->n_alt > 0 && (it->n_alt >= it->first || it->first >= it->n || 2 * it->n_alt > r->s->n_batch)) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "row %zu: %u alternatives; a row takes fewer than it has tokens before those scored (%u)", i + 1, it->n_alt,
                      it->first);
        }
        if (it->prompt > it->first) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "row %zu: a prompt of %u tokens, but scoring starts at token %u", i + 1, it->prompt, it->first);
        }
        for (uint32_t k = 0; k < it->n_alt; k++) {
            if (it->alt[k] < 0 || (uint32_t)it->alt[k] >= r->s->model->cfg.vocab) {
                KEEL_FAIL(log, KEEL_ERR_ARG, "row %zu: token id %d is outside the vocabulary", i + 1, it->alt[k]);
            }
        }
        if (it->n > r->s->n_ctx) {
            KEEL_FAIL(log, KEEL_ERR_DATA, "row %zu has %u tokens, the context only %u; raise --ctx or shorten the row", i + 1, it->n,
                      r->s->n_ctx);
        }
        for (uint32_t t = 0; t < it->n; t++) {
            if (it->ids[t] < 0 || (uint32_t)it->ids[t] >= r->s->model->cfg.vocab) {
                KEEL_FAIL(log, KEEL_ERR_ARG, "row %zu: token id %d is outside the vocabulary", i + 1, it->ids[t]);
            }
        }
        KEEL_TRY(check_images(r, it, i));
    }
out:
    return st;
}

static keel_status run_items(struct run *r, struct item *items, size_t n_items)
{
    keel_status st = KEEL_OK;
    keel_session *s = r->s;
    KEEL_TRY(check_rows(r, items, n_items));
    r->place = malloc(s->n_batch * sizeof *r->place);
    r->kl_host = malloc(2ull * s->n_batch * sizeof *r->kl_host);
    if (!r->place || !r->kl_host) {
        KEEL_FAIL(s->model->log, KEEL_ERR_NO_MEMORY, "no memory to score %zu rows", n_items);
    }
    for (size_t i = 0; i < n_items; i++) {
        r->total += items[i].n - 1;
        if (items[i].n_images > 0) {
            KEEL_TRY(keel_batch_make_image_room(&s->batch, s->model->dev));
        }
    }
    keel_batch_clear(&s->batch);
    for (size_t i = 0, together; i < n_items; i += together) {
        struct item *it = &items[i];
        const uint32_t n = it->n - 1;
        uint32_t prefix = 0;
        // Hooks may tell the prompts of rows apart, and who captures wants every token of each.
        together = s->hooks ? 1 : rows_together(s, it, n_items - i, &prefix);
        if (together > 1) {
            if (s->batch.n_tokens > 0) {
                KEEL_TRY(run_batch(r, NULL));
            }
            KEEL_TRY(run_together(r, it, together, prefix));
            continue;
        }
        if (it->first == it->n || n == 0) {
            continue; // nothing to score
        }
        if (s->batch.n_tokens > 0 && n > keel_batch_room(&s->batch)) {
            KEEL_TRY(run_batch(r, NULL));
        }
        if (n > s->n_batch) {
            KEEL_TRY(cached_part(r, it, 0, n));
        } else {
            KEEL_TRY(add_part(r, it, 0, n, false));
        }
    }
    if (s->batch.n_tokens > 0) {
        KEEL_TRY(run_batch(r, NULL));
    }
out:
    free(r->place);
    free(r->kl_host);
    return st;
}

keel_status keel_session_score(keel_session *s, struct keel_score_row *rows, size_t n_rows,
                               bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    struct run r = { .s = s, .progress = progress, .user = user };
    struct item *items = calloc(n_rows + 1, sizeof *items);
    if (!items) {
        KEEL_ERROR(s->model->log, "no memory to score %zu rows", n_rows);
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < n_rows; i++) {
        items[i] = (struct item){ .ids = rows[i].ids, .n = rows[i].n, .first = rows[i].first,
                                  .prompt = rows[i].prompt ? rows[i].prompt : rows[i].first, .row = i, .a = rows[i].logprobs,
                                  .b = rows[i].entropy, .images = rows[i].images, .n_images = rows[i].n_images, .alt = rows[i].alt,
                                  .n_alt = rows[i].n_alt, .alt_out = rows[i].alt_logprobs };
    }
    const keel_status st = run_items(&r, items, n_rows);
    free(items);
    return st;
}

keel_status keel_session_kl(keel_session *s, struct keel_kl_row *rows, size_t n_rows,
                            bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    keel_status st = KEEL_OK;
    struct run r = { .s = s, .divergence = true, .progress = progress, .user = user };
    struct item *items = calloc(n_rows + 1, sizeof *items);
    if (!items) {
        KEEL_FAIL(s->model->log, KEEL_ERR_NO_MEMORY, "no memory to compare %zu rows", n_rows);
    }
    if (!s->second) {
        KEEL_TRY(keel_layout_make(&s->second, s->model->dev, KEEL_HEAP_DEVICE, "second model's logits", want_second, s));
    }
    for (size_t i = 0; i < n_rows; i++) {
        items[i] = (struct item){ .ids = rows[i].ids, .n = rows[i].n, .first = rows[i].first, .prompt = rows[i].first, .row = i, .a = rows[i].kl,
                                  .b = rows[i].kl_reverse, .images = rows[i].images, .n_images = rows[i].n_images };
    }
    KEEL_TRY(run_items(&r, items, n_rows));
out:
    free(items);
    return st;
}
