// SPDX-License-Identifier: MIT
// formats/image_stb.c: the implementation of stb_image, compiled once, warnings off; used by image.c alone.
// Memory: stb inflates whatever a file says, so a budget that image.c derives from the image's size stands before malloc().
#include "image_stb.h"

#include <stdint.h>
#include <stdlib.h>

_Thread_local size_t keel_stb_budget;

static void *bounded_malloc(size_t n)
{
    return n <= keel_stb_budget ? malloc(n) : NULL;
}

static void *bounded_realloc(void *p, size_t n)
{
    return n <= keel_stb_budget ? realloc(p, n) : NULL;
}

#define STBI_MALLOC bounded_malloc
#define STBI_REALLOC bounded_realloc
#define STBI_FREE free
#define STB_IMAGE_IMPLEMENTATION
#include "image_stb.h" // once more: now with the bodies
