// SPDX-License-Identifier: MIT
// doctor/cases.c: the cases of each op, with budgets. Sizes are odd on purpose: parts of tiles, of workgroups, of vectors.
// Budgets of products are those of tests/op_test.h; where an op composes several steps, a relative error of 1e-4 stands in: two
// orders above what fp32 gives and far below what a broken kernel does.
#include "cases.h"

#include "ref.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define COARSE 1e-4

// Books a case that ran and says where it was wrong.
static bool booked(struct bed *b, bool ok, uint32_t *n, double *worst, const char *what, int T, int N, int K)
{
    char why[sizeof b->result.why];
    ++*n;
    *worst = KEEL_MAX(*worst, b->result.worst);
    if (!ok) {
        snprintf(why, sizeof why, "%s", b->result.why);
        snprintf(b->result.why, sizeof b->result.why, "%.24s, %d tokens, %d x %d: %.130s", what, T, N, K, why);
    }
    return ok;
}

static double *coarse(struct bed *b, const double *want, size_t n)
{
    double most = 0, *budget = bed_zeros(b, n);
    for (size_t i = 0; i < n; i++) {
        most = KEEL_MAX(most, fabs(want[i]));
    }
    for (size_t i = 0; i < n; i++) {
        budget[i] = COARSE * most + 1e-30;
    }
    return budget;
}

// --- products with weights -----------------------------------------------------------------------

static const enum keel_dtype types[] = { KEEL_Q4_K, KEEL_F32,  KEEL_F16,  KEEL_BF16, KEEL_Q4_0, KEEL_Q4_1,
                                         KEEL_Q5_0, KEEL_Q5_1, KEEL_Q8_0, KEEL_Q5_K, KEEL_Q6_K };

struct weights {
    struct keel_matrix m;
    double *w, *mag;
};

// Begins a case on a random matrix.
static bool begin_product(struct bed *b, struct weights *out, enum keel_dtype type, int T, int N, int K)
{
    bed_begin(b, (uint64_t)T * 7919 + (uint64_t)N * 31 + type);
    const struct keel_dtype_info *info = keel_dtype_info(type);
    const size_t n = (size_t)N * K;
    uint8_t *blocks = bed_bytes(b, n / info->block_elems * info->block_bytes);
    ref_random_blocks(&b->rng, type, blocks, n);
    out->w = bed_zeros(b, n);
    out->mag = bed_zeros(b, n);
    ref_dequant(out->w, out->mag, type, blocks, n);
    keel_status st = keel_matrix_create(&out->m, b->dev, b->heap, type, (uint32_t)N, (uint32_t)K, blocks, NULL);
    st = st == KEEL_OK ? keel_stage_finish(b->dev) : st;
    b->status = b->status == KEEL_OK ? st : b->status;
    if (st != KEEL_OK) {
        snprintf(b->result.why, sizeof b->result.why, "its weights could not be uploaded");
    }
    return st == KEEL_OK;
}

// What rounding may do to n sums of `terms`; a variant that rounds its input may be off by that part of each term too.
static double *budgets(struct bed *b, enum keel_family f, const double *size, size_t n, int terms)
{
    double *budget = bed_sum_budgets(b, size, n, terms);
    const double rounding = f == KEEL_FAMILY_MATVEC ? 0 : keel_variant_rounding(keel_variant_of(b->dev, f));
    for (size_t i = 0; i < n; i++) {
        budget[i] += rounding * size[i];
    }
    return budget;
}

// For the dot variant, which rounds one token's x to 8 bits with a scale for each 32 columns: what is added to its n budgets. W's magnitudes.
static void add_dot_budget(struct bed *b, double *budget, enum keel_dtype type, const double *x, const double *mag, int T, int N, int K)
{
    if (T == 1 && (type == KEEL_Q8_0 || type == KEEL_Q4_0) && keel_variant_of(b->dev, KEEL_FAMILY_MATVEC) == KEEL_VARIANT_DOT) {
        ref_block_rounding(budget, x, mag, N, K, keel_variant_rounding(KEEL_VARIANT_DOT));
    }
}

static void record_linear(keel_recorder *rec, const void *p)
{
    keel_linear(rec, p);
}

static void record_linear_bwd(keel_recorder *rec, const void *p)
{
    keel_linear_bwd(rec, p);
}

