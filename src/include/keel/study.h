// SPDX-License-Identifier: MIT
// keel/study.h: a drift study: evaluate, fine-tune, evaluate again, report. Formats of its files: docs/studies.md.
#ifndef KEEL_STUDY_H
#define KEEL_STUDY_H

#include <keel/device.h>
#include <keel/train.h>

#ifdef __cplusplus
extern "C" {
#endif

struct keel_study_progress {
    const char *stage;                 // "base, margins", "rank-16_seed-1 (2 of 6), train", ...
    const char *unit;                  // of the next two: "tokens", "images", or "steps" of the training
    uint64_t done, total;
    const struct keel_step_info *step; // training only, else NULL
};

struct keel_study_params {
    const char *file;  // YAML; data paths in it are relative to its folder
    const char *out;   // run folder; made if missing
    const char *model;  // overrides the file's model and its type, or NULL
    const char *type;   // of a Hugging Face folder's matrices, as for keel_model_open_as(); overrides the file's, or NULL
    const char *mmproj; // overrides the file's image tower, or NULL
    const struct keel_device_params *device; // NULL: defaults
    const char *variant; // as for keel_doctor_prepare()
    bool (*progress)(void *user, const struct keel_study_progress *p); // false: stop, to be resumed. May be NULL
    void *user;
};
struct keel_study_result {
    bool over_budget; // a budget of the study file was exceeded
    char report[4200]; // path of the HTML page
};

// Runs what is not done yet in `out`: base evaluation, training, evaluation of the adapted model, metrics, report. A folder that
// was made from another study file, model or data is refused (MISMATCH). May be killed at any moment: finished stages are not
// repeated and training goes on from its last state.
// Errors: FORMAT (study file, with its line), DATA, IO, MISMATCH, INTERRUPTED, and those of sessions and training.
KEEL_API keel_status keel_study_run(const struct keel_study_params *params, struct keel_study_result *result, const keel_log *log);

// Writes report.html, summary.csv, drift.json and plots of a run folder again from its records. Needs no GPU.
// Errors: IO, DATA, FORMAT, MISMATCH.
KEEL_API keel_status keel_report(const char *dir, struct keel_study_result *result, const keel_log *log);
// Writes the result of `keel geometry` (JSON text, docs/steering.md) as DIR/geometry.json, its plots and DIR/geometry.html; keel_report()
// shows the plots of a folder that has one, of a study or not. What an earlier result had and this one has not is removed. Errors: IO, NO_MEMORY; a missing gnuplot is none.
KEEL_API keel_status keel_geometry_write(const char *json, const char *dir, const keel_log *log);

#ifdef __cplusplus
}
#endif
#endif
