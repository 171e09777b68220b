// SPDX-License-Identifier: MIT
// device/profile.c: time and cost by label. The recorder takes the times; here they are added up.
#include "internal.h"

#include <stdlib.h>
#include <string.h>

void keel_profile_enable(keel_device *dev, bool on)
{
    if (on && !dev->caps.timestamps) {
        KEEL_WARN(dev->log, "%s cannot time dispatches; the profile counts them with a time of 0", dev->caps.name);
    }
    dev->profile.on = on;
}

void keel_profile_reset(keel_device *dev)
{
    dev->profile.n = 0;
}

void keel_profile_finish(keel_device *dev)
{
    free(dev->profile.rows);
    dev->profile.rows = NULL;
}

void keel_profile_add(keel_device *dev, const char *label, uint64_t ns, uint64_t flops, uint64_t bytes)
{
    struct profile *p = &dev->profile;
    size_t i = 0;
    // A few dozen labels at most, and most dispatches have the label of a recent one.
    while (i < p->n && p->rows[i].label != label && strcmp(p->rows[i].label, label) != 0) {
        ++i;
    }
    if (i == p->n) {
        if (p->n == p->cap) {
            const size_t cap = p->cap ? 2 * p->cap : 64;
            struct keel_profile_row *rows = realloc(p->rows, cap * sizeof(*rows));
            if (!rows) {
                return; // a row less in a report
            }
            p->rows = rows;
            p->cap = cap;
        }
        p->rows[p->n++] = (struct keel_profile_row){.label = label};
    }
    struct keel_profile_row *r = &p->rows[i];
    ++r->count;
    r->ns += ns;
    r->flops += flops;
    r->bytes += bytes;
}

static int by_time(const void *a, const void *b)
{
    const struct keel_profile_row *x = a, *y = b;
    if (x->ns != y->ns) {
        return x->ns < y->ns ? 1 : -1;
    }
    return strcmp(x->label, y->label);
}

size_t keel_profile_rows(keel_device *dev, struct keel_profile_row *out, size_t cap)
{
    struct profile *p = &dev->profile;
    if (p->n > 0) {
        qsort(p->rows, p->n, sizeof(*p->rows), by_time);
    }
    for (size_t i = 0; i < p->n && i < cap; ++i) {
        out[i] = p->rows[i];
    }
    return p->n;
}
