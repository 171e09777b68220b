// SPDX-License-Identifier: MIT
// tests/op_vision.c: the ops of the vision tower: LayerNorm, GELU, biases, average pooling.
// Tolerances: LayerNorm: the mean is a D-term sum, so x - mean carries errors of that sum whatever cancels, and so do all that
// follows; budgets are those of D-term sums on absolute values without cancellation. GELU: as in op_ewise.c.
#include "op_test.h"

#define EPS 1e-6f
#define GELU_BUDGET (40 * OP_EPS)

// --- LayerNorm -----------------------------------------------------------------------------------

static void record_norm(keel_recorder *rec, const void *p)
{
    keel_layernorm(rec, p);
}

static void record_norm_bwd(keel_recorder *rec, const void *p)
{
    keel_layernorm_bwd(rec, p);
}

// Rows of different size: heavy tails, one tiny row where eps counts, one of zeros, one far from zero, one massive channel.
static double *draw_rows(struct op_test *t, int T, int D)
{
    double *x = op_draw_heavy(t, (size_t)T * D, 1);
    for (int i = 0; i < T; i++) {
        for (int j = 0; j < D; j++) {
            double *v = &x[(size_t)i * D + j];
            *v = i % 6 == 1   ? (float)(*v * 1e-4)
                 : i % 6 == 3 ? 0
                 : i % 6 == 4 && j == D / 2 ? 3000
                 : i % 6 == 5 ? (float)(*v + 50)
                              : *v;
        }
    }
    return x;
}

// Sizes of the terms of the forward pass and, unless dy is NULL, of the backward pass.
static void norm_sizes(double *size, const double *x, const double *w, const double *b, const double *dy, int T, int D)
{
    for (int i = 0; i < T; i++) {
        const size_t at = (size_t)i * D;
        double mean = 0, mean_abs = 0, var = 0, g = 0, gz = 0;
        for (int j = 0; j < D; j++) {
            mean += x[at + j] / D;
            mean_abs += fabs(x[at + j]) / D;
        }
        for (int j = 0; j < D; j++) {
            var += (x[at + j] - mean) * (x[at + j] - mean) / D;
        }
        const double r = 1 / sqrt(var + (double)EPS);
        for (int j = 0; j < D && dy; j++) {
            g += fabs(w[j] * dy[at + j]) / D;
            gz += fabs(w[j] * dy[at + j]) * (fabs(x[at + j]) + mean_abs) * r / D;
        }
        for (int j = 0; j < D; j++) {
            const double z = (fabs(x[at + j]) + mean_abs) * r;
            // the error of r is that of the variance, whose terms are squares of values with errors of the mean
            const double wide = 1 + mean_abs * r;
            size[at + j] += dy ? wide * r * (fabs(w[j] * dy[at + j]) + g + z * gz) : wide * z * fabs(w[j]) + fabs(b[j]);
        }
    }
}

static void norm_case(struct op_test *t, int T, int D, bool in_place)
{
    const size_t n = (size_t)T * D, d = (size_t)D;
    op_begin(t, "layernorm T=%d D=%d%s", T, D, in_place ? " in place" : "");
    const double *x = draw_rows(t, T, D), *w = op_draw(t, d, 1), *b = op_draw(t, d, 1);
    double *want = op_zeros(t, n), *size = op_zeros(t, n);
    ref_layernorm(want, x, w, b, T, D, (double)EPS);
    norm_sizes(size, x, w, b, NULL, T, D);
    struct keel_layernorm_params p = { .w = op_in(t, "w", w, d), .b = op_in(t, "b", b, d), .n_rows = (uint32_t)T,
                                       .width = (uint32_t)D, .eps = EPS };
    p.y = op_out(t, "y", in_place ? x : NULL, want, op_sum_budgets(t, size, n, D), n);
    p.x = in_place ? p.y : op_in(t, "x", x, n);
    op_run(t, record_norm, &p);
}

