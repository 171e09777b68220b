// SPDX-License-Identifier: MIT
// tests/train_fake.c: a stand-in for a model's tokenizer, one token a byte, for tests of the train room
// alone.
#include "base.h"

#include <keel/model.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BOS = 2, EOT = 3, FIRST_BYTE = 10 };

keel_status keel_encode(const keel_model *model, const char *text, size_t len,
                        const struct keel_encode_params *p, int32_t **ids, size_t *n)
{
    (void)model;
    *ids = malloc((len + 1) * sizeof **ids);
    *n = 0;
    if (p->bos) {
        (*ids)[(*n)++] = BOS;
    }
    for (size_t i = 0; i < len; i++) {
        (*ids)[(*n)++] = FIRST_BYTE + (uint8_t)text[i];
    }
    return KEEL_OK;
}

// BOS, then for each message its bytes and EOT; assistant contents and their EOT count.
keel_status keel_chat_encode(const keel_model *model, const struct keel_message *m, size_t n_messages,
                             bool open, int32_t **ids, uint8_t **mask, size_t *n)
{
    (void)model;
    assert_false(open);
    *ids = malloc(1000 * sizeof **ids);
    *mask = calloc(1000, 1);
    *n = 0;
    (*ids)[(*n)++] = BOS;
    for (size_t i = 0; i < n_messages; i++) {
        const bool loss = strcmp(m[i].role, "assistant") == 0;
        for (const char *c = m[i].content; *c; c++) {
            (*mask)[*n] = loss;
            (*ids)[(*n)++] = FIRST_BYTE + (uint8_t)*c;
        }
        (*mask)[*n] = loss;
        (*ids)[(*n)++] = EOT;
    }
    return KEEL_OK;
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
