// SPDX-License-Identifier: MIT
// gemma3/chat.c: Gemma's chat template, token by token as transformers' apply_chat_template() gives it.
// Control tokens are put in as ids; what users write is plain text and can never become one.
// Source: chat_template.jinja of google/gemma-3-*-it.
#include "gemma3.h"

#include <stdlib.h>
#include <string.h>

struct chat {
    const keel_model *model;
    int32_t start, end; // <start_of_turn>, <end_of_turn>
    struct keel_tokens ids;
    uint8_t *mask;
    size_t mask_cap;
    struct keel_text text; // plain text not tokenised yet: turns join their texts as the template does
    size_t loss_from;      // bytes of `text` before the part that counts as an answer; SIZE_MAX: none does
};

// Length of the white space that begins at p, as Python's str.strip() sees it; 0 if none.
static size_t space_at(const char *p, size_t len)
{
    const unsigned char *u = (const unsigned char *)p;
    if (len >= 1 && ((u[0] >= 9 && u[0] <= 13) || (u[0] >= 28 && u[0] <= 32))) {
        return 1;
    }
    if (len >= 2 && u[0] == 0xC2 && (u[1] == 0x85 || u[1] == 0xA0)) {
        return 2;
    }
    if (len >= 3) {
        const unsigned c = (u[0] & 15u) << 12 | (u[1] & 63u) << 6 | (u[2] & 63u);
        const bool three = (u[0] & 0xF0) == 0xE0;
        if (three && (c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
                      c == 0x205F || c == 0x3000)) {
            return 3;
        }
    }
    return 0;
}

static void strip(const char **text, size_t *len)
{
    for (size_t n; (n = space_at(*text, *len)) > 0;) {
        *text += n;
        *len -= n;
    }
    while (*len > 0) {
        size_t n = 0;
        for (size_t k = 1; k <= 3 && k <= *len && n == 0; k++) {
            n = space_at(*text + *len - k, k) == k ? k : 0;
        }
        if (n == 0) {
            break;
        }
        *len -= n;
    }
}

// Sets the mask of tokens from `from` on.
static keel_status mask_from(struct chat *c, size_t from, bool on)
{
    if (c->ids.n > c->mask_cap) {
        const size_t cap = KEEL_MAX(c->ids.n, c->mask_cap * 2);
        uint8_t *m = realloc(c->mask, cap);
        if (!m) {
            KEEL_ERROR(c->model->log, "no memory for a conversation of %zu tokens", c->ids.n);
            return KEEL_ERR_NO_MEMORY;
        }
        c->mask = m;
        c->mask_cap = cap;
    }
    memset(c->mask + from, on, c->ids.n - from);
    return KEEL_OK;
}

// Tokenises the pending text in one go, as transformers does between control tokens, and finds where the answer starts.
static keel_status flush(struct chat *c)
{
    keel_status st = KEEL_OK;
    const size_t from = c->ids.n;
    if (c->text.failed) {
        KEEL_FAIL(c->model->log, KEEL_ERR_NO_MEMORY, "no memory for the text of a conversation");
    }
    if (c->text.len == 0) {
        goto out;
    }
    const struct keel_tokenize_params plain = {.bos = false, .special = false};
    KEEL_TRY(keel_tokenize(c->model->tok, c->text.data, c->text.len, plain, &c->ids));
    KEEL_TRY(mask_from(c, from, false));
    size_t at = 0;
    for (size_t i = from; i < c->ids.n && c->loss_from != SIZE_MAX; i++) {
        size_t len = 0;
        keel_token_bytes(c->model->tok, c->ids.ids[i], &len);
        c->mask[i] = at >= c->loss_from;
        at += len;
    }
    c->text.len = 0;
out:
    c->loss_from = SIZE_MAX;
    return st;
}

static keel_status control(struct chat *c, int32_t id, bool loss)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(flush(c));
    KEEL_TRY(keel_tokens_add(&c->ids, id));
    KEEL_TRY(mask_from(c, c->ids.n - 1, loss));
out:
    return st;
}

static keel_status turns(struct chat *c, const struct keel_message *m, size_t n, bool open)
{
    keel_status st = KEEL_OK;
    const keel_log *log = c->model->log;
    const char *system = NULL;
    if (n > 0 && m[0].role && strcmp(m[0].role, "system") == 0) {
        system = m[0].content;
        m++;
        n--;
    }
    if (c->model->special.bos >= 0) {
        KEEL_TRY(control(c, c->model->special.bos, false));
    }
    for (size_t i = 0; i < n; i++) {
        if (!m[i].role || !m[i].content) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "message %zu has no role or no content", i + 1);
        }
        const bool user = strcmp(m[i].role, "user") == 0;
        const bool answer = strcmp(m[i].role, "assistant") == 0 || strcmp(m[i].role, "model") == 0;
        if ((!user && !answer) || user != (i % 2 == 0)) {
            KEEL_FAIL(log, KEEL_ERR_DATA, "message %zu has role \"%s\"; roles must alternate user, assistant, user, ...",
                      i + 1, m[i].role);
        }
        const char *text = m[i].content;
        size_t len = strlen(text);
        strip(&text, &len);
        KEEL_TRY(control(c, c->start, false));
        keel_text_addf(&c->text, "%s\n", user ? "user" : "model");
        if (i == 0 && system) {
            keel_text_addf(&c->text, "%s\n\n", system);
        }
        c->loss_from = answer ? c->text.len : SIZE_MAX;
        keel_text_add(&c->text, text, len);
        KEEL_TRY(control(c, c->end, answer));
        keel_text_add(&c->text, "\n", 1);
    }
    if (open) {
        KEEL_TRY(control(c, c->start, false));
        keel_text_add(&c->text, "model\n", 6);
    }
    KEEL_TRY(flush(c));
out:
    return st;
}

keel_status keel_chat_encode(const keel_model *model, const struct keel_message *messages, size_t n_messages, bool open,
                             int32_t **ids, uint8_t **loss_mask, size_t *n)
{
    keel_status st = KEEL_OK;
    struct chat c = {.model = model, .loss_from = SIZE_MAX};
    *ids = NULL;
    *n = 0;
    if (loss_mask) {
        *loss_mask = NULL;
    }
    if (!messages || n_messages == 0) {
        KEEL_FAIL(model->log, KEEL_ERR_ARG, "a conversation needs at least one message");
    }
    c.start = keel_token_find(model->tok, "<start_of_turn>");
    c.end = model->special.eot;
    if (c.start < 0 || c.end < 0) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: the vocabulary has no <start_of_turn> and <end_of_turn>: no chat model",
                  model->info.path);
    }
    KEEL_TRY(turns(&c, messages, n_messages, open));
    *ids = c.ids.ids;
    *n = c.ids.n;
    c.ids.ids = NULL;
    if (loss_mask) {
        *loss_mask = c.mask;
        c.mask = NULL;
    }
out:
    free(c.mask);
    keel_text_finish(&c.text);
    keel_tokens_finish(&c.ids);
    return st;
}