static void norm_bwd_case(struct op_test *t, int T, int D, bool add, bool in_place)
{
    const size_t n = (size_t)T * D, d = (size_t)D;
    op_begin(t, "layernorm_bwd T=%d D=%d %s", T, D, add ? "add" : in_place ? "dx is dy" : "plain");
    const double *x = draw_rows(t, T, D), *w = op_draw(t, d, 1), *dy = op_draw(t, n, 1);
    const double *init = add ? op_draw(t, n, 10) : NULL;
    double *want = add ? op_copy(t, init, n) : op_zeros(t, n), *size = add ? op_abs(t, init, n) : op_zeros(t, n);
    ref_layernorm_bwd(want, x, w, dy, T, D, (double)EPS, add);
    norm_sizes(size, x, w, NULL, dy, T, D);
    struct keel_layernorm_bwd_params p = { .x = op_in(t, "x", x, n), .w = op_in(t, "w", w, d), .n_rows = (uint32_t)T,
                                           .width = (uint32_t)D, .eps = EPS, .add = add };
    p.dx = op_out(t, "dx", in_place ? dy : init, want, op_sum_budgets(t, size, n, D), n);
    p.dy = in_place ? p.dx : op_in(t, "dy", dy, n);
    op_run(t, record_norm_bwd, &p);
}

static void test_layernorm(void **state)
{
    static const int rows[] = { 1, 6, 7, 9, 17, 33, 65 }, widths[] = { 72, 1, 2, 3, 7, 33, 63, 64, 65, 127, 256, 1152 };
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(rows) : 1); j++) {
            const int T = rows[(i + j) % KEEL_COUNT(rows)], D = widths[i];
            norm_case(t, T, D, false);
            norm_case(t, T, D, true);
            norm_bwd_case(t, T, D, false, false);
            norm_bwd_case(t, T, D, true, false);
            norm_bwd_case(t, T, D, false, true);
        }
    }
    op_end(t);
}

// Step 0.01 of values of order 1: truncation is about h² = 1e-4 of the slope, rounding of the loss about 1e-4; 5e-3.
static void test_layernorm_slope(void **state)
{
    struct op_test *t = *state;
    const size_t n = 5 * 70;
    op_begin(t, "layernorm slope T=5 D=70");
    const double *x = op_draw(t, n, 1), *w = op_draw(t, 70, 1), *b = op_draw(t, 70, 1), *c = op_draw(t, n, 1);
    const struct keel_layernorm_params f = { .x = op_in(t, "x", x, n), .w = op_in(t, "w", w, 70), .b = op_in(t, "b", b, 70),
                                             .y = op_out(t, "y", NULL, NULL, NULL, n), .n_rows = 5, .width = 70, .eps = EPS };
    const struct keel_layernorm_bwd_params d = { .x = f.x, .w = f.w, .dy = op_in(t, "c", c, n), .n_rows = 5, .width = 70,
                                                 .dx = op_out(t, "dx", NULL, NULL, NULL, n), .eps = EPS };
    op_run(t, record_norm_bwd, &d);
    op_check_slope(t, &(struct op_slope){ .name = "x", .forward = record_norm, .params = &f, .x = f.x, .y = f.y, .x0 = x,
                                          .grad = op_result(t, d.dx), .c = c, .n_x = n, .n_y = n, .h = 0.01, .tol = 5e-3 });
    op_end(t);
}

// --- GELU ----------------------------------------------------------------------------------------

struct gelu_call {
    struct keel_span x, dy, y;
    uint64_t n;
};

static void record_gelu(keel_recorder *rec, const void *params)
{
    const struct gelu_call *c = params;
    keel_gelu(rec, c->x, c->y, c->n);
}

static void record_gelu_bwd(keel_recorder *rec, const void *params)
{
    const struct gelu_call *c = params;
    keel_gelu_bwd(rec, c->x, c->dy, c->y, c->n);
}

