// SPDX-License-Identifier: MIT
// formats/image_stb.h: how stb_image is set up, for image.c and image_stb.c. No include guard: the second time gives the bodies.
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_ONLY_GIF
#include <stb_image.h>

#include <stddef.h>

// The largest single block that stb_image gets on this thread.
extern _Thread_local size_t keel_stb_budget;
