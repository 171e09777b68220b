// SPDX-License-Identifier: MIT
// tests/device/device_test.c: the device room under every clamp profile with the validation layer on. Any message of the layer
// fails the test. Runs on whatever driver the environment offers; tests/meson.build adds SwiftShader where it is installed.
#include "base.h"
#include "internal.h"
#include "platform.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

extern const struct keel_shader keel_sh_test_step;

static const char *const profiles[] = {"", "min", "rpi", "mali", "discrete"};
static const char *profile;        // of the group being run
static char last_log[4096];        // last error or warning
static bool quiet;                 // an error is expected

static void on_log(void *user, enum keel_log_level level, const char *text)
{
    (void)user;
    snprintf(last_log, sizeof(last_log), "%s", text);
    if (!quiet) {
        fprintf(stderr, "[%d] %s\n", (int)level, text);
    }
}

static const keel_log test_log = {.level = KEEL_LOG_WARN, .write = on_log};

struct fixture {
    keel_device *dev;
    keel_heap *heap, *host;
    keel_recorder *rec;
};

static keel_device *open_device(uint64_t limit, bool no_cache)
{
    keel_device *dev = NULL;
    const struct keel_device_params p = {.select = "0", .profile = profile, .validate = true, .no_cache = no_cache,
                                         .memory_limit = limit};
    assert_int_equal(keel_device_create(&dev, &p, &test_log), KEEL_OK);
    return dev;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    quiet = false;
    f->dev = open_device(0, true);
    assert_int_equal(keel_heap_create(&f->heap, f->dev, KEEL_HEAP_DEVICE, "work"), KEEL_OK);
    assert_int_equal(keel_heap_create(&f->host, f->dev, KEEL_HEAP_HOST, "parameters"), KEEL_OK);
    assert_int_equal(keel_recorder_create(&f->rec, f->dev, NULL), KEEL_OK);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    uint64_t now = 0, peak = 0;
    keel_recorder_destroy(&f->rec);
    keel_heap_destroy(&f->heap);
    keel_heap_destroy(&f->host);
    keel_device_memory(f->dev, &now, &peak);
    const uint32_t messages = keel_device_validation_count(f->dev);
    keel_device_destroy(&f->dev);
    free(f);
    quiet = false;
    return messages == 0 && now <= (32u << 20) ? 0 : -1; // staging may stay
}

// --- helpers -------------------------------------------------------------------------------------

static struct keel_span alloc(keel_heap *heap, uint64_t bytes)
{
    struct keel_span s;
    assert_int_equal(keel_heap_alloc(heap, bytes, &s), KEEL_OK);
    assert_int_equal(s.offset % 256, 0);
    assert_int_equal(s.bytes, bytes);
    return s;
}

// A host parameter of one word.
static struct keel_span param(struct fixture *f, uint32_t value)
{
    struct keel_span s = alloc(f->host, 4);
    assert_non_null(keel_span_host(s));
    memcpy(keel_span_host(s), &value, 4);
    keel_span_flush(f->dev, s);
    return s;
}

struct push {
    uint32_t n, mul, add;
};

// y = x·mul + add + param. The push constants live in the caller.
static struct keel_dispatch step(struct keel_span y, struct keel_span x, struct keel_span p, const struct push *push)
{
    return (struct keel_dispatch){.shader = &keel_sh_test_step, .spec = {64, 0}, .n_spec = 2,
                                  .bind = {{x, KEEL_READ}, {y, KEEL_WRITE}, {p, KEEL_READ}}, .n_bind = 3, .push = push,
                                  .push_bytes = sizeof(*push), .groups = {keel_div_up(push->n, 64), 1, 1}, .flops = 2ull * push->n,
                                  .bytes = 8ull * push->n, .label = "step"};
}

static void record_step(struct fixture *f, struct keel_span y, struct keel_span x, struct keel_span p, uint32_t mul, uint32_t add)
{
    const struct push push = {(uint32_t)(y.bytes / 4), mul, add};
    const struct keel_dispatch d = step(y, x, p, &push);
    keel_record(f->rec, &d);
}

static void finish(keel_recorder *rec)
{
    assert_int_equal(keel_recorder_submit(rec), KEEL_OK);
    assert_int_equal(keel_recorder_wait(rec), KEEL_OK);
}

static void expect_all(struct fixture *f, struct keel_span s, uint32_t value)
{
    const size_t n = s.bytes / 4;
    uint32_t *got = malloc(s.bytes);
    assert_non_null(got);
    assert_int_equal(keel_download(f->dev, got, s, s.bytes), KEEL_OK);
    for (size_t i = 0; i < n; ++i) {
        if (got[i] != value) {
            fail_msg("element %zu is %u, not %u", i, got[i], value);
        }
    }
    free(got);
}

