// SPDX-License-Identifier: MIT
// gemma3/trainer_internal.h: a training pass as its two files see it: trainer.c goes forward and back through the blocks,
// trainer_loss.c does what lies above them.
#ifndef KEEL_GEMMA3_TRAINER_H
#define KEEL_GEMMA3_TRAINER_H

#include "gemma3.h"

struct keel_trainer_grads {
    struct keel_span x;              // [T, D] gradient of the residual stream
    struct keel_span t;              // [T, D]
    struct keel_span f;              // [T, F]
    struct keel_span d_o, dq;        // [T, H·d]
    struct keel_span dk, dv;         // [T, G·d]
    struct keel_span ds;             // like the probabilities
    struct keel_span dh;             // [T, r]
};

struct keel_trainer {
    keel_model *model;
    uint32_t max_tokens, max_row, max_loss, chunk, rank; // rank: adapter width that the buffers were made for
    keel_heap *host, *heap, *lora;
    struct keel_batch batch;
    struct keel_acts acts;
    struct keel_trainer_grads g;
    struct keel_span *saved; // [L] of [T, D]: block inputs
    struct keel_span rows, normed; // [max_loss, D]: final residual at the places; then its norm, then its gradient
    struct keel_span logits, partial;
    struct {              // made when first needed; all by place but `values`
        keel_heap *heap;
        struct keel_span beta, base;
    } constrain;
    struct {
        keel_heap *heap;
        struct keel_span ids, log_p, tail, stats, values; // values [chunk, KEEL_TOP]
    } top;
    double weighted;      // of the last step
    bool input_grads;
    const keel_hooks *hooks;
    const keel_adapter *adapters[KEEL_MAX_FROZEN + 1]; // of a step: those that stay as they are, then the one that is trained
    uint32_t n_frozen;
    keel_recorder *rec;
};

// Records the forward pass of these rows; their loss places are batch.n_places. `adapter` NULL: the base alone, without the frozen
// adapters. On an error the recorder is to be reset.
keel_status keel_trainer_forward(keel_trainer *t, const keel_adapter *adapter, const struct keel_seq *seqs, size_t n_seqs, bool hooked,
                                 struct keel_pass *pass);
// Records the way back from g.x, the gradient of the final residual stream, adding to `grads`.
void keel_trainer_backward(keel_trainer *t, const struct keel_pass *pass, struct keel_span grads);

#endif
