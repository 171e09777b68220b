// SPDX-License-Identifier: MIT
// tests/op_heads.c: QK-norm with rotary embedding into cache slots, and its backward.
// Tolerances: as for RMSNorm over d values, on the absolute values of the two terms that a rotation adds.
#include "op_test.h"

#define EPS 1e-6f

struct heads_case {
    int T, H, d, y_rows, slot0; // y_rows 0: no spans, row t; else slot (slot0 + t) % y_rows
    bool copy;
};

static void record_fwd(keel_recorder *rec, const void *p)
{
    keel_heads(rec, p);
}

static void record_bwd(keel_recorder *rec, const void *p)
{
    keel_heads_bwd(rec, p);
}

static double *draw_rope(struct op_test *t, int T, int d)
{
    double *rope = op_zeros(t, (size_t)T * d);
    for (int i = 0; i < T * d / 2; i++) {
        const double angle = 1000 * keel_rng_uniform(op_rng(t));
        rope[2 * i] = (float)cos(angle);
        rope[2 * i + 1] = (float)sin(angle);
    }
    return rope;
}

// Signless sizes: |z0 c| + |z1 s| and so on, by the reference itself on absolute values with a rotation that only adds.
static void fwd_size(double *size, const double *x, const double *w, const double *rope, const int *slot, int T, int H, int d)
{
    for (int t = 0; t < T; t++) {
        for (int h = 0; h < H; h++) {
            const double *xh = x + ((size_t)t * H + h) * d;
            double *yh = size + ((size_t)slot[t] * H + h) * d, ss = 0;
            for (int i = 0; i < d; i++) {
                ss += xh[i] * xh[i];
            }
            const double s = 1 / sqrt(ss / d + (double)EPS);
            for (int i = 0; i < d / 2; i++) {
                const double *cs = rope + ((size_t)t * (d / 2) + i) * 2;
                const double z0 = fabs(xh[i] * s * w[i]), z1 = fabs(xh[i + d / 2] * s * w[i + d / 2]);
                yh[i] = z0 * fabs(cs[0]) + z1 * fabs(cs[1]);
                yh[i + d / 2] = z1 * fabs(cs[0]) + z0 * fabs(cs[1]);
            }
        }
    }
}

// What all parts of a case share.
struct shared {
    const double *rope;
    struct keel_span rope_span, spans;
};

static struct shared share(struct op_test *t, const struct heads_case *c)
{
    struct shared s = { .rope = draw_rope(t, c->T, c->d) };
    struct keel_token_span *spans = op_bytes(t, (size_t)c->T * sizeof *spans);
    for (int i = 0; i < c->T; i++) {
        spans[i] = (struct keel_token_span){ .lo = 0, .hi = (uint32_t)(c->slot0 + i + 1), .slot = (uint32_t)(c->slot0 + i) };
    }
    s.spans = op_in_words(t, "spans", spans, (size_t)c->T * 8);
    s.rope_span = op_in(t, "rope", s.rope, (size_t)c->T * c->d);
    return s;
}

static struct keel_heads_part add_part(struct op_test *t, const struct heads_case *c, const struct shared *s)
{
    const int T = c->T, H = c->H, d = c->d, R = c->y_rows ? c->y_rows : T;
    const size_t n = (size_t)T * H * d, n_y = (size_t)R * H * d;
    const double *x = op_draw_heavy(t, n, 1), *w = op_draw(t, (size_t)d, 1);
    const double *init = op_draw(t, n_y, 1); // rows that no token owns keep it
    int *slot = op_bytes(t, (size_t)T * sizeof *slot);
    for (int i = 0; i < T; i++) {
        slot[i] = c->y_rows ? (c->slot0 + i) % R : i;
    }
    double *want = op_copy(t, init, n_y), *size = op_zeros(t, n_y);
    ref_heads(want, x, c->copy ? NULL : w, s->rope, slot, T, H, d, (double)EPS);
    double *budget = size;
    if (!c->copy) {
        fwd_size(size, x, w, s->rope, slot, T, H, d);
        budget = op_sum_budgets(t, size, n_y, d);
    }
    struct keel_heads_part part = { .x = op_in(t, "x", x, n), .y = op_out(t, "y", init, want, budget, n_y),
                                    .n_heads = (uint32_t)H, .y_rows = (uint32_t)c->y_rows };
    if (!c->copy) {
        part.w = op_in(t, "w", w, (size_t)d);
    }
    return part;
}

static void fwd_case(struct op_test *t, const struct heads_case *c)
{
    op_begin(t, "heads T=%d H=%d d=%d rows=%d slot0=%d %s", c->T, c->H, c->d, c->y_rows, c->slot0, c->copy ? "copy" : "norm+rope");
    const struct shared s = share(t, c);
    const struct keel_heads_params p = { .part = { add_part(t, c, &s) }, .n_parts = 1, .rope = s.rope_span,
                                         .spans = c->y_rows ? s.spans : (struct keel_span){ 0 }, .n_tokens = (uint32_t)c->T,
                                         .head_dim = (uint32_t)c->d, .eps = EPS };
    op_run(t, record_fwd, &p);
}

