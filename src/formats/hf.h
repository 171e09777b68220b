// SPDX-License-Identifier: MIT
// formats/hf.h: the JSON files of a Hugging Face model folder: config.json, tokenizer.json, the shard index. As in
// formats.h nothing here opens a file. What is read and checked: docs/formats.md.
#ifndef KEEL_HF_H
#define KEEL_HF_H

#include "formats.h"

// --- config.json ---------------------------------------------------------------------------------

#define KEEL_HF_MAX_LAYERS 512

struct keel_hf_text { // Gemma3TextConfig
    uint32_t n_layers, width, ff_width, n_heads, n_kv_heads, head_dim, vocab, context;
    uint32_t window;  // 0: none
    double eps, rope_base, rope_base_local, rope_factor; // factor 1: no scaling
    bool tied;        // the head is the embedding
    bool local[KEEL_HF_MAX_LAYERS]; // layers with the window
    uint32_t every;   // every n-th layer is global; 0: `local` follows no such rule
    int64_t bos, eos, eos2, pad; // token ids; -1: not given. eos2: the second of a list
};
struct keel_hf_vision { // SiglipVisionConfig and what the projector adds
    uint32_t n_layers, width, ff_width, n_heads, image_size, patch, n_tokens /* soft tokens an image */;
    double eps;
};
struct keel_hf_config {
    struct keel_hf_text text;
    bool has_vision;
    struct keel_hf_vision vision;
};
// Gemma3ForCausalLM or Gemma3ForConditionalGeneration, as any generation of transformers wrote it (rope_scaling or
// rope_parameters, sliding_window_pattern or layer_types); keys left out take transformers' defaults. Errors: FORMAT,
// UNSUPPORTED (another architecture, or a setting that Gemma 3 in GGUF cannot express), NO_MEMORY.
keel_status keel_hf_config_parse(struct keel_hf_config *c, const uint8_t *data, size_t len, const char *name,
                                 const keel_log *log);

// --- model.safetensors.index.json ----------------------------------------------------------------

struct keel_hf_place {
    const char *tensor, *file; // file: a plain name without a folder
};
struct keel_hf_index {
    struct json_t *root; // owns the strings
    struct keel_hf_place *place;
    size_t n;
};
// Errors: FORMAT (no weight_map, or a file name that leaves the folder), NO_MEMORY.
keel_status keel_hf_index_parse(struct keel_hf_index *x, const uint8_t *data, size_t len, const char *name,
                                const keel_log *log);
void keel_hf_index_finish(struct keel_hf_index *x); // accepts all-zero

// --- tokenizer.json ------------------------------------------------------------------------------

// A vocabulary in the form that GGUF holds it in. Scores are the negated rank of the first merge that makes a piece, so that
// merging by score does what merging by rank does.
struct keel_hf_vocab {
    struct json_t *root;   // owns most texts,
    struct keel_text pool; // and this the others
    uint32_t n;
    const char **text;
    size_t *len;
    float *score;
    int32_t *type;       // tokenizer.ggml.token_type
    bool space_prefix;   // a space is put before the text
    bool adds_bos;       // the template begins with a special token
};
// `n_rows`: rows of the embedding; ids that have no token become unused tokens "[PADn]".
// Errors: FORMAT (ids doubled or beyond n_rows, merges of no tokens), UNSUPPORTED (no BPE with byte fallback as Gemma uses it), NO_MEMORY.
keel_status keel_hf_vocab_parse(struct keel_hf_vocab *v, const uint8_t *data, size_t len, uint32_t n_rows, const char *name,
                                const keel_log *log);
void keel_hf_vocab_finish(struct keel_hf_vocab *v); // accepts all-zero
int64_t keel_hf_vocab_find(const struct keel_hf_vocab *v, const char *text); // -1 if absent; linear

// --- shared --------------------------------------------------------------------------------------

// The root object of a JSON file. Errors: FORMAT (with the line), NO_MEMORY.
keel_status keel_hf_json(struct json_t **out, const uint8_t *data, size_t len, const char *name, const keel_log *log);

#endif
