// SPDX-License-Identifier: MIT
// tests/op_lora.c: the six products of a LoRA pair. Tolerances: op_sum_budget() over the terms of each sum.
#include "op_test.h"

struct lora_case {
    int T, N, K, r;
    float scale;
};

// What each recorded call needs; `which` picks it.
struct lora_call {
    enum { DOWN, UP, BWD_H, BWD_X, BWD_A, BWD_B } which;
    struct keel_lora l;
    struct keel_span in, in2, out;
    uint32_t T;
};

static void record_lora(keel_recorder *rec, const void *params)
{
    const struct lora_call *c = params;
    switch (c->which) {
    case DOWN:
        keel_lora_down(rec, &c->l, c->in, c->out, c->T);
        break;
    case UP:
        keel_lora_up(rec, &c->l, c->in, c->out, c->T);
        break;
    case BWD_H:
        keel_lora_bwd_h(rec, &c->l, c->in, c->out, c->T);
        break;
    case BWD_X:
        keel_lora_bwd_x(rec, &c->l, c->in, c->out, c->T);
        break;
    case BWD_A:
        keel_lora_bwd_a(rec, &c->l, c->in, c->in2, c->out, c->T);
        break;
    case BWD_B:
        keel_lora_bwd_b(rec, &c->l, c->in, c->in2, c->out, c->T);
        break;
    }
}

static void reference(int which, double *out, const struct lora_case *s, const double *a, const double *b, const double *in,
                      const double *in2)
{
    const double scale = (double)s->scale;
    switch (which) {
    case DOWN:
        ref_lora_down(out, in, a, s->T, s->K, s->r);
        break;
    case UP:
        ref_lora_up(out, in, b, s->T, s->N, s->r, scale);
        break;
    case BWD_H:
        ref_lora_bwd_h(out, in, b, s->T, s->N, s->r, scale);
        break;
    case BWD_X:
        ref_lora_bwd_x(out, in, a, s->T, s->K, s->r);
        break;
    case BWD_A:
        ref_lora_bwd_a(out, in, in2, s->T, s->K, s->r);
        break;
    case BWD_B:
        ref_lora_bwd_b(out, in, in2, s->T, s->N, s->r, scale);
        break;
    }
}

static void one(struct op_test *t, const struct lora_case *s, int which)
{
    static const char *const names[] = { "down", "up", "bwd_h", "bwd_x", "bwd_a", "bwd_b" };
    const size_t T = (size_t)s->T, N = (size_t)s->N, K = (size_t)s->K, r = (size_t)s->r;
    const size_t n_in[] = { T * K, T * r, T * N, T * r, T * r, T * N };
    const size_t n_in2[] = { 0, 0, 0, 0, T * K, T * r };
    const size_t n_out[] = { T * r, T * N, T * r, T * K, r * K, N * r };
    const double terms[] = { (double)K, (double)r, (double)N, (double)r, (double)T, (double)T };
    const bool add = which != DOWN && which != BWD_H;
    op_begin(t, "lora_%s T=%d N=%d K=%d r=%d scale=%g", names[which], s->T, s->N, s->K, s->r, (double)s->scale);
    if (op_left_out(t)) {
        return;
    }
    const double *a = op_draw(t, r * K, 1), *b = op_draw(t, N * r, 1);
    const double *in = op_draw_heavy(t, n_in[which], 1), *in2 = op_draw(t, n_in2[which], 1);
    const double *init = add ? op_draw(t, n_out[which], 1) : NULL;
    double *want = add ? op_copy(t, init, n_out[which]) : op_zeros(t, n_out[which]);
    double *size = add ? op_abs(t, init, n_out[which]) : op_zeros(t, n_out[which]);
    reference(which, want, s, a, b, in, in2);
    reference(which, size, s, op_abs(t, a, r * K), op_abs(t, b, N * r), op_abs(t, in, n_in[which]),
              op_abs(t, in2, n_in2[which]));
    const struct lora_call c = {
        .which = which,
        .l = { .a = op_in(t, "a", a, r * K), .b = op_in(t, "b", b, N * r), .rank = (uint32_t)s->r, .k = (uint32_t)s->K,
               .n = (uint32_t)s->N, .scale = s->scale },
        .in = op_in(t, "in", in, n_in[which]),
        .in2 = n_in2[which] ? op_in(t, "in2", in2, n_in2[which]) : (struct keel_span){ 0 },
        .out = op_out(t, "out", init, want, op_sum_budgets(t, size, n_out[which], terms[which]), n_out[which]),
        .T = (uint32_t)s->T,
    };
    op_run(t, record_lora, &c);
}

static const int ranks[] = { 1, 2, 3, 4, 7, 8, 16, 33, 64 };
static const int tokens[] = { 1, 2, 3, 7, 8, 9, 17, 33, 64, 129 };
static const int sizes[] = { 64, 1, 65, 100, 3, 640, 128, 33, 321, 256, 97 };