static bool linear_case(struct bed *b, enum keel_dtype type, int T, int N, int K, enum bed_fill fill, bool add)
{
    const size_t n_x = (size_t)T * K, n_y = (size_t)T * N;
    struct weights w;
    if (!begin_product(b, &w, type, T, N, K)) {
        return false;
    }
    const double *x = bed_draw(b, n_x, 1, fill), *init = add ? bed_draw(b, n_y, 1, BED_NORMAL) : NULL;
    double *want = add ? bed_copy(b, init, n_y) : bed_zeros(b, n_y), *size = add ? bed_abs(b, init, n_y) : bed_zeros(b, n_y);
    ref_linear(want, x, w.w, T, N, K, add);
    ref_linear(size, bed_abs(b, x, n_x), w.mag, T, N, K, add);
    const enum keel_family f = T < (int)KEEL_MATMUL_TOKENS ? KEEL_FAMILY_MATVEC : KEEL_FAMILY_MATMUL;
    double *budget = budgets(b, f, size, n_y, K);
    add_dot_budget(b, budget, type, x, w.mag, T, N, K);
    const struct keel_linear_params p = { .w = &w.m, .x = bed_in(b, x, n_x), .n_tokens = (uint32_t)T, .add = add,
                                          .y = bed_out(b, init, want, budget, n_y) };
    return bed_run(b, record_linear, &p);
}

static bool linear_bwd_case(struct bed *b, enum keel_dtype type, int T, int N, int K, enum bed_fill fill, bool add)
{
    const size_t n_x = (size_t)T * K, n_y = (size_t)T * N;
    struct weights w;
    if (!begin_product(b, &w, type, T, N, K)) {
        return false;
    }
    const double *dy = bed_draw(b, n_y, 1, fill), *init = add ? bed_draw(b, n_x, 1, BED_NORMAL) : NULL;
    double *want = add ? bed_copy(b, init, n_x) : bed_zeros(b, n_x), *size = add ? bed_abs(b, init, n_x) : bed_zeros(b, n_x);
    ref_linear_bwd(want, dy, w.w, T, N, K, add);
    ref_linear_bwd(size, bed_abs(b, dy, n_y), w.mag, T, N, K, add);
    const struct keel_linear_bwd_params p = { .w = &w.m, .dy = bed_in(b, dy, n_y), .n_tokens = (uint32_t)T, .add = add,
                                              .dx = bed_out(b, init, want, budgets(b, KEEL_FAMILY_MATMUL_BWD, size, n_x, N), n_x) };
    return bed_run(b, record_linear_bwd, &p);
}

typedef bool (*product_fn)(struct bed *b, enum keel_dtype type, int T, int N, int K, enum bed_fill fill, bool add);

// Every type (quick: one) with the tokens in turn, every filling with each.
static bool products(struct bed *b, product_fn run, const int *tokens, uint32_t n_tokens, bool quick, uint32_t *n, double *worst)
{
    static const int outs[] = { 65, 200, 130, 3, 321 };
    for (uint32_t i = 0; i < (quick ? 1 : KEEL_COUNT(types)); i++) {
        const uint32_t block = keel_dtype_info(types[i])->block_elems;
        const int K = block == 1 ? 132 : block == 32 ? 160 : 512;
        for (uint32_t j = 0; j < (quick ? 1 : n_tokens); j++) {
            const int T = tokens[(i + j) % n_tokens], N = outs[(i + 2 * j) % KEEL_COUNT(outs)];
            for (int fill = 0; fill < BED_N_FILLS; fill++) {
                const bool ok = run(b, types[i], T, N, K, (enum bed_fill)fill, fill == BED_OUTLIERS);
                if (!booked(b, ok, n, worst, keel_dtype_info(types[i])->name, T, N, K)) {
                    return false;
                }
            }
        }
    }
    return true;
}

static bool check_matvec(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const int tokens[] = { 1, 3, 7 };
    return products(b, linear_case, tokens, KEEL_COUNT(tokens), quick, n, worst);
}

static bool check_matmul(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const int tokens[] = { 9, 33, 64, 129 };
    return products(b, linear_case, tokens, KEEL_COUNT(tokens), quick, n, worst);
}

static bool check_matmul_bwd(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const int tokens[] = { 9, 1, 33, 66 };
    return products(b, linear_bwd_case, tokens, KEEL_COUNT(tokens), quick, n, worst);
}

// --- LoRA ----------------------------------------------------------------------------------------

