// SPDX-License-Identifier: MIT
// tests/train_data.c: rows and their errors, the order of rows, learning-rate schedules. The tokenizer is
// that of train_fake.c, one token a byte, so that every id can be written down.
#include "data.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BOS = 2, EOT = 3 };

static char said[2000];
static void hear(void *user, enum keel_log_level level, const char *text)
{
    (void)user;
    (void)level;
    snprintf(said, sizeof said, "%s", text);
}
static const keel_log ear = { .level = KEEL_LOG_INFO, .write = hear };

static keel_images *images; // NULL: none
extern float train_fake_embeds[64]; // embeds of an image: at the length of its path

static keel_status load(struct keel_train_set *set, const char *text, uint32_t seq_len)
{
    static char path[] = "train_data_rows.jsonl";
    const struct keel_train_data data = { path, 1 };
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    said[0] = '\0';
    const keel_status st = keel_train_set_load(set, NULL, images, &data, 1, seq_len, &ear);
    remove(path);
    return st;
}

static void test_rows(void **state)
{
    (void)state;
    struct keel_train_set set;
    assert_int_equal(
        load(&set,
             "{\"prompt\":\"ab\",\"completion\":\"xyz\"}\n\n{\"prompt\":\"\",\"completion\":\"q\",\"eos\":"
             "true}\n"
             "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":"
             "\"bc\"},"
             "{\"role\":\"user\",\"content\":\"d\"},{\"role\":\"assistant\",\"content\":\"e\"}]}\n",
             64),
        KEEL_OK);
    assert_int_equal(set.n_rows, 3);
    const int32_t raw[] = { BOS, 'a' + 10, 'b' + 10, 'x' + 10, 'y' + 10, 'z' + 10 },
                  ended[] = { BOS, 'q' + 10, EOT };
    assert_int_equal(set.rows[0].n, 6);
    assert_memory_equal(set.rows[0].ids, raw, sizeof raw);
    assert_int_equal(set.rows[0].first, 3);
    assert_int_equal(set.rows[0].n_loss, 3);
    assert_int_equal(set.rows[1].n, 3);
    assert_memory_equal(set.rows[1].ids, ended, sizeof ended);
    assert_int_equal(set.rows[1].first, 1);
    const uint8_t mask[] = { 0, 0, 0, 1, 1, 1, 0, 0, 1, 1 };
    assert_int_equal(set.rows[2].n, 10);
    assert_memory_equal(set.rows[2].mask, mask, sizeof mask);
    assert_int_equal(set.rows[2].first, 3);
    assert_int_equal(set.rows[2].n_loss, 5);
    assert_int_equal(set.longest, 10);
    assert_int_equal(set.most_loss, 5);
    keel_train_set_finish(&set);
}

static void test_bad_rows(void **state)
{
    (void)state;
    const struct {
        const char *text, *says;
    } bad[] = {
        { "{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\":\"a\"}\n", ":2: " },
        { "{\"text\":\"a\"}\n", "neither" },
        { "{\"prompt\":\"a\",\"completion\":\"\"}\n", "nothing to learn" },
        { "{\"prompt\":\"a\",\"completion\":7}\n", "completion" },
        { "{\"prompt\":\"abcdefghijkl\",\"completion\":\"b\"}\n", "14 tokens, more than --seq-len 12" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}\n", "no assistant message" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[]}]}\n", "message 1" },
        { "{\"messages\":[],\"prompt\":\"a\"}\n", "beside" },
        { "{\"messages\":[{\"role\":\"user\"}]}\n", "message 1" },
        { "{\"prompt\":\"<image>\",\"completion\":\"b\",\"images\":[\"train_data_a.png\"]}\n", "--mmproj" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"image\":\"x.png\"}]}]}\n",
          "--mmproj" },
        { "{\"prompt\":\"a\",\"completion\":\"b\"\n", ":1: " },
        { "\n\n", "no rows" },
    };
    for (size_t i = 0; i < KEEL_COUNT(bad); i++) {
        struct keel_train_set set;
        assert_int_equal(load(&set, bad[i].text, 12), KEEL_ERR_DATA);
        assert_non_null(strstr(said, "train_data_rows.jsonl"));
        if (!strstr(said, bad[i].says)) {
            fail_msg("row %zu: \"%s\" is not in \"%s\"", i, bad[i].says, said);
        }
        assert_null(set.rows);
    }
}

// --- images --------------------------------------------------------------------------------------

static const char *const image_file[] = { "train_data_a.png", "train_data_bb.png" };

static void touch(bool make)
{
    for (size_t i = 0; i < KEEL_COUNT(image_file); i++) {
        if (make) {
            FILE *f = fopen(image_file[i], "wb");
            assert_non_null(f);
            fclose(f);
        } else {
            remove(image_file[i]);
        }
    }
    images = make ? (keel_images *)(uintptr_t)1 : NULL;
}

