// SPDX-License-Identifier: MIT
// train/run.h: one training run as the files of this room see it: checks.c before anything is allocated, setup.c until the first
// step, loop.c from there.
#ifndef KEEL_TRAIN_RUN_H
#define KEEL_TRAIN_RUN_H

#include "checkpoint.h"
#include "data.h"
#include "models.h"

#define MAX_OPTIONS 48
#define OPTION_TEXT 1024

// Divergence from the base on rows of its own (kl.c).
struct keel_train_kl {
    struct keel_train_set set; // no rows: off
    struct keel_row_order order;
    struct keel_top *top;  // [set.n_loss] what the base predicts
    struct keel_seq *seqs; // [p->kl_rows]
};

// Token weights of constrained fine-tuning (constrain.c).
struct keel_train_constrain {
    float *beta, *base_logprob; // [set.n_loss of the run]; NULL: the plain loss
};

// Alternation of two kinds of steps (lisa.c).
struct keel_train_lisa {
    struct keel_train_set set; // rows of the alignment steps; none: off
    struct keel_row_order order;
    struct keel_span diff; // [n_floats] w - w_other, scratch; w_other is the state's
};

// Measurements while training (monitor.c).
struct keel_train_monitor {
    struct keel_train_set set; // sequences; of a probe with two answers two, one after the other; none: off
    uint8_t *kind;             // [set.n_rows]
    uint64_t cap_kind;
    struct keel_top *top;      // [set.n_loss] what the base predicts
    float *base, *now, *kl;    // [set.n_loss] log-probabilities under base and adapted model; divergences
    keel_hooks *hooks;         // capture for the projection; NULL: none
    struct keel_span u, dot, square; // [width] unit direction; [T] of each token: projection, squared length
    float *dot_host, *square_host;
    uint32_t max_tokens;
    double sum_dot, sum_norm, n_tokens; // of what is captured
    double base_dot, base_norm;         // means under the base
    double value[KEEL_N_MONITORED];
    double seconds; // of the last measurement
};

struct keel_train_run {
    keel_model *model;
    keel_device *dev;
    const keel_log *log;
    const struct keel_train_params *p;
    struct keel_train_set set;
    struct keel_row_order order;
    enum keel_schedule schedule;
    uint32_t targets;
    uint8_t *layers; // [n_layers of the model] that are trained; NULL: all
    uint64_t images_hash; // 0: no images
    float alpha;
    uint64_t n_steps, per_step, all_rows; // rows of a full step; rows of the whole run
    char *state_dir, *state_path;
    FILE *log_file;
    keel_adapter *adapter;
    keel_adapter *frozen[KEEL_MAX_FROZEN];
    keel_trainer *trainer;
    keel_image_trainer *tower; // NULL unless the vision tower is trained too
    keel_heap *heap;
    keel_recorder *rec;
    struct keel_span grads, sums, partial;
    struct keel_train_state state;
    struct keel_pair option[MAX_OPTIONS];
    char option_text[MAX_OPTIONS][OPTION_TEXT];
    struct keel_seq *seqs; // [per_step]
    struct keel_train_lisa lisa;
    struct keel_train_monitor monitor;
    char *good_path; // state of the last measurement within all limits
    bool breached;
    struct keel_breach breach;
    struct keel_plan plan; // memory, for the log
    struct keel_train_constrain constrain;
    struct keel_train_kl kl;
    double prepare_seconds;
};

// --- checks.c ------------------------------------------------------------------------------------

keel_status keel_train_check_params(struct keel_train_run *r);
// Whether device memory suffices for the longest rows. Errors: NO_MEMORY, with the plan.
keel_status keel_train_check_plan(struct keel_train_run *r);
// A folder that cannot be written is to be found now, not after hours of work. Sets state_dir and state_path.
keel_status keel_train_check_outputs(struct keel_train_run *r);

// --- monitor.c -----------------------------------------------------------------------------------

keel_status keel_train_monitor_load(struct keel_train_run *r);    // the rows, if any are asked for; what guards need must be in them
keel_status keel_train_monitor_prepare(struct keel_train_run *r); // the base's part
keel_status keel_train_monitor_measure(struct keel_train_run *r); // monitor.value of the adapter as it is; NaN: not measured
bool keel_train_monitor_due(const struct keel_train_run *r, uint64_t step);
void keel_train_monitor_finish(struct keel_train_monitor *m); // accepts all-zero

