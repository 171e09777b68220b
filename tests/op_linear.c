// SPDX-License-Identifier: MIT
// tests/op_linear.c: tiles, linear forward and backward, and embedding rows, over every weight type.
// Tolerances: op_sum_budget() over K (forward) or N (backward) terms with the magnitudes of the dequantised parts, so that
// factoring scale and minimum out of the sum is allowed and 16-bit accumulation is not.
#include "op_test.h"

#include "variants.h"

static const enum keel_dtype types[] = { KEEL_F32,  KEEL_F16,  KEEL_BF16, KEEL_Q4_0, KEEL_Q4_1, KEEL_Q5_0,
                                         KEEL_Q5_1, KEEL_Q8_0, KEEL_Q4_K, KEEL_Q5_K, KEEL_Q6_K };

struct shape {
    enum keel_dtype type;
    uint32_t T, N, K, max_rows;
};

static const char *type_name(enum keel_dtype type)
{
    return keel_dtype_info(type)->name;
}

static void record_linear(keel_recorder *rec, const void *p)
{
    keel_linear(rec, p);
}

static void record_linear_bwd(keel_recorder *rec, const void *p)
{
    keel_linear_bwd(rec, p);
}

static void record_embed(keel_recorder *rec, const void *p)
{
    keel_embed(rec, p);
}

// Σ|terms| of each element and budgets of n sums of `terms`; a variant that rounds its input may be off by that part of each term.
static double *budgets(struct op_test *t, enum keel_family f, uint32_t tokens, const double *size, size_t n, int terms)
{
    double *b = op_sum_budgets(t, size, n, terms);
    const double rounding = tokens < KEEL_MATMUL_TOKENS ? 0 : keel_variant_rounding(keel_variant_of(op_device(t), f));
    for (size_t i = 0; i < n; i++) {
        b[i] += rounding * size[i];
    }
    return b;
}

// For the dot variant, which rounds one token's x to 8 bits with a scale for each 32 columns: what is added to its n budgets. W's magnitudes.
static void add_dot_budget(struct op_test *t, double *budget, enum keel_dtype type, const double *x, const double *mag, int T, int N, int K)
{
    if (T == 1 && (type == KEEL_Q8_0 || type == KEEL_Q4_0) && keel_variant_of(op_device(t), KEEL_FAMILY_MATVEC) == KEEL_VARIANT_DOT) {
        ref_block_rounding(budget, x, mag, N, K, keel_variant_rounding(KEEL_VARIANT_DOT));
    }
}

// --- cases ---------------------------------------------------------------------------------------

// Rows of activations. From 8 rows on some are what f16 alone cannot hold: all of 1e6, one of 1e5 among small ones, tiny, zero.
static double *draw(struct op_test *t, size_t n, uint32_t rows)
{
    double *x = op_draw_heavy(t, n, 1);
    const size_t width = n / rows;
    for (size_t i = 0; rows >= KEEL_MATMUL_TOKENS && i < n; i++) {
        const size_t row = i / width;
        const double factor = row % 5 != 1 ? 1 : row % 4 == 0 ? 1e6 : row % 4 == 1 ? (i % width == width / 3 ? 1e5 : 1) : row % 4 == 2 ? 1e-12 : 0;
        x[i] = (float)(x[i] * factor);
    }
    return x;
}

static void linear_case(struct op_test *t, const struct shape *s, bool add)
{
    const int T = (int)s->T, N = (int)s->N, K = (int)s->K;
    const size_t n_x = (size_t)T * K, n_y = (size_t)T * N;
    struct keel_matrix m;
    double *w, *mag;
    op_begin(t, "linear %s T=%d N=%d K=%d shard=%u add=%d", type_name(s->type), T, N, K, s->max_rows, add);
    if (op_left_out(t)) {
        return;
    }
    op_matrix(t, &m, s->type, s->N, s->K, s->max_rows, &w, &mag);
    const double *x = draw(t, n_x, s->T);
    const double *init = add ? op_draw(t, n_y, 1) : NULL;
    double *want = add ? op_copy(t, init, n_y) : op_zeros(t, n_y);
    double *size = add ? op_abs(t, init, n_y) : op_zeros(t, n_y);
    ref_linear(want, x, w, T, N, K, add);
    ref_linear(size, op_abs(t, x, n_x), mag, T, N, K, add);
    double *budget = budgets(t, KEEL_FAMILY_MATMUL, s->T, size, n_y, K);
    add_dot_budget(t, budget, s->type, x, mag, T, N, K);
    const struct keel_linear_params p = {
        .w = &m,
        .x = op_in(t, "x", x, n_x),
        .y = op_out(t, "y", init, want, budget, n_y),
        .n_tokens = s->T,
        .add = add,
    };
    op_run(t, record_linear, &p);
}

