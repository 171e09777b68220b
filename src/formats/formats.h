// SPDX-License-Identifier: MIT
// formats/formats.h: readers and writers of files as byte ranges: GGUF, safetensors, JSONL, images; the tokenizer;
// block quants. Nothing here opens a file: readers take (data, len) and a name for messages, writers a FILE*
// that the platform room made. Every count, offset, length and type of a file is checked before use. What is
// read and checked: docs/formats.md.
#ifndef KEEL_FORMATS_H
#define KEEL_FORMATS_H

#include "base.h"

#include <stdio.h>

struct json_t; // jansson's json_t

// --- GGUF, reading -------------------------------------------------------------------------------

// A parsed GGUF v2/v3 file. Borrows the file's bytes: keep the map open as long as the keel_gguf. Immutable
// after parsing, so any number of threads may read it.
typedef struct keel_gguf keel_gguf;

struct keel_gguf_tensor {
    const char *name;
    enum keel_dtype type;
    uint32_t n_dims;     // 1 to 4
    uint64_t dims[4];    // GGUF order: dims[0] is contiguous; unused ones are 1
    uint64_t n_elems;    // product of dims
    const uint8_t *data; // into the file, aligned to general.alignment relative to the file's start
    uint64_t bytes;
};

// Checks the whole structure and builds the index; touches no tensor data. `name` is copied, `log` is
// borrowed. Errors: FORMAT (malformed: truncated, duplicate names, bad offsets, ...), UNSUPPORTED (version,
// big endian, tensor type, nested arrays), NO_MEMORY.
keel_status keel_gguf_parse(keel_gguf **out, const uint8_t *data, size_t len, const char *name,
                            const keel_log *log);
void keel_gguf_destroy(keel_gguf **g); // accepts &NULL

const char *keel_gguf_name(const keel_gguf *g); // the name given to keel_gguf_parse
uint32_t keel_gguf_version(const keel_gguf *g);
size_t keel_gguf_tensor_count(const keel_gguf *g);
const struct keel_gguf_tensor *keel_gguf_tensor_at(const keel_gguf *g, size_t i); // file order; i < count
// NULL if missing; O(1).
const struct keel_gguf_tensor *keel_gguf_tensor_find(const keel_gguf *g, const char *name);

enum keel_gguf_type {
    KEEL_GGUF_U8 = 0,
    KEEL_GGUF_I8,
    KEEL_GGUF_U16,
    KEEL_GGUF_I16,
    KEEL_GGUF_U32,
    KEEL_GGUF_I32,
    KEEL_GGUF_F32,
    KEEL_GGUF_BOOL,
    KEEL_GGUF_STR,
    KEEL_GGUF_ARRAY,
    KEEL_GGUF_U64,
    KEEL_GGUF_I64,
    KEEL_GGUF_F64,
};

// Metadata by key. False (NULL) and no log message if the key is missing or has another type.
bool keel_gguf_u64(const keel_gguf *g, const char *key, uint64_t *out); // any integer type, if not negative
bool keel_gguf_i64(const keel_gguf *g, const char *key, int64_t *out);  // any integer type, if it fits
bool keel_gguf_f64(const keel_gguf *g, const char *key, double *out);   // f32 or f64
bool keel_gguf_bool(const keel_gguf *g, const char *key, bool *out);
// NUL-terminated; may hold NUL bytes before `*len`. `len` may be NULL. Lives as long as `g`.
const char *keel_gguf_str(const keel_gguf *g, const char *key, size_t *len);

// A view of an array. Elements are read through the functions below.
struct keel_gguf_array {
    enum keel_gguf_type type; // of the elements
    uint64_t n;
    const uint8_t *data;      // elements as in the file: packed, unaligned, little endian
    const uint64_t *offsets;  // strings only: where each element's length field starts, relative to `data`
};
bool keel_gguf_array(const keel_gguf *g, const char *key, struct keel_gguf_array *out);
// i < n. The array must have a fitting element type: string; any integer or bool; f32 or f64.
const char *keel_gguf_array_str(const struct keel_gguf_array *a, uint64_t i, size_t *len); // no NUL at its end
int64_t keel_gguf_array_int(const struct keel_gguf_array *a, uint64_t i); // u64 above INT64_MAX saturates
double keel_gguf_array_num(const struct keel_gguf_array *a, uint64_t i);
bool keel_gguf_type_is_int(enum keel_gguf_type type);
bool keel_gguf_type_is_float(enum keel_gguf_type type);
const char *keel_gguf_type_name(enum keel_gguf_type type); // "u32", "string", ...