static void gelu_case(struct op_test *t, size_t n, bool in_place)
{
    op_begin(t, "gelu n=%zu%s", n, in_place ? " in place" : "");
    const double *x = op_draw_heavy(t, n, 2); // some of ±200, where a naive exp overflows
    double *want = op_zeros(t, n), *budget = op_zeros(t, n);
    ref_gelu(want, x, n);
    for (size_t i = 0; i < n; i++) {
        budget[i] = GELU_BUDGET * fabs(x[i]) + 1e-35;
    }
    struct gelu_call c = { .n = n, .y = op_out(t, "y", in_place ? x : NULL, want, budget, n) };
    c.x = in_place ? c.y : op_in(t, "x", x, n);
    op_run(t, record_gelu, &c);
}

enum gelu_alias { APART, DX_IS_X, DX_IS_DY, N_GELU_ALIAS };

static void gelu_bwd_case(struct op_test *t, size_t n, enum gelu_alias alias)
{
    static const char *const names[] = { "plain", "dx is x", "dx is dy" };
    op_begin(t, "gelu_bwd n=%zu %s", n, names[alias]);
    const double *x = op_draw_heavy(t, n, 2), *dy = op_draw(t, n, 1);
    double *want = op_zeros(t, n), *budget = op_zeros(t, n);
    ref_gelu_bwd(want, x, dy, n);
    for (size_t i = 0; i < n; i++) {
        const double a = fabs(x[i]); // the slope's second term, as in op_ewise.c
        budget[i] = GELU_BUDGET * fabs(dy[i]) * (1 + a * KEEL_MIN(1 + 0.14 * a * a, 10)) + 1e-35;
    }
    struct gelu_call c = { .n = n };
    c.y = op_out(t, "dx", alias == DX_IS_X ? x : alias == DX_IS_DY ? dy : NULL, want, budget, n);
    c.x = alias == DX_IS_X ? c.y : op_in(t, "x", x, n);
    c.dy = alias == DX_IS_DY ? c.y : op_in(t, "dy", dy, n);
    op_run(t, record_gelu_bwd, &c);
}

static void test_gelu(void **state)
{
    static const size_t lengths[] = { 1, 3, 63, 64, 65, 1000, 65537 };
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(lengths); i++) {
        gelu_case(t, lengths[i], false);
        gelu_case(t, lengths[i], true);
        for (int alias = 0; alias < N_GELU_ALIAS; alias++) {
            gelu_bwd_case(t, lengths[i], (enum gelu_alias)alias);
        }
    }
    op_end(t);
}

static void test_gelu_slope(void **state)
{
    struct op_test *t = *state;
    const size_t n = 300;
    op_begin(t, "gelu slope n=300");
    const double *x = op_draw(t, n, 1), *c = op_draw(t, n, 1);
    const struct gelu_call f = { .x = op_in(t, "x", x, n), .y = op_out(t, "y", NULL, NULL, NULL, n), .n = n };
    const struct gelu_call b = { .x = f.x, .dy = op_in(t, "c", c, n), .y = op_out(t, "dx", NULL, NULL, NULL, n), .n = n };
    op_run(t, record_gelu_bwd, &b);
    op_check_slope(t, &(struct op_slope){ .name = "x", .forward = record_gelu, .params = &f, .x = f.x, .y = f.y, .x0 = x,
                                          .grad = op_result(t, b.y), .c = c, .n_x = n, .n_y = n, .h = 0.01, .tol = 5e-3 });
    op_end(t);
}

// --- bias ----------------------------------------------------------------------------------------

static void record_bias(keel_recorder *rec, const void *p)
{
    keel_bias(rec, p);
}

enum bias_alias { PLAIN, RESIDUAL, Y_IS_X, Y_IS_RESIDUAL, N_BIAS_ALIAS };

