// SPDX-License-Identifier: MIT
// tests/op_group.c: products that share their input, with what an adapter adds and with GELU, and the LoRA products before them.
// Tolerances: op_sum_budget() over K + r terms; through gelu(gate) · up the errors of both come with the derivatives, below 1.13 for
// gelu (its largest slope), and 40 roundings of its own (op_ewise.c).
#include "op_test.h"

struct group_case {
    enum keel_dtype type[KEEL_MAX_LINEAR_PARTS];
    uint32_t N[KEEL_MAX_LINEAR_PARTS], n, T, K;
    int rank; // 0: no adapter
    bool glu, shards;
};

static void record_group(keel_recorder *rec, const void *p)
{
    keel_linear_group(rec, p);
}

// One product of the case: what it must give and the size of its terms.
struct expected {
    double *y, *size;
};

static struct expected add_part(struct op_test *t, const struct group_case *c, uint32_t i, const double *x, const double *mag_x,
                                struct keel_matrix *m, struct keel_lora *l, struct keel_linear_part *part)
{
    const int T = (int)c->T, N = (int)c->N[i], K = (int)c->K, r = c->rank;
    const size_t n_y = (size_t)T * N;
    double *w, *mag;
    op_matrix(t, m, c->type[i], c->N[i], c->K, c->shards ? 64 : 0, &w, &mag);
    const struct expected e = { op_zeros(t, n_y), op_zeros(t, n_y) };
    ref_linear(e.y, x, w, T, N, K, false);
    ref_linear(e.size, mag_x, mag, T, N, K, false);
    *part = (struct keel_linear_part){ .w = m };
    if (r > 0) {
        const double *h = op_draw(t, (size_t)T * r, 1), *b = op_draw(t, (size_t)N * r, 1);
        const double scale = 0.5 + i;
        *l = (struct keel_lora){ .b = op_in(t, "b", b, (size_t)N * r), .rank = (uint32_t)r, .k = c->K, .n = c->N[i],
                                 .scale = (float)scale };
        part->lora = l;
        part->h = op_in(t, "h", h, (size_t)T * r);
        ref_lora_up(e.y, h, b, T, N, r, scale);
        ref_lora_up(e.size, op_abs(t, h, (size_t)T * r), op_abs(t, b, (size_t)N * r), T, N, r, scale);
    }
    return e;
}

static void glu_budget(struct expected *gate, const struct expected *up, size_t n, double terms)
{
    for (size_t i = 0; i < n; i++) {
        const double g = op_sum_budget(gate->size[i], terms), u = op_sum_budget(up->size[i], terms);
        gate->size[i] = 1.13 * g * fabs(up->y[i]) + fabs(gate->y[i]) * u + 1.13 * g * u
                      + 40 * OP_EPS * fabs(gate->y[i] * up->y[i]) + 1e-35;
    }
}

static void group_case(struct op_test *t, const struct group_case *c)
{
    struct keel_matrix m[KEEL_MAX_LINEAR_PARTS];
    struct keel_lora l[KEEL_MAX_LINEAR_PARTS];
    struct expected e[KEEL_MAX_LINEAR_PARTS];
    struct keel_linear_group_params p = { .n_parts = c->n, .n_tokens = c->T, .glu = c->glu };
    const size_t n_x = (size_t)c->T * c->K;
    const double terms = c->K + c->rank;
    op_begin(t, "group %s %s T=%u K=%u N=%u,%u,%u r=%d%s%s", keel_dtype_info(c->type[0])->name, keel_dtype_info(c->type[1])->name,
             c->T, c->K, c->N[0], c->N[1], c->n > 2 ? c->N[2] : 0, c->rank, c->glu ? " glu" : "", c->shards ? " shards" : "");
    if (op_left_out(t)) {
        return;
    }
    const double *x = op_draw(t, n_x, 1), *mag_x = op_abs(t, x, n_x);
    for (uint32_t i = 0; i < c->n; i++) {
        e[i] = add_part(t, c, i, x, mag_x, &m[i], &l[i], &p.part[i]);
    }
    p.x = op_in(t, "x", x, n_x);
    for (uint32_t i = 0; i < c->n; i++) {
        const size_t n_y = (size_t)c->T * c->N[i];
        if (c->glu && i == 1) {
            p.part[i].y = op_scratch(t, "up", 4ull * n_y);
            continue;
        }
        const double *budget = c->glu ? e[0].size : op_sum_budgets(t, e[i].size, n_y, terms);
        if (c->glu) {
            glu_budget(&e[0], &e[1], n_y, terms);
            ref_geglu(e[0].y, e[0].y, e[1].y, n_y);
        }
        p.part[i].y = op_out(t, "y", NULL, e[i].y, budget, n_y);
    }
    op_run(t, record_group, &p);
}

