// SPDX-License-Identifier: MIT
// cli/cmd_merge.c: adapters into the weights of their model.
#include "cli.h"
#include "commands.h"

#include <keel/convert.h>

#include <stdlib.h>
#include <string.h>

struct merge_args {
    struct common common;
    const char *out, *type;
};

static bool show(void *user, uint64_t done, uint64_t total)
{
    progress_show(user, done >> 20, (total + (1u << 20) - 1) >> 20, "");
    return !stop_asked();
}

static keel_status merge(const struct context *c, const struct merge_args *a)
{
    keel_status st = KEEL_OK;
    const size_t n = a->common.lora.n;
    struct progress p = { .what = "merge", .unit = "MiB", .off = a->common.quiet };
    const struct keel_convert_params params = { .type = a->type, .progress = show, .user = &p };
    struct keel_merge_adapter *adapters = calloc(n, sizeof *adapters);
    char **paths = calloc(n, sizeof *paths);
    for (size_t i = 0; adapters && paths && st == KEEL_OK && i < n; i++) {
        double scale = 1.0;
        size_t len;
        if (!args_split_number(a->common.lora.at[i], &len, &scale)) {
            say(c, KEEL_LOG_ERROR, "--lora %s: the scale is not a number", a->common.lora.at[i]);
            st = KEEL_ERR_ARG;
            break;
        }
        paths[i] = strndup(a->common.lora.at[i], len);
        adapters[i] = (struct keel_merge_adapter){ .path = paths[i], .scale = (float)scale };
        st = paths[i] ? KEEL_OK : KEEL_ERR_NO_MEMORY;
    }
    if (st == KEEL_OK) {
        st = adapters && paths ? keel_merge(a->common.model, adapters, n, a->out, &params, &c->log) : KEEL_ERR_NO_MEMORY;
        progress_end(&p);
    }
    for (size_t i = 0; paths && i < n; i++) {
        free(paths[i]);
    }
    free(paths);
    free(adapters);
    return st;
}

static int merge_run(const void *args)
{
    const struct merge_args *a = args;
    struct context c = { .log = cli_log(&a->common) };
    if (a->common.lora.n == 0) {
        say(&c, KEEL_LOG_ERROR, "say what to merge: --lora A[:SCALE], once or more");
        return EXIT_USAGE;
    }
    const keel_status st = merge(&c, a);
    if (st == KEEL_OK) {
        say(&c, KEEL_LOG_INFO, "wrote %s", a->out);
    }
    return context_close(&c, st);
}

#define AT(field) offsetof(struct merge_args, field)
static const struct arg_option options[] = {
    { .name = "--model", .brief = "-m", .type = ARG_STR, .offset = OPT_COMMON(model), .file = ARG_IN, .value = "MODEL", .needed = true,
      .help = "model: a GGUF file, or a Hugging Face folder" },
    OPTION_LORA,
    { .name = "--out", .brief = "-o", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT, .value = "M.gguf", .needed = true,
      .help = "the model with the adapters in it" },
    { .name = "--type", .type = ARG_STR, .offset = AT(type), .value = "T",
      .help = "type of the matrices (keel quantize --help lists them); without it they keep theirs" },
    OPTIONS_LOG,
};
const struct arg_command cmd_merge = {
    .name = "merge", .summary = "add adapters to the weights of their model", .usage = "-m MODEL --lora A[:SCALE] --out M.gguf [--type T]",
    .notes = "Weights of a block type are rounded to it again: a small adapter may lose most of itself in 4 bits. --type f16 keeps it.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct merge_args), .run = merge_run,
};