static void check_image(const struct keel_train_row *row, uint32_t i, uint32_t at, size_t file)
{
    assert_true(i < row->n_images);
    assert_int_equal(row->images[i].at, at);
    assert_int_equal(row->images[i].n, 2);
    assert_ptr_equal(row->images[i].embeds, &train_fake_embeds[strlen(image_file[file])]);
    assert_int_equal(row->ids[at], i);
}

static void test_images(void **state)
{
    (void)state;
    struct keel_train_set set;
    touch(true);
    assert_int_equal(
        load(&set,
             "{\"prompt\":\"a<image>b<image>\",\"completion\":\"<image>\",\"images\":[\"train_data_bb.png\","
             "\"train_data_a.png\"]}\n"
             "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"image\":\"train_data_a.png\"},"
             "{\"type\":\"text\",\"text\":\"<image>\"},{\"type\":\"image_url\",\"image_url\":{\"url\":"
             "\"train_data_bb.png\"}},{\"type\":\"image\"}]},{\"role\":\"assistant\",\"content\":\"c\"},"
             "{\"role\":\"user\",\"content\":\"<image>\"},{\"role\":\"assistant\",\"content\":\"d\"}],"
             "\"images\":[\"train_data_bb.png\",\"train_data_a.png\"]}\n"
             "{\"prompt\":\"a\",\"completion\":\"b\",\"images\":[]}\n",
             64),
        KEEL_OK);
    assert_int_equal(set.n_rows, 3);
    assert_int_equal(set.rows[0].n_images, 2);
    check_image(&set.rows[0], 0, 2, 1);
    check_image(&set.rows[0], 1, 5, 0);
    assert_int_equal(set.rows[0].first, 7);
    assert_int_equal(set.rows[0].n_loss, 7); // a completion is text
    assert_int_equal(set.rows[1].n_images, 4);
    check_image(&set.rows[1], 0, 1, 0);
    check_image(&set.rows[1], 1, 1 + 2 + 7, 1); // the text part's "<image>" is text
    check_image(&set.rows[1], 2, 1 + 2 + 7 + 2, 1);
    check_image(&set.rows[1], 3, 14 + 1 + 2, 0);
    assert_int_equal(set.rows[1].n_loss, 4);
    assert_int_equal(set.rows[2].n_images, 0);
    keel_train_set_finish(&set);
    touch(false);
    // Without a tower and without "images" it is a text like any other.
    assert_int_equal(load(&set, "{\"prompt\":\"<image>\",\"completion\":\"b\"}\n", 64), KEEL_OK);
    assert_int_equal(set.rows[0].n, 9);
    keel_train_set_finish(&set);
}

static void test_bad_images(void **state)
{
    (void)state;
    const struct {
        const char *text;
        keel_status st;
        const char *says;
    } bad[] = {
        { "\"prompt\":\"<image><image>\",\"images\":[\"train_data_a.png\"]", KEEL_ERR_DATA,
          ":1: place 2 for an image, but \"images\" names 1" },
        { "\"prompt\":\"<image>\"", KEEL_ERR_DATA, "place 1 for an image, but \"images\" names 0" },
        { "\"prompt\":\"a\",\"images\":[\"train_data_a.png\"]", KEEL_ERR_DATA,
          ":1: \"images\" names 1, but there are 0 places" },
        { "\"prompt\":\"<image>\",\"images\":[\"train_data_c.png\"]", KEEL_ERR_IO, "train_data_c.png: there is no such file" },
        { "\"prompt\":\"<image>\",\"images\":[\".\"]", KEEL_ERR_IO, "no such file" },
        { "\"prompt\":\"<image>\",\"images\":[7]", KEEL_ERR_DATA, "path of a file" },
        { "\"prompt\":\"<image>\",\"images\":[\"\"]", KEEL_ERR_DATA, "path of a file" },
        { "\"prompt\":\"<image>\",\"images\":[\"https://example.org/a.png\"]", KEEL_ERR_UNSUPPORTED, "only paths" },
        { "\"prompt\":\"<image>\",\"images\":[\"data:image/png;base64,AAAA\"]", KEEL_ERR_UNSUPPORTED, "only paths" },
        { "\"prompt\":\"<image>\",\"images\":\"train_data_a.png\"", KEEL_ERR_DATA, "a list of paths" },
    };
    touch(true);
    for (size_t i = 0; i < KEEL_COUNT(bad); i++) {
        struct keel_train_set set;
        char text[400];
        snprintf(text, sizeof text, "{%s,\"completion\":\"b\"}\n", bad[i].text);
        assert_int_equal(load(&set, text, 64), bad[i].st);
        if (!strstr(said, bad[i].says) || !strstr(said, "train_data_rows.jsonl:1: ")) {
            fail_msg("row %zu: \"%s\" is not in \"%s\"", i, bad[i].says, said);
        }
    }
    static const char *const parts[] = { "{\"type\":\"text\"}", "{\"type\":\"sound\"}", "{\"type\":\"image\"}", "7",
                                         "{\"type\":\"image\",\"image\":{\"url\":3}}" };
    for (size_t i = 0; i < KEEL_COUNT(parts); i++) {
        struct keel_train_set set;
        char text[400];
        snprintf(text, sizeof text, "{\"messages\":[{\"role\":\"user\",\"content\":[%s]}]}\n", parts[i]);
        assert_int_equal(load(&set, text, 64), KEEL_ERR_DATA);
        assert_non_null(strstr(said, "train_data_rows.jsonl:1: "));
    }
    touch(false);
}

