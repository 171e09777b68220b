// SPDX-License-Identifier: MIT
// ops/ops.h: every op, forward and backward: what it computes, shapes, aliasing, cost.
//
// An op only records work (device.h). Errors are sticky in the recorder, so ops return nothing. All activations are f32,
// row-major, dense. Shapes are given as [rows, columns]. Spans must be large enough and must not overlap, except where a
// parameter says "may be". No op knows model names, loops over layers or owns memory.
//
// Letters: T tokens in the batch, N output features, K input features, D width of the residual stream, H query heads,
// G key/value heads, d head size, V vocabulary, r LoRA rank, R rows of a key/value cache.
#ifndef KEEL_OPS_H
#define KEEL_OPS_H

#include "base.h"
#include "device.h"

struct keel_map; // platform.h

// --- weights in tiles (tile.c) -------------------------------------------------------------------

// A frozen weight matrix W [N, K] in keel's tile layout (docs/formats.md "tiles"): 64 rows a tile, 32 columns a block, the
// bits of the file's quantised values kept as they are, planar and aligned; forward and backward read the same bytes.
// Rows are split into shards, each its own span of at most caps.max_range bytes; a shard starts on a multiple of 64 rows.
#define KEEL_MAX_SHARDS 64
struct keel_shard {
    struct keel_span span;
    uint32_t row0, rows;
};
struct keel_matrix {
    enum keel_dtype type;
    uint32_t rows, cols; // N, K
    uint32_t n_shards;
    struct keel_shard shard[KEEL_MAX_SHARDS];
};

// Bytes of `rows` rows (rounded up to 64) of `cols` columns in tile layout; a whole number of 256-byte units.
uint64_t keel_tile_bytes(enum keel_dtype type, uint64_t rows, uint64_t cols);
// Packs `rows` rows, `src` as stored in a GGUF file ([rows, cols] blocks), into `dst` of keel_tile_bytes(type, rows, cols).
// rows may be any number; missing rows of the last tile are zero. cols must be a multiple of the type's block. Thread-safe.
void keel_tile_pack(enum keel_dtype type, const void *src, uint64_t rows, uint64_t cols, void *dst);
// Fills in `m` with shards cut to the device's limits, allocates their spans from `heap`; uploads `src` (GGUF layout, whole
// matrix) through the stage, packing on all cores. `map`, unless NULL, is the map that src lies in: what is packed leaves the
// process again, so that file and copy never lie in memory both. Errors: NO_MEMORY, DEVICE_LOST.
keel_status keel_matrix_create(struct keel_matrix *m, keel_device *dev, keel_heap *heap, enum keel_dtype type,
                               uint32_t rows, uint32_t cols, const void *src, const struct keel_map *map);
// Bytes keel_matrix_create() will allocate.
uint64_t keel_matrix_bytes(enum keel_dtype type, uint64_t rows, uint64_t cols);

// --- linear (linear.c) ---------------------------------------------------------------------------

// y [T, N] = x [T, K] · Wᵀ, or y += with `add`.
struct keel_linear_params {
    const struct keel_matrix *w;
    struct keel_span x, y;
    uint32_t n_tokens;
    bool add;
};
void keel_linear(keel_recorder *rec, const struct keel_linear_params *p);

// Up to three products that share x, each with what an adapter adds (lora NULL: none): y = x · Wᵀ + scale · h · bᵀ with
// h [T, r] = x · aᵀ as keel_lora_down() gives it. With `glu` there are two, and y of the first becomes gelu_tanh(gate) · up; the y of
// the second is scratch. Matrices of one type that lie in one block of memory, with y, h and b that do, take one dispatch.
#define KEEL_MAX_LINEAR_PARTS 3
struct keel_lora;
struct keel_linear_part {
    const struct keel_matrix *w;
    struct keel_span y;
    const struct keel_lora *lora;
    struct keel_span h;
};
struct keel_linear_group_params {
    struct keel_linear_part part[KEEL_MAX_LINEAR_PARTS];
    uint32_t n_parts;
    struct keel_span x;
    uint32_t n_tokens;
    bool glu;
};
void keel_linear_group(keel_recorder *rec, const struct keel_linear_group_params *p);

