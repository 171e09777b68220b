// SPDX-License-Identifier: MIT
// gemma3/sample.c: choosing the next token from logits on the host. Order of filters as llama.cpp's default chain:
// repetition penalty, top-k, top-p, min-p, temperature. Sources: Keskar et al. 2019 (penalty), Holtzman et al. 2020 (top-p),
// Nguyen et al. 2024 (min-p).
#include "gemma3.h"

#include <math.h>
#include <stdlib.h>

static int by_logit(const void *a, const void *b)
{
    const struct keel_candidate *x = a, *y = b;
    if (x->logit != y->logit) {
        return x->logit < y->logit ? 1 : -1;
    }
    return x->id < y->id ? -1 : x->id > y->id; // equal logits: lower id first, so that the order is defined
}

static void penalise(struct keel_candidate *c, uint32_t vocab, float penalty, const int32_t *seen, size_t n_seen)
{
    for (size_t i = 0; i < n_seen; i++) {
        bool again = false;
        for (size_t k = 0; k < i && !again; k++) {
            again = seen[k] == seen[i]; // a token is penalised once
        }
        if (!again && seen[i] >= 0 && (uint32_t)seen[i] < vocab) {
            float *l = &c[seen[i]].logit;
            *l = *l > 0.0f ? *l / penalty : *l * penalty;
        }
    }
}

// Brings the best k to the front in order; the heap keeps the worst of the best at its root.
static void select_top(struct keel_candidate *c, uint32_t n, uint32_t k)
{
    for (uint32_t i = k / 2; i-- > 0;) { // heapify [0, k)
        for (uint32_t at = i, child; (child = 2 * at + 1) < k; at = child) {
            if (child + 1 < k && by_logit(&c[child + 1], &c[child]) > 0) {
                child++;
            }
            if (by_logit(&c[child], &c[at]) <= 0) {
                break;
            }
            const struct keel_candidate t = c[at];
            c[at] = c[child];
            c[child] = t;
        }
    }
    for (uint32_t i = k; i < n; i++) {
        if (by_logit(&c[i], &c[0]) >= 0) {
            continue;
        }
        c[0] = c[i];
        for (uint32_t at = 0, child; (child = 2 * at + 1) < k; at = child) {
            if (child + 1 < k && by_logit(&c[child + 1], &c[child]) > 0) {
                child++;
            }
            if (by_logit(&c[child], &c[at]) <= 0) {
                break;
            }
            const struct keel_candidate t = c[at];
            c[at] = c[child];
            c[child] = t;
        }
    }
    qsort(c, k, sizeof *c, by_logit);
}

int32_t keel_sample(const float *logits, uint32_t vocab, const struct keel_sample_params *p, const int32_t *seen, size_t n_seen,
                    uint64_t position, struct keel_candidate *c)
{
    for (uint32_t i = 0; i < vocab; i++) {
        c[i] = (struct keel_candidate){ (int32_t)i, logits[i] };
    }
    if (p->repeat_penalty > 0.0f && p->repeat_penalty != 1.0f) {
        const size_t last = KEEL_MIN(n_seen, (size_t)p->repeat_last);
        penalise(c, vocab, p->repeat_penalty, seen + (n_seen - last), last);
    }
    if (p->temperature <= 0.0f) {
        uint32_t best = 0;
        for (uint32_t i = 1; i < vocab; i++) {
            best = c[i].logit > c[best].logit ? i : best;
        }
        return c[best].id;
    }
    uint32_t n = p->top_k > 0 ? KEEL_MIN(p->top_k, vocab) : vocab;
    if (n < vocab) {
        select_top(c, vocab, n);
    } else {
        qsort(c, n, sizeof *c, by_logit);
    }
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)c[i].logit - (double)c[0].logit);
    }
    if (p->top_p < 1.0f) { // the fewest tokens whose mass reaches top_p
        double mass = 0.0;
        uint32_t keep = 0;
        while (keep < n && (keep == 0 || mass < (double)p->top_p * sum)) {
            mass += exp((double)c[keep++].logit - (double)c[0].logit);
        }
        n = keep;
    }
    if (p->min_p > 0.0f) {
        const float least = c[0].logit + logf(p->min_p);
        while (n > 1 && c[n - 1].logit < least) {
            n--;
        }
    }
    sum = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        sum += exp(((double)c[i].logit - (double)c[0].logit) / (double)p->temperature);
    }
    struct keel_rng rng = keel_rng_make(p->seed, UINT64_C(0x73616d70) << 32 ^ position);
    double left = keel_rng_uniform(&rng) * sum;
    for (uint32_t i = 0; i < n; i++) {
        left -= exp(((double)c[i].logit - (double)c[0].logit) / (double)p->temperature);
        if (left < 0.0) {
            return c[i].id;
        }
    }
    return c[n - 1].id;
}
