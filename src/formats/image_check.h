// SPDX-License-Identifier: MIT
// formats/image_check.h: what stands in front of stb_image, which reads zeros beyond the end and checks no sums.
#ifndef KEEL_IMAGE_CHECK_H
#define KEEL_IMAGE_CHECK_H

#include "formats.h"

// Of a PNG every chunk lies in the file and has its CRC, up to IEND; of a BMP every row, of a GIF every block up to the first
// image's last lies in the file. Other bytes are left to stb. Errors: FORMAT.
keel_status keel_image_check(const uint8_t *data, size_t len, const char *name, const keel_log *log);
// Before stb sees anything: no Huffman table of a JPEG is larger than its arrays. A note is given if it is 4:2:2. Errors: FORMAT.
keel_status keel_image_check_jpeg(const uint8_t *data, size_t len, const char *name, const keel_log *log);
bool keel_image_is_gif(const uint8_t *data, size_t len);
bool keel_image_is_png(const uint8_t *data, size_t len);
// CRC-32 of ISO 3309, as PNG uses it.
uint32_t keel_image_crc(const uint8_t *data, size_t len);

#endif
