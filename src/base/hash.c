// SPDX-License-Identifier: MIT
// base/hash.c: FNV-1a, 64 bits. Source: Fowler, Noll, Vo; draft-eastlake-fnv.
#include "base.h"

uint64_t keel_hash(uint64_t h, const void *data, size_t len)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < len; i++) {
        h = (h ^ p[i]) * 0x100000001b3ull;
    }
    return h;
}
