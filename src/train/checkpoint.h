// SPDX-License-Identifier: MIT
// train/checkpoint.h: the training state on disk: one safetensors file, written atomically.
#ifndef KEEL_TRAIN_CHECKPOINT_H
#define KEEL_TRAIN_CHECKPOINT_H

#include "device.h"
#include "formats.h"

#include <stdio.h>

// What a run needs besides its options. Rows and random numbers are functions of seed and position, so they
// are not here.
struct keel_train_state {
    keel_device *dev;
    const keel_log *log;
    // Adapter parameters, first and second moments, and with Lisa the adapter of the other kind of steps; on the device.
    struct keel_span tensor[4];
    uint32_t n_tensors; // 3, or 4
    uint64_t n_floats;  // of each
    const struct keel_pair
        *options; // all that determines the run's bits, as text; keys are the options' names
    size_t n_options;
    uint64_t step, rows, tokens; // optimiser steps done, rows drawn, tokens seen
    double first_loss, last_loss;
};

// Writes `path`: tensors params, m, v and other (F32), hash (U64, FNV-1a of their bytes); progress and options as
// metadata. Errors: IO, DEVICE_LOST.
keel_status keel_train_state_save(const struct keel_train_state *state, const char *path);
// Reads it back into the tensors and the progress fields. Errors: MISMATCH (names the option and both
// values), FORMAT (malformed or damaged), IO. Another device than the one that wrote it is a warning: its
// bits may differ.
keel_status keel_train_state_load(struct keel_train_state *state, const char *path);
// Drops from a JSONL log the lines of steps after `step` and a torn last line. Fine if the file is missing.
// Errors: IO, NO_MEMORY.
keel_status keel_train_log_cut(const char *path, uint64_t step, const keel_log *log);

#endif