// Queries in place, keys and values into the ring, as a block of the model does.
static void block_case(struct op_test *t, int T, int H, int G, int d)
{
    const struct heads_case q = { T, H, d, 0, 3 * T, false }, k = { T, G, d, T + 5, 3 * T, false }, v = { T, G, d, T + 5, 3 * T, true };
    op_begin(t, "heads T=%d H=%d G=%d d=%d", T, H, G, d);
    const struct shared s = share(t, &q);
    const struct keel_heads_params p = { .part = { add_part(t, &q, &s), add_part(t, &k, &s), add_part(t, &v, &s) }, .n_parts = 3,
                                         .rope = s.rope_span, .spans = s.spans, .n_tokens = (uint32_t)T, .head_dim = (uint32_t)d,
                                         .eps = EPS };
    op_run(t, record_fwd, &p);
}

static void bwd_case(struct op_test *t, int T, int H, int d)
{
    const size_t n = (size_t)T * H * d;
    op_begin(t, "heads_bwd T=%d H=%d d=%d", T, H, d);
    const double *x = op_draw_heavy(t, n, 1), *w = op_draw(t, (size_t)d, 1), *rope = draw_rope(t, T, d);
    const double *dy = op_draw(t, n, 1);
    double *want = op_zeros(t, n), *size = op_zeros(t, n);
    ref_heads_bwd(want, x, w, rope, dy, T, H, d, (double)EPS);
    for (size_t row = 0; row < (size_t)T * H; row++) { // |s w dz| + |s³ x / d| Σ |dz w x|, |dz| = |dy0 c| + |dy1 s|
        const double *xr = x + row * d, *dyr = dy + row * d, *cs = rope + row / H * d;
        double ss = 0, dot = 0;
        for (int i = 0; i < d; i++) {
            ss += xr[i] * xr[i];
            const int j = i % (d / 2), other = i < d / 2 ? i + d / 2 : i - d / 2;
            size[row * d + i] = fabs(dyr[i] * cs[2 * j]) + fabs(dyr[other] * cs[2 * j + 1]);
            dot += size[row * d + i] * fabs(w[i] * xr[i]);
        }
        const double s = 1 / sqrt(ss / d + (double)EPS);
        for (int i = 0; i < d; i++) {
            size[row * d + i] = s * fabs(w[i]) * size[row * d + i] + s * s * s * fabs(xr[i]) / d * dot;
        }
    }
    const struct keel_heads_bwd_params p = {
        .x = op_in(t, "x", x, n), .w = op_in(t, "w", w, (size_t)d), .rope = op_in(t, "rope", rope, (size_t)T * d),
        .dy = op_in(t, "dy", dy, n), .dx = op_out(t, "dx", NULL, want, op_sum_budgets(t, size, n, d), n),
        .n_tokens = (uint32_t)T, .n_heads = (uint32_t)H, .head_dim = (uint32_t)d, .eps = EPS,
    };
    op_run(t, record_bwd, &p);
}

static const int tokens[] = { 1, 2, 3, 7, 8, 9, 17, 33, 64, 129 };
static const int heads[] = { 4, 1, 2, 3, 8, 1 };
static const int dims[] = { 256, 16, 24, 32, 64, 72, 80, 96, 128, 250 };

static void test_fwd(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(dims); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(tokens) : 2); j++) {
            struct heads_case c = { tokens[(i + 5 * j) % 10], heads[(i + j) % KEEL_COUNT(heads)], dims[i], 0, 0, false };
            fwd_case(t, &c);
            c.y_rows = c.T + 5; // a ring whose end lies within the batch
            c.slot0 = 3 * c.y_rows - 1;
            fwd_case(t, &c);
            c.copy = true;
            fwd_case(t, &c);
            c.y_rows = 0;
            c.slot0 = 0;
            fwd_case(t, &c);
            block_case(t, c.T, 2 * c.H, c.H, c.d);
        }
    }
    op_end(t);
}

static void test_bwd(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(dims); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(tokens) : 2); j++) {
            bwd_case(t, tokens[(i + 5 * j + 2) % 10], heads[(i + j) % KEEL_COUNT(heads)], dims[i]);
        }
    }
    op_end(t);
}

// Step and tolerance as for RMSNorm; rotation is linear.
static void test_slope(void **state)
{
    struct op_test *t = *state;
    const int T = 3, H = 2, d = 24;
    const size_t n = (size_t)T * H * d;
    op_begin(t, "heads slope T=3 H=2 d=24");
    const double *x = op_draw(t, n, 1), *w = op_draw(t, (size_t)d, 1), *rope = draw_rope(t, T, d), *c = op_draw(t, n, 1);
    const struct keel_heads_params f = {
        .part = { { .x = op_in(t, "x", x, n), .w = op_in(t, "w", w, (size_t)d), .y = op_out(t, "y", NULL, NULL, NULL, n),
                    .n_heads = (uint32_t)H } },
        .n_parts = 1, .rope = op_in(t, "rope", rope, (size_t)T * d), .n_tokens = (uint32_t)T, .head_dim = (uint32_t)d, .eps = EPS,
    };
    const struct keel_heads_bwd_params b = {
        .x = f.part[0].x, .w = f.part[0].w, .rope = f.rope, .dy = op_in(t, "c", c, n), .dx = op_out(t, "dx", NULL, NULL, NULL, n),
        .n_tokens = (uint32_t)T, .n_heads = (uint32_t)H, .head_dim = (uint32_t)d, .eps = EPS,
    };
    op_run(t, record_bwd, &b);
    op_check_slope(t, &(struct op_slope){ .name = "x", .forward = record_fwd, .params = &f, .x = f.part[0].x, .y = f.part[0].y, .x0 = x,
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
    return op_main("op_heads", tests);
}
