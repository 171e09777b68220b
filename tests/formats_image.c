// SPDX-License-Identifier: MIT
// tests/formats_image.c: image files against what Pillow made of them (tests/oracle/make_images.py), and files that are bad.
#include "formats_util.h"

#include "platform.h"

static struct keel_map open_file(const char *name)
{
    char path[512];
    struct keel_map map = { 0 };
    snprintf(path, sizeof path, "%s/%s", IMAGES_DIR, name);
    assert_int_equal(keel_map_open(&map, path, NULL), KEEL_OK);
    return map;
}

// A binary PPM as Pillow writes it: "P6\nW H\n255\n" and the pixels.
static struct keel_image read_ppm(const char *name)
{
    struct keel_map map = open_file(name);
    struct keel_image image = { 0 };
    int at = 0;
    char head[64] = { 0 };
    memcpy(head, map.data, KEEL_MIN(sizeof head - 1, map.len_bytes));
    assert_int_equal(sscanf(head, "P6 %u %u 255%n", &image.width, &image.height, &at), 2);
    const size_t n = (size_t)image.width * image.height * 3;
    assert_int_equal(map.len_bytes, (size_t)at + 1 + n);
    image.rgb = exact_copy(map.data + at + 1, n);
    keel_map_close(&map);
    return image;
}

static void assert_near(const char *what, const struct keel_image *got, const struct keel_image *want, int tol)
{
    assert_int_equal(got->width, want->width);
    assert_int_equal(got->height, want->height);
    for (size_t i = 0; i < (size_t)want->width * want->height * 3; i++) {
        if (abs(got->rgb[i] - want->rgb[i]) > tol) {
            fail_msg("%s: pixel %zu channel %zu is %d, Pillow has %d", what, i / 3, i % 3, got->rgb[i], want->rgb[i]);
        }
    }
}

static struct keel_image decode(const char *name)
{
    struct keel_map map = open_file(name);
    struct keel_image image = { 0 };
    uint8_t *copy = exact_copy(map.data, map.len_bytes);
    assert_int_equal(keel_image_decode(&image, copy, map.len_bytes, name, NULL), KEEL_OK);
    free(copy);
    keel_map_close(&map);
    return image;
}

static void test_decode(void **state)
{
    // JPEG: the two decoders round the inverse transform and interpolate colour differently.
    static const struct { const char *name; int tol; } cases[] = {
        { "rgb.png", 0 }, { "grey.png", 0 }, { "one_bit.png", 0 }, { "palette.png", 0 }, { "alpha.png", 0 },
        { "grey_alpha.png", 0 }, { "grey16.png", 0 }, { "rgb.bmp", 0 }, { "palette.bmp", 0 }, { "two_frames.gif", 0 },
        { "colour.jpg", 3 }, { "progressive.jpg", 3 }, { "grey.jpg", 1 },
    };
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        char ppm[64];
        struct keel_image got = decode(cases[i].name);
        snprintf(ppm, sizeof ppm, "%s.ppm", cases[i].name);
        struct keel_image want = read_ppm(ppm);
        assert_near(cases[i].name, &got, &want, cases[i].tol);
        keel_image_finish(&got);
        keel_image_finish(&want);
    }
}

static void test_resize(void **state)
{
    static const uint32_t sizes[][2] = { { 14, 14 }, { 56, 56 }, { 37, 9 }, { 50, 23 }, { 1, 1 }, { 3, 60 } };
    struct keel_image in = decode("rgb.png");
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(sizes); i++) {
        char name[64];
        struct keel_image got;
        snprintf(name, sizeof name, "rgb.png.%ux%u.ppm", sizes[i][0], sizes[i][1]);
        struct keel_image want = read_ppm(name);
        assert_int_equal(keel_image_resize(&got, &in, sizes[i][0], sizes[i][1], NULL), KEEL_OK);
        assert_near(name, &got, &want, 1); // image.c says why Pillow is not always met to the bit
        keel_image_finish(&got);
        keel_image_finish(&want);
    }
    struct keel_image same;
    assert_int_equal(keel_image_resize(&same, &in, in.width, in.height, NULL), KEEL_OK);
    assert_near("same size", &same, &in, 0);
    keel_image_finish(&same);
    keel_image_finish(&in);
}

static void expect_refused(const uint8_t *data, size_t len, keel_status want, const char *part)
{
    struct memory_log m;
    struct keel_image image;
    uint8_t *copy = exact_copy(data, len);
    memory_log_init(&m);
    assert_int_equal(keel_image_decode(&image, copy, len, "bad.img", &m.log), want);
    assert_logged(&m, part);
    assert_null(image.rgb);
    free(copy);
}

