// SPDX-License-Identifier: MIT
// keel/images.h: prompts with images in them, and the images of a run.
//
// A prompt is tokens and the places of its images' soft tokens. In a text "<image>" stands for an image; it becomes what
// transformers' Gemma3Processor makes of it: two newlines, <start_of_image>, the soft tokens, <end_of_image>, two newlines,
// tokenised together with the text around. With pan and scan (keel/vision.h) an image that has crops becomes "Here is the original
// image ", itself, " and here are some crops to help you see better ", and its crops with a space between.
// Thread safety: one thread at a time for a keel_images; prompts from any thread.
#ifndef KEEL_IMAGES_H
#define KEEL_IMAGES_H

#include <keel/session.h>
#include <keel/vision.h>

#ifdef __cplusplus
extern "C" {
#endif

// --- prompts -------------------------------------------------------------------------------------

struct keel_prompt {
    int32_t *ids;
    uint32_t n;
    uint8_t *loss_mask;               // [n], conversations only: 1 for assistant contents and the <end_of_turn> after them
    struct keel_image_tokens *images; // [n_images]; their embeds are borrowed
    uint32_t n_images;
};
// What stands for the placeholders, in order.
struct keel_prompt_images {
    const float *const *embeds; // [n], each [n_views, n_tokens, width]; NULL: the tokens alone are wanted
    const uint32_t *n_views;    // [n]; NULL: one each
    uint32_t n, n_tokens;
};

// BOS (if the model wants one) and a text. NULL images: "<image>" is plain text. The prompt belongs to the caller
// (keel_prompt_finish()). Errors: DATA (invalid UTF-8; more placeholders than images or the reverse: says how many), UNSUPPORTED
// (images, but the vocabulary lacks their control tokens), NO_MEMORY.
KEEL_API keel_status keel_prompt_encode(const keel_model *model, const char *text, size_t len,
                                        const struct keel_prompt_images *images, struct keel_prompt *out);
// The same for a conversation, as keel_chat_encode() gives it. Images belong to user messages. Errors: as both.
KEEL_API keel_status keel_prompt_chat(const keel_model *model, const struct keel_message *messages, size_t n_messages, bool open,
                                      const struct keel_prompt_images *images, struct keel_prompt *out);
// Appends a completion, tokenised on its own (as score and train do); it counts in a loss mask. After it a score row is
// { .ids, .n, .first = n before, .images, .n_images }. Errors: DATA, NO_MEMORY.
KEEL_API keel_status keel_prompt_complete(const keel_model *model, struct keel_prompt *prompt, const char *text, size_t len);
KEEL_API void keel_prompt_finish(struct keel_prompt *prompt); // accepts all-zero

// --- the images of a run -------------------------------------------------------------------------

// Every image file once, with room for its soft tokens in host memory, and the vision tower that fills it.
typedef struct keel_images keel_images;

// Opens the tower; no device is needed yet. `log` outlives it. Errors: as keel_vision_open().
KEEL_API keel_status keel_images_create(keel_images **out, const keel_model *model, const char *mmproj, const keel_log *log);
KEEL_API void keel_images_destroy(keel_images **images); // accepts NULL and pointers to NULL; prompts with its images die with it
KEEL_API uint32_t keel_images_tokens(const keel_images *images); // soft tokens an image
KEEL_API uint32_t keel_images_layers(const keel_images *images); // of the tower
// Pan and scan for all images; before the first one is added. Errors: as keel_vision_pan_and_scan().
KEEL_API keel_status keel_images_pan_and_scan(keel_images *images, const struct keel_pan_and_scan *params);
// Takes note of a file. *embeds [n_views, tokens, width], valid as long as `images`, is filled in by keel_images_encode().
// n_views may be NULL. Errors: NO_MEMORY, and with pan and scan as keel_vision_views().
KEEL_API keel_status keel_images_add(keel_images *images, const char *path, const float **embeds, uint32_t *n_views);
// Adds all images that the rows of a JSONL file name, so that they can be encoded before a model takes the device's memory.
// Errors: as keel_prompt_row(), with FILE:LINE.
KEEL_API keel_status keel_images_scan(keel_images *images, const char *jsonl, const keel_log *log);
// What an adapter changes in the vision tower is in force for all images encoded from now on; those encoded before are due again.
// Parts for the language model do not matter here (keel_session_add_adapter()). `dev` must outlive `images`. Errors: as
// keel_session_add_adapter().
KEEL_API keel_status keel_images_add_adapter(keel_images *images, keel_model *model, keel_device *dev, const char *path, float scale);
KEEL_API void keel_images_clear_adapters(keel_images *images); // the tower is the file's again
// Encodes what was added and is not encoded yet, then releases the tower's device memory. `progress`, unless NULL, is told images
// done and in total; returning false stops with INTERRUPTED. Errors: as keel_vision_encode(), at the first file that cannot be
// read; it is passed over from then on, until it is added again.
KEEL_API keel_status keel_images_encode(keel_images *images, keel_device *dev,
                                        bool (*progress)(void *user, uint64_t done, uint64_t total), void *user);
// Of the tower's file, pan and scan, and the files of all images encoded so far, in the order they were added; the same on every
// device.
KEEL_API uint64_t keel_images_hash(keel_images *images);

// The prompt of one row of a data file, given as JSON text:
//   {"prompt": text with "<image>"s, "images": [path, ...]} or
//   {"messages": [{"role", "content"}], "images"?: [...]}, where a content is a text with "<image>"s or a list of parts
//   {"type": "text", "text"} / {"type": "image", "image": path} / {"type": "image_url", "image_url": {"url": path}}; an image
//   part without a path takes the next of "images".
// Relative paths start at the folder of `file`, the row's file ("-" or NULL: the current folder). `open`: as keel_chat_encode().
// NULL images: a row with images is an error. Errors: DATA, UNSUPPORTED, IO (a file is missing), NO_MEMORY.
KEEL_API keel_status keel_prompt_row(struct keel_prompt *out, const keel_model *model, keel_images *images, const char *json,
                                     size_t len, const char *file, bool open, const keel_log *log);

#ifdef __cplusplus
}
#endif
#endif
