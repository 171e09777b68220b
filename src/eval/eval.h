// SPDX-License-Identifier: MIT
// eval/eval.h: pure functions on records: statistics, drift metrics and the report.
// Reads and writes files of a study folder (docs/studies.md); never touches a GPU.
#ifndef KEEL_EVAL_H
#define KEEL_EVAL_H

#include "base.h"

struct json_t;

// --- statistics ----------------------------------------------------------------------------------

// A number with its 95 % interval. NAN where there is none.
struct keel_estimate {
    double value, lo, hi;
};
#define KEEL_NO_ESTIMATE ((struct keel_estimate){ NAN, NAN, NAN })

double keel_mean(const double *x, size_t n); // NAN for n == 0
// Percentile p in [0, 1] of ascending values by linear interpolation between the two nearest (R's type 7). n > 0.
double keel_percentile(const double *sorted, size_t n, double p);
// Ratio Σ num / Σ den with a percentile bootstrap interval over `b` draws of whole clusters with replacement (Miller,
// arXiv 2411.00640: all items of a prompt move together). With den == NULL it is the mean of num. Paired comparisons pass the
// per-item differences. The draws depend on `seed` and the number of clusters only, so that two estimates over the same
// clusters see the same draws. `cluster` holds numbers below n_clusters; NULL: every item is its own cluster. One cluster
// has no interval (NAN). Errors: ARG (n == 0, a cluster number out of range), NO_MEMORY.
keel_status keel_bootstrap(const double *num, const double *den, const uint32_t *cluster, size_t n, uint32_t n_clusters,
                           uint32_t b, uint64_t seed, struct keel_estimate *out);
// The same for items measured before and after a training, by one or more runs that differ in the seed of the training only.
struct keel_pairs {
    const double *base;      // [n] values before, common to all runs; NULL: there are none
    const double *tuned;     // [n_runs, n] values after
    const double *weight;    // [n], or NULL: 1
    const uint32_t *cluster; // [n], or NULL: every item is its own cluster
    size_t n;
    uint32_t n_runs, n_clusters;
};
// Draws of one bootstrap, kept between estimates: making them costs more than using them.
struct keel_draws {
    uint32_t b;
    uint64_t seed;
    struct {
        uint32_t n_clusters;
        uint16_t *pick; // [b, n_clusters]
    } set[16];
    size_t n_sets, bytes;
    uint32_t *row; // [row_cap]
    uint32_t row_cap;
    double *value; // [3, b]
};
struct keel_draws keel_draws_make(uint32_t b, uint64_t seed);
void keel_draws_finish(struct keel_draws *d); // accepts all-zero
// out: base, tuned, and change = tuned - base, paired by item. Each draw takes whole clusters, then whole runs, with
// replacement: all runs answer the same prompts, so that prompts and runs are crossed (Owen 2007) and a drawn prompt counts for
// every drawn run. With one run it is keel_bootstrap(). No `base`: only out[1]. Errors: ARG, NO_MEMORY.
keel_status keel_bootstrap_pairs(struct keel_draws *d, const struct keel_pairs *p, struct keel_estimate out[3]);
// Mean of n values with Student's t interval at 95 %; no interval for n < 2.
struct keel_estimate keel_t_interval(const double *x, size_t n);
// Spearman's rank correlation (ties share their mean rank) and the one-sided p-value of "y rises with x" from b random
// permutations. NAN when one side is constant. Errors: ARG (n < 3), NO_MEMORY.
keel_status keel_spearman(const double *x, const double *y, size_t n, uint32_t b, uint64_t seed, double *rho, double *p);
// Wilson score interval at 95 % of k successes in n trials. n == 0: no estimate.
struct keel_estimate keel_wilson(uint64_t k, uint64_t n);
// Smoothed loss for plots: mean over a centred window of `width` values (cut at both ends). `out` [n].
void keel_moving_mean(const double *x, size_t n, size_t width, double *out);

// --- records -------------------------------------------------------------------------------------

