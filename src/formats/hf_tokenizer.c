// SPDX-License-Identifier: MIT
// formats/hf_tokenizer.c: tokenizer.json to the lists of tokens, scores and types that GGUF holds. Owns the rules of that
// translation; the tokenizer itself (tokenizer.c) knows the lists only. Sources: the tokenizers library's BPE model,
// transformers' converter from SentencePiece, llama.cpp's rules for token types.
#include "hf.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6 }; // as in tokenizer.c

static const char SPACE[] = "\xe2\x96\x81"; // U+2581
#define ADDED_SCORE (-1000.0f)  // what llama.cpp gives to tokens that no merge makes
#define UNUSED_SCORE (-10000.0f)
#define MAX_CHECKED_BYTES 256u // of a piece whose splits are looked at; longer ones do not occur

struct reader {
    struct keel_hf_vocab *v;
    const json_t *vocab;
    size_t *at;       // [n] offset in v->pool of a text that lies there, or SIZE_MAX
    uint16_t *merges; // [n] merges that make the token
    const char *name;
    const keel_log *log;
};

static bool is_on(const json_t *object, const char *key)
{
    return json_is_true(json_object_get(object, key));
}

static bool is_str(const json_t *value, const char *want)
{
    const char *s = json_string_value(value);
    return s && strcmp(s, want) == 0;
}

// --- what is expected around the lists -----------------------------------------------------------

// Spaces become U+2581; a Prepend of U+2581 is SentencePiece's dummy prefix.
static bool normalizer_fits(const json_t *n, bool *prefix)
{
    const json_t *list = json_object_get(n, "normalizers");
    const size_t count = is_str(json_object_get(n, "type"), "Sequence") ? json_array_size(list) : 1;
    bool replaces = false;
    for (size_t i = 0; i < count; i++) {
        const json_t *one = count == 1 && !list ? n : json_array_get(list, i);
        const json_t *type = json_object_get(one, "type");
        if (is_str(type, "Prepend") && is_str(json_object_get(one, "prepend"), SPACE)) {
            *prefix = true;
        } else if (is_str(type, "Replace") && is_str(json_object_get(json_object_get(one, "pattern"), "String"), " ") &&
                   is_str(json_object_get(one, "content"), SPACE)) {
            replaces = true;
        } else {
            return false;
        }
    }
    return replaces;
}

// Gemma's files split at spaces, of which the normalizer has left none.
static bool pre_tokenizer_fits(const json_t *p)
{
    return !p || json_is_null(p) ||
           (is_str(json_object_get(p, "type"), "Split") &&
            is_str(json_object_get(json_object_get(p, "pattern"), "String"), " "));
}

static bool is_unset(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return !v || json_is_null(v) || is_str(v, "") || (json_is_number(v) && json_number_value(v) == 0);
}

static keel_status check_kind(const struct reader *r, const json_t *model)
{
    keel_status st = KEEL_OK;
    const json_t *root = r->v->root;
    const char *type = json_string_value(json_object_get(model, "type"));
    if (!type || strcmp(type, "BPE") != 0) {
        KEEL_FAIL(r->log, KEEL_ERR_UNSUPPORTED, "%s: a tokenizer of type \"%s\"; keel reads the BPE of Gemma 3", r->name,
                  type ? type : "");
    }
    if (!is_on(model, "byte_fallback") || is_on(model, "ignore_merges") || !is_unset(model, "dropout") ||
        !is_unset(model, "continuing_subword_prefix") || !is_unset(model, "end_of_word_suffix")) {
        KEEL_FAIL(r->log, KEEL_ERR_UNSUPPORTED,
                  "%s: the BPE has no byte fallback, or a dropout, prefix or suffix; keel reads the BPE of Gemma 3", r->name);
    }
    if (!normalizer_fits(json_object_get(root, "normalizer"), &r->v->space_prefix) ||
        !pre_tokenizer_fits(json_object_get(root, "pre_tokenizer"))) {
        KEEL_FAIL(r->log, KEEL_ERR_UNSUPPORTED,
                  "%s: \"normalizer\" or \"pre_tokenizer\" is not that of Gemma 3 (spaces become U+2581, no other split)",
                  r->name);
    }
    const json_t *post = json_object_get(root, "post_processor");
    const json_t *first = json_array_get(json_object_get(post, "single"), 0);
    r->v->adds_bos = json_object_get(first, "SpecialToken") != NULL;
out:
    return st;
}

