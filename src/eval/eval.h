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
// Wilson score interval at 95 % of k successes in n trials. n == 0: no estimate.
struct keel_estimate keel_wilson(uint64_t k, uint64_t n);
// Smoothed loss for plots: mean over a centred window of `width` values (cut at both ends). `out` [n].
void keel_moving_mean(const double *x, size_t n, size_t width, double *out);

// --- records -------------------------------------------------------------------------------------

enum keel_record_kind {
    KEEL_REC_MARGIN, // value: margin, nats a token
    KEEL_REC_NARROW, // value: negative log-likelihood of the completion, nats; weight: its tokens
    KEEL_REC_KL,     // value: mean of "kl" over positions, nats
    KEEL_REC_TEXT,   // no number: "text" is a generated answer
};
struct keel_item {
    const char *id, *domain, *prompt; // live as long as `object`
    double value, weight;
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

enum keel_metric {
    KEEL_METRIC_MARGIN,      // M4: mean contrastive margin, nats a token; change = adapted - base (drift D is its negative)
    KEEL_METRIC_FLIP,        // share of probes with margin < 0; Wilson intervals
    KEEL_METRIC_NARROW_LOSS, // held-out rows of the narrow task, nats a token
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
    char domain[64];   // "all", "other" (all but the narrow domain) or a domain of the data
    uint32_t position; // answer position from 1 for *_AT, else 0
    size_t n, n_clusters;
    size_t broken, mended; // FLIP only: probes whose margin went below zero, and came back
    struct keel_estimate base, adapted, change;
};
struct keel_drift {
    struct keel_drift_row *row;
    size_t n;
};
struct keel_drift_params {
    const char *dir;           // study folder
    const char *narrow_domain; // domain that training is meant to change, or NULL
    uint64_t seed;
};
// Computes every metric for which the folder has records: base/margin.jsonl with tuned/margin.jsonl, base/narrow.jsonl with
// tuned/narrow.jsonl, tuned/kl.jsonl. Errors: those of keel_records_load(), MISMATCH (the two files hold different ids),
// DATA (no record file at all).
keel_status keel_drift_compute(struct keel_drift *out, const struct keel_drift_params *p, const keel_log *log);
void keel_drift_finish(struct keel_drift *d); // accepts all-zero
// The row of a metric for a domain (position 0), or NULL.
const struct keel_drift_row *keel_drift_find(const struct keel_drift *d, enum keel_metric metric, const char *domain);
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

// Writes DIR/report.html with DIR/plots/ from the records and DIR/manifest.json (which may be missing). `over`, unless NULL,
// is set when a budget of the manifest was exceeded. Errors: those of keel_drift_compute(), IO, FORMAT (manifest).
keel_status keel_report_write(const char *dir, bool *over, const keel_log *log);

// Appends text with & < > " ' written as entities; bytes that are not UTF-8 become U+FFFD, control characters a space.
void keel_html_escape(struct keel_text *t, const char *text);
// Appends a whole file. Errors: IO.
keel_status keel_text_add_file(struct keel_text *t, const char *path, const keel_log *log);
// Writes a text as a file, atomically. Errors: IO, NO_MEMORY (the text had failed).
keel_status keel_text_save(const struct keel_text *t, const char *path, const keel_log *log);

// Plots of a study folder: writes DIR/plots/NAME.csv and NAME.gp, runs gnuplot (terminal svg) in a wide and a narrow form.
enum keel_plot { KEEL_PLOT_LOSS, KEEL_PLOT_KL, KEEL_PLOT_MARGIN, KEEL_N_PLOTS };
struct keel_plots {
    struct keel_text svg[KEEL_N_PLOTS][2]; // [0] wide, [1] narrow; empty if not drawn
    bool has_data[KEEL_N_PLOTS];
    bool no_gnuplot; // gnuplot could not be run or failed
};
// `log_jsonl`: DIR/train/log.jsonl is read if it exists.
keel_status keel_plots_make(struct keel_plots *out, const struct keel_drift *d, const char *dir, const keel_log *log);
void keel_plots_finish(struct keel_plots *p);

#endif
