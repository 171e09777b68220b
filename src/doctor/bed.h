// SPDX-License-Identifier: MIT
// doctor/bed.h: a test bed: runs one op on one case on the device, several times, and compares with src/ref within a budget.
// tests/op_test.c does the same with guards and profiles for programmers; this one must live with whatever a driver does.
#ifndef KEEL_DOCTOR_BED_H
#define KEEL_DOCTOR_BED_H

#include "base.h"
#include "device.h"
#include "ops.h"

#define BED_BUFS 12

struct bed_buf {
    struct keel_span span;
    size_t n;                    // words
    uint32_t *init, *first;      // what it starts as; what the first run left
    const double *want, *budget; // NULL: not compared
};

// What is known of a case that ran. `why` is empty while all is well.
struct bed_result {
    char why[192];
    double worst; // largest error as a part of its budget
};

struct bed {
    keel_device *dev;
    keel_heap *heap;
    keel_recorder *rec;
    struct keel_rng rng;
    uint32_t repeats;     // runs of a case, which must agree to the bit
    char *arena;          // host arrays of a case
    size_t used;
    struct bed_buf buf[BED_BUFS];
    uint32_t n_bufs;
    keel_status status;   // first failure of memory or device in this case
    struct bed_result result;
};

typedef void (*bed_record_fn)(keel_recorder *rec, const void *params);

// Errors: NO_MEMORY, DEVICE.
keel_status bed_open(struct bed *b, keel_device *dev, uint32_t repeats);
void bed_close(struct bed *b);
// Starts a case: forgets arrays, buffers and result; random numbers depend on `seed` alone.
void bed_begin(struct bed *b, uint64_t seed);

// Host arrays, zeroed, valid until the next bed_begin(). Cases are ours, so that they fit is asserted.
void *bed_bytes(struct bed *b, size_t n);
double *bed_zeros(struct bed *b, size_t n);
double *bed_copy(struct bed *b, const double *x, size_t n);
double *bed_abs(struct bed *b, const double *x, size_t n);

// Ways to fill an input. All values are exact floats.
enum bed_fill {
    BED_NORMAL,
    BED_OUTLIERS, // one in 50 is 100 times larger, as in Gemma's residual stream
    BED_CANCEL,   // neighbours cancel but for one part in 4096; some zeros and some close to the smallest normal number
    BED_N_FILLS
};
double *bed_draw(struct bed *b, size_t n, double scale, enum bed_fill fill);

// Device buffers. `x` as f32; out: starts as `init`, or NaN if that is NULL, and element i must end within budget[i] of want[i].
struct keel_span bed_in(struct bed *b, const double *x, size_t n);
struct keel_span bed_words(struct bed *b, const void *words, size_t n);
struct keel_span bed_out(struct bed *b, const double *init, const double *want, const double *budget, size_t n);
struct keel_span bed_scratch(struct bed *b, uint64_t bytes);

// Budgets of n f32 sums of `terms` products whose absolute values sum to mag[i]: as in tests/op_test.h.
double *bed_sum_budgets(struct bed *b, const double *mag, size_t n, double terms);
double bed_sum_budget(double mag, double terms);

// Runs the case and fills in b->result. Returns false if it is wrong or could not run.
bool bed_run(struct bed *b, bed_record_fn record, const void *params);
// Least time in nanoseconds of a few runs, after one that compiles; 0 if it could not run.
uint64_t bed_time(struct bed *b, bed_record_fn record, const void *params);

#endif
