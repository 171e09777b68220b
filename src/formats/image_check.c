// SPDX-License-Identifier: MIT
// formats/image_check.c: whether an image file is whole.
// Source: ITU T.81 B.1 and B.2; PNG 3rd edition 5.3 and annex D; GIF89a 18 to 24; BITMAPINFOHEADER as Microsoft documents it.
#include "image_check.h"

#include <stdlib.h>
#include <string.h>

#define PNG_HEAD 8
#define PNG_AROUND 12u // length, type and CRC of a chunk
#define GIF_HEAD 13

static uint32_t little(const uint8_t *p, uint32_t bytes)
{
    uint32_t x = 0;
    for (uint32_t i = 0; i < bytes; i++) {
        x |= (uint32_t)p[i] << (8 * i);
    }
    return x;
}

static uint32_t big32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

uint32_t keel_image_crc(const uint8_t *data, size_t len)
{
    uint32_t table[256], crc = UINT32_MAX;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) {
            table[i] = (table[i] & 1 ? 0xedb88320u : 0) ^ table[i] >> 1;
        }
    }
    for (size_t i = 0; i < len; i++) {
        crc = table[(crc ^ data[i]) & 255] ^ crc >> 8;
    }
    return ~crc;
}

bool keel_image_is_gif(const uint8_t *data, size_t len)
{
    return len >= GIF_HEAD && (memcmp(data, "GIF87a", 6) == 0 || memcmp(data, "GIF89a", 6) == 0);
}

bool keel_image_is_png(const uint8_t *data, size_t len)
{
    return len >= PNG_HEAD && memcmp(data, "\x89PNG\r\n\x1a\n", PNG_HEAD) == 0;
}

static keel_status check_png(const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    for (size_t at = PNG_HEAD;;) {
        if (len - at < PNG_AROUND) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the file ends at byte %zu, before the PNG's end (IEND)", name, len);
        }
        const uint32_t n = big32(data + at);
        if (n > len - at - PNG_AROUND) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the PNG chunk at byte %zu has %u bytes, the file ends at byte %zu",
                      name, at, n, len);
        }
        if (keel_image_crc(data + at + 4, (size_t)n + 4) != big32(data + at + 8 + n)) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the PNG chunk at byte %zu does not agree with its CRC", name, at);
        }
        if (memcmp(data + at + 4, "IEND", 4) == 0) {
            break;
        }
        at += (size_t)n + PNG_AROUND;
    }
out:
    return st;
}

// RLE is not for stb, which says so. The padding of the last row may lack: some writers leave it out and nobody reads it.
static keel_status check_bmp(const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const bool old = len >= 26 && little(data + 14, 4) == 12; // OS/2: sizes of 16 bits
    if (len < (old ? 26 : 34)) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the file ends at byte %zu, inside the BMP's header", name, len);
    }
    const uint64_t w = little(data + 18, old ? 2 : 4), bits = little(data + (old ? 24 : 28), 2);
    const int64_t h = old ? (int64_t)little(data + 20, 2) : llabs((int64_t)(int32_t)little(data + 22, 4));
    const uint32_t packing = old ? 0 : little(data + 30, 4);
    const uint64_t row = (w * bits + 7) / 8, end = little(data + 10, 4) + (row + 3) / 4 * 4 * (uint64_t)KEEL_MAX(h - 1, 0) + row;
    if ((packing == 0 || packing == 3) && end > len) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the BMP's rows end at byte %llu, the file at byte %zu", name,
                  (unsigned long long)end, len);
    }
out:
    return st;
}

// The place after a colour table that `flags` tell of.
static size_t after_colours(size_t at, uint8_t flags)
{
    return at + (flags & 0x80 ? (size_t)3 << ((flags & 7) + 1) : 0);
}

// The place after sub-blocks and their terminator, or 0 if the file ends before.
static size_t after_blocks(const uint8_t *data, size_t len, size_t at)
{
    while (at < len && data[at] != 0) {
        at += (size_t)data[at] + 1;
    }
    return at < len ? at + 1 : 0;
}

static keel_status check_gif(const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    size_t at = after_colours(GIF_HEAD, data[10]);
    while (at > 0 && at < len) {
        if (data[at] == '!') { // an extension: its label and blocks
            at = after_blocks(data, len, at + 2);
        } else if (data[at] == ',') {
            at = at + 10 <= len ? after_blocks(data, len, after_colours(at + 10, data[at + 9]) + 1) : 0;
            if (at > 0) {
                goto out;
            }
        } else {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: no GIF block begins at byte %zu, before the first image's end",
                      name, at);
        }
    }
    KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the file ends at byte %zu, before the end of the GIF's first image", name,
              len);
out:
    return st;
}

// The place of the next marker at or after `at`, its 0xff; `len` if there is none. Bytes of a scan hold 0xff with zero or a restart.
static size_t next_marker(const uint8_t *data, size_t len, size_t at)
{
    while (len - at >= 2 && (data[at] != 0xff || data[at + 1] == 0 || data[at + 1] == 0xff || (data[at + 1] & 0xf8) == 0xd0)) {
        at++;
    }
    return len - at >= 2 ? at : len;
}

// Tables of one DHT segment. stb before 2.28 writes beyond its arrays if one has more than 256 codes, and
// reads a table on beyond the segment.
static bool tables_fit(const uint8_t *p, size_t n)
{
    while (n > 0) {
        size_t codes = 0;
        for (size_t i = 1; n >= 17 && i <= 16; i++) {
            codes += p[i];
        }
        if (n < 17 || codes > 256 || codes > n - 17) {
            return false;
        }
        p += 17 + codes;
        n -= 17 + codes;
    }
    return true;
}

// Whether colour has half the columns and all the rows, of a SOF segment.
static bool is_422(const uint8_t *p, size_t n)
{
    return n >= 15 && p[5] == 3 && p[7] == 0x21 && p[10] == 0x11 && p[13] == 0x11;
}

// Any number of 0xff may stand before a marker, for stb also the first.
keel_status keel_image_check_jpeg(const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (len < 2 || data[0] != 0xff) {
        return st;
    }
    for (size_t at = next_marker(data, len, 0); len - at >= 4; at = next_marker(data, len, at)) {
        const uint8_t marker = data[at + 1];
        const size_t n = (size_t)data[at + 2] << 8 | data[at + 3]; // with its own two bytes
        if (marker == 0xd9) {
            break;
        }
        if (marker == 0xd8) {
            at += 2;
            continue;
        }
        if (n < 2 || n > len - at - 2) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the JPEG segment at byte %zu has %zu bytes, the file ends at byte %zu",
                      name, at, n, len);
        }
        if (marker == 0xc4 && !tables_fit(data + at + 4, n - 2)) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the image is damaged: the JPEG's Huffman tables at byte %zu have more codes than fit", name, at);
        }
        if (marker >= 0xc0 && marker <= 0xc2 && is_422(data + at + 4, n - 2)) {
            KEEL_INFO(log, "%s: a 4:2:2 JPEG: the colour of its second column from the right may be wrong; PNG or 4:4:4 has none of that",
                      name);
        }
        at += 2 + n;
    }
out:
    return st;
}

keel_status keel_image_check(const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    if (keel_image_is_png(data, len)) {
        return check_png(data, len, name, log);
    }
    if (keel_image_is_gif(data, len)) {
        return check_gif(data, len, name, log);
    }
    return len >= 2 && memcmp(data, "BM", 2) == 0 ? check_bmp(data, len, name, log) : KEEL_OK;
}
