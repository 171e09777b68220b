// SPDX-License-Identifier: MIT
// cli/main.c: finds the command, parses its options, runs it. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 over a drift budget.
#include "commands.h"
#include "cli.h"
#include "files.h"

#include <stdlib.h>
#include <string.h>

static const struct arg_command *const commands[] = {
    &cmd_devices, &cmd_info,  &cmd_tokenize, &cmd_run,    &cmd_score, &cmd_perplexity,
    &cmd_train,   &cmd_study, &cmd_report,   &cmd_export, &cmd_convert, &cmd_quantize, &cmd_merge, &cmd_bench, &cmd_doctor,
    &cmd_capture, &cmd_direction, &cmd_project, &cmd_geometry,
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void short_help(FILE *f)
{
    fprintf(f, "keel runs Gemma 3 on any Vulkan device, fine-tunes it on its quantised weights, and measures how it drifts.\n\n"
               "usage: keel COMMAND [options]\n\n");
    for (int i = 0; i < N_COMMANDS; i++) {
        fprintf(f, "  %-12s %s\n", commands[i]->name, commands[i]->summary);
    }
    fprintf(f, "\nkeel COMMAND --help shows every option with its default.\n"
               "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a drift budget was exceeded.\n");
}

static int run_command(const struct arg_command *c, int argc, char **argv)
{
    void *args = malloc(c->args_bytes);
    int code = EXIT_USAGE;
    if (!args) {
        fprintf(stderr, "keel: out of memory\n");
        return EXIT_FAILED;
    }
    memset(args, 0, c->args_bytes);
    switch (args_parse(c, argc, argv, args)) {
    case ARGS_HELP:
        args_help(c);
        code = EXIT_DONE;
        break;
    case ARGS_OK:
        stop_install();
        shipped_resolve(args); // a command's struct begins with the common options
        code = check_files(c, args);
        code = code == EXIT_DONE ? c->run(args) : code;
        break;
    case ARGS_WRONG: break;
    }
    args_finish(c, args);
    free(args);
    return code;
}

static int unknown_command(const char *word)
{
    const char *names[N_COMMANDS];
    for (int i = 0; i < N_COMMANDS; i++) {
        names[i] = commands[i]->name;
    }
    const char *near = args_nearest(word, names, N_COMMANDS);
    if (near) {
        fprintf(stderr, "keel: unknown command %s; did you mean %s?\n", word, near);
    } else {
        fprintf(stderr, "keel: unknown command %s; keel --help lists them\n", word);
    }
    return EXIT_USAGE;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        short_help(stderr);
        return EXIT_USAGE;
    }
    const char *word = argv[1];
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || strcmp(word, "help") == 0) {
        short_help(stdout);
        return EXIT_DONE;
    }
    if (strcmp(word, "--version") == 0) {
        printf("keel %s\n", KEEL_VERSION);
        return EXIT_DONE;
    }
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(word, commands[i]->name) == 0) {
            return run_command(commands[i], argc - 2, argv + 2);
        }
    }
    return unknown_command(word);
}