// All metadata in file order, for listings and copies.
size_t keel_gguf_key_count(const keel_gguf *g);
const char *keel_gguf_key_at(const keel_gguf *g, size_t i, enum keel_gguf_type *type); // `type` may be NULL
const uint8_t *keel_gguf_key_raw(const keel_gguf *g, size_t i, size_t *bytes); // value as in the file

// --- GGUF, writing -------------------------------------------------------------------------------

// Usage: create; add metadata; declare tensors; begin; data for every tensor in order; end; destroy.
// Adding cannot fail visibly: a lack of memory or a wrong declaration shows at begin.
typedef struct keel_gguf_writer keel_gguf_writer;
keel_status keel_gguf_writer_create(keel_gguf_writer **out, const keel_log *log);
void keel_gguf_writer_destroy(keel_gguf_writer **w); // accepts &NULL; does not close the file

void keel_gguf_put_u32(keel_gguf_writer *w, const char *key, uint32_t value);
void keel_gguf_put_i32(keel_gguf_writer *w, const char *key, int32_t value);
void keel_gguf_put_u64(keel_gguf_writer *w, const char *key, uint64_t value);
void keel_gguf_put_f32(keel_gguf_writer *w, const char *key, float value);
void keel_gguf_put_bool(keel_gguf_writer *w, const char *key, bool value);
void keel_gguf_put_str(keel_gguf_writer *w, const char *key, const char *value);
void keel_gguf_put_strn(keel_gguf_writer *w, const char *key, const char *value, size_t len);
void keel_gguf_put_i32s(keel_gguf_writer *w, const char *key, const int32_t *values, size_t n);
void keel_gguf_put_f32s(keel_gguf_writer *w, const char *key, const float *values, size_t n);
void keel_gguf_put_strs(keel_gguf_writer *w, const char *key, const char *const *values, size_t n);
// As put_strs for strings that may hold NUL bytes; lens[i] is in bytes.
void keel_gguf_put_strns(keel_gguf_writer *w, const char *key, const char *const *values, const size_t *lens,
                         size_t n);
// Copies key number `i` of another file as it is.
void keel_gguf_put_copy(keel_gguf_writer *w, const keel_gguf *from, size_t i);

// `dims` in GGUF order; dims[0] must be a multiple of the type's block. `name` is copied.
void keel_gguf_put_tensor(keel_gguf_writer *w, const char *name, enum keel_dtype type, uint32_t n_dims,
                          const uint64_t *dims);
// Writes the header at the file's current position, which must be its start. `f` is borrowed until end.
// Errors: ARG (duplicate key or tensor, dims that do not fit the type), NO_MEMORY, IO.
keel_status keel_gguf_writer_begin(keel_gguf_writer *w, FILE *f);
// Appends bytes of the tensors in declared order, in pieces of any size within one tensor; padding is written
// by itself. Errors: ARG (beyond the current tensor's end), IO.
keel_status keel_gguf_writer_data(keel_gguf_writer *w, const void *data, size_t bytes);
// Errors: ARG if data of a declared tensor is missing.
keel_status keel_gguf_writer_end(keel_gguf_writer *w);

// --- block quants --------------------------------------------------------------------------------

// n elements, a multiple of the type's block. Dequantisation is bit-equal to gguf-py's
// `gguf.quants.dequantize`; `src` may be unaligned. Every keel_dtype is supported. Thread-safe.
void keel_dequantize(enum keel_dtype type, const void *src, float *dst, size_t n);
// Round to nearest in the manner of ggml's reference quantisers; K-quants search their scales for the least
// squared error. NaN and infinity in `src` give an unspecified block, never undefined behaviour.
void keel_quantize(enum keel_dtype type, const float *src, void *dst, size_t n);
// Bytes of n elements (n a multiple of the block).
static inline uint64_t keel_dtype_bytes(enum keel_dtype type, uint64_t n)
{
    const struct keel_dtype_info *info = keel_dtype_info((uint32_t)type);
    return n / info->block_elems * info->block_bytes;
}

// --- safetensors ---------------------------------------------------------------------------------

enum keel_st_type {
    KEEL_ST_BOOL = 0,
    KEEL_ST_U8,
    KEEL_ST_I8,
    KEEL_ST_U16,
    KEEL_ST_I16,
    KEEL_ST_F16,
    KEEL_ST_BF16,
    KEEL_ST_U32,
    KEEL_ST_I32,
    KEEL_ST_F32,
    KEEL_ST_U64,
    KEEL_ST_I64,
    KEEL_ST_F64,
};
const char *keel_st_type_name(enum keel_st_type type); // "BF16", as in the file