// dx [T, K] = dy [T, N] · W, or dx += with `add`. Sums over N in a fixed order. x: dy, y: dx of the struct above.
struct keel_linear_bwd_params {
    const struct keel_matrix *w;
    struct keel_span dy, dx;
    uint32_t n_tokens;
    bool add;
};
void keel_linear_bwd(keel_recorder *rec, const struct keel_linear_bwd_params *p);

// y [T, K] = scale · W[id[t], :]. `ids` [T] u32, each below W's rows.
struct keel_embed_params {
    const struct keel_matrix *w;
    struct keel_span ids, y;
    uint32_t n_tokens;
    float scale;
};
void keel_embed(keel_recorder *rec, const struct keel_embed_params *p);

// --- LoRA (lora.c) -------------------------------------------------------------------------------

// One adapter pair: a [r, K], b [N, r], both f32 row-major in `params` at byte offsets that are multiples of 256.
struct keel_lora {
    struct keel_span a, b;
    uint32_t rank, k, n; // r, K, N
    float scale;         // alpha / rank × user scale
};
// h [T, r] = x [T, K] · aᵀ
void keel_lora_down(keel_recorder *rec, const struct keel_lora *l, struct keel_span x, struct keel_span h, uint32_t n_tokens);
// The same for adapters that share x, in one dispatch where their ranks are equal and the a and the h each lie in one block.
void keel_lora_down_group(keel_recorder *rec, const struct keel_lora *const *l, uint32_t n, struct keel_span x,
                          const struct keel_span *h, uint32_t n_tokens);
// y [T, N] += scale · h · bᵀ
void keel_lora_up(keel_recorder *rec, const struct keel_lora *l, struct keel_span h, struct keel_span y, uint32_t n_tokens);
// dh [T, r] = scale · dy [T, N] · b
void keel_lora_bwd_h(keel_recorder *rec, const struct keel_lora *l, struct keel_span dy, struct keel_span dh, uint32_t n_tokens);
// dx [T, K] += dh · a
void keel_lora_bwd_x(keel_recorder *rec, const struct keel_lora *l, struct keel_span dh, struct keel_span dx, uint32_t n_tokens);
// da [r, K] += dhᵀ · x
void keel_lora_bwd_a(keel_recorder *rec, const struct keel_lora *l, struct keel_span dh, struct keel_span x, struct keel_span da,
                     uint32_t n_tokens);
// db [N, r] += scale · dyᵀ · h
void keel_lora_bwd_b(keel_recorder *rec, const struct keel_lora *l, struct keel_span dy, struct keel_span h, struct keel_span db,
                     uint32_t n_tokens);

// --- norms (norm.c) ------------------------------------------------------------------------------

// y [T, D] = x / sqrt(mean(x²) + eps) · w (+ residual). Zhang & Sennrich 2019, eq. 4; w [D] f32 is the full factor
// (GGUF stores Gemma's 1 + w). y may be x or residual. residual may be nothing (all-zero span).
struct keel_rmsnorm_params {
    struct keel_span x, w, y, residual;
    uint32_t n_rows, width;
    float eps;
};
void keel_rmsnorm(keel_recorder *rec, const struct keel_rmsnorm_params *p);
// y [T, D] = residual + norm(x) · w, then z [T, D] = norm(y) · v, the norm being that of keel_rmsnorm(), in one dispatch. y may
// be residual, z may be x.
struct keel_rmsnorm_pair_params {
    struct keel_span x, w, residual, y, v, z;
    uint32_t n_rows, width;
    float eps;
};
void keel_rmsnorm_pair(keel_recorder *rec, const struct keel_rmsnorm_pair_params *p);
// dx = gradient of y with respect to x, or dx += with `add`. dx may be dy when not `add`. w is frozen: no gradient for it.
struct keel_rmsnorm_bwd_params {
    struct keel_span x, w, dy, dx;
    uint32_t n_rows, width;
    float eps;
    bool add;
};
void keel_rmsnorm_bwd(keel_recorder *rec, const struct keel_rmsnorm_bwd_params *p);

