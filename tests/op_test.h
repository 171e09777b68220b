// SPDX-License-Identifier: MIT
// tests/op_test.h: the harness of the op tests: runs one op on one case, under each clamp profile, and compares it with
// src/ref within a stated budget.
//
// A case is: op_begin(), buffers, op_run(). Every buffer stands between guard words; outputs start as NaN unless they are
// added to; each case runs twice and must give the same bits; inputs must come back unchanged.
//
// Environment: KEEL_TEST_SEED (default 1), KEEL_TEST_PROFILES (default "none,min,rpi"), KEEL_TEST_DEVICE (default "0"),
// KEEL_TEST_FULL=1 for the larger grid, KEEL_TEST_ONLY: a test's name, with * for any letters, KEEL_TEST_EVERY=N: one case in N, where
// a case asks op_left_out() (an emulated processor compiles a pipeline in seconds).
#ifndef KEEL_OP_TEST_H
#define KEEL_OP_TEST_H

#include "base.h"
#include "device.h"
#include "ops.h"
#include "ref.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct op_test; // op_test.c
typedef void (*op_record_fn)(keel_recorder *rec, const void *params);

// Runs cmocka tests once a profile with *state = struct op_test *. Returns the exit code: 77 (skipped) without a device.
#define op_main(name, tests) op_main_n((name), (tests), KEEL_COUNT(tests))
int op_main_n(const char *name, const struct CMUnitTest *tests, size_t n);

bool op_full(void);
keel_device *op_device(struct op_test *t);
keel_heap *op_heap(struct op_test *t);
struct keel_rng *op_rng(struct op_test *t);

// Starts a case: forgets the buffers and memory of the one before, seeds the generator from KEEL_TEST_SEED and the label.
void op_begin(struct op_test *t, const char *label, ...) __attribute__((format(printf, 2, 3)));
// True for the cases that KEEL_TEST_EVERY leaves out; the same ones on every run, and never a test function's first. To be asked after op_begin().
bool op_left_out(struct op_test *t);
// Ends a test function: prints how many cases ran and the worst error in % of its budget; fails if any case failed.
void op_end(struct op_test *t);
// Marks the current case as failed.
void op_fail(struct op_test *t, const char *why, ...) __attribute__((format(printf, 2, 3)));

// --- host arrays of a case, freed by the next op_begin() -----------------------------------------

void *op_bytes(struct op_test *t, size_t n);                     // zeroed
double *op_zeros(struct op_test *t, size_t n);                   // zeroed
double *op_draw(struct op_test *t, size_t n, double scale);      // normal × scale, rounded to float
double *op_draw_heavy(struct op_test *t, size_t n, double scale); // the same, one in 50 is 100 times larger
double *op_abs(struct op_test *t, const double *x, size_t n);
double *op_copy(struct op_test *t, const double *x, size_t n);

// --- device buffers of a case --------------------------------------------------------------------

struct keel_span op_in(struct op_test *t, const char *name, const double *x, size_t n); // as f32
struct keel_span op_in_words(struct op_test *t, const char *name, const void *words, size_t n);
// Starts as `init`, or NaN if that is NULL. After the run element i must be within budget[i] of want[i]; the arrays are read
// only then. want NULL: not compared (op_result() still gives the values).
struct keel_span op_out(struct op_test *t, const char *name, const double *init, const double *want, const double *budget,
                        size_t n);
// The same for words that only the test can read: starts as `init`, compared between the two runs alone.
struct keel_span op_out_words(struct op_test *t, const char *name, const uint32_t *init, size_t n);
struct keel_span op_scratch(struct op_test *t, const char *name, uint64_t bytes); // contents undefined, guarded

// Uploads all buffers, records, waits, downloads, compares; then once more for the same bits.
void op_run(struct op_test *t, op_record_fn record, const void *params);
// What the last run left in a buffer, n doubles.
double *op_result(struct op_test *t, struct keel_span span);
const uint32_t *op_result_words(struct op_test *t, struct keel_span span); // until the next op_begin()

// A random matrix: `m` on the device, its values [rows, cols] and their magnitudes (ref_dequant()). max_rows: cut into
// shards of that many rows (a multiple of 64); 0: keel_matrix_create().
void op_matrix(struct op_test *t, struct keel_matrix *m, enum keel_dtype type, uint32_t rows, uint32_t cols,
               uint32_t max_rows, double **w, double **mag);

// --- tolerances ----------------------------------------------------------------------------------

#define OP_EPS 0x1p-24 // half an ulp of 1 in f32

// Error of an f32 sum of `terms` products whose absolute values sum to `mag`: rounding errors add like a random walk, √terms;
// 4 standard deviations, and 8 roundings for what surrounds the sum. The tiny constant is where results may flush to zero.
static inline double op_sum_budget(double mag, double terms)
{
    return OP_EPS * (4 * sqrt(terms) + 8) * mag + 1e-35;
}
// The same for n sums.
double *op_sum_budgets(struct op_test *t, const double *mag, size_t n, double terms);

// --- central differences on the device -----------------------------------------------------------

// Ties a forward kernel to a backward one without the reference. `grad` [n] is what the backward gave for d(Σ c · y)/dx; x is
// moved by ±h along random directions and the forward runs again. The slope must agree within `tol` of the
// root of the squared terms, which is the size of the sum for independent signs.
struct op_slope {
    const char *name;
    op_record_fn forward;
    const void *params;
    struct keel_span x, y;
    const double *x0, *grad, *c;
    size_t n_x, n_y;
    double h, tol;
};
void op_check_slope(struct op_test *t, const struct op_slope *s);

#endif
