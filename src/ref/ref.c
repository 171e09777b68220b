// SPDX-License-Identifier: MIT
// src/ref/ref.c: the ops in double precision. Each function is the formula of ops.h written out, one loop an index.
// Backward passes are derived by hand and checked against central differences in ref_test.c.
#include "ref.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// --- linear --------------------------------------------------------------------------------------

void ref_linear(double *y, const double *x, const double *w, int T, int N, int K, bool add)
{
    for (int t = 0; t < T; t++) {
        const double *xt = x + (size_t)t * K; // [K]
        for (int n = 0; n < N; n++) {
            const double *wn = w + (size_t)n * K; // [K]
            double sum = 0;
            for (int k = 0; k < K; k++) {
                sum += xt[k] * wn[k];
            }
            double *yt = y + (size_t)t * N;
            yt[n] = add ? yt[n] + sum : sum;
        }
    }
}

void ref_block_rounding(double *budget, const double *x, const double *mag, int N, int K, double eps)
{
    for (int block = 0; block < K; block += 32) {
        double most = 0;
        for (int k = block; k < block + 32; k++) {
            most = fmax(most, fabs(x[k]));
        }
        for (int n = 0; n < N; n++) {
            for (int k = block; k < block + 32; k++) {
                budget[n] += eps * most * mag[(size_t)n * K + k];
            }
        }
    }
}

void ref_linear_bwd(double *dx, const double *dy, const double *w, int T, int N, int K, bool add)
{
    for (int t = 0; t < T; t++) {
        const double *dyt = dy + (size_t)t * N; // [N]
        double *dxt = dx + (size_t)t * K;       // [K]
        if (!add) {
            memset(dxt, 0, (size_t)K * sizeof *dxt);
        }
        for (int n = 0; n < N; n++) {
            const double *wn = w + (size_t)n * K; // [K]
            for (int k = 0; k < K; k++) {
                dxt[k] += dyt[n] * wn[k];
            }
        }
    }
}

void ref_embed(double *y, const uint32_t *ids, const double *w, int T, int K, double scale)
{
    for (int t = 0; t < T; t++) {
        for (int k = 0; k < K; k++) {
            y[(size_t)t * K + k] = scale * w[(size_t)ids[t] * K + k];
        }
    }
}

// --- LoRA ----------------------------------------------------------------------------------------

void ref_lora_down(double *h, const double *x, const double *a, int T, int K, int r)
{
    ref_linear(h, x, a, T, r, K, false);
}

void ref_lora_up(double *y, const double *h, const double *b, int T, int N, int r, double scale)
{
    for (int t = 0; t < T; t++) {
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int i = 0; i < r; i++) {
                sum += h[(size_t)t * r + i] * b[(size_t)n * r + i];
            }
            y[(size_t)t * N + n] += scale * sum;
        }
    }
}

void ref_lora_bwd_h(double *dh, const double *dy, const double *b, int T, int N, int r, double scale)
{
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < r; i++) {
            double sum = 0;
            for (int n = 0; n < N; n++) {
                sum += dy[(size_t)t * N + n] * b[(size_t)n * r + i];
            }
            dh[(size_t)t * r + i] = scale * sum;
        }
    }
}

void ref_lora_bwd_x(double *dx, const double *dh, const double *a, int T, int K, int r)
{
    ref_linear_bwd(dx, dh, a, T, r, K, true);
}

void ref_lora_bwd_a(double *da, const double *dh, const double *x, int T, int K, int r)
{
    for (int i = 0; i < r; i++) {
        for (int k = 0; k < K; k++) {
            for (int t = 0; t < T; t++) {
                da[(size_t)i * K + k] += dh[(size_t)t * r + i] * x[(size_t)t * K + k];
            }
        }
    }
}

void ref_lora_bwd_b(double *db, const double *dy, const double *h, int T, int N, int r, double scale)
{
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < r; i++) {
            for (int t = 0; t < T; t++) {
                db[(size_t)n * r + i] += scale * dy[(size_t)t * N + n] * h[(size_t)t * r + i];
            }
        }
    }
}

// --- norms ---------------------------------------------------------------------------------------