enum lora_op { DOWN, UP, BWD_H, BWD_X, BWD_A, BWD_B, N_LORA };
static const char *const lora_names[N_LORA] = { "down", "up", "bwd_h", "bwd_x", "bwd_a", "bwd_b" };

struct lora_call {
    enum lora_op op;
    struct keel_lora l;
    struct keel_span in, in2, out;
    uint32_t T;
};

static void record_lora(keel_recorder *rec, const void *params)
{
    const struct lora_call *c = params;
    switch (c->op) {
    case DOWN: keel_lora_down(rec, &c->l, c->in, c->out, c->T); break;
    case UP: keel_lora_up(rec, &c->l, c->in, c->out, c->T); break;
    case BWD_H: keel_lora_bwd_h(rec, &c->l, c->in, c->out, c->T); break;
    case BWD_X: keel_lora_bwd_x(rec, &c->l, c->in, c->out, c->T); break;
    case BWD_A: keel_lora_bwd_a(rec, &c->l, c->in, c->in2, c->out, c->T); break;
    default: keel_lora_bwd_b(rec, &c->l, c->in, c->in2, c->out, c->T); break;
    }
}

struct lora_size {
    int T, N, K, r;
};

static void lora_reference(enum lora_op op, double *out, const struct lora_size *s, const double *a, const double *m, const double *in,
                           const double *in2)
{
    switch (op) {
    case DOWN: ref_lora_down(out, in, a, s->T, s->K, s->r); break;
    case UP: ref_lora_up(out, in, m, s->T, s->N, s->r, 2); break;
    case BWD_H: ref_lora_bwd_h(out, in, m, s->T, s->N, s->r, 2); break;
    case BWD_X: ref_lora_bwd_x(out, in, a, s->T, s->K, s->r); break;
    case BWD_A: ref_lora_bwd_a(out, in, in2, s->T, s->K, s->r); break;
    default: ref_lora_bwd_b(out, in, in2, s->T, s->N, s->r, 2); break;
    }
}

static bool lora_case(struct bed *b, enum lora_op op, const struct lora_size *s, enum bed_fill fill)
{
    const size_t T = (size_t)s->T, N = (size_t)s->N, K = (size_t)s->K, r = (size_t)s->r;
    const size_t n_in = (op == DOWN ? K : op == BWD_H || op == BWD_B ? N : r) * T, n_in2 = op == BWD_A ? T * K : T * r;
    const size_t n_out = op == DOWN || op == BWD_H ? T * r : op == UP ? T * N : op == BWD_X ? T * K : op == BWD_A ? r * K : N * r;
    const double terms = (double)(op == DOWN ? K : op == BWD_H ? N : op == UP || op == BWD_X ? r : T);
    const bool add = op != DOWN && op != BWD_H;
    bed_begin(b, (uint64_t)op * 101 + T);
    const double *a = bed_draw(b, r * K, 1, BED_NORMAL), *m = bed_draw(b, N * r, 1, BED_NORMAL);
    const double *in = bed_draw(b, n_in, 1, fill), *in2 = bed_draw(b, n_in2, 1, BED_NORMAL);
    const double *init = add ? bed_draw(b, n_out, 1, BED_NORMAL) : NULL;
    double *want = add ? bed_copy(b, init, n_out) : bed_zeros(b, n_out), *size = add ? bed_abs(b, init, n_out) : bed_zeros(b, n_out);
    lora_reference(op, want, s, a, m, in, in2);
    lora_reference(op, size, s, bed_abs(b, a, r * K), bed_abs(b, m, N * r), bed_abs(b, in, n_in), bed_abs(b, in2, n_in2));
    const struct lora_call c = {
        .op = op, .T = (uint32_t)T, .in = bed_in(b, in, n_in), .in2 = bed_in(b, in2, n_in2),
        .l = { .a = bed_in(b, a, r * K), .b = bed_in(b, m, N * r), .rank = (uint32_t)r, .k = (uint32_t)K, .n = (uint32_t)N, .scale = 2 },
        .out = bed_out(b, init, want, bed_sum_budgets(b, size, n_out, terms), n_out),
    };
    return bed_run(b, record_lora, &c);
}

