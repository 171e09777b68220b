// SPDX-License-Identifier: MIT
// device/hazards.c: which ranges of memory commands touched since the last barrier, and whether the next one must wait for them.
#include "internal.h"

static struct range range_of(struct keel_span s)
{
    return (struct range){.block = s.block, .lo = s.offset, .hi = s.offset + s.bytes};
}

static bool overlaps(const struct range_list *l, struct range r)
{
    for (uint32_t i = 0; i < l->n; ++i) {
        if (l->items[i].block == r.block && l->items[i].lo < r.hi && r.lo < l->items[i].hi) {
            return true;
        }
    }
    return false;
}

static void remember(struct range_list *l, struct range r)
{
    if (l->n > 0) {
        const struct range *last = &l->items[l->n - 1];
        if (last->block == r.block && last->lo == r.lo && last->hi == r.hi) {
            return;
        }
    }
    l->items[l->n++] = r;
}

bool keel_hazards_meet(const struct hazards *h, const struct keel_bind *binds, uint32_t n)
{
    bool hazard = h->written.n + n > HAZARDS_MOST || h->read.n + n > HAZARDS_MOST;
    for (uint32_t i = 0; i < n && !hazard; ++i) {
        const struct range r = range_of(binds[i].span);
        hazard = overlaps(&h->written, r) || (binds[i].access != KEEL_READ && overlaps(&h->read, r));
    }
    return hazard && h->stages;
}

void keel_hazards_add(struct hazards *h, const struct keel_bind *binds, uint32_t n, VkPipelineStageFlags stage)
{
    for (uint32_t i = 0; i < n; ++i) {
        const struct range r = range_of(binds[i].span);
        if (binds[i].access != KEEL_READ) {
            remember(&h->written, r);
        }
        if (binds[i].access != KEEL_WRITE) {
            remember(&h->read, r);
        }
    }
    h->stages |= stage;
}

void keel_hazards_clear(struct hazards *h)
{
    h->written.n = 0;
    h->read.n = 0;
    h->stages = 0;
}
