// SPDX-License-Identifier: MIT
// formats/tokenizer.c: SentencePiece BPE as Gemma uses it. Text is normalised (space to U+2581), user-defined
// pieces are cut out longest first and stay whole, the rest starts as single characters and the adjacent pair
// with the best score is merged until none is left; what is no piece falls back to byte tokens. Source:
// sentencepiece, bpe_model.cc and prefix matcher of normalizer.cc; same ids as transformers and llama.cpp.
#include "formats.h"

#include <stdlib.h>
#include <string.h>

// Token types of tokenizer.ggml.token_type.
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6 };

static const char SPACE[] = "\xe2\x96\x81"; // U+2581

// Open-addressing hash table from normalised piece to id; -1 is empty.
struct table {
    int32_t *slot;
    uint32_t mask, longest; // bytes of the longest key
};

struct keel_tokenizer {
    uint32_t vocab;
    char *pool;        // all strings
    uint32_t *name;    // [vocab + 1] offsets into pool: the piece as written, NUL-terminated
    uint32_t *bytes;   // [vocab] offset of the decoded bytes
    uint32_t *n_bytes; // [vocab]
    uint32_t *norm;    // [vocab] offset of the normalised piece
    uint32_t *n_norm;  // [vocab]
    float *score;
    uint8_t *type;
    struct table pieces;  // what merges may produce: normal, unused and user-defined
    struct table whole;   // user-defined: matched before merging
    struct table control; // matched too when asked for
    bool starts_whole[256], starts_control[256];
    int32_t byte_id[256];
    struct keel_token_ids ids;
    bool add_bos, add_prefix;
    const keel_log *log;
};

static bool table_init(struct table *t, uint32_t n)
{
    uint32_t cap = 16;
    while (cap < n * 2 && cap < 1u << 30) {
        cap *= 2;
    }
    t->slot = malloc(cap * sizeof *t->slot);
    t->mask = cap - 1;
    for (uint32_t i = 0; t->slot && i < cap; i++) {
        t->slot[i] = -1;
    }
    return t->slot != NULL;
}

static int32_t *table_slot(const keel_tokenizer *tok, const struct table *t, const char *key, uint32_t len,
                           uint64_t hash)
{
    uint32_t i = (uint32_t)(hash ^ hash >> 32) & t->mask;
    while (t->slot[i] >= 0) {
        const uint32_t id = (uint32_t)t->slot[i];
        if (tok->n_norm[id] == len && memcmp(tok->pool + tok->norm[id], key, len) == 0) {
            break;
        }
        i = (i + 1) & t->mask;
    }
    return &t->slot[i];
}

static int32_t table_find(const keel_tokenizer *tok, const struct table *t, const char *key, uint32_t len)
{
    return len > t->longest ? -1 : *table_slot(tok, t, key, len, keel_hash(KEEL_HASH_INIT, key, len));
}

static void table_add(const keel_tokenizer *tok, struct table *t, uint32_t id)
{
    const char *key = tok->pool + tok->norm[id];
    int32_t *slot = table_slot(tok, t, key, tok->n_norm[id], keel_hash(KEEL_HASH_INIT, key, tok->n_norm[id]));
    if (*slot < 0) { // of equal pieces the first one counts
        *slot = (int32_t)id;
        t->longest = KEEL_MAX(t->longest, tok->n_norm[id]);
    }
}

// Id of the longest key of the table that `s` begins with, or -1.
static int32_t table_longest(const keel_tokenizer *tok, const struct table *t, const char *s, size_t len)
{
    const uint32_t max = (uint32_t)KEEL_MIN(len, (size_t)t->longest);
    uint64_t h = KEEL_HASH_INIT;
    int32_t best = -1;
    for (uint32_t n = 1; n <= max; n++) {
        h = keel_hash(h, s + n - 1, 1);
        const int32_t id = *table_slot(tok, t, s, n, h);
        best = id >= 0 ? id : best;
    }
    return best;
}

// --- creation ------------------------------------------------------------------------------------

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
}

