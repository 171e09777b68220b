// SPDX-License-Identifier: MIT
// keel/model.h: opening a Gemma 3 model, its tokenizer, its memory plan.
//
// A model is opened without a device (metadata and tokenizer only: enough for `info` and `tokenize`) and loaded onto one
// when it is to compute. Thread safety: opening and tokenizing from any thread; everything else one thread at a time.
#ifndef KEEL_MODEL_H
#define KEEL_MODEL_H

#include <keel/device.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct keel_model keel_model;

struct keel_model_info {
    char path[4096], name[128], arch[32];
    char types[256];          // tensor types by bytes, largest first: "Q8_0 178.3 MB, Q5_0 41.2 MB, ..."
    uint32_t n_layers, width, ff_width, n_heads, n_kv_heads, head_dim, vocab;
    uint32_t window;          // sliding window of local layers, tokens
    uint32_t context;         // tokens the model was trained for
    uint32_t n_global_layers; // layers without a window
    uint64_t n_params;
    uint64_t file_bytes;
    uint64_t hash;            // of the file's bytes; 0 until keel_model_hash() was called
};

// Opens a GGUF file (v2 or v3, architecture gemma3). Everything in it is checked: metadata, tensor names, shapes, types.
// Errors: IO, FORMAT, UNSUPPORTED (another architecture: the message says which are supported). `log` outlives the model.
// A Hugging Face folder is converted first, into keel's cache folder (keel/convert.h).
KEEL_API keel_status keel_model_open(keel_model **out, const char *path, const keel_log *log);
// The same; a folder's matrices are stored as `type` ("q4_0", "q4_k_m", ...; NULL: as they are). Errors: also ARG (unknown type,
// or a type for a file).
KEEL_API keel_status keel_model_open_as(keel_model **out, const char *path, const char *type, const keel_log *log);
KEEL_API void keel_model_close(keel_model **model); // accepts NULL and pointers to NULL; sessions must be gone
KEEL_API const struct keel_model_info *keel_model_info(const keel_model *model);
// Hashes the whole file (64-bit FNV-1a) for manifests; reads every byte once.
KEEL_API uint64_t keel_model_hash(keel_model *model);
// Uploads the weights to `dev` (which must outlive the model), checking them for NaN and infinity on the way.
// Errors: NO_MEMORY (with the plan in the message), NUMERIC (names the tensor), DEVICE_LOST. Loading twice is an ARG error.
KEEL_API keel_status keel_model_load(keel_model *model, keel_device *dev);
KEEL_API keel_device *keel_model_device(const keel_model *model); // NULL before keel_model_load()

// --- tokens --------------------------------------------------------------------------------------

struct keel_encode_params {
    bool bos;     // begin with the BOS token, if the model wants one
    bool special; // control tokens in the text become their ids; otherwise they are plain text
};
// Encodes valid UTF-8 of `len` bytes. `*ids` is allocated with malloc and belongs to the caller (free()). Errors: DATA (the
// offset of invalid UTF-8), NO_MEMORY. NULL params: bos, not special.
KEEL_API keel_status keel_encode(const keel_model *model, const char *text, size_t len,
                                 const struct keel_encode_params *params, int32_t **ids, size_t *n);
// Bytes of one token (not NUL-terminated; part of a character for byte tokens); control tokens give their name when `special`,
// else nothing. Valid as long as the model. NULL for an id out of range.
KEEL_API const char *keel_token_text(const keel_model *model, int32_t id, bool special, size_t *len);
KEEL_API int32_t keel_token_bos(const keel_model *model); // -1 if there is none
KEEL_API int32_t keel_token_eos(const keel_model *model);
KEEL_API int32_t keel_token_eot(const keel_model *model); // "<end_of_turn>"
KEEL_API bool keel_token_is_end(const keel_model *model, int32_t id); // EOS or end of turn

struct keel_part {
    const char *text; // UTF-8 as below; NULL: an image
};
struct keel_message {
    const char *role;    // "system", "user" or "assistant" ("model")
    const char *content; // UTF-8, taken as plain text: control tokens in it stay text
    const struct keel_part *parts; // [n_parts] instead of a content (NULL): each text is stripped, then they follow each other
    size_t n_parts;
};
// Gemma's chat template as transformers applies it (a leading system message is put before the first user turn, contents are
// stripped, roles must alternate): ids beginning with BOS; with `open` it ends after "<start_of_turn>model\n". `loss_mask`, unless NULL, gets
// one byte a token: 1 for assistant contents and the <end_of_turn> after them. Both arrays belong to the caller (free()).
KEEL_API keel_status keel_chat_encode(const keel_model *model, const struct keel_message *messages, size_t n_messages, bool open,
                                      int32_t **ids, uint8_t **loss_mask, size_t *n);

// --- memory plan ---------------------------------------------------------------------------------

struct keel_plan_params {
    uint32_t n_ctx;      // inference: context of one session; 0: no session
    uint32_t n_batch;    // tokens a forward pass takes at once
    const char *kv;      // as in keel_session_params
    uint32_t train_rank; // 0: no training
    uint32_t train_tokens; // tokens of one micro-batch (batch × longest row)
    uint32_t train_row;    // longest row
    const char *targets, *layers; // as in keel_train_params
    bool images;         // rows or prompts with images: room for their soft tokens
    bool train_lisa;
    uint64_t train_constrain_tokens; // loss tokens of the data, if keel_train_params.constrain is set
    uint64_t train_kl_tokens; // loss tokens of keel_train_params.kl_data
};
struct keel_plan_row {
    const char *what; // "weights", "embedding/head", "kv cache", "activations", "LoRA weights", ...
    uint64_t bytes;
    bool host;        // host memory rather than device memory
};
struct keel_plan {
    struct keel_plan_row row[24];
    uint32_t n_rows;
    uint64_t device_bytes, host_bytes; // sums
};
// Computes from shapes alone what a use of the model will allocate. Needs no device.
KEEL_API keel_status keel_model_plan(const keel_model *model, const struct keel_plan_params *params, struct keel_plan *out);

#ifdef __cplusplus
}
#endif
#endif
