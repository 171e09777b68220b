// SPDX-License-Identifier: MIT
// src/ref/ref.h: every op of ops.h and its backward in double precision and plain loops: the specification that the
// shaders are tested against. Slow on purpose; nothing here is shared with the code under test, dequantisation included.
//
// Letters as in ops.h: T tokens, N outputs, K inputs, D width, H query heads, G key/value heads, d head size, V vocabulary,
// r LoRA rank, R cache rows. Arrays are row-major and dense. A gradient is named d + the name of what it belongs to.
// Outputs come first. A function that ends in _bwd overwrites its outputs unless it says +=.
#ifndef KEEL_TEST_REF_H
#define KEEL_TEST_REF_H

#include "base.h"

// --- weights (ref_quant.c) -----------------------------------------------------------------------

// w [n] from GGUF blocks; n is a multiple of the type's block. `mag`, unless NULL, gets |scale| · (|quant| + |offset|) +
// |minimum| for each element: what a rounding error of the dequantisation is relative to.
void ref_dequant(double *w, double *mag, enum keel_dtype type, const void *blocks, size_t n);
// Random valid blocks for n elements with values of order 1: random quants, small f16 scales of both signs, a few of them
// zero or subnormal. For F32, F16 and BF16: normal values, a few zero, for F16 a few subnormal.
void ref_random_blocks(struct keel_rng *rng, enum keel_dtype type, void *blocks, size_t n);

// --- linear --------------------------------------------------------------------------------------

// y [T, N] = x [T, K] · wᵀ, w [N, K]; y += with add
void ref_linear(double *y, const double *x, const double *w, int T, int N, int K, bool add);
// budget [N] += eps · Σ |w| · max |x| over x's blocks of 32 columns: the error of a product that rounds x [K] to eps of each block's
// largest. `mag` [N, K] stands for |w|; K is a multiple of 32.
void ref_block_rounding(double *budget, const double *x, const double *mag, int N, int K, double eps);
// dx [T, K] = dy [T, N] · w; dx += with add
void ref_linear_bwd(double *dx, const double *dy, const double *w, int T, int N, int K, bool add);
// y [T, K] = scale · w[ids[t], :]
void ref_embed(double *y, const uint32_t *ids, const double *w, int T, int K, double scale);

// --- LoRA: a [r, K], b [N, r] --------------------------------------------------------------------

void ref_lora_down(double *h, const double *x, const double *a, int T, int K, int r);                 // h = x · aᵀ
void ref_lora_up(double *y, const double *h, const double *b, int T, int N, int r, double scale);     // y += scale · h · bᵀ
void ref_lora_bwd_h(double *dh, const double *dy, const double *b, int T, int N, int r, double scale); // dh = scale · dy · b
void ref_lora_bwd_x(double *dx, const double *dh, const double *a, int T, int K, int r);              // dx += dh · a
void ref_lora_bwd_a(double *da, const double *dh, const double *x, int T, int K, int r);              // da += dhᵀ · x
void ref_lora_bwd_b(double *db, const double *dy, const double *h, int T, int N, int r, double scale); // db += scale · dyᵀ · h

// --- norms ---------------------------------------------------------------------------------------

// y [T, D] = x / sqrt(mean(x²) + eps) · w (+ residual, unless NULL)
void ref_rmsnorm(double *y, const double *x, const double *w, const double *residual, int T, int D, double eps);
// dx = or, with add, dx +=
void ref_rmsnorm_bwd(double *dx, const double *x, const double *w, const double *dy, int T, int D, double eps, bool add);

// y [T, D] = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · w + b
void ref_layernorm(double *y, const double *x, const double *w, const double *b, int T, int D, double eps);
// dx = or, with add, dx +=
void ref_layernorm_bwd(double *dx, const double *x, const double *w, const double *dy, int T, int D, double eps, bool add);

// --- heads: QK-norm and rotary embedding ---------------------------------------------------------

// x [T, H, d] → y [rows, H, d] at row slot[t] (t itself if slot is NULL). rope [T, d/2, 2] cosine, sine.
// w NULL: a copy.
void ref_heads(double *y, const double *x, const double *w, const double *rope, const int *slot, int T, int H, int d,
               double eps);
// dx [T, H, d] from dy [T, H, d]
void ref_heads_bwd(double *dx, const double *x, const double *w, const double *rope, const double *dy, int T, int H, int d,
                   double eps);

// --- keys and values in memory -------------------------------------------------------------------

// Words that a head of d elements takes as KEEL_F16 or KEEL_Q8_0 (shaders/common/kv.glsl).
size_t ref_kv_words(enum keel_dtype type, int d);
// Packs n heads and puts what the words stand for in the place of x [n, d]. Halves below 2^-14 become 0: a device may take those for 0.
void ref_kv_pack(uint32_t *words, double *x, enum keel_dtype type, size_t n, int d);
// x [n, d] from words.
void ref_kv_unpack(double *x, const uint32_t *words, enum keel_dtype type, size_t n, int d);

