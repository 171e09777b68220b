// SPDX-License-Identifier: MIT
// gemma3/chat.c: prompts: Gemma's chat template, token by token as transformers' apply_chat_template() gives it, and images in
// it or in plain text, as its Gemma3Processor puts them in.
// Control tokens are put in as ids; what users write is plain text and can never become one.
// Source: chat_template.jinja of google/gemma-3-*-it; transformers' processing_gemma3.py.
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
    const struct keel_prompt_images *images; // NULL: there are none, and placeholders are text
    struct keel_image_tokens *image;         // of all views
    uint32_t n_images, n_views;              // placeholders so far; views in `image`
    int32_t image_start, image_end, image_soft;
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

// --- images --------------------------------------------------------------------------------------

#define PLACEHOLDER "<image>"

static uint32_t views_of(const struct chat *c, uint32_t image)
{
    return c->images->n_views ? c->images->n_views[image] : 1;
}

static keel_status image_tokens(struct chat *c)
{
    keel_status st = KEEL_OK;
    if (!c->images || c->images->n == 0) {
        goto out;
    }
    c->image_start = keel_token_find(c->model->tok, "<start_of_image>");
    c->image_end = keel_token_find(c->model->tok, "<end_of_image>");
    c->image_soft = KEEL_MAX(keel_token_find(c->model->tok, "<image_soft_token>"), 0); // its embedding is not used
    if (c->image_start < 0 || c->image_end < 0) {
        KEEL_FAIL(c->model->log, KEEL_ERR_UNSUPPORTED,
                  "%s: the vocabulary has no <start_of_image> and <end_of_image>: this model takes no images", c->model->info.path);
    }
    size_t n_views = 0;
    for (uint32_t i = 0; i < c->images->n; i++) {
        n_views += views_of(c, i);
    }
    c->image = calloc(n_views, sizeof *c->image);
    if (!c->image) {
        KEEL_FAIL(c->model->log, KEEL_ERR_NO_MEMORY, "no memory for a prompt with %u images", c->images->n);
    }
out:
    return st;
}

static keel_status add_view(struct chat *c, const float *embeds)
{
    keel_status st = KEEL_OK;
    const uint32_t n = c->images->n_tokens;
    keel_text_add(&c->text, "\n\n", 2);
    KEEL_TRY(control(c, c->image_start, false));
    c->image[c->n_views++] = (struct keel_image_tokens){ .at = (uint32_t)c->ids.n, .n = n, .embeds = embeds };
    for (uint32_t k = 0; k < n; k++) {
        KEEL_TRY(control(c, c->image_soft, false));
    }
    KEEL_TRY(control(c, c->image_end, false));
    keel_text_add(&c->text, "\n\n", 2);
out:
    return st;
}

// The words around an image and its crops are transformers'.
static keel_status add_image(struct chat *c)
{
    keel_status st = KEEL_OK;
    const uint32_t i = c->n_images++;
    if (!c->images || i >= c->images->n) {
        return KEEL_OK; // counted; check_images() reports it
    }
    const float *embeds = c->images->embeds ? c->images->embeds[i] : NULL;
    const size_t floats = (size_t)c->images->n_tokens * c->model->cfg.width;
    const uint32_t n = views_of(c, i);
    keel_text_addf(&c->text, "%s", n > 1 ? "Here is the original image " : "");
    for (uint32_t v = 0; v < n; v++) {
        keel_text_addf(&c->text, "%s", v == 0 ? "" : v == 1 ? " and here are some crops to help you see better " : " ");
        KEEL_TRY(add_view(c, embeds ? embeds + v * floats : NULL));
    }
out:
    return st;
}

static keel_status add_text(struct chat *c, const char *text, size_t len)
{
    keel_status st = KEEL_OK;
    const size_t n = sizeof PLACEHOLDER - 1;
    size_t from = 0;
    for (size_t i = 0; c->images && i + n <= len;) {
        if (memcmp(text + i, PLACEHOLDER, n) != 0) {
            i++;
            continue;
        }
        keel_text_add(&c->text, text + from, i - from);
        KEEL_TRY(add_image(c));
        from = i += n;
    }
    keel_text_add(&c->text, text + from, len - from);
out:
    return st;
}