// 0x41 of "<0x41>"; -1 if the name is no byte.
static int byte_of_name(const char *s, size_t len)
{
    if (len != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>' || hex_digit(s[3]) < 0 || hex_digit(s[4]) < 0) {
        return -1;
    }
    return hex_digit(s[3]) * 16 + hex_digit(s[4]);
}

static void add_replaced(struct keel_text *pool, const char *s, size_t len, const char *from, const char *to)
{
    const size_t n = strlen(from);
    for (size_t i = 0; i < len;) {
        if (len - i >= n && memcmp(s + i, from, n) == 0) {
            keel_text_add(pool, to, strlen(to));
            i += n;
        } else {
            keel_text_add(pool, s + i++, 1);
        }
    }
    keel_text_add(pool, "", 1); // NUL
}

static bool allocate(keel_tokenizer *tok)
{
    const size_t n = tok->vocab;
    tok->name = calloc(n + 1, sizeof *tok->name);
    tok->bytes = calloc(n, sizeof *tok->bytes);
    tok->n_bytes = calloc(n, sizeof *tok->n_bytes);
    tok->norm = calloc(n, sizeof *tok->norm);
    tok->n_norm = calloc(n, sizeof *tok->n_norm);
    tok->score = calloc(n, sizeof *tok->score);
    tok->type = calloc(n, 1);
    return tok->name && tok->bytes && tok->n_bytes && tok->norm && tok->n_norm && tok->score && tok->type &&
           table_init(&tok->pieces, tok->vocab) && table_init(&tok->whole, tok->vocab / 8 + 8) &&
           table_init(&tok->control, tok->vocab);
}

// Strings of token i: as written, normalised, decoded.
static void add_token(keel_tokenizer *tok, struct keel_text *pool, uint32_t i, const char *s, size_t len)
{
    const int byte = tok->type[i] == BYTE ? byte_of_name(s, len) : -1;
    tok->name[i] = (uint32_t)pool->len;
    keel_text_add(pool, s, len);
    keel_text_add(pool, "", 1);
    tok->norm[i] = (uint32_t)pool->len;
    add_replaced(pool, s, len, " ", SPACE);
    tok->n_norm[i] = (uint32_t)pool->len - 1 - tok->norm[i];
    tok->bytes[i] = (uint32_t)pool->len;
    if (byte >= 0) {
        const char c = (char)byte;
        tok->byte_id[byte] = (int32_t)i;
        keel_text_add(pool, &c, 1);
        keel_text_add(pool, "", 1);
        tok->n_bytes[i] = 1;
    } else if (tok->type[i] != CONTROL && tok->type[i] != UNKNOWN) {
        add_replaced(pool, s, len, SPACE, " ");
        tok->n_bytes[i] = (uint32_t)pool->len - 1 - tok->bytes[i];
    } else {
        keel_text_add(pool, "", 1);
    }
}

static void index_tokens(keel_tokenizer *tok)
{
    for (uint32_t i = 0; i < tok->vocab; i++) {
        if (tok->n_norm[i] == 0) {
            continue;
        }
        const uint8_t first = (uint8_t)tok->pool[tok->norm[i]];
        if (tok->type[i] == NORMAL || tok->type[i] == UNUSED || tok->type[i] == USER_DEFINED) {
            table_add(tok, &tok->pieces, i);
        }
        if (tok->type[i] == USER_DEFINED) {
            table_add(tok, &tok->whole, i);
            tok->starts_whole[first] = true;
        }
        if (tok->type[i] == CONTROL || tok->type[i] == UNKNOWN || tok->type[i] == USER_DEFINED) {
            table_add(tok, &tok->control, i);
            tok->starts_control[first] = true;
        }
    }
}

static keel_status read_id(const keel_tokenizer *tok, const keel_gguf *g, const char *key, int32_t *out)
{
    int64_t v;
    *out = -1;
    if (!keel_gguf_i64(g, key, &v) || v == -1) {
        return KEEL_OK;
    }
    if (v < 0 || v >= (int64_t)tok->vocab) {
        KEEL_ERROR(tok->log, "%s: %s is %lld, but the vocabulary has %u tokens", keel_gguf_name(g), key,
                   (long long)v, tok->vocab);
        return KEEL_ERR_FORMAT;
    }
    *out = (int32_t)v;
    return KEEL_OK;
}