// --- guard.c -------------------------------------------------------------------------------------

// Before the first step: the adapter that the run starts with must be within the limits. Errors: OVER_BUDGET.
keel_status keel_train_guard_start(struct keel_train_run *r);
// After a measurement: keeps the state if it is within the limits; otherwise sets r->breached and, to roll back, loads the kept one.
keel_status keel_train_guard_check(struct keel_train_run *r);

// --- lisa.c --------------------------------------------------------------------------------------

keel_status keel_train_lisa_load(struct keel_train_run *r); // the rows, if any are asked for
// Whether the 1-based step is one on lisa_data, and how many of the steps up to and with it are.
bool keel_train_lisa_aligns(const struct keel_train_run *r, uint64_t step);
uint64_t keel_train_lisa_count(const struct keel_train_run *r, uint64_t step);
// How many steps there are when `task_steps` of them are on the data.
uint64_t keel_train_lisa_all(const struct keel_train_run *r, uint64_t task_steps);
void keel_train_lisa_skip(struct keel_train_run *r, uint64_t steps);
keel_status keel_train_lisa_buffers(struct keel_train_run *r);
// Before the gradient of a step: keeps the adapter if the other kind of steps ends here. After it: adds the proximal term's.
keel_status keel_train_lisa_turn(struct keel_train_run *r, uint64_t step);
keel_status keel_train_lisa_proximal(struct keel_train_run *r, struct keel_step_info *info);
void keel_train_lisa_finish(struct keel_train_lisa *lisa); // accepts all-zero

// --- constrain.c ---------------------------------------------------------------------------------

bool keel_train_constrained(const struct keel_train_params *p);
// β and the base's log-probability of every loss token of the data, in batches of rows in the file's order.
keel_status keel_train_constrain_prepare(struct keel_train_run *r);
void keel_train_constrain_finish(struct keel_train_constrain *c); // accepts all-zero

// --- kl.c ----------------------------------------------------------------------------------------

keel_status keel_train_kl_load(struct keel_train_run *r); // the rows, if any are asked for
// What the base predicts, in batches of rows in the file's order: the same bits however often the run is resumed.
keel_status keel_train_kl_prepare(struct keel_train_run *r);
void keel_train_kl_skip(struct keel_train_run *r, uint64_t steps); // moves the order on to where it was after so many steps
// Adds the gradient of the step's rows. INTERRUPTED: stopped between micro-batches.
keel_status keel_train_kl_step(struct keel_train_run *r, struct keel_step_info *info);
void keel_train_kl_finish(struct keel_train_kl *kl); // accepts all-zero

// --- setup.c -------------------------------------------------------------------------------------

// Steps and rows of the run, and the order of rows.
keel_status keel_train_plan_steps(struct keel_train_run *r);
// Soft tokens of images that the caller has not encoded; the tower gives its memory back before training takes it.
keel_status keel_train_encode_images(struct keel_train_run *r);
keel_status keel_train_create_buffers(struct keel_train_run *r);
// Goes on from a state, if asked to and there is one; then opens the log at the same step.
keel_status keel_train_start(struct keel_train_run *r);
// A row as the trainer takes it. `weight`: of each loss token.
struct keel_seq keel_train_seq(const struct keel_train_row *row, float weight);
// Calls `fn` for batch after batch of a file's rows in its order, until one fails: `rows` [n] and the same as the trainer takes them.
// Errors: NO_MEMORY, those of `fn`.
typedef keel_status keel_train_batch_fn(struct keel_train_run *r, const struct keel_train_row *rows, struct keel_seq *seqs, uint32_t n);
keel_status keel_train_each_batch(struct keel_train_run *r, const struct keel_train_set *set, keel_train_batch_fn *fn);
// Largest number of tokens and of loss tokens in a row of any file of the run.
uint32_t keel_train_longest(const struct keel_train_run *r);
uint32_t keel_train_most_loss(const struct keel_train_run *r);

#endif