#define KEEL_ST_MAX_DIMS 8
struct keel_st_tensor {
    const char *name;
    enum keel_st_type type;
    uint32_t n_dims;                 // 0 is a scalar
    uint64_t dims[KEEL_ST_MAX_DIMS]; // PyTorch order: the last one is contiguous
    uint64_t n_elems;
    const uint8_t *data; // into the file; may be unaligned
    uint64_t bytes;
};

// A parsed safetensors file; borrows the bytes as keel_gguf does. Errors: FORMAT, UNSUPPORTED (dtype),
// NO_MEMORY.
typedef struct keel_st keel_st;
keel_status keel_st_parse(keel_st **out, const uint8_t *data, size_t len, const char *name,
                          const keel_log *log);
void keel_st_destroy(keel_st **st); // accepts &NULL
size_t keel_st_count(const keel_st *st);
const struct keel_st_tensor *keel_st_at(const keel_st *st, size_t i); // sorted by name
const struct keel_st_tensor *keel_st_find(const keel_st *st, const char *name); // NULL if missing; O(log n)
const char *keel_st_meta(const keel_st *st, const char *key); // "__metadata__"; NULL if missing
// Converts any type to f32 (integers and f64 are rounded). `dst` holds n_elems.
void keel_st_to_f32(const struct keel_st_tensor *t, float *dst);

struct keel_pair {
    const char *key, *value;
};
// Writes the header for `n` tensors (name, type, n_dims, dims are read; the rest is ignored) and the string
// map `meta`; the caller then writes the data of each tensor in the order given, without padding. Errors: ARG
// (duplicate or unusable name, too many dims), NO_MEMORY, IO.
keel_status keel_st_write_header(FILE *f, const struct keel_st_tensor *tensors, size_t n,
                                 const struct keel_pair *meta, size_t n_meta, const keel_log *log);
// The same, then the data of every tensor from its `data` pointer.
keel_status keel_st_write(FILE *f, const struct keel_st_tensor *tensors, size_t n,
                          const struct keel_pair *meta, size_t n_meta, const keel_log *log);

// --- tokenizer -----------------------------------------------------------------------------------

// Gemma's tokenizer: SentencePiece BPE with scores, byte fallback and user-defined tokens. Immutable after
// creation; thread-safe. Owns all it needs: the file may be closed afterwards.
typedef struct keel_tokenizer keel_tokenizer;

// From a model's GGUF metadata (tokenizer.ggml.*). `log` is borrowed.
// Errors: FORMAT (missing or inconsistent lists, ids out of range), UNSUPPORTED (another kind of tokenizer),
// NO_MEMORY.
keel_status keel_tokenizer_create(keel_tokenizer **out, const keel_gguf *g, const keel_log *log);
void keel_tokenizer_destroy(keel_tokenizer **tok); // accepts &NULL

struct keel_tokens { // a growing list; all-zero is empty
    int32_t *ids;
    size_t n, cap;
};
void keel_tokens_finish(struct keel_tokens *t);                 // frees; accepts all-zero
keel_status keel_tokens_add(struct keel_tokens *t, int32_t id); // Errors: NO_MEMORY

struct keel_tokenize_params {
    bool bos;     // put the BOS token first
    bool special; // control tokens such as <end_of_turn> in the text become their ids, not plain text
};
// Appends the tokens of `text` (any bytes incl. NUL, valid UTF-8). Time O(len log len).
// Errors: DATA (invalid UTF-8, with its offset; longer than 2 GiB), NO_MEMORY. On error `out` is as it was.
keel_status keel_tokenize(const keel_tokenizer *tok, const char *text, size_t len,
                          struct keel_tokenize_params p, struct keel_tokens *out);
// The bytes that a token stands for in generated text: spaces as spaces, byte tokens as one raw byte (a
// character may span several tokens), control tokens and unknown as an empty string. Not NUL-terminated;
// lives as long as `tok`.
const char *keel_token_bytes(const keel_tokenizer *tok, int32_t id, size_t *len);
// The token as the vocabulary writes it ("▁the", "<0x0A>", "<bos>"); NUL-terminated. Never NULL for 0 <= id <
// vocab.
const char *keel_token_name(const keel_tokenizer *tok, int32_t id);
bool keel_token_is_control(const keel_tokenizer *tok, int32_t id);
int32_t keel_token_find(const keel_tokenizer *tok, const char *text); // by its name; -1 if absent
// Appends the text of n tokens; the exact inverse of keel_tokenize for text without control tokens.
void keel_detokenize(const keel_tokenizer *tok, const int32_t *ids, size_t n, struct keel_text *out);

