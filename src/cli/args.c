// SPDX-License-Identifier: MIT
// cli/args.c: parses options from a table and prints the help from the same table.
#include "args.h"

#include <keel/size.h>

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *field(void *args, const struct arg_option *o)
{
    return (char *)args + o->offset;
}

static bool list_add(struct arg_list *list, const char *value)
{
    const char **at = realloc(list->at, (list->n + 1) * sizeof *at);
    if (!at) {
        return false;
    }
    list->at = at;
    list->at[list->n++] = value;
    return true;
}

static bool parse_whole(const char *text, uint64_t *out)
{
    char *end;
    if (!isdigit((unsigned char)text[0])) {
        return false;
    }
    errno = 0;
    *out = strtoull(text, &end, 10);
    return *end == '\0' && errno == 0;
}

static bool parse_number(const char *text, double *out)
{
    char *end;
    if (text[0] == '\0' || isspace((unsigned char)text[0])) {
        return false;
    }
    *out = strtod(text, &end);
    return *end == '\0' && isfinite(*out);
}

static bool in_range(const struct arg_option *o, double x)
{
    return o->min == o->max || (x >= o->min && x <= o->max);
}

static void say_range(const char *command, const struct arg_option *o, const char *text)
{
    fprintf(stderr, "keel %s: %s %s: must be from %g to %g\n", command, o->name, text, o->min, o->max);
}

static bool set_choice(const char *command, const struct arg_option *o, const char *text)
{
    for (size_t i = 0; o->choice[i]; i++) {
        if (strcmp(o->choice[i], text) == 0) {
            return true;
        }
    }
    fprintf(stderr, "keel %s: %s %s: must be one of", command, o->name, text);
    for (size_t i = 0; o->choice[i]; i++) {
        fprintf(stderr, "%s %s", i ? "," : "", o->choice[i]);
    }
    fputc('\n', stderr);
    return false;
}

static bool set_whole(const char *command, const struct arg_option *o, void *args, const char *text)
{
    uint64_t u;
    if (!parse_whole(text, &u)) {
        fprintf(stderr, "keel %s: %s %s: not a whole number\n", command, o->name, text);
        return false;
    }
    if (!in_range(o, (double)u) || (o->type == ARG_U32 && u > UINT32_MAX)) {
        say_range(command, o, text);
        return false;
    }
    if (o->type == ARG_U32) {
        *(uint32_t *)field(args, o) = (uint32_t)u;
    } else {
        *(uint64_t *)field(args, o) = u;
    }
    return true;
}

static bool set_value(const char *command, const struct arg_option *o, void *args, const char *text)
{
    double x;
    switch (o->type) {
    case ARG_STR:
        if (o->choice && !set_choice(command, o, text)) {
            return false;
        }
        *(const char **)field(args, o) = text;
        return true;
    case ARG_LIST:
        if (!list_add(field(args, o), text)) {
            fprintf(stderr, "keel %s: out of memory\n", command);
            return false;
        }
        return true;
    case ARG_U32:
    case ARG_U64: return set_whole(command, o, args, text);
    case ARG_SIZE:
        if (!keel_parse_size(text, field(args, o))) {
            fprintf(stderr, "keel %s: %s %s: not a size such as 512M or 2.5G\n", command, o->name, text);
            return false;
        }
        return true;
    case ARG_NUM:
        if (!parse_number(text, &x)) {
            fprintf(stderr, "keel %s: %s %s: not a number\n", command, o->name, text);
            return false;
        }
        if (!in_range(o, x)) {
            say_range(command, o, text);
            return false;
        }
        *(double *)field(args, o) = x;
        return true;
    default: return true;
    }
}

static const struct arg_option *find_option(const struct arg_command *c, const char *word, size_t len)
{
    for (size_t i = 0; i < c->n_options; i++) {
        const struct arg_option *o = &c->options[i];
        if (o->type == ARG_HEAD) {
            continue;
        }
        if ((strlen(o->name) == len && strncmp(o->name, word, len) == 0) ||
            (o->brief && strlen(o->brief) == len && strncmp(o->brief, word, len) == 0)) {
            return o;
        }
    }
    return NULL;
}