static bool check_lora(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const struct lora_size sizes[] = { { 33, 100, 132, 12 }, { 1, 65, 68, 4 }, { 129, 64, 40, 16 }, { 9, 200, 64, 5 } };
    for (uint32_t i = 0; i < (quick ? 1 : KEEL_COUNT(sizes)); i++) {
        for (int op = 0; op < N_LORA; op++) {
            const bool ok = lora_case(b, (enum lora_op)op, &sizes[i], (enum bed_fill)((i + (uint32_t)op) % BED_N_FILLS));
            if (!booked(b, ok, n, worst, lora_names[op], sizes[i].T, sizes[i].N, sizes[i].K)) {
                return false;
            }
        }
    }
    return true;
}

// --- attention -----------------------------------------------------------------------------------

struct attention {
    int T, H, G, d, S;
    bool all;
    int *lo, *hi;
    uint32_t max_union, max_q_union;
    struct keel_token_span *spans;
    double *q, *k, *v, *o, *p;
};

// Causal with a window of 21 keys, so that rows begin and end everywhere; or every token sees all keys.
static void attention_mask(struct bed *b, struct attention *a)
{
    const int window = a->all ? a->T : 21;
    a->lo = bed_bytes(b, (size_t)a->T * sizeof *a->lo);
    a->hi = bed_bytes(b, (size_t)a->T * sizeof *a->hi);
    a->spans = bed_bytes(b, (size_t)a->T * sizeof *a->spans);
    a->S = KEEL_MIN(a->T, window);
    for (int t = 0; t < a->T; t++) {
        a->lo[t] = KEEL_MAX(0, t + 1 - window);
        a->hi[t] = a->all ? a->T : t + 1;
        a->spans[t] = (struct keel_token_span){ .lo = (uint32_t)a->lo[t], .hi = (uint32_t)a->hi[t], .slot = (uint32_t)t,
                                                .q_lo = a->all ? 0 : (uint32_t)t, .q_hi = (uint32_t)KEEL_MIN(a->T, t + window) };
    }
    a->max_union = a->max_q_union = (uint32_t)KEEL_MIN(a->T, window + KEEL_ATTENTION_GROUP);
}

static struct attention attention_set_up(struct bed *b, int T, int H, int G, int d, bool all)
{
    struct attention a = { .T = T, .H = H, .G = G, .d = d, .all = all };
    const size_t n_q = (size_t)T * H * d, n_kv = (size_t)T * G * d;
    bed_begin(b, (uint64_t)T * 13 + (uint64_t)d);
    attention_mask(b, &a);
    a.q = bed_draw(b, n_q, 2, BED_NORMAL);
    a.k = bed_draw(b, n_kv, 2, BED_NORMAL);
    a.v = bed_draw(b, n_kv, 1, BED_OUTLIERS);
    a.o = bed_zeros(b, n_q);
    a.p = bed_zeros(b, (size_t)H * T * a.S);
    ref_attention(a.o, a.p, a.q, a.k, a.v, (struct ref_mask){ a.lo, a.hi }, T, H, G, d, T, a.S, 1 / sqrt((double)d));
    return a;
}

static void record_attention(keel_recorder *rec, const void *p)
{
    keel_attention(rec, p);
}

static void record_attention_bwd(keel_recorder *rec, const void *p)
{
    keel_attention_bwd(rec, p);
}

// Keys or values of a set-up as the device gets them.
static struct keel_span attention_kv(struct bed *b, enum keel_dtype type, double *x, size_t heads, int d)
{
    if (type == KEEL_F32) {
        return bed_in(b, x, heads * d);
    }
    const size_t words = heads * ref_kv_words(type, d);
    uint32_t *packed = bed_bytes(b, 4 * words);
    ref_kv_pack(packed, x, type, heads, d);
    return bed_words(b, packed, words);
}

static bool attention_case(struct bed *b, enum keel_dtype type, int T, int H, int G, int d, bool all)
{
    struct attention a = attention_set_up(b, T, H, G, d, all);
    const size_t n_q = (size_t)T * H * d, kv_heads = (size_t)T * G;
    const struct keel_span k = attention_kv(b, type, a.k, kv_heads, d), v = attention_kv(b, type, a.v, kv_heads, d);
    ref_attention(a.o, a.p, a.q, a.k, a.v, (struct ref_mask){ a.lo, a.hi }, T, H, G, d, T, a.S, 1 / sqrt((double)d)); // of what is packed
    const struct keel_attention_params p = {
        .q = bed_in(b, a.q, n_q), .k = k, .v = v, .type = type, .spans = bed_words(b, a.spans, (size_t)T * 8),
        .o = bed_out(b, NULL, a.o, coarse(b, a.o, n_q), n_q),
        .p = bed_scratch(b, keel_attention_scratch((uint32_t)T, (uint32_t)H, (uint32_t)a.S)), .n_tokens = (uint32_t)T,
        .n_heads = (uint32_t)H, .n_kv_heads = (uint32_t)G, .head_dim = (uint32_t)d, .kv_rows = (uint32_t)T, .max_span = (uint32_t)a.S,
        .max_union = a.max_union, .scale = 1 / sqrtf((float)d), .all = all,
    };
    return bed_run(b, record_attention, &p);
}

