// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_tokenizer.c: the bytes before the first 0xff spell a vocabulary (one token a line: a type
// digit, then its text), those after it a text. Valid text without control tokens must come back as it was.
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { BASE = 257, MAX_TOKENS = BASE + 64 }; // 256 bytes and U+2581, without which spaces do not come back

static keel_gguf *make_vocab(const uint8_t *data, size_t len, char **mem)
{
    const char *text[MAX_TOKENS];
    size_t lens[MAX_TOKENS], n = BASE, bytes = 0;
    int32_t types[MAX_TOKENS];
    float scores[MAX_TOKENS];
    char names[256][8];
    keel_gguf_writer *w;
    keel_gguf *g = NULL;
    for (int i = 0; i < 256; i++) {
        lens[i] = (size_t)snprintf(names[i], sizeof names[i], "<0x%02X>", (unsigned)i);
        text[i] = names[i];
        types[i] = 6;
        scores[i] = 0;
    }
    text[256] = "\xe2\x96\x81";
    lens[256] = 3;
    types[256] = 1;
    scores[256] = 0;
    for (size_t at = 0; at < len && n < KEEL_COUNT(text); n++) {
        const uint8_t *end = memchr(data + at, '\n', len - at);
        const size_t line = end ? (size_t)(end - data) - at : len - at;
        types[n] = line > 0 ? data[at] - '0' : 1;
        text[n] = (const char *)data + at + (line > 0);
        lens[n] = line - (line > 0);
        scores[n] = -(float)(n % 7); // ties included
        at += line + 1;
    }
    FILE *f = open_memstream(mem, &bytes);
    if (keel_gguf_writer_create(&w, &fuzz_silent) == KEEL_OK) {
        keel_gguf_put_str(w, "tokenizer.ggml.model", "llama");
        keel_gguf_put_strns(w, "tokenizer.ggml.tokens", text, lens, n);
        keel_gguf_put_f32s(w, "tokenizer.ggml.scores", scores, n);
        keel_gguf_put_i32s(w, "tokenizer.ggml.token_type", types, n);
        keel_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", len % 2);
        KEEL_ASSERT(keel_gguf_writer_begin(w, f) == KEEL_OK && keel_gguf_writer_end(w) == KEEL_OK);
        keel_gguf_writer_destroy(&w);
    }
    fclose(f);
    KEEL_ASSERT(keel_gguf_parse(&g, (const uint8_t *)*mem, bytes, "fuzz", &fuzz_silent) == KEEL_OK);
    return g;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    const uint8_t *cut = memchr(data, 0xff, len);
    const size_t n_vocab = cut ? (size_t)(cut - data) : 0;
    const char *text = cut ? (const char *)cut + 1 : (const char *)data;
    const size_t n_text = cut ? len - n_vocab - 1 : len;
    char *mem = NULL;
    keel_tokenizer *tok;
    keel_gguf *g = make_vocab(data, n_vocab, &mem);
    if (keel_tokenizer_create(&tok, g, &fuzz_silent) == KEEL_OK) {
        for (int special = 0; special < 2; special++) {
            struct keel_tokens t = { 0 };
            struct keel_text back = { 0 };
            const keel_status st =
                keel_tokenize(tok, text, n_text, (struct keel_tokenize_params){ .special = special }, &t);
            KEEL_ASSERT((st == KEEL_OK) == keel_utf8_valid(text, n_text, NULL));
            keel_detokenize(tok, t.ids, t.n, &back);
            // U+2581 comes back as a space, by the design of SentencePiece.
            if (st == KEEL_OK && !special && !memmem(text, n_text, "\xe2\x96\x81", 3)) {
                KEEL_ASSERT(back.len == n_text && (n_text == 0 || memcmp(back.data, text, n_text) == 0));
            }
            keel_text_finish(&back);
            keel_tokens_finish(&t);
        }
        keel_tokenizer_destroy(&tok);
    }
    keel_gguf_destroy(&g);
    free(mem);
    return 0;
}
