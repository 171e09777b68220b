// SPDX-License-Identifier: MIT
// keel/convert.h: model files into GGUF: Hugging Face folders converted, GGUF files quantised anew.
//
// Needs no device. Memory in use does not grow with the model: tensors stream through a few MB.
#ifndef KEEL_CONVERT_H
#define KEEL_CONVERT_H

#include <keel/model.h>

#ifdef __cplusplus
extern "C" {
#endif

struct keel_convert_params {
    // "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0": the mixtures
    // are llama.cpp's. NULL: matrices keep the precision they have. Norms and biases are f32 in every case.
    const char *type;
    // Called now and then with the bytes read so far; false stops (status INTERRUPTED, no file). May be NULL.
    bool (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
};

// Writes the language model of `from` (a Hugging Face folder with safetensors, or a GGUF file) as a GGUF that keel and llama.cpp
// load. The file appears under its name only when it is complete. NULL params: all zero.
// Errors: IO, FORMAT (damaged, a missing shard, or a config that contradicts the tensors), UNSUPPORTED (another architecture),
// NUMERIC (NaN or infinity, names the tensor), ARG (unknown type; `to` is `from`).
KEEL_API keel_status keel_convert(const char *from, const char *to, const struct keel_convert_params *params, const keel_log *log);
// The vision tower and projector of a Hugging Face folder as an mmproj GGUF, or an mmproj GGUF with other types. Matrices become
// f16 where params->type is NULL or a block type, except that f32 weights stay f32 when it is NULL. Errors: also UNSUPPORTED
// when the folder has no tower.
KEEL_API keel_status keel_convert_vision(const char *from, const char *to, const struct keel_convert_params *params,
                                         const keel_log *log);

struct keel_merge_adapter {
    const char *path; // a GGUF or a PEFT folder
    float scale;      // multiplies alpha / rank
};
// Writes the language model `from` with n adapters added to its weights; otherwise as keel_convert(). Weights of a block type are
// rounded to it again, unless params->type says another. Errors: also MISMATCH (the adapter of another model).
KEEL_API keel_status keel_merge(const char *from, const struct keel_merge_adapter *adapters, size_t n, const char *to,
                                const struct keel_convert_params *params, const keel_log *log);

// The GGUF that stands for a Hugging Face folder in keel's cache folder, converted now if it is not there or cut short, or if a file
// of the folder has changed since (name, size or time of change). keel_model_open() uses it for folders. `type` as in the params;
// `vision`: the tower instead of the language model. Errors: as above, and IO if there is no cache folder.
KEEL_API keel_status keel_convert_cached(const char *folder, const char *type, bool vision, char *path, size_t path_bytes,
                                         const keel_log *log);

#ifdef __cplusplus
}
#endif
#endif
