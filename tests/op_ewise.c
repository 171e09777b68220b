// SPDX-License-Identifier: MIT
// tests/op_ewise.c: GeGLU forward and backward, axpy, gathering and scattering of rows.
// Tolerances: GELU's tanh argument has a relative error of a few eps, which tanh passes on at most unchanged to 1 + tanh, so
// 16 roundings of |gate · up| (Vulkan's exp: 3 + 2|x| ulp, |x| below 10 where tanh is not flat: 24 more). Copies are exact.
#include "op_test.h"

#define GELU_BUDGET (40 * OP_EPS)

struct geglu_call {
    struct keel_span gate, up, y;
    uint64_t n;
};

static void record_geglu(keel_recorder *rec, const void *params)
{
    const struct geglu_call *c = params;
    keel_geglu(rec, c->gate, c->up, c->y, c->n);
}

static void record_geglu_bwd(keel_recorder *rec, const void *p)
{
    keel_geglu_bwd(rec, p);
}

// Values of order 3 with some of ±60, where a naive exp overflows.
static double *draw_gate(struct op_test *t, size_t n)
{
    double *x = op_draw(t, n, 3);
    for (size_t i = 0; i < n; i++) {
        if (keel_rng_below(op_rng(t), 20) == 0) {
            x[i] = (float)(20 * x[i]);
        }
    }
    return x;
}

static void geglu_case(struct op_test *t, size_t n, int alias)
{
    static const char *const names[] = { "plain", "y is gate", "y is up" };
    op_begin(t, "geglu n=%zu %s", n, names[alias]);
    const double *gate = draw_gate(t, n), *up = op_draw(t, n, 1);
    double *want = op_zeros(t, n), *budget = op_zeros(t, n);
    ref_geglu(want, gate, up, n);
    for (size_t i = 0; i < n; i++) {
        budget[i] = GELU_BUDGET * fabs(gate[i] * up[i]) + 1e-35;
    }
    struct geglu_call c = { .n = n };
    c.y = op_out(t, "y", alias == 1 ? gate : alias == 2 ? up : NULL, want, budget, n);
    c.gate = alias == 1 ? c.y : op_in(t, "gate", gate, n);
    c.up = alias == 2 ? c.y : op_in(t, "up", up, n);
    op_run(t, record_geglu, &c);
}

static void geglu_bwd_case(struct op_test *t, size_t n, bool in_place)
{
    op_begin(t, "geglu_bwd n=%zu %s", n, in_place ? "in place" : "plain");
    const double *gate = draw_gate(t, n), *up = op_draw(t, n, 1), *dy = op_draw(t, n, 1);
    double *want_gate = op_zeros(t, n), *want_up = op_zeros(t, n);
    double *budget_gate = op_zeros(t, n), *budget_up = op_zeros(t, n);
    ref_geglu_bwd(want_gate, want_up, gate, up, dy, n);
    for (size_t i = 0; i < n; i++) {
        // slope's second term: x/2 · (1 - tanh²) · a (1 + 3 b x²), below 3 where tanh is not flat; 1 - tanh² cancels there
        const double x = fabs(gate[i]), flat = 1 + x * KEEL_MIN(1 + 0.14 * x * x, 10);
        budget_gate[i] = GELU_BUDGET * fabs(dy[i] * up[i]) * flat + 1e-35;
        budget_up[i] = GELU_BUDGET * fabs(dy[i] * gate[i]) + 1e-35;
    }
    struct keel_geglu_bwd_params p = { .dy = op_in(t, "dy", dy, n), .n = n };
    p.d_gate = op_out(t, "d_gate", in_place ? gate : NULL, want_gate, budget_gate, n);
    p.d_up = op_out(t, "d_up", in_place ? up : NULL, want_up, budget_up, n);
    p.gate = in_place ? p.d_gate : op_in(t, "gate", gate, n);
    p.up = in_place ? p.d_up : op_in(t, "up", up, n);
    op_run(t, record_geglu_bwd, &p);
}

static const size_t lengths[] = { 1, 2, 3, 7, 63, 64, 65, 255, 1000, 4097, 65537, 300001 };

static void test_geglu(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(lengths); i++) {
        geglu_case(t, lengths[i], 0);
        geglu_case(t, lengths[i], 1);
        geglu_case(t, lengths[i], 2);
        geglu_bwd_case(t, lengths[i], false);
        geglu_bwd_case(t, lengths[i], true);
    }
    op_end(t);
}

