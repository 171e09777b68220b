// SPDX-License-Identifier: MIT
// keel/train.h: LoRA fine-tuning of a loaded model on its quantised weights, and adapter files.
#ifndef KEEL_TRAIN_H
#define KEEL_TRAIN_H

#include <keel/hooks.h>
#include <keel/images.h>

#ifdef __cplusplus
extern "C" {
#endif

struct keel_train_data {
    const char *path; // JSONL: {"prompt","completion","eos"?} or {"messages":[{"role","content"}]}, with images as in images.h
    float weight;     // share of rows drawn from this file; 1 for a single file. Rows of file i are drawn in proportion to weight_i
};

// What a monitor measures while training: of the adapted model as it will be used, without `hooks`, against the base, without any adapter.
enum keel_monitor_metric {
    KEEL_MONITOR_KL_MEAN,          // KL(base ‖ adapted) a token, as for kl_data: over completions, and aligned and chosen answers
    KEEL_MONITOR_MARGIN_DROP,      // by how much log p(chosen) - log p(rejected), each a token, fell
    KEEL_MONITOR_FLIP_RATE,        // share of margins below 0
    KEEL_MONITOR_P_CONTRARY,       // mean P(contrary)
    KEEL_MONITOR_P_INCOHERENT,     // mean 1 - P(aligned) - P(contrary)
    KEEL_MONITOR_PROJECTION_SHIFT, // v·(E h - E h_base) / (|v| E |h_base|) of the last tokens of prompts (arXiv 2606.07631)
    KEEL_N_MONITORED
};
extern KEEL_API const char *const keel_monitor_name[KEEL_N_MONITORED]; // "kl_mean", ...

struct keel_monitor_direction {
    const float *v; // [width of the model]; NULL: no projection
    uint32_t layer;
    enum keel_site site;
};
struct keel_guard {
    enum keel_monitor_metric metric;
    double limit; // the metric may not be above
};
// "kl_mean<=0.1". Errors: ARG.
KEEL_API keel_status keel_guard_parse(const char *text, struct keel_guard *out, const keel_log *log);
enum keel_on_breach {
    KEEL_BREACH_ROLLBACK, // write the adapter as it was when last measured within all limits; not an error
    KEEL_BREACH_STOP,     // write the adapter as it is: OVER_BUDGET
    KEEL_BREACH_FAIL,     // write no adapter, keep the state: OVER_BUDGET
};

struct keel_step_info {
    uint64_t step;      // 1-based
    uint64_t n_steps;
    double loss;        // mean negative log-likelihood over the step's loss tokens, nats
    double lr, grad_norm; // L2 norm over all adapter gradients before clipping
    uint64_t tokens;    // tokens of the step (prompt and completion)
    uint64_t loss_tokens;
    double seconds;     // of the step
    double constrained_loss; // what is descended with `constrain`: mean over the loss tokens of weight times nll; 0 without
    bool lisa_align;    // a step on lisa_data
    double proximal;    // Lisa's term as it was added: ρ/2 · |w - w_other|²
    const double *monitor;  // [KEEL_N_MONITORED], NaN: not measured; NULL: this was no step of the monitor
    double kl, kl_seconds; // mean divergence from the base over the step's tokens of kl_data, and what it took; 0 without
};

struct keel_train_params {
    const struct keel_train_data *data;
    size_t n_data;
    const char *out;          // adapter to write: a path ending in .gguf, or a folder for PEFT
    uint32_t rank;
    float alpha;              // 0: rank × 2
    // Comma-separated names of projections (attn_q, ..., ffn_down), or "all" of them; and of the tower of `images`: "vision.*", or
    // vision.attn_q, attn_k, attn_v, attn_out, ffn_up, ffn_down, proj (the projector). Whole names only.
    const char *targets;
    const char *layers;       // layers of the language model that get an adapter, as in keel_layers_parse(); NULL: all. What is below the
                              // lowest of them costs no backward pass
    double lr;
    const char *schedule;     // "constant", "linear" or "cosine", to 0 at the last step
    uint32_t warmup;          // steps of linear rise from 0
    uint64_t steps;           // optimiser steps; 0: from epochs
    double epochs;            // used when steps is 0
    bool no_steps;            // takes none: writes the adapter that training would start with
    uint32_t batch, accum;    // rows a micro-batch, micro-batches a step
    uint32_t seq_len;         // longest row in tokens; longer rows are an error
    uint64_t seed;
    bool no_shuffle;
    double beta1, beta2, eps, weight_decay;
    double grad_clip;         // 0: no clipping
    const char *init_adapter; // start from this adapter, or NULL
    // Adapters in force while training that stay as they are: `out` is trained on top of them, holds nothing of them, and is used with
    // them. At most 8. Their part of the vision tower counts if it is in force in `images` already (keel_images_add_adapter()).
    const struct keel_train_base { const char *path; float scale; } *frozen;
    size_t n_frozen;
    keel_images *images;      // for rows with images, or NULL; images that are not encoded yet are, before the first step
    const char *checkpoint;   // folder for the training state, or NULL: OUT.state
    bool resume;              // go on from the state in that folder, if there is one; without it an old state is overwritten
    uint64_t save_every;      // steps between states; 0: every five minutes; always at the end and on a stop
    // Constrained fine-tuning (Qi et al. 2024, arXiv 2406.05946): a token's loss is weighted by 2 (1 - σ(β (log π - log π0))), at least
    // 1e-3, with its probabilities under the model as it is and under the base: what the base already says less likely than the model
    // is learnt less. β of the first token of each response, of tokens 2 to 5, and of the others; the paper has 0.5, 2, 0.1.
    // All 0: the plain loss. Costs one forward pass over the data and 8 bytes a loss token.
    double constrain[3];
    // Lisa (Huang et al. 2024, arXiv 2405.18641): lisa_align steps on rows of lisa_data take turns with lisa_task steps on the data, and
    // each step adds ρ/2 · |w - w_other|², w_other being the adapter as the other kind of steps left it; not in the first tenth of the
    // steps. `steps` counts both; `epochs` are of the data. Costs two more copies of the adapter and lisa_align/lisa_task more steps.
    const char *lisa_data;    // JSONL rows as in `data`; NULL: off
    uint32_t lisa_align, lisa_task;
    double lisa_rho;
    // Divergence from the base (2602.07852): adds kl_weight times the mean of KL(base ‖ adapted) over the loss tokens of kl_rows rows of
    // kl_data a step. The base is the model without any adapter and hook; of its predictions the 64 likeliest tokens and the rest as
    // one are kept (516 bytes a loss token of the file), so what is held down is a lower bound of the divergence. The adapted
    // model is the one that will be used: without `hooks`. Costs one forward pass over the file, and kl_rows more rows a step.
    const char *kl_data;      // JSONL rows as in `data`; NULL: none
    double kl_weight;         // λ; the literature uses 0.1 to 10
    uint32_t kl_rows;
    // Measures the metrics that the rows allow: {"prompt","completion"} and chats as in `data`, contrastive probes {"prompt","chosen",
    // "rejected"}, slot probes {"prompt","prefix"?,"aligned","contrary"}; in probes "messages" may stand for "prompt".
    const char *monitor;      // JSONL; NULL: none
    uint32_t monitor_every;   // steps; also after the last one
    struct keel_monitor_direction monitor_direction;
    const struct keel_guard *guard; // [n_guard] limits; the first measurement above one ends the run
    size_t n_guard;
    enum keel_on_breach on_breach;
    const keel_hooks *hooks;  // steer while training (preventative steering); the adapter is used without. NULL: none
    const char *log;          // JSONL, one line a step, or NULL
    bool (*on_step)(void *user, const struct keel_step_info *info); // false: stop after this step, state saved. May be NULL
    void *user;
};
#define KEEL_TRAIN_DEFAULTS                                                                                                        \
    .rank = 16, .targets = "all", .lr = 2e-4, .schedule = "constant", .epochs = 1, .batch = 4, .accum = 1, .seq_len = 512,         \
    .seed = 1, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.0, .grad_clip = 1.0,          \
    .lisa_align = 100, .lisa_task = 900, .lisa_rho = 1.0, .kl_weight = 1.0, .kl_rows = 4, .monitor_every = 10,

// The measurement that ended a run: above a limit, or NaN: could not be measured.
struct keel_breach {
    struct keel_guard guard;
    double value;
    uint64_t step;
};
struct keel_train_result {
    uint64_t steps;
    double first_loss, last_loss;
    uint64_t tokens;
    double seconds;
    uint64_t n_rows, n_params; // data rows, trained parameters
    uint64_t data_hash;
    bool breached;          // a guard's limit was exceeded and the adapter is that of step `steps`
    struct keel_breach breach; // where `breached`
    double prepare_seconds; // of `seconds`: what the base predicts, before the first step
};

// Trains and writes the adapter. The gradient of a step is that of the mean loss over all its loss tokens, however the step is
// split into micro-batches. Deterministic for a device and a seed; going on from a state gives the same bits as never stopping.
// Errors: ARG, DATA (file and line), NO_MEMORY (with the plan), MISMATCH (state of another run), NUMERIC (loss not finite: the last state
// is kept), INTERRUPTED (asked to stop: state saved), OVER_BUDGET (says which limit), IO.
KEEL_API keel_status keel_train(keel_model *model, const struct keel_train_params *params, struct keel_train_result *result);

// Converts adapters between llama.cpp's GGUF and PEFT folders (direction from the name of `to`: *.gguf or a folder).
KEEL_API keel_status keel_adapter_convert(const keel_model *model, const char *from, const char *to);

#ifdef __cplusplus
}
#endif
#endif
