// SPDX-License-Identifier: MIT
// tests/op_attention.c: grouped attention over ranges of keys, forward and backward, under every mask of Gemma 3.
// Tolerances: op_sum_budget() for each product; what a score is off by is a relative error of its probability, to which comes
// Vulkan's exp, 3 + 2|x| ulp. Errors of an inner step are carried through the outer sum in absolute value. The backward gets the
// reference's probabilities, so that only its own errors count.
#include "op_test.h"

enum mask_kind { CAUSAL, WINDOW, PACKED, IMAGE, RING, ALL, N_MASKS };
static const char *const mask_names[] = { "causal", "window", "packed", "image", "ring", "all" };

struct att_case {
    enum mask_kind mask;
    int T, H, G, d;
    int chunk;  // tokens that the scratch holds; 0: as many as keel_attention_scratch() says
    int slack;  // max_span and so on are so much larger than need be
    int first;  // RING only: position of token 0, with R cache rows
    int R;
    int split; // forward: the tokens before this one and the others in a call each
    enum keel_dtype type; // of keys and values
};

// What both directions need of a case.
struct att_setup {
    int R, S; // cache rows, columns of P
    size_t n_q, n_kv, n_p;
    int *lo, *hi;
    struct keel_token_span *spans;
    uint32_t max_union, max_q_union;
    double scale;
    double *q, *k, *v, *o, *p; // o and p by the reference, from k and v as the cache holds them
    uint32_t *k_words, *v_words; // packed, unless they are f32
};

static void record_fwd(keel_recorder *rec, const void *p)
{
    keel_attention(rec, p);
}

static void record_fwd_split(keel_recorder *rec, const void *p)
{
    const struct keel_attention_params *call = p;
    keel_attention(rec, &call[0]);
    keel_attention(rec, &call[1]);
}

static void record_bwd(keel_recorder *rec, const void *p)
{
    keel_attention_bwd(rec, p);
}

// --- masks ---------------------------------------------------------------------------------------

static void fill_mask(struct att_setup *s, const struct att_case *c)
{
    const int T = c->T, window = c->mask == RING ? c->R - T + 1 : 5;
    int segment = 0, length = 1; // PACKED: segments of 1, 3, 5, 7, 1, ... tokens
    for (int t = 0; t < T; t++) {
        const int at = c->mask == RING ? c->first + t : t;
        if (t == segment + length) {
            segment = t;
            length = length == 7 ? 1 : length + 2;
        }
        s->lo[t] = c->mask == PACKED ? segment : c->mask == CAUSAL || c->mask == IMAGE ? 0 : KEEL_MAX(0, at + 1 - window);
        s->hi[t] = at + 1;
    }
    for (int t = 0; t < T && c->mask == ALL; t++) {
        s->lo[t] = 0;
        s->hi[t] = T;
    }
    if (c->mask == IMAGE) { // tokens of the middle see all of it
        const int begin = T / 4, end = KEEL_MAX(begin + 1, 3 * T / 4);
        for (int t = begin; t < end; t++) {
            s->hi[t] = end;
        }
    }
}

static void fill_spans(struct op_test *t, struct att_setup *s, const struct att_case *c)
{
    const int T = c->T, group = KEEL_ATTENTION_GROUP;
    s->lo = op_bytes(t, (size_t)T * sizeof *s->lo);
    s->hi = op_bytes(t, (size_t)T * sizeof *s->hi);
    s->spans = op_bytes(t, (size_t)T * sizeof *s->spans);
    fill_mask(s, c);
    for (int i = 0; i < T; i++) {
        struct keel_token_span *span = &s->spans[i];
        *span = (struct keel_token_span){ .lo = (uint32_t)s->lo[i], .hi = (uint32_t)s->hi[i], .slot = (uint32_t)(c->first + i) };
        int q_lo = T, q_hi = 0;
        for (int j = 0; j < T; j++) {
            if (s->lo[j] <= c->first + i && c->first + i < s->hi[j]) {
                q_lo = KEEL_MIN(q_lo, j);
                q_hi = j + 1;
            }
        }
        span->q_lo = (uint32_t)q_lo;
        span->q_hi = (uint32_t)q_hi;
        s->S = KEEL_MAX(s->S, s->hi[i] - s->lo[i]);
    }
    for (int i = 0; i < T; i += group) {
        uint32_t lo = UINT32_MAX, hi = 0, q_lo = UINT32_MAX, q_hi = 0;
        for (int j = i; j < KEEL_MIN(i + group, T); j++) {
            lo = KEEL_MIN(lo, s->spans[j].lo);
            hi = KEEL_MAX(hi, s->spans[j].hi);
            q_lo = KEEL_MIN(q_lo, s->spans[j].q_lo);
            q_hi = KEEL_MAX(q_hi, s->spans[j].q_hi);
        }
        s->max_union = KEEL_MAX(s->max_union, hi - lo);
        s->max_q_union = KEEL_MAX(s->max_q_union, q_hi - q_lo);
    }
    s->S += c->slack;
    s->max_union += (uint32_t)c->slack;
    s->max_q_union += (uint32_t)c->slack;
}

