// SPDX-License-Identifier: MIT
// cli/cmd_doctor.c: checks and times every kernel variant on a device, then a whole model end to end.
#include "cli.h"
#include "commands.h"

#include <keel/doctor.h>

#include <stdlib.h>
#include <string.h>

struct doctor_args {
    struct common common;
    bool json, quick;
};

static json_t *row_json(const struct keel_doctor_row *r)
{
    return json_pack("{s:s, s:s, s:s, s:i, s:b, s:b, s:f, s:o, s:s}", "op", r->op, "family", r->family, "variant", r->variant, "cases",
                     (int)r->cases, "right", r->right, "chosen", r->chosen, "worst", r->worst, "ms",
                     r->ms > 0 ? json_real(r->ms) : json_null(), "why", r->why);
}

static void row_print(const struct keel_doctor_row *r)
{
    char ms[32] = "-";
    if (r->ms > 0) {
        snprintf(ms, sizeof ms, "%.3f", r->ms);
    }
    printf("%-20s %-12s %-10s %6u %-6s %6.0f%% %10s  %s\n", r->op, r->family, r->variant, r->cases, r->right ? "right" : "WRONG",
           100 * r->worst, ms, r->right ? (r->chosen && r->family[0] ? "chosen" : "") : r->why);
}

static void on_row(void *user, const struct keel_doctor_row *row)
{
    const struct doctor_args *a = user;
    if (!a->common.quiet) {
        fprintf(stderr, "checked %s, %s: %s\n", row->op, row->variant, row->right ? "right" : "wrong");
    }
}

static json_t *whole_json(const struct keel_doctor_whole *w)
{
    return json_pack("{s:i, s:f, s:b, s:f, s:f, s:f, s:b}", "tokens", (int)w->n_tokens, "worst", w->worst, "forward_right", w->forward_right,
                     "loss_before", w->loss_before, "loss_after", w->loss_after, "fall_foretold", w->fall_foretold, "step_right",
                     w->step_right);
}

static void report_print(const struct context *c, const struct doctor_args *a, const struct keel_doctor_report *report,
                         const struct keel_doctor_whole *whole)
{
    const struct keel_caps *caps = keel_device_caps(c->dev);
    if (a->json) {
        json_t *rows = json_array();
        for (uint32_t i = 0; i < report->n_rows; i++) {
            json_array_append_new(rows, row_json(&report->row[i]));
        }
        print_json(stdout, json_pack("{s:s, s:s, s:s, s:o, s:i, s:b, s:o}", "device", caps->name, "driver", caps->driver, "profile",
                                     caps->profile, "rows", rows, "base_wrong", (int)report->n_base_wrong, "lacks_coop", report->lacks_coop, "whole",
                                     whole->n_tokens ? whole_json(whole) : json_null()));
        return;
    }
    printf("%s (%s)\n%-20s %-12s %-10s %6s %-6s %7s %10s\n", caps->name, caps->driver, "op", "family", "variant", "cases", "result", "error",
           "ms");
    for (uint32_t i = 0; i < report->n_rows; i++) {
        row_print(&report->row[i]);
    }
    if (report->lacks_coop) {
        printf("this device has cooperative matrices, but keel was built without shaders for them: build it with glslang 14 or newer\n");
    }
    if (whole->n_tokens) {
        printf("the clerk: %u log-probabilities off by at most %.2g nats: %s; a training step took %.5f nats off the loss, foretold %.5f: %s\n",
               whole->n_tokens, whole->worst, whole->forward_right ? "right" : "WRONG", whole->loss_before - whole->loss_after,
               whole->fall_foretold, whole->step_right ? "right" : "WRONG");
    }
}

// The clerk end to end, on the variants just chosen or those of --variant. Skipped where it is not installed.
static keel_status check_clerk(struct context *c, const struct doctor_args *a, struct keel_doctor_whole *whole)
{
    struct common clerk = { .model = "clerk" };
    const char *golden = shipped_golden();
    keel_model *model = NULL;
    keel_status st = a->common.variant ? keel_doctor_prepare(c->dev, a->common.variant) : KEEL_OK;
    shipped_resolve(&clerk);
    if (st != KEEL_OK || !golden) {
        if (st == KEEL_OK) {
            say(c, KEEL_LOG_WARN, "the clerk is not installed: nothing was run end to end");
        }
        return st;
    }
    st = keel_model_open(&model, clerk.model, &c->log);
    if (st == KEEL_OK) {
        st = keel_model_load(model, c->dev);
    }
    if (st == KEEL_OK) {
        st = keel_doctor_model(model, golden, whole);
    }
    keel_model_close(&model);
    return st;
}

// The status of a finished check: NUMERIC, with a reason, if the device cannot be trusted.
static keel_status verdict(const struct context *c, const struct keel_doctor_report *report, const struct keel_doctor_whole *whole)
{
    const char *name = keel_device_caps(c->dev)->name;
    if (report->n_base_wrong > 0) {
        say(c, KEEL_LOG_ERROR, "%u base variants are wrong: nothing that keel computes on %s can be trusted", report->n_base_wrong, name);
        return KEEL_ERR_NUMERIC;
    }
    if (whole->n_tokens && !(whole->forward_right && whole->step_right)) {
        say(c, KEEL_LOG_ERROR, "every kernel is right alone, but a whole model is not: keel cannot be trusted on %s; try --variant base", name);
        return KEEL_ERR_NUMERIC;
    }
    return KEEL_OK;
}

static int doctor_run(const void *args)
{
    const struct doctor_args *a = args;
    struct context c = { .log = cli_log(&a->common), .unprepared = true };
    struct keel_doctor_whole whole = { 0 };
    struct keel_doctor_report *report = calloc(1, sizeof *report);
    keel_status st = report ? KEEL_OK : KEEL_ERR_NO_MEMORY;
    if (a->common.type && !a->common.model) {
        say(&c, KEEL_LOG_ERROR, "--type is of a model; name it with -m");
        st = KEEL_ERR_ARG;
    }
    if (st == KEEL_OK) {
        st = a->common.model ? context_load(&c, &a->common) : context_open_device(&c, &a->common);
    }
    if (st == KEEL_OK) {
        const struct keel_doctor_params params = { .quick = a->quick, .model = c.model, .progress = on_row, .user = (void *)args };
        st = keel_doctor_run(c.dev, &params, report);
    }
    if (st == KEEL_OK && report->n_base_wrong == 0) {
        st = check_clerk(&c, a, &whole);
    }
    if (st == KEEL_OK) {
        report_print(&c, a, report, &whole);
        st = verdict(&c, report, &whole);
    }
    free(report);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct doctor_args, field)
static const struct arg_option options[] = {
    { .name = "--model", .brief = "-m", .type = ARG_STR, .offset = OPT_COMMON(model), .value = "MODEL",
      .help = "time the variants on the matrices of this model, and choose for it" },
    OPTION_TYPE,
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print one JSON object" },
    { .name = "--quick", .type = ARG_FLAG, .offset = AT(quick), .help = "only what the first use of a device checks by itself" },
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_doctor = {
    .name = "doctor", .summary = "check every kernel variant on a device, time it, choose", .usage = "[-m MODEL] [--json]",
    .notes = "Each variant runs on random and adverse data of odd sizes, 50 times with the same bits, against a reference in double\n"
             "precision. error is the largest in parts of what rounding explains. The choice is kept in the cache folder for this\n"
             "device, driver and version of keel. Then the clerk runs end to end: log-probabilities against those of transformers, and one\n"
             "training step. Exit code 1 if a base variant or the clerk is wrong.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct doctor_args), .run = doctor_run,
};
