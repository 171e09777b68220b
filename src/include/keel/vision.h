// SPDX-License-Identifier: MIT
// keel/vision.h: images to tokens: the SigLIP tower and projector of a Gemma 3 vision-language model.
//
// An image becomes n_tokens vectors as wide as the text model, which stand in a prompt where text would have its embeddings
// (keel/session.h). A tower is opened without a device; its weights are uploaded when the first image must be computed and
// can be released again. Results are kept on disk, so most runs never upload them. Thread safety: one thread at a time.
#ifndef KEEL_VISION_H
#define KEEL_VISION_H

#include <keel/model.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct keel_vision keel_vision;

struct keel_vision_info {
    char path[4096];
    uint32_t image_size; // images are resized to image_size × image_size pixels
    uint32_t patch;      // pixels along the side of a patch
    uint32_t width, ff_width, n_layers, n_heads;
    uint32_t n_tokens;   // soft tokens of an image
    uint32_t out_width;  // of a soft token: the text model's width
    float eps;
    uint64_t n_params, file_bytes;
    uint64_t hash;       // of the file's bytes; 0 until keel_vision_hash() or keel_vision_encode() was called
};

// Pan and scan, as transformers' Gemma3ImageProcessor does it: an image whose longer side is at least min_ratio times the shorter
// is also shown in crops, which cut the longer side evenly, so that little is lost to squeezing it into a square. The number of
// crops is the rounded ratio, at least 2, at most max_crops, fewer where they would be narrower than min_crop; no crops at all
// where one would be smaller than min_crop on either side.
struct keel_pan_and_scan {
    uint32_t min_crop;  // pixels, at least 1
    uint32_t max_crops; // 1 to KEEL_MAX_CROPS
    double min_ratio;   // at least 1
};
#define KEEL_MAX_CROPS 16
#define KEEL_PAN_AND_SCAN_DEFAULTS .min_crop = 256, .max_crops = 4, .min_ratio = 1.2,
#define keel_pan_and_scan_params(...) (&(struct keel_pan_and_scan){ KEEL_PAN_AND_SCAN_DEFAULTS __VA_ARGS__ })

// Opens an mmproj GGUF file (architecture "clip", projector "gemma3") as llama.cpp's converter writes it, or a Hugging Face
// folder, which is converted first as keel_model_open() does. Metadata, tensor names, shapes and types are checked. `model`: the
// text model that the tokens are for, or NULL to only look at the file. Errors: IO, FORMAT, UNSUPPORTED, MISMATCH (the tokens
// are not as wide as the model). `log` outlives the object.
KEEL_API keel_status keel_vision_open(keel_vision **out, const char *path, const keel_model *model, const keel_log *log);
// Whether the file is a GGUF of architecture "clip", sound or not. Logs nothing.
KEEL_API bool keel_vision_is_file(const char *path);
KEEL_API void keel_vision_close(keel_vision **vision); // accepts NULL and pointers to NULL
KEEL_API const struct keel_vision_info *keel_vision_info(const keel_vision *vision);
// Hashes the whole file (64-bit FNV-1a); reads every byte once.
KEEL_API uint64_t keel_vision_hash(keel_vision *vision);

// What the tower takes on a device while loaded, beside the model. Needs no device.
KEEL_API keel_status keel_vision_plan(const keel_vision *vision, struct keel_plan *out);

// Uploads the weights, checking them for NaN and infinity; does nothing if they are on `dev` already. keel_vision_encode()
// calls it when it must. Errors: NO_MEMORY, NUMERIC (names the tensor), DEVICE_LOST, ARG (loaded on another device).
KEEL_API keel_status keel_vision_load(keel_vision *vision, keel_device *dev);
// Releases all device memory; the object stays open. Call it before `dev` is destroyed.
KEEL_API void keel_vision_unload(keel_vision *vision);

// Shows images in crops too from now on; NULL: whole images only, as at first. Errors: ARG (a value out of its range).
KEEL_API keel_status keel_vision_pan_and_scan(keel_vision *vision, const struct keel_pan_and_scan *params);
// Views of an image file: itself, which is view 0, and its crops. Reads the file's header, and without pan and scan nothing.
// Errors: IO, FORMAT, UNSUPPORTED.
KEEL_API keel_status keel_vision_views(const keel_vision *vision, const char *image_path, uint32_t *n_views);

// Decodes the image file (PNG, JPEG, BMP, first frame of a GIF), resizes the view as Hugging Face's processor does, and writes its
// soft tokens [n_tokens, out_width] to `tokens`. Taken from the disk cache when the same pixels went through the same tower
// before; `dev` may be NULL if it is known to be there. Errors: IO, FORMAT and UNSUPPORTED (the image; named in the message),
// NO_MEMORY, NUMERIC, DEVICE_LOST, ARG (not in the cache and no device), DATA (the image has no such view).
KEEL_API keel_status keel_vision_encode(keel_vision *vision, keel_device *dev, const char *image_path, uint32_t view,
                                        float *tokens);

#ifdef __cplusplus
}
#endif
#endif
