// SPDX-License-Identifier: MIT
// formats/image.c: image files to 8-bit RGB through stb_image, and resizing them as Pillow does.
// Owns limits and messages. stb_image itself is image_stb.c.
//
// Why stb_image_resize does not do the resizing: it lets samples beyond the edge take part in the normalisation, so its edges
// need a fourth channel of ones to be divided by, in f32: 16 bytes a pixel of the source, and the rounding still differs.
// Pillow's filter in Pillow's integers is shorter than that and gives Pillow's bytes (newer versions of Pillow take the
// vertical pass first where that is cheaper; then pixels differ by at most 1).
#include "formats.h"

#include "image_check.h"
#include "image_stb.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// --- decoding ------------------------------------------------------------------------------------

// Of an image that keel takes.
static keel_status read_size(int *w, int *h, const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    int channels = 0;
    if (len == 0 || len > INT32_MAX) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: an image file of %zu bytes; it must have some, at most 2 GiB", name, len);
    }
    KEEL_TRY(keel_image_check_jpeg(data, len, name, log));
    keel_stb_budget = 1u << 20; // headers only
    if (!stbi_info_from_memory(data, (int)len, w, h, &channels)) {
        // Asked for the size, stb tries one format after the other and keeps the reason of the last; decoding goes by the signature.
        free(stbi_load_from_memory(data, (int)len, w, h, &channels, 3));
        const char *why = stbi_failure_reason();
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: no image that keel reads (%s); it reads PNG, JPEG, BMP and GIF", name, why ? why : "");
    }
    if (*h < 0 && *h > INT32_MIN) {
        *h = -*h; // a BMP whose rows begin at the top
    }
    if (*w <= 0 || *h <= 0) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is %d × %d pixels", name, *w, *h);
    }
    const int most = keel_image_is_gif(data, len) ? KEEL_IMAGE_MAX_GIF_PIXELS : KEEL_IMAGE_MAX_PIXELS;
    if (*w > KEEL_IMAGE_MAX_SIDE || *h > KEEL_IMAGE_MAX_SIDE || (uint64_t)*w * (uint64_t)*h > (uint64_t)most) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: %d × %d pixels are above keel's limits (%d a side, %d million in all); scale it down",
                  name, *w, *h, KEEL_IMAGE_MAX_SIDE, most / 1000000);
    }
out:
    return st;
}

keel_status keel_image_size(uint32_t *width, uint32_t *height, const uint8_t *data, size_t len, const char *name,
                            const keel_log *log)
{
    int w = 0, h = 0;
    const keel_status st = read_size(&w, &h, data, len, name, log);
    *width = (uint32_t)w;
    *height = (uint32_t)h;
    return st;
}

keel_status keel_image_decode(struct keel_image *out, const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    int w = 0, h = 0, channels = 0;
    memset(out, 0, sizeof *out);
    KEEL_TRY(read_size(&w, &h, data, len, name, log));
    KEEL_TRY(keel_image_check(data, len, name, log));
    // 4 channels of 16 bits, or JPEG coefficients of whole 32 × 32 units, and stb doubles buffers that it grows.
    keel_stb_budget = ((size_t)w + 64) * ((size_t)h + 64) * 16 + 2 * len;
    out->rgb = stbi_load_from_memory(data, (int)len, &w, &h, &channels, 3);
    if (!out->rgb) {
        const char *why = stbi_failure_reason();
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged (%s)", name, why ? why : "");
    }
    out->width = (uint32_t)w;
    out->height = (uint32_t)h;
out:
    return st;
}

keel_status keel_image_crop(struct keel_image *out, const struct keel_image *in, struct keel_box box, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const size_t row = (size_t)box.width * 3;
    *out = (struct keel_image){ .width = box.width, .height = box.height, .rgb = malloc(row * box.height) };
    if (!out->rgb) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a crop of %u × %u pixels", box.width, box.height);
    }
    for (uint32_t y = 0; y < box.height; y++) {
        memcpy(out->rgb + y * row, in->rgb + (((size_t)box.y + y) * in->width + box.x) * 3, row);
    }
out:
    return st;
}

void keel_image_finish(struct keel_image *image)
{
    free(image->rgb); // stb_image takes its memory from malloc()
    memset(image, 0, sizeof *image);
}

// --- resizing ------------------------------------------------------------------------------------

#define FIXED_BITS 22 // Pillow: 32 bits less 8 of a pixel less 2 for sums that overshoot