static struct att_setup set_up(struct op_test *t, const struct att_case *c, const char *what)
{
    const struct keel_dtype_info *type = keel_dtype_info(c->type);
    op_begin(t, "%s %s T=%d H=%d G=%d d=%d chunk=%d slack=%d first=%d R=%d split=%d %s", what, mask_names[c->mask], c->T, c->H, c->G,
             c->d, c->chunk, c->slack, c->first, c->R, c->split, type->name);
    struct att_setup s = { .R = c->R ? c->R : c->T, .scale = (double)(1 / sqrtf((float)c->d)) };
    fill_spans(t, &s, c);
    s.n_q = (size_t)c->T * c->H * c->d;
    s.n_kv = (size_t)s.R * c->G * c->d;
    s.n_p = (size_t)c->H * c->T * s.S;
    s.q = op_draw(t, s.n_q, 2); // scores of order 4: probabilities from 1 down to 1e-6
    s.k = op_draw(t, s.n_kv, 2);
    s.v = op_draw(t, s.n_kv, 1);
    if (c->type != KEEL_F32) {
        const size_t heads = (size_t)s.R * c->G, bytes = 4 * heads * ref_kv_words(c->type, c->d);
        s.k_words = op_bytes(t, bytes);
        s.v_words = op_bytes(t, bytes);
        ref_kv_pack(s.k_words, s.k, c->type, heads, c->d);
        ref_kv_pack(s.v_words, s.v, c->type, heads, c->d);
    }
    s.o = op_zeros(t, s.n_q);
    s.p = op_zeros(t, s.n_p);
    ref_attention(s.o, s.p, s.q, s.k, s.v, (struct ref_mask){ s.lo, s.hi }, c->T, c->H, c->G, c->d, s.R, s.S, s.scale);
    return s;
}

static struct keel_span kv_in(struct op_test *t, const struct att_setup *s, const struct att_case *c, const char *name, const double *x,
                              const uint32_t *words)
{
    return words ? op_in_words(t, name, words, (size_t)s->R * c->G * ref_kv_words(c->type, c->d)) : op_in(t, name, x, s->n_kv);
}

static const double *kv_row(const struct att_setup *s, const struct att_case *c, const double *kv, int t, int h, int j)
{
    return kv + ((size_t)((s->lo[t] + j) % s->R) * c->G + h / (c->H / c->G)) * c->d;
}

static double dot_size(const double *a, const double *b, int d)
{
    double size = 0;
    for (int i = 0; i < d; i++) {
        size += fabs(a[i] * b[i]);
    }
    return size;
}

// --- forward -------------------------------------------------------------------------------------

// Budget of one row of probabilities, n keys.
static void p_budget(double *budget, const struct att_setup *s, const struct att_case *c, int t, int h)
{
    const int n = s->hi[t] - s->lo[t];
    const double *q = s->q + ((size_t)t * c->H + h) * c->d, *p = s->p + ((size_t)h * c->T + t) * s->S;
    double best = 0, mean = 0;
    for (int j = 0; j < n; j++) {
        best = fmax(best, p[j]);
    }
    for (int j = 0; j < n; j++) {
        const double x = -log(fmax(p[j], 1e-37) / best);
        budget[j] = op_sum_budget(s->scale * dot_size(q, kv_row(s, c, s->k, t, h, j), c->d), c->d) +
                    2 * OP_EPS * (3 + 2 * x);
        mean += p[j] * budget[j];
    }
    for (int j = 0; j < n; j++) {
        budget[j] = p[j] * (budget[j] + mean) + op_sum_budget(p[j], n);
    }
}

