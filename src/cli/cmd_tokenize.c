// SPDX-License-Identifier: MIT
// cli/cmd_tokenize.c: text to token ids.
#include "cli.h"
#include "commands.h"

#include <keel/images.h>

#include <stdlib.h>
#include <string.h>

struct tokenize_args {
    struct common common;
    bool json, no_bos, special;
    const char *file;
    uint32_t image_tokens;
    struct arg_list words;
};

// Token text for people: control characters and broken UTF-8 as escapes.
static void print_token(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        const unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c == 0x7F || (len == 1 && c >= 0x80)) {
            printf("\\x%02x", c);
        } else {
            putchar(c);
        }
    }
}

static void print_tokens(const keel_model *model, const struct tokenize_args *a, const int32_t *ids, size_t n)
{
    if (a->json) {
        json_t *list = json_array(), *texts = json_array();
        for (size_t i = 0; i < n; i++) {
            size_t len = 0;
            const char *text = keel_token_text(model, ids[i], true, &len);
            json_array_append_new(list, json_integer(ids[i]));
            json_array_append_new(texts, json_text(text ? text : "", text ? len : 0));
        }
        print_json(stdout, json_pack("{s:o, s:o, s:I}", "ids", list, "tokens", texts, "n", (json_int_t)n));
        return;
    }
    for (size_t i = 0; i < n; i++) {
        size_t len = 0;
        const char *text = keel_token_text(model, ids[i], true, &len);
        printf("%7d  \"", ids[i]);
        print_token(text ? text : "", text ? len : 0);
        printf("\"\n");
    }
}

// With --image-tokens every "<image>" is an image, whatever it shows.
static keel_status encode(const struct context *c, const struct tokenize_args *a, const char *text, size_t len, int32_t **ids,
                          size_t *n)
{
    struct keel_prompt p;
    struct keel_prompt_images images = { .n_tokens = a->image_tokens };
    if (!a->image_tokens) {
        return keel_encode(c->model, text, len, &(struct keel_encode_params){ .bos = !a->no_bos, .special = a->special }, ids, n);
    }
    for (const char *at = text; (at = strstr(at, "<image>")); at++) {
        images.n++;
    }
    const keel_status st = keel_prompt_encode(c->model, text, len, &images, &p);
    if (st == KEEL_OK) {
        *ids = p.ids;
        *n = p.n;
        p.ids = NULL;
        keel_prompt_finish(&p);
    }
    return st;
}

static int tokenize_run(const void *args)
{
    const struct tokenize_args *a = args;
    struct context c = { 0 };
    char *data = NULL;
    const char *text = a->words.n ? a->words.at[0] : NULL;
    size_t len = text ? strlen(text) : 0, n = 0;
    int32_t *ids = NULL;
    if ((text == NULL) == (a->file == NULL)) {
        fprintf(stderr, "keel tokenize: give either TEXT or --file FILE\n");
        return EXIT_USAGE;
    }
    if (a->image_tokens && (a->special || a->no_bos)) {
        fprintf(stderr, "keel tokenize: --image-tokens goes neither with --special nor with --no-bos\n");
        return EXIT_USAGE;
    }
    if (a->file) {
        if (!read_all(a->file, &data, &len)) {
            return EXIT_FAILED;
        }
        text = data;
    }
    keel_status st = context_open_model(&c, &a->common);
    if (st == KEEL_OK) {
        st = encode(&c, a, text, len, &ids, &n);
    }
    if (st == KEEL_OK) {
        print_tokens(c.model, a, ids, n);
    }
    free(ids);
    free(data);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct tokenize_args, field)
static const struct arg_option options[] = {
    OPTION_MODEL,
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print {\"ids\", \"tokens\", \"n\"}" },
    { .name = "--no-bos", .type = ARG_FLAG, .offset = AT(no_bos), .help = "do not begin with the BOS token" },
    { .name = "--special", .type = ARG_FLAG, .offset = AT(special), .help = "control tokens in the text become their ids" },
    { .name = "--image-tokens", .type = ARG_U32, .offset = AT(image_tokens), .value = "N", .def = "0", .min = 0, .max = 4096,
      .help = "each <image> in the text is an image of N soft tokens; 0: it is text" },
    { .name = "--file", .brief = "-f", .type = ARG_STR, .offset = AT(file), .value = "FILE",
      .help = "read the text from a file, - for standard input" },
    OPTIONS_LOG,
};
const struct arg_command cmd_tokenize = {
    .name = "tokenize", .summary = "print the token ids of a text", .usage = "-m MODEL [--json] [--no-bos] [--special] TEXT",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct tokenize_args),
    .positional = AT(words), .max_words = 1, .word = "TEXT", .run = tokenize_run,
};