static void linear_bwd_case(struct op_test *t, const struct shape *s, bool add)
{
    const int T = (int)s->T, N = (int)s->N, K = (int)s->K;
    const size_t n_x = (size_t)T * K, n_y = (size_t)T * N;
    struct keel_matrix m;
    double *w, *mag;
    op_begin(t, "linear_bwd %s T=%d N=%d K=%d shard=%u add=%d", type_name(s->type), T, N, K, s->max_rows, add);
    if (op_left_out(t)) {
        return;
    }
    op_matrix(t, &m, s->type, s->N, s->K, s->max_rows, &w, &mag);
    const double *dy = draw(t, n_y, s->T);
    const double *init = add ? op_draw(t, n_x, 1) : NULL;
    double *want = add ? op_copy(t, init, n_x) : op_zeros(t, n_x);
    double *size = add ? op_abs(t, init, n_x) : op_zeros(t, n_x);
    ref_linear_bwd(want, dy, w, T, N, K, add);
    ref_linear_bwd(size, op_abs(t, dy, n_y), mag, T, N, K, add);
    const struct keel_linear_bwd_params p = {
        .w = &m,
        .dy = op_in(t, "dy", dy, n_y),
        .dx = op_out(t, "dx", init, want, budgets(t, KEEL_FAMILY_MATMUL_BWD, s->T, size, n_x, N), n_x),
        .n_tokens = s->T,
        .add = add,
    };
    op_run(t, record_linear_bwd, &p);
}

static void embed_case(struct op_test *t, const struct shape *s, float scale)
{
    const int T = (int)s->T, K = (int)s->K;
    const size_t n_y = (size_t)T * K;
    struct keel_matrix m;
    double *w, *mag;
    op_begin(t, "embed %s T=%d V=%u K=%d shard=%u scale=%g", type_name(s->type), T, s->N, K, s->max_rows, (double)scale);
    if (op_left_out(t)) {
        return;
    }
    op_matrix(t, &m, s->type, s->N, s->K, s->max_rows, &w, &mag);
    uint32_t *ids = op_bytes(t, (size_t)T * 4);
    for (int i = 0; i < T; i++) { // the first and the last row, then any
        ids[i] = i == 0 ? s->N - 1 : i == 1 ? 0 : keel_rng_below(op_rng(t), s->N);
    }
    double *want = op_zeros(t, n_y), *size = op_zeros(t, n_y);
    ref_embed(want, ids, w, T, K, (double)scale);
    ref_embed(size, ids, mag, T, K, (double)scale);
    const struct keel_embed_params p = {
        .w = &m,
        .ids = op_in_words(t, "ids", ids, (size_t)T),
        .y = op_out(t, "y", NULL, want, op_sum_budgets(t, size, n_y, 1), n_y),
        .n_tokens = s->T,
        .scale = scale,
    };
    op_run(t, record_embed, &p);
}

static void all_of(struct op_test *t, const struct shape *s)
{
    linear_case(t, s, false);
    linear_case(t, s, true);
    linear_bwd_case(t, s, false);
    linear_bwd_case(t, s, true);
}

// --- shapes --------------------------------------------------------------------------------------

static const uint32_t tokens[] = { 1, 2, 3, 7, 8, 9, 17, 33, 64, 129 };
static const uint32_t outs[] = { 64, 1, 65, 100, 63, 200, 128, 3, 321, 130 };
static const uint32_t float_ins[] = { 640, 1, 33, 2, 64, 97, 31, 3, 641, 128 };
static const uint32_t ins_32[] = { 640, 32, 96, 64, 160, 1152, 128, 32, 224, 288 };
static const uint32_t ins_256[] = { 256, 768, 512, 256, 1280, 256, 512, 768, 256, 512 };

static const uint32_t *ins_of(enum keel_dtype type)
{
    const uint32_t elems = keel_dtype_info(type)->block_elems;
    return elems == 1 ? float_ins : elems == 32 ? ins_32 : ins_256;
}

// Five T a type, one for each number of tokens that a lane may work on, and other ones for the next type; N and K change along, so
// that the types together see all of them. Most of the time goes to compiling: each shape may be a pipeline of its own.
// With KEEL_TEST_FULL every T with every N and K that go along.
static void test_linear_shapes(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        const uint32_t *ins = ins_of(types[i]);
        const size_t some[] = { 0, 1 + i % 2, 3, 4 + i % 3, 7 + (i + i / 3) % 3 }; // 1; 2, 3; 7; 8, 9, 17; 33, 64, 129
        for (size_t n = 0; n < (op_full() ? KEEL_COUNT(tokens) : KEEL_COUNT(some)); n++) {
            const size_t j = op_full() ? n : some[n];
            const size_t last = op_full() ? KEEL_COUNT(outs) : 1;
            for (size_t k = 0; k < last; k++) {
                const uint32_t N = outs[(j + i + k) % KEEL_COUNT(outs)];
                const uint32_t K = ins[(j + 3 * i + 7 * k) % KEEL_COUNT(outs)];
                all_of(t, &(struct shape){ types[i], tokens[j], N, K, 0 });
            }
        }
    }
    op_end(t);
}