static uint64_t barriers(const keel_device *dev)
{
    uint64_t d, s, b;
    keel_device_counts(dev, &d, &s, &b);
    return b;
}

static uint64_t submits(const keel_device *dev)
{
    uint64_t d, s, b;
    keel_device_counts(dev, &d, &s, &b);
    return s;
}

// --- memory and transfers ------------------------------------------------------------------------

static void test_caps(void **state)
{
    const struct fixture *f = *state;
    const struct keel_caps *c = keel_device_caps(f->dev);
    assert_string_equal(c->profile, profile);
    assert_true(c->max_workgroup >= 128 && c->max_shared >= 16384 && c->max_push >= 128 && c->max_bindings >= 4);
    assert_true(c->max_range >= 128u << 20 && c->max_range <= 1u << 30 && c->max_buffer <= 1u << 30);
    assert_true(c->heap > 0 && c->heap_free <= c->heap);
    if (strcmp(profile, "min") == 0) {
        assert_true(c->max_workgroup == 128 && c->max_shared == 16384 && c->max_range == 128u << 20 && c->max_push == 128);
        assert_false(c->subgroup_size || c->subgroup_arith || c->storage16 || c->storage8 || c->float16 || c->int8 || c->int_dot || c->coop.m);
    } else if (strcmp(profile, "rpi") == 0) {
        assert_true(c->max_workgroup <= 256 && c->max_shared == 16384 && c->max_bindings <= 8 && c->offset_align == 256);
        assert_false(c->subgroup_arith || c->float16 || c->int8 || c->coop.m);
    } else if (strcmp(profile, "mali") == 0) {
        assert_true(c->max_shared <= 32768 && c->subgroup_size <= 16);
        assert_false(c->subgroup_arith);
    } else if (strcmp(profile, "discrete") == 0) {
        assert_false(c->unified);
    }
}

static void test_memory(void **state)
{
    struct fixture *f = *state;
    struct keel_span a = alloc(f->heap, 1), b = alloc(f->heap, 1000), big = alloc(f->heap, 9u << 20), none;
    assert_true(a.block != b.block || a.offset + 256 <= b.offset);
    assert_true(big.block != a.block);
    assert_true(keel_heap_bytes(f->heap) >= (9u << 20) + 1256);
    assert_int_equal(keel_span_host(a) != NULL, keel_device_caps(f->dev)->unified);
    assert_null(keel_span_host((struct keel_span){0}));
    const struct keel_span part = keel_span_sub(b, 256, 100);
    assert_true(part.block == b.block && part.offset == b.offset + 256 && part.bytes == 100);

    uint64_t now, peak, before = keel_heap_bytes(f->heap);
    keel_device_memory(f->dev, &now, &peak);
    assert_true(now >= before && peak >= now);
    keel_heap_reset(f->heap);
    for (int i = 0; i < 9; ++i) { // the 9 MiB block again
        alloc(f->heap, 1u << 20);
    }
    assert_int_equal(keel_heap_bytes(f->heap), before);
    alloc(f->heap, 67u << 20);
    alloc(f->heap, 9u << 20); // each a block of its own size: the plan holds for models larger than a buffer
    assert_int_equal(keel_heap_bytes(f->heap), before + (76u << 20));

    quiet = true;
    assert_int_equal(keel_heap_alloc(f->heap, 0, &none), KEEL_ERR_ARG);
    assert_null(none.block);
    assert_int_equal(keel_heap_alloc(f->heap, keel_device_caps(f->dev)->max_buffer + 1, &none), KEEL_ERR_NO_MEMORY);
    assert_non_null(strstr(last_log, "work"));
}

static void test_out_of_memory(void **state)
{
    const uint64_t mib = 1u << 20;
    keel_device *dev = open_device(8 * mib, true);
    keel_heap *weights = NULL, *cache = NULL;
    struct keel_span s;
    (void)state;
    assert_int_equal(keel_heap_create(&weights, dev, KEEL_HEAP_DEVICE, "weights"), KEEL_OK);
    assert_int_equal(keel_heap_create(&cache, dev, KEEL_HEAP_DEVICE, "kv cache"), KEEL_OK);
    assert_int_equal(keel_heap_alloc(weights, 5 * mib, &s), KEEL_OK);
    quiet = true;
    assert_int_equal(keel_heap_alloc(cache, 4 * mib, &s), KEEL_ERR_NO_MEMORY);
    assert_non_null(strstr(last_log, "4.0 MiB more for kv cache"));
    assert_non_null(strstr(last_log, "weights 5.0 MiB"));
    assert_non_null(strstr(last_log, "limit set is 8.0 MiB"));
    quiet = false;
    assert_int_equal(keel_heap_alloc(cache, 3 * mib, &s), KEEL_OK); // up to the limit
    keel_heap_destroy(&weights);
    assert_int_equal(keel_heap_alloc(cache, 4 * mib, &s), KEEL_OK); // freed memory counts again
    keel_heap_destroy(&cache);
    assert_int_equal(keel_device_validation_count(dev), 0);
    keel_device_destroy(&dev);
    assert_null(dev);
}

