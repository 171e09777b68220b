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
    dev->profile.n = dev->profile.n_events = 0;
    dev->profile.n_submissions = 0;
    dev->profile.clock_set = false;
}

void keel_profile_finish(keel_device *dev)
{
    free(dev->profile.rows);
    free(dev->profile.events);
    dev->profile.rows = NULL;
    dev->profile.events = NULL;
}

// The items with room for one more, moved if need be; NULL, and nothing freed, when memory is out: a row less in a report.
static void *with_room(void *items, size_t n, size_t *cap, size_t item_bytes)
{
    if (n < *cap) {
        return items;
    }
    const size_t more = *cap ? 2 * *cap : 64;
    void *p = realloc(items, more * item_bytes);
    *cap = p ? more : *cap;
    return p;
}

static void add_to_row(struct profile *p, const struct keel_profile_event *e)
{
    size_t i = 0;
    // A few dozen labels at most, and most dispatches have the label of a recent one.
    while (i < p->n && p->rows[i].label != e->label && strcmp(p->rows[i].label, e->label) != 0) {
        ++i;
    }
    if (i == p->n) {
        struct keel_profile_row *rows = with_room(p->rows, p->n, &p->cap, sizeof(*rows));
        if (!rows) {
            return;
        }
        p->rows = rows;
        p->rows[p->n++] = (struct keel_profile_row){.label = e->label};
    }
    struct keel_profile_row *r = &p->rows[i];
    ++r->count;
    r->ns += e->ns;
    r->flops += e->flops;
    r->bytes += e->bytes;
}

void keel_profile_set_clock(keel_device *dev, double device_ns, uint64_t host_ns)
{
    struct profile *p = &dev->profile;
    if (!p->clock_set) {
        p->clock_ns = (double)host_ns - device_ns;
        p->clock_set = true;
    }
}

void keel_profile_add(keel_device *dev, struct keel_profile_event event)
{
    struct profile *p = &dev->profile;
    if (event.label) {
        event.start_ns = (uint64_t)((double)event.start_ns + p->clock_ns);
        add_to_row(p, &event);
    }
    struct keel_profile_event *events = with_room(p->events, p->n_events, &p->cap_events, sizeof(*events));
    if (events) {
        p->events = events;
        p->events[p->n_events++] = event;
    }
}

size_t keel_profile_events(const keel_device *dev, const struct keel_profile_event **out)
{
    *out = dev->profile.events;
    return dev->profile.n_events;
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
