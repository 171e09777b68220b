// SPDX-License-Identifier: MIT
// device/speed.c: how fast this device computes and moves memory, by three micro-kernels (shaders/device), and the file in the
// cache folder that remembers it. The numbers choose a device and start the recorder's estimates; they are no benchmark.
#include "internal.h"

#include "platform.h"
#include "shaders.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define LANES 64u
#define MAD_ROUNDS 64u      // loop of mad.comp; far below the 65,535 that old lavapipe allows (portability.md 0.1)
#define MAD_FLOP 256u       // of one lane and round
#define BUDGET_NS 100000000u // of one measurement
#define ENOUGH_NS 20000000u  // a run this long outweighs its start
#define COPY_BYTES (16u << 20) // and 16,384 workgroups: 2 x 16 MiB lie above most last-level caches

// --- cache ---------------------------------------------------------------------------------------

bool keel_device_cache_path(const keel_device *dev, const char *what, char *out, size_t out_bytes)
{
    char dir[2048];
    if (dev->no_cache || !keel_cache_dir(dir, sizeof(dir))) {
        return false;
    }
    // A clamped device is another one: what is true of it must not reach the real one.
    const struct keel_caps *c = &dev->caps;
    const int n = snprintf(out, out_bytes, "%s/%s-%s-%08" PRIx32 "-%08" PRIx32 "-%08" PRIx32 "%s%s.txt", dir, what, c->uuid, c->vendor_id,
                           c->device_id, c->driver_version, c->profile[0] ? "-" : "", c->profile);
    return n > 0 && (size_t)n < out_bytes;
}

static bool sane(double x, double lo, double hi)
{
    return x >= lo && x <= hi; // false for NaN
}

bool keel_speed_load(keel_device *dev)
{
    char path[4096];
    double gflops = 0.0, gbps = 0.0, matvec = 0.0;
    int exchange = 0;
    FILE *f = keel_device_cache_path(dev, "speed", path, sizeof(path)) ? fopen(path, "r") : NULL;
    if (!f) {
        return false;
    }
    const int n = fscanf(f, "keel-speed 8 %lf %lf %lf exchange %d", &gflops, &gbps, &matvec, &exchange);
    (void)fclose(f);
    if (n != 4 || !sane(gflops, 0.0, 1e7) || !sane(gbps, 0.0, 1e6) || !sane(matvec, 0.0, 1e6)) {
        return false;
    }
    dev->caps.gflops = gflops;
    dev->caps.gbps = gbps;
    dev->caps.matvec_gbps = matvec;
    keel_cost_init(&dev->cost, gflops, gbps);
    dev->caps.exchange = dev->caps.exchange && exchange;
    return true;
}

void keel_speed_save(const keel_device *dev)
{
    const keel_log quiet = {.level = (enum keel_log_level)0};
    struct keel_file_out file = {0};
    char path[4096];
    if (dev->lost || !keel_device_cache_path(dev, "speed", path, sizeof(path)) || keel_file_create(&file, path, &quiet) != KEEL_OK) {
        return;
    }
    fprintf(file.f, "keel-speed 8 %.4g %.4g %.4g exchange %d\n", dev->caps.gflops, dev->caps.gbps, dev->caps.matvec_gbps,
            dev->caps.exchange);
    (void)keel_file_commit(&file, &quiet);
}

// --- measurement ---------------------------------------------------------------------------------

// Runs one dispatch and gives its time in nanoseconds, as the host sees it.
static keel_status timed(keel_recorder *rec, const struct keel_dispatch *d, uint64_t *ns)
{
    keel_status st = KEEL_OK;
    const uint64_t start = keel_now_ns();
    keel_record(rec, d);
    KEEL_TRY(keel_recorder_submit(rec));
    KEEL_TRY(keel_recorder_wait(rec));
    *ns = KEEL_MAX(keel_now_ns() - start, 1u);
out:
    return st;
}

// Repeats a dispatch, growing its grid up to `most` workgroups until it lasts, and gives the best rate of `unit` a workgroup
// and second.
static keel_status best_rate(keel_recorder *rec, struct keel_dispatch *d, uint32_t most, double unit, double *rate)
{
    keel_status st = KEEL_OK;
    uint64_t ns = 0, spent = 0;
    *rate = 0.0;
    KEEL_TRY(timed(rec, d, &ns)); // compiles the pipeline and touches the memory
    while (spent < BUDGET_NS) {
        KEEL_TRY(timed(rec, d, &ns));
        spent += ns;
        const double r = unit * d->groups[0] / (double)ns * 1e9;
        *rate = KEEL_MAX(*rate, r);
        // A run of four times the size must still fit in what is left.
        if (ns < ENOUGH_NS && spent + 4 * ns < BUDGET_NS) {
            d->groups[0] = KEEL_MIN(d->groups[0] * 4, most);
        }
    }
out:
    return st;
}