// Levenshtein distance, cut at 31 characters; small words only.
static size_t distance(const char *a, const char *b)
{
    size_t row[32];
    const size_t na = strlen(a), nb = strlen(b);
    if (na > 31 || nb > 31) {
        return 99;
    }
    for (size_t j = 0; j <= nb; j++) {
        row[j] = j;
    }
    for (size_t i = 1; i <= na; i++) {
        size_t diag = row[0];
        row[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = diag + (a[i - 1] != b[j - 1]);
            best = row[j] + 1 < best ? row[j] + 1 : best;
            best = row[j - 1] + 1 < best ? row[j - 1] + 1 : best;
            diag = row[j];
            row[j] = best;
        }
    }
    return row[nb];
}

const char *args_nearest(const char *word, const char *const *names, size_t n)
{
    const char *best = NULL;
    size_t best_d = 3; // two slips at most
    for (size_t i = 0; i < n; i++) {
        const size_t d = distance(word, names[i]);
        if (d < best_d && d < strlen(names[i])) {
            best_d = d;
            best = names[i];
        }
    }
    return best;
}

bool args_split_number(const char *text, size_t *path_len, double *value)
{
    const char *colon = strrchr(text, ':');
    char *end;
    *path_len = strlen(text);
    if (!colon || colon == text || colon[1] == '\0' || isspace((unsigned char)colon[1])) {
        return true;
    }
    const double x = strtod(colon + 1, &end);
    if (*end != '\0') {
        return true;
    }
    *path_len = (size_t)(colon - text);
    *value = x;
    return isfinite(x);
}

static void say_unknown(const struct arg_command *c, const char *word, size_t len)
{
    const char *names[128];
    size_t n = 0;
    char key[64];
    snprintf(key, sizeof key, "%.*s", (int)len, word);
    for (size_t i = 0; i < c->n_options && n < 128; i++) {
        if (c->options[i].type != ARG_HEAD) {
            names[n++] = c->options[i].name;
        }
    }
    const char *near = args_nearest(key, names, n);
    if (near) {
        fprintf(stderr, "keel %s: unknown option %s; did you mean %s?\n", c->name, key, near);
    } else {
        fprintf(stderr, "keel %s: unknown option %s; keel %s --help lists them\n", c->name, key, c->name);
    }
}

static bool set_defaults(const struct arg_command *c, void *args)
{
    memset(args, 0, c->args_bytes);
    for (size_t i = 0; i < c->n_options; i++) {
        const struct arg_option *o = &c->options[i];
        if (o->type != ARG_HEAD && o->def && !set_value(c->name, o, args, o->def)) {
            return false;
        }
    }
    return true;
}

// Handles the option at argv[*i]; moves *i over a value.
static bool take_option(const struct arg_command *c, int argc, char **argv, int *i, void *args, bool *seen)
{
    const char *word = argv[*i];
    const char *eq = word[1] == '-' ? strchr(word, '=') : NULL;
    const size_t len = eq ? (size_t)(eq - word) : strlen(word);
    const struct arg_option *o = find_option(c, word, len);
    if (!o) {
        say_unknown(c, word, len);
        return false;
    }
    seen[o - c->options] = true;
    if (o->type == ARG_FLAG) {
        if (eq) {
            fprintf(stderr, "keel %s: %s takes no value\n", c->name, o->name);
            return false;
        }
        *(bool *)field(args, o) = true;
        return true;
    }
    if (eq) {
        return set_value(c->name, o, args, eq + 1);
    }
    if (*i + 1 >= argc) {
        fprintf(stderr, "keel %s: %s needs a value (%s)\n", c->name, word, o->value);
        return false;
    }
    *i += 1;
    return set_value(c->name, o, args, argv[*i]);
}

static bool check_words(const struct arg_command *c, const struct arg_list *words)
{
    if (words->n < c->min_words) {
        fprintf(stderr, "keel %s: %s is missing; usage: keel %s %s\n", c->name, c->word, c->name, c->usage);
        return false;
    }
    if (words->n > c->max_words) {
        fprintf(stderr, "keel %s: unexpected word \"%s\"; usage: keel %s %s\n", c->name, words->at[c->max_words], c->name,
                c->usage);
        return false;
    }
    return true;
}