// Shards of 64 and 128 rows, the last one short: as a large matrix is cut, at small size.
static void test_linear_shards(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        const uint32_t K = keel_dtype_info(types[i])->block_elems == 1 ? 37 : 256;
        all_of(t, &(struct shape){ types[i], 1 + 4 * (uint32_t)(i % 3), 300, K, 64 });
        all_of(t, &(struct shape){ types[i], 9, 257, K, 128 });
    }
    op_end(t);
}

// A vocabulary: many rows, few columns.
static void test_linear_vocab(void **state)
{
    struct op_test *t = *state;
    const enum keel_dtype some[] = { KEEL_Q8_0, KEEL_F16, KEEL_Q6_K };
    for (size_t i = 0; i < KEEL_COUNT(some); i++) {
        const uint32_t K = some[i] == KEEL_Q6_K ? 256 : 32;
        const struct shape s = { some[i], 3, some[i] == KEEL_Q8_0 ? 70000 : 4097, K, some[i] == KEEL_F16 ? 1024 : 0 };
        linear_case(t, &s, false);
        linear_bwd_case(t, &s, false);
        embed_case(t, &s, 1);
    }
    op_end(t);
}

static void test_embed(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        const uint32_t *ins = ins_of(types[i]);
        for (size_t j = 0; j < 5; j++) {
            const struct shape s = { types[i], tokens[(2 * j + i) % 10], outs[(j + i) % 10], ins[(3 * j + i) % 10],
                                     j == 2 ? 64 : 0 };
            embed_case(t, &s, j % 2 ? 25.298221f : 1);
        }
    }
    op_end(t);
}

// Cooperative matrices, where the device and the build have them: sizes within and beyond a fragment and a workgroup, and the three sizes
// of workgroups; lavapipe takes seconds to compile each. Most activations are as in test_linear_shapes, some near the ends of f32: draw().
static void test_linear_coop(void **state)
{
    struct op_test *t = *state;
    static const struct shape large[] = { { KEEL_Q8_0, 300, 1411, 96, 0 }, { KEEL_F16, 1100, 1300, 20, 0 }, { KEEL_F16, 1100, 20, 1300, 0 } };
    for (enum keel_variant v = KEEL_VARIANT_COOP; v <= KEEL_VARIANT_COOP16; v++) {
        if (!keel_variant_set(op_device(t), KEEL_FAMILY_MATMUL, v) || !keel_variant_set(op_device(t), KEEL_FAMILY_MATMUL_BWD, v)) {
            print_message("no cooperative matrices here\n");
            skip();
        }
        for (size_t i = 0; i < KEEL_COUNT(types); i += v == KEEL_VARIANT_COOP || op_full() ? 1 : 4) {
            for (size_t j = 4; j < KEEL_COUNT(tokens); j += op_full() ? 1 : 1 + i % 3) {
                all_of(t, &(struct shape){ types[i], tokens[j], outs[(i + j) % 10], ins_of(types[i])[(3 * i + j) % 10], j % 2 ? 64 : 0 });
            }
        }
        for (size_t i = 0; i < KEEL_COUNT(large) && (v == KEEL_VARIANT_COOP || op_full()); i++) {
            linear_case(t, &large[i], false);
            linear_bwd_case(t, &large[i], true);
        }
    }
    keel_variant_unset(op_device(t), KEEL_FAMILY_MATMUL);
    keel_variant_unset(op_device(t), KEEL_FAMILY_MATMUL_BWD);
    op_end(t);
}

// x in 8 bits and integer products: the two types, alone and where the shape takes the base variant.
static void test_linear_dot(void **state)
{
    struct op_test *t = *state;
    if (!keel_variant_set(op_device(t), KEEL_FAMILY_MATVEC, KEEL_VARIANT_DOT)) {
        print_message("no integer dot products here\n");
        skip();
    }
    const enum keel_dtype some[] = { KEEL_Q8_0, KEEL_Q4_0, KEEL_Q4_1 };
    for (size_t i = 0; i < KEEL_COUNT(some); i++) {
        for (size_t j = 0; j < KEEL_COUNT(outs); j++) {
            const struct shape s = { some[i], j == 4 ? 3 : 1, outs[j], ins_32[(j + i) % 10], j == 5 ? 64 : 0 };
            linear_case(t, &s, j % 2);
        }
    }
    const struct shape rows[] = { { KEEL_Q4_0, 1, 70000, 32, 0 }, { KEEL_Q8_0, 1, 130, 10240, 0 }, { KEEL_Q4_0, 1, 130, 100000, 0 } };
    for (size_t i = 0; i < KEEL_COUNT(rows); i++) {
        linear_case(t, &rows[i], false);
    }
    keel_variant_unset(op_device(t), KEEL_FAMILY_MATVEC);
    op_end(t);
}

