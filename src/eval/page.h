// SPDX-License-Identifier: MIT
// eval/page.h: what the pages and plots of a single run, of a sweep and of a chain of stages share, inside the room.
#ifndef KEEL_EVAL_PAGE_H
#define KEEL_EVAL_PAGE_H

#include "eval.h"

#include <jansson.h>

// --- HTML ----------------------------------------------------------------------------------------

void keel_page_open(struct keel_text *t, const char *title);
void keel_page_close(struct keel_text *t, const char *note);
void keel_page_add(struct keel_text *t, const char *html);
// Opens a table cell below the column's head `head`, which stands beside the value where a phone stacks the columns (class s).
void keel_page_td(struct keel_text *t, const char *head);
// A whole cell with the value and its interval below; "–" for no value. sign: with + and -.
void keel_page_cell(struct keel_text *t, const char *head, struct keel_estimate e, bool sign);
void keel_page_figures(struct keel_text *t, const struct keel_figures *f);
void keel_page_domain(struct keel_text *t, const char *domain, const char *modality);
const char *keel_metric_label(enum keel_metric m);
void keel_page_metric(struct keel_text *t, const struct keel_drift *d, enum keel_metric m, bool open); // a table inside <details>
void keel_page_metrics(struct keel_text *t, const struct keel_drift *d);                               // of every metric
// Sentences: what was asked; " (WHAT +0.1, 95 % interval ...)"; image against text on twins, if there are any.
void keel_page_question(struct keel_text *t, const json_t *m);
void keel_page_interval(struct keel_text *t, struct keel_estimate e, const char *what);
void keel_page_gap(struct keel_text *t, const struct keel_drift *d);
// Answers of base/NAME beside those of tuned/NAME, with their images.
void keel_page_answers(struct keel_text *t, const char *base, const char *run, const char *name, const char *title, const char *column,
                       const char *note);
#define KEEL_EXAMPLES_NOTE                                                                                                       \
    "Greedy answers to probes drawn by the study's seed, one of each domain and modality in turn. They show what the numbers mean in " \
    "words; a few examples prove nothing."
// Where the numbers come from.
void keel_page_provenance(struct keel_text *t, const json_t *manifest);
// Text at section/key of a manifest, "" if there is none. section NULL: the top.
const char *keel_manifest_text(const json_t *m, const char *section, const char *key);
void keel_manifest_base(char out[4200], const char *dir, const json_t *m); // folder of the base's records
keel_status keel_manifest_load(json_t **out, const char *dir, const keel_log *log); // an empty one if there is no file. Errors: FORMAT
// Verdict table of the manifest's budget; whether a limit was exceeded.
bool keel_page_budget(struct keel_text *t, const json_t *m, const struct keel_drift *d);

// --- plots ---------------------------------------------------------------------------------------

// Calls `row` for every line of DIR/NAME, a JSONL file; false if there is none.
bool keel_file_rows(const char *dir, const char *name, void (*row)(void *user, const struct json_t *object), void *user);
#define KEEL_TRAIN_LOG "train/log.jsonl"
// What the monitor of a training measured in its runs, in the folders dir [n]; nothing if it had none. `stage`: its name, or "".
void keel_monitor_figure(struct keel_figures *f, const char *stage, const char (*dir)[4200], size_t n);
// Adds what became of the guards of the training in `dir`, if it had any, to the items of keel_page_guards(). `label`: of what, or "".
void keel_guard_item(struct keel_text *items, const char *label, const char *dir);
void keel_page_guards(struct keel_text *t, struct keel_text *items); // the section, unless there are no items; finishes them
// Rows with two points each, as a dot plot.
void keel_pair_head(struct keel_text *csv);
void keel_pair_row(struct keel_text *csv, size_t row, const char *label, size_t n, struct keel_estimate a, struct keel_estimate b);
void keel_pair_script(struct keel_figure *g, size_t rows, const char *range, const char *axis, const char *first, const char *second);
// About four tics on the x axis, for a narrow plot: the data reach from the least of columns lo[2] to the most of hi[2].
void keel_few_tics(struct keel_text *gp, const char *name, const int lo[2], const int hi[2]);
void keel_cell_label(char out[96], const char *domain, const char *modality);
bool keel_has_modalities(const struct keel_drift *d, enum keel_metric metric);
// The finest cells of slot probes: by domain and modality where there are several, else by domain.
bool keel_is_cell(const struct keel_drift *d, const struct keel_drift_row *r);

// Whether the folder holds a geometry.json and nothing of a study; and its page, with the plots of DIR/plots. Errors: FORMAT, IO,
// NO_MEMORY.
bool keel_geometry_alone(const char *dir);
keel_status keel_geometry_page(struct keel_text *t, const char *dir, const keel_log *log);

// --- sweeps --------------------------------------------------------------------------------------

