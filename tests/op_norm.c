// SPDX-License-Identifier: MIT
// tests/op_norm.c: RMSNorm forward and backward.
// Tolerances: the mean of D squares and a reciprocal root are relative errors of all terms of a result, so the budget is that
// of a D-term sum on the absolute values of the terms.
#include "op_test.h"

#define EPS 1e-6f

static void record_fwd(keel_recorder *rec, const void *p)
{
    keel_rmsnorm(rec, p);
}

static void record_bwd(keel_recorder *rec, const void *p)
{
    keel_rmsnorm_bwd(rec, p);
}

// Rows of different size: heavy tails, one tiny row where eps counts, one of zeros, one with a massive channel.
static double *draw_rows(struct op_test *t, int T, int D)
{
    double *x = op_draw_heavy(t, (size_t)T * D, 1);
    for (int i = 0; i < T; i++) {
        for (int j = 0; j < D; j++) {
            double *v = &x[(size_t)i * D + j];
            *v = i % 5 == 1 ? (float)(*v * 1e-4) : i % 5 == 3 ? 0 : i % 5 == 4 && j == D / 2 ? 30000 : *v;
        }
    }
    return x;
}

enum alias { NO_RESIDUAL, RESIDUAL, Y_IS_X, Y_IS_RESIDUAL, N_ALIAS };

static void fwd_case(struct op_test *t, int T, int D, enum alias alias)
{
    static const char *const names[] = { "plain", "residual", "y is x", "y is residual" };
    const size_t n = (size_t)T * D;
    op_begin(t, "rmsnorm T=%d D=%d %s", T, D, names[alias]);
    const double *x = draw_rows(t, T, D), *w = op_draw(t, (size_t)D, 1);
    const double *res = alias == RESIDUAL || alias == Y_IS_RESIDUAL ? op_draw(t, n, 10) : NULL;
    double *want = op_zeros(t, n), *size = op_zeros(t, n);
    ref_rmsnorm(want, x, w, res, T, D, (double)EPS);
    ref_rmsnorm(size, op_abs(t, x, n), op_abs(t, w, (size_t)D), res ? op_abs(t, res, n) : NULL, T, D, (double)EPS);
    struct keel_rmsnorm_params p = { .w = op_in(t, "w", w, (size_t)D), .n_rows = (uint32_t)T, .width = (uint32_t)D,
                                     .eps = EPS };
    p.y = op_out(t, "y", alias == Y_IS_X ? x : alias == Y_IS_RESIDUAL ? res : NULL, want, op_sum_budgets(t, size, n, D), n);
    p.x = alias == Y_IS_X ? p.y : op_in(t, "x", x, n);
    if (res) {
        p.residual = alias == Y_IS_RESIDUAL ? p.y : op_in(t, "residual", res, n);
    }
    op_run(t, record_fwd, &p);
}

static void record_pair(keel_recorder *rec, const void *p)
{
    keel_rmsnorm_pair(rec, p);
}

// The budget of z is that of a norm on the values of y plus what the error of y makes of it: relative to the root mean square of
// y, on which the norm divides.
static void pair_case(struct op_test *t, int T, int D, bool in_place)
{
    const size_t n = (size_t)T * D;
    op_begin(t, "rmsnorm_pair T=%d D=%d %s", T, D, in_place ? "in place" : "apart");
    const double *x = draw_rows(t, T, D), *res = op_draw(t, n, 10), *w = op_draw(t, (size_t)D, 1), *v = op_draw(t, (size_t)D, 1);
    double *y = op_zeros(t, n), *size = op_zeros(t, n), *z = op_zeros(t, n), *z_size = op_zeros(t, n);
    ref_rmsnorm(y, x, w, res, T, D, (double)EPS);
    ref_rmsnorm(size, op_abs(t, x, n), op_abs(t, w, (size_t)D), op_abs(t, res, n), T, D, (double)EPS);
    ref_rmsnorm(z, y, v, NULL, T, D, (double)EPS);
    for (int i = 0; i < T; i++) {
        double ss = 0;
        for (int j = 0; j < D; j++) {
            ss += y[(size_t)i * D + j] * y[(size_t)i * D + j];
        }
        const double s = 1 / sqrt(ss / D + (double)EPS);
        for (int j = 0; j < D; j++) {
            const size_t at = (size_t)i * D + j;
            z_size[at] = fabs(z[at]) + s * fabs(v[j]) * size[at];
        }
    }
    struct keel_rmsnorm_pair_params p = { .w = op_in(t, "w", w, (size_t)D), .v = op_in(t, "v", v, (size_t)D),
                                          .n_rows = (uint32_t)T, .width = (uint32_t)D, .eps = EPS };
    p.y = op_out(t, "y", in_place ? res : NULL, y, op_sum_budgets(t, size, n, D), n);
    p.residual = in_place ? p.y : op_in(t, "residual", res, n);
    p.z = op_out(t, "z", in_place ? x : NULL, z, op_sum_budgets(t, z_size, n, D), n);
    p.x = in_place ? p.z : op_in(t, "x", x, n);
    op_run(t, record_pair, &p);
}