// A BMP header that promises w × h pixels of 24 bits and holds none.
static void bmp_header(uint8_t h[54], int32_t w, int32_t height)
{
    static const uint8_t start[] = { 'B', 'M', 54, 0, 0, 0, 0, 0, 0, 0, 54, 0, 0, 0, 40, 0, 0, 0 };
    memset(h, 0, 54);
    memcpy(h, start, sizeof start);
    memcpy(h + 18, &w, 4);
    memcpy(h + 22, &height, 4);
    h[26] = 1;
    h[28] = 24;
}

static void test_bad(void **state)
{
    uint8_t bmp[54];
    (void)state;
    expect_refused((const uint8_t *)"", 0, KEEL_ERR_FORMAT, "bad.img: an image file of 0 bytes");
    expect_refused((const uint8_t *)"hello, I am text", 16, KEEL_ERR_FORMAT, "it reads PNG, JPEG, BMP and GIF");
    bmp_header(bmp, 0, 10);
    expect_refused(bmp, sizeof bmp, KEEL_ERR_FORMAT, "bad.img");
    bmp_header(bmp, 20000, 20000);
    expect_refused(bmp, sizeof bmp, KEEL_ERR_UNSUPPORTED, "20000 × 20000 pixels are above keel's limits");
    bmp_header(bmp, 70000, 2);
    expect_refused(bmp, sizeof bmp, KEEL_ERR_UNSUPPORTED, "scale it down");
}

// Files without a part of their pixels, and a PNG with any bit turned: stb alone takes most of them for pictures.
static void test_damaged(void **state)
{
    uint8_t bmp[54];
    (void)state;
    bmp_header(bmp, 3000, 3000);
    expect_refused(bmp, sizeof bmp, KEEL_ERR_FORMAT, "the BMP's rows end at byte 27000054, the file at byte 54");
    bmp_header(bmp, 2, -2000);
    expect_refused(bmp, sizeof bmp, KEEL_ERR_FORMAT, "the BMP's rows end at byte");
    struct keel_map map = open_file("two_frames.gif");
    expect_refused(map.data, 90, KEEL_ERR_FORMAT, "before the end of the GIF's first image");
    keel_map_close(&map);
    map = open_file("palette.png");
    expect_refused(map.data, map.len_bytes - 12, KEEL_ERR_FORMAT, "before the PNG's end (IEND)");
    expect_refused(map.data, map.len_bytes - 20, KEEL_ERR_FORMAT, "the file ends at byte");
    uint8_t *copy = exact_copy(map.data, map.len_bytes);
    const keel_log silent = { .level = 0 };
    for (size_t i = 8; i < map.len_bytes; i++) {
        struct keel_image image;
        copy[i] ^= (uint8_t)(1u << i % 8);
        assert_int_not_equal(keel_image_decode(&image, copy, map.len_bytes, "bit", &silent), KEEL_OK);
        copy[i] ^= (uint8_t)(1u << i % 8);
    }
    copy[map.len_bytes - 14] ^= 1; // the last chunk but one: IDAT's CRC
    expect_refused(copy, map.len_bytes, KEEL_ERR_FORMAT, "does not agree with its CRC");
    free(copy);
    keel_map_close(&map);
}

// A GIF of 35 bytes takes stb a gigabyte, a Huffman table of more than 256 codes makes it write beyond its arrays.
static void test_traps(void **state)
{
    uint8_t gif[35] = "GIF89a\x10\x27\x10\x27\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;";
    (void)state;
    expect_refused(gif, sizeof gif, KEEL_ERR_UNSUPPORTED, "25 million in all");
    struct keel_map map = open_file("colour.jpg");
    uint8_t *copy = exact_copy(map.data, map.len_bytes);
    size_t at = 2;
    while (copy[at + 1] != 0xc4) {
        at += 2 + ((size_t)copy[at + 2] << 8 | copy[at + 3]);
    }
    copy[at + 5 + 14] = copy[at + 5 + 15] = 200;
    expect_refused(copy, map.len_bytes, KEEL_ERR_FORMAT, "have more codes than fit");
    memcpy(copy, map.data, map.len_bytes);
    copy[at + 3]--; // a segment that ends inside its table
    expect_refused(copy, map.len_bytes, KEEL_ERR_FORMAT, "have more codes than fit");
    // The same tables, and a header that says 4:2:2: what comes of the pixels is no matter here.
    memcpy(copy, map.data, map.len_bytes);
    for (at = 2; copy[at + 1] != 0xc0;) {
        at += 2 + ((size_t)copy[at + 2] << 8 | copy[at + 3]);
    }
    copy[at + 11] = 0x21;
    copy[at + 14] = copy[at + 17] = 0x11;
    struct memory_log m;
    struct keel_image image;
    memory_log_init(&m);
    m.log.level = KEEL_LOG_INFO;
    (void)keel_image_decode(&image, copy, map.len_bytes, "half.jpg", &m.log);
    assert_logged(&m, "half.jpg: a 4:2:2 JPEG");
    keel_image_finish(&image);
    free(copy);
    keel_map_close(&map);
}