static keel_status check_images(const struct chat *c)
{
    const uint32_t n = c->images ? c->images->n : 0;
    if (c->n_images != n) {
        KEEL_ERROR(c->model->log, "the prompt has %u place%s for images (" PLACEHOLDER "), but %u image%s given", c->n_images,
                   c->n_images == 1 ? "" : "s", n, n == 1 ? " is" : "s are");
        return KEEL_ERR_DATA;
    }
    if (c->ids.n > UINT32_MAX) {
        KEEL_ERROR(c->model->log, "the prompt has more than 2^32 tokens");
        return KEEL_ERR_DATA;
    }
    return KEEL_OK;
}

// --- turns ---------------------------------------------------------------------------------------

// A message's text with its white space stripped, or its parts.
static keel_status content(struct chat *c, const struct keel_message *m)
{
    keel_status st = KEEL_OK;
    if (m->content) {
        const char *text = m->content;
        size_t len = strlen(text);
        strip(&text, &len);
        KEEL_TRY(add_text(c, text, len));
    }
    for (size_t i = 0; !m->content && i < m->n_parts; i++) {
        const char *text = m->parts[i].text;
        if (!text) {
            KEEL_TRY(add_image(c));
            continue;
        }
        size_t len = strlen(text);
        strip(&text, &len);
        keel_text_add(&c->text, text, len);
    }
out:
    return st;
}

// The text before the first user's, as the template takes it: not stripped, of parts the first.
static keel_status system_text(const struct chat *c, const struct keel_message *m, const char **text)
{
    *text = m->content;
    if (!m->content && m->n_parts > 0) {
        *text = m->parts[0].text;
    }
    if (!*text) {
        KEEL_ERROR(c->model->log, "the system message has no text");
        return KEEL_ERR_DATA;
    }
    return KEEL_OK;
}

static keel_status turns(struct chat *c, const struct keel_message *m, size_t n, bool open)
{
    keel_status st = KEEL_OK;
    const keel_log *log = c->model->log;
    const char *system = NULL;
    if (n > 0 && m[0].role && strcmp(m[0].role, "system") == 0) {
        KEEL_TRY(system_text(c, &m[0], &system));
        m++;
        n--;
    }
    if (c->model->special.bos >= 0) {
        KEEL_TRY(control(c, c->model->special.bos, false));
    }
    for (size_t i = 0; i < n; i++) {
        if (!m[i].role || (!m[i].content && !m[i].parts)) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "message %zu has no role or no content", i + 1);
        }
        const bool user = strcmp(m[i].role, "user") == 0;
        const bool answer = strcmp(m[i].role, "assistant") == 0 || strcmp(m[i].role, "model") == 0;
        if ((!user && !answer) || user != (i % 2 == 0)) {
            KEEL_FAIL(log, KEEL_ERR_DATA, "message %zu has role \"%s\"; roles must alternate user, assistant, user, ...",
                      i + 1, m[i].role);
        }
        KEEL_TRY(control(c, c->start, false));
        keel_text_addf(&c->text, "%s\n", user ? "user" : "model");
        if (i == 0 && system) {
            keel_text_addf(&c->text, "%s\n\n", system);
        }
        c->loss_from = answer ? c->text.len : SIZE_MAX;
        const uint32_t before = c->n_images;
        KEEL_TRY(content(c, &m[i]));
        if (answer && c->n_images > before) {
            KEEL_FAIL(log, KEEL_ERR_DATA, "message %zu: an answer has no images; put them into a user's message", i + 1);
        }
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

// --- the prompts ---------------------------------------------------------------------------------

static void chat_finish(struct chat *c)
{
    free(c->mask);
    free(c->image);
    keel_text_finish(&c->text);
    keel_tokens_finish(&c->ids);
}