// Fails the case unless P is the reference's where keys are seen.
static void check_p(struct op_test *t, const struct att_setup *s, const struct att_case *c, const double *got,
                    const double *budget)
{
    for (int h = 0; h < c->H; h++) {
        for (int i = 0; i < c->T; i++) {
            for (int j = 0; j < s->hi[i] - s->lo[i]; j++) {
                const size_t at = ((size_t)h * c->T + i) * s->S + j;
                if (!(fabs(got[at] - s->p[at]) <= budget[at])) {
                    op_fail(t, "p[h %d, t %d, key %d]: got %.9g, want %.9g", h, i, j, got[at], s->p[at]);
                    return;
                }
            }
        }
    }
}

static void fwd_case(struct op_test *t, const struct att_case *c)
{
    const struct att_setup s = set_up(t, c, "attention");
    if (op_left_out(t)) {
        return;
    }
    double *budget = op_zeros(t, s.n_q), *budget_p = op_zeros(t, s.n_p);
    for (int h = 0; h < c->H; h++) {
        for (int i = 0; i < c->T; i++) {
            const size_t row = ((size_t)h * c->T + i) * s.S, out = ((size_t)i * c->H + h) * c->d;
            const int n = s.hi[i] - s.lo[i];
            double *bp = budget_p + row;
            p_budget(bp, &s, c, i, h);
            for (int j = 0; j < n; j++) {
                const double *v = kv_row(&s, c, s.v, i, h, j), worst = bp[j] + op_sum_budget(s.p[row + j], n);
                for (int e = 0; e < c->d; e++) {
                    budget[out + e] += worst * fabs(v[e]);
                }
            }
        }
    }
    const uint64_t row_bytes = 4ull * c->H * s.S;
    const uint64_t bytes = c->chunk ? row_bytes * c->chunk
                                    : keel_attention_scratch((uint32_t)c->T, (uint32_t)c->H, (uint32_t)s.S);
    const struct keel_attention_params p = {
        .q = op_in(t, "q", s.q, s.n_q), .k = kv_in(t, &s, c, "k", s.k, s.k_words), .v = kv_in(t, &s, c, "v", s.v, s.v_words),
        .spans = op_in_words(t, "spans", s.spans, (size_t)c->T * 8), .o = op_out(t, "o", NULL, s.o, budget, s.n_q),
        .p = op_scratch(t, "p", bytes), .n_tokens = (uint32_t)c->T, .n_heads = (uint32_t)c->H, .n_kv_heads = (uint32_t)c->G,
        .head_dim = (uint32_t)c->d, .kv_rows = (uint32_t)s.R, .max_span = (uint32_t)s.S, .max_union = s.max_union,
        .type = c->type, .scale = (float)s.scale, .all = c->mask == ALL,
    };
    if (c->split > 0) {
        struct keel_attention_params call[2] = { p, p };
        call[0].n_tokens = call[1].first = (uint32_t)c->split;
        call[1].n_tokens = (uint32_t)(c->T - c->split);
        call[1].max_union *= 2; // its groups of tokens are others
        op_run(t, record_fwd_split, call);
        return;
    }
    op_run(t, record_fwd, &p);
    if (c->chunk == 0) {
        check_p(t, &s, c, op_result(t, p.p), budget_p);
    }
}

// --- backward ------------------------------------------------------------------------------------

struct bwd_want {
    double *dq, *dk, *dv;       // by the reference
    double *b_dq, *b_dk, *b_dv; // budgets
    double *ds, *b_ds;          // of the row at hand, [S]
};

