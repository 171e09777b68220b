// SPDX-License-Identifier: MIT
// tests/op_rows.c: ops on marked rows: adding a direction, taking components out, running sums.
// Tolerances: a product with a direction is a D-term sum; what is taken out carries its error times |u|. Running sums over T rows
// are T-term sums whatever was in them before: the pair of floats keeps the old total.
#include "op_test.h"

static const int rows[] = { 1, 2, 3, 7, 9, 33, 64, 129 };
static const int widths[] = { 640, 1, 3, 8, 63, 64, 65, 128, 1152, 2560 };

static const double *draw_marks(struct op_test *t, int T)
{
    double *m = op_zeros(t, (size_t)T);
    for (int i = 0; i < T; i++) {
        m[i] = keel_rng_u32(op_rng(t)) % 3 != 0;
    }
    return m;
}

// k orthonormal rows by Gram and Schmidt; k <= D.
static double *draw_directions(struct op_test *t, int k, int D)
{
    double *u = op_draw(t, (size_t)k * D, 1);
    for (int j = 0; j < k; j++) {
        double *row = u + (size_t)j * D, norm = 0;
        for (int i = 0; i < j; i++) {
            double dot;
            ref_rows_dot(&dot, row, u + (size_t)i * D, 1, 1, D);
            for (int c = 0; c < D; c++) {
                row[c] -= dot * u[(size_t)i * D + c];
            }
        }
        for (int c = 0; c < D; c++) {
            norm += row[c] * row[c];
        }
        for (int c = 0; c < D; c++) {
            row[c] = (float)(row[c] / sqrt(norm));
        }
    }
    return u;
}

// --- add -----------------------------------------------------------------------------------------

static void record_add(keel_recorder *rec, const void *p)
{
    keel_rows_add(rec, p);
}

static void test_add(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        const int D = widths[i], T = rows[i % KEEL_COUNT(rows)];
        const size_t n = (size_t)T * D;
        op_begin(t, "rows_add T=%d D=%d", T, D);
        const double *x = op_draw_heavy(t, n, 10), *v = op_draw(t, (size_t)D, 1), *marks = draw_marks(t, T);
        double *want = op_copy(t, x, n), *size = op_abs(t, x, n);
        ref_rows_add(want, v, marks, T, D, -2.5);
        ref_rows_add(size, op_abs(t, v, (size_t)D), marks, T, D, 2.5);
        const struct keel_rows_add_params p = { .x = op_out(t, "x", x, want, op_sum_budgets(t, size, n, 2), n),
                                                .v = op_in(t, "v", v, (size_t)D), .marks = op_in(t, "marks", marks, (size_t)T),
                                                .n_rows = (uint32_t)T, .width = (uint32_t)D, .a = -2.5f };
        op_run(t, record_add, &p);
    }
    op_end(t);
}

// --- take out ------------------------------------------------------------------------------------

static void record_project(keel_recorder *rec, const void *p)
{
    keel_rows_project(rec, p);
}

static void project_case(struct op_test *t, int T, int D, int k, enum keel_rows_mode mode)
{
    static const char *const names[] = { "ablate", "cap", "floor" };
    const size_t n = (size_t)T * D, rows_n = (size_t)T;
    op_begin(t, "rows_project %s T=%d D=%d k=%d", names[mode], T, D, k);
    const double *x = op_draw_heavy(t, n, 3), *u = draw_directions(t, k, D), *marks = draw_marks(t, T);
    const double limit = mode == KEEL_CAP ? 0.5 : -0.5;
    double *want = op_copy(t, x, n), *factor = op_zeros(t, rows_n), *budget = op_zeros(t, n), *exact = op_zeros(t, rows_n);
    ref_rows_project(want, factor, u, marks, T, D, k, (int)mode, limit);
    for (int r = 0; r < T; r++) {
        for (int j = 0; j < k; j++) { // later products see what earlier ones left: their errors add up
            double size = 1;
            for (int c = 0; c < D; c++) {
                size += fabs(x[(size_t)r * D + c] * u[(size_t)j * D + c]);
            }
            for (int c = 0; c < D; c++) {
                budget[(size_t)r * D + c] += op_sum_budget(size * k * (fabs(u[(size_t)j * D + c]) + 0.01), D) +
                                             op_sum_budget(fabs(x[(size_t)r * D + c]), 1);
            }
        }
        exact[r] = OP_EPS;
    }
    struct keel_rows_project_params p = { .x = op_out(t, "x", x, want, budget, n), .u = op_in(t, "u", u, (size_t)k * D),
                                          .marks = op_in(t, "marks", marks, rows_n), .n_rows = (uint32_t)T, .width = (uint32_t)D,
                                          .k = (uint32_t)k, .mode = mode, .limit = (float)limit };
    if (mode != KEEL_ABLATE) {
        p.factor = op_out(t, "factor", NULL, factor, exact, rows_n);
    }
    op_run(t, record_project, &p);
}

