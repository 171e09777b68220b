// SPDX-License-Identifier: MIT
// doctor/bed.c: see bed.h. Owns the memory of the case at hand.
#include "bed.h"

#include "platform.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES (32u << 20)
#define HALF_ULP 0x1p-24 // of 1 in f32
static const uint32_t nan_word = 0x7fc0dead;

keel_status bed_open(struct bed *b, keel_device *dev, uint32_t repeats)
{
    keel_status st = KEEL_OK;
    *b = (struct bed){ .dev = dev, .repeats = repeats };
    b->arena = malloc(ARENA_BYTES);
    if (!b->arena) {
        KEEL_FAIL(keel_device_log(dev), KEEL_ERR_NO_MEMORY, "out of host memory for checking kernels");
    }
    KEEL_TRY(keel_heap_create(&b->heap, dev, KEEL_HEAP_DEVICE, "kernel checks"));
    KEEL_TRY(keel_recorder_create(&b->rec, dev, NULL));
out:
    if (st != KEEL_OK) {
        bed_close(b);
    }
    return st;
}

void bed_close(struct bed *b)
{
    keel_recorder_destroy(&b->rec);
    keel_heap_destroy(&b->heap);
    free(b->arena);
    b->arena = NULL;
}

void bed_begin(struct bed *b, uint64_t seed)
{
    keel_recorder_reset(b->rec);
    keel_heap_reset(b->heap);
    b->rng = keel_rng_make(seed, 0);
    b->used = 0;
    b->n_bufs = 0;
    b->status = KEEL_OK;
    b->result = (struct bed_result){ 0 };
}

// --- arrays --------------------------------------------------------------------------------------

void *bed_bytes(struct bed *b, size_t n)
{
    const size_t bytes = (size_t)keel_align_up(KEEL_MAX(n, 1u), 16);
    KEEL_ASSERT(bytes <= ARENA_BYTES - b->used);
    void *p = b->arena + b->used;
    b->used += bytes;
    return memset(p, 0, bytes);
}

double *bed_zeros(struct bed *b, size_t n)
{
    return bed_bytes(b, n * sizeof(double));
}

double *bed_copy(struct bed *b, const double *x, size_t n)
{
    return memcpy(bed_zeros(b, n), x, n * sizeof *x);
}

double *bed_abs(struct bed *b, const double *x, size_t n)
{
    double *a = bed_zeros(b, n);
    for (size_t i = 0; i < n; i++) {
        a[i] = fabs(x[i]);
    }
    return a;
}

double *bed_draw(struct bed *b, size_t n, double scale, enum bed_fill fill)
{
    double *x = bed_zeros(b, n);
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(scale * keel_rng_normal(&b->rng));
        const uint32_t dice = fill == BED_NORMAL ? 0 : keel_rng_below(&b->rng, 50);
        if (fill == BED_OUTLIERS && dice == 0) {
            x[i] = (float)(100 * x[i]);
        }
        if (fill == BED_CANCEL) {
            x[i] = i % 2 ? (float)(-x[i - 1] * (1 + 0x1p-12)) : dice == 0 ? 0 : dice == 1 ? copysign(0x1p-120, x[i]) : x[i];
        }
    }
    return x;
}

double bed_sum_budget(double mag, double terms)
{
    return HALF_ULP * (4 * sqrt(terms) + 8) * mag + 1e-35;
}

double *bed_sum_budgets(struct bed *b, const double *mag, size_t n, double terms)
{
    double *budget = bed_zeros(b, n);
    for (size_t i = 0; i < n; i++) {
        budget[i] = bed_sum_budget(mag[i], terms);
    }
    return budget;
}

// --- buffers -------------------------------------------------------------------------------------

static struct bed_buf *add_buf(struct bed *b, size_t n)
{
    KEEL_ASSERT(b->n_bufs < BED_BUFS);
    struct bed_buf *buf = &b->buf[b->n_bufs++];
    *buf = (struct bed_buf){ .n = n, .init = bed_bytes(b, n * 4), .first = bed_bytes(b, n * 4) };
    const keel_status st = keel_heap_alloc(b->heap, n * 4, &buf->span);
    b->status = b->status == KEEL_OK ? st : b->status;
    return buf;
}

static void put_floats(uint32_t *words, const double *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const float f = (float)x[i];
        memcpy(&words[i], &f, 4);
    }
}

