// SPDX-License-Identifier: MIT
// gemma3/batch.c: turns rows of tokens into what a pass needs: ids, visible ranges, rotary tables, embeddings of images, places
// of logits. Owns host arrays and the room for images; other spans belong to the heap of their layout.
#include "gemma3.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

keel_status keel_batch_init(struct keel_batch *b, const struct keel_gemma3 *c, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t half = c->head_dim / 2;
    memset(b, 0, sizeof *b);
    b->c = c;
    for (uint32_t kind = 0; kind < 2; kind++) {
        b->inv_freq[kind] = malloc(half * sizeof(float));
        if (!b->inv_freq[kind]) {
            KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for rotary frequencies");
        }
        // In float throughout, in the order of transformers, whose rounding decides the angles of late positions.
        for (uint32_t i = 0; i < half; i++) {
            const float e = (float)(2 * i) / (float)c->head_dim;
            b->inv_freq[kind][i] = 1.0f / powf(c->rope_base[kind], e) / c->rope_factor[kind];
        }
    }
out:
    return st;
}

void keel_batch_finish(struct keel_batch *b)
{
    free(b->inv_freq[0]);
    free(b->inv_freq[1]);
    free(b->group);
    keel_heap_destroy(&b->image_heap);
    keel_batch_forget_hooks(b);
    memset(b, 0, sizeof *b);
}

void keel_batch_layout(struct keel_layout *l, struct keel_batch *b, const struct keel_gemma3 *c, uint32_t cap, uint32_t places,
                       uint32_t chunk)
{
    b->cap = cap;
    b->cap_places = places;
    b->chunk = chunk;
    keel_want(l, &b->ids, (uint64_t)cap * 4);
    for (uint32_t kind = 0; kind < 2; kind++) {
        keel_want(l, &b->spans[kind], (uint64_t)cap * sizeof(struct keel_token_span));
        keel_want(l, &b->rope[kind], (uint64_t)cap * c->head_dim * 4);
    }
    if (places > 0) {
        const uint64_t n_chunks = keel_div_up(places, chunk);
        keel_want(l, &b->place, (uint64_t)places * 4);
        keel_want(l, &b->target, n_chunks * keel_align_up((uint64_t)chunk * 4, 256));
        keel_want(l, &b->weight, n_chunks * keel_align_up((uint64_t)chunk * 4, 256));
        keel_want(l, &b->stats, n_chunks * keel_align_up((uint64_t)chunk * 16, 256));
    }
}

void keel_batch_image_layout(struct keel_layout *l, struct keel_batch *b)
{
    keel_want(l, &b->image_rows, 4ull * b->cap * b->c->width);
    keel_want(l, &b->image_place, 4ull * b->cap);
}

static void want_images(struct keel_layout *l, void *user)
{
    keel_batch_image_layout(l, user);
}

keel_status keel_batch_make_image_room(struct keel_batch *b, keel_device *dev)
{
    return b->image_heap ? KEEL_OK : keel_layout_make(&b->image_heap, dev, KEEL_HEAP_HOST, "image tokens", want_images, b);
}

void keel_batch_clear(struct keel_batch *b)
{
    b->n_tokens = b->n_groups = b->n_places = b->n_image_tokens = 0;
}

static keel_status add_group(struct keel_batch *b)
{
    if (b->n_groups == b->cap_groups) {
        const uint32_t cap = b->cap_groups ? b->cap_groups * 2 : 4;
        struct keel_batch_group *g = realloc(b->group, cap * sizeof *g);
        if (!g) {
            KEEL_ERROR(NULL, "no memory for %u attention groups", cap);
            return KEEL_ERR_NO_MEMORY;
        }
        b->group = g;
        b->cap_groups = cap;
    }
    b->group[b->n_groups++] = (struct keel_batch_group){.t0 = b->n_tokens};
    return KEEL_OK;
}

