// SPDX-License-Identifier: MIT
// cli/cmd_export.c: converts adapters between llama.cpp's GGUF and PEFT folders.
#include "cli.h"
#include "commands.h"

#include <keel/train.h>

struct export_args {
    struct common common;
    const char *from, *to;
};

static int export_run(const void *args)
{
    const struct export_args *a = args;
    struct context c = { 0 };
    keel_status st = context_load(&c, &a->common);
    if (st == KEEL_OK) {
        st = keel_adapter_convert(c.model, a->from, a->to);
    }
    if (st == KEEL_OK) {
        say(&c, KEEL_LOG_INFO, "wrote %s", a->to);
    }
    return context_close(&c, st);
}

#define AT(field) offsetof(struct export_args, field)
static const struct arg_option options[] = {
    OPTION_MODEL,
    { .name = "--adapter", .type = ARG_STR, .offset = AT(from), .file = ARG_IN, .value = "A", .needed = true,
      .help = "adapter to read: a GGUF, or a PEFT folder" },
    { .name = "--out", .type = ARG_STR, .offset = AT(to), .file = ARG_OUT_MADE, .value = "B", .needed = true,
      .help = "adapter to write: NAME.gguf, or a folder for PEFT" },
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_export = {
    .name = "export", .summary = "convert an adapter between GGUF and PEFT", .usage = "-m MODEL --adapter A --out B",
    .notes = "The model says which tensors there are and how wide; it is the one that the adapter was trained on.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct export_args),
    .run = export_run,
};