// Step 0.01 of values of order 1: truncation and rounding each about 1e-4 of the slope.
static void test_geglu_slope(void **state)
{
    struct op_test *t = *state;
    const size_t n = 300;
    op_begin(t, "geglu slope n=300");
    const double *gate = op_draw(t, n, 1), *up = op_draw(t, n, 1), *c = op_draw(t, n, 1);
    const struct geglu_call f = { op_in(t, "gate", gate, n), op_in(t, "up", up, n), op_out(t, "y", NULL, NULL, NULL, n), n };
    const struct keel_geglu_bwd_params b = { .gate = f.gate, .up = f.up, .dy = op_in(t, "c", c, n),
                                             .d_gate = op_out(t, "d_gate", NULL, NULL, NULL, n),
                                             .d_up = op_out(t, "d_up", NULL, NULL, NULL, n), .n = n };
    op_run(t, record_geglu_bwd, &b);
    struct op_slope s = { .name = "gate", .forward = record_geglu, .params = &f, .x = f.gate, .y = f.y, .x0 = gate,
                          .grad = op_result(t, b.d_gate), .c = c, .n_x = n, .n_y = n, .h = 0.01, .tol = 5e-3 };
    const double *d_up = op_result(t, b.d_up);
    op_check_slope(t, &s);
    s.name = "up", s.x = f.up, s.x0 = up, s.grad = d_up;
    op_check_slope(t, &s);
    op_end(t);
}

// --- axpy ----------------------------------------------------------------------------------------

struct axpy_call {
    float a;
    struct keel_span x, y;
    uint64_t n;
};

static void record_axpy(keel_recorder *rec, const void *params)
{
    const struct axpy_call *c = params;
    keel_axpy(rec, c->a, c->x, c->y, c->n);
}

static void axpy_case(struct op_test *t, size_t n, float a)
{
    op_begin(t, "axpy n=%zu a=%g", n, (double)a);
    const double *x = op_draw(t, n, 1), *y = op_draw(t, n, 1);
    double *want = op_zeros(t, n), *budget = op_zeros(t, n);
    for (size_t i = 0; i < n; i++) {
        want[i] = y[i] + (double)a * x[i];
        budget[i] = 2 * OP_EPS * (fabs(y[i]) + fabs((double)a * x[i])); // a product and a sum, each rounded once
    }
    const struct axpy_call c = { a, op_in(t, "x", x, n), op_out(t, "y", y, want, budget, n), n };
    op_run(t, record_axpy, &c);
}

static void test_axpy(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(lengths); i++) {
        axpy_case(t, lengths[i], i % 2 ? -0.37f : 1);
    }
    axpy_case(t, 65536 * 64 + 5, 2); // more groups of 64 than every device allows in x
    op_end(t);
}

// --- rows ----------------------------------------------------------------------------------------

struct rows_call {
    bool scatter;
    struct keel_span x, index, y;
    uint32_t n_rows, width;
};

static void record_rows(keel_recorder *rec, const void *params)
{
    const struct rows_call *c = params;
    if (c->scatter) {
        keel_scatter_rows(rec, c->x, c->index, c->y, c->n_rows, c->width);
    } else {
        keel_gather_rows(rec, c->x, c->index, c->y, c->n_rows, c->width);
    }
}

// `few` rows and `many` rows; gather picks few of many (repeats allowed), scatter spreads few into many.
static void rows_case(struct op_test *t, uint32_t few, uint32_t many, uint32_t width, bool scatter)
{
    op_begin(t, "%s rows=%u of %u width=%u", scatter ? "scatter" : "gather", few, many, width);
    const size_t n_few = (size_t)few * width, n_many = (size_t)many * width;
    uint32_t *index = op_bytes(t, few * 4);
    for (uint32_t i = 0; i < few; i++) { // distinct for scatter: a step coprime to `many`
        index[i] = scatter ? (i * (many - 1) + many / 2) % many : keel_rng_below(op_rng(t), many);
    }
    const size_t n_x = scatter ? n_few : n_many, n_y = scatter ? n_many : n_few;
    const double *x = op_draw(t, n_x, 1);
    double *want = scatter ? op_draw(t, n_y, 1) : op_zeros(t, n_y);
    const double *init = scatter ? op_copy(t, want, n_y) : NULL;
    for (uint32_t i = 0; i < few; i++) {
        for (uint32_t j = 0; j < width; j++) {
            if (scatter) {
                want[(size_t)index[i] * width + j] = x[(size_t)i * width + j];
            } else {
                want[(size_t)i * width + j] = x[(size_t)index[i] * width + j];
            }
        }
    }
    const struct rows_call c = { scatter, op_in(t, "x", x, n_x), op_in_words(t, "index", index, few),
                                 op_out(t, "y", init, want, op_zeros(t, n_y), n_y), few, width };
    op_run(t, record_rows, &c);
}

static void test_rows(void **state)
{
    struct op_test *t = *state;
    const uint32_t few[] = { 1, 2, 3, 7, 17, 64, 129 }, widths[] = { 640, 1, 3, 64, 65, 1000, 33 };
    for (size_t i = 0; i < KEEL_COUNT(few); i++) {
        for (size_t j = 0; j < 3; j++) {
            rows_case(t, few[i], few[i] + 40 * (uint32_t)j, widths[(i + j) % 7], true);
            rows_case(t, few[i], 1 + 50 * (uint32_t)j, widths[(i + j) % 7], false);
        }
    }
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_geglu), cmocka_unit_test(test_geglu_slope), cmocka_unit_test(test_axpy),
        cmocka_unit_test(test_rows),
    };
    return op_main("op_ewise", tests);
}