static void put_rope(struct keel_batch *b, uint32_t t, uint32_t pos)
{
    const uint32_t half = b->c->head_dim / 2;
    for (uint32_t kind = 0; kind < 2; kind++) {
        float *cs = (float *)keel_span_host(b->rope[kind]) + (size_t)t * half * 2;
        for (uint32_t i = 0; i < half; i++) {
            const float angle = (float)pos * b->inv_freq[kind][i];
            cs[2 * i] = cosf(angle);
            cs[2 * i + 1] = sinf(angle);
        }
    }
}

// --- images --------------------------------------------------------------------------------------

uint32_t keel_batch_cut(const struct keel_image_tokens *images, uint32_t n_images, uint32_t from, uint32_t to)
{
    for (uint32_t i = 0; i < n_images && images[i].at < to; i++) {
        if (images[i].at >= from && images[i].at + images[i].n > to) {
            return images[i].at;
        }
    }
    return to;
}

keel_status keel_images_check(const struct keel_image_tokens *images, uint32_t n_images, uint32_t n, uint32_t n_batch,
                              const char *what, const keel_log *log)
{
    keel_status st = KEEL_OK;
    uint32_t end = 0;
    for (uint32_t i = 0; i < n_images; i++) {
        const struct keel_image_tokens *im = &images[i];
        if (im->n == 0 || !im->embeds || im->at < end || im->at > n || im->n > n - im->at) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "%s: image %u stands at tokens [%u, %" PRIu64 ") of %u; images must be sorted, apart "
                      "and inside", what, i + 1, im->at, (uint64_t)im->at + im->n, n);
        }
        if (im->n > n_batch && n > n_batch) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "%s: an image of %u tokens cannot be computed in passes of %u; raise --batch-tokens to "
                      "at least %u", what, im->n, n_batch, im->n);
        }
        end = im->at + im->n;
    }
out:
    return st;
}

// Appends the embeddings of one token; `row` [D].
static void put_image_row(struct keel_batch *b, uint32_t t, const float *row)
{
    const uint32_t i = b->n_image_tokens++, width = b->c->width;
    ((uint32_t *)keel_span_host(b->image_place))[i] = t;
    memcpy((float *)keel_span_host(b->image_rows) + (size_t)i * width, row, width * sizeof *row);
}

// --- rows ----------------------------------------------------------------------------------------

keel_status keel_batch_add(struct keel_batch *b, const struct keel_batch_row *row, uint32_t *first)
{
    KEEL_ASSERT(row->n > 0 && row->n <= keel_batch_room(b));
    if (b->n_groups == 0 || row->split) {
        const keel_status st = add_group(b);
        if (st != KEEL_OK) {
            return st;
        }
    }
    struct keel_batch_group *g = &b->group[b->n_groups - 1];
    uint32_t *ids = keel_span_host(b->ids);
    const uint32_t t0 = b->n_tokens, base = row->cached ? row->slot0 + row->pos : t0 - g->t0; // cache row of the first token
    const uint32_t start = row->cached ? row->slot0 : base;                                  // cache row of position 0
    const struct keel_image_tokens *im = row->images, *const im_end = im + row->n_images;
    *first = t0;
    for (uint32_t i = 0; i < row->n; i++) {
        const uint32_t slot = base + i, at = row->from + i;
        uint32_t block = slot, block_end = slot + 1; // tokens that see each other whatever their order: an image, or one token
        while (im < im_end && at >= im->at + im->n) {
            im++;
        }
        if (im < im_end && at >= im->at) {
            KEEL_ASSERT(im->at >= row->from && im->at + im->n <= row->from + row->n);
            block = slot - (at - im->at);
            block_end = block + im->n;
            put_image_row(b, t0 + i, im->embeds + (size_t)(at - im->at) * b->c->width);
        }
        ids[t0 + i] = (uint32_t)row->ids[i];
        // The window bounds how far back a token looks, inside its image too; forward an image is seen to its end (Gemma 3 and
        // transformers from 5.24 on: window AND (causal OR same image)).
        for (uint32_t kind = 0; kind < 2; kind++) {
            struct keel_token_span *s = (struct keel_token_span *)keel_span_host(b->spans[kind]) + t0 + i;
            const uint32_t w = kind == KEEL_LOCAL && b->c->window > 0 ? b->c->window : UINT32_MAX;
            const uint32_t end = base + row->n;
            *s = (struct keel_token_span){
                .lo = slot - start >= w ? slot - w + 1 : start,
                .hi = block_end,
                .slot = slot,
                .q_lo = block,
                .q_hi = end - slot > w ? slot + w : end,
            };
        }
        put_rope(b, t0 + i, row->pos + i);
    }
    if (b->n_sets > 0) {
        keel_batch_mark(b, row, t0);
    }
    b->n_tokens += row->n;
    g->n += row->n;
    return KEEL_OK;
}