static double inv_rms(const double *x, int D, double eps)
{
    double ss = 0;
    for (int i = 0; i < D; i++) {
        ss += x[i] * x[i];
    }
    return 1 / sqrt(ss / D + eps);
}

void ref_rmsnorm(double *y, const double *x, const double *w, const double *residual, int T, int D, double eps)
{
    for (int t = 0; t < T; t++) {
        const size_t at = (size_t)t * D;
        const double s = inv_rms(x + at, D, eps);
        for (int i = 0; i < D; i++) {
            y[at + i] = x[at + i] * s * w[i] + (residual ? residual[at + i] : 0);
        }
    }
}

// With s = (mean(x²) + eps)^-1/2: ds/dx_i = -s³ x_i / D, so dx_i = s w_i dy_i - s³ x_i / D · Σ_j dy_j w_j x_j.
void ref_rmsnorm_bwd(double *dx, const double *x, const double *w, const double *dy, int T, int D, double eps, bool add)
{
    for (int t = 0; t < T; t++) {
        const size_t at = (size_t)t * D;
        const double s = inv_rms(x + at, D, eps);
        double dot = 0;
        for (int i = 0; i < D; i++) {
            dot += dy[at + i] * w[i] * x[at + i];
        }
        for (int i = 0; i < D; i++) {
            const double g = s * w[i] * dy[at + i] - s * s * s * x[at + i] / D * dot;
            dx[at + i] = add ? dx[at + i] + g : g;
        }
    }
}

// --- heads ---------------------------------------------------------------------------------------

void ref_heads(double *y, const double *x, const double *w, const double *rope, const int *slot, int T, int H, int d,
               double eps)
{
    const int half = d / 2;
    for (int t = 0; t < T; t++) {
        for (int h = 0; h < H; h++) {
            const double *xh = x + ((size_t)t * H + h) * d;                  // [d]
            double *yh = y + ((size_t)(slot ? slot[t] : t) * H + h) * d;     // [d]
            if (!w) {
                memcpy(yh, xh, (size_t)d * sizeof *yh);
                continue;
            }
            const double s = inv_rms(xh, d, eps);
            for (int i = 0; i < half; i++) {
                const double z0 = xh[i] * s * w[i];
                const double z1 = xh[i + half] * s * w[i + half];
                const double c = rope[((size_t)t * half + i) * 2];
                const double n = rope[((size_t)t * half + i) * 2 + 1];
                yh[i] = z0 * c - z1 * n;
                yh[i + half] = z1 * c + z0 * n;
            }
        }
    }
}

void ref_heads_bwd(double *dx, const double *x, const double *w, const double *rope, const double *dy, int T, int H, int d,
                   double eps)
{
    const int half = d / 2;
    double *dz = malloc((size_t)d * sizeof *dz); // [d], gradient of the normed vector
    for (int t = 0; t < T; t++) {
        for (int h = 0; h < H; h++) {
            const size_t at = ((size_t)t * H + h) * d;
            for (int i = 0; i < half; i++) {
                const double c = rope[((size_t)t * half + i) * 2];
                const double n = rope[((size_t)t * half + i) * 2 + 1];
                dz[i] = dy[at + i] * c + dy[at + i + half] * n;
                dz[i + half] = dy[at + i + half] * c - dy[at + i] * n;
            }
            ref_rmsnorm_bwd(dx + at, x + at, w, dz, 1, d, eps, false);
        }
    }
    free(dz);
}

// --- attention -----------------------------------------------------------------------------------

void ref_attention(double *o, double *p, const double *q, const double *k, const double *v, struct ref_mask mask, int T,
                   int H, int G, int d, int R, int S, double scale)
{
    memset(p, 0, (size_t)H * T * S * sizeof *p);
    for (int h = 0; h < H; h++) {
        const int g = h / (H / G);
        for (int t = 0; t < T; t++) {
            const double *qt = q + ((size_t)t * H + h) * d; // [d]
            double *pt = p + ((size_t)h * T + t) * S;       // [S]
            double *ot = o + ((size_t)t * H + h) * d;       // [d]
            const int n = mask.hi[t] - mask.lo[t];
            double max = -INFINITY, sum = 0;
            for (int s = 0; s < n; s++) {
                const double *kj = k + ((size_t)((mask.lo[t] + s) % R) * G + g) * d; // [d]
                for (int i = 0; i < d; i++) {
                    pt[s] += scale * qt[i] * kj[i];
                }
                max = fmax(max, pt[s]);
            }
            for (int s = 0; s < n; s++) {
                pt[s] = exp(pt[s] - max);
                sum += pt[s];
            }
            memset(ot, 0, (size_t)d * sizeof *ot);
            for (int s = 0; s < n; s++) {
                const double *vj = v + ((size_t)((mask.lo[t] + s) % R) * G + g) * d; // [d]
                pt[s] /= sum;
                for (int i = 0; i < d; i++) {
                    ot[i] += pt[s] * vj[i];
                }
            }
        }
    }
}

