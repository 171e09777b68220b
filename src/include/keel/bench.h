// SPDX-License-Identifier: MIT
// keel/bench.h: how fast a model runs and trains on a device, and where the time goes.
#ifndef KEEL_BENCH_H
#define KEEL_BENCH_H

#include <keel/images.h>
#include <keel/model.h>

#ifdef __cplusplus
extern "C" {
#endif

struct keel_bench_params {
    uint32_t n_prompt;   // prefill: tokens of the prompt; 0: not measured
    uint32_t n_generate; // decode: tokens one after another; 0: not measured
    uint32_t n_context;  // after a prompt of so many
    const char *kv;      // prefill and decode: as in keel_session_params
    uint32_t train_rows, train_row; // training: rows of a micro-batch and tokens of each; 0 rows: not measured
    uint32_t rank;       // of the adapter trained, on all seven projections
    keel_images *images; // with the model's tower: an image through it, and training on rows with an image; NULL: neither
    uint32_t n_batch;    // tokens a pass takes at once
    uint32_t repeats;    // each phase so often; the best counts
    bool ops;            // run each phase once more with a timestamp around every dispatch
    const char *trace;   // with ops: write what ran when in those runs to this file, for Perfetto or chrome://tracing; NULL: no
    void (*progress)(void *user, const char *phase, uint32_t done, uint32_t total); // may be NULL
    void *user;
};
#define KEEL_BENCH_DEFAULTS                                                                                            \
    .n_prompt = 64, .n_generate = 8, .n_context = 16, .train_rows = 1, .train_row = 128, .rank = 16, .n_batch = 256, .repeats = 2, .ops = true,

struct keel_bench_op {
    char label[48];
    uint64_t count, ns, flops, bytes; // sums over the phase; flops and bytes as the ops declare them
    double roof; // least time by the measured peaks ÷ time taken; 0 if the peaks are unknown
};
struct keel_bench_phase {
    const char *name; // "image", "prefill", "decode", "train", "train_image"; static storage
    uint64_t tokens;  // of an image: soft tokens
    double seconds;   // best of the repeats
    double tokens_per_second;
    double cpu_seconds;  // least processor time of a run, all threads of the process: on a software driver the work itself, whatever else
                         // the machine does meanwhile
    double host_seconds; // of those `seconds`, while no submission was at work: recording, waiting for memory, bookkeeping
    uint64_t dispatches, submits; // of one run
    double roof;      // of all ops together, as in keel_bench_op
    struct keel_bench_op op[48];
    uint32_t n_ops;
    uint64_t op_ns, op_flops; // sums over all ops
};
struct keel_bench_result {
    struct keel_bench_phase phase[5];
    uint32_t n_phases;
    double gflops, gbps; // measured peaks
    uint64_t peak_bytes; // device memory, highest so far
    uint64_t longest_submit_ns;
};

// Measures. The tokens are drawn from a fixed seed; training steps do not change anything that outlives the call.
// NULL params: the defaults. `*result` is large (about 20 KiB). Errors: ARG (model not loaded, rows too short for an image), NO_MEMORY, DEVICE_LOST,
// NUMERIC, INTERRUPTED, IO (trace).
KEEL_API keel_status keel_bench(keel_model *model, const struct keel_bench_params *params, struct keel_bench_result *result);

#ifdef __cplusplus
}
#endif
#endif
