// SPDX-License-Identifier: MIT
// tests/op_top.c: divergence from a short list and a tail, its gradient, and token weights of constrained fine-tuning.
// Tolerances: those of op_xent.c for exp, log and sums over V terms, once for the log-sum-exp of the whole row and once for the
// tail's; each probability of the gradient has the relative error of its exponent.
#include "op_test.h"

enum { STRIDE = KEEL_TOP };

static double exp_budget(double x)
{
    return 2 * OP_EPS * (3 + 2 * fabs(x)) + OP_EPS * fabs(x);
}

// --- a case --------------------------------------------------------------------------------------

struct top_case {
    struct ref_top ref;
    double *log_p, *tail, *tail_row; // tail_row [V]: scratch
    uint32_t *ids;
};

// The K largest of x [V], largest first.
static void choose(const double *x, uint32_t *ids, double *values, int V, int K)
{
    for (int k = 0; k < K; k++) {
        int best = -1;
        for (int v = 0; v < V; v++) {
            bool taken = false;
            for (int j = 0; j < k; j++) {
                taken = taken || ids[j] == (uint32_t)v;
            }
            best = !taken && (best < 0 || x[v] > x[best]) ? v : best;
        }
        ids[k] = (uint32_t)best;
        values[k] = x[best];
    }
}

// Row i of p is q itself, q moved a little, or another draw.
static void draw(struct op_test *t, struct top_case *c, int C, int V, int K, double scale)
{
    double *logits = op_draw(t, (size_t)C * V, scale), *p = op_zeros(t, (size_t)V);
    c->ids = op_bytes(t, (size_t)C * STRIDE * sizeof *c->ids);
    c->log_p = op_zeros(t, (size_t)C * STRIDE);
    c->tail = op_zeros(t, (size_t)C);
    c->tail_row = op_zeros(t, (size_t)V);
    for (int i = 0; i < C; i++) {
        double sum = 0, listed = 0;
        for (int v = 0; v < V; v++) {
            p[v] = i % 3 == 2 ? scale * keel_rng_normal(op_rng(t))
                              : logits[(size_t)i * V + v] + (i % 3) * 0.1 * keel_rng_normal(op_rng(t));
            sum += exp(p[v]);
        }
        choose(p, c->ids + (size_t)i * STRIDE, c->log_p + (size_t)i * STRIDE, V, K);
        for (int k = 0; k < K; k++) {
            double *log_p = &c->log_p[(size_t)i * STRIDE + k];
            listed += exp(*log_p) / sum;
            *log_p = (float)(*log_p - log(sum));
        }
        c->tail[i] = K < V ? (float)log(fmax(1 - listed, 1e-30)) : -3.4e38;
    }
    c->ref = (struct ref_top){ .logits = logits, .log_p = c->log_p, .tail = c->tail, .weights = op_draw(t, (size_t)C, 1), .ids = c->ids,
                               .C = C, .V = V, .K = K, .stride = STRIDE };
}

// Error of a log-sum-exp of the row on the device, as in op_xent.c.
static double lse_budget(const double *x, int V, double *lse)
{
    double best = -INFINITY, sum = 0, rel = 0;
    for (int v = 0; v < V; v++) {
        best = fmax(best, x[v]);
    }
    for (int v = 0; v < V; v++) {
        sum += exp(x[v] - best);
        rel += exp(x[v] - best) * (x[v] > -1e38 ? exp_budget(x[v] - best) : 0);
    }
    *lse = best + log(sum);
    return rel / sum + op_sum_budget(1, V + 2 * STRIDE) + 16 * OP_EPS + 12 * OP_EPS * log(sum) + 2 * OP_EPS * fabs(*lse);
}

