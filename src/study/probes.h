// SPDX-License-Identifier: MIT
// study/probes.h: rows of probe files as token sequences, and scoring them.
#ifndef KEEL_PROBES_H
#define KEEL_PROBES_H

#include "formats.h"
#include "measure.h"

#include <keel/images.h>

#include <jansson.h>

// Where a row that was read keeps what it asks: {"prompt" or "messages", "images"?: paths in the order of their places}, with paths
// relative to the working folder. Not written to records.
#define KEEL_ROW_ASK "_ask"

// One sequence; its tokens from `first` on are scored or compared.
struct keel_probe_seq {
    struct keel_prompt prompt;
    uint32_t first, n_prompt; // n_prompt: tokens before the response, which a prefix begins
    bool alternative; // differs from the sequence before it in the last token only: scored along with that
    float *a, *b; // [n - first]: log-probabilities; or a divergence and its reverse
};
struct keel_probes {
    json_t *rows;   // array of objects
    uint64_t *line; // of each row in `file`
    const char *file;
    const keel_log *log;
    struct keel_probe_seq *seq;
    size_t n_seq, cap;
};

// Reads every row of a JSONL file; each has a "prompt" or "messages", and an "id" if `need_id`. A chat gets its last message as
// "prompt", to be shown. Images are those of "images" or of the messages' content parts, relative to the folder of `origin` (NULL: of
// `file`): records name the images of the rows they are of. Both names are borrowed. The caller calls keel_probes_finish() also after an error. Errors: IO, DATA (file and line), NO_MEMORY.
keel_status keel_probes_read(struct keel_probes *p, const char *file, const char *origin, bool need_id, const keel_log *log);
void keel_probes_finish(struct keel_probes *p); // accepts all-zero
size_t keel_probes_count(const struct keel_probes *p);
// Row i with its place, as the keel_row_ functions take it; `object` is borrowed.
struct keel_row keel_probes_row(const struct keel_probes *p, size_t i);

// Drops the rows that are not of a cell: a domain, "other" (all but `narrow`, which may be NULL) or "all"; of a modality, or of any ("").
// Errors: DATA (none is left).
struct keel_probe_cell {
    const char *domain, *narrow, *modality;
};
keel_status keel_probes_keep(struct keel_probes *p, const struct keel_probe_cell *cell);

// Numbers of `max_rows` rows (0: all) in `which` [n], which belongs to the caller (free()): in an order drawn from the seed, one of
// each domain and modality, then a second of each, and so on; all rows in their own order. Errors: NO_MEMORY.
keel_status keel_probes_spread(const struct keel_probes *p, size_t max_rows, uint64_t seed, size_t **which, size_t *n);

// Tokens of a row's prompt: BOS and the text; with m->chat or "messages" the chat template up to the model's turn; images as in
// keel/images.h. Errors: DATA, IO (an image is missing).
keel_status keel_probe_prompt(const struct keel_measure *m, const struct keel_row *row, struct keel_prompt *out);
// Adds a sequence: the prompt, then `prefix` (or NULL), then what is scored: `text`, or the token ids of the list `more`. Each is
// tokenized by itself. Errors: DATA (nothing to score), NO_MEMORY.
struct keel_probe_parts {
    const char *prefix, *text;
    const json_t *more;
    const char *name; // of the field that holds `text`, for messages
};
keel_status keel_probes_add(struct keel_probes *p, const struct keel_measure *m, const struct keel_row *row,
                            const struct keel_probe_parts *parts);

keel_status keel_probes_score(struct keel_probes *p, const struct keel_measure *m);      // log-probabilities into a
keel_status keel_probes_divergence(struct keel_probes *p, const struct keel_measure *m); // KL(base ‖ adapted) into a, reverse into b
// Projections of the prompts of rows `which` [n] (NULL: of all) on a direction, as keel_measure_projection() writes them.
keel_status keel_probes_project(const struct keel_probes *p, const struct keel_measure *m, const struct keel_measure_along *how,
                                const size_t *which, size_t n, double *value);
double keel_probe_sum(const struct keel_probe_seq *s);                                   // Σ a
static inline uint32_t keel_probe_count(const struct keel_probe_seq *s)
{
    return s->prompt.n - s->first;
}

// Puts what a row asks into it (KEEL_ROW_ASK); paths of images start at the folder of the file `origin`. Errors: DATA.
keel_status keel_row_ask(const struct keel_row *row, const char *origin);
json_t *keel_row_files(const json_t *row); // paths of its images, or NULL
// Names the images of a record "images/NUMBER-NAME" and copies their files there, below `folder`; with `folder` NULL it only names
// them. So that the page finds them when the data are gone. Errors: IO.
keel_status keel_row_keep_images(json_t *row, size_t number, const char *folder, const keel_log *log);
keel_status keel_probes_write(const json_t *rows, const char *path, const keel_log *log);

// A copy of `row` with k rows of the training file `from` before its prompt as earlier turns: drawn without replacement from
// (seed, place). Chats become longer chats, raw prompts are joined by empty lines. `out` is a new reference.
// Errors: DATA (a chat before a raw prompt), NO_MEMORY.
keel_status keel_probe_in_context(json_t **out, const struct keel_measure *m, const struct keel_row *row,
                                  const struct keel_probes *from, uint32_t k, uint64_t seed, uint64_t place);

#endif
