// SPDX-License-Identifier: MIT
// bench/trace.c: events of a profile in the Trace Event Format ("JSON Object Format"; Google, "Trace Event Format", 2016).
// A phase is a process; its one thread holds the dispatches, and submissions are asynchronous events, since several are in flight.
#include "trace.h"

#include "base.h"
#include "platform.h"

#include <jansson.h>
#include <stdlib.h>

struct trace {
    const keel_log *log;
    json_t *events;
    uint32_t n_phases;
    bool failed; // memory ran out
};

enum { DISPATCHES = 1 }; // thread

keel_status keel_trace_create(struct trace **out, const keel_log *log)
{
    struct trace *t = calloc(1, sizeof *t);
    *out = NULL;
    if (t) {
        t->log = log;
        t->events = json_array();
    }
    if (!t || !t->events) {
        keel_trace_destroy(&t);
        KEEL_ERROR(log, "out of memory for a trace");
        return KEEL_ERR_NO_MEMORY;
    }
    *out = t;
    return KEEL_OK;
}

// Takes ownership of `event`.
static void append(struct trace *t, json_t *event)
{
    t->failed = json_array_append_new(t->events, event) != 0 || t->failed; // an event that could not be made is NULL and fails too
}

static void name_process(struct trace *t, const char *name)
{
    append(t, json_pack("{s:s, s:s, s:i, s:{s:s}}", "ph", "M", "name", "process_name", "pid", (int)t->n_phases, "args", "name", name));
    append(t, json_pack("{s:s, s:s, s:i, s:i, s:{s:s}}", "ph", "M", "name", "thread_name", "pid", (int)t->n_phases, "tid", DISPATCHES,
                        "args", "name", "dispatches"));
}

static void add_dispatch(struct trace *t, const struct keel_profile_event *e, double start_us)
{
    const double ns = e->ns ? (double)e->ns : 1;
    append(t, json_pack("{s:s, s:s, s:s, s:i, s:i, s:f, s:f, s:{s:I, s:I, s:f, s:f, s:I}}", "ph", "X", "name", e->label, "cat", "op", "pid",
                        (int)t->n_phases, "tid", DISPATCHES, "ts", start_us, "dur", (double)e->ns * 1e-3, "args", "flops",
                        (json_int_t)e->flops, "bytes", (json_int_t)e->bytes, "gflops", (double)e->flops / ns, "gbps",
                        (double)e->bytes / ns, "submission", (json_int_t)e->submission));
}

static void add_submission(struct trace *t, const struct keel_profile_event *e, double start_us)
{
    for (int end = 0; end < 2; end++) {
        append(t, json_pack("{s:s, s:s, s:s, s:i, s:I, s:f}", "ph", end ? "e" : "b", "name", "submission", "cat", "submission", "pid",
                            (int)t->n_phases, "id", (json_int_t)e->submission, "ts", start_us + (end ? (double)e->ns * 1e-3 : 0)));
    }
}

void keel_trace_add(struct trace *t, const keel_device *dev, const char *name)
{
    const struct keel_profile_event *e;
    const size_t n = keel_profile_events(dev, &e);
    t->n_phases++;
    name_process(t, name);
    for (size_t i = 0; i < n; i++) {
        const double start_us = ((double)e[i].start_ns - (double)e[0].start_ns) * 1e-3; // the first event is a submission
        if (e[i].label) {
            add_dispatch(t, &e[i], start_us);
        } else {
            add_submission(t, &e[i], start_us);
        }
    }
}

keel_status keel_trace_write(const struct trace *t, const char *path, const struct keel_caps *caps)
{
    keel_status st = KEEL_OK;
    struct keel_file_out file = { 0 };
    json_t *doc = json_pack("{s:O, s:s, s:{s:s, s:s, s:f, s:f}}", "traceEvents", t->events, "displayTimeUnit", "ns", "otherData", "device",
                            caps->name, "driver", caps->driver, "peak_gflops", caps->gflops, "peak_gbps", caps->gbps);
    if (!doc || t->failed) {
        KEEL_FAIL(t->log, KEEL_ERR_NO_MEMORY, "out of memory for the trace %s", path);
    }
    KEEL_TRY(keel_file_create(&file, path, t->log));
    (void)json_dumpf(doc, file.f, JSON_COMPACT | JSON_REAL_PRECISION(12)); // the commit finds what could not be written
    KEEL_TRY(keel_file_commit(&file, t->log));
out:
    keel_file_abort(&file);
    json_decref(doc);
    return st;
}

void keel_trace_destroy(struct trace **pt)
{
    struct trace *t = pt ? *pt : NULL;
    if (t) {
        json_decref(t->events);
        free(t);
        *pt = NULL;
    }
}
