// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz.h: what the fuzzer entries share.
// Build: tests/fuzz/meson.build; run: build-fuzz/tests/fuzz/fuzz_gguf -max_total_time=60 CORPUS
#ifndef KEEL_TESTS_FUZZ_H
#define KEEL_TESTS_FUZZ_H

#include "formats.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static inline void fuzz_drop(void *user, enum keel_log_level level, const char *text)
{
    (void)user;
    (void)level;
    (void)text;
}

static const keel_log fuzz_silent = { .level = KEEL_LOG_DEBUG, .write = fuzz_drop };

// Reads every byte, so that a sanitizer sees bytes that are not there.
static inline void fuzz_use(const void *data, size_t len)
{
    static volatile uint64_t sink;
    sink = keel_hash(KEEL_HASH_INIT, data, len);
    (void)sink;
}

#endif