// What is wrong with a file of a known format is said.
static void test_reasons(void **state)
{
    uint8_t bmp[54];
    (void)state;
    struct keel_map map = open_file("rgb.png");
    uint8_t *copy = exact_copy(map.data, map.len_bytes);
    memset(copy + 16, 0, 4);
    expect_refused(copy, map.len_bytes, KEEL_ERR_FORMAT, "0-pixel image");
    memcpy(copy + 16, map.data + 16, 4);
    copy[25] = 3;
    expect_refused(copy, map.len_bytes, KEEL_ERR_FORMAT, "PLTE");
    copy[24] = 3;
    expect_refused(copy, map.len_bytes, KEEL_ERR_FORMAT, "1/2/4/8/16-bit only");
    free(copy);
    keel_map_close(&map);
    bmp_header(bmp, 4, 4);
    bmp[28] = 8;
    bmp[30] = 1;
    expect_refused(bmp, sizeof bmp, KEEL_ERR_FORMAT, "BMP RLE");
}

// Rows from the top: the same file with a negative height shows them in the other order.
static void test_top_down(void **state)
{
    (void)state;
    uint8_t bmp[54 + 16] = { 0 };
    for (int turned = 0; turned < 2; turned++) {
        struct keel_image image;
        bmp_header(bmp, 2, turned ? -2 : 2);
        bmp[54] = 200; // blue of the first pixel of the file
        assert_int_equal(keel_image_decode(&image, bmp, sizeof bmp, "rows.bmp", NULL), KEEL_OK);
        assert_int_equal(image.width, 2);
        assert_int_equal(image.height, 2);
        assert_int_equal(image.rgb[turned ? 2 : 8], 200);
        assert_int_equal(image.rgb[turned ? 8 : 2], 0);
        keel_image_finish(&image);
    }
}

// Every file cut at every place: an error or a picture, never a crash; half a PNG or BMP is never a picture.
static void test_truncated(void **state)
{
    static const char *const names[] = { "rgb.png", "palette.png", "progressive.jpg", "rgb.bmp", "two_frames.gif" };
    const keel_log silent = { .level = 0 };
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(names); i++) {
        struct keel_map map = open_file(names[i]);
        for (size_t len = 1; len < map.len_bytes; len += 1 + len / 50) {
            struct keel_image image;
            uint8_t *copy = exact_copy(map.data, len);
            const keel_status st = keel_image_decode(&image, copy, len, names[i], &silent);
            assert_true((st == KEEL_OK) == (image.rgb != NULL));
            assert_false(st == KEEL_OK && len < map.len_bytes / 2 && !strstr(names[i], ".jpg") && !strstr(names[i], ".gif"));
            keel_image_finish(&image);
            free(copy);
        }
        keel_map_close(&map);
    }
}

static void test_orientation(void **state)
{
    static const char *const upright[] = { "rgb.png", "colour.jpg", "progressive.jpg", "rgb.bmp", "two_frames.gif" };
    static const char *const turned[] = { "turned.jpg", "turned.png" };
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(upright); i++) {
        struct keel_map map = open_file(upright[i]);
        assert_int_equal(keel_image_orientation(map.data, map.len_bytes), 1);
        keel_map_close(&map);
    }
    assert_int_equal(keel_image_orientation((const uint8_t *)"", 0), 1);
    for (size_t i = 0; i < KEEL_COUNT(turned); i++) {
        struct keel_map map = open_file(turned[i]);
        assert_int_equal(keel_image_orientation(map.data, map.len_bytes), 6);
        // Cut or damaged anywhere: some orientation, and nothing read beyond the end.
        const size_t n = KEEL_MIN(map.len_bytes, (size_t)400);
        for (size_t len = 0; len < n; len++) {
            uint8_t *copy = exact_copy(map.data, len);
            const uint32_t x = keel_image_orientation(copy, len);
            assert_true(x == 1 || x == 6);
            free(copy);
            copy = exact_copy(map.data, n);
            copy[len] ^= 0xff;
            assert_in_range(keel_image_orientation(copy, n), 1, 8);
            free(copy);
        }
        keel_map_close(&map);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decode),
        cmocka_unit_test(test_resize),
        cmocka_unit_test(test_bad),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_traps),
        cmocka_unit_test(test_reasons),
        cmocka_unit_test(test_top_down),
        cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_orientation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
