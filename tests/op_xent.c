// SPDX-License-Identifier: MIT
// tests/op_xent.c: vocabulary rows: log-sum-exp, logit of the target, entropy; gradient of the loss; Kullback-Leibler divergence.
// Tolerances: maxima and targets are copies, hence exact. Vulkan's exp is off by 3 + 2|x| ulp and log by 3 ulp or 2^-21; these and
// the rounding of x = logit - maximum are the same for many terms and add up in absolute value; the sums themselves get
// op_sum_budget() over V terms. The gradient and the divergence get the reference's statistics, rounded to f32.
#include "op_test.h"

// Relative error of a device's exp(x) when x itself was rounded once.
static double exp_budget(double x)
{
    return 2 * OP_EPS * (3 + 2 * fabs(x)) + OP_EPS * fabs(x);
}

static void record_xent(keel_recorder *rec, const void *p)
{
    keel_xent(rec, p);
}

static void record_xent_bwd(keel_recorder *rec, const void *p)
{
    keel_xent_bwd(rec, p);
}

static void record_kl(keel_recorder *rec, const void *p)
{
    keel_kl(rec, p);
}

// --- rows ----------------------------------------------------------------------------------------

enum row_kind { NORMAL, HUGE, EQUAL, PEAK, N_KINDS };

// Logits [C, V]; row i is of kind (i + kind0) % N_KINDS: of order 3 around -5; ±80; all equal; one far above the others.
static double *draw_logits(struct op_test *t, int C, int V, int kind0)
{
    double *x = op_zeros(t, (size_t)C * V);
    for (int i = 0; i < C; i++) {
        const enum row_kind kind = (enum row_kind)((i + kind0) % N_KINDS);
        double *row = x + (size_t)i * V;
        for (int v = 0; v < V; v++) {
            const double z = keel_rng_normal(op_rng(t));
            row[v] = (float)(kind == NORMAL ? 3 * z - 5 : kind == HUGE ? z + (z < 0 ? -80 : 80) : kind == EQUAL ? 7.3 : z - 40);
        }
        if (kind == PEAK) {
            row[keel_rng_below(op_rng(t), (uint32_t)V)] = 45;
        }
    }
    return x;
}

static uint32_t *draw_targets(struct op_test *t, int C, int V)
{
    uint32_t *target = op_bytes(t, (size_t)C * 4);
    for (int i = 0; i < C; i++) { // the last and the first, then any
        target[i] = i == 0 ? (uint32_t)V - 1 : i == 1 ? 0 : keel_rng_below(op_rng(t), (uint32_t)V);
    }
    return target;
}

// --- statistics ----------------------------------------------------------------------------------

static void stats_budget(double *budget, const double *logits, const double *stats, int V)
{
    const double best = stats[0], lse = stats[1], log_sum = lse - best;
    double rel = 0, rel_x = 0, mean = 0; // Σ p of exp's error, of exp's error times |x|, of |x|; x = logit - maximum <= 0
    for (int v = 0; v < V; v++) {
        const double x = best - logits[v], p = exp(-x - log_sum);
        rel += p * exp_budget(x);
        rel_x += p * x * (exp_budget(x) + OP_EPS);
        mean += p * x;
    }
    rel += op_sum_budget(1, V);
    const double log_budget = rel + 8 * OP_EPS + 6 * OP_EPS * log_sum;
    budget[0] = 0;
    budget[1] = log_budget + OP_EPS * fabs(lse);
    budget[2] = 0;
    budget[3] = log_budget + rel_x + op_sum_budget(mean, V) + (rel + 6 * OP_EPS) * mean + OP_EPS * stats[3];
}

static void xent_case(struct op_test *t, int C, int V, int kind0)
{
    const size_t n = (size_t)C * V;
    op_begin(t, "xent C=%d V=%d kind=%d", C, V, kind0);
    const double *logits = draw_logits(t, C, V, kind0);
    const uint32_t *targets = draw_targets(t, C, V);
    double *want = op_zeros(t, (size_t)C * 4), *budget = op_zeros(t, (size_t)C * 4);
    ref_xent(want, logits, targets, C, V);
    for (int i = 0; i < C; i++) {
        stats_budget(budget + 4 * i, logits + (size_t)i * V, want + 4 * i, V);
    }
    const struct keel_xent_params p = {
        .logits = op_in(t, "logits", logits, n),
        .targets = op_in_words(t, "targets", targets, (size_t)C),
        .stats = op_out(t, "stats", NULL, want, budget, (size_t)C * 4),
        .partial = op_scratch(t, "partial", keel_xent_scratch((uint32_t)C, (uint32_t)V)),
        .n_rows = (uint32_t)C,
        .vocab = (uint32_t)V,
    };
    op_run(t, record_xent, &p);
    const double *got = op_result(t, p.stats);
    for (int i = 0; i < C; i++) {
        if (!(got[4 * i + 3] >= 0)) {
            op_fail(t, "row %d: entropy %.9g is below 0", i, got[4 * i + 3]);
        }
    }
}