static void test_transfer(void **state)
{
    struct fixture *f = *state;
    static const size_t sizes[] = {1, 3, 256, 4097, (16u << 20) - 1, (40u << 20) + 5};
    for (size_t k = 0; k < KEEL_COUNT(sizes); ++k) {
        const size_t n = sizes[k];
        uint8_t *src = malloc(n), *got = calloc(1, n);
        struct keel_rng rng = keel_rng_make(17, k);
        assert_non_null(src);
        assert_non_null(got);
        for (size_t i = 0; i < n; ++i) {
            src[i] = (uint8_t)(i % 4 == 0 ? keel_rng_u32(&rng) : src[i - 1] + 31u);
        }
        struct keel_span s = alloc(f->heap, n), back = alloc(f->host, n);
        assert_int_equal(keel_upload(f->dev, s, src, n), KEEL_OK);
        assert_int_equal(keel_download(f->dev, got, s, n), KEEL_OK);
        assert_memory_equal(src, got, n);
        keel_record_copy(f->rec, back, s); // and by the recorder into host memory
        finish(f->rec);
        keel_span_fetch(f->dev, back);
        assert_memory_equal(src, keel_span_host(back), n);
        free(src);
        free(got);
    }
}

static void test_stage(void **state)
{
    struct fixture *f = *state;
    struct keel_span s = alloc(f->heap, 7 * 4096);
    uint8_t got[7 * 4096];
    void *ptr;
    for (int i = 0; i < 7; ++i) { // more pieces than the ring has slots
        assert_int_equal(keel_stage_begin(f->dev, keel_span_sub(s, (uint64_t)i * 4096, 4096), 4096, &ptr), KEEL_OK);
        memset(ptr, i + 1, 4096);
        assert_int_equal(keel_stage_end(f->dev), KEEL_OK);
    }
    assert_int_equal(keel_stage_finish(f->dev), KEEL_OK);
    assert_int_equal(keel_download(f->dev, got, s, sizeof(got)), KEEL_OK);
    for (size_t i = 0; i < sizeof(got); ++i) {
        assert_int_equal(got[i], i / 4096 + 1);
    }
    quiet = true;
    assert_int_equal(keel_stage_begin(f->dev, s, sizeof(got) + 1, &ptr), KEEL_ERR_ARG);
}

// --- recording -----------------------------------------------------------------------------------

// 300 dispatches, each of which needs the one before: read after write, write after read, write after write.
static void test_chain(void **state)
{
    struct fixture *f = *state;
    const uint32_t n = 5000;
    struct keel_span a = alloc(f->heap, 4 * n), b = alloc(f->heap, 4 * n), c = alloc(f->heap, 4 * n), p = param(f, 3);
    uint32_t va = 1, vb = 0, vc = 0;
    const uint64_t before = barriers(f->dev);
    keel_record_fill(f->rec, a, va);
    for (uint32_t i = 0; i < 100; ++i) {
        record_step(f, b, a, p, 3, i); // reads what was written
        vb = va * 3 + i + 3;
        record_step(f, a, b, p, 5, 1); // writes what was read
        va = vb * 5 + 1 + 3;
        record_step(f, c, a, p, 1, i);
        vc = va + i + 3;
    }
    finish(f->rec);
    assert_true(barriers(f->dev) - before >= 200);
    expect_all(f, a, va);
    expect_all(f, b, vb);
    expect_all(f, c, vc);
}