static keel_status read_flags(keel_tokenizer *tok, const keel_gguf *g)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(read_id(tok, g, "tokenizer.ggml.bos_token_id", &tok->ids.bos));
    KEEL_TRY(read_id(tok, g, "tokenizer.ggml.eos_token_id", &tok->ids.eos));
    KEEL_TRY(read_id(tok, g, "tokenizer.ggml.padding_token_id", &tok->ids.pad));
    KEEL_TRY(read_id(tok, g, "tokenizer.ggml.unknown_token_id", &tok->ids.unk));
    KEEL_TRY(read_id(tok, g, "tokenizer.ggml.eot_token_id", &tok->ids.eot));
    if (tok->ids.eot < 0) {
        tok->ids.eot = keel_token_find(tok, "<end_of_turn>");
    }
    tok->add_bos = true;
    keel_gguf_bool(g, "tokenizer.ggml.add_bos_token", &tok->add_bos);
    tok->add_prefix = true; // SentencePiece's default; Gemma's files say false
    keel_gguf_bool(g, "tokenizer.ggml.add_space_prefix", &tok->add_prefix);
out:
    return st;
}

struct lists {
    struct keel_gguf_array tokens, scores, types;
};

static keel_status read_lists(const keel_gguf *g, struct lists *l, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const char *file = keel_gguf_name(g);
    const char *model = keel_gguf_str(g, "tokenizer.ggml.model", NULL);
    if (!model) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT,
                  "%s: no tokenizer (tokenizer.ggml.model is missing); convert the model again with one",
                  file);
    }
    if (strcmp(model, "llama") != 0) {
        KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED,
                  "%s: tokenizer '%s' is not supported, only SentencePiece BPE ('llama')", file, model);
    }
    if (!keel_gguf_array(g, "tokenizer.ggml.tokens", &l->tokens) || l->tokens.type != KEEL_GGUF_STR ||
        l->tokens.n == 0 || l->tokens.n > 1u << 24) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: tokenizer.ggml.tokens is missing, empty or no list of strings",
                  file);
    }
    if (!keel_gguf_array(g, "tokenizer.ggml.scores", &l->scores) ||
        !keel_gguf_type_is_float(l->scores.type) || l->scores.n != l->tokens.n) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: tokenizer.ggml.scores must be %llu numbers, one a token", file,
                  (unsigned long long)l->tokens.n);
    }
    if (!keel_gguf_array(g, "tokenizer.ggml.token_type", &l->types) ||
        !keel_gguf_type_is_int(l->types.type) || l->types.n != l->tokens.n) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: tokenizer.ggml.token_type must be %llu integers, one a token",
                  file, (unsigned long long)l->tokens.n);
    }
out:
    return st;
}

static keel_status read_tokens(keel_tokenizer *tok, struct keel_text *pool, const struct lists *l,
                               const char *file)
{
    keel_status st = KEEL_OK;
    for (uint32_t i = 0; i < tok->vocab; i++) {
        size_t len;
        const char *s = keel_gguf_array_str(&l->tokens, i, &len);
        const int64_t type = keel_gguf_array_int(&l->types, i);
        const double score = keel_gguf_array_num(&l->scores, i);
        if (len > 1u << 16 || pool->len > 1u << 30) {
            KEEL_FAIL(tok->log, KEEL_ERR_FORMAT, "%s: token %u has %zu bytes, which cannot be right", file, i,
                      len);
        }
        if (type < 0 || type > BYTE || (type == BYTE && byte_of_name(s, len) < 0)) {
            KEEL_FAIL(tok->log, KEEL_ERR_FORMAT,
                      "%s: token %u has type %lld; 0 to 6 exist, and 6 is a byte written <0xXX>", file, i,
                      (long long)type);
        }
        if (!keel_utf8_valid(s, len, NULL)) {
            KEEL_FAIL(tok->log, KEEL_ERR_FORMAT, "%s: token %u is not valid UTF-8", file, i);
        }
        if (score != score) {
            KEEL_FAIL(tok->log, KEEL_ERR_FORMAT, "%s: token %u has a score that is not a number", file, i);
        }
        tok->type[i] = type == 0 ? NORMAL : (uint8_t)type; // 0 is ggml's "undefined"
        tok->score[i] = (float)score;
        add_token(tok, pool, i, s, len);
    }
    if (pool->failed) {
        KEEL_FAIL(tok->log, KEEL_ERR_NO_MEMORY, "%s: out of memory for %u tokens", file, tok->vocab);
    }
out:
    return st;
}

