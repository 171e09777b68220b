// SPDX-License-Identifier: MIT
// tests/op_adamw.c: sum of squares, and several steps of AdamW with gradient clipping, each from the state that the one before left.
// Tolerances: op_sum_budget() for the sum; a step rounds each state a few times and takes over what it was off by; Vulkan's sqrt
// (by inversesqrt and division) and division are within 5 and 2.5 ulp, an ulp being 2 OP_EPS.
#include "op_test.h"

#define STEPS 4

// --- sum of squares ------------------------------------------------------------------------------

struct sum_call {
    struct keel_span x, partial, sums;
    uint64_t n;
};

static void record_sumsq(keel_recorder *rec, const void *params)
{
    const struct sum_call *c = params;
    keel_sumsq(rec, c->x, c->partial, c->sums, c->n);
}

static void sumsq_case(struct op_test *t, size_t n, double scale)
{
    op_begin(t, "sumsq n=%zu scale=%g", n, scale);
    const double *x = op_draw_heavy(t, n, scale);
    double *want = op_zeros(t, 1), *budget = op_zeros(t, 1);
    want[0] = ref_sumsq(x, n);
    budget[0] = op_sum_budget(want[0], (double)n);
    const struct sum_call c = { .x = op_in(t, "x", x, n), .partial = op_scratch(t, "partial", keel_sumsq_scratch(n)),
                                .sums = op_out(t, "sums", NULL, want, budget, 1), .n = n };
    op_run(t, record_sumsq, &c);
}

static void test_sumsq(void **state)
{
    struct op_test *t = *state;
    const size_t lengths[] = { 1, 2, 3, 63, 64, 65, 255, 4097, 16383, 16384, 16385, 32769, 100001, 1100003 };
    for (size_t i = 0; i < KEEL_COUNT(lengths); i++) {
        sumsq_case(t, lengths[i], 1);
        sumsq_case(t, lengths[i], i % 2 ? 1e-6 : 1e6);
        sumsq_case(t, lengths[i], 0);
    }
    op_end(t);
}

// --- AdamW ---------------------------------------------------------------------------------------

struct adamw_case {
    float lr, clip, weight_decay;
    double scale;   // of the gradients
    int first_step; // above 1: m and v are not zero
};

struct adamw_call {
    struct keel_adamw_params step[STEPS];
    struct keel_span partial;
};

static void record_steps(keel_recorder *rec, const void *params)
{
    const struct adamw_call *c = params;
    for (int i = 0; i < STEPS; i++) {
        keel_sumsq(rec, c->step[i].g, c->partial, c->step[i].sums, c->step[i].n);
        keel_adamw(rec, &c->step[i]);
    }
}

struct state {
    double *w, *m, *v;
};

static struct state draw_state(struct op_test *t, size_t n, const struct adamw_case *c)
{
    const bool begun = c->first_step > 1;
    struct state s = { op_draw(t, n, 0.1), begun ? op_draw(t, n, 0.1) : op_zeros(t, n), op_zeros(t, n) };
    for (size_t i = 0; i < n && begun; i++) {
        s.v[i] = (float)(s.m[i] * s.m[i] * (0.5 + keel_rng_uniform(op_rng(t))));
    }
    return s;
}

// Gradients with heavy tails, some zero and some so small that their square is no f32.
static double *draw_gradient(struct op_test *t, size_t n, double scale)
{
    double *g = op_draw_heavy(t, n, scale);
    for (size_t i = 0; i < n; i++) {
        const uint32_t kind = keel_rng_below(op_rng(t), 16);
        g[i] = kind == 0 ? 0 : kind == 1 ? (float)(g[i] * 1e-24) : g[i];
    }
    return g;
}

