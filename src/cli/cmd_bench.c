// SPDX-License-Identifier: MIT
// cli/cmd_bench.c: tokens a second and the time of every op beside what the device can do.
#include "bench_compare.h"
#include "cli.h"
#include "commands.h"

#include <keel/bench.h>

#include <stdlib.h>

struct bench_args {
    struct common common;
    bool json, no_ops;
    const char *compare, *trace;
    uint32_t prompt, generate, context, rows, row, rank, repeats;
};

static void on_phase(void *user, const char *phase, uint32_t done, uint32_t total)
{
    const struct bench_args *a = user;
    if (!a->common.quiet) {
        fprintf(stderr, "%s: %u/%u\n", phase, done + 1, total);
    }
}

static json_t *phase_json(const struct keel_bench_phase *p)
{
    json_t *ops = json_array();
    for (uint32_t i = 0; i < p->n_ops; i++) {
        const struct keel_bench_op *o = &p->op[i];
        const double ns = o->ns ? (double)o->ns : 1;
        json_array_append_new(ops, json_pack("{s:s, s:I, s:f, s:f, s:f, s:f, s:f}", "op", o->label, "count", (json_int_t)o->count,
                                             "ms", (double)o->ns * 1e-6, "share", p->op_ns ? (double)o->ns / (double)p->op_ns : 0.0,
                                             "gbps", (double)o->bytes / ns, "gflops", (double)o->flops / ns, "roof", o->roof));
    }
    return json_pack("{s:s, s:I, s:f, s:f, s:f, s:f, s:I, s:I, s:f, s:o}", "phase", p->name, "tokens", (json_int_t)p->tokens, "seconds",
                     p->seconds, "tokens_per_second", p->tokens_per_second, "cpu_seconds", p->cpu_seconds, "host_seconds", p->host_seconds,
                     "dispatches",
                     (json_int_t)p->dispatches, "submits", (json_int_t)p->submits, "roof", p->roof, "ops", ops);
}

static void phase_print(const struct keel_bench_phase *p)
{
    printf("\n%-11s %6llu tokens in %.3f s: %.2f tokens/s; processor %.3f s, host %.1f ms; %llu dispatches in %llu submissions", p->name,
           (unsigned long long)p->tokens, p->seconds, p->tokens_per_second, p->cpu_seconds, p->host_seconds * 1e3, (unsigned long long)p->dispatches,
           (unsigned long long)p->submits);
    if (p->n_ops == 0) {
        printf("\n");
        return;
    }
    printf("; %.0f%% of the roof\n", 100.0 * p->roof);
    printf("  %-26s %7s %10s %6s %8s %9s %6s\n", "op", "count", "ms", "share", "GB/s", "GFLOP/s", "roof");
    for (uint32_t i = 0; i < p->n_ops; i++) {
        const struct keel_bench_op *o = &p->op[i];
        const double ns = o->ns ? (double)o->ns : 1;
        printf("  %-26s %7llu %10.2f %5.1f%% %8.2f %9.2f %5.0f%%\n", o->label, (unsigned long long)o->count, (double)o->ns * 1e-6,
               p->op_ns ? 100.0 * (double)o->ns / (double)p->op_ns : 0, (double)o->bytes / ns, (double)o->flops / ns,
               100.0 * o->roof);
    }
}

static json_t *result_json(const struct context *c, const struct bench_args *a, const struct keel_bench_result *r)
{
    const struct keel_caps *caps = keel_device_caps(c->dev);
    json_t *phases = json_array();
    for (uint32_t i = 0; i < r->n_phases; i++) {
        json_array_append_new(phases, phase_json(&r->phase[i]));
    }
    return json_pack("{s:s, s:s, s:s, s:i, s:s, s:f, s:f, s:f, s:I, s:f, s:o}", "model", keel_model_info(c->model)->path, "device", caps->name,
                     "kv", a->common.kv, "context", (int)a->context, "driver", caps->driver, "peak_gflops",
                     r->gflops, "peak_gbps", r->gbps, "load_seconds", (double)c->load_ns * 1e-9, "peak_bytes", (json_int_t)r->peak_bytes, "longest_submit_ms", (double)r->longest_submit_ns * 1e-6, "phases",
                     phases);
}

static void result_print(const struct context *c, const struct keel_bench_result *r)
{
    const struct keel_caps *caps = keel_device_caps(c->dev);
    printf("%s on %s (%s)\n", keel_model_info(c->model)->path, caps->name, caps->driver);
    printf("measured peaks %.1f GFLOP/s, %.1f GB/s; loaded in %.1f s; device memory at most %s; longest submission %.0f ms\n",
           r->gflops, r->gbps, (double)c->load_ns * 1e-9, bytes_text(r->peak_bytes), (double)r->longest_submit_ns * 1e-6);
    for (uint32_t i = 0; i < r->n_phases; i++) {
        phase_print(&r->phase[i]);
    }
}