static void test_project(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        const int D = widths[i], T = rows[(i + 1) % KEEL_COUNT(rows)];
        project_case(t, T, D, 1, KEEL_ABLATE);
        project_case(t, T, D, KEEL_MIN(D, 5), KEEL_ABLATE);
        project_case(t, T, D, 1, KEEL_CAP);
        project_case(t, T, D, 1, KEEL_FLOOR);
    }
    op_end(t);
}

// y = x with the component out of it, then a copy, so that the harness sees an input and an output.
struct slope {
    struct keel_rows_project_params p;
    struct keel_span x;
};

static void record_slope(keel_recorder *rec, const void *params)
{
    const struct slope *s = params;
    keel_record_copy(rec, s->p.x, s->x);
    keel_rows_project(rec, &s->p);
}

// Gradients as trainer.c takes them: ablation of dy with the marks, or with the factor of the forward pass. The map is piecewise
// linear, so a step of 0.01 differs by rounding alone unless a row crosses its limit; 5e-3.
static void slope_case(struct op_test *t, enum keel_rows_mode mode, int k)
{
    enum { T = 9, D = 70 };
    const size_t n = T * D;
    op_begin(t, "rows_project slope mode=%d k=%d", (int)mode, k);
    const double *x = op_draw(t, n, 1), *u = draw_directions(t, k, D), *marks = draw_marks(t, T), *c = op_draw(t, n, 1);
    double *unused = op_zeros(t, n), *factor = op_zeros(t, T);
    memcpy(unused, x, n * sizeof *x);
    ref_rows_project(unused, factor, u, marks, T, D, k, (int)mode, 0.1);
    struct slope f = { .p = { .x = op_out(t, "y", NULL, NULL, NULL, n), .u = op_in(t, "u", u, (size_t)k * D),
                              .marks = op_in(t, "marks", marks, T), .n_rows = T, .width = D, .k = (uint32_t)k, .mode = mode,
                              .limit = 0.1f },
                       .x = op_in(t, "x", x, n) };
    struct keel_rows_project_params b = f.p;
    b.x = op_out(t, "dx", c, NULL, NULL, n);
    b.mode = KEEL_ABLATE;
    if (mode != KEEL_ABLATE) {
        f.p.factor = op_out(t, "factor", NULL, NULL, NULL, T);
        b.marks = op_in(t, "factor of the forward pass", factor, T);
    }
    op_run(t, record_project, &b);
    op_check_slope(t, &(struct op_slope){ .name = "x", .forward = record_slope, .params = &f, .x = f.x, .y = f.p.x, .x0 = x,
                                          .grad = op_result(t, b.x), .c = c, .n_x = n, .n_y = n, .h = 0.01, .tol = 5e-3 });
}

static void test_slope(void **state)
{
    struct op_test *t = *state;
    slope_case(t, KEEL_ABLATE, 1);
    slope_case(t, KEEL_ABLATE, 4);
    slope_case(t, KEEL_CAP, 1);
    slope_case(t, KEEL_FLOOR, 1);
    op_end(t);
}

// --- products and sums ---------------------------------------------------------------------------

struct dot {
    struct keel_span x, u, y, square;
    uint32_t T, k, D;
};

static void record_dot(keel_recorder *rec, const void *params)
{
    const struct dot *d = params;
    keel_rows_dot(rec, d->x, d->u, d->y, d->T, d->k, d->D);
    keel_rows_square(rec, d->x, d->square, d->T, d->D);
}

static void test_dot(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        const int D = widths[i], T = rows[(i + 2) % KEEL_COUNT(rows)], k = 1 + (int)i % 5;
        const size_t n = (size_t)T * D, m = (size_t)T * k;
        op_begin(t, "rows_dot T=%d k=%d D=%d", T, k, D);
        const double *x = op_draw_heavy(t, n, 3), *u = op_draw(t, (size_t)k * D, 1);
        double *want = op_zeros(t, m), *size = op_zeros(t, m), *squares = op_zeros(t, (size_t)T);
        ref_rows_dot(want, x, u, T, k, D);
        ref_rows_dot(size, op_abs(t, x, n), op_abs(t, u, (size_t)k * D), T, k, D);
        for (int r = 0; r < T; r++) {
            ref_rows_dot(&squares[r], x + (size_t)r * D, x + (size_t)r * D, 1, 1, D);
        }
        const struct dot d = { .x = op_in(t, "x", x, n), .u = op_in(t, "u", u, (size_t)k * D),
                               .y = op_out(t, "y", NULL, want, op_sum_budgets(t, size, m, D), m),
                               .square = op_out(t, "square", NULL, squares, op_sum_budgets(t, squares, (size_t)T, D), (size_t)T),
                               .T = (uint32_t)T, .k = (uint32_t)k, .D = (uint32_t)D };
        op_run(t, record_dot, &d);
    }
    op_end(t);
}

static void record_sums(keel_recorder *rec, const void *p)
{
    keel_rows_sums(rec, p);
}

