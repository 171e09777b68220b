// SPDX-License-Identifier: MIT
// train/constrain.c: what the token weights of constrained fine-tuning need: β by the token's place in its response, and its
// log-probability under the base (Qi et al. 2024, arXiv 2406.05946, section 4; science notes 2.3).
#include "platform.h"
#include "run.h"

#include <stdlib.h>

bool keel_train_constrained(const struct keel_train_params *p)
{
    return p->constrain[0] > 0 || p->constrain[1] > 0 || p->constrain[2] > 0;
}

// Each assistant turn of a chat is a response of its own.
static void fill_beta(const struct keel_train_row *row, const double beta[3], float *out)
{
    uint32_t place = 0, at = 0; // at: tokens of this response so far
    for (uint32_t i = row->first; i < row->n; i++) {
        if (row->mask && !row->mask[i]) {
            at = 0;
            continue;
        }
        out[place++] = (float)beta[at == 0 ? 0 : at < 5 ? 1 : 2];
        at++;
    }
}

static keel_status judge(struct keel_train_run *r, const struct keel_train_row *rows, struct keel_seq *seqs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        fill_beta(&rows[i], r->p->constrain, r->constrain.beta + rows[i].place0);
    }
    return keel_interrupted() ? KEEL_INTERRUPTED
                              : keel_trainer_eval(r->trainer, NULL, seqs, n, r->constrain.base_logprob + rows->place0, NULL);
}

keel_status keel_train_constrain_prepare(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_constrain *c = &r->constrain;
    if (!keel_train_constrained(r->p)) {
        return KEEL_OK;
    }
    c->beta = calloc(r->set.n_loss, sizeof *c->beta);
    c->base_logprob = calloc(r->set.n_loss, sizeof *c->base_logprob);
    if (!c->beta || !c->base_logprob) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "no memory for the weights of %llu tokens", (unsigned long long)r->set.n_loss);
    }
    KEEL_TRY(keel_train_each_batch(r, &r->set, judge));
out:
    return st;
}

void keel_train_constrain_finish(struct keel_train_constrain *c)
{
    free(c->beta);
    free(c->base_logprob);
    *c = (struct keel_train_constrain){ 0 };
}
