// SPDX-License-Identifier: MIT
// tests/train_fake.c: a stand-in for a model's tokenizer, one token a byte, for tests of the train room
// alone.
#include "base.h"

#include <keel/images.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BOS = 2, EOT = 3, FIRST_BYTE = 10 };

static void put(struct keel_prompt *p, int32_t id, bool loss)
{
    p->ids = realloc(p->ids, (p->n + 1) * sizeof *p->ids);
    p->loss_mask = realloc(p->loss_mask, p->n + 1);
    assert_true(p->ids && p->loss_mask);
    p->loss_mask[p->n] = loss;
    p->ids[p->n++] = id;
}

// An image: its number, as many times as it has tokens.
static void put_image(struct keel_prompt *p, const struct keel_prompt_images *images)
{
    const uint32_t i = p->n_images++;
    assert_true(i < images->n);
    p->images = realloc(p->images, p->n_images * sizeof *p->images);
    assert_non_null(p->images);
    p->images[i] = (struct keel_image_tokens){ .at = p->n, .n = images->n_tokens, .embeds = images->embeds[i] };
    for (uint32_t k = 0; k < images->n_tokens; k++) {
        put(p, (int32_t)i, false);
    }
}

static void put_text(struct keel_prompt *p, const char *text, size_t len,
                     const struct keel_prompt_images *images, bool loss)
{
    for (size_t i = 0; i < len; i++) {
        if (images && len - i >= 7 && memcmp(text + i, "<image>", 7) == 0) {
            put_image(p, images);
            i += 6;
        } else {
            put(p, FIRST_BYTE + (uint8_t)text[i], loss);
        }
    }
}

keel_status keel_prompt_encode(const keel_model *model, const char *text, size_t len,
                               const struct keel_prompt_images *images, struct keel_prompt *out)
{
    (void)model;
    *out = (struct keel_prompt){ 0 };
    put(out, BOS, false);
    put_text(out, text, len, images, false);
    free(out->loss_mask);
    out->loss_mask = NULL;
    return KEEL_OK;
}

// BOS, then for each message its bytes and EOT; assistant contents and their EOT count.
keel_status keel_prompt_chat(const keel_model *model, const struct keel_message *m, size_t n_messages,
                             bool open, const struct keel_prompt_images *images, struct keel_prompt *out)
{
    (void)model;
    assert_false(open);
    *out = (struct keel_prompt){ 0 };
    put(out, BOS, false);
    for (size_t i = 0; i < n_messages; i++) {
        const bool loss = strcmp(m[i].role, "assistant") == 0;
        if (m[i].content) {
            put_text(out, m[i].content, strlen(m[i].content), images, loss);
        }
        for (size_t k = 0; k < m[i].n_parts; k++) {
            const char *text = m[i].parts[k].text;
            if (text) {
                put_text(out, text, strlen(text), NULL, loss);
            } else {
                put_image(out, images);
            }
        }
        put(out, EOT, loss);
    }
    return KEEL_OK;
}

keel_status keel_prompt_complete(const keel_model *model, struct keel_prompt *p, const char *text, size_t len)
{
    (void)model;
    p->loss_mask = calloc(p->n + len + 1, 1);
    put_text(p, text, len, NULL, true);
    free(p->loss_mask);
    p->loss_mask = NULL;
    return KEEL_OK;
}

void keel_prompt_finish(struct keel_prompt *p)
{
    free(p->ids);
    free(p->loss_mask);
    free(p->images);
}

// Images of two tokens; their embeds tell the length of the path.
uint32_t keel_images_tokens(const keel_images *images)
{
    (void)images;
    return 2;
}

float train_fake_embeds[64];

keel_status keel_images_add(keel_images *images, const char *path, const float **embeds, uint32_t *n_views)
{
    (void)images;
    *n_views = 1;
    *embeds = &train_fake_embeds[strlen(path) % 64];
    return KEEL_OK;
}

keel_status keel_images_encode(keel_images *images, keel_device *dev,
                               bool (*progress)(void *, uint64_t, uint64_t), void *user)
{
    (void)images;
    (void)dev;
    (void)progress;
    (void)user;
    return KEEL_OK;
}

uint64_t keel_images_hash(keel_images *images)
{
    (void)images;
    return 1;
}

int32_t keel_token_eot(const keel_model *model)
{
    (void)model;
    return EOT;
}

int32_t keel_token_eos(const keel_model *model)
{
    (void)model;
    return 1;
}
