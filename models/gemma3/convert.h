// SPDX-License-Identifier: MIT
// gemma3/convert.h: what the files of conversion share: a list of tensors to write with their source and type, the recipe
// that chooses types, the Hugging Face folder. Not for the rooms above (they use keel/convert.h).
#ifndef KEEL_GEMMA3_CONVERT_H
#define KEEL_GEMMA3_CONVERT_H

#include "base.h"
#include "platform.h"
#include "formats.h"
#include "hf.h"

#include <keel/convert.h>

// --- tensors to write (pack.c) -------------------------------------------------------------------

// scale B A, added to a matrix; borrowed.
struct keel_pack_delta {
    uint32_t rank;
    float scale;
    const float *a; // [rank, dims[0]]
    const float *b; // [dims[1], rank]
};
struct keel_pack_tensor {
    char name[96];            // in the new file
    uint32_t n_dims;
    uint64_t dims[4], n_elems; // GGUF order
    enum keel_dtype from, to;
    const uint8_t *data;      // in `map`; may be unaligned
    const struct keel_map *map;
    float add;                // 1 for norms that Hugging Face stores as w of 1 + w
    const struct keel_pack_delta *delta; // [n_delta]
    uint32_t n_delta;
};
struct keel_pack {
    struct keel_pack_tensor *t;
    size_t n, cap;
};
keel_status keel_pack_add(struct keel_pack *p, const struct keel_pack_tensor *t, const keel_log *log);
void keel_pack_finish(struct keel_pack *p); // accepts all-zero
// Every tensor of a GGUF, and its metadata except what a change of types changes. Errors: UNSUPPORTED (a name is too long).
keel_status keel_pack_gguf(struct keel_pack *p, keel_gguf_writer *w, const keel_gguf *g, const struct keel_map *map, const keel_log *log);
// Declares the tensors, then writes header and data: in pieces, on all cores. `name`: of the source, for messages.
// Errors: NUMERIC, INTERRUPTED, IO, NO_MEMORY.
keel_status keel_pack_write(const struct keel_pack *p, keel_gguf_writer *w, FILE *f, const struct keel_convert_params *params,
                            const char *name, const keel_log *log);

// --- types (recipe.c) ----------------------------------------------------------------------------

struct keel_recipe {
    const char *name;     // "q4_k_m"
    enum keel_dtype base;
    uint32_t file_type;   // general.file_type
    int mix;              // which llama.cpp mixture; see recipe.c
};
// NULL name: NULL. Errors: ARG (unknown; the message lists the known ones).
keel_status keel_recipe_of(const struct keel_recipe **out, const char *name, const keel_log *log);
// Sets `to` of every tensor. recipe NULL: matrices keep their type. Logs where a row does not fit the type asked for.
void keel_recipe_apply(const struct keel_recipe *recipe, struct keel_pack *p, const keel_log *log);
void keel_recipe_apply_vision(const struct keel_recipe *recipe, struct keel_pack *p);
// general.file_type for a list without a recipe: that of most bytes.
uint32_t keel_recipe_file_type(const struct keel_recipe *recipe, const struct keel_pack *p);

// --- Hugging Face folders (hf_folder.c, hf_tensors.c) --------------------------------------------

struct keel_hf_file {
    char *path;
    struct keel_map map;
    keel_st *st;
};
struct keel_hf_folder {
    const char *path; // borrowed
    struct keel_hf_config config;
    struct keel_hf_file *file;
    size_t n_files;
    // Every tensor of all files, sorted by name.
    struct keel_hf_tensor {
        const struct keel_st_tensor *t;
        uint32_t file;
        bool used;
    } *tensor;
    size_t n_tensors;
};
// Opens and checks config.json and the safetensors files. Errors: IO, FORMAT, UNSUPPORTED.
keel_status keel_hf_open(struct keel_hf_folder *f, const char *path, const keel_log *log);
void keel_hf_close(struct keel_hf_folder *f); // accepts all-zero
// "FOLDER/NAME"; false if that is too long.
bool keel_hf_path(char *out, size_t out_bytes, const char *folder, const char *name);
// The folder's safetensors: from the index if there is one, else model.safetensors. Calls `each` for every file name, in a
// fixed order without repetition, until it fails.
keel_status keel_hf_each_shard(const char *folder, keel_status (*each)(void *user, const char *name, const char *tensor),
                               void *user, const keel_log *log);
// The tensors of the language model or of the tower, in llama.cpp's names, shapes checked against the config; every tensor of
// the folder must belong to one of the two.
keel_status keel_hf_text_tensors(struct keel_hf_folder *f, struct keel_pack *p, const keel_log *log);
keel_status keel_hf_vision_tensors(struct keel_hf_folder *f, struct keel_pack *p, const keel_log *log);

// --- metadata (hf_meta.c) ------------------------------------------------------------------------

// All keys that llama.cpp wants. Reads tokenizer.json and what lies beside it.
keel_status keel_hf_put_text(const struct keel_hf_folder *f, keel_gguf_writer *w, const keel_log *log);
keel_status keel_hf_put_vision(const struct keel_hf_folder *f, keel_gguf_writer *w, const keel_log *log);

#endif
