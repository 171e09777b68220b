// SPDX-License-Identifier: MIT
// train/data.h: training rows as tokens, the order in which they are drawn, learning-rate schedules. Pure
// host code: no device.
#ifndef KEEL_TRAIN_DATA_H
#define KEEL_TRAIN_DATA_H

#include "base.h"
#include "formats.h"

#include <keel/images.h>
#include <keel/train.h>

struct keel_train_row {
    int32_t *ids;  // [n], owned
    uint8_t *mask; // [n], owned; NULL: every token from `first` on counts
    uint32_t n;
    uint32_t first; // first token that counts, at least 1
    uint32_t n_loss;
    uint64_t place0; // number of its first loss token among those of the set
    struct keel_image_tokens *images; // [n_images], owned; what they point at is not
    uint32_t n_images;
};

struct keel_train_file {
    const char *path; // borrowed
    double share;     // of all rows drawn; the shares sum to 1
    uint64_t row0, n_rows;
};

// All rows of a run. Read-only after loading.
struct keel_train_set {
    struct keel_train_row *rows;
    uint64_t n_rows, cap;
    struct keel_train_file *files;
    size_t n_files;
    uint32_t longest, most_loss; // over rows: tokens, loss tokens
    uint64_t n_loss;             // loss tokens of all rows
    uint64_t hash;               // of the bytes of all files, in order
};

// Reads and tokenises the files. A row is one of
//   {"prompt", "completion", "eos"?}: BOS and prompt, then the completion, each tokenised on its own and
//   concatenated (as `score` does);
//     the completion's tokens count, and with "eos": true an end-of-turn token after it (EOS where the
//     vocabulary has no such token);
//   {"messages": [{"role", "content"}]}: the chat template; the contents of assistant turns and the end of
//   each such turn count.
// Both may have images (keel/images.h), which must be encoded before training; NULL `images`: rows with images
// are errors. `model` needs no weights. Errors, as FILE:LINE: DATA (malformed, longer than seq_len, nothing
// counts, no rows), IO, NO_MEMORY.
keel_status keel_train_set_load(struct keel_train_set *set, const keel_model *model, keel_images *images,
                                const struct keel_train_data *data, size_t n_data, uint32_t seq_len,
                                const keel_log *log);
void keel_train_set_finish(struct keel_train_set *set); // accepts all-zero

// Adds a row that was made; it belongs to the set, also after an error.
keel_status keel_train_set_add(struct keel_train_set *set, struct keel_train_row row, const keel_log *log);

// Turns one parsed row into tokens; the part of the above that knows the fields. `out` is owned by the caller
// on success.
keel_status keel_train_row_make(struct keel_train_row *out, const keel_model *model, keel_images *images,
                                const struct keel_row *row, uint32_t seq_len);
void keel_train_row_adopt(struct keel_train_row *out, struct keel_prompt *prompt); // the tokens become the row's
void keel_train_row_finish(struct keel_train_row *row);

// The order of rows, a pure function of files, seed and position. At each position the file that is furthest
// behind its share is drawn from (the first one of equals); each file is walked in epochs without
// replacement, shuffled (Fisher-Yates with its own random stream for each file and epoch) or in file order.
struct keel_row_order {
    const struct keel_train_set *set; // only files[].share, row0 and n_rows are read
    uint64_t seed, position;
    bool shuffle;
    uint64_t *drawn; // [n_files]
    uint32_t **deal; // [n_files][n_rows]: the current epoch's order; NULL without shuffle
};
keel_status keel_row_order_init(struct keel_row_order *order, const struct keel_train_set *set, uint64_t seed,
                                bool shuffle, const keel_log *log);
uint64_t keel_row_order_next(struct keel_row_order *order); // index of a row; advances
void keel_row_order_finish(struct keel_row_order *order);   // accepts all-zero

enum keel_schedule { KEEL_SCHEDULE_CONSTANT, KEEL_SCHEDULE_LINEAR, KEEL_SCHEDULE_COSINE };
// False for an unknown name.
bool keel_schedule_parse(const char *name, enum keel_schedule *out);
// Learning rate of the 1-based `step`, as transformers.get_scheduler() gives it to the optimiser (its index
// is s = step - 1):
//   s < warmup: base · s / warmup (so the first warm-up step has rate 0)
//   constant: base
//   linear: base · (n - s) / (n - warmup)
//   cosine: base · (1 + cos(π · (s - warmup) / (n - warmup))) / 2
double keel_schedule_lr(enum keel_schedule schedule, double base, uint64_t step, uint64_t warmup,
                        uint64_t n_steps);

#endif