static void budgets(const struct top_case *c, int i, double *stats, double *d)
{
    const struct ref_top *r = &c->ref;
    const double *x = r->logits + (size_t)i * r->V, *log_p = c->log_p + (size_t)i * STRIDE;
    double z, tail = 0, size = 0;
    memcpy(c->tail_row, x, (size_t)r->V * sizeof *x);
    for (int k = 0; k < r->K; k++) {
        c->tail_row[c->ids[(size_t)i * STRIDE + k]] = -3.402823e38;
    }
    const double dz = lse_budget(x, r->V, &z), tail_p = exp(c->tail[i]);
    const double dt = r->K < r->V ? lse_budget(c->tail_row, r->V, &tail) : 0;
    for (int v = 0; v < r->V; v++) {
        const double q = exp(x[v] - z), own = r->K < r->V ? exp(x[v] - tail) * tail_p : 0;
        d[v] = fabs(r->weights[i]) * (q * (exp_budget(x[v] - z) + dz) +
                                      own * (exp_budget(x[v] - tail + c->tail[i]) + dt + OP_EPS * fabs(tail)) + 4 * OP_EPS * (q + own)) + 1e-35;
    }
    stats[2] = 1e-35;
    for (int k = 0; k < r->K; k++) {
        const uint32_t v = c->ids[(size_t)i * STRIDE + k];
        const double p = exp(log_p[k]), diff = fabs(log_p[k] - (x[v] - z));
        d[v] = fabs(r->weights[i]) * (exp(x[v] - z) * (exp_budget(x[v] - z) + dz + 4 * OP_EPS) + p * (exp_budget(log_p[k]) + 4 * OP_EPS));
        stats[2] += p * (dz + OP_EPS * (fabs(x[v] - z) + fabs(log_p[k]) + 4 * diff) + diff * exp_budget(log_p[k]));
        size += p * diff;
    }
    if (r->K < r->V) {
        const double diff = fabs(c->tail[i] - (tail - z));
        stats[2] += tail_p * (dz + dt + OP_EPS * (fabs(tail - z) + fabs(c->tail[i]) + 4 * diff) + diff * exp_budget(c->tail[i]));
        size += tail_p * diff;
    }
    stats[2] += op_sum_budget(size, STRIDE);
}

static void record_all(keel_recorder *rec, const void *params)
{
    keel_top_take(rec, params);
    keel_top_kl(rec, params);
    keel_top_bwd(rec, params);
}

static void top_case(struct op_test *t, int C, int V, int K, double scale)
{
    struct top_case c;
    op_begin(t, "top C=%d V=%d K=%d scale=%g", C, V, K, scale);
    draw(t, &c, C, V, K, scale);
    const size_t n = (size_t)C * V;
    double *kl = op_zeros(t, (size_t)C), *want = op_zeros(t, n), *budget = op_zeros(t, n);
    double *stats_budget = op_zeros(t, (size_t)C * 4);
    ref_top_kl(kl, want, &c.ref);
    for (int i = 0; i < C; i++) {
        budgets(&c, i, stats_budget + 4 * i, budget + (size_t)i * V);
    }
    const struct keel_top_params p = {
        .logits = op_out(t, "logits", c.ref.logits, want, budget, n),
        .ids = op_in_words(t, "ids", c.ids, (size_t)C * STRIDE),
        .log_p = op_in(t, "log_p", c.log_p, (size_t)C * STRIDE),
        .tail_log_p = op_in(t, "tail_log_p", c.tail, (size_t)C),
        .weights = op_in(t, "weights", c.ref.weights, (size_t)C),
        .top = op_scratch(t, "top", 4ull * C * STRIDE),
        .stats = op_out(t, "stats", NULL, NULL, NULL, (size_t)C * 4),
        .partial = op_scratch(t, "partial", keel_xent_scratch((uint32_t)C, (uint32_t)V)),
        .n_rows = (uint32_t)C,
        .vocab = (uint32_t)V,
        .n_top = (uint32_t)K,
    };
    op_run(t, record_all, &p);
    const double *stats = op_result(t, p.stats);
    for (int i = 0; i < C; i++) {
        const double off = fabs(stats[4 * i + 2] - kl[i]);
        if (!(off <= stats_budget[4 * i + 2]) || !(stats[4 * i + 2] >= 0)) {
            op_fail(t, "row %d: divergence %.9g, not %.9g; budget %.3g", i, stats[4 * i + 2], kl[i], stats_budget[4 * i + 2]);
        }
    }
}

static void test_top(void **state)
{
    struct op_test *t = *state;
    static const int rows[] = { 1, 3, 65 }, vocabs[] = { 64, 65, 331, 4097, 70000 };
    for (size_t i = 0; i < KEEL_COUNT(rows); i++) {
        for (size_t j = 0; j < KEEL_COUNT(vocabs); j++) {
            if (rows[i] * vocabs[j] < 300000 || op_full()) {
                top_case(t, rows[i], vocabs[j], STRIDE, 3);
            }
        }
    }
    top_case(t, 3, 40, 40, 3);   // fewer words than the list has places
    top_case(t, 3, 331, 5, 3);   // a shorter list
    top_case(t, 3, 331, 64, 30); // a tail of almost nothing
    op_end(t);
}

// --- slope ---------------------------------------------------------------------------------------

static void record_kl(keel_recorder *rec, const void *params)
{
    keel_top_take(rec, params);
    keel_top_kl(rec, params);
}

