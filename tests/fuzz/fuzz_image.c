// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_image.c: any bytes as an image, and a PNG once more with its sums put right; what decodes is resized.
#include "fuzz.h"

#include "image_check.h"

#include <stdlib.h>
#include <string.h>

static void put_big32(uint8_t *p, uint32_t x)
{
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(x >> (24 - 8 * i));
    }
}

// Else hardly a changed PNG would come to the decoder.
static void right_sums(uint8_t *data, size_t len)
{
    for (size_t at = 8; len - at >= 12;) {
        const uint32_t n = (uint32_t)data[at] << 24 | (uint32_t)data[at + 1] << 16 | (uint32_t)data[at + 2] << 8 | data[at + 3];
        if (n > len - at - 12) {
            return;
        }
        put_big32(data + at + 8 + n, keel_image_crc(data + at + 4, (size_t)n + 4));
        at += (size_t)n + 12;
    }
}

static void use(const uint8_t *data, size_t len)
{
    struct keel_image image, small;
    (void)keel_image_orientation(data, len);
    if (keel_image_decode(&image, data, len, "fuzz", &fuzz_silent) != KEEL_OK) {
        return;
    }
    const size_t bytes = (size_t)image.width * image.height * 3;
    fuzz_use(image.rgb, bytes);
    if (bytes < 1u << 20 && keel_image_resize(&small, &image, 14, 9, &fuzz_silent) == KEEL_OK) {
        fuzz_use(small.rgb, 14 * 9 * 3);
        keel_image_finish(&small);
    }
    keel_image_finish(&image);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    use(data, len);
    if (keel_image_is_png(data, len)) {
        uint8_t *copy = malloc(len);
        if (copy) {
            memcpy(copy, data, len);
            right_sums(copy, len);
            use(copy, len);
            free(copy);
        }
    }
    return 0;
}
