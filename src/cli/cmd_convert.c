// SPDX-License-Identifier: MIT
// cli/cmd_convert.c: Hugging Face folders to GGUF, and GGUF to GGUF of another type. Two commands, one way.
#include "cli.h"
#include "commands.h"

#include <keel/convert.h>

struct convert_args {
    struct common common;
    const char *out, *mmproj, *type;
    struct arg_list words;
};

static bool show(void *user, uint64_t done, uint64_t total)
{
    progress_show(user, done >> 20, (total + (1u << 20) - 1) >> 20, "");
    return !stop_asked();
}

static keel_status one(const struct context *c, const struct convert_args *a, const char *to, bool vision)
{
    struct progress p = { .what = vision ? "vision" : "model", .unit = "MiB", .off = a->common.quiet };
    const struct keel_convert_params params = { .type = a->type, .progress = show, .user = &p };
    const keel_status st = (vision ? keel_convert_vision : keel_convert)(a->words.at[0], to, &params, &c->log);
    progress_end(&p);
    return st;
}

// The tower first: it is small, and a folder without one is found before the model is written. Both or neither: a model that cannot be
// converted takes the tower's file along.
static keel_status both(const struct context *c, const struct convert_args *a)
{
    keel_status st = a->mmproj ? one(c, a, a->mmproj, true) : KEEL_OK;
    if (st == KEEL_OK && a->out) {
        st = one(c, a, a->out, false);
        if (st != KEEL_OK && a->mmproj) {
            remove(a->mmproj);
        }
    }
    return st;
}

static int convert_run(const void *args)
{
    const struct convert_args *a = args;
    struct context c = { .log = cli_log(&a->common) };
    keel_status st = KEEL_OK;
    if (!a->out && !a->mmproj) {
        say(&c, KEEL_LOG_ERROR, "say what to write: --out FILE for the language model, --mmproj-out FILE for the vision tower");
        return EXIT_USAGE;
    }
    st = both(&c, a);
    for (size_t i = 0; st == KEEL_OK && i < 2; i++) {
        const char *made = i == 0 ? a->out : a->mmproj;
        if (made) {
            say(&c, KEEL_LOG_INFO, "wrote %s", made);
        }
    }
    return context_close(&c, st);
}

#define AT(field) offsetof(struct convert_args, field)
#define TYPES "f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0"
#define OPTIONS_OUT                                                                                                    \
    { .name = "--out", .brief = "-o", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT, .value = "M.gguf", .help = "the language model" }, \
        { .name = "--mmproj-out", .type = ARG_STR, .offset = AT(mmproj), .file = ARG_OUT, .value = "P.gguf",                            \
          .help = "the vision tower and projector, which llama.cpp calls mmproj" }
static const struct arg_option convert_options[] = {
    OPTIONS_OUT,
    { .name = "--type", .type = ARG_STR, .offset = AT(type), .value = "T",
      .help = "type of the matrices: " TYPES "; without it they keep theirs" },
    OPTIONS_LOG,
};
static const struct arg_option quantize_options[] = {
    OPTIONS_OUT,
    { .name = "--type", .type = ARG_STR, .offset = AT(type), .value = "T", .needed = true,
      .help = "type of the matrices: " TYPES },
    OPTIONS_LOG,
};
const struct arg_command cmd_convert = {
    .name = "convert", .summary = "convert a Hugging Face folder to GGUF",
    .usage = "FOLDER --out M.gguf [--mmproj-out P.gguf] [--type T]",
    .notes = "The folder holds config.json, tokenizer.json and model.safetensors, whole or in shards. llama.cpp loads the result too.",
    .options = convert_options, .n_options = sizeof convert_options / sizeof convert_options[0],
    .args_bytes = sizeof(struct convert_args), .positional = AT(words), .min_words = 1, .max_words = 1, .words_in = true, .word = "FOLDER",
    .run = convert_run,
};
const struct arg_command cmd_quantize = {
    .name = "quantize", .summary = "store a model's weights in another type", .usage = "MODEL --out M.gguf --type T",
    .notes = "MODEL is a GGUF or a Hugging Face folder. Which tensor gets which type follows llama.cpp's rules for Gemma 3: norms are\n"
             "f32, the embedding gets q6_k or q8_0, and q4_k_m and q5_k_m spend more bits on some of attn_v and ffn_down.",
    .options = quantize_options, .n_options = sizeof quantize_options / sizeof quantize_options[0],
    .args_bytes = sizeof(struct convert_args), .positional = AT(words), .min_words = 1, .max_words = 1, .words_in = true, .word = "MODEL",
    .run = convert_run,
};
