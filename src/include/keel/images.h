// SPDX-License-Identifier: MIT
// keel/images.h: prompts with images in them.
//
// A prompt is tokens and the places of its images' soft tokens. In a text "<image>" stands for an image; it becomes what
// transformers' Gemma3Processor makes of it: two newlines, <start_of_image>, the soft tokens, <end_of_image>, two newlines,
// tokenised together with the text around.
// Thread safety: any thread.
#ifndef KEEL_IMAGES_H
#define KEEL_IMAGES_H

#include <keel/session.h>

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
    const float *const *embeds; // [n], each [n_tokens, width]; NULL: the tokens alone are wanted
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

#ifdef __cplusplus
}
#endif
#endif