// --- attention -----------------------------------------------------------------------------------

// Token t sees keys lo[t] <= j < hi[t], which lie at cache row j % R.
struct ref_mask {
    const int *lo, *hi;
};
// o [T, H, d], p [H, T, S] (probability of key lo[t] + s; zero beyond) from q [T, H, d], k and v [R, G, d].
// S is at least the largest hi - lo.
void ref_attention(double *o, double *p, const double *q, const double *k, const double *v, struct ref_mask mask, int T,
                   int H, int G, int d, int R, int S, double scale);
// dq [T, H, d], dk and dv [R, G, d] from d_o [T, H, d] and p as ref_attention() left it.
void ref_attention_bwd(double *dq, double *dk, double *dv, const double *d_o, const double *p, const double *q,
                       const double *k, const double *v, struct ref_mask mask, int T, int H, int G, int d, int R, int S,
                       double scale);

// --- element-wise --------------------------------------------------------------------------------

// y = gelu(gate) · up; gelu(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
void ref_geglu(double *y, const double *gate, const double *up, size_t n);
void ref_geglu_bwd(double *d_gate, double *d_up, const double *gate, const double *up, const double *dy, size_t n);

// y = gelu(x), the tanh form as above
void ref_gelu(double *y, const double *x, size_t n);
void ref_gelu_bwd(double *dx, const double *x, const double *dy, size_t n);
// y [T, N] = x + b (+ residual, unless NULL)
void ref_bias(double *y, const double *x, const double *b, const double *residual, int T, int N);
// y [(grid / kernel)², D]: means over squares of kernel × kernel rows of x [grid², D]
void ref_pool(double *y, const double *x, int grid, int kernel, int D);
void ref_pool_bwd(double *dx, const double *dy, int grid, int kernel, int D);

// --- marked rows -----------------------------------------------------------------------------------

void ref_rows_add(double *x, const double *v, const double *marks, int T, int D, double a); // x [T, D] += a · marks[t] · v
void ref_rows_dot(double *y, const double *x, const double *u, int T, int k, int D);        // y [T, k] = x · uᵀ
// Takes components along u [k, D] out of x; mode 0: all of it, 1: above the limit, 2: below. factor [T]: marks[t] where a limit was
// passed, else 0.
void ref_rows_project(double *x, double *factor, const double *u, const double *marks, int T, int D, int k, int mode, double limit);
// sum, square, size [D] += Σ marks[t] · {x - shift, (x - shift)², |x|}
void ref_rows_sums(double *sum, double *square, double *size, const double *x, const double *marks, const double *shift, int T, int D);
void ref_rows_cov(double *cov, const double *x, const double *marks, const double *shift, int T, int D); // [D, D] +=
void ref_rows_pool(double *y, const double *x, const double *marks, const uint32_t *segments, int R, int D); // [R, D] sums of segments

// --- vocabulary rows -----------------------------------------------------------------------------

// stats [C, 4] = max, log-sum-exp, logit of the target, entropy in nats
void ref_xent(double *stats, const double *logits, const uint32_t *targets, int C, int V);
// d_logits [C, V] = weight[i] · (softmax(logits[i]) - one_hot(targets[i]))
void ref_xent_bwd(double *d_logits, const double *logits, const uint32_t *targets, const double *weights, int C, int V);
// kl [C, 2] = KL(p ‖ q), KL(q ‖ p)
void ref_kl(double *kl, const double *logits_p, const double *logits_q, int C, int V);
// A distribution as the log-probabilities of K listed elements, ids and log_p [C, stride], and that of the rest together, tail [C].
// kl [C] is that of the K + 1 probabilities to those of the logits; d_logits [C, V] = weights[i] · dkl[i]/dlogits.
struct ref_top {
    const double *logits, *log_p, *tail, *weights;
    const uint32_t *ids;
    int C, V, K, stride;
};
void ref_top_kl(double *kl, double *d_logits, const struct ref_top *p);
// out [C] = weights · max(2 (1 - σ(beta · (log_pi - base))), 1e-3)
void ref_constrain(double *out, const double *weights, const double *log_pi, const double *beta, const double *base, int C);

// --- optimiser -----------------------------------------------------------------------------------

double ref_sumsq(const double *x, size_t n);
// One step of torch.optim.AdamW, step counted from 1. Gradients are scaled by min(1, clip / (norm + 1e-6)) first, norm being
// that of all gradients; clip <= 0: not scaled.
struct ref_adamw_params {
    double lr, beta1, beta2, eps, weight_decay, clip, norm;
    int step;
};
void ref_adamw(double *w, double *m, double *v, const double *g, size_t n, const struct ref_adamw_params *p);

#endif