// ds = p · (dp - Σ p dp) and its budget for one row; p came in rounded to f32.
static void ds_row(struct bwd_want *w, const struct att_setup *s, const struct att_case *c, const double *d_o, int t, int h)
{
    const int n = s->hi[t] - s->lo[t];
    const double *p = s->p + ((size_t)h * c->T + t) * s->S;
    double mean = 0, size = 0, b_mean = 0;
    for (int j = 0; j < n; j++) {
        const double *v = kv_row(s, c, s->v, t, h, j);
        w->ds[j] = 0;
        for (int e = 0; e < c->d; e++) {
            w->ds[j] += d_o[e] * v[e];
        }
        w->b_ds[j] = op_sum_budget(dot_size(d_o, v, c->d), c->d);
        mean += p[j] * w->ds[j];
        size += p[j] * fabs(w->ds[j]);
        b_mean += p[j] * w->b_ds[j];
    }
    b_mean += op_sum_budget(size, n);
    for (int j = 0; j < n; j++) {
        w->b_ds[j] = p[j] * (w->b_ds[j] + b_mean + 4 * OP_EPS * (fabs(w->ds[j]) + fabs(mean)));
        w->ds[j] = p[j] * (w->ds[j] - mean);
    }
}

static void bwd_budgets(struct bwd_want *w, const struct att_setup *s, const struct att_case *c, const double *d_o)
{
    const int per = c->H / c->G;
    for (int h = 0; h < c->H; h++) {
        for (int t = 0; t < c->T; t++) {
            const size_t at = ((size_t)t * c->H + h) * c->d;
            const double *p = s->p + ((size_t)h * c->T + t) * s->S;
            ds_row(w, s, c, d_o + at, t, h);
            for (int j = 0; j < s->hi[t] - s->lo[t]; j++) {
                const size_t key = ((size_t)(s->lo[t] + j) * c->G + h / per) * c->d;
                const double terms = (double)c->T * per; // tokens that may see a key; keys that a token may see
                const double b_ds = s->scale * (w->b_ds[j] + op_sum_budget(fabs(w->ds[j]), terms));
                const double b_p = OP_EPS * p[j] + op_sum_budget(p[j], terms);
                for (int e = 0; e < c->d; e++) {
                    w->b_dq[at + e] += b_ds * fabs(s->k[key + e]);
                    w->b_dk[key + e] += b_ds * fabs(s->q[at + e]);
                    w->b_dv[key + e] += b_p * fabs(d_o[at + e]);
                }
            }
        }
    }
}

// P as the device gets it: the reference's, and NaN where no key is seen.
static double *p_with_holes(struct op_test *t, const struct att_setup *s, const struct att_case *c)
{
    double *p = op_copy(t, s->p, s->n_p);
    for (size_t row = 0; row < (size_t)c->H * c->T; row++) {
        for (int j = s->hi[row % c->T] - s->lo[row % c->T]; j < s->S; j++) {
            p[row * s->S + j] = NAN;
        }
    }
    return p;
}

static void bwd_case(struct op_test *t, const struct att_case *c)
{
    const struct att_setup s = set_up(t, c, "attention_bwd");
    if (op_left_out(t)) {
        return;
    }
    const double *d_o = op_draw(t, s.n_q, 1);
    struct bwd_want w = { op_zeros(t, s.n_q), op_zeros(t, s.n_kv), op_zeros(t, s.n_kv),
                          op_zeros(t, s.n_q), op_zeros(t, s.n_kv), op_zeros(t, s.n_kv),
                          op_zeros(t, (size_t)s.S), op_zeros(t, (size_t)s.S) };
    ref_attention_bwd(w.dq, w.dk, w.dv, d_o, s.p, s.q, s.k, s.v, (struct ref_mask){ s.lo, s.hi }, c->T, c->H, c->G, c->d, s.R,
                      s.S, s.scale);
    bwd_budgets(&w, &s, c, d_o);
    // In chunks probabilities are computed again, from scores of d products: their error of up to some 600 roundings (p_budget())
    // stands against the 8 and more that the budgets hold.
    for (size_t i = 0; c->chunk && i < s.n_q; i++) {
        w.b_dq[i] *= 150;
    }
    for (size_t i = 0; c->chunk && i < s.n_kv; i++) {
        w.b_dk[i] *= 150;
        w.b_dv[i] *= 150;
    }
    const uint64_t p_bytes = 4ull * c->H * s.S * c->chunk;
    const struct keel_attention_bwd_params p = {
        .q = op_in(t, "q", s.q, s.n_q), .k = op_in(t, "k", s.k, s.n_kv), .v = op_in(t, "v", s.v, s.n_kv),
        .spans = op_in_words(t, "spans", s.spans, (size_t)c->T * 8), .p = c->chunk ? op_scratch(t, "p", p_bytes) : op_in(t, "p", p_with_holes(t, &s, c), s.n_p),
        .d_o = op_in(t, "d_o", d_o, s.n_q), .dq = op_out(t, "dq", NULL, w.dq, w.b_dq, s.n_q),
        .dk = op_out(t, "dk", NULL, w.dk, w.b_dk, s.n_kv), .dv = op_out(t, "dv", NULL, w.dv, w.b_dv, s.n_kv),
        .ds = op_scratch(t, "ds", c->chunk ? p_bytes : 4ull * s.n_p), .n_tokens = (uint32_t)c->T, .n_heads = (uint32_t)c->H,
        .n_kv_heads = (uint32_t)c->G, .head_dim = (uint32_t)c->d, .max_span = (uint32_t)s.S, .max_union = s.max_union,
        .max_q_union = s.max_q_union, .scale = (float)s.scale,
    };
    op_run(t, record_bwd, &p);
}