// y [T, D] = (x - mean(x)) / sqrt(var(x) + eps) · w + b, var being the mean square (Ba et al. 2016). y may be x.
struct keel_layernorm_params {
    struct keel_span x, w, b, y;
    uint32_t n_rows, width;
    float eps;
};
void keel_layernorm(keel_recorder *rec, const struct keel_layernorm_params *p);
// dx, or dx += with `add`. dx may be dy when not `add`. w and b are frozen.
struct keel_layernorm_bwd_params {
    struct keel_span x, w, dy, dx;
    uint32_t n_rows, width;
    float eps;
    bool add;
};
void keel_layernorm_bwd(keel_recorder *rec, const struct keel_layernorm_bwd_params *p);

// --- keys and values in memory -------------------------------------------------------------------

// Bytes of one head of a key/value cache, a multiple of 16 but for f32: KEEL_F32, KEEL_F16 (beyond ±65504: that) or KEEL_Q8_0 (codes
// of -127 to 127, one f32 scale a block of 32, the largest magnitude over 127; the last block may be a part). shaders/common/kv.glsl.
uint64_t keel_kv_head_bytes(enum keel_dtype type, uint32_t head_dim);

// --- heads: QK-norm and rotary embedding (rope.c) ------------------------------------------------

// For each token t and head h: z = rmsnorm(x[t, h, :]) · w, then rotate pairs (i, i + d/2) by the angle whose cosine and sine
// stand in rope [T, d/2, 2] (Su et al. 2021, "rotate half" as in GPT-NeoX and Gemma), and store at row slot(t) of y.
//   x [T, H, d]; w [d]; y [rows, H, d] with slot(t) = spans[t].slot % y_rows, or t itself when y_rows is 0.
//   w nothing: no norm and no rotation, a copy into the cache (for values).
// Parts (queries, keys, values) go together, in one dispatch where their inputs lie in one block of memory.
#define KEEL_MAX_HEADS_PARTS 3
struct keel_heads_part {
    struct keel_span x, w, y;
    uint32_t n_heads;
    uint32_t y_rows;
    enum keel_dtype type; // of y; parts that are not f32 are of one type
};
struct keel_heads_params {
    struct keel_heads_part part[KEEL_MAX_HEADS_PARTS];
    uint32_t n_parts;
    struct keel_span rope, spans; // spans may be nothing where no part has y_rows
    uint32_t n_tokens, head_dim;
    float eps;
};
void keel_heads(keel_recorder *rec, const struct keel_heads_params *p);
// dx [T, H, d] from dy [T, H, d] (row t belongs to token t). x is the forward input. w must be given.
struct keel_heads_bwd_params {
    struct keel_span x, w, rope, dy, dx;
    uint32_t n_tokens, n_heads, head_dim;
    float eps;
};
void keel_heads_bwd(keel_recorder *rec, const struct keel_heads_bwd_params *p);

// --- attention (attention.c) ---------------------------------------------------------------------

// What a token may see. Cache rows are counted without wrap; row j lies at j % R. Causal, sliding-window, packed rows and
// bidirectional image blocks are all such ranges: the masks of Gemma 3 are contiguous.
struct keel_token_span {
    uint32_t lo, hi;     // sees cache rows lo <= j < hi; hi > lo
    uint32_t slot;       // its own key and value are at row `slot`
    uint32_t q_lo, q_hi; // training only: the tokens of this batch that see this token's key: q_lo <= t < q_hi
    uint32_t pad[3];     // to 32 bytes
};