// --- tokens --------------------------------------------------------------------------------------

static bool is_byte_name(const char *s, size_t len)
{
    static const char hex[] = "0123456789ABCDEFabcdef";
    return len == 6 && memcmp(s, "<0x", 3) == 0 && strchr(hex, s[3]) && strchr(hex, s[4]) && s[5] == '>';
}

static keel_status read_vocab(struct reader *r, const json_t *model)
{
    keel_status st = KEEL_OK;
    struct keel_hf_vocab *v = r->v;
    const char *key;
    json_t *value;
    r->vocab = json_object_get(model, "vocab");
    if (!json_is_object(r->vocab) || json_object_size(r->vocab) == 0) {
        KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: \"model.vocab\" is missing or empty", r->name);
    }
    json_object_foreach((json_t *)(uintptr_t)r->vocab, key, value)
    {
        const int64_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        if (id < 0 || id >= v->n) {
            KEEL_FAIL(r->log, KEEL_ERR_FORMAT,
                      "%s: token \"%.64s\" has id %" PRId64 ", but config.json says vocab_size %u", r->name, key, id, v->n);
        }
        if (v->text[id]) {
            KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: tokens \"%.64s\" and \"%.64s\" have the same id %" PRId64, r->name,
                      v->text[id], key, id);
        }
        v->text[id] = key;
        v->len[id] = strlen(key);
        v->type[id] = is_byte_name(key, v->len[id]) ? BYTE : NORMAL;
    }
    const char *unk = json_string_value(json_object_get(model, "unk_token"));
    const json_t *unk_id = unk ? json_object_get(r->vocab, unk) : NULL;
    if (unk_id) {
        v->type[json_integer_value(unk_id)] = UNKNOWN;
    }
out:
    return st;
}

// Placeholders count as control tokens although Gemma's files do not mark all of them as special.
static bool looks_special(const char *s, size_t len)
{
    return strcmp(s, "<pad>") == 0 || strcmp(s, "<mask>") == 0 ||
           (len > 8 && memcmp(s, "<unused", 7) == 0 && s[len - 1] == '>');
}

// User-defined tokens are matched in the text, so they have its spaces.
static void put_user_defined(struct reader *r, int64_t id, const char *s, size_t len)
{
    const size_t start = r->v->pool.len;
    for (size_t i = 0; i < len;) {
        const bool space = len - i >= 3 && memcmp(s + i, SPACE, 3) == 0;
        keel_text_add(&r->v->pool, space ? " " : s + i, 1);
        i += space ? 3 : 1;
    }
    r->at[id] = start;
    r->v->len[id] = r->v->pool.len - start;
    keel_text_add(&r->v->pool, "", 1);
}