// |s w dy| + |s³ x / D| Σ |dy w x|: the terms of ref_rmsnorm_bwd() without signs.
static void bwd_size(double *size, const double *x, const double *w, const double *dy, int T, int D)
{
    for (int i = 0; i < T; i++) {
        double ss = 0, dot = 0;
        for (int j = 0; j < D; j++) {
            const size_t at = (size_t)i * D + j;
            ss += x[at] * x[at];
            dot += fabs(dy[at] * w[j] * x[at]);
        }
        const double s = 1 / sqrt(ss / D + (double)EPS);
        for (int j = 0; j < D; j++) {
            const size_t at = (size_t)i * D + j;
            size[at] += fabs(s * w[j] * dy[at]) + s * s * s * fabs(x[at]) / D * dot;
        }
    }
}

static void bwd_case(struct op_test *t, int T, int D, bool add, bool in_place)
{
    const size_t n = (size_t)T * D;
    op_begin(t, "rmsnorm_bwd T=%d D=%d %s", T, D, add ? "add" : in_place ? "dx is dy" : "plain");
    const double *x = draw_rows(t, T, D), *w = op_draw(t, (size_t)D, 1), *dy = op_draw(t, n, 1);
    const double *init = add ? op_draw(t, n, 10) : NULL;
    double *want = add ? op_copy(t, init, n) : op_zeros(t, n);
    double *size = add ? op_abs(t, init, n) : op_zeros(t, n);
    ref_rmsnorm_bwd(want, x, w, dy, T, D, (double)EPS, add);
    bwd_size(size, x, w, dy, T, D);
    struct keel_rmsnorm_bwd_params p = { .x = op_in(t, "x", x, n), .w = op_in(t, "w", w, (size_t)D), .n_rows = (uint32_t)T,
                                         .width = (uint32_t)D, .eps = EPS, .add = add };
    p.dx = op_out(t, "dx", in_place ? dy : init, want, op_sum_budgets(t, size, n, D), n);
    p.dy = in_place ? p.dx : op_in(t, "dy", dy, n);
    op_run(t, record_bwd, &p);
}

static const int rows[] = { 1, 2, 3, 7, 8, 9, 17, 33, 64, 129 };
static const int widths[] = { 640, 1, 2, 3, 7, 8, 33, 63, 64, 65, 127, 256, 1152, 2560 };

static void test_fwd(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(rows) : 1); j++) {
            for (int alias = 0; alias < N_ALIAS; alias++) {
                fwd_case(t, rows[(i + j) % KEEL_COUNT(rows)], widths[i], (enum alias)alias);
            }
            pair_case(t, rows[(i + j) % KEEL_COUNT(rows)], widths[i], false);
            pair_case(t, rows[(i + j) % KEEL_COUNT(rows)], widths[i], true);
        }
    }
    op_end(t);
}

static void test_bwd(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(rows) : 1); j++) {
            const int T = rows[(i + j + 3) % KEEL_COUNT(rows)];
            bwd_case(t, T, widths[i], false, false);
            bwd_case(t, T, widths[i], true, false);
            bwd_case(t, T, widths[i], false, true);
        }
    }
    op_end(t);
}

// Step 0.01 of values of order 1: truncation is about h² = 1e-4 of the slope, rounding of the loss about 1e-4; 5e-3.
static void test_slope(void **state)
{
    struct op_test *t = *state;
    const size_t n = 5 * 70;
    op_begin(t, "rmsnorm slope T=5 D=70");
    const double *x = op_draw(t, n, 1), *w = op_draw(t, 70, 1), *c = op_draw(t, n, 1);
    struct keel_rmsnorm_params f = { .x = op_in(t, "x", x, n), .w = op_in(t, "w", w, 70), .n_rows = 5, .width = 70,
                                     .y = op_out(t, "y", NULL, NULL, NULL, n), .eps = EPS };
    const struct keel_rmsnorm_bwd_params b = { .x = f.x, .w = f.w, .dy = op_in(t, "c", c, n), .n_rows = 5, .width = 70,
                                               .dx = op_out(t, "dx", NULL, NULL, NULL, n), .eps = EPS };
    op_run(t, record_bwd, &b);
    op_check_slope(t, &(struct op_slope){ .name = "x", .forward = record_fwd, .params = &f, .x = f.x, .y = f.y, .x0 = x,
                                          .grad = op_result(t, b.dx), .c = c, .n_x = n, .n_y = n, .h = 0.01, .tol = 5e-3 });
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fwd),
        cmocka_unit_test(test_bwd),
        cmocka_unit_test(test_slope),
    };
    return op_main("op_norm", tests);
}