static keel_status measure_mad(keel_device *dev, keel_recorder *rec, keel_heap *heap, double *flops)
{
    keel_status st = KEEL_OK;
    const float push[2] = {0.999f, 0.0005f};
    const uint32_t most = KEEL_MIN(dev->caps.max_groups, 65535u);
    struct keel_span y;
    KEEL_TRY(keel_heap_alloc(heap, (uint64_t)most * LANES * 4, &y));
    struct keel_dispatch d = {.shader = &keel_sh_device_mad, .spec = {LANES, MAD_ROUNDS}, .n_spec = 2,
                              .bind = {{y, KEEL_WRITE}}, .n_bind = 1, .push = push, .push_bytes = sizeof(push),
                              .groups = {16, 1, 1}, .label = "measure mad"};
    KEEL_TRY(best_rate(rec, &d, most, (double)LANES * MAD_ROUNDS * MAD_FLOP, flops));
out:
    return st;
}

// Bytes for one of two buffers: a quarter of what may still be used.
static uint64_t buffer_bytes(const keel_device *dev)
{
    const uint64_t left = dev->memory_limit ? dev->memory_limit - KEEL_MIN(dev->bytes_now, dev->memory_limit) : UINT64_MAX;
    return KEEL_MIN(KEEL_MIN((uint64_t)COPY_BYTES, dev->caps.max_range), left / 4);
}

static keel_status measure_copy(keel_device *dev, keel_recorder *rec, keel_heap *heap, double *bytes)
{
    keel_status st = KEEL_OK;
    const uint32_t groups = (uint32_t)(buffer_bytes(dev) / (LANES * 16));
    struct keel_span x, y;
    KEEL_TRY(keel_heap_alloc(heap, (uint64_t)groups * LANES * 16, &x));
    KEEL_TRY(keel_heap_alloc(heap, (uint64_t)groups * LANES * 16, &y));
    const uint32_t push = groups * LANES;
    struct keel_dispatch d = {.shader = &keel_sh_device_copy, .spec = {LANES}, .n_spec = 1,
                              .bind = {{x, KEEL_READ}, {y, KEEL_WRITE}}, .n_bind = 2, .push = &push, .push_bytes = sizeof(push),
                              .groups = {groups, 1, 1}, .label = "measure copy"};
    keel_record_fill(rec, x, 0x3f800000u);
    KEEL_TRY(best_rate(rec, &d, groups, LANES * 32.0, bytes));
out:
    return st;
}

// Bytes of weights a second in the base form and, where lanes can exchange values, in that one.
static keel_status measure_matvec(keel_device *dev, keel_recorder *rec, keel_heap *heap, double bytes[2])
{
    keel_status st = KEEL_OK;
    bytes[0] = bytes[1] = 0.0;
    const uint32_t words = 128;            // of sixteen weights: rows of 2048
    const uint32_t group = LANES * words * 16; // bytes: two rows a lane
    const uint32_t groups = (uint32_t)KEEL_MAX(buffer_bytes(dev) / group, 1u);
    struct keel_span w, x, y;
    KEEL_TRY(keel_heap_alloc(heap, (uint64_t)groups * group, &w));
    KEEL_TRY(keel_heap_alloc(heap, words * 16 * 4, &x));
    KEEL_TRY(keel_heap_alloc(heap, (uint64_t)groups * LANES * 8, &y));
    keel_record_fill(rec, w, 0x3a3a3a3au);
    keel_record_fill(rec, x, 0x3f800000u);
    for (int v = 0; v < (dev->caps.exchange ? 2 : 1); ++v) {
        struct keel_dispatch d = {.shader = v ? &keel_sh_device_matvec_x : &keel_sh_device_matvec, .spec = {LANES}, .n_spec = 1,
                                  .bind = {{w, KEEL_READ}, {x, KEEL_READ}, {y, KEEL_WRITE}}, .n_bind = 3, .push = &words,
                                  .push_bytes = sizeof(words), .groups = {KEEL_MIN(groups, 8u), 1, 1}, .label = "measure matvec"};
        KEEL_TRY(best_rate(rec, &d, groups, group, &bytes[v]));
    }
out:
    return st;
}

