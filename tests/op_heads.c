// SPDX-License-Identifier: MIT
// tests/op_heads.c: QK-norm with rotary embedding into cache slots, and its backward.
// Tolerances: as for RMSNorm over d values, on the absolute values of the two terms that a rotation adds. Into packed caches: see
// packed_budget().
#include "op_test.h"

#define EPS 1e-6f

struct heads_case {
    int T, H, d, y_rows, slot0; // y_rows 0: no spans, row t; else slot (slot0 + t) % y_rows
    bool copy;
    enum keel_dtype type; // of y
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

static const char *const type_names[] = { [KEEL_F32] = "f32", [KEEL_F16] = "f16", [KEEL_Q8_0] = "q8_0" };

// What rounding adds to the budget of a head as it comes. F16: a last place, for Vulkan does not say which way to round, and 2^-14,
// for smaller ones may become 0. Q8_0: half a step, to which both the element and the largest of its block, which sets the step, bring
// their budgets, and a scale and a product that are rounded in f32: 127 codes carry the error of the scale.
static double packed_budget(enum keel_dtype type, const double *want, const double *budget, int d, int i)
{
    double most = 0, worst = 0;
    for (int j = i / 32 * 32; j < KEEL_MIN(i / 32 * 32 + 32, d); j++) {
        most = fmax(most, fabs(want[j]));
        worst = fmax(worst, budget[j]);
    }
    return type == KEEL_F16 ? budget[i] + 0x1p-10 * fabs(want[i]) + 0x1p-14 : most / 254 + 3 * worst + 8 * OP_EPS * most;
}

// A packed destination: words that the test reads itself, after the run.
struct packed {
    const struct heads_case *c;
    const double *want, *budget; // [R, H, d] unpacked
    const uint32_t *init;
    const int *slot;
    struct keel_span span;
};

static void check_packed(struct op_test *t, const struct packed *p)
{
    const struct heads_case *c = p->c;
    const int d = c->d;
    const size_t R = c->y_rows ? c->y_rows : c->T, heads = R * c->H, stride = ref_kv_words(c->type, d);
    const uint32_t *got = op_result_words(t, p->span);
    double *x = op_zeros(t, heads * d);
    ref_kv_unpack(x, got, c->type, heads, d);
    for (size_t h = 0; h < heads; h++) {
        bool owned = false;
        for (int i = 0; i < c->T; i++) {
            owned = owned || (size_t)p->slot[i] == h / c->H;
        }
        if (!owned && memcmp(got + h * stride, p->init + h * stride, stride * 4) != 0) {
            op_fail(t, "packed head %zu belongs to no token and was changed", h);
            return;
        }
        for (int i = 0; owned && i < d; i++) {
            const double want = p->want[h * d + i], most = packed_budget(c->type, p->want + h * d, p->budget + h * d, d, i);
            if (!(fabs(x[h * d + i] - want) <= most)) {
                op_fail(t, "packed head %zu, element %d: got %.9g, want %.9g, error %.0f %% of budget", h, i, x[h * d + i], want,
                        100 * fabs(x[h * d + i] - want) / most);
                return;
            }
        }
    }
}

// `packed` is filled in where the case has such a type; the caller checks it after the run.
static struct keel_heads_part add_part(struct op_test *t, const struct heads_case *c, const struct shared *s, struct packed *packed)
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
    struct keel_heads_part part = { .x = op_in(t, "x", x, n), .n_heads = (uint32_t)H, .y_rows = (uint32_t)c->y_rows, .type = c->type };
    if (c->type == KEEL_F32) {
        part.y = op_out(t, "y", init, want, budget, n_y);
    } else {
        const size_t words = ref_kv_words(c->type, d) * R * H;
        uint32_t *bits = op_bytes(t, 4 * words);
        ref_kv_pack(bits, op_copy(t, init, n_y), c->type, (size_t)R * H, d);
        part.y = op_out_words(t, "y", bits, words);
        *packed = (struct packed){ .c = c, .want = want, .budget = c->copy ? op_zeros(t, n_y) : budget, .init = bits, .slot = slot, .span = part.y };
    }
    if (!c->copy) {
        part.w = op_in(t, "w", w, (size_t)d);
    }
    return part;
}

static void fwd_case(struct op_test *t, const struct heads_case *c)
{
    op_begin(t, "heads T=%d H=%d d=%d rows=%d slot0=%d %s %s", c->T, c->H, c->d, c->y_rows, c->slot0, c->copy ? "copy" : "norm+rope",
             type_names[c->type]);
    const struct shared s = share(t, c);
    struct packed packed;
    const struct keel_heads_params p = { .part = { add_part(t, c, &s, &packed) }, .n_parts = 1, .rope = s.rope_span,
                                         .spans = c->y_rows ? s.spans : (struct keel_span){ 0 }, .n_tokens = (uint32_t)c->T,
                                         .head_dim = (uint32_t)c->d, .eps = EPS };
    op_run(t, record_fwd, &p);
    if (c->type != KEEL_F32) {
        check_packed(t, &packed);
    }
}