// o [T, H, d] = softmax(scale · q kᵀ + mask) v with grouped heads: query head h uses key head h / (H / G).
//   q [T, H, d]; k, v [R, G, d]; spans [T] of struct keel_token_span (device copy);
//   p: scratch for probabilities, at least keel_attention_scratch() bytes; after the call it holds the probabilities of all
//   tokens, [H, T, p_cols], when T fits one chunk, as keel_attention_bwd() needs.
//   max_span: at least the largest hi - lo; max_union: at least the largest (max hi - min lo) over aligned groups of
//   KEEL_ATTENTION_GROUP tokens.
//   type: of k and v.
//   first: the n_tokens from this one on are computed, the others left alone; q, o and spans begin at token 0.
//   all: every token sees cache rows [0, kv_rows), and max_span is kv_rows: patches of an image. There is a faster way for that.
#define KEEL_ATTENTION_GROUP 4
struct keel_attention_params {
    struct keel_span q, k, v, spans, o, p;
    uint32_t first, n_tokens, n_heads, n_kv_heads, head_dim, kv_rows;
    uint32_t max_span, max_union;
    enum keel_dtype type;
    float scale;
    bool all;
};
void keel_attention(keel_recorder *rec, const struct keel_attention_params *p);
uint64_t keel_attention_scratch(uint32_t n_tokens, uint32_t n_heads, uint32_t max_span);

// Gradients for a batch whose keys and values are its own (kv_rows = T, slot = t).
//   d_o [T, H, d]; dq [T, H, d], dk and dv [T, G, d] are overwritten; ds: scratch like p.
//   p as the forward left it where it and ds hold [H, T, max_span]; smaller ones are scratch, filled again chunk by chunk.
struct keel_attention_bwd_params {
    struct keel_span q, k, v, spans, p, d_o, dq, dk, dv, ds;
    uint32_t n_tokens, n_heads, n_kv_heads, head_dim;
    uint32_t max_span, max_union;
    uint32_t max_q_union; // at least the largest (max q_hi - min q_lo) over aligned groups
    float scale;
};
void keel_attention_bwd(keel_recorder *rec, const struct keel_attention_bwd_params *p);

// --- element-wise (ewise.c) ----------------------------------------------------------------------

// y = gelu_tanh(gate) · up, n elements (Shazeer 2020; Gemma uses the tanh form). y may be gate or up.
void keel_geglu(keel_recorder *rec, struct keel_span gate, struct keel_span up, struct keel_span y, uint64_t n);
// d_gate and d_up from dy; d_gate may be gate, d_up may be up.
struct keel_geglu_bwd_params {
    struct keel_span gate, up, dy, d_gate, d_up;
    uint64_t n;
};
void keel_geglu_bwd(keel_recorder *rec, const struct keel_geglu_bwd_params *p);
// y = gelu_tanh(x), n elements (Hendrycks & Gimpel 2016, tanh form). y may be x.
void keel_gelu(keel_recorder *rec, struct keel_span x, struct keel_span y, uint64_t n);
// dx = dy · gelu'(x). dx may be x or dy.
void keel_gelu_bwd(keel_recorder *rec, struct keel_span x, struct keel_span dy, struct keel_span dx, uint64_t n);
// y [T, N] = x + b (+ residual), b [N] for every row. y may be x or residual. residual may be nothing. A frozen bias has no
// gradient, and that of x is that of y.
struct keel_bias_params {
    struct keel_span x, b, y, residual;
    uint32_t n_rows, width;
};
void keel_bias(keel_recorder *rec, const struct keel_bias_params *p);
// y += a · x, n elements
void keel_axpy(keel_recorder *rec, float a, struct keel_span x, struct keel_span y, uint64_t n);
// y [n_rows, width] = x [.., width] row index[i]
void keel_gather_rows(keel_recorder *rec, struct keel_span x, struct keel_span index, struct keel_span y, uint32_t n_rows,
                      uint32_t width);
// y [.., width] row index[i] = x [n_rows, width] row i; indices distinct
void keel_scatter_rows(keel_recorder *rec, struct keel_span x, struct keel_span index, struct keel_span y, uint32_t n_rows,
                       uint32_t width);

// --- grids of rows (pool.c) ----------------------------------------------------------------------

