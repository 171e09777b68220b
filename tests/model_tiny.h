// SPDX-License-Identifier: MIT
// tests/model_tiny.h: writes a small Gemma 3 with seeded F32 noise as weights, right or with one thing wrong.
// Owns no shapes of interest beyond: local and global layers, grouped heads, a window shorter than the test rows.
#ifndef KEEL_TESTS_MODEL_TINY_H
#define KEEL_TESTS_MODEL_TINY_H

#include "base.h"
#include "platform.h"
#include "formats.h"
#include "device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct tiny {
    uint32_t width, ff, heads, kv_heads, head_dim, layers, window, vocab, context;
    const char *arch;
    const char *skip_key;    // metadata to leave out
    const char *skip_tensor; // tensor to leave out
    const char *bad_tensor;  // tensor with one row too many
    const char *nan_tensor;  // tensor with a NaN
    const char *extra;       // tensor that no model has
    double eps;
};
#define TINY_DEFAULTS                                                                                                              \
    .width = 64, .ff = 96, .heads = 4, .kv_heads = 2, .head_dim = 32, .layers = 7, .window = 12, .vocab = 300, .context = 256,     \
    .arch = "gemma3", .eps = 1e-6,

struct tiny_file {
    const struct tiny *t;
    keel_gguf_writer *w;
    FILE *f;
    struct keel_rng rng;
    bool data; // second walk: write data rather than declare
};

static inline void tiny_u32(struct tiny_file *f, const char *key, uint32_t v)
{
    if (!f->t->skip_key || strcmp(f->t->skip_key, key) != 0) {
        keel_gguf_put_u32(f->w, key, v);
    }
}

static inline void tiny_tensor(struct tiny_file *f, const char *name, uint64_t d0, uint64_t d1)
{
    const struct tiny *t = f->t;
    if (t->skip_tensor && strcmp(t->skip_tensor, name) == 0) {
        return;
    }
    const uint64_t dims[2] = { d0, d1 + (t->bad_tensor && strcmp(t->bad_tensor, name) == 0 ? 1 : 0) };
    if (!f->data) {
        keel_gguf_put_tensor(f->w, name, KEEL_F32, d1 > 1 ? 2 : 1, dims);
        return;
    }
    for (uint64_t i = 0; i < dims[0] * dims[1]; i++) {
        float v = (float)keel_rng_normal(&f->rng) * (d1 > 1 ? 1.0f / sqrtf((float)d0) : 0.1f) + (d1 > 1 ? 0.0f : 1.0f);
        v = i == 0 && t->nan_tensor && strcmp(t->nan_tensor, name) == 0 ? NAN : v;
        assert_int_equal(keel_gguf_writer_data(f->w, &v, sizeof v), KEEL_OK);
    }
}

static inline void tiny_tensors(struct tiny_file *f)
{
    const struct tiny *t = f->t;
    const uint64_t q = (uint64_t)t->heads * t->head_dim, kv = (uint64_t)t->kv_heads * t->head_dim;
    const struct {
        const char *name;
        uint64_t d0, d1;
    } rows[] = {
        { "attn_norm", t->width, 1 },      { "attn_q", t->width, q },         { "attn_k", t->width, kv },
        { "attn_v", t->width, kv },        { "attn_q_norm", t->head_dim, 1 }, { "attn_k_norm", t->head_dim, 1 },
        { "attn_output", q, t->width },    { "post_attention_norm", t->width, 1 },
        { "ffn_norm", t->width, 1 },       { "ffn_gate", t->width, t->ff },   { "ffn_up", t->width, t->ff },
        { "ffn_down", t->ff, t->width },   { "post_ffw_norm", t->width, 1 },
    };
    char name[64];
    tiny_tensor(f, "token_embd.weight", t->width, t->vocab);
    tiny_tensor(f, "output_norm.weight", t->width, 1);
    for (uint32_t i = 0; i < t->layers; i++) {
        for (size_t r = 0; r < KEEL_COUNT(rows); r++) {
            snprintf(name, sizeof name, "blk.%u.%s.weight", i, rows[r].name);
            tiny_tensor(f, name, rows[r].d0, rows[r].d1);
        }
    }
    if (t->extra) {
        tiny_tensor(f, t->extra, 8, 1);
    }
}