// No barrier where there is no hazard, one where there is.
static void test_barriers(void **state)
{
    struct fixture *f = *state;
    struct keel_span x = alloc(f->heap, 4096), y = alloc(f->heap, 16 * 4096), p = param(f, 0);
    const uint64_t before = barriers(f->dev);
    keel_record_fill(f->rec, x, 7);
    for (uint64_t i = 0; i < 16; ++i) { // one barrier behind the fill; the dispatches are independent
        record_step(f, keel_span_sub(y, 4096 * i, 4096), x, p, (uint32_t)i, 0);
    }
    assert_int_equal(barriers(f->dev) - before, 1);
    record_step(f, keel_span_sub(y, 4096, 4096), keel_span_sub(y, 2 * 4096, 4096), p, 1, 0); // reads and overwrites: one
    assert_int_equal(barriers(f->dev) - before, 2);
    record_step(f, x, keel_span_sub(y, 3 * 4096, 4096), p, 1, 0); // nothing of it was touched since
    assert_int_equal(barriers(f->dev) - before, 2);
    keel_record_copy(f->rec, keel_span_sub(y, 0, 4096), x);
    assert_int_equal(barriers(f->dev) - before, 3);
    finish(f->rec);
    for (uint32_t i = 0; i < 16; ++i) {
        expect_all(f, keel_span_sub(y, 4096ull * i, 4096), i == 0 ? 21 : i == 1 ? 14 : 7 * i);
    }
}

// More distinct spans between two hazards than the recorder remembers.
static void test_many_spans(void **state)
{
    struct fixture *f = *state;
    enum { N = 700 };
    struct keel_span x = alloc(f->heap, 256 * N), y = alloc(f->heap, 256 * N), p = param(f, 1);
    for (uint64_t i = 0; i < N; ++i) {
        keel_record_fill(f->rec, keel_span_sub(x, 256 * i, 256), (uint32_t)i);
    }
    for (uint64_t i = 0; i < N; ++i) {
        record_step(f, keel_span_sub(y, 256 * i, 256), keel_span_sub(x, 256 * (N - 1 - i), 256), p, 2, 0);
    }
    finish(f->rec);
    for (uint32_t i = 0; i < N; i += 33) {
        expect_all(f, keel_span_sub(y, 256ull * i, 256), 2 * (N - 1 - i) + 1);
    }
}

static void test_replay(void **state)
{
    struct fixture *f = *state;
    const uint32_t n = 1000;
    struct keel_span a = alloc(f->heap, 4 * n), b = alloc(f->heap, 4 * n), p = param(f, 1);
    uint32_t value = 0;
    keel_recorder *one_shot = f->rec, *rec = NULL;
    assert_int_equal(keel_recorder_create(&rec, f->dev, &(struct keel_recorder_params){.replay = true}), KEEL_OK);
    keel_record_fill(one_shot, a, 0);
    finish(one_shot);
    f->rec = rec;
    for (int i = 0; i < 10; ++i) {
        const struct push push = {n, 3, 0};
        struct keel_dispatch d = step(b, a, p, &push);
        d.flops = 40000000; // a declared cost that cuts the list into several submissions
        keel_record(rec, &d);
        d = step(a, b, p, &push);
        keel_record(rec, &d);
    }
    const uint64_t before = submits(f->dev);
    for (uint32_t round = 0; round < 6; ++round) {
        assert_int_equal(round == 0 ? keel_recorder_submit(rec) : keel_recorder_replay(rec), KEEL_OK);
        assert_int_equal(keel_recorder_wait(rec), KEEL_OK);
        for (int i = 0; i < 20; ++i) {
            value = value * 3 + round + 1;
        }
        expect_all(f, a, value);
        const uint32_t next = round + 2; // what changes between replays lives in a parameter
        memcpy(keel_span_host(p), &next, 4);
        keel_span_flush(f->dev, p);
    }
    assert_true(submits(f->dev) - before >= 12 && (submits(f->dev) - before) % 6 == 0);

    quiet = true;
    const struct push push = {n, 1, 0};
    const struct keel_dispatch late = step(b, a, p, &push);
    keel_record(rec, &late); // the list is closed
    assert_int_equal(keel_recorder_wait(rec), KEEL_ERR_ARG);
    keel_recorder_reset(rec); // and can be begun anew
    keel_record(rec, &late);
    finish(rec);
    expect_all(f, b, value + 7);
    f->rec = one_shot;
    keel_recorder_destroy(&rec);
}

static void test_split(void **state)
{
    struct fixture *f = *state;
    struct keel_span a = alloc(f->heap, 4096), b = alloc(f->heap, 4096), p = param(f, 0);
    uint32_t value = 1;
    const uint64_t before = submits(f->dev);
    assert_true(keel_recorder_quantum(f->rec, "step") >= 1000000);
    keel_record_fill(f->rec, a, value);
    for (uint32_t i = 0; i < 50; ++i) {
        const struct push push = {1024, 3, i};
        struct keel_dispatch d = step(b, a, p, &push);
        d.flops = keel_recorder_quantum(f->rec, "step") / 2 + 1;
        keel_record(f->rec, &d);
        record_step(f, a, b, p, 1, 1);
        value = value * 3 + i + 1;
    }
    finish(f->rec);
    expect_all(f, a, value);
    const uint64_t took = submits(f->dev) - before;
    assert_true(took >= 20 && took <= 60);
    assert_true(keel_device_longest_submit_ns(f->dev) > 0);
    finish(f->rec); // nothing to hand in
    assert_int_equal(submits(f->dev) - before, took);
}