static const enum keel_dtype types[] = { KEEL_F32,  KEEL_F16,  KEEL_BF16, KEEL_Q4_0, KEEL_Q4_1, KEEL_Q5_0,
                                         KEEL_Q5_1, KEEL_Q8_0, KEEL_Q4_K, KEEL_Q5_K, KEEL_Q6_K };
static const uint32_t tokens[] = { 1, 3, 7, 9, 33 };
static const int ranks[] = { 0, 4, 1, 16, 5 };

// Queries, keys and values, of one type or of two, with and without an adapter.
static void test_parts(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(tokens) : 1); j++) {
            const enum keel_dtype a = types[i];
            struct group_case c = { { a, a, a }, { 256, 100, 65 }, 3, tokens[(i + 2 * j) % 5], 512, ranks[(i + j) % 5], false, false };
            group_case(t, &c);
            c.type[2] = types[(i + 1) % KEEL_COUNT(types)];
            c.n = 2 + i % 2;
            group_case(t, &c);
            c.shards = true;
            group_case(t, &c);
        }
    }
    op_end(t);
}

static void test_glu(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(tokens) : 1); j++) {
            const enum keel_dtype a = types[i];
            const uint32_t N = i % 2 ? 321 : 64;
            struct group_case c = { { a, a }, { N, N }, 2, tokens[(i + j) % 5], 256, ranks[(i + 2 * j) % 5], true, false };
            group_case(t, &c);
            c.type[1] = types[(i + 1) % KEEL_COUNT(types)];
            group_case(t, &c);
        }
    }
    op_end(t);
}

// --- the LoRA products before them ---------------------------------------------------------------

struct down_call {
    struct keel_lora l[KEEL_MAX_LINEAR_PARTS];
    struct keel_span x, h[KEEL_MAX_LINEAR_PARTS];
    uint32_t n, T;
};

static void record_down(keel_recorder *rec, const void *params)
{
    const struct down_call *c = params;
    const struct keel_lora *l[KEEL_MAX_LINEAR_PARTS];
    for (uint32_t i = 0; i < c->n; i++) {
        l[i] = &c->l[i];
    }
    keel_lora_down_group(rec, l, c->n, c->x, c->h, c->T);
}

static void down_case(struct op_test *t, uint32_t T, uint32_t K, const int rank[3], uint32_t n)
{
    struct down_call call = { .n = n, .T = T };
    const size_t n_x = (size_t)T * K;
    op_begin(t, "lora_down_group T=%u K=%u r=%d,%d,%d n=%u", T, K, rank[0], rank[1], rank[2], n);
    const double *x = op_draw_heavy(t, n_x, 1);
    call.x = op_in(t, "x", x, n_x);
    for (uint32_t i = 0; i < n; i++) {
        const size_t n_a = (size_t)rank[i] * K, n_h = (size_t)T * rank[i];
        const double *a = op_draw(t, n_a, 1);
        double *want = op_zeros(t, n_h), *size = op_zeros(t, n_h);
        ref_lora_down(want, x, a, (int)T, (int)K, rank[i]);
        ref_lora_down(size, op_abs(t, x, n_x), op_abs(t, a, n_a), (int)T, (int)K, rank[i]);
        call.l[i] = (struct keel_lora){ .a = op_in(t, "a", a, n_a), .rank = (uint32_t)rank[i], .k = K, .scale = 1 };
        call.h[i] = op_out(t, "h", NULL, want, op_sum_budgets(t, size, n_h, K), n_h);
    }
    op_run(t, record_down, &call);
}

static void test_down(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(tokens); i++) {
        down_case(t, tokens[i], 640, (const int[]){ 16, 16, 16 }, 3);
        down_case(t, tokens[i], 33, (const int[]){ 5, 5, 5 }, 2);
        down_case(t, tokens[i], 65, (const int[]){ 4, 4, 9 }, 3);
    }
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_parts), cmocka_unit_test(test_glu), cmocka_unit_test(test_down) };
    return op_main("op_group", tests);
}