static void test_shapes(void **state)
{
    struct op_test *t = *state;
    const size_t rounds = op_full() ? 100 : 20;
    for (size_t i = 0; i < rounds; i++) {
        const struct lora_case s = { tokens[i % KEEL_COUNT(tokens)], sizes[(2 * i + i / 10) % KEEL_COUNT(sizes)],
                                     sizes[(3 * i + 1) % KEEL_COUNT(sizes)], ranks[(i + i / 9) % KEEL_COUNT(ranks)],
                                     i % 3 ? 2 : 0.37f };
        for (int which = DOWN; which <= BWD_B; which++) {
            one(t, &s, which);
        }
    }
    op_end(t);
}

// Where the shaders read by fours: one, eight and 64 lanes a token, ranks that are a multiple of four and not of eight, narrow and
// wide sides of which neither, one or both are.
static void test_fours(void **state)
{
    struct op_test *t = *state;
    static const int some[] = { 5, 9, 70 }, rank[] = { 4, 12, 20 }, N[] = { 132, 36, 30 }, K[] = { 36, 131, 260 };
    for (size_t i = 0; i < 9; i++) {
        const struct lora_case s = { some[i / 3], N[i % 3], K[(i + i / 3) % 3], rank[(i + 2 * (i / 3)) % 3], 0.5f };
        for (int which = DOWN; which <= BWD_B; which++) {
            one(t, &s, which);
        }
    }
    op_end(t);
}

// The shapes of training on the 270M: 128-token rows, rank 16, ffn_down.
static void test_training_shape(void **state)
{
    struct op_test *t = *state;
    const struct lora_case s = { 128, 640, 2048, 16, 2 };
    for (int which = DOWN; which <= BWD_B; which++) {
        one(t, &s, which);
    }
    op_end(t);
}

// --- slopes --------------------------------------------------------------------------------------

struct lora_chain {
    struct keel_lora l;
    struct keel_span x, h, y, dy, dh, dx, da, db;
    uint32_t T;
};

static void record_forward(keel_recorder *rec, const void *params)
{
    const struct lora_chain *c = params;
    keel_lora_down(rec, &c->l, c->x, c->h, c->T);
    keel_lora_up(rec, &c->l, c->h, c->y, c->T);
}

static void record_both(keel_recorder *rec, const void *params)
{
    const struct lora_chain *c = params;
    record_forward(rec, params);
    keel_lora_bwd_h(rec, &c->l, c->dy, c->dh, c->T);
    keel_lora_bwd_x(rec, &c->l, c->dh, c->dx, c->T);
    keel_lora_bwd_a(rec, &c->l, c->dh, c->x, c->da, c->T);
    keel_lora_bwd_b(rec, &c->l, c->dy, c->h, c->db, c->T);
}

// y is linear in each of x, a and b alone, so the step is 1 and the tolerance covers rounding only (about 1e-4).
static void test_slope(void **state)
{
    struct op_test *t = *state;
    const size_t T = 5, N = 70, K = 45, r = 7;
    op_begin(t, "lora slope T=5 N=70 K=45 r=7");
    const double *x = op_draw(t, T * K, 1), *a = op_draw(t, r * K, 1), *b = op_draw(t, N * r, 1), *dy = op_draw(t, T * N, 1);
    const double *zero = op_zeros(t, T * N + r * K + N * r + T * K);
    struct lora_chain c = {
        .l = { .a = op_out(t, "a", a, NULL, NULL, r * K), .b = op_out(t, "b", b, NULL, NULL, N * r), .rank = (uint32_t)r,
               .k = (uint32_t)K, .n = (uint32_t)N, .scale = 0.75f },
        .x = op_in(t, "x", x, T * K), .h = op_out(t, "h", NULL, NULL, NULL, T * r),
        .y = op_out(t, "y", zero, NULL, NULL, T * N), .dy = op_in(t, "dy", dy, T * N),
        .dh = op_out(t, "dh", NULL, NULL, NULL, T * r), .dx = op_out(t, "dx", zero, NULL, NULL, T * K),
        .da = op_out(t, "da", zero, NULL, NULL, r * K), .db = op_out(t, "db", zero, NULL, NULL, N * r), .T = (uint32_t)T,
    };
    op_run(t, record_both, &c);
    const double *dx = op_result(t, c.dx), *da = op_result(t, c.da), *db = op_result(t, c.db);
    struct op_slope s = { .forward = record_forward, .params = &c, .y = c.y, .c = dy, .n_y = T * N, .h = 1, .tol = 1e-3 };
    s.name = "x", s.x = c.x, s.x0 = x, s.grad = dx, s.n_x = T * K;
    op_check_slope(t, &s);
    s.name = "a", s.x = c.l.a, s.x0 = a, s.grad = da, s.n_x = r * K;
    op_check_slope(t, &s);
    s.name = "b", s.x = c.l.b, s.x0 = b, s.grad = db, s.n_x = N * r;
    op_check_slope(t, &s);
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes), cmocka_unit_test(test_fours),
        cmocka_unit_test(test_training_shape),
        cmocka_unit_test(test_slope),
    };
    return op_main("op_lora", tests);
}