static void bias_case(struct op_test *t, int T, int N, enum bias_alias alias)
{
    static const char *const names[] = { "plain", "residual", "y is x", "y is residual" };
    const size_t n = (size_t)T * N;
    op_begin(t, "bias T=%d N=%d %s", T, N, names[alias]);
    const double *x = op_draw_heavy(t, n, 1), *b = op_draw(t, (size_t)N, 1);
    const double *res = alias == RESIDUAL || alias == Y_IS_RESIDUAL ? op_draw(t, n, 10) : NULL;
    double *want = op_zeros(t, n), *size = op_zeros(t, n);
    ref_bias(want, x, b, res, T, N);
    ref_bias(size, op_abs(t, x, n), op_abs(t, b, (size_t)N), res ? op_abs(t, res, n) : NULL, T, N);
    for (size_t i = 0; i < n; i++) {
        size[i] *= 2 * OP_EPS; // two additions
    }
    struct keel_bias_params p = { .b = op_in(t, "b", b, (size_t)N), .n_rows = (uint32_t)T, .width = (uint32_t)N };
    p.y = op_out(t, "y", alias == Y_IS_X ? x : alias == Y_IS_RESIDUAL ? res : NULL, want, size, n);
    p.x = alias == Y_IS_X ? p.y : op_in(t, "x", x, n);
    if (res) {
        p.residual = alias == Y_IS_RESIDUAL ? p.y : op_in(t, "residual", res, n);
    }
    op_run(t, record_bias, &p);
}

static void test_bias(void **state)
{
    static const int widths[] = { 1, 3, 63, 64, 65, 72, 1152 };
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(widths); i++) {
        for (int alias = 0; alias < N_BIAS_ALIAS; alias++) {
            bias_case(t, i % 2 ? 17 : 1, widths[i], (enum bias_alias)alias);
        }
    }
    op_end(t);
}

// --- pooling -------------------------------------------------------------------------------------

static void record_pool(keel_recorder *rec, const void *p)
{
    keel_pool(rec, p);
}

static void record_pool_bwd(keel_recorder *rec, const void *p)
{
    keel_pool_bwd(rec, p);
}

static void pool_case(struct op_test *t, int grid, int kernel, int D)
{
    const int side = grid / kernel;
    const size_t n = (size_t)grid * grid * D, m = (size_t)side * side * D;
    struct keel_pool_params p = { .grid = (uint32_t)grid, .kernel = (uint32_t)kernel, .width = (uint32_t)D };
    op_begin(t, "pool grid=%d kernel=%d D=%d", grid, kernel, D);
    const double *x = op_draw_heavy(t, n, 1);
    double *want = op_zeros(t, m), *size = op_zeros(t, m);
    ref_pool(want, x, grid, kernel, D);
    ref_pool(size, op_abs(t, x, n), grid, kernel, D);
    p.x = op_in(t, "x", x, n);
    p.y = op_out(t, "y", NULL, want, op_sum_budgets(t, size, m, kernel * kernel), m);
    op_run(t, record_pool, &p);

    op_begin(t, "pool_bwd grid=%d kernel=%d D=%d", grid, kernel, D);
    const double *dy = op_draw(t, m, 1);
    double *want_dx = op_zeros(t, n), *budget = op_zeros(t, n);
    ref_pool_bwd(want_dx, dy, grid, kernel, D);
    for (size_t i = 0; i < n; i++) {
        budget[i] = 4 * OP_EPS * fabs(want_dx[i]); // one division
    }
    p.x = op_in(t, "dy", dy, m);
    p.y = op_out(t, "dx", NULL, want_dx, budget, n);
    op_run(t, record_pool_bwd, &p);
}

static void test_pool(void **state)
{
    static const int cases[][3] = { { 1, 1, 1 }, { 4, 4, 64 }, { 4, 2, 72 }, { 5, 2, 65 }, { 7, 3, 3 }, { 6, 1, 7 }, { 16, 4, 130 } };
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        pool_case(t, cases[i][0], cases[i][1], cases[i][2]);
    }
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layernorm),
        cmocka_unit_test(test_layernorm_slope),
        cmocka_unit_test(test_gelu),
        cmocka_unit_test(test_gelu_slope),
        cmocka_unit_test(test_bias),
        cmocka_unit_test(test_pool),
    };
    return op_main("op_vision", tests);
}
