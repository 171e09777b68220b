// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_hf.c: any bytes as config.json, shard index and tokenizer.json; what parses as a vocabulary becomes a
// tokenizer by way of GGUF, which must take it or say why not.
#include "fuzz.h"
#include "hf.h"

#include <stdlib.h>
#include <string.h>

static void use_vocab(const struct keel_hf_vocab *v)
{
    char *mem = NULL;
    size_t bytes = 0;
    keel_gguf_writer *w;
    keel_gguf *g = NULL;
    keel_tokenizer *tok;
    FILE *f = open_memstream(&mem, &bytes);
    KEEL_ASSERT(f && keel_gguf_writer_create(&w, &fuzz_silent) == KEEL_OK);
    keel_gguf_put_str(w, "tokenizer.ggml.model", "llama");
    keel_gguf_put_strns(w, "tokenizer.ggml.tokens", v->text, v->len, v->n);
    keel_gguf_put_f32s(w, "tokenizer.ggml.scores", v->score, v->n);
    keel_gguf_put_i32s(w, "tokenizer.ggml.token_type", v->type, v->n);
    KEEL_ASSERT(keel_gguf_writer_begin(w, f) == KEEL_OK && keel_gguf_writer_end(w) == KEEL_OK);
    keel_gguf_writer_destroy(&w);
    fclose(f);
    KEEL_ASSERT(keel_gguf_parse(&g, (const uint8_t *)mem, bytes, "fuzz", &fuzz_silent) == KEEL_OK);
    if (keel_tokenizer_create(&tok, g, &fuzz_silent) == KEEL_OK) {
        struct keel_tokens t = {0};
        KEEL_ASSERT(keel_tokenize(tok, "the <a> b", 9, (struct keel_tokenize_params){.special = true}, &t) == KEEL_OK);
        keel_tokens_finish(&t);
        keel_tokenizer_destroy(&tok);
    }
    keel_gguf_destroy(&g);
    free(mem);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct keel_hf_config config;
    struct keel_hf_index index;
    struct keel_hf_vocab vocab;
    if (keel_hf_config_parse(&config, data, len, "fuzz", &fuzz_silent) == KEEL_OK) {
        KEEL_ASSERT(config.text.n_layers <= KEEL_HF_MAX_LAYERS && config.text.n_heads > 0);
    }
    if (keel_hf_index_parse(&index, data, len, "fuzz", &fuzz_silent) == KEEL_OK) {
        for (size_t i = 0; i < index.n; i++) {
            fuzz_use(index.place[i].tensor, strlen(index.place[i].tensor));
            KEEL_ASSERT(!strchr(index.place[i].file, '/'));
        }
        keel_hf_index_finish(&index);
    }
    if (keel_hf_vocab_parse(&vocab, data, len, 300, "fuzz", &fuzz_silent) == KEEL_OK) {
        use_vocab(&vocab);
        keel_hf_vocab_finish(&vocab);
    }
    return 0;
}