// Queries in place, keys and values into the ring, as a block of the model does.
static void block_case(struct op_test *t, int T, int H, int G, int d, enum keel_dtype type)
{
    const struct heads_case q = { T, H, d, 0, 3 * T, false, KEEL_F32 }, k = { T, G, d, T + 5, 3 * T, false, type };
    const struct heads_case v = { T, G, d, T + 5, 3 * T, true, type };
    op_begin(t, "heads T=%d H=%d G=%d d=%d %s", T, H, G, d, type_names[type]);
    const struct shared s = share(t, &q);
    struct packed packed[2];
    const struct keel_heads_params p = {
        .part = { add_part(t, &q, &s, NULL), add_part(t, &k, &s, &packed[0]), add_part(t, &v, &s, &packed[1]) },
        .n_parts = 3, .rope = s.rope_span, .spans = s.spans, .n_tokens = (uint32_t)T, .head_dim = (uint32_t)d, .eps = EPS };
    op_run(t, record_fwd, &p);
    for (int i = 0; i < 2 && type != KEEL_F32; i++) {
        check_packed(t, &packed[i]);
    }
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
            struct heads_case c = { tokens[(i + 5 * j) % 10], heads[(i + j) % KEEL_COUNT(heads)], dims[i], 0, 0, false, KEEL_F32 };
            fwd_case(t, &c);
            c.y_rows = c.T + 5; // a ring whose end lies within the batch
            c.slot0 = 3 * c.y_rows - 1;
            fwd_case(t, &c);
            c.copy = true;
            fwd_case(t, &c);
            c.y_rows = 0;
            c.slot0 = 0;
            fwd_case(t, &c);
            block_case(t, c.T, 2 * c.H, c.H, c.d, KEEL_F32);
        }
    }
    op_end(t);
}

static void test_packed(void **state)
{
    struct op_test *t = *state;
    const enum keel_dtype types[] = { KEEL_F16, KEEL_Q8_0 };
    for (size_t i = 0; i < KEEL_COUNT(dims) * KEEL_COUNT(types); i++) {
        const int d = dims[i / 2];
        const enum keel_dtype type = types[i % 2];
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(tokens) : 1); j++) {
            struct heads_case c = { tokens[(i + 5 * j) % 10], heads[(i + j) % KEEL_COUNT(heads)], d, 0, 0, false, type };
            fwd_case(t, &c);
            c.copy = true;
            c.y_rows = c.T + 5;
            c.slot0 = 3 * c.y_rows - 1;
            fwd_case(t, &c);
            block_case(t, c.T, 2 * c.H, c.H, d, type);
        }
    }
    op_end(t);
}

// Values that a cache cannot hold as they are: beyond f16, a head of zeros, one of a block far above the others.
static void test_packed_ends(void **state)
{
    struct op_test *t = *state;
    const enum keel_dtype types[] = { KEEL_F16, KEEL_Q8_0 };
    enum { D = 64 };
    for (int i = 0; i < 2; i++) {
        const struct heads_case c = { 2, 1, D, 0, 0, true, types[i] };
        op_begin(t, "heads ends %s", type_names[c.type]);
        double *x = op_zeros(t, 2 * D);
        x[0] = 1e6, x[1] = -1e6, x[2] = 1, x[40] = -3;
        const size_t words = ref_kv_words(c.type, D);
        const uint32_t *init = op_bytes(t, 2 * words * 4);
        const struct keel_heads_params p = { .part = { { .x = op_in(t, "x", x, 2 * D), .y = op_out_words(t, "y", init, 2 * words),
                                                         .n_heads = 1, .type = c.type } },
                                             .n_parts = 1, .n_tokens = 2, .head_dim = D, .eps = EPS };
        op_run(t, record_fwd, &p);
        double *got = op_zeros(t, 2 * D);
        ref_kv_unpack(got, op_result_words(t, p.part[0].y), c.type, 2, D);
        const double top = c.type == KEEL_F16 ? 65504 : 1e6;
        if (fabs(got[0] - top) > 0.1 || fabs(got[1] + top) > 0.1 || got[2] != (c.type == KEEL_F16) || fabs(got[40] + 3) > 1e-6) {
            op_fail(t, "%.9g %.9g %.9g %.9g", got[0], got[1], got[2], got[40]);
        }
        for (int j = 0; j < D; j++) {
            if (got[D + j] != 0) {
                op_fail(t, "zeros: element %d is %g", j, got[D + j]);
            }
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
        cmocka_unit_test(test_packed),
        cmocka_unit_test(test_packed_ends),
        cmocka_unit_test(test_bwd),
        cmocka_unit_test(test_slope),
    };
    return op_main("op_heads", tests);
}