static keel_status read_added(struct reader *r)
{
    keel_status st = KEEL_OK;
    struct keel_hf_vocab *v = r->v;
    const json_t *list = json_object_get(v->root, "added_tokens");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *one = json_array_get(list, i);
        const json_t *number = json_object_get(one, "id"), *content = json_object_get(one, "content");
        const char *s = json_string_value(content);
        const int64_t id = json_is_integer(number) ? json_integer_value(number) : -1;
        if (!s || json_string_length(content) != strlen(s) || !*s || id < 0 || id >= v->n) {
            KEEL_FAIL(r->log, KEEL_ERR_FORMAT,
                      "%s: added token %zu (\"%.64s\", id %" PRId64 ") has no usable text or an id beyond the vocabulary of %u",
                      r->name, i, s ? s : "", id, v->n);
        }
        if (v->text[id] && strcmp(v->text[id], s) != 0) {
            KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: id %" PRId64 " is \"%.64s\" in added_tokens and \"%.64s\" in model.vocab",
                      r->name, id, s, v->text[id]);
        }
        if (is_on(one, "single_word") || is_on(one, "lstrip") || is_on(one, "rstrip")) {
            KEEL_FAIL(r->log, KEEL_ERR_UNSUPPORTED,
                      "%s: added token \"%.64s\" is matched as a single word or strips spaces, which Gemma 3's do not", r->name,
                      s);
        }
        v->text[id] = s;
        v->len[id] = strlen(s);
        v->type[id] = is_on(one, "special") || looks_special(s, v->len[id]) ? CONTROL : USER_DEFINED;
        v->score[id] = ADDED_SCORE;
        if (v->type[id] == USER_DEFINED) {
            put_user_defined(r, id, s, v->len[id]);
        }
    }
out:
    return st;
}

// --- merges --------------------------------------------------------------------------------------

// The id of a NORMAL token; -1 for others.
static int64_t find_normal(const struct reader *r, const char *text)
{
    const json_t *v = json_object_get(r->vocab, text);
    return v && r->v->type[json_integer_value(v)] == NORMAL ? json_integer_value(v) : -1;
}

// Either ["a", "b"] or "a b".
static bool split_merge(const json_t *m, const char **a, size_t *n_a, const char **b)
{
    if (json_is_array(m) && json_array_size(m) == 2) {
        *a = json_string_value(json_array_get(m, 0));
        *b = json_string_value(json_array_get(m, 1));
        *n_a = *a ? strlen(*a) : 0;
    } else {
        *a = json_string_value(m);
        const char *gap = *a ? strchr(*a + (**a != 0), ' ') : NULL;
        *b = gap ? gap + 1 : NULL;
        *n_a = gap ? (size_t)(gap - *a) : 0;
    }
    return *a && *b && *n_a > 0 && **b;
}

static keel_status read_merges(struct reader *r, const json_t *model)
{
    keel_status st = KEEL_OK;
    struct keel_text whole = {0};
    const json_t *list = json_object_get(model, "merges");
    const size_t n = json_array_size(list);
    if (!json_is_array(list) || n > 1u << 24) { // beyond it a rank is no exact float
        KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: \"model.merges\" is no list of at most %u merges", r->name, 1u << 24);
    }
    for (size_t i = 0; i < n; i++) {
        const char *a, *b;
        size_t n_a;
        if (!split_merge(json_array_get(list, i), &a, &n_a, &b)) {
            KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: merge %zu is no pair of texts", r->name, i);
        }
        whole.len = 0;
        keel_text_add(&whole, a, n_a);
        keel_text_add(&whole, b, strlen(b));
        if (whole.failed) {
            KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", r->name);
        }
        if (!json_object_get(r->vocab, whole.data)) {
            KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: merge %zu makes \"%.64s\", which is no token", r->name, i, whole.data);
        }
        const int64_t id = find_normal(r, whole.data);
        if (id >= 0) {
            if (r->merges[id] == 0) {
                r->v->score[id] = -(float)i;
            }
            r->merges[id] = (uint16_t)KEEL_MIN(r->merges[id] + 1, UINT16_MAX);
        }
    }
    // What no merge makes comes last.
    for (uint32_t id = 0; id < r->v->n; id++) {
        if (r->v->text[id] && r->v->type[id] == NORMAL && r->merges[id] == 0) {
            r->v->score[id] = -(float)n - 1.0f;
        }
    }
out:
    keel_text_finish(&whole);
    return st;
}

