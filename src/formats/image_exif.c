// SPDX-License-Identifier: MIT
// formats/image_exif.c: which way up a camera says its picture is. Reads one number; what is damaged counts as upright.
// Source: CIPA DC-008 (Exif 2.32) 4.5.4 and 4.6.2; ITU T.81 B.1; PNG 3rd edition 11.3.2.7 (eXIf).
#include "formats.h"

#include <string.h>

#define UPRIGHT 1u
#define ORIENTATION_TAG 0x0112u
#define TYPE_SHORT 3u

struct tiff {
    const uint8_t *data;
    size_t len;
    bool big; // byte order
};

// Unsigned number of 2 or 4 bytes; 0 beyond the end.
static uint32_t number(const struct tiff *t, size_t at, uint32_t bytes)
{
    uint32_t x = 0;
    if (at > t->len || t->len - at < bytes) {
        return 0;
    }
    for (uint32_t i = 0; i < bytes; i++) {
        x |= (uint32_t)t->data[at + i] << (8 * (t->big ? bytes - 1 - i : i));
    }
    return x;
}

// From the first directory of a TIFF header, which is what Exif is wrapped in.
static uint32_t orientation_of(const uint8_t *data, size_t len)
{
    const struct tiff t = { data, len, len > 0 && data[0] == 'M' };
    const bool known = len >= 8 && (memcmp(data, "MM\0*", 4) == 0 || memcmp(data, "II*\0", 4) == 0);
    const size_t directory = known ? number(&t, 4, 4) : len;
    const uint32_t n = number(&t, directory, 2);
    for (uint32_t i = 0; i < n; i++) {
        const size_t at = directory + 2 + 12 * (size_t)i;
        if (number(&t, at, 2) == ORIENTATION_TAG && number(&t, at + 2, 2) == TYPE_SHORT) {
            const uint32_t x = number(&t, at + 8, 2);
            return x >= 1 && x <= 8 ? x : UPRIGHT;
        }
    }
    return UPRIGHT;
}

static uint32_t in_jpeg(const uint8_t *data, size_t len)
{
    static const uint8_t exif[] = { 'E', 'x', 'i', 'f', 0, 0 };
    const struct tiff file = { data, len, true };
    for (size_t at = 2; at + 4 <= len && data[at] == 0xff;) {
        const uint8_t marker = data[at + 1];
        const size_t size = number(&file, at + 2, 2); // with its own two bytes
        if (marker == 0xda || size < 2 || size > len - at - 2) {
            break; // pixels begin, or the file ends
        }
        if (marker == 0xe1 && size >= 2 + sizeof exif && memcmp(data + at + 4, exif, sizeof exif) == 0) {
            return orientation_of(data + at + 4 + sizeof exif, size - 2 - sizeof exif);
        }
        at += 2 + size;
    }
    return UPRIGHT;
}

static uint32_t in_png(const uint8_t *data, size_t len)
{
    const struct tiff file = { data, len, true };
    for (size_t at = 8; at + 12 <= len;) { // length, name, bytes, checksum
        const size_t size = number(&file, at, 4);
        if (size > len - at - 12) {
            break;
        }
        if (memcmp(data + at + 4, "eXIf", 4) == 0) {
            return orientation_of(data + at + 8, size);
        }
        at += 12 + size;
    }
    return UPRIGHT;
}

uint32_t keel_image_orientation(const uint8_t *data, size_t len)
{
    static const uint8_t png[] = { 0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n' };
    if (len >= sizeof png && memcmp(data, png, sizeof png) == 0) {
        return in_png(data, len);
    }
    return len >= 2 && data[0] == 0xff && data[1] == 0xd8 ? in_jpeg(data, len) : UPRIGHT;
}
