// SPDX-License-Identifier: MIT
// doctor/timing.c: how long a family of ops takes on the shapes of a model.
#include "cases.h"

#include <math.h>

// What one timed run records: a family's ops on one matrix, or attention.
struct timed_run {
    enum keel_family family;
    const struct timing *t;
    const struct keel_matrix *w;
    struct keel_span x, y, h, a, m; // rows in and out, [rows, rank], LoRA factors
    struct keel_attention_params attention;
};

static uint32_t rows_of(const struct timed_run *r)
{
    return r->family == KEEL_FAMILY_MATVEC ? 1 : r->t->rows;
}

static void record_timed(keel_recorder *rec, const void *params)
{
    const struct timed_run *r = params;
    const uint32_t rows = rows_of(r);
    if (r->family == KEEL_FAMILY_ATTENTION || r->family == KEEL_FAMILY_PATCHES) {
        keel_attention(rec, &r->attention);
    } else if (r->family == KEEL_FAMILY_MATMUL_BWD) {
        keel_linear_bwd(rec, &(struct keel_linear_bwd_params){ .w = r->w, .dy = r->y, .dx = r->x, .n_tokens = rows });
    } else if (r->family == KEEL_FAMILY_LORA) {
        const struct keel_lora l = { .a = r->a, .b = r->m, .rank = r->t->rank, .k = r->w->cols, .n = r->w->rows, .scale = 1 };
        keel_lora_down(rec, &l, r->x, r->h, rows);
        keel_lora_up(rec, &l, r->h, r->y, rows);
        keel_lora_bwd_x(rec, &l, r->h, r->x, rows);
        keel_lora_bwd_a(rec, &l, r->h, r->x, r->a, rows);
    } else {
        keel_linear(rec, &(struct keel_linear_params){ .w = r->w, .x = r->x, .y = r->y, .n_tokens = rows });
    }
}

static struct keel_span zeros(struct bed *b, uint64_t floats)
{
    struct keel_span s = { 0 };
    const keel_status st = keel_heap_alloc(b->heap, floats * 4, &s);
    if (st == KEEL_OK) {
        keel_record_fill(b->rec, s, 0);
    }
    b->status = b->status == KEEL_OK ? st : b->status;
    return s;
}

// Time of what `r` records, on zeros that `r` points to.
static double time_zeros(struct bed *b, const struct timed_run *r)
{
    if (b->status != KEEL_OK || keel_recorder_submit(b->rec) != KEEL_OK || keel_recorder_wait(b->rec) != KEEL_OK) {
        return 0;
    }
    return (double)bed_time(b, record_timed, r);
}

static double time_matrix(struct bed *b, struct timed_run *r, const struct keel_matrix *w)
{
    const uint64_t rows = rows_of(r), rank = r->t->rank;
    bed_begin(b, 1);
    r->w = w;
    r->x = zeros(b, rows * w->cols);
    r->y = zeros(b, rows * w->rows);
    if (r->family == KEEL_FAMILY_LORA) {
        r->h = zeros(b, rows * rank);
        r->a = zeros(b, rank * w->cols);
        r->m = zeros(b, rank * w->rows);
    }
    return time_zeros(b, r);
}

// Attention over zeros; `p` has the counts, the rest is filled in.
static double time_spans(struct bed *b, struct timed_run *r, const struct keel_token_span *spans, struct keel_attention_params p)
{
    const uint64_t q = (uint64_t)p.n_tokens * p.n_heads * p.head_dim, kv = (uint64_t)p.kv_rows * p.n_kv_heads * p.head_dim;
    p.q = zeros(b, q);
    p.k = zeros(b, kv);
    p.v = zeros(b, kv);
    p.o = zeros(b, q);
    p.p = zeros(b, keel_attention_scratch(p.n_tokens, p.n_heads, p.kv_rows) / 4);
    p.spans = bed_words(b, spans, p.n_tokens * sizeof *spans / 4);
    p.max_span = p.max_union = p.kv_rows;
    p.scale = 1 / sqrtf((float)p.head_dim);
    r->attention = p;
    return time_zeros(b, r);
}

// The last n tokens of a text, each with all keys before it in sight.
static double time_attention(struct bed *b, struct timed_run *r, uint32_t n)
{
    const struct timing *t = r->t;
    bed_begin(b, 1);
    struct keel_token_span *spans = bed_bytes(b, n * sizeof *spans);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t hi = t->keys - n + i + 1;
        spans[i] = (struct keel_token_span){ .lo = 0, .hi = hi, .slot = hi - 1 };
    }
    return time_spans(b, r, spans, (struct keel_attention_params){
        .n_tokens = n, .n_heads = t->n_heads, .n_kv_heads = t->n_kv_heads, .head_dim = t->head_dim, .kv_rows = t->keys });
}

// Patches of a small image, heads as wide as SigLIP's.
static double time_patches(struct bed *b, struct timed_run *r)
{
    enum { PATCHES = 256, HEADS = 2, WIDTH = 72 };
    bed_begin(b, 1);
    struct keel_token_span *spans = bed_bytes(b, PATCHES * sizeof *spans);
    for (uint32_t i = 0; i < PATCHES; i++) {
        spans[i] = (struct keel_token_span){ .lo = 0, .hi = PATCHES, .slot = i, .q_lo = 0, .q_hi = PATCHES };
    }
    return time_spans(b, r, spans, (struct keel_attention_params){
        .n_tokens = PATCHES, .n_heads = HEADS, .n_kv_heads = HEADS, .head_dim = WIDTH, .kv_rows = PATCHES, .all = true });
}

double doctor_time(struct bed *b, enum keel_family family, const struct timing *t)
{
    struct timed_run r = { .family = family, .t = t };
    double sum = 0;
    if (family == KEEL_FAMILY_ATTENTION) {
        // A token that is decoded and ten of a prompt, as devices are compared (speed.c).
        const uint32_t many = KEEL_MIN(t->rows, t->keys);
        const double one = time_attention(b, &r, 1), prompt = time_attention(b, &r, many);
        return one > 0 && prompt > 0 ? one + prompt * 10 / many : 0;
    }
    if (family == KEEL_FAMILY_PATCHES) {
        return time_patches(b, &r);
    }
    for (uint32_t i = 0; i < t->n_matrices; i++) {
        // A head has more rows than others; for many tokens its products are done in parts elsewhere.
        if (family != KEEL_FAMILY_MATVEC && t->matrix[i].w->rows > 32768) {
            continue;
        }
        const double ns = time_matrix(b, &r, t->matrix[i].w);
        if (ns <= 0) {
            return 0;
        }
        sum += ns * t->matrix[i].count;
    }
    return sum;
}
