// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_image.c: any bytes as an image; what decodes is resized.
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct keel_image image, small;
    (void)keel_image_orientation(data, len);
    if (keel_image_decode(&image, data, len, "fuzz", &fuzz_silent) != KEEL_OK) {
        return 0;
    }
    const size_t bytes = (size_t)image.width * image.height * 3;
    fuzz_use(image.rgb, bytes);
    if (bytes < 1u << 20 && keel_image_resize(&small, &image, 14, 9, &fuzz_silent) == KEEL_OK) {
        fuzz_use(small.rgb, 14 * 9 * 3);
        keel_image_finish(&small);
    }
    keel_image_finish(&image);
    return 0;
}