keel_status keel_device_measure(keel_device *dev)
{
    keel_status st = KEEL_OK;
    keel_recorder *rec = NULL;
    keel_heap *heap = NULL;
    double flops = 0.0, bytes = 0.0, matvec[2] = { 0.0, 0.0 };
    KEEL_TRY(keel_recorder_create(&rec, dev, NULL));
    KEEL_TRY(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "measurement"));
    KEEL_TRY(measure_mad(dev, rec, heap, &flops));
    KEEL_TRY(measure_copy(dev, rec, heap, &bytes));
    keel_heap_reset(heap);
    KEEL_TRY(measure_matvec(dev, rec, heap, matvec));
    dev->caps.gflops = flops * 1e-9;
    dev->caps.gbps = bytes * 1e-9;
    dev->caps.matvec_gbps = KEEL_MAX(matvec[0], matvec[1]) * 1e-9; // the faster form, as products take it
    keel_cost_init(&dev->cost, dev->caps.gflops, dev->caps.gbps);
    keel_speed_save(dev);
out:
    keel_recorder_destroy(&rec);
    keel_heap_destroy(&heap);
    return st;
}

// --- choice of variants --------------------------------------------------------------------------

// Least time of a few runs, after one that compiles the pipeline.
static keel_status least_time(keel_recorder *rec, const struct keel_dispatch *d, uint64_t *least)
{
    keel_status st = KEEL_OK;
    uint64_t ns = 0;
    *least = UINT64_MAX;
    for (int i = 0; i < 4; ++i) {
        KEEL_TRY(timed(rec, d, &ns));
        *least = KEEL_MIN(*least, ns);
    }
out:
    return st;
}

keel_status keel_speed_choose(keel_device *dev)
{
    enum { N = 512, GROUPS = 16, OUT = GROUPS * LANES };
    keel_status st = KEEL_OK;
    keel_recorder *rec = NULL;
    keel_heap *heap = NULL;
    struct keel_span x, y;
    float in[N], out[2][OUT];
    uint64_t ns[2];
    const uint32_t n = N;
    if (!dev->caps.exchange) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_recorder_create(&rec, dev, NULL));
    KEEL_TRY(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "choice of variants"));
    KEEL_TRY(keel_heap_alloc(heap, sizeof(in), &x));
    KEEL_TRY(keel_heap_alloc(heap, sizeof(out[0]), &y));
    for (uint32_t i = 0; i < N; ++i) {
        in[i] = (float)(i % 17) - 3.0f; // small integers: sums are exact in any order
    }
    KEEL_TRY(keel_upload(dev, x, in, sizeof(in)));
    for (int v = 0; v < 2; ++v) {
        const struct keel_dispatch d = {.shader = v ? &keel_sh_device_share_x : &keel_sh_device_share, .spec = {LANES}, .n_spec = 1,
                                        .bind = {{x, KEEL_READ}, {y, KEEL_WRITE}}, .n_bind = 2, .push = &n, .push_bytes = sizeof(n),
                                        .groups = {GROUPS, 1, 1}, .flops = (uint64_t)N * OUT, .label = "choose variant"};
        KEEL_TRY(least_time(rec, &d, &ns[v]));
        KEEL_TRY(keel_download(dev, out[v], y, sizeof(out[v])));
    }
    const bool same = memcmp(out[0], out[1], sizeof(out[0])) == 0;
    if (!same) {
        KEEL_WARN(dev->log, "%s: lanes exchange wrong values; the variants that need it are not used", dev->caps.name);
    }
    bool faster = (double)ns[1] < 0.8 * (double)ns[0];
    if (same && strcmp(dev->caps.kind, "cpu") == 0) {
        // In products a number serves many rows. For one token the two forms are near each other on lavapipe 26.1, and which is ahead
        // differs between CPUs; for many, exchange takes half of the time all the same. So only what is plainly slower goes; the doctor
        // times each family of ops by itself.
        double matvec[2];
        KEEL_TRY(measure_matvec(dev, rec, heap, matvec));
        faster = matvec[1] > 0.5 * matvec[0];
    }
    dev->caps.exchange = same && faster;
    keel_speed_save(dev);
out:
    keel_recorder_destroy(&rec);
    keel_heap_destroy(&heap);
    return st;
}