// --- gradient ------------------------------------------------------------------------------------

static void xent_bwd_case(struct op_test *t, int C, int V, int kind0)
{
    const size_t n = (size_t)C * V;
    op_begin(t, "xent_bwd C=%d V=%d kind=%d", C, V, kind0);
    const double *logits = draw_logits(t, C, V, kind0);
    const uint32_t *targets = draw_targets(t, C, V);
    double *weights = op_draw(t, (size_t)C, 1), *stats = op_zeros(t, (size_t)C * 4);
    double *want = op_zeros(t, n), *budget = op_zeros(t, n);
    for (int i = 1; i < C; i += 3) { // tokens that are not trained on
        weights[i] = 0;
    }
    ref_xent(stats, logits, targets, C, V);
    ref_xent_bwd(want, logits, targets, weights, C, V);
    for (int i = 0; i < C; i++) {
        const double lse = stats[4 * i + 1];
        for (int v = 0; v < V; v++) {
            const double x = logits[(size_t)i * V + v] - lse, p = exp(x), hot = (uint32_t)v == targets[i];
            budget[(size_t)i * V + v] = fabs(weights[i]) * (p * (exp_budget(x) + OP_EPS * fabs(lse)) + 4 * OP_EPS * (p + hot)) +
                                        1e-35;
        }
    }
    const struct keel_xent_bwd_params p = {
        .logits = op_out(t, "logits", logits, want, budget, n),
        .targets = op_in_words(t, "targets", targets, (size_t)C),
        .stats = op_in(t, "stats", stats, (size_t)C * 4),
        .weights = op_in(t, "weights", weights, (size_t)C),
        .n_rows = (uint32_t)C,
        .vocab = (uint32_t)V,
    };
    op_run(t, record_xent_bwd, &p);
}

// --- divergence ----------------------------------------------------------------------------------

static void kl_budget(double *budget, const double *p, const double *q, double lse_p, double lse_q, int V)
{
    double size[2] = { 0, 0 };
    budget[0] = budget[1] = 0;
    for (int v = 0; v < V; v++) {
        const double a = p[v] - lse_p, b = q[v] - lse_q, diff = fabs(a - b);
        const double da = OP_EPS * (fabs(a) + fabs(lse_p)), db = OP_EPS * (fabs(b) + fabs(lse_q));
        const double both = da + db + 2 * OP_EPS * diff;
        budget[0] += exp(a) * (both + diff * (exp_budget(a) + da));
        budget[1] += exp(b) * (both + diff * (exp_budget(b) + db));
        size[0] += exp(a) * diff;
        size[1] += exp(b) * diff;
    }
    budget[0] += op_sum_budget(size[0], V);
    budget[1] += op_sum_budget(size[1], V);
}

enum pair { DIFFERENT, SAME, CLOSE, N_PAIRS };

static void kl_case(struct op_test *t, int C, int V, int kind0, enum pair pair)
{
    static const char *const names[] = { "different", "same", "close" };
    const size_t n = (size_t)C * V, n_kl = (size_t)C * 2;
    op_begin(t, "kl C=%d V=%d kind=%d %s", C, V, kind0, names[pair]);
    const double *lp = draw_logits(t, C, V, kind0);
    double *lq = pair == DIFFERENT ? draw_logits(t, C, V, kind0 + (V % 2)) : op_copy(t, lp, n);
    for (size_t i = 0; pair == CLOSE && i < n; i++) {
        lq[i] = (float)(lq[i] + 1e-3 * keel_rng_normal(op_rng(t)));
    }
    const uint32_t *targets = draw_targets(t, C, V);
    double *sp = op_zeros(t, (size_t)C * 4), *sq = op_zeros(t, (size_t)C * 4);
    double *want = op_zeros(t, n_kl), *budget = op_zeros(t, n_kl);
    ref_xent(sp, lp, targets, C, V);
    ref_xent(sq, lq, targets, C, V);
    ref_kl(want, lp, lq, C, V);
    for (int i = 0; i < C; i++) {
        kl_budget(budget + 2 * i, lp + (size_t)i * V, lq + (size_t)i * V, sp[4 * i + 1], sq[4 * i + 1], V);
    }
    const struct keel_kl_params p = {
        .logits_p = op_in(t, "logits_p", lp, n),
        .logits_q = op_in(t, "logits_q", lq, n),
        .stats_p = op_in(t, "stats_p", sp, (size_t)C * 4),
        .stats_q = op_in(t, "stats_q", sq, (size_t)C * 4),
        .kl = op_out(t, "kl", NULL, want, budget, n_kl),
        .partial = op_scratch(t, "partial", keel_xent_scratch((uint32_t)C, (uint32_t)V)),
        .n_rows = (uint32_t)C,
        .vocab = (uint32_t)V,
    };
    op_run(t, record_kl, &p);
    const double *got = op_result(t, p.kl);
    for (size_t i = 0; i < n_kl; i++) {
        if (!(got[i] >= 0) || (pair == SAME && got[i] > 0)) {
            op_fail(t, "kl[%zu] = %.9g: below 0, or not 0 for equal rows", i, got[i]);
            break;
        }
    }
}