struct keel_token_ids { // -1 where the model has none
    int32_t bos, eos, pad, unk;
    int32_t eot; // end of turn: tokenizer.ggml.eot_token_id, else the token <end_of_turn>
};
struct keel_token_ids keel_tokenizer_ids(const keel_tokenizer *tok);
uint32_t keel_tokenizer_vocab(const keel_tokenizer *tok);
bool keel_tokenizer_adds_bos(const keel_tokenizer *tok); // tokenizer.ggml.add_bos_token, true if absent
bool keel_tokenizer_is_eog(const keel_tokenizer *tok, int32_t id); // ends a generation: eos or eot

// --- JSONL ---------------------------------------------------------------------------------------

// One row with its origin, for messages. `object` is a reference that the holder drops with json_decref().
struct keel_row {
    struct json_t *object;
    const char *file; // borrowed from the reader's creator
    uint64_t line;    // from 1
    const keel_log *log;
};
struct keel_jsonl {
    const char *data, *name;
    size_t len, at;
    uint64_t line;
    const keel_log *log;
};
// All arguments are borrowed while rows are read; `name` as long as rows live.
struct keel_jsonl keel_jsonl_make(const uint8_t *data, size_t len, const char *name, const keel_log *log);
// The next non-empty line; at the end row->object is NULL and the status OK.
// Errors, logged as "FILE:LINE: reason": DATA (invalid UTF-8, invalid JSON, not an object, duplicate key),
// NO_MEMORY.
keel_status keel_jsonl_next(struct keel_jsonl *r, struct keel_row *row);

// Fields. The plain forms fail (DATA, logged with line and field) if the field is missing; the opt_ forms
// then return the default. Both fail if it has another type; null counts as missing. Strings and
// arrays are borrowed from row->object; `len` may be NULL.
keel_status keel_row_str(const struct keel_row *row, const char *field, const char **out, size_t *len);
keel_status keel_row_num(const struct keel_row *row, const char *field, double *out);
keel_status keel_row_int(const struct keel_row *row, const char *field, int64_t *out);
keel_status keel_row_bool(const struct keel_row *row, const char *field, bool *out);
keel_status keel_row_array(const struct keel_row *row, const char *field, struct json_t **out);
// With a missing field: *out stays as the caller set it and the status is OK.
keel_status keel_row_opt_str(const struct keel_row *row, const char *field, const char **out, size_t *len);
keel_status keel_row_opt_num(const struct keel_row *row, const char *field, double *out);
keel_status keel_row_opt_int(const struct keel_row *row, const char *field, int64_t *out);
keel_status keel_row_opt_bool(const struct keel_row *row, const char *field, bool *out);
keel_status keel_row_opt_array(const struct keel_row *row, const char *field, struct json_t **out);

// --- images --------------------------------------------------------------------------------------

struct keel_image {
    uint32_t width, height;
    uint8_t *rgb; // [height, width, 3], rows from the top; belongs to the image
};
#define KEEL_IMAGE_MAX_PIXELS 100000000
#define KEEL_IMAGE_MAX_GIF_PIXELS 25000000 // stb takes about 12 bytes a pixel for them
#define KEEL_IMAGE_MAX_SIDE 65535
// Decodes PNG, JPEG, BMP or the first frame of a GIF to RGB. Grey is repeated, palettes are looked up, of 16 bits
// the upper 8 are kept, alpha is dropped and EXIF orientation ignored (docs/formats.md "images"). Size limits are
// checked before any pixel is. `name` is for messages. Errors: FORMAT (no such image, damaged, no pixels),
// UNSUPPORTED (above the limits).
keel_status keel_image_decode(struct keel_image *out, const uint8_t *data, size_t len, const char *name,
                              const keel_log *log);
// Only the size, from the header; the same limits and errors.
keel_status keel_image_size(uint32_t *width, uint32_t *height, const uint8_t *data, size_t len, const char *name,
                            const keel_log *log);
void keel_image_finish(struct keel_image *image); // frees; accepts all-zero
// EXIF orientation of a JPEG or PNG file, 1 to 8; 1, upright, where there is none or it is damaged.
uint32_t keel_image_orientation(const uint8_t *data, size_t len);
struct keel_box {
    uint32_t x, y, width, height; // pixels, from the left and from the top
};
// A new image of the pixels inside `box`, which lies inside `in` and is not empty. Errors: NO_MEMORY.
keel_status keel_image_crop(struct keel_image *out, const struct keel_image *in, struct keel_box box, const keel_log *log);
// A new image of width × height from `in`, as PIL.Image.resize(..., BILINEAR) makes it: a triangle filter, wider
// by the scale when shrinking, horizontally and then vertically with 8 bits between. Errors: NO_MEMORY.
keel_status keel_image_resize(struct keel_image *out, const struct keel_image *in, uint32_t width, uint32_t height,
                              const keel_log *log);

#endif
