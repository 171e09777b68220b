// SPDX-License-Identifier: MIT
// tests/train_state.c: the training state on disk and the cutting of logs, on whatever device there is.
#include "checkpoint.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PATH "train_state_test.safetensors"
#define LOG "train_state_test.jsonl"
enum { N = 5000 };

static char said[4000];
static void hear(void *user, enum keel_log_level level, const char *text)
{
    (void)user;
    if (level == KEEL_LOG_ERROR) {
        snprintf(said + strlen(said), sizeof said - strlen(said), "%s\n", text);
    }
}
static const keel_log ear = { .level = KEEL_LOG_ERROR, .write = hear };

static keel_device *dev;
static keel_heap *heap;
static struct keel_pair options[2] = { { "--rank", "16" }, { "--seed", "7" } };

static struct keel_train_state blank(void)
{
    struct keel_train_state s = {
        .n_tensors = 3,
        .dev = dev, .log = &ear, .n_floats = N, .options = options, .n_options = 2
    };
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(keel_heap_alloc(heap, N * sizeof(float), &s.tensor[i]), KEEL_OK);
    }
    said[0] = '\0';
    return s;
}

static int set_up(void **state)
{
    (void)state;
    assert_int_equal(keel_device_create(&dev, &(struct keel_device_params){ .no_cache = true }, &ear),
                     KEEL_OK);
    assert_int_equal(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "test"), KEEL_OK);
    struct keel_train_state s = blank();
    float *x = malloc(N * sizeof *x);
    for (size_t t = 0; t < 3; t++) {
        for (size_t i = 0; i < N; i++) {
            x[i] = (float)(t + 1) / (float)(i + 3);
        }
        assert_int_equal(keel_upload(dev, s.tensor[t], x, N * sizeof *x), KEEL_OK);
    }
    free(x);
    s.step = 11;
    s.rows = 44;
    s.tokens = 1234567890123;
    s.first_loss = 1.0 / 3.0;
    s.last_loss = 0.1;
    assert_int_equal(keel_train_state_save(&s, PATH), KEEL_OK);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    remove(PATH);
    keel_heap_destroy(&heap);
    keel_device_destroy(&dev);
    return 0;
}

static void test_round_trip(void **state)
{
    (void)state;
    struct keel_train_state s = blank();
    float *x = malloc(N * sizeof *x);
    assert_int_equal(keel_train_state_load(&s, PATH), KEEL_OK);
    assert_true(s.step == 11 && s.rows == 44 && s.tokens == 1234567890123);
    assert_true(s.first_loss == 1.0 / 3.0 && s.last_loss == 0.1); // the same bits
    for (size_t t = 0; t < 3; t++) {
        assert_int_equal(keel_download(dev, x, s.tensor[t], N * sizeof *x), KEEL_OK);
        for (size_t i = 0; i < N; i++) {
            assert_true(x[i] == (float)(t + 1) / (float)(i + 3));
        }
    }
    free(x);
}

static void test_other_run(void **state)
{
    (void)state;
    struct keel_train_state s = blank();
    options[1].value = "8";
    assert_int_equal(keel_train_state_load(&s, PATH), KEEL_ERR_MISMATCH);
    options[1].value = "7";
    assert_non_null(strstr(said, "--seed was 7, now it is 8"));
    assert_int_equal(s.step, 0);
    said[0] = '\0';
    s.n_floats = N - 1;
    assert_int_equal(keel_train_state_load(&s, PATH), KEEL_ERR_FORMAT);
    assert_non_null(strstr(said, "tensor params"));
}

// A flipped byte, and a file cut short anywhere, are found.
static void test_damage(void **state)
{
    (void)state;
    struct keel_train_state s = blank();
    static uint8_t bytes[200000];
    FILE *f = fopen(PATH, "rb");
    const size_t len = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    assert_in_range(len, 3 * N * 4, sizeof bytes - 1);
    for (size_t k = 0; k < 6; k++) {
        const size_t cut = k < 3 ? len : len * (k - 2) / 4;
        bytes[len - 100 * (k + 1)] ^= k < 3 ? 1 : 0;
        f = fopen("train_state_bad.safetensors", "wb");
        fwrite(bytes, 1, cut, f);
        fclose(f);
        bytes[len - 100 * (k + 1)] ^= k < 3 ? 1 : 0;
        said[0] = '\0';
        assert_int_equal(keel_train_state_load(&s, "train_state_bad.safetensors"), KEEL_ERR_FORMAT);
        assert_non_null(strstr(said, "train_state_bad.safetensors"));
        assert_non_null(strstr(said, "--resume"));
    }
    remove("train_state_bad.safetensors");
}

static void test_log_cut(void **state)
{
    (void)state;
    char text[200] = { 0 };
    assert_int_equal(keel_train_log_cut("train_state_no_such.jsonl", 3, &ear), KEEL_OK);
    FILE *f = fopen(LOG, "wb");
    fputs("{\"step\": 1, \"loss\": 2}\n{\"step\": 2}\n{\"step\": 3}\n{\"step\": 2, \"lo", f);
    fclose(f);
    assert_int_equal(keel_train_log_cut(LOG, 2, &ear), KEEL_OK);
    f = fopen(LOG, "rb");
    fread(text, 1, sizeof text - 1, f);
    fclose(f);
    remove(LOG);
    assert_string_equal(text, "{\"step\": 1, \"loss\": 2}\n{\"step\": 2}\n");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_other_run),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_log_cut),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