// --- cases ---------------------------------------------------------------------------------------

static const int tokens[] = { 1, 2, 3, 4, 5, 8, 9, 17, 33, 70 };
static const int dims[] = { 16, 24, 64, 80, 256 };
static const struct heads {
    int H, G;
} heads[] = { { 4, 1 }, { 1, 1 }, { 2, 1 }, { 3, 3 }, { 4, 2 }, { 8, 2 } };

// Every T with every mask, d and heads along; with KEEL_TEST_FULL every d with every heads as well.
static void each_own_case(struct op_test *t, void (*run)(struct op_test *, const struct att_case *))
{
    for (int mask = 0; mask < RING; mask++) {
        for (size_t i = 0; i < KEEL_COUNT(tokens); i++) {
            for (size_t j = 0; j < (op_full() ? KEEL_COUNT(dims) * KEEL_COUNT(heads) : 1); j++) {
                const struct heads hd = heads[(i + (size_t)mask + j / KEEL_COUNT(dims)) % KEEL_COUNT(heads)];
                const int d = dims[(i + i / KEEL_COUNT(dims) + 2 * (size_t)mask + j) % KEEL_COUNT(dims)];
                run(t, &(struct att_case){ .mask = (enum mask_kind)mask, .T = tokens[i], .H = hd.H, .G = hd.G, .d = d,
                                           .slack = i % 3 == 2 ? 3 : 0 });
            }
        }
    }
}

static void test_fwd(void **state)
{
    struct op_test *t = *state;
    each_own_case(t, fwd_case);
    op_end(t);
}

static void test_bwd(void **state)
{
    struct op_test *t = *state;
    each_own_case(t, bwd_case);
    op_end(t);
}

// Probabilities that do not fit: recomputed chunk by chunk, keys summed over the chunks.
static void test_bwd_chunks(void **state)
{
    struct op_test *t = *state;
    for (int mask = 0; mask < RING; mask++) {
        bwd_case(t, &(struct att_case){ .mask = (enum mask_kind)mask, .T = 33, .H = 4, .G = 2, .d = 24, .chunk = 8 });
        bwd_case(t, &(struct att_case){ .mask = (enum mask_kind)mask, .T = 9, .H = 3, .G = 3, .d = 72, .chunk = 4 });
    }
    op_end(t);
}

// Decode and prefill against a ring: before it is full, when it wraps inside the batch, after many turns.
static void test_ring(void **state)
{
    struct op_test *t = *state;
    const int batches[] = { 1, 1, 3, 4, 9, 17 }, rows[] = { 8, 65, 7, 64, 33, 130 };
    for (size_t i = 0; i < KEEL_COUNT(batches); i++) {
        const int R = rows[i], T = batches[i], firsts[] = { 0, 2, R - T / 2 - 1, R, 5 * R + 3, 1000003 };
        for (size_t j = 0; j < KEEL_COUNT(firsts); j++) {
            const struct heads hd = heads[(i + j) % KEEL_COUNT(heads)];
            fwd_case(t, &(struct att_case){ .mask = RING, .T = T, .H = hd.H, .G = hd.G, .d = dims[(i + 2 * j) % KEEL_COUNT(dims)],
                                            .first = firsts[j], .R = R, .slack = (int)(j % 2) });
        }
    }
    op_end(t);
}