// Beside a saved run unless `saved` is NULL.
static void report(const struct context *c, const struct bench_args *a, const struct keel_bench_result *r, const json_t *saved)
{
    json_t *now = result_json(c, a, r);
    json_t *compared = saved ? bench_compare(saved, now, c) : NULL;
    if (a->json) {
        if (compared) {
            json_object_set(now, "compare", compared);
        }
        print_json(stdout, json_incref(now));
    } else {
        result_print(c, r);
        if (compared) {
            bench_compare_print(compared, a->compare);
        }
    }
    json_decref(compared);
    json_decref(now);
}

static int bench_run(const void *args)
{
    const struct bench_args *a = args;
    struct context c = { .log = cli_log(&a->common) };
    keel_status st = KEEL_OK;
    struct keel_bench_result *r = calloc(1, sizeof *r);
    json_t *saved = r && a->compare ? bench_saved_load(a->compare, &c) : NULL;
    if (!r) {
        say(&c, KEEL_LOG_ERROR, "out of memory");
        st = KEEL_ERR_NO_MEMORY;
    } else if (a->compare && !saved) {
        st = KEEL_ERR_DATA;
    } else {
        st = context_load(&c, &a->common);
    }
    if (st == KEEL_OK) {
        const struct keel_bench_params params = {
            .n_prompt = a->prompt, .n_generate = a->generate, .n_context = a->context, .kv = a->common.kv, .train_rows = a->rows,
            .train_row = a->row, .rank = a->rank, .images = c.images, .n_batch = a->common.batch_tokens, .repeats = a->repeats,
            .ops = !a->no_ops, .trace = a->trace, .progress = on_phase,
            .user = (void *)args,
        };
        st = keel_bench(c.model, &params, r);
    }
    if (st == KEEL_OK) {
        report(&c, a, r, saved);
    }
    json_decref(saved);
    free(r);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct bench_args, field)
static const struct arg_option options[] = {
    OPTION_MODEL,
    OPTION_MMPROJ,
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print one JSON object" },
    { .name = "--prompt-tokens", .type = ARG_U32, .offset = AT(prompt), .value = "N", .def = "64", .min = 0, .max = 1 << 20,
      .help = "prefill so many tokens; 0: skip" },
    { .name = "--tokens", .brief = "-n", .type = ARG_U32, .offset = AT(generate), .value = "N", .def = "8", .min = 0, .max = 1 << 20,
      .help = "decode so many tokens; 0: skip" },
    { .name = "--context", .type = ARG_U32, .offset = AT(context), .value = "N", .def = "16", .min = 1, .max = 1 << 20,
      .help = "after so many others" },
    { .name = "--rows", .type = ARG_U32, .offset = AT(rows), .value = "N", .def = "1", .min = 0, .max = 1024,
      .help = "train on so many rows at once, with --mmproj also with an image each; 0: skip" },
    { .name = "--seq-len", .type = ARG_U32, .offset = AT(row), .value = "N", .def = "128", .min = 2, .max = 131072,
      .help = "of so many tokens" },
    { .name = "--rank", .type = ARG_U32, .offset = AT(rank), .value = "N", .def = "16", .min = 1, .max = 1024,
      .help = "LoRA rank, on all projections" },
    { .name = "--repeats", .type = ARG_U32, .offset = AT(repeats), .value = "N", .def = "2", .min = 1, .max = 1000,
      .help = "best of so many runs" },
    { .name = "--no-ops", .type = ARG_FLAG, .offset = AT(no_ops), .help = "no table of ops" },
    { .name = "--compare", .type = ARG_STR, .offset = AT(compare), .file = ARG_IN, .value = "FILE", .help = "beside a run saved with --json" },
    { .name = "--trace", .type = ARG_STR, .offset = AT(trace), .file = ARG_OUT, .value = "FILE",
      .help = "write what ran when, for ui.perfetto.dev or chrome://tracing" },
    { .name = "--batch-tokens", .type = ARG_U32, .offset = OPT_COMMON(batch_tokens), .value = "N", .def = "256", .min = 1,
      .max = 65536, .help = "tokens a pass takes at once" },
    OPTION_KV,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_bench = {
    .name = "bench", .summary = "prefill, decode and training speed, and the time of every op", .usage = "-m MODEL [--mmproj P] [--json] [--compare FILE] [--trace FILE]",
    .notes = "GB/s and GFLOP/s use the bytes and operations that each op declares; roof is the least time that the measured peaks of\n"
             "the device allow over the time taken; processor is the time of all threads on the CPU, host the time of a run while no submission\n"
             "was at work. Op times come from one more run with timestamps around every dispatch.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct bench_args), .run = bench_run,
};