// Without a byte token or an unknown token for it a character would vanish.
static keel_status check_fallback(const keel_tokenizer *tok, const char *file)
{
    for (unsigned i = 0; i < 256 && tok->ids.unk < 0; i++) {
        if (tok->byte_id[i] < 0) {
            KEEL_ERROR(tok->log,
                       "%s: the vocabulary has neither the byte token <0x%02X> nor an unknown token", file,
                       i);
            return KEEL_ERR_FORMAT;
        }
    }
    return KEEL_OK;
}

keel_status keel_tokenizer_create(keel_tokenizer **out, const keel_gguf *g, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_text pool = { 0 };
    struct lists l = { 0 };
    const char *file = keel_gguf_name(g);
    keel_tokenizer *tok = NULL;
    *out = NULL;
    KEEL_TRY(read_lists(g, &l, log));
    tok = calloc(1, sizeof *tok);
    if (!tok) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory for the tokenizer", file);
    }
    tok->log = log;
    memset(tok->byte_id, 0xff, sizeof tok->byte_id);
    tok->vocab = (uint32_t)l.tokens.n;
    if (!allocate(tok)) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory for %u tokens", file, tok->vocab);
    }
    KEEL_TRY(read_tokens(tok, &pool, &l, file));
    tok->pool = pool.data;
    pool = (struct keel_text){ 0 };
    index_tokens(tok);
    KEEL_TRY(read_flags(tok, g));
    KEEL_TRY(check_fallback(tok, file));
    *out = tok;
    tok = NULL;
out:
    keel_text_finish(&pool);
    keel_tokenizer_destroy(&tok);
    return st;
}

void keel_tokenizer_destroy(keel_tokenizer **tok)
{
    keel_tokenizer *t = tok ? *tok : NULL;
    if (!t) {
        return;
    }
    free(t->pool);
    free(t->name);
    free(t->bytes);
    free(t->n_bytes);
    free(t->norm);
    free(t->n_norm);
    free(t->score);
    free(t->type);
    free(t->pieces.slot);
    free(t->whole.slot);
    free(t->control.slot);
    free(t);
    *tok = NULL;
}

// --- encoding ------------------------------------------------------------------------------------

void keel_tokens_finish(struct keel_tokens *t)
{
    free(t->ids);
    *t = (struct keel_tokens){ 0 };
}

keel_status keel_tokens_add(struct keel_tokens *t, int32_t id)
{
    if (t->n == t->cap) {
        const size_t cap = KEEL_MAX(t->cap * 2, (size_t)32);
        int32_t *p = realloc(t->ids, cap * sizeof *p);
        if (!p) {
            return KEEL_ERR_NO_MEMORY;
        }
        t->ids = p;
        t->cap = cap;
    }
    t->ids[t->n++] = id;
    return KEEL_OK;
}

// A run of characters that is or may become one piece; merged away when len is 0.
struct symbol {
    uint32_t at, len;
    int32_t prev, next;
};
struct merge {
    float score;
    int32_t left, right;
    uint32_t len; // of both together when the candidate was made: tells stale ones
};
struct bpe {
    struct symbol *sym;
    struct merge *heap;
    size_t n_heap, cap_heap;
};

// Better score first; of equal ones the leftmost.
static bool before(struct merge a, struct merge b)
{
    return a.score > b.score || (a.score == b.score && a.left < b.left);
}