// Packed keys and values. The reference gets what the words stand for, so budgets are those of f32: only sums differ, and the product
// of a scale and a code, which is one more rounding than op_sum_budget() has to spare.
static void test_packed(void **state)
{
    struct op_test *t = *state;
    const enum keel_dtype types[] = { KEEL_F16, KEEL_Q8_0 };
    const int all_dims[] = { 16, 24, 64, 80, 256, 250 };
    for (size_t i = 0; i < KEEL_COUNT(tokens) * KEEL_COUNT(types); i++) {
        for (size_t j = 0; j < (op_full() ? KEEL_COUNT(all_dims) : 2); j++) {
            const struct heads hd = heads[(i / 2 + j) % KEEL_COUNT(heads)];
            struct att_case c = { .mask = (enum mask_kind)((i / 2 + j) % N_MASKS), .T = tokens[i / 2], .H = hd.H, .G = hd.G,
                                  .d = all_dims[(i / 2 + 3 * j) % KEEL_COUNT(all_dims)], .type = types[i % 2] };
            if (c.mask == RING) {
                c.R = c.T + 7;
                c.first = 5 * c.R - 2;
            }
            fwd_case(t, &c);
            c.chunk = 4;
            if (c.T > 4) {
                fwd_case(t, &c);
            }
        }
    }
    op_end(t);
}

// Scratch for fewer tokens than there are, also for a number that is no multiple of the group.
static void test_chunks(void **state)
{
    struct op_test *t = *state;
    const int counts[] = { 5, 17, 33, 70 }, chunks[] = { 4, 6, 8, 13 };
    for (size_t i = 0; i < KEEL_COUNT(counts); i++) {
        for (size_t j = 0; j < KEEL_COUNT(chunks); j++) {
            const struct heads hd = heads[(i + j) % KEEL_COUNT(heads)];
            struct att_case c = { .mask = (enum mask_kind)((i + j) % RING), .T = counts[i], .H = hd.H, .G = hd.G,
                                  .d = dims[(i + 3 * j) % KEEL_COUNT(dims)], .chunk = chunks[j] };
            if (chunks[j] >= counts[i]) {
                continue;
            }
            fwd_case(t, &c);
            c.mask = RING;
            c.R = c.T + 10;
            c.first = 2 * c.R - 3;
            fwd_case(t, &c);
        }
    }
    op_begin(t, "attention scratch");
    assert_int_equal(keel_attention_scratch(5, 3, 7), 5 * 3 * 7 * 4); // all tokens
    assert_true(keel_attention_scratch(100000, 8, 100000) >= 4ull * 4 * 8 * 100000); // at least one group
    assert_true(keel_attention_scratch(3, 8, 4000000) >= 3ull * 4 * 8 * 4000000);
    op_end(t);
}

// Groups of tokens that begin anywhere, as sequences that are continued together do: nothing may be bound from there on.
static void test_split(void **state)
{
    struct op_test *t = *state;
    static const int splits[] = { 1, 2, 7, 18 };
    for (int mask = 0; mask < N_MASKS; mask++) {
        for (size_t i = 0; i < KEEL_COUNT(splits); i++) {
            struct att_case c = { .mask = (enum mask_kind)mask, .T = 20, .H = 2, .G = 1, .d = 12, .split = splits[i], .chunk = i == 2 ? 4 : 0 };
            if (mask == RING) {
                c.R = 30;
                c.first = 2 * c.R - 3;
            }
            fwd_case(t, &c);
        }
    }
    op_end(t);
}

// Patches of an image: heads and numbers of keys that the faster kernels take and some that they do not, more tokens than eight
// lanes work on, scratch for some of them.
static void test_all(void **state)
{
    struct op_test *t = *state;
    const struct att_case cases[] = {
        { .T = 4, .H = 1, .G = 1, .d = 8 },    { .T = 36, .H = 3, .G = 3, .d = 72 },  { .T = 100, .H = 2, .G = 1, .d = 24 },
        { .T = 52, .H = 2, .G = 2, .d = 256 }, { .T = 300, .H = 2, .G = 2, .d = 40 }, { .T = 33, .H = 2, .G = 2, .d = 72 },
        { .T = 64, .H = 2, .G = 2, .d = 12 },  { .T = 144, .H = 2, .G = 2, .d = 72, .chunk = 20 },
    };
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        struct att_case c = cases[i];
        c.mask = ALL;
        fwd_case(t, &c);
    }
    op_end(t);
}