struct keel_span bed_in(struct bed *b, const double *x, size_t n)
{
    struct bed_buf *buf = add_buf(b, n);
    put_floats(buf->init, x, n);
    return buf->span;
}

struct keel_span bed_words(struct bed *b, const void *words, size_t n)
{
    struct bed_buf *buf = add_buf(b, n);
    memcpy(buf->init, words, n * 4);
    return buf->span;
}

struct keel_span bed_out(struct bed *b, const double *init, const double *want, const double *budget, size_t n)
{
    struct bed_buf *buf = add_buf(b, n);
    buf->want = want;
    buf->budget = budget;
    if (init) {
        put_floats(buf->init, init, n);
    } else {
        for (size_t i = 0; i < n; i++) {
            buf->init[i] = nan_word;
        }
    }
    return buf->span;
}

struct keel_span bed_scratch(struct bed *b, uint64_t bytes)
{
    return add_buf(b, (size_t)((bytes + 3) / 4))->span;
}

// --- running -------------------------------------------------------------------------------------

static keel_status run_once(struct bed *b, bed_record_fn record, const void *params)
{
    keel_status st = b->status;
    keel_recorder_reset(b->rec);
    for (uint32_t i = 0; i < b->n_bufs && st == KEEL_OK; i++) {
        st = keel_upload(b->dev, b->buf[i].span, b->buf[i].init, b->buf[i].n * 4);
    }
    if (st == KEEL_OK) {
        record(b->rec, params);
        st = keel_recorder_submit(b->rec);
        const keel_status waited = keel_recorder_wait(b->rec);
        st = st == KEEL_OK ? waited : st;
    }
    return st;
}

static float word_float(uint32_t word)
{
    float f;
    memcpy(&f, &word, 4);
    return f;
}

static bool compare(struct bed *b, const struct bed_buf *buf)
{
    for (size_t i = 0; i < buf->n; i++) {
        const double got = word_float(buf->first[i]), part = fabs(got - buf->want[i]) / buf->budget[i];
        if (!(part <= 1)) { // NaN too
            snprintf(b->result.why, sizeof b->result.why, "element %zu of %zu is %.7g, should be %.7g ± %.1g", i, buf->n, got,
                     buf->want[i], buf->budget[i]);
            return false;
        }
        b->result.worst = KEEL_MAX(b->result.worst, part);
    }
    return true;
}

// Fetches the outputs of run `n` and looks at them.
static bool check_run(struct bed *b, uint32_t n)
{
    for (uint32_t i = 0; i < b->n_bufs; i++) {
        struct bed_buf *buf = &b->buf[i];
        if (!buf->want) {
            continue;
        }
        const size_t mark = b->used;
        uint32_t *got = n == 0 ? buf->first : bed_bytes(b, buf->n * 4);
        if (keel_download(b->dev, got, buf->span, buf->n * 4) != KEEL_OK) {
            snprintf(b->result.why, sizeof b->result.why, "its result could not be read back");
            return false;
        }
        if (n == 0 && !compare(b, buf)) {
            return false;
        }
        if (n > 0 && memcmp(got, buf->first, buf->n * 4) != 0) {
            snprintf(b->result.why, sizeof b->result.why, "run %" PRIu32 " gave other bits than the first", n + 1);
            return false;
        }
        b->used = mark;
    }
    return true;
}

bool bed_run(struct bed *b, bed_record_fn record, const void *params)
{
    for (uint32_t i = 0; i < b->repeats; i++) {
        const keel_status st = run_once(b, record, params);
        if (st != KEEL_OK) {
            snprintf(b->result.why, sizeof b->result.why, "it does not run (%s)", keel_status_text(st));
            return false;
        }
        if (!check_run(b, i)) {
            return false;
        }
    }
    return true;
}

uint64_t bed_time(struct bed *b, bed_record_fn record, const void *params)
{
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < 4; i++) {
        if (i == 0 && run_once(b, record, params) != KEEL_OK) {
            return 0;
        }
        keel_recorder_reset(b->rec);
        const uint64_t start = keel_now_ns();
        record(b->rec, params);
        if (keel_recorder_submit(b->rec) != KEEL_OK || keel_recorder_wait(b->rec) != KEEL_OK) {
            return 0;
        }
        least = KEEL_MIN(least, keel_now_ns() - start);
    }
    return KEEL_MAX(least, 1u);
}
