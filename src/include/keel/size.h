// SPDX-License-Identifier: MIT
// keel/size.h: sizes in bytes as options and variables of keel name them.
#ifndef KEEL_SIZE_H
#define KEEL_SIZE_H

#include <keel/status.h>

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of a size such as "512M" or "2.5G" (K, M and G are powers of 1024). False, and *out untouched, if it is none. From any thread.
KEEL_API bool keel_parse_size(const char *text, uint64_t *out);

#ifdef __cplusplus
}
#endif
#endif