static inline void tiny_vocab(struct tiny_file *f)
{
    static const char *const control[] = { "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>" };
    const uint32_t n = f->t->vocab;
    const char **text = calloc(n, sizeof *text);
    char(*names)[16] = calloc(n, sizeof *names);
    float *scores = calloc(n, sizeof *scores);
    int32_t *types = calloc(n, sizeof *types);
    assert_true(text && names && scores && types && n >= 262);
    for (uint32_t i = 0; i < n; i++) {
        if (i < 6) {
            snprintf(names[i], sizeof names[i], "%s", control[i]);
            types[i] = 3; // control
        } else if (i < 262) {
            snprintf(names[i], sizeof names[i], "<0x%02X>", i - 6);
            types[i] = 6; // byte
        } else {
            snprintf(names[i], sizeof names[i], "w%u", i);
            types[i] = 1;
            scores[i] = -(float)i;
        }
        text[i] = names[i];
    }
    keel_gguf_put_str(f->w, "tokenizer.ggml.model", "llama");
    keel_gguf_put_strs(f->w, "tokenizer.ggml.tokens", text, n);
    keel_gguf_put_f32s(f->w, "tokenizer.ggml.scores", scores, n);
    keel_gguf_put_i32s(f->w, "tokenizer.ggml.token_type", types, n);
    keel_gguf_put_u32(f->w, "tokenizer.ggml.bos_token_id", 2);
    keel_gguf_put_u32(f->w, "tokenizer.ggml.eos_token_id", 1);
    keel_gguf_put_u32(f->w, "tokenizer.ggml.unknown_token_id", 3);
    free(text);
    free(names);
    free(scores);
    free(types);
}

// Writes the model to `path`.
static inline void tiny_write(const struct tiny *t, const char *path)
{
    struct tiny_file f = { .t = t, .rng = keel_rng_make(20, 1) };
    f.f = fopen(path, "wb");
    assert_non_null(f.f);
    assert_int_equal(keel_gguf_writer_create(&f.w, NULL), KEEL_OK);
    keel_gguf_put_str(f.w, "general.architecture", t->arch);
    tiny_u32(&f, "gemma3.block_count", t->layers);
    tiny_u32(&f, "gemma3.embedding_length", t->width);
    tiny_u32(&f, "gemma3.feed_forward_length", t->ff);
    tiny_u32(&f, "gemma3.context_length", t->context);
    tiny_u32(&f, "gemma3.attention.head_count", t->heads);
    tiny_u32(&f, "gemma3.attention.head_count_kv", t->kv_heads);
    tiny_u32(&f, "gemma3.attention.key_length", t->head_dim);
    tiny_u32(&f, "gemma3.attention.value_length", t->head_dim);
    tiny_u32(&f, "gemma3.attention.sliding_window", t->window);
    keel_gguf_put_f32(f.w, "gemma3.attention.layer_norm_rms_epsilon", (float)t->eps);
    tiny_vocab(&f);
    tiny_tensors(&f);
    assert_int_equal(keel_gguf_writer_begin(f.w, f.f), KEEL_OK);
    f.data = true;
    tiny_tensors(&f);
    assert_int_equal(keel_gguf_writer_end(f.w), KEEL_OK);
    keel_gguf_writer_destroy(&f.w);
    assert_int_equal(fclose(f.f), 0);
}

// The device of a test program, for a group's set-up and tear-down.
static keel_device *dev;

static inline int tiny_open_device(void **state)
{
    (void)state;
    return keel_device_create(&dev, NULL, NULL) == KEEL_OK ? 0 : -1;
}

static inline int tiny_close_device(void **state)
{
    (void)state;
    keel_device_destroy(&dev);
    return 0;
}

#endif
