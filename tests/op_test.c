// SPDX-License-Identifier: MIT
// tests/op_test.c: see op_test.h. Owns the device of the current profile, the buffers and host arrays of the current case.
#include "op_test.h"

#define MAX_BUFS 24
#define MAX_ARRAYS 200
#define GUARD_WORDS 64                // before and after each buffer: 256 bytes keep the alignment of spans
static const uint32_t guard_word = 0x7fc0dead; // a NaN: a stray read shows as well as a stray write

enum buf_kind { BUF_IN, BUF_OUT, BUF_SCRATCH };

struct buf {
    const char *name;
    enum buf_kind kind;
    size_t n; // words
    struct keel_span full, span;
    uint32_t *init, *got; // n + 2 GUARD_WORDS words
    const double *want, *budget;
};

struct op_test {
    keel_device *dev;
    keel_heap *heap;
    keel_recorder *rec;
    const char *name, *profile;
    uint64_t seed;
    struct keel_rng rng;
    char label[256];
    struct buf buf[MAX_BUFS];
    int n_bufs;
    void *array[MAX_ARRAYS];
    int n_arrays;
    uint32_t n_cases, n_failed; // of the current test function
    bool case_failed;
    double worst;          // error / budget
    char worst_label[320];
};

static const char *env_or(const char *name, const char *fallback)
{
    const char *v = getenv(name);
    return v && *v ? v : fallback;
}

bool op_full(void)
{
    return strcmp(env_or("KEEL_TEST_FULL", "0"), "0") != 0;
}

keel_device *op_device(struct op_test *t)
{
    return t->dev;
}

keel_heap *op_heap(struct op_test *t)
{
    return t->heap;
}

struct keel_rng *op_rng(struct op_test *t)
{
    return &t->rng;
}

// --- cases ---------------------------------------------------------------------------------------

static void free_arrays(struct op_test *t)
{
    for (int i = 0; i < t->n_arrays; i++) {
        free(t->array[i]);
    }
    t->n_arrays = 0;
    t->n_bufs = 0;
}

void op_begin(struct op_test *t, const char *label, ...)
{
    va_list args;
    va_start(args, label);
    vsnprintf(t->label, sizeof t->label, label, args);
    va_end(args);
    free_arrays(t);
    keel_recorder_reset(t->rec);
    keel_heap_reset(t->heap);
    t->rng = keel_rng_make(t->seed, keel_hash(KEEL_HASH_INIT, t->label, strlen(t->label)));
    t->case_failed = false;
    t->n_cases++;
}

bool op_left_out(struct op_test *t)
{
    const uint64_t every = strtoull(env_or("KEEL_TEST_EVERY", "1"), NULL, 10);
    const bool out = every > 1 && t->n_cases > 1 && keel_hash(KEEL_HASH_INIT, t->label, strlen(t->label)) % every != 0;
    t->n_cases -= out;
    return out;
}

void op_fail(struct op_test *t, const char *why, ...)
{
    char text[512];
    va_list args;
    va_start(args, why);
    vsnprintf(text, sizeof text, why, args);
    va_end(args);
    t->n_failed += !t->case_failed;
    t->case_failed = true;
    if (t->n_failed <= 12) {
        print_error("%s, profile %s, seed %llu: %s: %s\n", t->name, t->profile, (unsigned long long)t->seed, t->label,
                    text);
    }
}

void op_end(struct op_test *t)
{
    print_message("%u cases, worst error %.0f %% of budget (%s)\n", t->n_cases, 100 * t->worst, t->worst_label);
    const uint32_t cases = t->n_cases, failed = t->n_failed;
    t->n_cases = t->n_failed = 0;
    t->worst = 0;
    t->worst_label[0] = '\0';
    assert_true(cases > 0);
    if (failed) {
        fail_msg("%u of %u cases failed", failed, cases);
    }
}

// --- host arrays ---------------------------------------------------------------------------------

void *op_bytes(struct op_test *t, size_t n)
{
    void *p = calloc(n ? n : 1, 1);
    assert_non_null(p);
    assert_true(t->n_arrays < MAX_ARRAYS);
    t->array[t->n_arrays++] = p;
    return p;
}

double *op_zeros(struct op_test *t, size_t n)
{
    return op_bytes(t, n * sizeof(double));
}

double *op_draw(struct op_test *t, size_t n, double scale)
{
    double *x = op_zeros(t, n);
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(scale * keel_rng_normal(&t->rng));
    }
    return x;
}

double *op_draw_heavy(struct op_test *t, size_t n, double scale)
{
    double *x = op_draw(t, n, scale);
    for (size_t i = 0; i < n; i++) {
        if (keel_rng_below(&t->rng, 50) == 0) {
            x[i] = (float)(100 * x[i]);
        }
    }
    return x;
}

