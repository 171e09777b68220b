// SPDX-License-Identifier: MIT
// base/base.h: what every room shares: error macros, small helpers, dtypes, random numbers, hashes, text buffers.
// Knows nothing of files or GPUs.
#ifndef KEEL_BASE_H
#define KEEL_BASE_H

#include <keel/log.h>
#include <keel/size.h>
#include <keel/status.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Calls `expr`; on failure stores the status in the local `st` and jumps to `out`. The callee has logged why.
#define KEEL_TRY(expr)                                                                             \
    do {                                                                                           \
        st = (expr);                                                                               \
        if (st != KEEL_OK) {                                                                       \
            goto out;                                                                              \
        }                                                                                          \
    } while (0)

// Logs a printf-style message, stores `code` in the local `st` and jumps to `out`.
#define KEEL_FAIL(log, code, ...)                                                                  \
    do {                                                                                           \
        keel_log_write((log), KEEL_LOG_ERROR, __VA_ARGS__);                                        \
        st = (code);                                                                               \
        goto out;                                                                                  \
    } while (0)

// A promise of our own code; never for file contents, user input, device limits or what a driver returns. Stays on in release.
#define KEEL_ASSERT(cond) ((cond) ? (void)0 : keel_assert_failed(#cond, __FILE__, __LINE__))
_Noreturn void keel_assert_failed(const char *cond, const char *file, int line);

#define KEEL_ERROR(log, ...) keel_log_write((log), KEEL_LOG_ERROR, __VA_ARGS__)
#define KEEL_WARN(log, ...) keel_log_write((log), KEEL_LOG_WARN, __VA_ARGS__)
#define KEEL_INFO(log, ...) keel_log_write((log), KEEL_LOG_INFO, __VA_ARGS__)
#define KEEL_DEBUG(log, ...) keel_log_write((log), KEEL_LOG_DEBUG, __VA_ARGS__)

// Formats and sends one message. A NULL log writes warnings and errors to stderr.
void keel_log_write(const keel_log *log, enum keel_log_level level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#define KEEL_COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define KEEL_MIN(a, b) ((a) < (b) ? (a) : (b))
#define KEEL_MAX(a, b) ((a) > (b) ? (a) : (b))

static inline uint64_t keel_align_up(uint64_t x, uint64_t to)
{
    return (x + to - 1) / to * to;
}

static inline uint32_t keel_div_up(uint32_t a, uint32_t b)
{
    return (uint32_t)(((uint64_t)a + b - 1) / b);
}

// --- dtypes --------------------------------------------------------------------------------------

// Values are GGML's type numbers, so that a GGUF field converts by a range check (gguf.md, "ggml_type").
enum keel_dtype {
    KEEL_F32 = 0,
    KEEL_F16 = 1,
    KEEL_Q4_0 = 2,
    KEEL_Q4_1 = 3,
    KEEL_Q5_0 = 6,
    KEEL_Q5_1 = 7,
    KEEL_Q8_0 = 8,
    KEEL_Q4_K = 12,
    KEEL_Q5_K = 13,
    KEEL_Q6_K = 14,
    KEEL_BF16 = 30,
};

struct keel_dtype_info {
    enum keel_dtype type;
    const char *name;     // "Q4_K", as llama.cpp prints it
    uint32_t block_elems; // elements in one block: 1, 32 or 256
    uint32_t block_bytes; // bytes of one block in a GGUF file
};

// NULL for a number that is no supported type.
const struct keel_dtype_info *keel_dtype_info(uint32_t ggml_type);
// Case-insensitive; NULL for an unknown name.
const struct keel_dtype_info *keel_dtype_by_name(const char *name);

float keel_f16_to_f32(uint16_t h);
uint16_t keel_f32_to_f16(float f); // round to nearest even, overflow to infinity, NaN kept
float keel_bf16_to_f32(uint16_t h);
uint16_t keel_f32_to_bf16(float f); // round to nearest even, NaN kept

// --- random numbers ------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011): a counter-based generator, so any position of any stream can be drawn
// without state. Same bits on every machine.
void keel_philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t counter);
// A stream with its own position. Two streams of one seed are independent.
struct keel_rng {
    uint64_t seed, stream, counter;
    uint32_t buf[4];
    uint32_t left; // words of buf not used yet
};
struct keel_rng keel_rng_make(uint64_t seed, uint64_t stream);
uint32_t keel_rng_u32(struct keel_rng *rng);
uint32_t keel_rng_below(struct keel_rng *rng, uint32_t n); // uniform in [0, n), n > 0, without modulo bias
double keel_rng_uniform(struct keel_rng *rng);             // uniform in [0, 1), 53 bits
double keel_rng_normal(struct keel_rng *rng);              // standard normal, Box-Muller

// --- hashes --------------------------------------------------------------------------------------

// 64-bit FNV-1a, for cache keys and run manifests; not cryptographic. Start with KEEL_HASH_INIT and chain.
#define KEEL_HASH_INIT 0xcbf29ce484222325ull
uint64_t keel_hash(uint64_t h, const void *data, size_t len);

// --- growing text --------------------------------------------------------------------------------

// A byte string that grows. All-zero is an empty string. `data` is NUL-terminated once anything was added.
struct keel_text {
    char *data;
    size_t len, cap;
    bool failed; // memory ran out; later additions do nothing
};
void keel_text_add(struct keel_text *t, const void *bytes, size_t len);
void keel_text_addf(struct keel_text *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void keel_text_finish(struct keel_text *t); // frees; accepts an all-zero text

// True if the bytes are well-formed UTF-8 (RFC 3629: no overlong forms, no surrogates, at most U+10FFFF);
// otherwise `bad_at`, unless NULL, is the offset of the first bad byte.
bool keel_utf8_valid(const void *bytes, size_t len, size_t *bad_at);

#endif