// Labels that fill submissions are learnt, each by itself, whatever the device's rates say; slowness at once.
static void test_cost_model(void **state)
{
    (void)state;
    struct cost_model m = {0};
    keel_cost_init(&m, 100.0, 10.0);
    const uint64_t work = 100000000;
    const uint32_t fast = keel_cost_find(&m, "fast", work, 0), slow = keel_cost_find(&m, "slow", work, 0), rare = keel_cost_find(&m, "rare", work, 0);
    const double first = keel_cost_ns(&m, rare, work, 0);
    for (int i = 0; i < 64; ++i) {
        double est[4] = {0};
        const uint32_t which = i % 2 ? slow : fast;
        est[which] = keel_cost_ns(&m, which, work, 0);
        est[rare] = 0.001 * est[which];
        keel_cost_learn(&m, est, m.n, which == slow ? 80e6 : 5e6);
        assert_true(i != 3 || keel_cost_ns(&m, slow, work, 0) > 60e6); // seen twice
    }
    assert_true(fabs(keel_cost_ns(&m, fast, work, 0) / 5e6 - 1.0) < 0.05);
    assert_true(fabs(keel_cost_ns(&m, slow, work, 0) / 80e6 - 1.0) < 0.05);
    assert_true(fabs(keel_cost_ns(&m, rare, work, 0) / first - 1.0) < 0.05);
    char names[MAX_COSTS][8];
    for (uint32_t i = 0; i < MAX_COSTS; ++i) {
        (void)snprintf(names[i], sizeof(names[i]), "l%u", i);
        assert_true(keel_cost_find(&m, names[i], 0, 0) < MAX_COSTS);
    }
    assert_int_equal(keel_cost_find(&m, "one too many", 0, 0), 0);
    assert_int_equal(keel_cost_find(&m, "slow", work, 0), slow);
}

static void test_nothing(void **state)
{
    struct fixture *f = *state;
    struct keel_span a = alloc(f->heap, 256), p = param(f, 0);
    const uint64_t before = submits(f->dev);
    const struct push push = {0, 1, 0};
    const struct keel_dispatch d = step(a, a, p, &push);
    keel_record(f->rec, &d); // no workgroups
    keel_record_fill(f->rec, (struct keel_span){0}, 1);
    keel_record_copy(f->rec, (struct keel_span){0}, (struct keel_span){0});
    finish(f->rec);
    assert_int_equal(submits(f->dev), before);
}

// What is noted does not run, is compiled all the same, and can be recorded afterwards.
static void test_note(void **state)
{
    struct fixture *f = *state;
    struct keel_span a = alloc(f->heap, 4), b = alloc(f->heap, 4), p = param(f, 0);
    const uint32_t one = 1, nine = 9;
    const struct push push = {1, 5, 2};
    struct keel_dispatch d = step(b, a, p, &push);
    uint32_t got = 0;
    assert_int_equal(keel_upload(f->dev, a, &one, 4), KEEL_OK);
    assert_int_equal(keel_upload(f->dev, b, &nine, 4), KEEL_OK);
    const uint64_t before = submits(f->dev);
    keel_recorder_note(f->rec, true);
    keel_record(f->rec, &d);
    keel_record_fill(f->rec, b, 3);
    keel_record_copy(f->rec, b, a);
    keel_recorder_note(f->rec, false);
    finish(f->rec);
    assert_int_equal(submits(f->dev), before);
    assert_int_equal(keel_download(f->dev, &got, b, 4), KEEL_OK);
    assert_int_equal(got, 9);
    keel_record(f->rec, &d);
    finish(f->rec);
    assert_int_equal(keel_download(f->dev, &got, b, 4), KEEL_OK);
    assert_int_equal(got, 7); // 1 · 5 + 2
    d.spec[0] = 1u << 30;
    quiet = true;
    keel_recorder_note(f->rec, true);
    keel_record(f->rec, &d);
    keel_recorder_note(f->rec, false);
    assert_int_equal(keel_recorder_submit(f->rec), KEEL_ERR_ARG);
    keel_recorder_reset(f->rec);
}

// Records one bad dispatch and expects its message, a sticky error, and recovery by reset.
static void refused(struct fixture *f, const struct keel_dispatch *d, const char *message)
{
    quiet = true;
    last_log[0] = '\0';
    keel_record(f->rec, d);
    assert_int_equal(keel_recorder_submit(f->rec), KEEL_ERR_ARG);
    assert_int_equal(keel_recorder_wait(f->rec), KEEL_ERR_ARG);
    if (!strstr(last_log, message)) {
        fail_msg("\"%s\" does not say \"%s\"", last_log, message);
    }
    quiet = false;
    keel_recorder_reset(f->rec);
    finish(f->rec);
}

