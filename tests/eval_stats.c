// SPDX-License-Identifier: MIT
// tests/eval_stats.c: bootstrap, Wilson and percentiles against numbers that tests/data/eval_stats.py computed apart from keel.
#include "formats_util.h"

#include "eval.h"

#include <math.h>

static const double num[10] = { 0.5, -1.25, 2.0, 0.75, -0.5, 3.5, 1.0, -2.25, 0.125, 1.5 };
static const double den[10] = { 1, 2, 1, 3, 1, 2, 1, 2, 1, 4 };
static const uint32_t cluster[10] = { 0, 0, 1, 2, 2, 3, 4, 4, 4, 5 };

// Both sides add a few exact binary fractions; only the order of a few additions differs.
static void assert_estimate(struct keel_estimate e, double value, double lo, double hi)
{
    const double tol = 1e-12;
    if (!(fabs(e.value - value) < tol && fabs(e.lo - lo) < tol && fabs(e.hi - hi) < tol)) {
        fail_msg("got %.17g [%.17g, %.17g], expected %.17g [%.17g, %.17g]", e.value, e.lo, e.hi, value, lo, hi);
    }
}

static void test_bootstrap(void **state)
{
    struct keel_estimate e, again;
    (void)state;
    assert_int_equal(keel_bootstrap(num, NULL, NULL, 10, 0, 2000, 7, &e), KEEL_OK);
    assert_estimate(e, 0.5375, -0.425, 1.4753124999999985);
    assert_int_equal(keel_bootstrap(num, NULL, cluster, 10, 6, 2000, 7, &e), KEEL_OK);
    assert_estimate(e, 0.5375, -0.14437499999999998, 1.8928571428571428);
    assert_int_equal(keel_bootstrap(num, den, cluster, 10, 6, 2000, 7, &e), KEEL_OK);
    assert_estimate(e, 0.2986111111111111, -0.09090909090909091, 0.95);
    assert_int_equal(keel_bootstrap(num, den, cluster, 10, 6, 2000, 7, &again), KEEL_OK);
    assert_memory_equal(&e, &again, sizeof e); // same seed, same bits
    assert_int_equal(keel_bootstrap(num, den, cluster, 10, 6, 2000, 8, &again), KEEL_OK);
    assert_true(again.value == e.value && (again.lo != e.lo || again.hi != e.hi));
}

static void test_bootstrap_edges(void **state)
{
    static const uint32_t one[3] = { 0, 0, 0 }, bad[3] = { 0, 2, 1 };
    struct keel_estimate e;
    (void)state;
    assert_int_equal(keel_bootstrap(num, NULL, NULL, 0, 0, 100, 1, &e), KEEL_ERR_ARG);
    assert_int_equal(keel_bootstrap(num, NULL, bad, 3, 2, 100, 1, &e), KEEL_ERR_ARG);
    assert_int_equal(keel_bootstrap(num, NULL, one, 3, 1, 100, 1, &e), KEEL_OK);
    assert_true(e.value == (0.5 - 1.25 + 2.0) / 3 && isnan(e.lo) && isnan(e.hi)); // one prompt says nothing about others
}

// Three runs after a common base: the numbers of eval_stats.py; the cache of draws must not change them.
static void test_pooled(void **state)
{
    double runs[30];
    struct keel_draws d = keel_draws_make(2000, 7);
    struct keel_estimate e[3], again[3];
    (void)state;
    for (int i = 0; i < 10; i++) {
        runs[i] = num[i] + 0.5;
        runs[10 + i] = num[i] * 0.5;
        runs[20 + i] = num[i] - i * 0.25;
    }
    const struct keel_pairs p = { .base = num, .tuned = runs, .cluster = cluster, .n = 10, .n_runs = 3, .n_clusters = 6 };
    assert_int_equal(keel_bootstrap_pairs(&d, &p, e), KEEL_OK);
    assert_estimate(e[0], 0.5375, -0.14437499999999998, 1.8928571428571428);
    assert_estimate(e[1], 0.23958333333333334, -0.7564236111111112, 1.642857142857143);
    assert_estimate(e[2], -0.2979166666666666, -1.1590909090909092, 0.5);
    assert_int_equal(keel_bootstrap_pairs(&d, &p, again), KEEL_OK);
    assert_memory_equal(e, again, sizeof e);
    const struct keel_pairs after = { .tuned = runs, .cluster = cluster, .n = 10, .n_runs = 3, .n_clusters = 6 };
    assert_int_equal(keel_bootstrap_pairs(&d, &after, again), KEEL_OK);
    assert_true(isnan(again[0].value) && isnan(again[2].value) && memcmp(&e[1], &again[1], sizeof e[1]) == 0);
    keel_draws_finish(&d);
}

