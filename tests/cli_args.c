// SPDX-License-Identifier: MIT
// cli_args.c: the option tables: defaults, ranges, lists, words, and every way to type something wrong.
#include "args.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

struct demo {
    bool flag;
    const char *name, *kind;
    uint32_t count;
    uint64_t big, size;
    double rate;
    struct arg_list file, words;
};

static const char *const kinds[] = { "one", "two", NULL };
#define AT(f) offsetof(struct demo, f)
static const struct arg_option options[] = {
    { .type = ARG_HEAD, .help = "Heading" },
    { .name = "--flag", .brief = "-f", .needs = "--rate", .type = ARG_FLAG, .offset = AT(flag), .help = "h" },
    { .name = "--name", .type = ARG_STR, .offset = AT(name), .value = "S", .needed = true, .help = "h" },
    { .name = "--kind", .type = ARG_STR, .offset = AT(kind), .value = "K", .def = "one", .choice = kinds, .help = "h" },
    { .name = "--count", .brief = "-n", .type = ARG_U32, .offset = AT(count), .value = "N", .def = "7", .min = 1, .max = 9, .help = "h" },
    { .name = "--big", .type = ARG_U64, .offset = AT(big), .value = "N", .def = "5", .help = "h" },
    { .name = "--size", .type = ARG_SIZE, .offset = AT(size), .value = "S", .def = "1K", .help = "h" },
    { .name = "--rate", .type = ARG_NUM, .offset = AT(rate), .value = "X", .def = "2e-4", .min = 0, .max = 1, .help = "h" },
    { .name = "--file", .type = ARG_LIST, .offset = AT(file), .value = "F", .help = "h" },
};
static const struct arg_command command = {
    .name = "demo", .summary = "s", .usage = "WORD", .options = options, .n_options = sizeof options / sizeof options[0],
    .args_bytes = sizeof(struct demo), .positional = AT(words), .min_words = 0, .max_words = 1, .word = "WORD",
};

static enum arg_result parse(struct demo *d, const char *const *argv)
{
    int argc = 0;
    while (argv[argc]) {
        argc++;
    }
    return args_parse(&command, argc, (char **)(uintptr_t)argv, d);
}
#define WORDS(...) ((const char *const[]){ __VA_ARGS__, NULL })

static void test_defaults(void **state)
{
    struct demo d;
    (void)state;
    assert_int_equal(parse(&d, WORDS("--name", "a")), ARGS_OK);
    assert_string_equal(d.name, "a");
    assert_string_equal(d.kind, "one");
    assert_int_equal(d.count, 7);
    assert_int_equal(d.big, 5);
    assert_int_equal(d.size, 1024);
    assert_true(d.rate == 2e-4);
    assert_false(d.flag);
    assert_int_equal(d.file.n, 0);
    args_finish(&command, &d);
}

static void test_values(void **state)
{
    struct demo d;
    (void)state;
    assert_int_equal(parse(&d, WORDS("w", "-f", "--name=x=y", "-n", "9", "--size", "1.5M", "--rate=1", "--file", "p", "--file", "q",
                                     "--big", "18446744073709551615", "--kind", "two")), ARGS_OK);
    assert_true(d.flag);
    assert_string_equal(d.name, "x=y");
    assert_int_equal(d.count, 9);
    assert_int_equal(d.size, 1536 * 1024);
    assert_true(d.rate == 1.0);
    assert_true(d.big == UINT64_MAX);
    assert_int_equal(d.file.n, 2);
    assert_string_equal(d.file.at[1], "q");
    assert_int_equal(d.words.n, 1);
    assert_string_equal(d.words.at[0], "w");
    args_finish(&command, &d);
}

static void test_dashes(void **state)
{
    struct demo d;
    (void)state;
    assert_int_equal(parse(&d, WORDS("--name", "--flag", "--", "--flag")), ARGS_OK); // a value may look like an option
    assert_string_equal(d.name, "--flag");
    assert_string_equal(d.words.at[0], "--flag");
    assert_false(d.flag);
    args_finish(&command, &d);
    assert_int_equal(parse(&d, WORDS("--name", "a", "-")), ARGS_OK); // standard input is a word
    assert_string_equal(d.words.at[0], "-");
    args_finish(&command, &d);
}

static void test_wrong(void **state)
{
    const char *const *const cases[] = {
        WORDS("w"),                                  // --name is missing
        WORDS("--name"),                             // no value
        WORDS("--name", "a", "--nmae", "b"),         // unknown
        WORDS("--name", "a", "-x"),                  // unknown
        WORDS("--name", "a", "v", "w"),              // a word too many
        WORDS("--name", "a", "--kind", "three"),     // no such choice
        WORDS("--name", "a", "--count", "0"),        // below
        WORDS("--name", "a", "--count", "10"),       // above
        WORDS("--name", "a", "--count", "3x"),
        WORDS("--name", "a", "--count", "-3"),
        WORDS("--name", "a", "--count", ""),
        WORDS("--name", "a", "--count", "4294967297"),
        WORDS("--name", "a", "--big", "18446744073709551616"),
        WORDS("--name", "a", "--size", "1Q"),
        WORDS("--name", "a", "--size", "M"),
        WORDS("--name", "a", "--rate", "nan"),
        WORDS("--name", "a", "--rate", "inf"),
        WORDS("--name", "a", "--rate", "1.5"),
        WORDS("--name", "a", "--rate", ""),
        WORDS("--name", "a", "--flag=1"),
        WORDS("--name", "a", "--flag"), // does nothing without --rate
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct demo d;
        if (parse(&d, cases[i]) != ARGS_WRONG) {
            fail_msg("case %zu was accepted", i);
        }
        args_finish(&command, &d);
    }
}

static void test_split(void **state)
{
    static const struct {
        const char *text;
        size_t len;
        double value;
    } cases[] = {
        { "a.gguf", 6, 1 }, { "a.gguf:0.5", 6, 0.5 }, { "a.gguf:-2", 6, -2 }, { "c:/a.gguf", 9, 1 }, { "a:", 2, 1 },
        { ":3", 2, 1 }, { "a:1:2", 3, 2 }, { "a: 2", 4, 1 },
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t len;
        double value = 1;
        assert_true(args_split_number(cases[i].text, &len, &value));
        assert_int_equal(len, cases[i].len);
        assert_true(value == cases[i].value);
    }
    size_t len;
    double value = 1;
    assert_false(args_split_number("a:inf", &len, &value));
}

static void test_nearest(void **state)
{
    const char *const names[] = { "train", "tokenize", "run" };
    (void)state;
    assert_string_equal(args_nearest("trian", names, 3), "train");
    assert_string_equal(args_nearest("tokenise", names, 3), "tokenize");
    assert_null(args_nearest("swim", names, 3));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults), cmocka_unit_test(test_values),  cmocka_unit_test(test_dashes),
        cmocka_unit_test(test_wrong),    cmocka_unit_test(test_split),   cmocka_unit_test(test_nearest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