// Totals start far above what is added, where a single float would lose it: the sum of the pair must keep it.
static void test_sums(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        const int D = widths[i], T = rows[(i + 3) % KEEL_COUNT(rows)];
        const size_t n = (size_t)T * D, d = (size_t)D;
        op_begin(t, "rows_sums T=%d D=%d", T, D);
        const double *x = op_draw_heavy(t, n, 3), *marks = draw_marks(t, T), *shift = op_draw(t, d, 1);
        double *start = op_zeros(t, 6 * d), *want = op_zeros(t, 3 * d), *size = op_zeros(t, 3 * d);
        for (size_t j = 0; j < 3; j++) {
            for (size_t c = 0; c < d; c++) {
                start[2 * j * d + c] = 1e7;
            }
        }
        ref_rows_sums(want, want + d, want + 2 * d, x, marks, shift, T, D);
        for (int r = 0; r < T; r++) {
            for (size_t c = 0; c < d; c++) {
                const double v = fabs(x[(size_t)r * d + c]), w = v + fabs(shift[c]);
                size[c] += w;
                size[d + c] += w * w;
                size[2 * d + c] += v;
            }
        }
        const struct keel_rows_sums_params p = { .x = op_in(t, "x", x, n), .marks = op_in(t, "marks", marks, (size_t)T),
                                                 .shift = op_in(t, "shift", shift, d),
                                                 .sums = op_out(t, "sums", start, NULL, NULL, 6 * d), .n_rows = (uint32_t)T,
                                                 .width = (uint32_t)D };
        op_run(t, record_sums, &p);
        const double *got = op_result(t, p.sums);
        for (size_t j = 0; j < 3; j++) {
            for (size_t c = 0; c < d; c++) {
                const double sum = got[2 * j * d + c] - 1e7 + got[(2 * j + 1) * d + c];
                if (!(fabs(sum - want[j * d + c]) <= op_sum_budget(size[j * d + c], T) + 1e7 * OP_EPS * OP_EPS)) {
                    op_fail(t, "sum %zu of channel %zu is %.9g, must be %.9g", j, c, sum, want[j * d + c]);
                    break;
                }
            }
        }
    }
    op_end(t);
}

static void record_cov(keel_recorder *rec, const void *p)
{
    keel_rows_cov(rec, p);
}

static void record_pool(keel_recorder *rec, const void *p)
{
    keel_rows_pool(rec, p);
}

static void test_cov(void **state)
{
    struct op_test *t = *state;
    static const int dims[] = { 1, 3, 4, 5, 63, 64, 65, 130, 640 };
    for (size_t i = 0; i < KEEL_COUNT(dims); i++) {
        const int D = dims[i], T = rows[i % KEEL_COUNT(rows)];
        const size_t n = (size_t)T * D, d = (size_t)D, m = d * d;
        op_begin(t, "rows_cov T=%d D=%d", T, D);
        const double *x = op_draw_heavy(t, n, 3), *marks = draw_marks(t, T), *shift = op_draw(t, d, 1), *init = op_draw(t, m, 10);
        double *want = op_copy(t, init, m), *size = op_abs(t, init, m), *wide = op_abs(t, x, n), *minus = op_abs(t, shift, d);
        ref_rows_cov(want, x, marks, shift, T, D);
        for (size_t c = 0; c < d; c++) {
            minus[c] = -minus[c];
        }
        ref_rows_cov(size, wide, marks, minus, T, D);
        const struct keel_rows_sums_params p = { .x = op_in(t, "x", x, n), .marks = op_in(t, "marks", marks, (size_t)T),
                                                 .shift = op_in(t, "shift", shift, d),
                                                 .sums = op_out(t, "cov", init, want, op_sum_budgets(t, size, m, T), m),
                                                 .n_rows = (uint32_t)T, .width = (uint32_t)D };
        op_run(t, record_cov, &p);
    }
    op_end(t);
}

static void test_pool(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        const int D = widths[i], T = rows[(i + 4) % KEEL_COUNT(rows)];
        const size_t n = (size_t)T * D;
        const uint32_t cut = (uint32_t)T / 3, seg[] = { 0, cut, cut, (uint32_t)T, 0, (uint32_t)T };
        op_begin(t, "rows_pool T=%d D=%d", T, D);
        const double *x = op_draw_heavy(t, n, 3), *marks = draw_marks(t, T);
        const size_t m = 3 * (size_t)D;
        double *want = op_zeros(t, m), *size = op_zeros(t, m);
        ref_rows_pool(want, x, marks, seg, 3, D);
        ref_rows_pool(size, op_abs(t, x, n), marks, seg, 3, D);
        const struct keel_rows_pool_params p = { .x = op_in(t, "x", x, n), .marks = op_in(t, "marks", marks, (size_t)T),
                                                 .segments = op_in_words(t, "segments", seg, 6),
                                                 .y = op_out(t, "y", NULL, want, op_sum_budgets(t, size, m, T), m),
                                                 .n_rows = (uint32_t)T, .n_segments = 3, .width = (uint32_t)D };
        op_run(t, record_pool, &p);
    }
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_add), cmocka_unit_test(test_project), cmocka_unit_test(test_slope), cmocka_unit_test(test_dot),
        cmocka_unit_test(test_sums), cmocka_unit_test(test_cov), cmocka_unit_test(test_pool),
    };
    return op_main("op_rows", tests);
}