// --- cases ---------------------------------------------------------------------------------------

static const int vocabs[] = { 5, 331, 4096, 4097, 70000 };
static const int rows[] = { 1, 3, 64, 65 };

// Every vocabulary with every number of rows; one row takes each kind in turn. Many rows of the largest: KEEL_TEST_FULL.
static void each_case(struct op_test *t, void (*run)(struct op_test *, int, int, int))
{
    for (size_t i = 0; i < KEEL_COUNT(vocabs); i++) {
        for (size_t j = 0; j < KEEL_COUNT(rows); j++) {
            if (vocabs[i] * rows[j] > 300000 && !op_full()) {
                continue;
            }
            for (int kind = 0; kind < (rows[j] == 1 ? N_KINDS : 1); kind++) {
                run(t, rows[j], vocabs[i], kind);
            }
        }
    }
}

static void test_xent(void **state)
{
    struct op_test *t = *state;
    each_case(t, xent_case);
    xent_case(t, 2, 1, 0); // one word: lse is the logit, entropy 0
    op_end(t);
}

static void test_xent_bwd(void **state)
{
    struct op_test *t = *state;
    each_case(t, xent_bwd_case);
    op_end(t);
}

static void run_kl(struct op_test *t, int C, int V, int kind0)
{
    if (C <= 3 || op_full()) {
        kl_case(t, C, V, kind0, SAME);
        kl_case(t, C, V, kind0, CLOSE);
    }
    kl_case(t, C, V, kind0, DIFFERENT);
}

static void test_kl(void **state)
{
    struct op_test *t = *state;
    each_case(t, run_kl);
    op_end(t);
}

// --- slope ---------------------------------------------------------------------------------------

struct both {
    struct keel_xent_params f, f_bwd; // of the logits that move, and of those that become the gradient
    struct keel_xent_bwd_params b;
};

static void record_both(keel_recorder *rec, const void *p)
{
    const struct both *c = p;
    keel_xent(rec, &c->f_bwd);
    keel_xent_bwd(rec, &c->b);
}

static void record_both_fwd(keel_recorder *rec, const void *p)
{
    keel_xent(rec, &((const struct both *)p)->f);
}

// Loss Σ weight · (lse - target). Truncation is below h² = 1e-4 of the slope, rounding of values of order 8 about 1e-4; 5e-3.
static void test_slope(void **state)
{
    struct op_test *t = *state;
    const int C = 5, V = 331;
    const size_t n = (size_t)C * V;
    op_begin(t, "xent slope C=%d V=%d", C, V);
    const double *logits = op_draw(t, n, 3), *weights = op_draw(t, (size_t)C, 1);
    const uint32_t *targets = draw_targets(t, C, V);
    double *c = op_zeros(t, (size_t)C * 4);
    for (int i = 0; i < C; i++) {
        c[4 * i + 1] = weights[i];
        c[4 * i + 2] = -weights[i];
    }
    struct both p = { .f = { .logits = op_in(t, "logits", logits, n), .targets = op_in_words(t, "targets", targets, (size_t)C),
                             .stats = op_out(t, "stats", NULL, NULL, NULL, (size_t)C * 4),
                             .partial = op_scratch(t, "partial", keel_xent_scratch((uint32_t)C, (uint32_t)V)),
                             .n_rows = (uint32_t)C, .vocab = (uint32_t)V } };
    p.f_bwd = p.f;
    p.f_bwd.logits = op_out(t, "d_logits", logits, NULL, NULL, n);
    p.b = (struct keel_xent_bwd_params){ .logits = p.f_bwd.logits, .targets = p.f.targets, .stats = p.f.stats,
                                         .weights = op_in(t, "weights", weights, (size_t)C), .n_rows = (uint32_t)C,
                                         .vocab = (uint32_t)V };
    op_run(t, record_both, &p);
    op_check_slope(t, &(struct op_slope){ .name = "logits", .forward = record_both_fwd, .params = &p, .x = p.f.logits,
                                          .y = p.f.stats, .x0 = logits, .grad = op_result(t, p.b.logits), .c = c, .n_x = n,
                                          .n_y = (size_t)C * 4, .h = 0.01, .tol = 5e-3 });
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_xent),
        cmocka_unit_test(test_xent_bwd),
        cmocka_unit_test(test_kl),
        cmocka_unit_test(test_slope),
    };
    return op_main("op_xent", tests);
}
