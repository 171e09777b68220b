// SPDX-License-Identifier: MIT
// tests/formats_util.h: what the tests of the formats room share: a log that remembers, exact copies that a
// sanitizer can guard, and GGUF files built byte by byte, right or wrong.
#ifndef KEEL_TESTS_FORMATS_UTIL_H
#define KEEL_TESTS_FORMATS_UTIL_H

#include "formats.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct memory_log {
    keel_log log;
    char last[2048];
    int n;
};

static inline void remember(void *user, enum keel_log_level level, const char *text)
{
    struct memory_log *m = user;
    (void)level;
    snprintf(m->last, sizeof m->last, "%s", text);
    m->n++;
}

// Usage: struct memory_log m; memory_log_init(&m); pass &m.log.
static inline void memory_log_init(struct memory_log *m)
{
    memset(m, 0, sizeof *m);
    m->log = (keel_log){ .level = KEEL_LOG_WARN, .write = remember, .user = m };
}

// A failure must be logged exactly once and name what is at fault.
static inline void assert_logged(struct memory_log *m, const char *part)
{
    if (m->n != 1 || !strstr(m->last, part)) {
        fail_msg("expected one message with '%s', got %d, last '%s'", part, m->n, m->last);
    }
    m->n = 0;
}

// A heap copy of exactly n bytes, so that reading one more is seen by a sanitizer.
static inline uint8_t *exact_copy(const void *data, size_t n)
{
    uint8_t *p = malloc(n ? n : 1);
    assert_non_null(p);
    if (n) {
        memcpy(p, data, n);
    }
    return p;
}

static inline void put_u32(struct keel_text *t, uint32_t v)
{
    keel_text_add(t, &v, sizeof v);
}

static inline void put_u64(struct keel_text *t, uint64_t v)
{
    keel_text_add(t, &v, sizeof v);
}

static inline void put_str(struct keel_text *t, const char *s)
{
    put_u64(t, strlen(s));
    keel_text_add(t, s, strlen(s));
}

// A repeatable byte stream for both C and tests/data/quant_vectors.py.
static inline uint8_t next_byte(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (uint8_t)(*state >> 24);
}

#endif