struct both {
    struct keel_top_params f, b; // of the logits that move, and of those that become the gradient
    struct keel_span start;      // the former are destroyed: they are put back first
};

static void record_fwd(keel_recorder *rec, const void *params)
{
    const struct both *p = params;
    keel_record_copy(rec, p->f.logits, p->start);
    record_kl(rec, &p->f);
}

static void record_bwd(keel_recorder *rec, const void *params)
{
    record_all(rec, &((const struct both *)params)->b);
}

// Truncation is below h² = 1e-4 of the slope, rounding of values of order 8 about 1e-4; 5e-3.
static void test_slope(void **state)
{
    struct op_test *t = *state;
    const int C = 5, V = 331;
    const size_t n = (size_t)C * V;
    struct top_case k;
    op_begin(t, "top slope C=%d V=%d", C, V);
    draw(t, &k, C, V, STRIDE, 2);
    double *c = op_zeros(t, (size_t)C * 4);
    for (int i = 0; i < C; i++) {
        c[4 * i + 2] = k.ref.weights[i];
    }
    struct both p = { .f = { .logits = op_scratch(t, "logits", 4 * n), .ids = op_in_words(t, "ids", k.ids, (size_t)C * STRIDE),
                             .log_p = op_in(t, "log_p", k.log_p, (size_t)C * STRIDE), .tail_log_p = op_in(t, "tail", k.tail, (size_t)C),
                             .weights = op_in(t, "weights", k.ref.weights, (size_t)C), .top = op_scratch(t, "top", 4ull * C * STRIDE),
                             .stats = op_out(t, "stats", NULL, NULL, NULL, (size_t)C * 4),
                             .partial = op_scratch(t, "partial", keel_xent_scratch((uint32_t)C, (uint32_t)V)),
                             .n_rows = (uint32_t)C, .vocab = (uint32_t)V, .n_top = STRIDE },
                      .start = op_in(t, "start", k.ref.logits, n) };
    p.b = p.f;
    p.b.logits = op_out(t, "d_logits", k.ref.logits, NULL, NULL, n);
    op_run(t, record_bwd, &p);
    op_check_slope(t, &(struct op_slope){ .name = "logits", .forward = record_fwd, .params = &p, .x = p.start, .y = p.f.stats,
                                          .x0 = k.ref.logits, .grad = op_result(t, p.b.logits), .c = c, .n_x = n,
                                          .n_y = (size_t)C * 4, .h = 0.01, .tol = 5e-3 });
    op_end(t);
}

// --- token weights -------------------------------------------------------------------------------

static void record_constrain(keel_recorder *rec, const void *params)
{
    const struct keel_span *s = params;
    keel_xent_constrain(rec, s[0], s[1], s[2], s[3], (uint32_t)(s[3].bytes / 4));
}

static void constrain_case(struct op_test *t, int C, double scale)
{
    op_begin(t, "constrain C=%d scale=%g", C, scale);
    double *stats = op_draw(t, (size_t)C * 4, scale), *beta = op_abs(t, op_draw(t, (size_t)C, 1), (size_t)C);
    double *base = op_draw(t, (size_t)C, scale), *weights = op_draw(t, (size_t)C, 1);
    double *log_pi = op_zeros(t, (size_t)C), *want = op_zeros(t, (size_t)C), *budget = op_zeros(t, (size_t)C);
    for (int i = 0; i < C; i++) {
        log_pi[i] = stats[4 * i + 2] - stats[4 * i + 1];
    }
    ref_constrain(want, weights, log_pi, beta, base, C);
    for (int i = 0; i < C; i++) {
        const double size = fabs(stats[4 * i + 2]) + fabs(stats[4 * i + 1]) + fabs(base[i]);
        budget[i] = fabs(want[i]) * (exp_budget(beta[i] * (log_pi[i] - base[i])) + 4 * OP_EPS * beta[i] * size + 8 * OP_EPS);
    }
    const struct keel_span p[] = { op_in(t, "stats", stats, (size_t)C * 4), op_in(t, "beta", beta, (size_t)C),
                                   op_in(t, "base", base, (size_t)C), op_out(t, "weights", weights, want, budget, (size_t)C) };
    op_run(t, record_constrain, p);
}

static void test_constrain(void **state)
{
    struct op_test *t = *state;
    constrain_case(t, 1, 1);
    constrain_case(t, 64, 3);
    constrain_case(t, 131, 100); // beyond what exp() holds, both ways
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_top),
        cmocka_unit_test(test_slope),
        cmocka_unit_test(test_constrain),
    };
    return op_main("op_top", tests);
}
