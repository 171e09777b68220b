// SPDX-License-Identifier: MIT
// study/folder.h: a run folder: its manifest, who owns it, which stages are done. Formats: docs/studies.md.
#ifndef KEEL_STUDY_FOLDER_H
#define KEEL_STUDY_FOLDER_H

#include "base.h"
#include "study_file.h"

#include <keel/model.h>

#include <jansson.h>

struct study_folder {
    char path[4096];
    json_t *manifest;
    const keel_log *log;
};

// Everything that decides the results of a study, as a manifest. `run` NULL: of the whole sweep; `stage` not NULL: of a stage of that run. `config`: text of the study file;
// `folder`: where its data paths start. Two runs with equal "run" may share a folder. A new reference in *out. Errors: IO, NO_MEMORY.
struct study_origin {
    const struct study_file *file;
    const char *folder, *config, *model_path, *mmproj_path; // the last may be ""
    keel_model *model;
    keel_device *dev;
};
keel_status keel_study_describe(json_t **out, const struct study_origin *o, const struct study_setting *run,
                                const struct study_stage *stage, const keel_log *log);
// Calls `fn` for every file of rows that the study reads, once each, until one fails.
keel_status keel_study_each_rows(const struct study_file *f, keel_status (*fn)(void *user, const char *name), void *user);

// Takes over the folder's manifest if it belongs to the same run, else refuses (MISMATCH); makes folder and subfolders (a list that
// ends with NULL) otherwise. Steals the manifest also on errors.
keel_status keel_study_folder_open(struct study_folder *f, const char *path, json_t *manifest, const char *const *sub, const keel_log *log);
void keel_study_folder_close(struct study_folder *f); // accepts all-zero
keel_status keel_study_folder_save(const struct study_folder *f);
bool keel_study_folder_done(const struct study_folder *f, const char *stage);
// Marks a part of the work that began at `since` (keel_now_ns()) as done, with the time and the most device memory it took: after
// this it is not run again.
keel_status keel_study_folder_mark(struct study_folder *f, const char *stage, uint64_t since, const keel_device *dev);

// FOLDER/NAME, or NAME where it is absolute.
void keel_study_path(char out[4200], const char *folder, const char *name);
// "rank-16_seed-1": what differs between the runs of a sweep.
void keel_study_run_name(char out[96], const struct study_file *f, const struct study_setting *run);

#endif