static bool attention_bwd_case(struct bed *b, int T, int H, int G, int d)
{
    const struct attention a = attention_set_up(b, T, H, G, d, false);
    const size_t n_q = (size_t)T * H * d, n_kv = (size_t)T * G * d, n_p = (size_t)H * T * a.S;
    const double *d_o = bed_draw(b, n_q, 1, BED_NORMAL);
    double *dq = bed_zeros(b, n_q), *dk = bed_zeros(b, n_kv), *dv = bed_zeros(b, n_kv);
    ref_attention_bwd(dq, dk, dv, d_o, a.p, a.q, a.k, a.v, (struct ref_mask){ a.lo, a.hi }, T, H, G, d, T, a.S, 1 / sqrt((double)d));
    const struct keel_attention_bwd_params p = {
        .q = bed_in(b, a.q, n_q), .k = bed_in(b, a.k, n_kv), .v = bed_in(b, a.v, n_kv), .spans = bed_words(b, a.spans, (size_t)T * 8),
        .p = bed_in(b, a.p, n_p), .d_o = bed_in(b, d_o, n_q), .dq = bed_out(b, NULL, dq, coarse(b, dq, n_q), n_q),
        .dk = bed_out(b, NULL, dk, coarse(b, dk, n_kv), n_kv), .dv = bed_out(b, NULL, dv, coarse(b, dv, n_kv), n_kv),
        .ds = bed_scratch(b, 4ull * n_p), .n_tokens = (uint32_t)T, .n_heads = (uint32_t)H, .n_kv_heads = (uint32_t)G,
        .head_dim = (uint32_t)d, .max_span = (uint32_t)a.S, .max_union = a.max_union, .max_q_union = a.max_q_union,
        .scale = 1 / sqrtf((float)d),
    };
    return bed_run(b, record_attention_bwd, &p);
}

static bool check_attention(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const enum keel_dtype caches[] = { KEEL_F32, KEEL_F16, KEEL_Q8_0 };
    static const struct {
        int T, H, G, d;
    } sizes[] = { { 33, 4, 2, 64 }, { 1, 4, 1, 256 }, { 70, 2, 1, 80 }, { 17, 3, 3, 24 } };
    for (uint32_t i = 0; i < (quick ? 1 : KEEL_COUNT(sizes)); i++) {
        if (!booked(b, attention_bwd_case(b, sizes[i].T, sizes[i].H, sizes[i].G, sizes[i].d), n, worst, "backward", sizes[i].T, sizes[i].H,
                    sizes[i].d)) {
            return false;
        }
        for (uint32_t k = 0; k < (quick ? 1 : KEEL_COUNT(caches)); k++) { // few runs have packed caches
            const bool ok = attention_case(b, caches[k], sizes[i].T, sizes[i].H, sizes[i].G, sizes[i].d, false);
            if (!booked(b, ok, n, worst, keel_dtype_info(caches[k])->name, sizes[i].T, sizes[i].H, sizes[i].d)) {
                return false;
            }
        }
    }
    return true;
}

static bool check_patches(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const struct {
        int T, H, d;
    } sizes[] = { { 36, 2, 72 }, { 76, 1, 64 }, { 16, 3, 24 } };
    for (uint32_t i = 0; i < (quick ? 1 : KEEL_COUNT(sizes)); i++) {
        const bool ok = attention_case(b, KEEL_F32, sizes[i].T, sizes[i].H, sizes[i].H, sizes[i].d, true);
        if (!booked(b, ok, n, worst, "forward", sizes[i].T, sizes[i].H, sizes[i].d)) {
            return false;
        }
    }
    return true;
}

// --- ops with one variant ------------------------------------------------------------------------