// The step by the reference, and what the device may be off by after it.
static void step_of(struct state *s, struct state *off, const double *g, size_t n, const struct ref_adamw_params *p)
{
    const bool scaled = p->clip > 0 && p->clip < p->norm;
    const double factor = scaled ? p->clip / (p->norm + 1e-6) : 1;
    const double rel_g = scaled ? op_sum_budget(0.5, (double)n) + 20 * OP_EPS : OP_EPS;
    const double bias1 = 1 - pow(p->beta1, p->step), bias2 = 1 - pow(p->beta2, p->step);
    double *before = malloc(n * sizeof *before);
    assert_non_null(before);
    memcpy(before, s->w, n * sizeof *before);
    for (size_t i = 0; i < n; i++) {
        const double add_m = (1 - p->beta1) * fabs(g[i] * factor), add_v = (1 - p->beta2) * g[i] * g[i] * factor * factor;
        off->m[i] = p->beta1 * off->m[i] + add_m * (rel_g + 4 * OP_EPS) + 3 * OP_EPS * p->beta1 * fabs(s->m[i]) + 1e-37;
        off->v[i] = p->beta2 * off->v[i] + add_v * (2 * rel_g + 6 * OP_EPS) + 3 * OP_EPS * p->beta2 * s->v[i] + 1e-37;
    }
    ref_adamw(s->w, s->m, s->v, g, n, p);
    for (size_t i = 0; i < n; i++) {
        const double denom = sqrt(s->v[i] / bias2) + p->eps, rate = p->lr / bias1 / denom;
        const double low = sqrt(fmax(s->v[i] - off->v[i], 0)), high = sqrt(s->v[i] + off->v[i]);
        const double rel = (high - low) / sqrt(bias2) / denom + 30 * OP_EPS;
        off->w[i] += 3 * OP_EPS * (fabs(before[i]) + fabs(s->w[i])) + rate * (fabs(s->m[i]) * rel + off->m[i]);
    }
    free(before);
}

static void adamw_case(struct op_test *t, size_t n, const struct adamw_case *c)
{
    const float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f;
    op_begin(t, "adamw n=%zu lr=%g clip=%g decay=%g gradients=%g step=%d", n, (double)c->lr, (double)c->clip,
             (double)c->weight_decay, c->scale, c->first_step);
    struct state s = draw_state(t, n, c), off = { op_zeros(t, n), op_zeros(t, n), op_zeros(t, n) };
    struct adamw_call call = { .partial = op_scratch(t, "partial", keel_sumsq_scratch(n)) };
    const struct keel_span w = op_out(t, "w", op_copy(t, s.w, n), s.w, off.w, n);
    const struct keel_span m = op_out(t, "m", op_copy(t, s.m, n), s.m, off.m, n);
    const struct keel_span v = op_out(t, "v", op_copy(t, s.v, n), s.v, off.v, n);
    double *nothing = op_zeros(t, n);
    for (int i = 0; i < STEPS; i++) {
        const int step = c->first_step + i;
        const double *g = draw_gradient(t, n, c->scale);
        double *sum = op_zeros(t, 1), *budget = op_zeros(t, 1);
        sum[0] = ref_sumsq(g, n);
        budget[0] = op_sum_budget(sum[0], (double)n);
        call.step[i] = (struct keel_adamw_params){
            .w = w, .g = op_out(t, "g", g, nothing, nothing, n), .m = m, .v = v, .sums = op_out(t, "sums", NULL, sum, budget, 1),
            .n = n, .lr = c->lr, .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = c->weight_decay, .clip = c->clip,
            .bias1 = (float)(1 - pow((double)beta1, step)), .bias2 = (float)(1 - pow((double)beta2, step)),
        };
        const struct ref_adamw_params p = { .lr = (double)c->lr, .beta1 = (double)beta1, .beta2 = (double)beta2,
                                            .eps = (double)eps, .weight_decay = (double)c->weight_decay,
                                            .clip = (double)c->clip, .norm = sqrt(sum[0]), .step = step };
        step_of(&s, &off, g, n, &p);
    }
    op_run(t, record_steps, &call);
}

static void test_adamw(void **state)
{
    struct op_test *t = *state;
    const size_t lengths[] = { 1, 63, 64, 65, 16384, 16385, 100001 };
    const struct adamw_case cases[] = {
        { 1e-3f, 0, 0, 1, 1 },          // no clipping
        { 1e-3f, 1, 0.1f, 5, 1 },       // clipped, decay
        { 2e-4f, 1e9f, 0.01f, 1, 1 },   // norm below the limit: not scaled
        { 1e-2f, 0.5f, 0, 1e-3, 300 },  // later steps, small gradients
        { 1e-2f, 1, 0.1f, 0, 1 },       // gradients of zero: decay alone
        { 1e-2f, 1, 0.1f, 0, 50 },      // ... with momentum
        { 0, 1, 0.1f, 1, 1 },           // no learning rate: w stays
    };
    for (size_t i = 0; i < KEEL_COUNT(lengths); i++) {
        for (size_t j = 0; j < KEEL_COUNT(cases); j++) {
            if (lengths[i] < 100000 || j % 2 || op_full()) {
                adamw_case(t, lengths[i], &cases[j]);
            }
        }
    }
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sumsq),
        cmocka_unit_test(test_adamw),
    };
    return op_main("op_adamw", tests);
}
