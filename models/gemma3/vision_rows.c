// SPDX-License-Identifier: MIT
// gemma3/vision_rows.c: the vision tower in the training of rows with images: soft tokens anew before each micro-batch, their
// gradients back through the tower after it. Owns no rows and no images. An image that occurs twice is computed twice.
#include "vision_internal.h"

#include <stdlib.h>

struct keel_image_trainer {
    keel_model *model;
    keel_images *images;
    keel_trainer *text;
    keel_vision_trainer *tower;
};

keel_status keel_image_trainer_create(keel_image_trainer **out, keel_model *model, keel_images *images, keel_trainer *trainer)
{
    keel_status st = KEEL_OK;
    keel_image_trainer *t = calloc(1, sizeof *t);
    *out = NULL;
    if (!t) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "no memory to train a vision tower");
    }
    t->model = model;
    t->images = images;
    t->text = trainer;
    KEEL_TRY(keel_vision_trainer_create(&t->tower, keel_images_vision(images), model->dev));
    keel_trainer_want_input_grads(trainer, true);
    *out = t;
    t = NULL;
out:
    keel_image_trainer_destroy(&t);
    return st;
}

void keel_image_trainer_destroy(keel_image_trainer **trainer)
{
    keel_image_trainer *t = trainer ? *trainer : NULL;
    if (!t) {
        return;
    }
    if (t->tower) {
        keel_vision_trainer_destroy(&t->tower);
        keel_vision_unload(keel_images_vision(t->images));
    }
    free(t);
    *trainer = NULL;
}

keel_status keel_image_trainer_forward(keel_image_trainer *t, const keel_adapter *adapter, const struct keel_seq *seqs, size_t n_seqs)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < n_seqs; i++) {
        for (uint32_t k = 0; k < seqs[i].n_images; k++) {
            const float *embeds = seqs[i].images[k].embeds;
            const struct keel_view view = keel_images_retake(t->images, embeds);
            KEEL_ASSERT(view.path);
            // The tokens belong to `images`; rows only look at them.
            KEEL_TRY(keel_vision_trainer_forward(t->tower, adapter, view, (float *)(uintptr_t)embeds));
        }
    }
out:
    return st;
}

keel_status keel_image_trainer_backward(keel_image_trainer *t, const keel_adapter *adapter, struct keel_span grads,
                                        const struct keel_seq *seqs, size_t n_seqs)
{
    keel_status st = KEEL_OK;
    const struct keel_span dx = keel_trainer_input_grads(t->text);
    const uint32_t width = t->model->cfg.width;
    float *host = malloc((size_t)dx.bytes);
    size_t row = 0; // first token of the row in the batch
    if (!host) {
        KEEL_FAIL(t->model->log, KEEL_ERR_NO_MEMORY, "no memory for the gradients of image tokens");
    }
    KEEL_TRY(keel_download(t->model->dev, host, dx, (size_t)dx.bytes));
    for (size_t i = 0; i < n_seqs; row += seqs[i].n, i++) {
        for (uint32_t k = 0; k < seqs[i].n_images; k++) {
            const struct keel_image_tokens *im = &seqs[i].images[k];
            const struct keel_view view = keel_images_retake(t->images, im->embeds);
            KEEL_TRY(keel_vision_trainer_backward(t->tower, adapter, grads, view, host + (row + im->at) * width));
        }
    }
out:
    free(host);
    return st;
}