void ref_attention_bwd(double *dq, double *dk, double *dv, const double *d_o, const double *p, const double *q,
                       const double *k, const double *v, struct ref_mask mask, int T, int H, int G, int d, int R, int S,
                       double scale)
{
    double *dp = malloc((size_t)S * sizeof *dp); // [S]
    memset(dq, 0, (size_t)T * H * d * sizeof *dq);
    memset(dk, 0, (size_t)R * G * d * sizeof *dk);
    memset(dv, 0, (size_t)R * G * d * sizeof *dv);
    for (int h = 0; h < H; h++) {
        const int g = h / (H / G);
        for (int t = 0; t < T; t++) {
            const double *qt = q + ((size_t)t * H + h) * d;    // [d]
            const double *dot = d_o + ((size_t)t * H + h) * d; // [d]
            const double *pt = p + ((size_t)h * T + t) * S;    // [S]
            double *dqt = dq + ((size_t)t * H + h) * d;        // [d]
            const int n = mask.hi[t] - mask.lo[t];
            double mean = 0; // Σ_s p_s dp_s
            for (int s = 0; s < n; s++) {
                const size_t row = ((size_t)((mask.lo[t] + s) % R) * G + g) * d;
                dp[s] = 0;
                for (int i = 0; i < d; i++) {
                    dp[s] += dot[i] * v[row + i];
                    dv[row + i] += pt[s] * dot[i];
                }
                mean += pt[s] * dp[s];
            }
            for (int s = 0; s < n; s++) {
                const size_t row = ((size_t)((mask.lo[t] + s) % R) * G + g) * d;
                const double ds = pt[s] * (dp[s] - mean); // softmax backward
                for (int i = 0; i < d; i++) {
                    dqt[i] += scale * ds * k[row + i];
                    dk[row + i] += scale * ds * qt[i];
                }
            }
        }
    }
    free(dp);
}

// --- element-wise --------------------------------------------------------------------------------

#define GELU_A 0.79788456080286535588 // √(2/π)
#define GELU_B 0.044715

void ref_geglu(double *y, const double *gate, const double *up, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double x = gate[i];
        y[i] = 0.5 * x * (1 + tanh(GELU_A * (x + GELU_B * x * x * x))) * up[i];
    }
}

void ref_geglu_bwd(double *d_gate, double *d_up, const double *gate, const double *up, const double *dy, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double x = gate[i], u = up[i], g = dy[i];
        const double th = tanh(GELU_A * (x + GELU_B * x * x * x));
        const double slope = 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * GELU_A * (1 + 3 * GELU_B * x * x);
        d_up[i] = g * 0.5 * x * (1 + th);
        d_gate[i] = g * u * slope;
    }
}

// --- vocabulary rows -----------------------------------------------------------------------------

static double row_max(const double *x, int V)
{
    double max = -INFINITY;
    for (int v = 0; v < V; v++) {
        max = fmax(max, x[v]);
    }
    return max;
}

static double row_lse(const double *x, int V)
{
    const double max = row_max(x, V);
    double sum = 0;
    for (int v = 0; v < V; v++) {
        sum += exp(x[v] - max);
    }
    return max + log(sum);
}