// Two files of 5 and 7 rows drawn 3:1.
static void draw(uint64_t seed, bool shuffle, uint64_t n, uint64_t *rows)
{
    struct keel_train_file files[2] = { { .share = 0.75, .row0 = 0, .n_rows = 5 },
                                        { .share = 0.25, .row0 = 5, .n_rows = 7 } };
    const struct keel_train_set set = { .files = files, .n_files = 2 };
    struct keel_row_order order;
    assert_int_equal(keel_row_order_init(&order, &set, seed, shuffle, &ear), KEEL_OK);
    for (uint64_t i = 0; i < n; i++) {
        rows[i] = keel_row_order_next(&order);
    }
    keel_row_order_finish(&order);
}

static void test_order(void **state)
{
    (void)state;
    enum { N = 400 };
    uint64_t a[N], b[N], plain[N], seen[12] = { 0 }, first[N];
    draw(1, true, N, a);
    draw(1, true, N, b);
    assert_memory_equal(a, b, sizeof a);
    draw(2, true, N, b);
    assert_true(memcmp(a, b, sizeof a) != 0);
    draw(1, false, N, plain);
    uint64_t n_first = 0;
    for (size_t i = 0; i < N; i++) {
        assert_true(a[i] < 12);
        assert_true((a[i] < 5) == (plain[i] < 5)); // shuffling does not change the mixture
        if (a[i] < 5) {
            assert_int_equal(plain[i], n_first % 5); // file order
            first[n_first++] = a[i];
        }
        const double due = 0.75 * (double)(i + 1);
        assert_true(due - (double)n_first < 1.0 &&
                    (double)n_first - due < 1.0); // never a whole row off its share
    }
    assert_int_equal(n_first, 300);
    bool changed = false;
    for (size_t epoch = 0; epoch < 60; epoch++) { // every epoch holds every row once; epochs differ
        for (size_t i = 0; i < 5; i++) {
            seen[first[epoch * 5 + i]]++;
            changed |= epoch > 0 && first[epoch * 5 + i] != first[i];
        }
        for (size_t i = 0; i < 5; i++) {
            assert_int_equal(seen[i], epoch + 1);
        }
    }
    assert_true(changed);
}

static void test_schedules(void **state)
{
    (void)state;
    enum keel_schedule s;
    assert_true(keel_schedule_parse("cosine", &s) && s == KEEL_SCHEDULE_COSINE);
    assert_true(keel_schedule_parse("linear", &s) && s == KEEL_SCHEDULE_LINEAR);
    assert_true(keel_schedule_parse("constant", &s) && s == KEEL_SCHEDULE_CONSTANT);
    assert_false(keel_schedule_parse("cos", &s));
    // transformers.get_scheduler(name, warm-up 2, 10 steps) with base 1, at optimiser steps 1, 2, 3, 4,
    // 7, 10.
    static const uint64_t step[6] = { 1, 2, 3, 4, 7, 10 };
    static const double want[3][6] = { { 0, 0.5, 1, 1, 1, 1 },
                                       { 0, 0.5, 1, 0.875, 0.5, 0.125 },
                                       { 0, 0.5, 1, 0.9619397662556434, 0.5, 0.03806023374435663 } };
    for (size_t k = 0; k < 3; k++) {
        for (size_t i = 0; i < 6; i++) {
            const double lr = keel_schedule_lr((enum keel_schedule)k, 1.0, step[i], 2, 10);
            assert_true(fabs(lr - want[k][i]) < 1e-14);
        }
    }
    assert_true(keel_schedule_lr(KEEL_SCHEDULE_LINEAR, 3.0, 1, 0, 1) == 3.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_bad_rows),
        cmocka_unit_test(test_images),
        cmocka_unit_test(test_bad_images),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