// Moves what was put together into the prompt.
static keel_status deliver(struct chat *c, bool mask, struct keel_prompt *out)
{
    const keel_status st = check_images(c);
    if (st != KEEL_OK) {
        return st;
    }
    *out = (struct keel_prompt){ .ids = c->ids.ids, .n = (uint32_t)c->ids.n, .images = c->image, .n_images = c->n_views };
    c->ids.ids = NULL;
    c->image = NULL;
    if (mask) {
        out->loss_mask = c->mask;
        c->mask = NULL;
    }
    return st;
}

keel_status keel_prompt_encode(const keel_model *model, const char *text, size_t len, const struct keel_prompt_images *images,
                               struct keel_prompt *out)
{
    keel_status st = KEEL_OK;
    struct chat c = { .model = model, .loss_from = SIZE_MAX, .images = images };
    *out = (struct keel_prompt){ 0 };
    KEEL_TRY(image_tokens(&c));
    if (keel_tokenizer_adds_bos(model->tok) && model->special.bos >= 0) {
        KEEL_TRY(control(&c, model->special.bos, false));
    }
    KEEL_TRY(add_text(&c, text, len));
    KEEL_TRY(flush(&c));
    KEEL_TRY(deliver(&c, false, out));
out:
    chat_finish(&c);
    return st;
}

keel_status keel_prompt_chat(const keel_model *model, const struct keel_message *messages, size_t n_messages, bool open,
                             const struct keel_prompt_images *images, struct keel_prompt *out)
{
    keel_status st = KEEL_OK;
    struct chat c = { .model = model, .loss_from = SIZE_MAX, .images = images };
    *out = (struct keel_prompt){ 0 };
    if (!messages || n_messages == 0) {
        KEEL_FAIL(model->log, KEEL_ERR_ARG, "a conversation needs at least one message");
    }
    c.start = keel_token_find(model->tok, "<start_of_turn>");
    c.end = model->special.eot;
    if (c.start < 0 || c.end < 0) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED, "%s: the vocabulary has no <start_of_turn> and <end_of_turn>: no chat model",
                  model->info.path);
    }
    KEEL_TRY(image_tokens(&c));
    KEEL_TRY(turns(&c, messages, n_messages, open));
    KEEL_TRY(deliver(&c, true, out));
out:
    chat_finish(&c);
    return st;
}

keel_status keel_prompt_complete(const keel_model *model, struct keel_prompt *prompt, const char *text, size_t len)
{
    keel_status st = KEEL_OK;
    struct keel_tokens t = { .ids = prompt->ids, .n = prompt->n, .cap = prompt->n };
    const struct keel_tokenize_params plain = { .bos = false, .special = false };
    st = keel_tokenize(model->tok, text, len, plain, &t);
    prompt->ids = t.ids;
    KEEL_TRY(st);
    if (t.n > UINT32_MAX) {
        KEEL_FAIL(model->log, KEEL_ERR_DATA, "the prompt and its completion have more than 2^32 tokens");
    }
    if (prompt->loss_mask) {
        uint8_t *mask = realloc(prompt->loss_mask, KEEL_MAX(t.n, (size_t)1));
        if (!mask) {
            KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "no memory for a completion");
        }
        memset(mask + prompt->n, 1, t.n - prompt->n);
        prompt->loss_mask = mask;
    }
    prompt->n = (uint32_t)t.n;
out:
    return st;
}

void keel_prompt_finish(struct keel_prompt *prompt)
{
    free(prompt->ids);
    free(prompt->loss_mask);
    free(prompt->images);
    *prompt = (struct keel_prompt){ 0 };
}

keel_status keel_chat_encode(const keel_model *model, const struct keel_message *messages, size_t n_messages, bool open,
                             int32_t **ids, uint8_t **loss_mask, size_t *n)
{
    struct keel_prompt p;
    const keel_status st = keel_prompt_chat(model, messages, n_messages, open, NULL, &p);
    *ids = p.ids;
    *n = p.n;
    if (loss_mask) {
        *loss_mask = p.loss_mask;
        p.loss_mask = NULL;
    }
    p.ids = NULL;
    keel_prompt_finish(&p);
    return st;
}