void ref_xent(double *stats, const double *logits, const uint32_t *targets, int C, int V)
{
    for (int i = 0; i < C; i++) {
        const double *x = logits + (size_t)i * V; // [V]
        const double lse = row_lse(x, V);
        double entropy = 0;
        for (int v = 0; v < V; v++) {
            entropy -= exp(x[v] - lse) * (x[v] - lse);
        }
        stats[i * 4 + 0] = row_max(x, V);
        stats[i * 4 + 1] = lse;
        stats[i * 4 + 2] = x[targets[i]];
        stats[i * 4 + 3] = entropy;
    }
}

void ref_xent_bwd(double *d_logits, const double *logits, const uint32_t *targets, const double *weights, int C, int V)
{
    for (int i = 0; i < C; i++) {
        const double *x = logits + (size_t)i * V; // [V]
        const double lse = row_lse(x, V);
        for (int v = 0; v < V; v++) {
            const double hot = (uint32_t)v == targets[i] ? 1 : 0;
            d_logits[(size_t)i * V + v] = weights[i] * (exp(x[v] - lse) - hot);
        }
    }
}

void ref_kl(double *kl, const double *logits_p, const double *logits_q, int C, int V)
{
    for (int i = 0; i < C; i++) {
        const double *p = logits_p + (size_t)i * V, *q = logits_q + (size_t)i * V; // [V]
        const double lse_p = row_lse(p, V), lse_q = row_lse(q, V);
        double pq = 0, qp = 0;
        for (int v = 0; v < V; v++) {
            const double lp = p[v] - lse_p, lq = q[v] - lse_q;
            pq += exp(lp) * (lp - lq);
            qp += exp(lq) * (lq - lp);
        }
        kl[i * 2 + 0] = pq;
        kl[i * 2 + 1] = qp;
    }
}

void ref_top_kl(double *kl, double *d_logits, const struct ref_top *p)
{
    for (int i = 0; i < p->C; i++) {
        const double *x = p->logits + (size_t)i * p->V, *log_p = p->log_p + (size_t)i * p->stride;
        const uint32_t *ids = p->ids + (size_t)i * p->stride;
        double *d = d_logits + (size_t)i * p->V;
        const double lse = row_lse(x, p->V), tail_p = exp(p->tail[i]);
        double tail_q = 0;
        for (int v = 0; v < p->V; v++) {
            d[v] = exp(x[v] - lse); // q; below: of the tail, of the list
        }
        for (int v = 0; v < p->V; v++) {
            bool listed = false;
            for (int k = 0; k < p->K; k++) {
                listed = listed || ids[k] == (uint32_t)v;
            }
            tail_q += listed ? 0 : d[v];
        }
        kl[i] = tail_p > 0 ? tail_p * (p->tail[i] - log(tail_q)) : 0;
        for (int v = 0; v < p->V; v++) {
            double own = tail_p > 0 ? tail_p * d[v] / tail_q : 0; // p
            for (int k = 0; k < p->K; k++) {
                if (ids[k] == (uint32_t)v) {
                    own = exp(log_p[k]);
                    kl[i] += own * (log_p[k] - (x[v] - lse));
                }
            }
            d[v] = p->weights[i] * (d[v] - own);
        }
    }
}

void ref_constrain(double *out, const double *weights, const double *log_pi, const double *beta, const double *base, int C)
{
    for (int i = 0; i < C; i++) {
        const double sigmoid = 1 / (1 + exp(-beta[i] * (log_pi[i] - base[i])));
        out[i] = weights[i] * fmax(2 * (1 - sigmoid), 1e-3);
    }
}

// --- optimiser -----------------------------------------------------------------------------------

double ref_sumsq(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

void ref_adamw(double *w, double *m, double *v, const double *g, size_t n, const struct ref_adamw_params *p)
{
    const double factor = p->clip > 0 ? fmin(1, p->clip / (p->norm + 1e-6)) : 1;
    const double bias1 = 1 - pow(p->beta1, p->step);
    const double bias2 = 1 - pow(p->beta2, p->step);
    for (size_t i = 0; i < n; i++) {
        const double gi = g[i] * factor;
        w[i] -= p->lr * p->weight_decay * w[i];
        m[i] = p->beta1 * m[i] + (1 - p->beta1) * gi;
        v[i] = p->beta2 * v[i] + (1 - p->beta2) * gi * gi;
        w[i] -= p->lr * (m[i] / bias1) / (sqrt(v[i] / bias2) + p->eps);
    }
}