static void record_rmsnorm(keel_recorder *rec, const void *p)
{
    keel_rmsnorm(rec, p);
}

static void record_rmsnorm_bwd(keel_recorder *rec, const void *p)
{
    keel_rmsnorm_bwd(rec, p);
}

static bool rmsnorm_case(struct bed *b, int T, int D, bool back)
{
    const size_t n = (size_t)T * D;
    bed_begin(b, (uint64_t)D);
    const double *x = bed_draw(b, n, 1, BED_OUTLIERS), *w = bed_draw(b, (size_t)D, 1, BED_NORMAL), *dy = bed_draw(b, n, 1, BED_NORMAL);
    double *want = bed_zeros(b, n);
    if (back) {
        ref_rmsnorm_bwd(want, x, w, dy, T, D, 1e-6, false);
        const struct keel_rmsnorm_bwd_params p = { .x = bed_in(b, x, n), .w = bed_in(b, w, (size_t)D), .dy = bed_in(b, dy, n), .eps = 1e-6f,
                                                   .dx = bed_out(b, NULL, want, coarse(b, want, n), n), .n_rows = (uint32_t)T,
                                                   .width = (uint32_t)D };
        return bed_run(b, record_rmsnorm_bwd, &p);
    }
    ref_rmsnorm(want, x, w, dy, T, D, 1e-6);
    const struct keel_rmsnorm_params p = { .x = bed_in(b, x, n), .w = bed_in(b, w, (size_t)D), .residual = bed_in(b, dy, n), .eps = 1e-6f,
                                           .y = bed_out(b, NULL, want, coarse(b, want, n), n), .n_rows = (uint32_t)T,
                                           .width = (uint32_t)D };
    return bed_run(b, record_rmsnorm, &p);
}

static bool check_rmsnorm(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const int widths[] = { 131, 640, 3, 1152 };
    for (uint32_t i = 0; i < (quick ? 1 : KEEL_COUNT(widths)); i++) {
        for (int back = 0; back < 2; back++) {
            if (!booked(b, rmsnorm_case(b, 5, widths[i], back), n, worst, back ? "backward" : "forward", 5, 1, widths[i])) {
                return false;
            }
        }
    }
    return true;
}

static void record_xent(keel_recorder *rec, const void *p)
{
    keel_xent(rec, p);
}

static bool check_xent(struct bed *b, bool quick, uint32_t *n, double *worst)
{
    static const int vocabs[] = { 777, 4099, 65 };
    const int C = 3;
    for (uint32_t i = 0; i < (quick ? 1 : KEEL_COUNT(vocabs)); i++) {
        const int V = vocabs[i];
        bed_begin(b, (uint64_t)V);
        const double *logits = bed_draw(b, (size_t)C * V, 5, BED_NORMAL);
        const uint32_t targets[] = { 0, (uint32_t)V - 1, (uint32_t)V / 2 };
        double *want = bed_zeros(b, (size_t)C * 4);
        ref_xent(want, logits, targets, C, V);
        const struct keel_xent_params p = {
            .logits = bed_in(b, logits, (size_t)C * V), .targets = bed_words(b, targets, (size_t)C),
            .stats = bed_out(b, NULL, want, coarse(b, want, (size_t)C * 4), (size_t)C * 4),
            .partial = bed_scratch(b, keel_xent_scratch((uint32_t)C, (uint32_t)V)), .n_rows = (uint32_t)C, .vocab = (uint32_t)V,
        };
        if (!booked(b, bed_run(b, record_xent, &p), n, worst, "rows", C, 1, V)) {
            return false;
        }
    }
    return true;
}

const struct check *doctor_checks(size_t *n)
{
    static const struct check checks[] = {
        { "linear, few tokens", KEEL_FAMILY_MATVEC, check_matvec },
        { "linear", KEEL_FAMILY_MATMUL, check_matmul },
        { "linear backward", KEEL_FAMILY_MATMUL_BWD, check_matmul_bwd },
        { "LoRA", KEEL_FAMILY_LORA, check_lora },
        { "attention", KEEL_FAMILY_ATTENTION, check_attention },
        { "attention of patches", KEEL_FAMILY_PATCHES, check_patches },
        { "rmsnorm", -1, check_rmsnorm },
        { "cross-entropy", -1, check_xent },
    };
    *n = KEEL_COUNT(checks);
    return checks;
}
