// SPDX-License-Identifier: MIT
// ops/span.c: one binding for several spans that lie near each other.
#include "ops_internal.h"

bool span_join(const keel_recorder *rec, struct keel_span *all, struct keel_span s)
{
    if (s.bytes == 0 || all->bytes == 0) {
        *all = s.bytes ? s : *all;
        return true;
    }
    const uint64_t lo = KEEL_MIN(all->offset, s.offset), hi = KEEL_MAX(all->offset + all->bytes, s.offset + s.bytes);
    if (s.block != all->block || hi - lo > keel_device_caps(keel_recorder_device(rec))->max_range) {
        return false;
    }
    *all = (struct keel_span){ .block = s.block, .offset = lo, .bytes = hi - lo };
    return true;
}