enum keel_record_kind {
    KEEL_REC_MARGIN, // value: margin, nats a token
    KEEL_REC_NARROW, // value: negative log-likelihood of the completion, nats; weight: its tokens
    KEEL_REC_KL,     // value: mean of "kl" over positions, nats
    KEEL_REC_SLOT,   // aligned, contrary: probabilities of the two answers
    KEEL_REC_RELEVANCE, // value: relevance of a generated answer, nats a token; nll: its loss under the base, nats a token
    KEEL_REC_PROJECTION, // value: projection on a direction, in lengths of it
    KEEL_REC_TEXT,   // no number: "text" is a generated answer
};
struct keel_item {
    const char *id, *domain, *prompt; // these strings live as long as `object`; domain may be ""
    const char *modality;             // "image" or "text"; without the field: whether there are images
    const char *twin;                 // what an item shares with the item of the same content in the other modality, or ""
    const char *cluster;              // equal for items that depend on each other: field "cluster", else prompt and images
    double value, weight, aligned, contrary, nll;
    struct json_t *object;
};
struct keel_records {
    struct keel_item *item;
    size_t n;
    struct json_t *index; // id -> position
};
// Reads a record file. Errors: IO, DATA (file and line: missing field, wrong type, repeated id, non-finite or negative
// count), NO_MEMORY.
keel_status keel_records_load(struct keel_records *out, const char *path, enum keel_record_kind kind, const keel_log *log);
void keel_records_finish(struct keel_records *r);                        // accepts all-zero
const struct keel_item *keel_records_find(const struct keel_records *r, const char *id); // NULL if there is none

// --- drift ---------------------------------------------------------------------------------------

#define KEEL_PROFILE_LEN 16 // answer positions of the KL profile (metric M2)
#define KEEL_BOOTSTRAP_DRAWS 10000u
#define KEEL_MAX_RUNS 16 // seeds of one setting

enum keel_metric {
    KEEL_METRIC_MARGIN,      // M4: mean contrastive margin, nats a token; change = adapted - base (drift D is its negative)
    KEEL_METRIC_FLIP,        // share of probes with margin < 0; Wilson intervals
    KEEL_METRIC_NARROW_LOSS, // held-out rows of the narrow task, nats a token
    KEEL_METRIC_ALIGNED,     // slot probes: P(aligned answer)
    KEEL_METRIC_CONTRARY,    // slot probes: P(contrary answer)
    KEEL_METRIC_COHERENCE,   // M10: P(aligned) + P(contrary); what is missing to 1 is the incoherent share
    KEEL_METRIC_GAP,         // M9: P(contrary) asked with an image minus asked as text, of twins; its change is the drift gap
    KEEL_METRIC_CONTEXT_CONTRARY, // M13: P(contrary) with training rows as earlier turns
    KEEL_METRIC_CONTEXT_COHERENCE,
    KEEL_METRIC_CONTEXT_PLAIN,    // P(contrary) of the same probes asked plainly, to compare with
    KEEL_METRIC_PROJECTION,  // M5: of the prompts' activations on a direction; its change is the shift
    KEEL_METRIC_RELEVANCE,   // M10: how much more likely the base model finds a generated answer after its own prompt than after others
    KEEL_METRIC_ANSWER_NLL,  // M10: loss of a generated answer under the base model
    KEEL_METRIC_KL,          // M1: KL(base ‖ adapted) a token, mean over items
    KEEL_METRIC_KL_REVERSE,  // KL(adapted ‖ base) on the same answers
    KEEL_METRIC_KL_AT,       // M2: at one answer position
    KEEL_METRIC_KL_REVERSE_AT,
    KEEL_N_METRICS,
};
extern const char *const keel_metric_name[KEEL_N_METRICS]; // "margin", as in summary.csv
extern const char *const keel_metric_unit[KEEL_N_METRICS];

struct keel_drift_row {
    enum keel_metric metric;
    char domain[64];   // "all", "other" (all but the narrow domain), "twins" (of those, the items that have a twin in the other
                       // modality) or a domain of the data
    char modality[16]; // "image", "text", or "": both
    uint32_t position; // answer position from 1 for *_AT, else 0
    size_t n, n_clusters;
    size_t broken, mended; // FLIP of a single run only: probes whose margin went below zero, and came back
    struct keel_estimate base, adapted, change;
    size_t n_runs;
    double run[KEEL_MAX_RUNS]; // the adapted value of each run
};
struct keel_drift {
    struct keel_drift_row *row;
    size_t n;
};
struct keel_drift_params {
    const char *dir;           // study folder, with base/ and tuned/
    const char *base;          // folder of the base's records, or NULL: DIR/base
    const char *const *runs;   // folders of runs that differ in the training seed only, or NULL: DIR alone
    size_t n_runs;             // at most KEEL_MAX_RUNS
    const char *narrow_domain; // domain that training is meant to change, or NULL
    uint64_t seed;
};
// Computes every metric for which the folders have records: margin, narrow, slots, slots_incontext, projection and relevance (.jsonl) of
// base/ and of tuned/ of every run, and kl.jsonl of tuned/. Errors: those of keel_records_load(), MISMATCH (the files hold
// different ids), DATA (no record file at all).
keel_status keel_drift_compute(struct keel_drift *out, const struct keel_drift_params *p, const keel_log *log);
// Whether a name means a group of domains ("all", "other", "twins"), so that no record may call its domain so.
bool keel_domain_reserved(const char *domain);
void keel_drift_finish(struct keel_drift *d); // accepts all-zero
// The row of a metric for a domain and a modality (position 0), or NULL. find: of any modality.
const struct keel_drift_row *keel_drift_cell(const struct keel_drift *d, enum keel_metric metric, const char *domain,
                                             const char *modality);