// What each output pixel of one axis reads: `n` inputs from `first`, with weights w[0..n).
struct taps {
    uint32_t n_max;
    struct tap_range {
        uint32_t first, n;
    } *range;   // [outputs]
    int32_t *w; // [outputs, n_max]
};

static void taps_finish(struct taps *t)
{
    free(t->range);
    free(t->w);
}

// Triangle filter, as wide as the scale when shrinking, cut at the edge and normalised. Same order of operations as Pillow.
static bool taps_make(struct taps *t, uint32_t in, uint32_t out)
{
    const double scale = (double)in / out, wide = KEEL_MAX(scale, 1.0);
    t->n_max = (uint32_t)ceil(wide) * 2 + 1;
    t->range = malloc(out * sizeof *t->range);
    t->w = calloc((size_t)out * t->n_max, sizeof *t->w);
    double *k = malloc(t->n_max * sizeof *k);
    if (!t->range || !t->w || !k) {
        free(k);
        return false;
    }
    for (uint32_t i = 0; i < out; i++) {
        const double centre = (i + 0.5) * scale;
        const double lo = KEEL_MAX(centre - wide + 0.5, 0.0);
        const uint32_t first = (uint32_t)lo, end = KEEL_MIN((uint32_t)(centre + wide + 0.5), in);
        double sum = 0;
        for (uint32_t j = first; j < end; j++) {
            const double x = fabs((j - centre + 0.5) * (1.0 / wide));
            k[j - first] = x < 1 ? 1 - x : 0;
            sum += k[j - first];
        }
        for (uint32_t j = 0; j < end - first; j++) {
            t->w[(size_t)i * t->n_max + j] = (int32_t)(0.5 + k[j] / sum * (1 << FIXED_BITS));
        }
        t->range[i] = (struct tap_range){ first, end - first };
    }
    free(k);
    return true;
}

static uint8_t clip8(int32_t v)
{
    v >>= FIXED_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

// One axis: `lines` independent lines of pixels; the pixels of a line lie `pixel` bytes apart, the lines `line_in` and
// `line_out` bytes.
struct axis {
    size_t lines, line_in, line_out, pixel;
};

static void resample(uint8_t *dst, const uint8_t *src, const struct taps *t, uint32_t n_out, struct axis a)
{
    for (uint32_t i = 0; i < n_out; i++) {
        const struct tap_range r = t->range[i];
        const int32_t *w = t->w + (size_t)i * t->n_max;
        for (size_t line = 0; line < a.lines; line++) {
            const uint8_t *p = src + line * a.line_in + r.first * a.pixel;
            int32_t sum[3] = { 1 << (FIXED_BITS - 1), 1 << (FIXED_BITS - 1), 1 << (FIXED_BITS - 1) };
            for (uint32_t j = 0; j < r.n; j++, p += a.pixel) {
                sum[0] += p[0] * w[j];
                sum[1] += p[1] * w[j];
                sum[2] += p[2] * w[j];
            }
            uint8_t *q = dst + line * a.line_out + i * a.pixel;
            q[0] = clip8(sum[0]);
            q[1] = clip8(sum[1]);
            q[2] = clip8(sum[2]);
        }
    }
}

keel_status keel_image_resize(struct keel_image *out, const struct keel_image *in, uint32_t width, uint32_t height,
                              const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct taps x = { 0 }, y = { 0 };
    struct keel_image mid = { .width = width, .height = in->height };
    memset(out, 0, sizeof *out);
    out->rgb = malloc((size_t)width * height * 3);
    mid.rgb = malloc((size_t)width * in->height * 3);
    if (!out->rgb || !mid.rgb || !taps_make(&x, in->width, width) || !taps_make(&y, in->height, height)) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory to resize an image of %u × %u pixels", in->width, in->height);
    }
    // An axis that keeps its size has weights of exactly one and comes through unchanged.
    const size_t row_in = (size_t)in->width * 3, row = (size_t)width * 3;
    resample(mid.rgb, in->rgb, &x, width, (struct axis){ .lines = in->height, .line_in = row_in, .line_out = row, .pixel = 3 });
    resample(out->rgb, mid.rgb, &y, height, (struct axis){ .lines = width, .line_in = 3, .line_out = 3, .pixel = row });
    out->width = width;
    out->height = height;
out:
    if (st != KEEL_OK) {
        keel_image_finish(out);
    }
    keel_image_finish(&mid);
    taps_finish(&x);
    taps_finish(&y);
    return st;
}