static void test_refusals(void **state)
{
    struct fixture *f = *state;
    struct keel_span a = alloc(f->heap, 4096), p = param(f, 0);
    const struct push push = {64, 1, 1};
    const struct keel_dispatch good = step(keel_span_sub(a, 0, 1024), keel_span_sub(a, 1024, 1024), p, &push);
    struct keel_dispatch d = good;
    d.n_bind = 2;
    refused(f, &d, "has 3 buffers, its dispatch binds 2");
    d = good;
    d.push_bytes = 8;
    refused(f, &d, "8 bytes of push constants given, the shader reads 12");
    d = good;
    d.groups[0] = 0xffffffffu;
    if (keel_device_caps(f->dev)->max_groups < d.groups[0]) {
        refused(f, &d, "workgroups");
    }
    d = good;
    d.groups[1] = 65536;
    refused(f, &d, "workgroups");
    d = good;
    d.bind[1].span = (struct keel_span){0};
    refused(f, &d, "binding 1 is empty");
    d = good;
    d.bind[0].span.bytes = 1ull << 40;
    refused(f, &d, "binding 0 is larger than its memory");
    d = good;
    d.bind[0].span.offset += 1;
    refused(f, &d, "a multiple of");
    d = good;
    d.spec[0] = keel_device_caps(f->dev)->max_workgroup + 64;
    refused(f, &d, "workgroup of");
    static const uint32_t junk[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    const struct keel_shader bad = {"junk", junk, 8};
    d = good;
    d.shader = &bad;
    refused(f, &d, "junk");
    static uint32_t copy[4096]; // the real module, with an instruction of no length
    assert_true(keel_sh_test_step.code_words <= KEEL_COUNT(copy));
    memcpy(copy, keel_sh_test_step.code, 4 * keel_sh_test_step.code_words);
    copy[5] &= 0xffff;
    const struct keel_shader broken = {"broken", copy, keel_sh_test_step.code_words};
    d.shader = &broken;
    refused(f, &d, "broken");
    keel_recorder_fail(f->rec, KEEL_ERR_NUMERIC);
    keel_record(f->rec, &good);
    assert_int_equal(keel_recorder_submit(f->rec), KEEL_ERR_NUMERIC);
    keel_recorder_reset(f->rec);
    keel_record(f->rec, &good);
    finish(f->rec);
}

// Dispatches of a submission follow one another; all lies between `begin` and now but for the offset of the clocks.
static void check_events(keel_device *dev, uint64_t begin, size_t n_dispatches)
{
    const struct keel_profile_event *e;
    const size_t n = keel_profile_events(dev, &e);
    const uint64_t slack = 1000000000;
    size_t dispatches = 0;
    for (size_t i = 0; i < n; ++i) {
        assert_true(e[i].start_ns >= begin && e[i].start_ns + e[i].ns <= keel_now_ns() + slack);
        if (!e[i].label) {
            continue;
        }
        ++dispatches;
        assert_true(i > 0 && e[i - 1].submission == e[i].submission);
        assert_true(!e[i - 1].label || e[i - 1].start_ns + e[i - 1].ns <= e[i].start_ns + 1000);
    }
    assert_int_equal(dispatches, n_dispatches);
    assert_true(n > dispatches + 1); // more than one submission
    assert_true(keel_device_busy_ns(dev) > 0);
}

static void test_profile(void **state)
{
    struct fixture *f = *state;
    struct keel_span a = alloc(f->heap, 1u << 20), b = alloc(f->heap, 1u << 20), p = param(f, 0);
    struct keel_profile_row rows[8];
    keel_recorder *plain = f->rec;
    const uint64_t begin = keel_now_ns();
    keel_profile_enable(f->dev, keel_device_caps(f->dev)->timestamps);
    assert_int_equal(keel_recorder_create(&f->rec, f->dev, NULL), KEEL_OK);
    keel_record_fill(f->rec, a, 1);
    for (uint32_t i = 0; i < 1500; ++i) { // more than one part holds
        const struct push push = {64, 3, i};
        const struct keel_dispatch d = step(b, a, p, &push);
        keel_record(f->rec, &d);
    }
    record_step(f, b, a, p, 1, 0);
    finish(f->rec);
    keel_record_fill(plain, a, 2); // not counted
    finish(plain);
    if (keel_device_caps(f->dev)->timestamps) {
        assert_int_equal(keel_profile_rows(f->dev, rows, 8), 2);
        const struct keel_profile_row *s = strcmp(rows[0].label, "step") == 0 ? &rows[0] : &rows[1];
        const struct keel_profile_row *fill = s == &rows[0] ? &rows[1] : &rows[0];
        assert_int_equal(s->count, 1501);
        assert_int_equal(s->flops, 1500 * 128 + 2 * (1 << 18));
        assert_true(s->ns > 0 && s->ns < 60ull * 1000000000u);
        assert_string_equal(fill->label, "fill");
        assert_int_equal(fill->count, 1);
        assert_true(rows[0].ns >= rows[1].ns);
        check_events(f->dev, begin, 1502);
    }
    keel_profile_reset(f->dev);
    assert_int_equal(keel_profile_rows(f->dev, rows, 8), 0);
    keel_profile_enable(f->dev, false);
    keel_recorder_destroy(&f->rec);
    f->rec = plain;
}

// --- around devices ------------------------------------------------------------------------------

static void run_one(keel_device *dev)
{
    struct fixture f = {.dev = dev};
    assert_int_equal(keel_heap_create(&f.heap, dev, KEEL_HEAP_DEVICE, "work"), KEEL_OK);
    assert_int_equal(keel_heap_create(&f.host, dev, KEEL_HEAP_HOST, "parameters"), KEEL_OK);
    assert_int_equal(keel_recorder_create(&f.rec, dev, NULL), KEEL_OK);
    struct keel_span a = alloc(f.heap, 4096), b = alloc(f.heap, 4096);
    keel_record_fill(f.rec, a, 5);
    record_step(&f, b, a, param(&f, 2), 3, 1);
    finish(f.rec);
    expect_all(&f, b, 18);
    keel_recorder_destroy(&f.rec);
    keel_heap_destroy(&f.heap);
    keel_heap_destroy(&f.host);
    assert_int_equal(keel_device_validation_count(dev), 0);
}

// The one pipeline cache in the cache folder.
static void cache_path(char *out, size_t out_bytes)
{
    char folder[128];
    uint32_t n = 0;
    snprintf(folder, sizeof(folder), "%.100s/keel", getenv("XDG_CACHE_HOME"));
    DIR *d = opendir(folder);
    assert_non_null(d);
    for (const struct dirent *e; (e = readdir(d));) {
        assert_null(strstr(e->d_name, "tmp")); // nothing half-written is left
        if (strncmp(e->d_name, "pipelines-", 10) == 0) {
            snprintf(out, out_bytes, "%s/%s", folder, e->d_name);
            ++n;
        }
    }
    closedir(d);
    assert_int_equal(n, 1);
}

static size_t read_file(const char *path, uint8_t *out, size_t cap)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    const size_t n = fread(out, 1, cap, f);
    assert_true(n < cap);
    fclose(f);
    return n;
}

