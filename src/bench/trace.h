// SPDX-License-Identifier: MIT
// bench/trace.h: what ran when on a device, as a file that Perfetto and chrome://tracing show.
#ifndef KEEL_TRACE_H
#define KEEL_TRACE_H

#include "device.h"

struct trace;
// Errors: NO_MEMORY.
keel_status keel_trace_create(struct trace **out, const keel_log *log);
// Adds the events of the device's profile as a process of this name (static storage). Memory that runs out shows when writing.
void keel_trace_add(struct trace *t, const keel_device *dev, const char *name);
// Errors: NO_MEMORY, IO.
keel_status keel_trace_write(const struct trace *t, const char *path, const struct keel_caps *caps);
void keel_trace_destroy(struct trace **t); // accepts NULL and pointers to NULL

#endif
