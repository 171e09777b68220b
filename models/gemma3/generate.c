// SPDX-License-Identifier: MIT
// gemma3/generate.c: several prompts continued together, so that one read of the weights serves a token of each.
// Owns a cache with a part for each sequence. Local layers keep all rows there: answers are short, and a ring for each would
// need its own modulus.
#include "session_internal.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PARALLEL 16u                      // sequences at once, by default
#define CACHE_MAX (UINT64_C(256) << 20)   // bytes of their cache
#define ONE_GROUP_MAX 256u // rows of a sequence up to which attention takes all sequences in one dispatch and skips what is not seen

struct stream {
    struct keel_generate_row *row;
    uint64_t seed;
    int32_t *ids;   // [row->n + row->cap] prompt and answer
    uint32_t n;     // tokens in ids
    uint32_t n_kv;  // of those, how many are in the cache
};

struct run {
    keel_session *s;
    const struct keel_sample_params *sample;
    keel_recorder *rec, *step; // step: one token of each stream, replayed
    keel_heap *heap;
    struct keel_kv kv;
    uint32_t seq_rows; // of the cache, for each sequence
    struct stream *stream, **active, **placed; // [n_parallel]; placed: whose token is at each place of the batch
    uint32_t n_parallel, n_active;
    uint32_t recorded, bucket; // streams and context that `step` holds
    float *logits;             // [n_parallel, V]
    uint64_t done, total;
    bool (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
};

// --- life ----------------------------------------------------------------------------------------

static void want_cache(struct keel_layout *l, void *user)
{
    struct run *r = user;
    const uint32_t rows = r->seq_rows * r->n_parallel;
    keel_kv_layout(l, &r->kv, &r->s->model->cfg, rows, rows);
}

static uint64_t cache_bytes(const struct run *r, uint32_t n)
{
    const struct keel_gemma3 *c = &r->s->model->cfg;
    return 2ull * c->n_layers * r->seq_rows * n * keel_kv_row_bytes(c, r->s->kv_type);
}

static keel_status begin(struct run *r, struct keel_generate_row *rows, size_t n_rows, uint32_t n_parallel)
{
    keel_status st = KEEL_OK;
    keel_session *s = r->s;
    const struct keel_gemma3 *c = &s->model->cfg;
    for (size_t i = 0; i < n_rows; i++) {
        if (rows[i].n == 0 || (uint64_t)rows[i].n + rows[i].cap > s->n_ctx) {
            KEEL_FAIL(s->model->log, KEEL_ERR_DATA, "row %zu: a prompt of %u tokens and an answer of up to %u do not fit a context of "
                      "%u; raise --ctx or shorten them", i + 1, rows[i].n, rows[i].cap, s->n_ctx);
        }
        KEEL_TRY(keel_images_check(rows[i].images, rows[i].n_images, rows[i].n, s->n_batch, "a prompt", s->model->log));
        if (rows[i].n_images > 0) {
            KEEL_TRY(keel_batch_make_image_room(&s->batch, s->model->dev));
        }
        r->seq_rows = KEEL_MAX(r->seq_rows, rows[i].n + rows[i].cap);
        r->total += rows[i].cap;
        rows[i].n_out = 0;
    }
    const uint64_t range = keel_device_caps(s->model->dev)->max_range;
    uint32_t n = KEEL_MIN(n_parallel ? n_parallel : PARALLEL, KEEL_MIN(s->n_batch, s->chunk));
    n = (uint32_t)KEEL_MIN((uint64_t)n, n_rows);
    while (n > 1 && (cache_bytes(r, n) > CACHE_MAX || (uint64_t)r->seq_rows * n * keel_kv_row_bytes(c, s->kv_type) > range)) {
        n--;
    }
    r->n_parallel = n;
    r->stream = calloc(n, sizeof *r->stream);
    r->active = calloc(n, sizeof *r->active);
    r->placed = calloc(n, sizeof *r->placed);
    r->kv.type = s->kv_type;
    r->kv.k = calloc(c->n_layers, sizeof *r->kv.k);
    r->kv.v = calloc(c->n_layers, sizeof *r->kv.v);
    r->logits = malloc((size_t)n * c->vocab * sizeof *r->logits);
    if (!r->stream || !r->active || !r->placed || !r->kv.k || !r->kv.v || !r->logits) {
        KEEL_FAIL(s->model->log, KEEL_ERR_NO_MEMORY, "no memory to continue %u prompts together", n);
    }
    KEEL_TRY(keel_layout_make(&r->heap, s->model->dev, KEEL_HEAP_DEVICE, "kv cache of several sequences", want_cache, r));
    KEEL_TRY(keel_recorder_create(&r->rec, s->model->dev, NULL));
    keel_kv_clear(r->rec, &r->kv, c);
    KEEL_TRY(keel_recorder_create(&r->step, s->model->dev, &(struct keel_recorder_params){ .replay = true }));
out:
    return st;
}

static void finish(struct run *r)
{
    for (uint32_t i = 0; r->stream && i < r->n_parallel; i++) {
        free(r->stream[i].ids);
    }
    keel_recorder_destroy(&r->rec);
    keel_recorder_destroy(&r->step);
    keel_heap_destroy(&r->heap);
    free(r->stream);
    free(r->active);
    free(r->placed);
    free(r->kv.k);
    free(r->kv.v);
    free(r->logits);
}

// --- a pass --------------------------------------------------------------------------------------

// Adds a stream's tokens [n_kv, end) to the batch; a place after the last one if it ends the text so far.
static keel_status add(struct run *r, struct stream *t, uint32_t end, bool split)
{
    struct keel_batch *b = &r->s->batch;
    const struct keel_batch_row row = {
        .ids = t->ids + t->n_kv, .n = end - t->n_kv, .images = t->row->images, .n_images = t->n_kv < t->row->n ? t->row->n_images : 0,
        .from = t->n_kv, .pos = t->n_kv, .cached = true, .slot0 = (uint32_t)(t - r->stream) * r->seq_rows, .split = split,
        .prompt = t->row->n, .decode = t->n_kv >= t->row->n, .number = (uint32_t)(t->seed - r->sample->seed),
    };
    uint32_t first;
    const keel_status st = keel_batch_add(b, &row, &first);
    t->n_kv = end;
    if (st == KEEL_OK && end == t->n) {
        r->placed[b->n_places] = t;
        keel_batch_place(b, first + row.n - 1, 0, 0.0f);
    }
    return st;
}

static void record(const struct run *r, const struct keel_pass *p)
{
    keel_pass_embed(p);
    keel_pass_blocks(p);
    if (r->s->batch.n_places > 0) {
        keel_session_record_logits(r->s, p, r->s->batch.n_places);
    }
}

// Draws a token for each place and adds it to its stream; streams that are done leave `active`.
static keel_status draw(struct run *r)
{
    keel_status st = KEEL_OK;
    keel_session *s = r->s;
    const uint32_t vocab = s->model->cfg.vocab, n = s->batch.n_places;
    const size_t bytes = (size_t)n * vocab * sizeof(float);
    if (n == 0) {
        goto out;
    }
    KEEL_TRY(keel_download(s->model->dev, r->logits, keel_span_sub(s->scorer.logits[0], 0, bytes), bytes));
    for (uint32_t p = 0; p < n; p++) {
        struct stream *t = r->placed[p];
        const float *z = r->logits + (size_t)p * vocab;
        struct keel_sample_params how = *r->sample;
        how.seed = t->seed;
        for (uint32_t i = 0; i < vocab; i++) {
            if (!isfinite(z[i])) {
                KEEL_FAIL(s->model->log, KEEL_ERR_NUMERIC,
                          "the logits after %u tokens hold NaN or infinity; run `keel devices` and report the driver", t->n);
            }
        }
        const int32_t id = keel_sample(z, vocab, &how, t->ids, t->n, t->n, s->candidates);
        t->row->out[t->row->n_out++] = id;
        t->ids[t->n++] = id;
        r->done++;
        if (t->row->n_out == t->row->cap || keel_token_is_end(s->model, id)) {
            r->done += t->row->cap - t->row->n_out;
            t->row = NULL;
        }
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < r->n_active; i++) {
        if (r->active[i]->row) {
            r->active[kept++] = r->active[i];
        }
    }
    r->n_active = kept;
    if (r->progress && !r->progress(r->user, r->done, r->total)) {
        st = KEEL_INTERRUPTED;
    }
out:
    return st;
}

// All prompts into the cache, several in a pass; draws the first token of each.
static keel_status prefill(struct run *r)
{
    keel_status st = KEEL_OK;
    keel_session *s = r->s;
    struct keel_pass p = keel_session_pass(s, r->rec, true);
    const uint32_t n = r->n_active;
    p.kv = &r->kv;
    for (uint32_t i = 0; i < n;) {
        keel_batch_clear(&s->batch);
        while (i < n && keel_batch_room(&s->batch) > 0) {
            struct stream *t = &r->stream[i];
            const uint32_t room = keel_batch_room(&s->batch);
            const uint32_t end = keel_batch_cut(t->row->images, t->row->n_images, t->n_kv, (uint32_t)KEEL_MIN((uint64_t)t->n_kv + room, t->n));
            if (end == t->n_kv) {
                break; // an image that only an empty batch has room for
            }
            KEEL_TRY(add(r, t, end, true));
            i += t->n_kv == t->n;
        }
        keel_batch_ready(&s->batch, s->model->dev);
        record(r, &p);
        KEEL_TRY(keel_recorder_submit(r->rec));
        KEEL_TRY(keel_recorder_wait(r->rec));
        KEEL_TRY(draw(r));
    }
out:
    return st;
}

// One more token of each active stream; recorded anew when their number changes or the context outgrows the recording.
static keel_status decode(struct run *r)
{
    keel_status st = KEEL_OK;
    keel_session *s = r->s;
    const bool split = r->seq_rows > ONE_GROUP_MAX;
    uint32_t longest = 0;
    keel_batch_clear(&s->batch);
    for (uint32_t i = 0; i < r->n_active; i++) {
        struct stream *t = r->active[i];
        longest = KEEL_MAX(longest, t->n);
        KEEL_TRY(add(r, t, t->n, split));
    }
    keel_batch_ready(&s->batch, s->model->dev);
    if (r->recorded != r->n_active || longest > r->bucket) {
        struct keel_pass p = keel_session_pass(s, r->step, true);
        p.kv = &r->kv;
        p.bucket = KEEL_MIN(keel_session_bucket(longest), r->seq_rows);
        p.seq_rows = split ? 0 : r->seq_rows;
        r->recorded = r->bucket = 0;
        keel_recorder_reset(r->step);
        record(r, &p);
        KEEL_TRY(keel_recorder_submit(r->step));
        r->recorded = r->n_active;
        r->bucket = p.bucket;
    } else {
        KEEL_TRY(keel_recorder_replay(r->step));
    }
    KEEL_TRY(keel_recorder_wait(r->step));
    KEEL_TRY(draw(r));
out:
    return st;
}

static keel_status start_streams(struct run *r, struct keel_generate_row *rows, size_t first, size_t n)
{
    r->n_active = 0;
    for (size_t i = 0; i < n; i++) {
        struct keel_generate_row *row = &rows[first + i];
        struct stream *t = &r->stream[i];
        free(t->ids);
        *t = (struct stream){ .row = row, .seed = r->sample->seed + first + i, .n = row->n };
        t->ids = malloc((row->n + row->cap) * sizeof *t->ids);
        if (!t->ids) {
            KEEL_ERROR(r->s->model->log, "no memory for a sequence of %u tokens", row->n + row->cap);
            return KEEL_ERR_NO_MEMORY;
        }
        memcpy(t->ids, row->ids, row->n * sizeof *t->ids);
        r->active[r->n_active++] = t;
    }
    return KEEL_OK;
}

keel_status keel_session_generate(keel_session *s, struct keel_generate_row *rows, size_t n_rows,
                                  const struct keel_sample_params *sample, uint32_t n_parallel,
                                  bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    static const struct keel_sample_params defaults = { KEEL_SAMPLE_DEFAULTS };
    keel_status st = KEEL_OK;
    struct run r = { .s = s, .sample = sample ? sample : &defaults, .progress = progress, .user = user };
    if (n_rows == 0) {
        goto out;
    }
    KEEL_TRY(begin(&r, rows, n_rows, n_parallel));
    for (size_t i = 0; i < n_rows; i += r.n_parallel) {
        KEEL_TRY(start_streams(&r, rows, i, KEEL_MIN((size_t)r.n_parallel, n_rows - i)));
        KEEL_TRY(prefill(&r));
        while (r.n_active > 0) {
            KEEL_TRY(decode(&r));
        }
    }
out:
    finish(&r);
    return st;
}