static bool heap_push(struct bpe *b, struct merge m)
{
    if (b->n_heap == b->cap_heap) {
        const size_t cap = KEEL_MAX(b->cap_heap * 2, (size_t)64);
        struct merge *p = realloc(b->heap, cap * sizeof *p);
        if (!p) {
            return false;
        }
        b->heap = p;
        b->cap_heap = cap;
    }
    size_t i = b->n_heap++;
    while (i > 0 && before(m, b->heap[(i - 1) / 2])) {
        b->heap[i] = b->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    b->heap[i] = m;
    return true;
}

static struct merge heap_pop(struct bpe *b)
{
    const struct merge top = b->heap[0], last = b->heap[--b->n_heap];
    size_t i = 0;
    for (size_t c; (c = 2 * i + 1) < b->n_heap; i = c) {
        if (c + 1 < b->n_heap && before(b->heap[c + 1], b->heap[c])) {
            c++;
        }
        if (!before(b->heap[c], last)) {
            break;
        }
        b->heap[i] = b->heap[c];
    }
    b->heap[i] = last;
    return top;
}

static bool consider(const keel_tokenizer *tok, struct bpe *b, const char *s, int32_t left, int32_t right)
{
    if (left < 0 || right < 0) {
        return true;
    }
    const uint32_t len = b->sym[left].len + b->sym[right].len;
    const int32_t id = table_find(tok, &tok->pieces, s + b->sym[left].at, len);
    return id < 0 || heap_push(b, (struct merge){ tok->score[id], left, right, len });
}

static keel_status emit(const keel_tokenizer *tok, const char *s, uint32_t len, struct keel_tokens *out)
{
    keel_status st = KEEL_OK;
    const int32_t id = table_find(tok, &tok->pieces, s, len);
    if (id >= 0) {
        return keel_tokens_add(out, id);
    }
    for (uint32_t i = 0; i < len && st == KEEL_OK; i++) {
        const int32_t byte = tok->byte_id[(uint8_t)s[i]];
        if (byte >= 0) {
            st = keel_tokens_add(out, byte);
        } else if (tok->ids.unk >= 0) { // no byte tokens: one unknown for the whole character
            return keel_tokens_add(out, tok->ids.unk);
        }
    }
    return st;
}

// A stretch of normalised text without whole pieces.
static keel_status encode_stretch(const keel_tokenizer *tok, const char *s, size_t len,
                                  struct keel_tokens *out)
{
    keel_status st = KEEL_OK;
    struct bpe b = { 0 };
    int32_t n = 0;
    bool ok = true;
    if (len == 0) {
        return KEEL_OK;
    }
    b.sym = malloc(len * sizeof *b.sym);
    if (!b.sym) {
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < len; n++) {
        size_t w = 1;
        while (i + w < len && ((uint8_t)s[i + w] & 0xc0) == 0x80) {
            w++;
        }
        b.sym[n] = (struct symbol){ (uint32_t)i, (uint32_t)w, n - 1, n + 1 };
        i += w;
    }
    b.sym[n - 1].next = -1;
    for (int32_t i = 0; i + 1 < n; i++) {
        ok = ok && consider(tok, &b, s, i, i + 1);
    }
    while (ok && b.n_heap > 0) {
        const struct merge m = heap_pop(&b);
        struct symbol *l = &b.sym[m.left], *r = &b.sym[m.right];
        if (l->len == 0 || r->len == 0 || l->len + r->len != m.len) {
            continue; // one side was merged meanwhile
        }
        l->len = m.len;
        r->len = 0;
        l->next = r->next;
        if (r->next >= 0) {
            b.sym[r->next].prev = m.left;
        }
        ok = consider(tok, &b, s, l->prev, m.left) && consider(tok, &b, s, m.left, l->next);
    }
    for (int32_t i = 0; ok && st == KEEL_OK && i >= 0; i = b.sym[i].next) {
        st = emit(tok, s + b.sym[i].at, b.sym[i].len, out);
    }
    free(b.sym);
    free(b.heap);
    return ok ? st : KEEL_ERR_NO_MEMORY;
}

keel_status keel_tokenize(const keel_tokenizer *tok, const char *text, size_t len,
                          struct keel_tokenize_params p, struct keel_tokens *out)
{
    keel_status st = KEEL_OK;
    struct keel_text norm = { 0 };
    const size_t before_n = out->n;
    size_t bad;
    if (!keel_utf8_valid(text, len, &bad)) {
        KEEL_FAIL(tok->log, KEEL_ERR_DATA, "the text is not valid UTF-8: byte 0x%02x at offset %zu",
                  (uint8_t)text[bad], bad);
    }
    if (len >=
        UINT64_C(1) << 29) { // so that offsets of the normalised text, three times as long, fit 31 bits
        KEEL_FAIL(tok->log, KEEL_ERR_DATA, "the text has %zu bytes; tokenize it in parts of at most 512 MiB",
                  len);
    }
    if (p.bos && tok->ids.bos >= 0) {
        KEEL_TRY(keel_tokens_add(out, tok->ids.bos));
    }
    if (tok->add_prefix && len > 0) {
        keel_text_add(&norm, SPACE, 3);
    }
    for (size_t i = 0, from = 0; i <= len; i++) {
        if (i == len || text[i] == ' ') {
            keel_text_add(&norm, text + from, i - from);
            if (i < len) {
                keel_text_add(&norm, SPACE, 3);
            }
            from = i + 1;
        }
    }
    if (norm.failed) {
        KEEL_FAIL(tok->log, KEEL_ERR_NO_MEMORY, "out of memory for a text of %zu bytes", len);
    }
    const struct table *whole = p.special ? &tok->control : &tok->whole;
    const bool *starts = p.special ? tok->starts_control : tok->starts_whole;
    size_t from = 0;
    for (size_t i = 0; i < norm.len;) {
        const int32_t id =
            starts[(uint8_t)norm.data[i]] ? table_longest(tok, whole, norm.data + i, norm.len - i) : -1;
        if (id < 0) {
            i++;
            continue;
        }
        KEEL_TRY(encode_stretch(tok, norm.data + from, i - from, out));
        KEEL_TRY(keel_tokens_add(out, id));
        i += tok->n_norm[id];
        from = i;
    }
    KEEL_TRY(encode_stretch(tok, norm.data + from, norm.len - from, out));
out:
    keel_text_finish(&norm);
    if (st != KEEL_OK) {
        out->n = before_n;
    }
    return st;
}

// --- looking up ----------------------------------------------------------------------------------

const char *keel_token_bytes(const keel_tokenizer *tok, int32_t id, size_t *len)
{
    if (id < 0 || (uint32_t)id >= tok->vocab) {
        *len = 0;
        return "";
    }
    *len = tok->n_bytes[id];
    return tok->pool + tok->bytes[id];
}

const char *keel_token_name(const keel_tokenizer *tok, int32_t id)
{
    return id >= 0 && (uint32_t)id < tok->vocab ? tok->pool + tok->name[id] : NULL;
}

bool keel_token_is_control(const keel_tokenizer *tok, int32_t id)
{
    return id >= 0 && (uint32_t)id < tok->vocab && (tok->type[id] == CONTROL || tok->type[id] == UNKNOWN);
}

int32_t keel_token_find(const keel_tokenizer *tok, const char *text)
{
    const uint32_t len = (uint32_t)KEEL_MIN(strlen(text), (size_t)UINT32_MAX);
    const int32_t id = table_find(tok, &tok->control, text, len);
    if (id >= 0) {
        return id;
    }
    const int byte = byte_of_name(text, len);
    return byte >= 0 && tok->byte_id[byte] >= 0 ? tok->byte_id[byte]
                                                : table_find(tok, &tok->pieces, text, len);
}

void keel_detokenize(const keel_tokenizer *tok, const int32_t *ids, size_t n, struct keel_text *out)
{
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const char *s = keel_token_bytes(tok, ids[i], &len);
        if (i == 0 && tok->add_prefix && len > 0 && s[0] == ' ') { // the prefix that encoding added
            s++;
            len--;
        }
        keel_text_add(out, s, len);
    }
}

struct keel_token_ids keel_tokenizer_ids(const keel_tokenizer *tok)
{
    return tok->ids;
}

uint32_t keel_tokenizer_vocab(const keel_tokenizer *tok)
{
    return tok->vocab;
}

bool keel_tokenizer_adds_bos(const keel_tokenizer *tok)
{
    return tok->add_bos;
}

bool keel_tokenizer_is_eog(const keel_tokenizer *tok, int32_t id)
{
    return id >= 0 && (id == tok->ids.eos || id == tok->ids.eot);
}