// --- slopes --------------------------------------------------------------------------------------

struct both {
    struct keel_attention_params f;
    struct keel_attention_bwd_params b;
};

static void record_both(keel_recorder *rec, const void *p)
{
    const struct both *c = p;
    keel_attention(rec, &c->f);
    keel_attention_bwd(rec, &c->b);
}

static void record_both_fwd(keel_recorder *rec, const void *p)
{
    keel_attention(rec, &((const struct both *)p)->f);
}

// A step of 0.01 moves scores by about 0.02, so truncation is about 1e-4 of the slope, rounding of the loss as much; 5e-3.
static void test_slope(void **state)
{
    struct op_test *t = *state;
    for (int mask = 0; mask < RING; mask++) {
        const struct att_case c = { .mask = (enum mask_kind)mask, .T = 6, .H = 4, .G = 2, .d = 24 };
        const struct att_setup s = set_up(t, &c, "attention slope");
        if (op_left_out(t)) {
            continue;
        }
        const double *weights = op_draw(t, s.n_q, 1);
        struct both p = { .f = { .q = op_in(t, "q", s.q, s.n_q), .k = op_in(t, "k", s.k, s.n_kv),
                                 .v = op_in(t, "v", s.v, s.n_kv), .spans = op_in_words(t, "spans", s.spans, 6 * 8),
                                 .o = op_out(t, "o", NULL, NULL, NULL, s.n_q), .p = op_scratch(t, "p", 4ull * s.n_p),
                                 .n_tokens = 6, .n_heads = 4, .n_kv_heads = 2, .head_dim = 24, .kv_rows = 6,
                                 .max_span = (uint32_t)s.S, .max_union = s.max_union, .scale = (float)s.scale } };
        p.b = (struct keel_attention_bwd_params){
            .q = p.f.q, .k = p.f.k, .v = p.f.v, .spans = p.f.spans, .p = p.f.p, .d_o = op_in(t, "c", weights, s.n_q),
            .dq = op_out(t, "dq", NULL, NULL, NULL, s.n_q), .dk = op_out(t, "dk", NULL, NULL, NULL, s.n_kv),
            .dv = op_out(t, "dv", NULL, NULL, NULL, s.n_kv), .ds = op_scratch(t, "ds", 4ull * s.n_p), .n_tokens = 6,
            .n_heads = 4, .n_kv_heads = 2, .head_dim = 24, .max_span = (uint32_t)s.S, .max_union = s.max_union,
            .max_q_union = s.max_q_union, .scale = (float)s.scale };
        op_run(t, record_both, &p);
        const struct {
            const char *name;
            struct keel_span x, dx;
            const double *x0;
            size_t n;
        } of[] = { { "q", p.f.q, p.b.dq, s.q, s.n_q }, { "k", p.f.k, p.b.dk, s.k, s.n_kv }, { "v", p.f.v, p.b.dv, s.v, s.n_kv } };
        double *grad[3];
        for (int i = 0; i < 3; i++) { // before the forward runs alone and leaves no gradients
            grad[i] = op_result(t, of[i].dx);
        }
        for (int i = 0; i < 3; i++) {
            op_check_slope(t, &(struct op_slope){ .name = of[i].name, .forward = record_both_fwd, .params = &p, .x = of[i].x,
                                                  .y = p.f.o, .x0 = of[i].x0, .grad = grad[i], .c = weights, .n_x = of[i].n,
                                                  .n_y = s.n_q, .h = 0.01, .tol = 5e-3 });
        }
    }
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fwd),    cmocka_unit_test(test_ring),  cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_bwd),    cmocka_unit_test(test_bwd_chunks), cmocka_unit_test(test_slope),
        cmocka_unit_test(test_all),    cmocka_unit_test(test_packed), cmocka_unit_test(test_split),
    };
    return op_main("op_attention", tests);
}
