// SPDX-License-Identifier: MIT
// base/text.c: growing byte strings, sizes in bytes, UTF-8 checks.
#include "base.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool reserve(struct keel_text *t, size_t more)
{
    if (t->failed || more > SIZE_MAX / 4 - t->len) {
        t->failed = true;
        return false;
    }
    const size_t need = t->len + more + 1;
    if (need > t->cap) {
        const size_t cap = KEEL_MAX(need, KEEL_MAX(t->cap * 2, (size_t)64));
        char *p = realloc(t->data, cap);
        if (!p) {
            t->failed = true;
            return false;
        }
        t->data = p;
        t->cap = cap;
    }
    return true;
}

void keel_text_add(struct keel_text *t, const void *bytes, size_t len)
{
    if (reserve(t, len)) {
        if (len > 0) {
            memcpy(t->data + t->len, bytes, len);
        }
        t->len += len;
        t->data[t->len] = 0;
    }
}

void keel_text_addf(struct keel_text *t, const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    const int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n >= 0 && reserve(t, (size_t)n)) {
        vsnprintf(t->data + t->len, (size_t)n + 1, fmt, again);
        t->len += (size_t)n;
    }
    va_end(again);
}

bool keel_parse_size(const char *text, uint64_t *out)
{
    static const char suffix[] = "KMG";
    char *end;
    if (!isdigit((unsigned char)text[0])) { // strtod() takes signs, spaces and words
        return false;
    }
    double x = strtod(text, &end);
    const char *at = *end ? strchr(suffix, toupper((unsigned char)*end)) : NULL;
    if (at) {
        x *= (double)(1ull << (10 * (at - suffix + 1)));
        end++;
    }
    if (*end) {
        return false;
    }
    *out = x < 1.8e19 ? (uint64_t)x : UINT64_MAX;
    return true;
}

void keel_text_finish(struct keel_text *t)
{
    free(t->data);
    *t = (struct keel_text){ 0 };
}

bool keel_utf8_valid(const void *bytes, size_t len, size_t *bad_at)
{
    const uint8_t *s = bytes;
    size_t i = 0;
    while (i < len) {
        const uint8_t c = s[i];
        if (c < 0x80) {
            i++;
            continue;
        }
        const size_t n = c >= 0xc2 && c <= 0xdf ? 1 : c >= 0xe0 && c <= 0xef ? 2 : c >= 0xf0 && c <= 0xf4 ? 3 : 0;
        if (n == 0 || n >= len - i) {
            break;
        }
        // The second byte's range excludes overlong forms, surrogates and numbers above U+10FFFF.
        const uint8_t lo = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
        const uint8_t hi = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
        if (s[i + 1] < lo || s[i + 1] > hi) {
            break;
        }
        if ((n > 1 && (s[i + 2] & 0xc0) != 0x80) || (n > 2 && (s[i + 3] & 0xc0) != 0x80)) {
            break;
        }
        i += n + 1;
    }
    if (i < len && bad_at) {
        *bad_at = i;
    }
    return i >= len;
}
