// SPDX-License-Identifier: MIT
// device/speed.c: measures what the device computes and copies, and remembers it by device and driver version.
#include "internal.h"

#include "platform.h"
#include "shaders.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static bool speed_path(const keel_device *dev, char *out, size_t out_bytes)
{
    char dir[2048];
    // A clamped device is another one: its verdicts must not reach the real one.
    if (dev->no_cache || dev->caps.profile[0] || !keel_cache_dir(dir, sizeof dir)) {
        return false;
    }
    const int n = snprintf(out, out_bytes, "%s/speed-%s-%08" PRIx32 ".txt", dir, dev->caps.uuid, dev->caps.driver_version);
    return n > 0 && (size_t)n < out_bytes;
}

bool keel_speed_load(keel_device *dev)
{
    char path[2200];
    double v[4];
    int exchange = 0;
    FILE *f = speed_path(dev, path, sizeof path) ? fopen(path, "re") : NULL;
    const bool ok = f && fscanf(f, "gflops %lf gbps %lf rate_flops %lf rate_bytes %lf exchange %d", &v[0], &v[1], &v[2], &v[3], &exchange) == 5 &&
                    v[0] >= 0 && v[1] >= 0 && v[2] > 1e6 && v[2] < 1e16 && v[3] > 1e6 && v[3] < 1e15;
    if (f) {
        fclose(f);
    }
    if (ok) {
        dev->caps.gflops = v[0];
        dev->caps.gbps = v[1];
        dev->rate_flops = v[2];
        dev->rate_bytes = v[3];
        dev->caps.exchange = dev->caps.exchange && exchange;
    }
    return ok;
}

void keel_speed_save(const keel_device *dev)
{
    static const keel_log quiet = { .level = 0 };
    char path[2200];
    struct keel_file_out out;
    if (!speed_path(dev, path, sizeof path) || keel_file_create(&out, path, &quiet) != KEEL_OK) {
        return; // a cache: without it the next start measures again
    }
    fprintf(out.f, "gflops %.6g gbps %.6g rate_flops %.6g rate_bytes %.6g exchange %d\n", dev->caps.gflops, dev->caps.gbps,
            dev->rate_flops, dev->rate_bytes, dev->caps.exchange);
    keel_file_commit(&out, &quiet);
}

// Best of a few runs of one dispatch, in seconds.
static keel_status time_dispatch(keel_device *dev, const struct keel_dispatch *d, double *seconds)
{
    keel_status st = KEEL_OK;
    keel_recorder *rec = NULL;
    *seconds = 1e9;
    KEEL_TRY(keel_recorder_create(&rec, dev, NULL));
    for (int i = 0; i < 4; i++) { // the first one also compiles and touches memory
        const uint64_t t0 = keel_now_ns();
        keel_record(rec, d);
        KEEL_TRY(keel_recorder_submit(rec));
        KEEL_TRY(keel_recorder_wait(rec));
        *seconds = KEEL_MIN(*seconds, (double)(keel_now_ns() - t0) * 1e-9);
    }
out:
    keel_recorder_destroy(&rec);
    return st;
}

keel_status keel_device_measure(keel_device *dev)
{
    enum { COPY_BYTES = 16 << 20, ROUNDS = 64 };
    keel_status st = KEEL_OK;
    keel_heap *heap = NULL;
    struct keel_span x, y;
    double seconds;
    const float push[2] = { 0.999f, 0.001f };
    const uint32_t n = COPY_BYTES / 16;
    KEEL_TRY(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "speed measurement"));
    KEEL_TRY(keel_heap_alloc(heap, COPY_BYTES, &x));
    KEEL_TRY(keel_heap_alloc(heap, COPY_BYTES, &y));
    // 256 × 64 lanes × 64 rounds × 256 FLOP = 0.27 GFLOP, then 64 times as much on devices that are fast enough.
    for (uint32_t groups = 256; groups <= 16384; groups *= 64) {
        const double flops = (double)groups * 64 * ROUNDS * 256;
        KEEL_TRY(time_dispatch(dev, &(struct keel_dispatch){
            .shader = &keel_sh_device_mad, .spec = { 64, ROUNDS }, .n_spec = 2, .bind = { { y, KEEL_WRITE } }, .n_bind = 1,
            .push = push, .push_bytes = sizeof push, .groups = { groups, 1, 1 }, .flops = (uint64_t)flops, .label = "measure mad" },
            &seconds));
        dev->caps.gflops = flops / seconds * 1e-9;
        if (seconds > 1e-3) {
            break;
        }
    }
    KEEL_TRY(time_dispatch(dev, &(struct keel_dispatch){
        .shader = &keel_sh_device_copy, .spec = { 64 }, .n_spec = 1, .bind = { { x, KEEL_READ }, { y, KEEL_WRITE } }, .n_bind = 2,
        .push = &n, .push_bytes = sizeof n, .groups = { KEEL_MIN(n / 64, dev->caps.max_groups), 1, 1 }, .bytes = 2 * COPY_BYTES,
        .label = "measure copy" }, &seconds));
    dev->caps.gbps = 2.0 * COPY_BYTES / seconds * 1e-9;
    keel_speed_save(dev);
out:
    keel_heap_destroy(&heap);
    return st;
}

keel_status keel_speed_choose(keel_device *dev)
{
    enum { N = 512, GROUPS = 16, OUT = GROUPS * 64 };
    keel_status st = KEEL_OK;
    keel_heap *heap = NULL;
    struct keel_span x, y[2];
    float in[N], out[2][OUT];
    double seconds[2];
    const uint32_t n = N;
    if (!dev->caps.exchange) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "choice of variants"));
    KEEL_TRY(keel_heap_alloc(heap, sizeof in, &x));
    for (uint32_t i = 0; i < N; i++) {
        in[i] = (float)(i % 17) - 3.0f; // small integers: sums are exact in any order
    }
    KEEL_TRY(keel_upload(dev, x, in, sizeof in));
    for (int v = 0; v < 2; v++) {
        KEEL_TRY(keel_heap_alloc(heap, sizeof out[v], &y[v]));
        KEEL_TRY(time_dispatch(dev, &(struct keel_dispatch){
            .shader = v ? &keel_sh_device_share_x : &keel_sh_device_share, .spec = { 64 }, .n_spec = 1,
            .bind = { { x, KEEL_READ }, { y[v], KEEL_WRITE } }, .n_bind = 2, .push = &n, .push_bytes = sizeof n,
            .groups = { GROUPS, 1, 1 }, .flops = (uint64_t)N * OUT, .label = "choose variant" }, &seconds[v]));
        KEEL_TRY(keel_download(dev, out[v], y[v], sizeof out[v]));
    }
    const bool same = memcmp(out[0], out[1], sizeof out[0]) == 0;
    if (!same) {
        KEEL_WARN(dev->log, "%s: lanes exchange wrong values; the variants that need it are not used", dev->caps.name);
    }
    dev->caps.exchange = same && seconds[1] < 0.8 * seconds[0];
    keel_speed_save(dev);
out:
    keel_heap_destroy(&heap);
    return st;
}