// An option that would do nothing is a mistake, most often in the name of another.
static bool check_needs(const struct arg_command *c, const bool *seen)
{
    for (size_t i = 0; i < c->n_options; i++) {
        const struct arg_option *o = &c->options[i];
        const struct arg_option *other = seen[i] && o->needs ? find_option(c, o->needs, strlen(o->needs)) : NULL;
        if (other && !seen[other - c->options]) {
            fprintf(stderr, "keel %s: %s does nothing without %s\n", c->name, o->name, o->needs);
            return false;
        }
    }
    return true;
}

static enum arg_result parse(const struct arg_command *c, int argc, char **argv, void *args, struct arg_list *words)
{
    bool seen[128] = { false };
    bool only_words = false;
    for (int i = 0; i < argc; i++) {
        const char *word = argv[i];
        if (!only_words && strcmp(word, "--") == 0) {
            only_words = true;
        } else if (!only_words && word[0] == '-' && word[1] != '\0') {
            if (!take_option(c, argc, argv, &i, args, seen)) {
                return ARGS_WRONG;
            }
        } else if (!list_add(words, word)) {
            fprintf(stderr, "keel %s: out of memory\n", c->name);
            return ARGS_WRONG;
        }
    }
    for (size_t i = 0; i < c->n_options; i++) {
        if (c->options[i].needed && !seen[i]) {
            fprintf(stderr, "keel %s: %s %s is missing; usage: keel %s %s\n", c->name,
                    c->options[i].brief ? c->options[i].brief : c->options[i].name, c->options[i].value, c->name, c->usage);
            return ARGS_WRONG;
        }
    }
    return check_needs(c, seen) && check_words(c, words) ? ARGS_OK : ARGS_WRONG;
}

enum arg_result args_parse(const struct arg_command *c, int argc, char **argv, void *args)
{
    struct arg_list none = { 0 };
    // A command without words needs no list of its own; it then still reports a stray word.
    struct arg_list *words = c->max_words ? (struct arg_list *)(void *)((char *)args + c->positional) : &none;
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            return ARGS_HELP;
        }
    }
    if (!set_defaults(c, args)) {
        return ARGS_WRONG;
    }
    const enum arg_result r = parse(c, argc, argv, args, words);
    free(none.at);
    return r;
}

void args_finish(const struct arg_command *c, void *args)
{
    for (size_t i = 0; i < c->n_options; i++) {
        if (c->options[i].type == ARG_LIST) {
            struct arg_list *list = field(args, &c->options[i]);
            free(list->at);
            *list = (struct arg_list){ 0 };
        }
    }
    if (c->max_words) {
        struct arg_list *words = (struct arg_list *)(void *)((char *)args + c->positional);
        free(words->at);
        *words = (struct arg_list){ 0 };
    }
}

void args_help(const struct arg_command *c)
{
    printf("keel %s %s\n%s\n", c->name, c->usage, c->summary);
    for (size_t i = 0; i < c->n_options; i++) {
        const struct arg_option *o = &c->options[i];
        char left[64];
        if (o->type == ARG_HEAD) {
            printf("\n%s\n", o->help);
            continue;
        }
        snprintf(left, sizeof left, "%s%s%s%s%s", o->brief ? o->brief : "", o->brief ? ", " : "", o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        printf("  %-26s %s", left, o->help);
        if (o->needed) {
            printf(" (needed)");
        } else if (o->def) {
            printf(" [%s]", o->def);
        } else if (o->type == ARG_FLAG) {
            printf(" [off]");
        } else if (o->type == ARG_LIST) {
            printf(" [none; may be repeated]");
        } else {
            printf(" [none]");
        }
        putchar('\n');
    }
    printf("  %-26s %s\n", "-h, --help", "show this help");
    if (c->notes) {
        printf("\n%s\n", c->notes);
    }
}