// Merging by score joins any two pieces that make a token; merging by rank only listed pairs. The two agree where every
// such pair is listed, as in what transformers converts from SentencePiece.
static void warn_unlisted(const struct reader *r)
{
    const struct keel_hf_vocab *v = r->v;
    char left[MAX_CHECKED_BYTES + 1];
    uint64_t n = 0;
    uint32_t example = 0;
    for (uint32_t id = 0; id < v->n; id++) {
        uint32_t pairs = 0;
        if (v->type[id] != NORMAL || v->len[id] > MAX_CHECKED_BYTES) {
            continue;
        }
        for (size_t i = 1; i < v->len[id]; i++) {
            if (((uint8_t)v->text[id][i] & 0xc0) != 0x80) {
                memcpy(left, v->text[id], i);
                left[i] = 0;
                pairs += find_normal(r, v->text[id] + i) >= 0 && find_normal(r, left) >= 0;
            }
        }
        if (pairs > r->merges[id]) {
            n += pairs - r->merges[id];
            example = id;
        }
    }
    if (n > 0) {
        KEEL_WARN(r->log,
                  "%s: %" PRIu64 " pairs of tokens make a token without a merge (\"%.64s\"); the tokens of some texts may differ "
                  "from transformers'",
                  r->name, n, v->text[example]);
    }
}

// --- the whole -----------------------------------------------------------------------------------

static void fill_gaps(struct reader *r)
{
    struct keel_hf_vocab *v = r->v;
    for (uint32_t id = 0; id < v->n; id++) {
        if (!v->text[id]) {
            r->at[id] = v->pool.len;
            keel_text_addf(&v->pool, "[PAD%u]", id);
            v->len[id] = v->pool.len - r->at[id];
            keel_text_add(&v->pool, "", 1);
            v->type[id] = UNUSED;
            v->score[id] = UNUSED_SCORE;
        }
    }
    for (uint32_t id = 0; id < v->n && !v->pool.failed; id++) {
        if (r->at[id] != SIZE_MAX) {
            v->text[id] = v->pool.data + r->at[id];
        }
    }
}

keel_status keel_hf_vocab_parse(struct keel_hf_vocab *v, const uint8_t *data, size_t len, uint32_t n_rows, const char *name,
                                const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct reader r = {.v = v, .name = name, .log = log};
    memset(v, 0, sizeof *v);
    KEEL_TRY(keel_hf_json(&v->root, data, len, name, log));
    v->n = n_rows;
    v->text = calloc(n_rows, sizeof *v->text);
    v->len = calloc(n_rows, sizeof *v->len);
    v->score = calloc(n_rows, sizeof *v->score);
    v->type = calloc(n_rows, sizeof *v->type);
    r.at = malloc(n_rows * sizeof *r.at);
    r.merges = calloc(n_rows, sizeof *r.merges);
    if (!v->text || !v->len || !v->score || !v->type || !r.at || !r.merges) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory for %u tokens", name, n_rows);
    }
    memset(r.at, 0xff, n_rows * sizeof *r.at);
    const json_t *model = json_object_get(v->root, "model");
    KEEL_TRY(check_kind(&r, model));
    KEEL_TRY(read_vocab(&r, model));
    KEEL_TRY(read_added(&r));
    KEEL_TRY(read_merges(&r, model));
    warn_unlisted(&r);
    fill_gaps(&r);
    if (v->pool.failed) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory for %u tokens", name, n_rows);
    }
out:
    free(r.at);
    free(r.merges);
    if (st != KEEL_OK) {
        keel_hf_vocab_finish(v);
    }
    return st;
}

void keel_hf_vocab_finish(struct keel_hf_vocab *v)
{
    json_decref(v->root);
    keel_text_finish(&v->pool);
    free(v->text);
    free(v->len);
    free(v->score);
    free(v->type);
    memset(v, 0, sizeof *v);
}

int64_t keel_hf_vocab_find(const struct keel_hf_vocab *v, const char *text)
{
    const size_t len = strlen(text);
    for (uint32_t id = 0; id < v->n; id++) {
        if (v->len[id] == len && memcmp(v->text[id], text, len) == 0) {
            return id;
        }
    }
    return -1;
}