static size_t place_index(const struct keel_batch *b, uint32_t p, uint32_t size)
{
    const uint64_t stride = keel_align_up((uint64_t)b->chunk * size, 256) / size;
    return (size_t)(p / b->chunk * stride + p % b->chunk);
}

void keel_batch_place(struct keel_batch *b, uint32_t t, int32_t target, float weight)
{
    KEEL_ASSERT(b->n_places < b->cap_places && t < b->n_tokens);
    const uint32_t p = b->n_places++;
    ((uint32_t *)keel_span_host(b->place))[p] = t;
    ((uint32_t *)keel_span_host(b->target))[place_index(b, p, 4)] = (uint32_t)target;
    ((float *)keel_span_host(b->weight))[place_index(b, p, 4)] = weight;
}

struct keel_span keel_place_span(const struct keel_batch *b, struct keel_span s, uint32_t p, uint32_t n, uint32_t size)
{
    KEEL_ASSERT(p % b->chunk == 0 && n <= b->chunk);
    return keel_span_sub(s, (uint64_t)place_index(b, p, size) * size, (uint64_t)n * size);
}

static void limits(struct keel_batch_group *g, uint32_t kind, const struct keel_token_span *s)
{
    g->max_span[kind] = g->max_union[kind] = g->max_q_union[kind] = 0;
    for (uint32_t t = 0; t < g->n; t += KEEL_ATTENTION_GROUP) {
        uint32_t lo = UINT32_MAX, hi = 0, q_lo = UINT32_MAX, q_hi = 0;
        for (uint32_t i = t; i < KEEL_MIN(t + KEEL_ATTENTION_GROUP, g->n); i++) {
            lo = KEEL_MIN(lo, s[i].lo);
            hi = KEEL_MAX(hi, s[i].hi);
            q_lo = KEEL_MIN(q_lo, s[i].q_lo);
            q_hi = KEEL_MAX(q_hi, s[i].q_hi);
            g->max_span[kind] = KEEL_MAX(g->max_span[kind], s[i].hi - s[i].lo);
        }
        g->max_union[kind] = KEEL_MAX(g->max_union[kind], hi - lo);
        g->max_q_union[kind] = KEEL_MAX(g->max_q_union[kind], q_hi - q_lo);
    }
}

void keel_batch_ready(struct keel_batch *b, keel_device *dev)
{
    for (uint32_t kind = 0; kind < 2; kind++) {
        for (uint32_t i = 0; i < b->n_groups; i++) {
            const struct keel_token_span *s = keel_span_host(b->spans[kind]);
            limits(&b->group[i], kind, s + b->group[i].t0);
        }
        keel_span_flush(dev, b->spans[kind]);
        keel_span_flush(dev, b->rope[kind]);
    }
    keel_span_flush(dev, b->ids);
    for (uint32_t i = 0; i < b->n_sets; i++) {
        keel_span_flush(dev, b->mark[i]);
    }
    if (b->n_image_tokens > 0) {
        keel_span_flush(dev, b->image_rows);
        keel_span_flush(dev, b->image_place);
    }
    if (b->cap_places > 0) {
        keel_span_flush(dev, b->place);
        keel_span_flush(dev, b->target);
        keel_span_flush(dev, b->weight);
    }
}