// --- slopes --------------------------------------------------------------------------------------

// Forward and backward of a linear map: no truncation error at any step, so the step is 1 and the tolerance is the rounding of
// both losses, below 1e-4 of the slope for a few hundred terms; 1e-3 leaves a factor of ten.
static void test_linear_slope(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        const int T = 3, N = 70, K = keel_dtype_info(types[i])->block_elems == 1 ? 45 : 256;
        const size_t n_x = (size_t)T * K, n_y = (size_t)T * N;
        struct keel_matrix m;
        double *w, *mag;
        op_begin(t, "linear slope %s", type_name(types[i]));
        if (op_left_out(t)) {
            continue;
        }
        op_matrix(t, &m, types[i], (uint32_t)N, (uint32_t)K, 0, &w, &mag);
        const double *x = op_draw(t, n_x, 1), *c = op_draw(t, n_y, 1);
        const struct keel_linear_params fwd = { .w = &m,
                                                .x = op_in(t, "x", x, n_x),
                                                .y = op_out(t, "y", NULL, NULL, NULL, n_y),
                                                .n_tokens = (uint32_t)T };
        const struct keel_linear_bwd_params bwd = { .w = &m,
                                                    .dy = op_in(t, "c", c, n_y),
                                                    .dx = op_out(t, "dx", NULL, NULL, NULL, n_x),
                                                    .n_tokens = (uint32_t)T };
        op_run(t, record_linear_bwd, &bwd);
        op_check_slope(t, &(struct op_slope){ .name = "x", .forward = record_linear, .params = &fwd, .x = fwd.x, .y = fwd.y,
                                              .x0 = x, .grad = op_result(t, bwd.dx), .c = c, .n_x = n_x, .n_y = n_y,
                                              .h = 1, .tol = 1e-3 });
    }
    op_end(t);
}

// --- tiles on the host ---------------------------------------------------------------------------

static void test_tiles(void **state)
{
    struct op_test *t = *state;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        const struct keel_dtype_info *info = keel_dtype_info(types[i]);
        const uint64_t rows = 130, cols = info->block_elems == 1 ? 37 : 512;
        op_begin(t, "tiles %s", info->name);
        const uint64_t bytes = keel_tile_bytes(types[i], rows, cols);
        assert_int_equal(bytes % 256, 0);
        assert_int_equal(keel_tile_bytes(types[i], 192, cols), bytes); // whole tiles of 64 rows
        const uint64_t file = 640ull / info->block_elems * info->block_bytes * 1152;
        if (info->block_elems <= 32 && keel_tile_bytes(types[i], 1152, 640) > file + file * 3 / 100) {
            op_fail(t, "%llu bytes in tiles, above the file's %llu by more than 3 %%",
                    (unsigned long long)keel_tile_bytes(types[i], 1152, 640), (unsigned long long)file);
        }
        uint8_t *blocks = op_bytes(t, rows * cols / info->block_elems * info->block_bytes);
        uint8_t *a = op_bytes(t, bytes + 64), *b = op_bytes(t, bytes + 64);
        ref_random_blocks(op_rng(t), types[i], blocks, rows * cols);
        memset(a, 0xaa, bytes + 64);
        memset(b, 0x55, bytes + 64);
        keel_tile_pack(types[i], blocks, rows, cols, a);
        keel_tile_pack(types[i], blocks, rows, cols, b);
        if (memcmp(a, b, bytes) != 0) {
            op_fail(t, "bytes that the packer does not write");
        }
        for (int j = 0; j < 64; j++) {
            if (a[bytes + j] != 0xaa) {
                op_fail(t, "written %d bytes after the end", j);
            }
        }
    }
    op_end(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiles),        cmocka_unit_test(test_embed),        cmocka_unit_test(test_linear_shapes),
        cmocka_unit_test(test_linear_shards), cmocka_unit_test(test_linear_vocab), cmocka_unit_test(test_linear_slope),
        cmocka_unit_test(test_linear_coop),   cmocka_unit_test(test_linear_dot),
    };
    return op_main("op_linear", tests);
}
