// SPDX-License-Identifier: MIT
// cli/cmd_study.c: keel study runs a drift study, keel report writes its page again.
#include "cli.h"
#include "commands.h"

#include <keel/study.h>

#include <string.h>

struct study_args {
    struct common common;
    struct arg_list words;
    const char *out;
    bool json;
};

struct study_progress {
    struct progress line;
    char stage[240];
};

static bool show(void *user, const struct keel_study_progress *p)
{
    struct study_progress *s = user;
    char extra[64] = "";
    if (strcmp(s->stage, p->stage) != 0) {
        const bool off = s->line.off;
        progress_end(&s->line);
        snprintf(s->stage, sizeof s->stage, "%s", p->stage);
        s->line = (struct progress){ .what = s->stage, .unit = p->unit, .off = off };
    }
    if (p->step) {
        snprintf(extra, sizeof extra, "loss %.4f", p->step->loss);
    }
    progress_show(&s->line, p->done, p->total, extra);
    return !stop_asked();
}

static void print_result(const struct context *c, const struct study_args *a, const struct keel_study_result *r)
{
    if (a->json) {
        print_json(stdout, json_pack("{s:s, s:b}", "report", r->report, "over_budget", r->over_budget));
    }
    say(c, KEEL_LOG_INFO, "%sreport: %s", r->over_budget ? "the drift budget was exceeded; " : "", r->report);
}

static int study_run(const void *args)
{
    const struct study_args *a = args;
    const struct keel_device_params device = { .select = a->common.device, .profile = a->common.profile,
                                               .validate = a->common.validate, .memory_limit = a->common.memory_limit };
    struct context c = { .log = cli_log(&a->common) };
    struct study_progress p = { .line = { .off = a->common.quiet } };
    struct keel_study_result result;
    const struct keel_study_params params = { .file = a->words.at[0], .out = a->out, .model = a->common.model, .type = a->common.type, .mmproj = a->common.mmproj,
                                              .device = &device, .variant = a->common.variant, .progress = show, .user = &p };
    stop_install();
    const keel_status st = keel_study_run(&params, &result, &c.log);
    progress_end(&p.line);
    if (st == KEEL_OK) {
        print_result(&c, a, &result);
    } else if (st == KEEL_INTERRUPTED) {
        say(&c, KEEL_LOG_ERROR, "interrupted; the same command goes on where it stopped");
    }
    return st == KEEL_OK && result.over_budget ? EXIT_BUDGET : exit_code(st);
}

static int report_run(const void *args)
{
    const struct study_args *a = args;
    struct context c = { .log = cli_log(&a->common) };
    struct keel_study_result result = { 0 };
    const keel_status st = keel_report(a->words.at[0], &result, &c.log);
    if (st == KEEL_OK) {
        print_result(&c, a, &result);
    }
    return st == KEEL_OK && result.over_budget ? EXIT_BUDGET : exit_code(st);
}

#define AT(field) offsetof(struct study_args, field)
static const struct arg_option study_options[] = {
    { .name = "--out", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT_MADE, .value = "DIR", .needed = true,
      .help = "run folder; one that holds this study already is continued" },
    { .name = "--model", .brief = "-m", .type = ARG_STR, .offset = OPT_COMMON(model), .file = ARG_IN, .value = "MODEL",
      .help = "model, instead of the study file's" },
    OPTION_TYPE,
    { .name = "--mmproj", .type = ARG_STR, .offset = OPT_COMMON(mmproj), .file = ARG_IN, .value = "FILE",
      .help = "image tower and projector (GGUF), instead of the study file's" },
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print one JSON object" },
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_study = {
    .name = "study", .summary = "evaluate, fine-tune, evaluate again, report the drift", .usage = "STUDY.yaml --out DIR [-m MODEL]",
    .notes = "Exit code 3: a drift budget of the study file was exceeded. The study file's keys: docs/studies.md.",
    .options = study_options, .n_options = sizeof study_options / sizeof study_options[0], .args_bytes = sizeof(struct study_args),
    .positional = AT(words), .min_words = 1, .max_words = 1, .words_in = true, .word = "STUDY.yaml", .run = study_run,
};

static const struct arg_option report_options[] = {
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print one JSON object" },
    OPTIONS_LOG,
};
const struct arg_command cmd_report = {
    .name = "report", .summary = "write a study's report again from its records", .usage = "DIR",
    .notes = "Needs no GPU. Exit code 3: a drift budget was exceeded.",
    .options = report_options, .n_options = sizeof report_options / sizeof report_options[0], .args_bytes = sizeof(struct study_args),
    .positional = AT(words), .min_words = 1, .max_words = 1, .word = "DIR", .run = report_run,
};