// The runs of one setting, pooled over their seeds.
struct keel_setting {
    uint32_t rank;
    double mixture;
    size_t n_runs;
    long long seed[KEEL_MAX_RUNS];
    char (*dir)[4200]; // [n_runs]
    struct keel_drift drift;
};
struct keel_sweep {
    struct keel_setting *at;
    size_t n, n_missing; // settings with results; runs that have none yet
    double mixture;      // along which ranks are compared
    uint32_t rank;       // at which mixtures are compared
    size_t n_ranks, n_mixtures, n_seeds; // along those; most seeds of a setting
    const char *narrow, *narrow_modality; // NULL where the study names none
    uint64_t seed;
    char base[4200];
};
// Pools the finished runs of the sweep in `dir` by setting; with `stage` that stage of each, and then there may be none. Errors: DATA
// (none is finished), those of keel_drift_compute().
keel_status keel_sweep_load(struct keel_sweep *out, const char *dir, const json_t *manifest, const char *stage, const keel_log *log);
struct keel_setting *keel_sweep_find(const struct keel_sweep *s, uint32_t rank, double mixture); // NULL if there is none
void keel_sweep_finish(struct keel_sweep *s); // accepts all-zero
bool keel_in_rank_axis(const struct keel_sweep *s, const struct keel_setting *g);
bool keel_in_mixture_axis(const struct keel_sweep *s, const struct keel_setting *g);
void keel_setting_label(char out[96], const struct keel_sweep *s, const struct keel_setting *g);
// Lines of summary.csv (pooled) and runs.csv (each run); every line begins with `lead`, of the head the names of what is in it.
void keel_sweep_head(struct keel_text *pooled, struct keel_text *runs, const char *lead);
void keel_sweep_lines(struct keel_text *pooled, struct keel_text *runs, const char *lead, const struct keel_sweep *s);
keel_status keel_estimates_save(const struct keel_text *pooled, const struct keel_text *runs, const char *dir, const keel_log *log);
// Writes DIR/summary.csv and DIR/runs.csv.
keel_status keel_sweep_write(const struct keel_sweep *s, const char *dir, const keel_log *log);
// The setting that the page takes as its example: the largest rank with the most narrow rows.
const struct keel_setting *keel_sweep_main(const struct keel_sweep *s);
void keel_figures_of_sweep(struct keel_figures *f, const struct keel_sweep *s);
void keel_sweep_page(struct keel_text *t, const char *dir, const json_t *manifest, const struct keel_sweep *s, const struct keel_figures *f,
                     bool *over);

// --- chains of stages ------------------------------------------------------------------------------

struct keel_stage {
    const char *name, *group, *kind, *from; // of the manifest; kind "train", "steer" or "scale"; from "base" or a stage
    double value;        // of a scan, NAN without
    bool percent;        // the value is % of the residual stream's median norm
    bool watched;
    double above, below; // its training ends there; NAN: no such limit
    struct keel_sweep sweep; // the runs that have done it; n 0: none has
};
struct keel_chain {
    struct keel_stage *at;
    size_t n;
    uint32_t rank;  // of the setting that the page is about
    double mixture;
    const char *narrow, *narrow_modality; // NULL where the study names none
    uint64_t seed;
    size_t n_runs; // of the study
    char base[4200];
    const char *dir;
    const json_t *manifest;
};
// Stages that map doses are not in the list: they have records of their own. The manifest and `dir` must outlive the chain. Errors: FORMAT, those of keel_sweep_load(); DATA (no stage is finished).
keel_status keel_chain_load(struct keel_chain *out, const char *dir, const json_t *manifest, const keel_log *log);
void keel_chain_finish(struct keel_chain *c); // accepts all-zero
// Writes DIR/summary.csv, DIR/runs.csv, DIR/costs.csv and, where trainings were watched, DIR/thresholds.csv.
keel_status keel_chain_write(const struct keel_chain *c, const char *dir, const keel_log *log);
// A stage in the setting that the page is about; NULL: not done.
const struct keel_setting *keel_chain_setting(const struct keel_chain *c, const struct keel_stage *s);
const struct keel_setting *keel_chain_first(const struct keel_chain *c); // of the first stage that is done: never NULL
const struct keel_stage *keel_chain_find(const struct keel_chain *c, const char *name); // NULL if there is none
// The longest chain of trainings, first to last; of equals that whose last comes first. Returns how many; `path` holds c->n.
size_t keel_chain_path(const struct keel_chain *c, const struct keel_stage **path);
// What run `k` of a stage cost, and where its watched training ended.
struct keel_stage_cost {
    double steps, train_seconds, eval_seconds, peak_bytes;
    bool reached;
};
struct keel_stage_cost keel_stage_cost(const struct keel_setting *g, size_t k);
// What the stage of this name, which maps doses, cost in an entry of the manifest's "runs"; false: it is not done.
bool keel_map_cost(struct keel_stage_cost *out, const struct keel_chain *c, const char *name, const json_t *run);
void keel_figures_of_maps(struct keel_figures *f, const struct keel_chain *c); // heat maps of the stages that map doses
void keel_figures_of_chain(struct keel_figures *f, const struct keel_chain *c);
void keel_chain_page(struct keel_text *t, const char *dir, const json_t *manifest, const struct keel_chain *c, const struct keel_figures *f,
                     bool *over);

#endif
