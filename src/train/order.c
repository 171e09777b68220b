// SPDX-License-Identifier: MIT
// train/order.c: the order of rows and the learning rate: pure functions of seed and position, so that a
// resumed run is bit-equal.
#include "data.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double pi = 3.14159265358979323846;

// Keeps these streams apart from those of the adapter's initial values.
#define ROW_STREAM 0x726f770000000000ull

static void deal_epoch(struct keel_row_order *o, size_t file, uint64_t epoch)
{
    const uint32_t n = (uint32_t)o->set->files[file].n_rows;
    uint32_t *deal = o->deal[file];
    struct keel_rng rng = keel_rng_make(o->seed, ROW_STREAM + ((uint64_t)file << 32) + epoch);
    for (uint32_t i = 0; i < n; i++) {
        deal[i] = i;
    }
    for (uint32_t i = n; i > 1; i--) {
        const uint32_t j = keel_rng_below(&rng, i);
        const uint32_t t = deal[i - 1];
        deal[i - 1] = deal[j];
        deal[j] = t;
    }
}

keel_status keel_row_order_init(struct keel_row_order *order, const struct keel_train_set *set, uint64_t seed,
                                bool shuffle, const keel_log *log)
{
    keel_status st = KEEL_OK;
    *order = (struct keel_row_order){ .set = set, .seed = seed, .shuffle = shuffle };
    order->drawn = calloc(set->n_files, sizeof *order->drawn);
    order->deal = calloc(set->n_files, sizeof *order->deal);
    if (!order->drawn || !order->deal) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "out of memory for the order of rows");
    }
    for (size_t i = 0; shuffle && i < set->n_files; i++) {
        order->deal[i] = calloc(set->files[i].n_rows, sizeof **order->deal);
        if (!order->deal[i]) {
            KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "out of memory for the order of rows");
        }
    }
out:
    if (st != KEEL_OK) {
        keel_row_order_finish(order);
    }
    return st;
}

uint64_t keel_row_order_next(struct keel_row_order *order)
{
    const struct keel_train_set *set = order->set;
    const double due = (double)(order->position + 1);
    size_t file = 0;
    double worst = -INFINITY;
    for (size_t i = 0; i < set->n_files; i++) {
        const double behind = set->files[i].share * due - (double)order->drawn[i];
        if (behind > worst) {
            worst = behind;
            file = i;
        }
    }
    const struct keel_train_file *f = &set->files[file];
    const uint64_t at = order->drawn[file] % f->n_rows;
    if (order->shuffle && at == 0) {
        deal_epoch(order, file, order->drawn[file] / f->n_rows);
    }
    order->drawn[file]++;
    order->position++;
    return f->row0 + (order->shuffle ? order->deal[file][at] : at);
}

void keel_row_order_finish(struct keel_row_order *order)
{
    for (size_t i = 0; order->deal && i < order->set->n_files; i++) {
        free(order->deal[i]);
    }
    free(order->deal);
    free(order->drawn);
    *order = (struct keel_row_order){ 0 };
}

bool keel_schedule_parse(const char *name, enum keel_schedule *out)
{
    static const char *const names[] = { "constant", "linear", "cosine" };
    for (size_t i = 0; i < KEEL_COUNT(names); i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (enum keel_schedule)i;
            return true;
        }
    }
    return false;
}

double keel_schedule_lr(enum keel_schedule schedule, double base, uint64_t step, uint64_t warmup,
                        uint64_t n_steps)
{
    const uint64_t s = step - 1;
    if (s < warmup) {
        return base * (double)s / (double)warmup;
    }
    if (schedule == KEEL_SCHEDULE_CONSTANT) {
        return base;
    }
    const double rest = n_steps > warmup ? (double)(n_steps - warmup) : 1.0;
    const double done = KEEL_MIN((double)(s - warmup) / rest, 1.0);
    return schedule == KEEL_SCHEDULE_LINEAR ? base * (1.0 - done) : base * 0.5 * (1.0 + cos(pi * done));
}