static void write_file(const char *path, const uint8_t *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}

// A damaged cache is ignored and made anew: cut short, empty, zeroed, one byte wrong.
static void test_cache(void **state)
{
    enum { CAP = 1 << 20 };
    static uint8_t data[CAP], after[CAP];
    char path[512];
    (void)state;
    for (int damage = 0; damage < 4; ++damage) {
        keel_device *dev = open_device(0, false);
        run_one(dev);
        keel_device_destroy(&dev);
        cache_path(path, sizeof(path));
        size_t n = read_file(path, data, CAP);
        assert_true(n >= 40); // our sum and the head that Vulkan prescribes; lavapipe keeps no more
        if (damage == 2) {
            memset(data, 0, n);
        } else if (damage == 3) {
            data[n / 2] ^= 1;
        }
        n = damage == 0 ? n - 3 : damage == 1 ? 0 : n;
        write_file(path, data, n);
        dev = open_device(0, false);
        run_one(dev);
        keel_device_destroy(&dev);
        const size_t m = read_file(path, after, CAP);
        assert_true(m >= 40 && (m != n || memcmp(data, after, n) != 0));
    }
}

static void test_measure(void **state)
{
    keel_device *dev = open_device(0, false);
    (void)state;
    assert_int_equal(keel_device_measure(dev), KEEL_OK);
    const double gflops = keel_device_caps(dev)->gflops, gbps = keel_device_caps(dev)->gbps;
    assert_true(gflops > 0.01 && gflops < 1e6 && gbps > 0.01 && gbps < 1e5);
    print_message("measured %.1f GFLOP/s, %.1f GB/s\n", gflops, gbps);
    assert_int_equal(keel_device_validation_count(dev), 0);
    keel_device_destroy(&dev);
    dev = open_device(0, false);
    const double again = keel_device_caps(dev)->gflops;
    assert_true(again > 0.99 * gflops && again < 1.01 * gflops); // from the cache
    keel_device_destroy(&dev);
}