double *op_abs(struct op_test *t, const double *x, size_t n)
{
    double *a = op_zeros(t, n);
    for (size_t i = 0; i < n; i++) {
        a[i] = fabs(x[i]);
    }
    return a;
}

double *op_copy(struct op_test *t, const double *x, size_t n)
{
    double *c = op_zeros(t, n);
    memcpy(c, x, n * sizeof *c);
    return c;
}

double *op_sum_budgets(struct op_test *t, const double *mag, size_t n, double terms)
{
    double *b = op_zeros(t, n);
    for (size_t i = 0; i < n; i++) {
        b[i] = op_sum_budget(mag[i], terms);
    }
    return b;
}

// --- device buffers ------------------------------------------------------------------------------

static struct buf *add_buf(struct op_test *t, const char *name, enum buf_kind kind, size_t n)
{
    assert_true(t->n_bufs < MAX_BUFS);
    struct buf *b = &t->buf[t->n_bufs++];
    const size_t words = n + 2 * GUARD_WORDS;
    *b = (struct buf){ .name = name, .kind = kind, .n = n, .init = op_bytes(t, words * 4), .got = op_bytes(t, words * 4) };
    if (keel_heap_alloc(t->heap, words * 4, &b->full) != KEEL_OK) {
        fail_msg("%s: no memory for %s", t->label, name);
    }
    b->span = keel_span_sub(b->full, GUARD_WORDS * 4, n * 4);
    for (size_t i = 0; i < words; i++) {
        b->init[i] = guard_word;
    }
    return b;
}

static void put_floats(uint32_t *words, const double *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const float f = (float)x[i];
        memcpy(&words[i], &f, 4);
    }
}

struct keel_span op_in(struct op_test *t, const char *name, const double *x, size_t n)
{
    struct buf *b = add_buf(t, name, BUF_IN, n);
    put_floats(b->init + GUARD_WORDS, x, n);
    return b->span;
}

struct keel_span op_in_words(struct op_test *t, const char *name, const void *words, size_t n)
{
    struct buf *b = add_buf(t, name, BUF_IN, n);
    memcpy(b->init + GUARD_WORDS, words, n * 4);
    return b->span;
}

struct keel_span op_out(struct op_test *t, const char *name, const double *init, const double *want, const double *budget,
                        size_t n)
{
    struct buf *b = add_buf(t, name, BUF_OUT, n);
    b->want = want;
    b->budget = budget;
    if (init) {
        put_floats(b->init + GUARD_WORDS, init, n);
    }
    return b->span;
}

struct keel_span op_out_words(struct op_test *t, const char *name, const uint32_t *init, size_t n)
{
    struct buf *b = add_buf(t, name, BUF_OUT, n);
    memcpy(b->init + GUARD_WORDS, init, n * 4);
    return b->span;
}

struct keel_span op_scratch(struct op_test *t, const char *name, uint64_t bytes)
{
    return add_buf(t, name, BUF_SCRATCH, (size_t)KEEL_MAX((bytes + 3) / 4, 1))->span;
}

static struct buf *find_buf(struct op_test *t, struct keel_span span)
{
    for (int i = 0; i < t->n_bufs; i++) {
        if (t->buf[i].span.block == span.block && t->buf[i].span.offset == span.offset) {
            return &t->buf[i];
        }
    }
    fail_msg("%s: no such buffer", t->label);
    return NULL;
}

static float word_float(uint32_t word)
{
    float f;
    memcpy(&f, &word, 4);
    return f;
}

double *op_result(struct op_test *t, struct keel_span span)
{
    const struct buf *b = find_buf(t, span);
    double *x = op_zeros(t, b->n);
    for (size_t i = 0; i < b->n; i++) {
        x[i] = word_float(b->got[GUARD_WORDS + i]);
    }
    return x;
}

const uint32_t *op_result_words(struct op_test *t, struct keel_span span)
{
    return find_buf(t, span)->got + GUARD_WORDS;
}

// --- running -------------------------------------------------------------------------------------

static bool run_once(struct op_test *t, op_record_fn record, const void *params)
{
    keel_status st = KEEL_OK;
    keel_recorder_reset(t->rec);
    for (int i = 0; i < t->n_bufs && st == KEEL_OK; i++) {
        const struct buf *b = &t->buf[i];
        st = keel_upload(t->dev, b->full, b->init, (b->n + 2 * GUARD_WORDS) * 4);
    }
    if (st == KEEL_OK) {
        record(t->rec, params);
        st = keel_recorder_submit(t->rec);
    }
    if (st == KEEL_OK) {
        st = keel_recorder_wait(t->rec);
    }
    for (int i = 0; i < t->n_bufs && st == KEEL_OK; i++) {
        struct buf *b = &t->buf[i];
        st = keel_download(t->dev, b->got, b->full, (b->n + 2 * GUARD_WORDS) * 4);
    }
    if (st != KEEL_OK) {
        op_fail(t, "status %d", (int)st);
    }
    return st == KEEL_OK;
}