// x [grid², D], row r · grid + c for the place (r, c) of a square grid; y [side², D] with side = grid / kernel rounded down:
// the means over squares of kernel × kernel places. Places beyond the last square are left out.
struct keel_pool_params {
    struct keel_span x, y; // backward: dy, dx
    uint32_t grid, kernel, width;
};
void keel_pool(keel_recorder *rec, const struct keel_pool_params *p);
// dx [grid², D] from dy [side², D]: x is dy, y is dx.
void keel_pool_bwd(keel_recorder *rec, const struct keel_pool_params *p);

// --- marked rows: steering and running sums (rows.c) ----------------------------------------------

// marks [T] f32 in memory that may change between replays: how much of an op a row gets, 0 or 1 for a set of positions.

// x [T, D] += a · marks[t] · v, v [D].
struct keel_rows_add_params {
    struct keel_span x, v, marks;
    uint32_t n_rows, width;
    float a;
};
void keel_rows_add(keel_recorder *rec, const struct keel_rows_add_params *p);

// Takes components along orthonormal directions u [k, D] out of x [T, D]:
//   KEEL_ABLATE: x -= marks[t] · (x·uᵢ) uᵢ for each i; KEEL_CAP: x -= marks[t] · max(x·u - limit, 0) u; KEEL_FLOOR: with min.
//   A limit takes k = 1 and writes factor [T]: marks[t] where it changed the row, else 0.
// Backward: ablation of dy in place with the same u, and as marks the same marks or, after a limit, its factor: the maps are
// symmetric.
enum keel_rows_mode { KEEL_ABLATE, KEEL_CAP, KEEL_FLOOR };
struct keel_rows_project_params {
    struct keel_span x, u, marks, factor;
    uint32_t n_rows, width, k;
    enum keel_rows_mode mode;
    float limit;
};
void keel_rows_project(keel_recorder *rec, const struct keel_rows_project_params *p);

// y [T, k] = x [T, D] · uᵀ, u [k, D]
void keel_rows_dot(keel_recorder *rec, struct keel_span x, struct keel_span u, struct keel_span y, uint32_t n_rows, uint32_t k,
                   uint32_t width);
// y [T] = squared lengths of the rows of x [T, D]
void keel_rows_square(keel_recorder *rec, struct keel_span x, struct keel_span y, uint32_t n_rows, uint32_t width);

// sums [3, 2, D] += Σ marks[t] · {x - shift, (x - shift)², |x|}; the total of each is the sum of its two rows. shift [D] near the
// mean keeps the digits of small variances beside large means.
struct keel_rows_sums_params {
    struct keel_span x, marks, shift, sums;
    uint32_t n_rows, width;
};
void keel_rows_sums(keel_recorder *rec, const struct keel_rows_sums_params *p);
// sums [D, D] += Σ marks[t] · (x - shift)(x - shift)ᵀ
void keel_rows_cov(keel_recorder *rec, const struct keel_rows_sums_params *p);

// y [R, D]: row r is Σ marks[t] · x[t] over t in [segments[r, 0], segments[r, 1]); segments [R, 2] u32. n_rows: rows of x.
struct keel_rows_pool_params {
    struct keel_span x, marks, segments, y;
    uint32_t n_rows, n_segments, width;
};
void keel_rows_pool(keel_recorder *rec, const struct keel_rows_pool_params *p);

// --- vocabulary rows: loss, log-probabilities, divergence (xent.c) -------------------------------