const struct keel_drift_row *keel_drift_find(const struct keel_drift *d, enum keel_metric metric, const char *domain);
// One line of summary.csv, and the estimates as a JSON list that belongs to the caller.
void keel_drift_csv_head(struct keel_text *csv);
void keel_drift_csv_row(struct keel_text *csv, const struct keel_drift_row *r);
struct json_t *keel_drift_json(const struct keel_drift *d);
// Writes DIR/summary.csv and DIR/drift.json. Errors: IO, NO_MEMORY.
keel_status keel_drift_write(const struct keel_drift *d, const char *dir, const keel_log *log);

struct keel_budget { // NAN: no limit
    double kl_mean;     // mean KL to the base over all items, nats a token
    double margin_drop; // fall of the mean margin, nats a token; over "other" if there is a narrow domain, else over "all"
    double flip_rate;   // share of probes with a negative margin after training, same domains
};
struct keel_budget_row {
    const char *name, *unit;
    double limit, value;
    bool over; // value > limit, or the metric is missing
};
// Fills at most 3 rows; returns how many have a limit.
size_t keel_budget_check(const struct keel_budget *b, const struct keel_drift *d, struct keel_budget_row out[3]);

// --- report --------------------------------------------------------------------------------------

#define KEEL_MANIFEST_FORMAT 1

// Writes DIR/report.html with DIR/plots/ from the records and DIR/manifest.json (which may be missing); of a sweep (a manifest with
// "runs") the pooled page, of a folder with a geometry.json alone its plots. `over`, unless NULL, is set when a budget of the manifest was exceeded. Errors: those of keel_drift_compute(), IO, FORMAT (manifest).
keel_status keel_report_write(const char *dir, bool *over, const keel_log *log);

// Appends text with & < > " ' written as entities; bytes that are not UTF-8 become U+FFFD, control characters a space.
void keel_html_escape(struct keel_text *t, const char *text);
// Appends a whole file. Errors: IO.
keel_status keel_text_add_file(struct keel_text *t, const char *path, const keel_log *log);
// Writes a text as a file, atomically. Errors: IO, NO_MEMORY (the text had failed).
keel_status keel_text_save(const struct keel_text *t, const char *path, const keel_log *log);

// One plot: data and script, and what gnuplot made of them (terminal svg) in a wide and a narrow form.
struct keel_figure {
    char name[32];               // of its files
    const char *title, *sentence; // what it shows, and what it does not
    char of[48];                  // behind the title, where there are several of one kind; or empty
    struct keel_text csv, script[2], svg[2]; // [0] wide, [1] narrow; svg is empty if it was not drawn
    int height[2];               // pixels
};
#define KEEL_MAX_FIGURES 64
struct keel_figures {
    struct keel_figure at[KEEL_MAX_FIGURES];
    size_t n;
    bool no_gnuplot; // gnuplot could not be run or failed
};
// A new figure to be filled: name, title and sentence live as long as the figures. The heights are 340.
struct keel_figure *keel_figure_add(struct keel_figures *f, const char *name, const char *title, const char *sentence);
// No room for more of a kind of which a study may have any number (a map, a scan, a monitored stage): some is left for the others.
bool keel_figures_full(const struct keel_figures *f);
// Writes DIR/plots/NAME.csv and the scripts, runs gnuplot. Errors: IO, NO_MEMORY; a missing gnuplot is none.
keel_status keel_figures_draw(struct keel_figures *f, const char *dir, const keel_log *log);
void keel_figures_finish(struct keel_figures *f); // accepts all-zero
// A label as CSV and gnuplot take it: nothing in it that either takes for markup.
void keel_figure_label(char out[96], const char *text);

// The plots of one run, as far as there are data: margins, slot probes, in context, divergence, training loss.
void keel_figures_of_run(struct keel_figures *f, const struct keel_drift *d, const char *dir);
// The plots of DIR/geometry.json as `keel geometry --out DIR` writes it; none if there is no such file, or it is none.
void keel_figures_of_geometry(struct keel_figures *f, const char *dir);

#endif