// More clusters than the cache holds: drawn one by one, to the same numbers.
static void test_many_clusters(void **state)
{
    const uint32_t n = 9000;
    double *x = calloc(n, sizeof *x);
    struct keel_draws d = keel_draws_make(4000, 3);
    struct keel_estimate e[3], direct;
    (void)state;
    struct keel_rng rng = keel_rng_make(5, 5);
    for (uint32_t i = 0; i < n; i++) {
        x[i] = keel_rng_normal(&rng);
    }
    const struct keel_pairs p = { .tuned = x, .n = n, .n_runs = 1, .n_clusters = n };
    assert_int_equal(keel_bootstrap_pairs(&d, &p, e), KEEL_OK);
    assert_int_equal(d.n_sets, 0); // 72 MB: not kept
    assert_int_equal(keel_bootstrap(x, NULL, NULL, n, 0, 4000, 3, &direct), KEEL_OK);
    assert_estimate(e[1], direct.value, direct.lo, direct.hi);
    // The bootstrap of a mean of n standard normals has the half-width 1.96 / √n; its ends vary by some 3 %.
    assert_true(fabs((e[1].hi - e[1].lo) / 2 * sqrt(n) / 1.96 - 1) < 0.08);
    keel_draws_finish(&d);
    free(x);
}

static void test_t_interval(void **state)
{
    static const double x[3] = { 1, 2, 4.5 }, long_x[40] = { 1 };
    (void)state;
    // mean 2.5, sd 1.802776, t(2) = 4.302653: half-width 4.302653 * 1.802776 / sqrt(3)
    struct keel_estimate e = keel_t_interval(x, 3);
    assert_true(e.value == 2.5 && fabs(e.hi - 2.5 - 4.4783507) < 1e-5 && fabs(e.lo - 2.5 + 4.4783507) < 1e-5);
    e = keel_t_interval(x, 1);
    assert_true(e.value == 1 && isnan(e.lo));
    e = keel_t_interval(long_x, 40); // sd √(1/40), so the half-width is 1.96 / 40
    assert_true(fabs(e.hi - e.value - 1.959964 / 40) < 1e-9);
}

static void test_spearman(void **state)
{
    static const double rank[6] = { 4, 4, 16, 16, 64, 64 }, drift[6] = { 0.1, 0.2, 0.2, 0.5, 0.4, 0.9 }, flat[6] = { 1, 1, 1, 1, 1, 1 };
    double rho, p;
    (void)state;
    assert_int_equal(keel_spearman(rank, drift, 6, 20000, 1, &rho, &p), KEEL_OK);
    assert_true(fabs(rho - 0.7882407813680822) < 1e-12);
    assert_true(fabs(p - 0.044444444444444446) < 0.006); // exact over all 720 orders; 20,000 draws have an error of 0.0015
    assert_int_equal(keel_spearman(rank, flat, 6, 100, 1, &rho, &p), KEEL_OK);
    assert_true(isnan(rho) && isnan(p));
    assert_int_equal(keel_spearman(rank, drift, 2, 100, 1, &rho, &p), KEEL_ERR_ARG);
}

// The interval must hold the true mean about 95 times in 100.
static void test_coverage(void **state)
{
    struct keel_rng rng = keel_rng_make(11, 3);
    int held = 0;
    (void)state;
    for (int k = 0; k < 400; k++) {
        double x[60];
        struct keel_estimate e;
        for (int i = 0; i < 60; i++) {
            x[i] = 0.25 + keel_rng_normal(&rng);
        }
        assert_int_equal(keel_bootstrap(x, NULL, NULL, 60, 0, 400, (uint64_t)k, &e), KEEL_OK);
        held += e.lo <= 0.25 && 0.25 <= e.hi;
    }
    // Percentile intervals of 60 values cover about 94 %; 400 draws have a standard error of 1.2 %.
    assert_in_range(held, 360, 392);
}

static void test_wilson(void **state)
{
    struct keel_estimate e;
    (void)state;
    assert_estimate(keel_wilson(3, 20), 0.15, 0.05236874589621661, 0.3604188647407569);
    assert_estimate(keel_wilson(0, 50), 0, 0, 0.07134759913335871);
    assert_estimate(keel_wilson(50, 50), 1, 0.928652400866641, 1);
    assert_estimate(keel_wilson(126, 150), 0.84, 0.7729603179581623, 0.8900599158715456);
    e = keel_wilson(0, 0);
    assert_true(isnan(e.value) && isnan(e.lo) && isnan(e.hi));
}

static void test_small(void **state)
{
    static const double sorted[4] = { 1, 2, 4, 8 };
    double out[5];
    (void)state;
    assert_true(isnan(keel_mean(NULL, 0)) && keel_mean(sorted, 4) == 3.75);
    assert_true(keel_percentile(sorted, 4, 0) == 1 && keel_percentile(sorted, 4, 1) == 8);
    assert_true(keel_percentile(sorted, 4, 0.5) == 3 && fabs(keel_percentile(sorted, 4, 0.9) - 6.8) < 1e-12);
    keel_moving_mean((const double[]){ 1, 2, 6, 3, 5 }, 5, 3, out);
    assert_true(out[0] == 1.5 && out[1] == 3 && out[4] == 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bootstrap),     cmocka_unit_test(test_bootstrap_edges), cmocka_unit_test(test_pooled),
        cmocka_unit_test(test_many_clusters), cmocka_unit_test(test_t_interval),      cmocka_unit_test(test_spearman),
        cmocka_unit_test(test_coverage),      cmocka_unit_test(test_wilson),          cmocka_unit_test(test_small),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