// For each row of logits [C, V]: stats[i] = {max, log-sum-exp, logit of targets[i], entropy}, 4 × f32.
//   partial: scratch of keel_xent_scratch(C, V) bytes. targets [C] u32 below V.
struct keel_xent_params {
    struct keel_span logits, targets, stats, partial;
    uint32_t n_rows, vocab;
};
void keel_xent(keel_recorder *rec, const struct keel_xent_params *p);
uint64_t keel_xent_scratch(uint32_t n_rows, uint32_t vocab);
// In place: logits[i, v] = weight[i] · (softmax(logits[i])[v] - [v = targets[i]]), from stats as keel_xent() left it.
// weights [C] f32: the derivative of the loss with respect to row i's negative log-likelihood.
struct keel_xent_bwd_params {
    struct keel_span logits, targets, stats, weights;
    uint32_t n_rows, vocab;
};
void keel_xent_bwd(keel_recorder *rec, const struct keel_xent_bwd_params *p);
// kl[i] = {KL(p ‖ q), KL(q ‖ p)} in nats for softmax rows p, q of logits_p, logits_q [C, V], with their stats.
// partial as for keel_xent().
struct keel_kl_params {
    struct keel_span logits_p, logits_q, stats_p, stats_q, kl, partial;
    uint32_t n_rows, vocab;
};
void keel_kl(keel_recorder *rec, const struct keel_kl_params *p);
// weights[i] *= max(2 (1 - σ(beta[i] · (log π - base[i]))), 1e-3), with log π of row i's target from stats as keel_xent() left it and
// base its log-probability under another model, all [C]: the token weights of constrained fine-tuning (Qi et al. 2024,
// arXiv 2406.05946, eq. 3).
void keel_xent_constrain(keel_recorder *rec, struct keel_span stats, struct keel_span beta, struct keel_span base, struct keel_span weights,
                         uint32_t n_rows);

// --- vocabulary rows: divergence from a short list (top.c) ---------------------------------------

// A distribution p over V elements kept as its n_top likeliest ones and, as one element, the rest of it (the tail). What is computed
// is KL(p ‖ q) of both distributions over those n_top + 1 elements: a lower bound of the whole divergence.
#define KEEL_TOP 64u
struct keel_top_params {
    struct keel_span logits;              // [C, V] of q
    struct keel_span ids;                 // [C, KEEL_TOP] u32, the first n_top of each row are read: distinct and below V
    struct keel_span log_p;               // [C, KEEL_TOP] f32
    struct keel_span tail_log_p, weights; // [C] f32; an empty tail: -3.4e38
    struct keel_span top;                 // [C, KEEL_TOP] f32
    struct keel_span stats;               // [C, 4] f32
    struct keel_span partial;             // scratch of keel_xent_scratch(C, V) bytes
    uint32_t n_rows, vocab, n_top;
};
// First: the listed logits move to `top`, stats[i, 1] becomes the log-sum-exp of the rest of row i. Reads logits and ids alone.
void keel_top_take(keel_recorder *rec, const struct keel_top_params *p);
// Then: stats[i, 2] = KL(p ‖ q).
void keel_top_kl(keel_recorder *rec, const struct keel_top_params *p);
// Then: logits[i, v] = weights[i] · dKL/dlogits, which is q(v) - p(v), with p(v) = p(tail) · q(v) / q(tail) in the tail.
void keel_top_bwd(keel_recorder *rec, const struct keel_top_params *p);

// --- optimiser (adamw.c) -------------------------------------------------------------------------

// sums[0] = Σ x² over n elements, in a fixed order. partial: keel_sumsq_scratch(n) bytes; sums at least 4 bytes.
void keel_sumsq(keel_recorder *rec, struct keel_span x, struct keel_span partial, struct keel_span sums, uint64_t n);
uint64_t keel_sumsq_scratch(uint64_t n);

// One step of torch.optim.AdamW (Loshchilov & Hutter 2019) on n elements, gradients scaled by
// min(1, clip / (sqrt(sums[0]) + 1e-6)) as torch.nn.utils.clip_grad_norm_ does; clip <= 0: not scaled.
// bias1 = 1 - beta1^step and bias2 = 1 - beta2^step for the 1-based step. Sets g to zero for the next step.
struct keel_adamw_params {
    struct keel_span w, g, m, v, sums;
    uint64_t n;
    float lr, beta1, beta2, eps, weight_decay, clip;
    float bias1, bias2;
};
void keel_adamw(keel_recorder *rec, const struct keel_adamw_params *p);

#endif
