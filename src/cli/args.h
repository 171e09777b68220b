// SPDX-License-Identifier: MIT
// cli/args.h: options of a command as a table: parsing, range checks, defaults and help come from the same rows.
#ifndef KEEL_CLI_ARGS_H
#define KEEL_CLI_ARGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum arg_type {
    ARG_FLAG, // bool, no value
    ARG_STR,  // const char *
    ARG_U32,  // uint32_t
    ARG_U64,  // uint64_t
    ARG_NUM,  // double
    ARG_SIZE, // uint64_t bytes; "512M", "2.5G"
    ARG_LIST, // struct arg_list: may be given several times
    ARG_HEAD, // a heading in the help, no option
};

struct arg_list {
    const char **at; // values in the order given; freed by args_finish()
    size_t n;
};

// Files that an option names: what is read (a weight, scale or layers may follow the name), what is written, and what is written with
// its folders made on the way, or is a folder.
enum arg_file { ARG_NO_FILE, ARG_IN, ARG_OUT, ARG_OUT_MADE };

// One option. `def` is parsed like a typed value, so that the help cannot lie; NULL: zero, NULL or empty.
struct arg_option {
    const char *name;  // "--rank"
    const char *brief; // "-m" or NULL
    enum arg_type type;
    size_t offset;     // of the field in the command's struct
    const char *value; // what the help calls the value: "N", "FILE"
    const char *def;
    const char *help;
    double min, max;           // numbers only; min == max: no limit
    const char *const *choice; // strings only: NULL-terminated list of what is allowed, or NULL
    bool needed;
    enum arg_file file; // ARG_STR, ARG_LIST
    const char *needs;  // name of the option without which this one, if given, would do nothing; or NULL
};

struct arg_command {
    const char *name, *summary;
    const char *usage; // what follows "keel NAME" in the usage line
    const char *notes; // printed after the options, or NULL
    const struct arg_option *options;
    size_t n_options;
    size_t args_bytes;             // of the command's struct
    size_t positional;             // offset of a struct arg_list for words that are no options
    uint32_t min_words, max_words; // how many of those
    bool words_in;                 // they are files that are read
    const char *word;              // what the messages call such a word: "MODEL"
    int (*run)(const void *args);  // exit code
};

enum arg_result { ARGS_OK, ARGS_HELP, ARGS_WRONG };

// Parses `argv` (without the program's and the command's name) into `args` (args_bytes, zeroed here, filled with defaults).
// ARGS_WRONG: one line went to stderr. ARGS_HELP: --help was among the words. Strings point into argv or static storage.
enum arg_result args_parse(const struct arg_command *command, int argc, char **argv, void *args);
void args_finish(const struct arg_command *command, void *args);
void args_help(const struct arg_command *command); // to stdout

// The nearest of `n` names to `word` by edit distance, or NULL if none is near.
const char *args_nearest(const char *word, const char *const *names, size_t n);
// Splits "PATH:number" into the path's length and the number; without a trailing number it is all path and *value stays.
// False for a number that is not finite.
bool args_split_number(const char *text, size_t *path_len, double *value);

#endif