static void check_guards(struct op_test *t, const struct buf *b)
{
    for (size_t i = 0; i < GUARD_WORDS; i++) {
        if (b->got[i] != guard_word) {
            op_fail(t, "%s: written %zu words before its start", b->name, GUARD_WORDS - i);
            return;
        }
        if (b->got[GUARD_WORDS + b->n + i] != guard_word) {
            op_fail(t, "%s: written %zu words after its end (%zu words)", b->name, i, b->n);
            return;
        }
    }
    if (b->kind == BUF_IN && memcmp(b->got, b->init, (b->n + 2 * GUARD_WORDS) * 4) != 0) {
        op_fail(t, "%s: an input was changed", b->name);
    }
}

static void check_values(struct op_test *t, const struct buf *b)
{
    size_t n_bad = 0, first = 0;
    double worst = 0;
    for (size_t i = 0; i < b->n; i++) {
        const double got = word_float(b->got[GUARD_WORDS + i]);
        const double err = fabs(got - b->want[i]);
        const bool ok = err <= b->budget[i]; // false for NaN
        const double share = err == 0 ? 0 : err / b->budget[i];
        if (ok && share > worst) {
            worst = share;
        }
        if (!ok && n_bad++ == 0) {
            first = i;
        }
    }
    if (n_bad) {
        const double got = word_float(b->got[GUARD_WORDS + first]);
        op_fail(t, "%s[%zu]: got %.9g, want %.9g, error %.0f %% of budget; %zu of %zu values are wrong", b->name, first, got,
                b->want[first], 100 * fabs(got - b->want[first]) / b->budget[first], n_bad, b->n);
    } else if (worst > t->worst) {
        t->worst = worst;
        snprintf(t->worst_label, sizeof t->worst_label, "%s: %s", t->label, b->name);
    }
}

void op_run(struct op_test *t, op_record_fn record, const void *params)
{
    uint32_t *first[MAX_BUFS];
    if (!run_once(t, record, params)) {
        return;
    }
    for (int i = 0; i < t->n_bufs; i++) {
        const struct buf *b = &t->buf[i];
        check_guards(t, b);
        if (b->kind == BUF_OUT && b->want) {
            check_values(t, b);
        }
        first[i] = op_bytes(t, b->n * 4);
        memcpy(first[i], b->got + GUARD_WORDS, b->n * 4);
    }
    if (!run_once(t, record, params)) {
        return;
    }
    for (int i = 0; i < t->n_bufs; i++) {
        const struct buf *b = &t->buf[i];
        if (b->kind == BUF_OUT && memcmp(first[i], b->got + GUARD_WORDS, b->n * 4) != 0) {
            op_fail(t, "%s: a second run gave other bits", b->name);
        }
    }
}

// --- matrices ------------------------------------------------------------------------------------

void op_matrix(struct op_test *t, struct keel_matrix *m, enum keel_dtype type, uint32_t rows, uint32_t cols,
               uint32_t max_rows, double **w, double **mag)
{
    const struct keel_dtype_info *info = keel_dtype_info(type);
    const size_t n = (size_t)rows * cols, row_bytes = (size_t)cols / info->block_elems * info->block_bytes;
    uint8_t *blocks = op_bytes(t, rows * row_bytes);
    ref_random_blocks(&t->rng, type, blocks, n);
    *w = op_zeros(t, n);
    *mag = op_zeros(t, n);
    ref_dequant(*w, *mag, type, blocks, n);
    if (max_rows == 0) {
        if (keel_matrix_create(m, t->dev, t->heap, type, rows, cols, blocks, NULL) != KEEL_OK ||
            keel_stage_finish(t->dev) != KEEL_OK) {
            fail_msg("%s: keel_matrix_create failed", t->label);
        }
        return;
    }
    *m = (struct keel_matrix){ .type = type, .rows = rows, .cols = cols };
    for (uint32_t row0 = 0; row0 < rows; row0 += max_rows) {
        struct keel_shard *s = &m->shard[m->n_shards++];
        s->row0 = row0;
        s->rows = KEEL_MIN(max_rows, rows - row0);
        const uint64_t bytes = keel_tile_bytes(type, s->rows, cols);
        uint32_t *packed = op_bytes(t, bytes);
        keel_tile_pack(type, blocks + row0 * row_bytes, s->rows, cols, packed);
        s->span = op_in_words(t, "weights", packed, bytes / 4);
    }
}

