// SPDX-License-Identifier: MIT
// tests/platform_files.c: what keel keeps in folders: which files a trim takes, and what killed processes left.
#include "platform.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[64];

static const char *at(const char *name)
{
    static char path[320];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

// A file of n bytes that was last of use `age` seconds before some moment.
static void make(const char *name, size_t n, long age)
{
    const struct timespec when[2] = { { .tv_sec = 1700000000 - age }, { .tv_sec = 1700000000 - age } };
    FILE *f = fopen(at(name), "wb");
    assert_non_null(f);
    for (size_t i = 0; i < n; i++) {
        fputc('x', f);
    }
    fclose(f);
    assert_int_equal(utimensat(AT_FDCWD, at(name), when, 0), 0);
}

static int setup(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "trim-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return keel_run_program((char *[]){ "rm", "-r", folder, NULL });
}

static void test_oldest_first(void **state)
{
    (void)state;
    make("new.t", 100, 1);
    make("old.t", 100, 3);
    make("middle.t", 100, 2);
    make("oldest.other", 1000, 9);
    assert_int_equal(keel_folder_trim(folder, ".t", UINT64_MAX), 300);
    assert_int_equal(keel_folder_trim(folder, ".t", 300), 300);
    assert_int_equal(keel_folder_trim(folder, ".t", 299), 200);
    assert_false(keel_path_exists(at("old.t")));
    keel_path_touch(at("middle.t")); // was of use: now "new" is the older one
    assert_int_equal(keel_folder_trim(folder, ".t", 150), 100);
    assert_true(keel_path_exists(at("middle.t")) && !keel_path_exists(at("new.t")));
    assert_int_equal(keel_folder_trim(folder, ".t", 0), 0);
    assert_true(keel_path_exists(at("oldest.other")));
    assert_int_equal(keel_folder_trim(at("no such folder"), ".t", 0), 0);
}

static void test_leftovers(void **state)
{
    (void)state;
    char dead[64], ours[64], strange[64];
    const pid_t child = fork();
    if (child == 0) {
        _exit(0);
    }
    assert_int_equal(waitpid(child, NULL, 0), child);
    snprintf(dead, sizeof dead, "a.t.tmp-%ld", (long)child);
    snprintf(ours, sizeof ours, "b.t.tmp-%ld", (long)getpid());
    snprintf(strange, sizeof strange, "c.other.tmp-%ld", (long)child);
    make(dead, 10, 1);
    make(ours, 10, 1);
    make(strange, 10, 1);
    assert_int_equal(keel_folder_trim(folder, ".t", UINT64_MAX), 0);
    assert_false(keel_path_exists(at(dead)));
    assert_true(keel_path_exists(at(ours)) && keel_path_exists(at(strange)));
}

// Four processes write and trim one folder at once: whatever is there under its name is complete.
static void test_together(void **state)
{
    enum { PROCESSES = 4, FILES = 60, BYTES = 5000 };
    pid_t child[PROCESSES];
    (void)state;
    for (int p = 0; p < PROCESSES; p++) {
        child[p] = fork();
        if (child[p] == 0) {
            const keel_log silent = { .level = 0 };
            bool ok = true;
            for (int i = 0; i < FILES && ok; i++) {
                struct keel_file_out f;
                char name[32];
                snprintf(name, sizeof name, "%d.t", (i * 7 + p) % 20);
                ok = keel_file_create(&f, at(name), &silent) == KEEL_OK;
                for (int k = 0; ok && k < BYTES; k++) {
                    fputc('a' + p, f.f);
                }
                ok = ok && keel_file_commit(&f, &silent) == KEEL_OK;
                keel_folder_trim(folder, ".t", 8 * BYTES);
                struct keel_map map;
                if (ok && keel_path_exists(at(name)) && keel_map_open(&map, at(name), &silent) == KEEL_OK) {
                    ok = map.len_bytes == BYTES && memchr(map.data, 0, BYTES) == NULL && map.data[0] == map.data[BYTES - 1];
                    keel_map_close(&map);
                }
            }
            _exit(ok ? 0 : 1);
        }
    }
    for (int p = 0; p < PROCESSES; p++) {
        int status = -1;
        assert_int_equal(waitpid(child[p], &status, 0), child[p]);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    assert_true(keel_folder_trim(folder, ".t", 8 * BYTES) <= 8 * BYTES);
    assert_int_equal(keel_folder_trim(folder, "", UINT64_MAX), keel_folder_trim(folder, ".t", UINT64_MAX)); // nothing else is left
}

static void test_sizes(void **state)
{
    static const struct { const char *text; uint64_t bytes; } good[] = {
        { "0", 0 }, { "17", 17 }, { "2K", 2048 }, { "1.5m", 3 << 19 }, { "2G", UINT64_C(2) << 30 }, { "1e30", UINT64_MAX },
    };
    static const char *const bad[] = { "", "-1", " 1", "1X", "1MB", "G", "nan" };
    uint64_t x;
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(good); i++) {
        assert_true(keel_parse_size(good[i].text, &x));
        assert_true(x == good[i].bytes);
    }
    for (size_t i = 0; i < KEEL_COUNT(bad); i++) {
        x = 5;
        assert_false(keel_parse_size(bad[i], &x));
        assert_int_equal(x, 5);
    }
}

static void keep_text(void *user, enum keel_log_level level, const char *text)
{
    (void)level;
    snprintf(user, 256, "%s", text);
}

// Refused, and not waited for until somebody writes.
static void test_map_of_fifo(void **state)
{
    char text[256] = { 0 };
    struct keel_map map;
    const keel_log log = { .level = KEEL_LOG_ERROR, .write = keep_text, .user = text };
    (void)state;
    assert_int_equal(mkfifo(at("pipe"), 0600), 0);
    alarm(10); // ends the test should it wait
    assert_int_equal(keel_map_open(&map, at("pipe"), &log), KEEL_ERR_IO);
    alarm(0);
    assert_non_null(strstr(text, "is not a regular file"));
    assert_int_equal(unlink(at("pipe")), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_oldest_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_leftovers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_together, setup, teardown),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test_setup_teardown(test_map_of_fifo, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