static void test_choice(void **state)
{
    struct keel_caps caps[4];
    char part[16];
    size_t n = 0;
    keel_device *dev = NULL;
    (void)state;
    assert_int_equal(keel_device_list(caps, 4, &n, &test_log), KEEL_OK);
    assert_true(n >= 1 && caps[0].index == 0 && caps[0].name[0] && caps[0].api_major == 1 && caps[0].api_minor >= 1);
    assert_int_equal(keel_device_list(NULL, 0, &n, &test_log), KEEL_OK);
    assert_true(n >= 1);
    snprintf(part, sizeof(part), "%.6s", caps[0].name);
    for (size_t i = 0; part[i]; ++i) {
        part[i] = part[i] >= 'a' && part[i] <= 'z' ? (char)(part[i] - 32) : part[i];
    }
    assert_int_equal(keel_device_create(&dev, &(struct keel_device_params){.select = part}, &test_log), KEEL_OK);
    keel_device_destroy(&dev);
    assert_int_equal(keel_device_create(&dev, NULL, &test_log), KEEL_OK); // the fastest
    keel_device_destroy(&dev);
    quiet = true;
    assert_int_equal(keel_device_create(&dev, &(struct keel_device_params){.select = "no such"}, &test_log), KEEL_ERR_NO_DEVICE);
    assert_non_null(strstr(last_log, "keel devices"));
    assert_null(dev);
    assert_int_equal(keel_device_create(&dev, &(struct keel_device_params){.select = "77"}, &test_log), KEEL_ERR_NO_DEVICE);
    assert_int_equal(keel_device_create(&dev, &(struct keel_device_params){.profile = "tiny"}, &test_log), KEEL_ERR_ARG);
    assert_non_null(strstr(last_log, "tiny"));
    quiet = false;
    keel_device_destroy(NULL);
    keel_device_destroy(&dev);
}

static void test_no_driver(void **state)
{
    struct keel_caps caps;
    size_t n = 1;
    keel_device *dev = NULL;
    static const char *const names[] = {"VK_ICD_FILENAMES", "VK_DRIVER_FILES"}; // of older and newer loaders
    char *old[2];
    (void)state;
    for (int i = 0; i < 2; ++i) {
        old[i] = getenv(names[i]) ? strdup(getenv(names[i])) : NULL;
        setenv(names[i], "/nonexistent", 1);
    }
    quiet = true;
    last_log[0] = '\0';
    assert_int_equal(keel_device_list(&caps, 1, &n, &test_log), KEEL_ERR_NO_DEVICE);
    assert_int_equal(n, 0);
    assert_non_null(strstr(last_log, "mesa-vulkan-drivers"));
    assert_int_equal(keel_device_create(&dev, NULL, &test_log), KEEL_ERR_NO_DEVICE);
    assert_null(dev);
    quiet = false;
    for (int i = 0; i < 2; ++i) {
        if (old[i]) {
            setenv(names[i], old[i], 1);
        } else {
            unsetenv(names[i]);
        }
        free(old[i]);
    }
}

int main(void)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest each[] = {
        CASE(test_caps), CASE(test_memory), cmocka_unit_test(test_out_of_memory), CASE(test_transfer), CASE(test_stage),
        CASE(test_chain), CASE(test_barriers), CASE(test_many_spans), CASE(test_replay), CASE(test_split), CASE(test_cost_model), CASE(test_nothing), CASE(test_note),
        CASE(test_refusals), CASE(test_profile),
    };
    const struct CMUnitTest once[] = {
        cmocka_unit_test(test_cache), cmocka_unit_test(test_measure), cmocka_unit_test(test_choice),
        cmocka_unit_test(test_no_driver),
    };
    char dir[] = "/tmp/keel-device-test-XXXXXX", command[128];
    int failed = 0;
    if (!mkdtemp(dir)) {
        return 1;
    }
    setenv("XDG_CACHE_HOME", dir, 1);
    for (size_t i = 0; i < KEEL_COUNT(profiles); ++i) {
        char name[32];
        profile = profiles[i];
        snprintf(name, sizeof(name), "device, profile \"%s\"", profile);
        failed += _cmocka_run_group_tests(name, each, KEEL_COUNT(each), NULL, NULL);
    }
    profile = "";
    failed += cmocka_run_group_tests(once, NULL, NULL);
    snprintf(command, sizeof(command), "rm -r %s", dir);
    return system(command) == 0 && failed == 0 ? 0 : 1;
}