// --- central differences -------------------------------------------------------------------------

static double slope_loss(struct op_test *t, const struct op_slope *s, const double *x)
{
    struct buf *b = find_buf(t, s->x);
    put_floats(b->init + GUARD_WORDS, x, s->n_x);
    if (!run_once(t, s->forward, s->params)) {
        return NAN;
    }
    const struct buf *y = find_buf(t, s->y);
    double sum = 0;
    for (size_t i = 0; i < s->n_y; i++) {
        sum += s->c[i] * word_float(y->got[GUARD_WORDS + i]);
    }
    return sum;
}

void op_check_slope(struct op_test *t, const struct op_slope *s)
{
    double *up = op_zeros(t, s->n_x), *down = op_zeros(t, s->n_x);
    for (int round = 0; round < 3; round++) {
        double want = 0, size = 0;
        for (size_t i = 0; i < s->n_x; i++) {
            const double step = s->h * keel_rng_normal(&t->rng);
            up[i] = (float)(s->x0[i] + step);
            down[i] = (float)(s->x0[i] - step);
            const double term = s->grad[i] * (up[i] - down[i]);
            want += term;
            size += term * term;
        }
        const double got = slope_loss(t, s, up) - slope_loss(t, s, down);
        const double budget = s->tol * sqrt(size);
        if (!(fabs(got - want) <= budget)) {
            op_fail(t, "d%s: backward says %.7g, central difference %.7g, error %.0f %% of budget", s->name, want, got,
                    100 * fabs(got - want) / budget);
        } else if (fabs(got - want) / budget > t->worst) {
            t->worst = fabs(got - want) / budget;
            snprintf(t->worst_label, sizeof t->worst_label, "%s: slope of %s", t->label, s->name);
        }
    }
    put_floats(find_buf(t, s->x)->init + GUARD_WORDS, s->x0, s->n_x);
}

// --- main ----------------------------------------------------------------------------------------

static struct op_test the_test;

static int give_state(void **state)
{
    *state = &the_test;
    return 0;
}

static int run_profile(const char *name, const char *profile, const struct CMUnitTest *tests, size_t n)
{
    struct op_test *t = &the_test;
    const struct keel_device_params params = { .select = env_or("KEEL_TEST_DEVICE", "0"),
                                               .profile = strcmp(profile, "none") == 0 ? NULL : profile,
                                               .validate = true,
                                               .no_cache = true };
    *t = (struct op_test){ .name = name, .profile = profile };
    t->seed = strtoull(env_or("KEEL_TEST_SEED", "1"), NULL, 0);
    int failed = 1;
    if (keel_device_create(&t->dev, &params, NULL) == KEEL_OK &&
        keel_heap_create(&t->heap, t->dev, KEEL_HEAP_DEVICE, "op test") == KEEL_OK &&
        keel_recorder_create(&t->rec, t->dev, &(struct keel_recorder_params){ .replay = false }) == KEEL_OK) {
        char group[128];
        snprintf(group, sizeof group, "%s, profile %s", name, profile);
        print_message("%s: %s, seed %llu\n", group, keel_device_caps(t->dev)->name, (unsigned long long)t->seed);
        failed = _cmocka_run_group_tests(group, tests, n, give_state, NULL);
        const uint32_t messages = keel_device_validation_count(t->dev);
        if (messages) {
            print_error("%s: %u validation messages\n", group, messages);
            failed++;
        }
    }
    free_arrays(t);
    keel_recorder_destroy(&t->rec);
    keel_heap_destroy(&t->heap);
    keel_device_destroy(&t->dev);
    return failed;
}

int op_main_n(const char *name, const struct CMUnitTest *tests, size_t n)
{
    size_t n_devices = 0;
    if (keel_device_list(NULL, 0, &n_devices, NULL) == KEEL_ERR_NO_DEVICE) {
        print_message("%s: no Vulkan device, skipped\n", name);
        return 77;
    }
    cmocka_set_test_filter(env_or("KEEL_TEST_ONLY", "*"));
    char profiles[256];
    snprintf(profiles, sizeof profiles, "%s", env_or("KEEL_TEST_PROFILES", "none,min,rpi"));
    int failed = 0;
    char *rest = NULL;
    for (char *p = strtok_r(profiles, ",", &rest); p; p = strtok_r(NULL, ",", &rest)) {
        failed += run_profile(name, p, tests, n);
    }
    return failed ? 1 : 0;
}
