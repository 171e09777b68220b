// SPDX-License-Identifier: MIT
// bench/bench.c: times an image, prefill, decode and training, then repeats each with a timestamp around every dispatch.
// Uses the public session and the training pass of the models room. Does not know what an op computes.
#include "trace.h"

#include "base.h"
#include "platform.h"
#include "device.h"
#include "models.h"

#include <keel/bench.h>
#include <keel/session.h>

#include <stdlib.h>
#include <string.h>
#include <time.h>

struct bench {
    keel_model *model;
    keel_device *dev;
    const keel_log *log;
    struct keel_bench_params p;
    struct keel_bench_result *result;
    int32_t *ids; // random tokens, enough for any phase
    uint32_t n_ids;
    keel_vision *vision;      // NULL: no tower
    float *patches, *embeds;  // of one image: what goes into the tower, and soft tokens
    struct trace *trace; // NULL: none asked for
};

// What one phase needs; opened anew for the profiled run because only recorders made while profiling is on are timed.
struct rig {
    keel_session *session;
    keel_adapter *adapter;
    keel_trainer *trainer;
    keel_heap *heap;
    struct keel_span grads;
    keel_vision *vision; // to be unloaded
};

static void rig_close(struct rig *r)
{
    if (r->vision) {
        keel_vision_unload(r->vision);
    }
    r->vision = NULL;
    keel_session_destroy(&r->session);
    keel_trainer_destroy(&r->trainer);
    keel_adapter_destroy(&r->adapter);
    keel_heap_destroy(&r->heap);
}

// --- phases --------------------------------------------------------------------------------------

// The weights are there before the clock starts; after the last run they go, since the model needs the room.
static keel_status image_open(struct rig *r, struct bench *b)
{
    r->vision = b->vision;
    return keel_vision_load(b->vision, b->dev);
}

static keel_status image_run(struct rig *r, struct bench *b, uint64_t *tokens)
{
    *tokens = keel_vision_info(b->vision)->n_tokens;
    return keel_vision_run(r->vision, b->dev, b->patches, b->embeds);
}

static keel_status session_open(struct rig *r, struct bench *b, uint32_t n_ctx)
{
    return keel_session_create(&r->session, b->model,
                               &(struct keel_session_params){ .n_ctx = n_ctx, .n_batch = b->p.n_batch, .kv = b->p.kv });
}

static keel_status prefill_open(struct rig *r, struct bench *b)
{
    return session_open(r, b, b->p.n_prompt);
}

static keel_status prefill_run(struct rig *r, struct bench *b, uint64_t *tokens)
{
    keel_session_reset(r->session);
    *tokens = b->p.n_prompt;
    return keel_session_append(r->session, b->ids, b->p.n_prompt);
}

static keel_status decode_open(struct rig *r, struct bench *b)
{
    return session_open(r, b, b->p.n_context + b->p.n_generate);
}

// The prompt is put there before the clock starts, once: a long one takes far longer than what is measured.
static keel_status decode_prepare(struct rig *r, struct bench *b)
{
    if (keel_session_length(r->session) > 0 && b->p.n_generate <= keel_session_batch_tokens(r->session)) {
        return keel_session_take_back(r->session, b->p.n_generate);
    }
    keel_session_reset(r->session);
    return keel_session_append(r->session, b->ids, b->p.n_context);
}

static keel_status decode_run(struct rig *r, struct bench *b, uint64_t *tokens)
{
    keel_status st = KEEL_OK;
    *tokens = b->p.n_generate;
    for (uint32_t i = 0; st == KEEL_OK && i < b->p.n_generate; i++) {
        st = keel_session_append(r->session, &b->ids[b->p.n_context + i], 1);
    }
    return st;
}

static keel_status train_open(struct rig *r, struct bench *b)
{
    keel_status st = KEEL_OK;
    uint32_t targets;
    const uint32_t tokens = b->p.train_rows * b->p.train_row;
    void *zero = NULL;
    KEEL_TRY(keel_targets_parse("all", &targets, b->log));
    KEEL_TRY(keel_adapter_create(&r->adapter, b->model, b->p.rank, (float)b->p.rank * 2.0f, targets, NULL, 1));
    KEEL_TRY(keel_heap_create(&r->heap, b->dev, KEEL_HEAP_DEVICE, "gradients"));
    KEEL_TRY(keel_heap_alloc(r->heap, r->adapter->params.bytes, &r->grads));
    zero = calloc(1, r->grads.bytes);
    if (!zero) {
        KEEL_FAIL(b->log, KEEL_ERR_NO_MEMORY, "out of memory");
    }
    KEEL_TRY(keel_upload(b->dev, r->grads, zero, r->grads.bytes));
    KEEL_TRY(keel_trainer_create(&r->trainer, b->model, tokens, b->p.train_row, tokens));
out:
    free(zero);
    return st;
}

// Half prompt, half answer: the usual shape of a row. An image stands after the first token.
static keel_status train_rows(struct rig *r, struct bench *b, const struct keel_image_tokens *image, uint64_t *tokens)
{
    struct keel_seq *seqs = calloc(b->p.train_rows, sizeof *seqs);
    keel_status st = KEEL_OK;
    double nll;
    uint64_t n_loss;
    if (!seqs) {
        KEEL_FAIL(b->log, KEEL_ERR_NO_MEMORY, "out of memory");
    }
    *tokens = (uint64_t)b->p.train_rows * b->p.train_row;
    for (uint32_t i = 0; i < b->p.train_rows; i++) {
        const uint32_t prompt = image ? image->at + image->n : 0;
        seqs[i] = (struct keel_seq){ .ids = b->ids + i, .n = b->p.train_row, .first = KEEL_MAX(b->p.train_row / 2, prompt),
                                     .weight = 1.0f / (float)*tokens, .images = image, .n_images = image ? 1 : 0 };
    }
    KEEL_TRY(keel_trainer_step(r->trainer, r->adapter, r->grads, seqs, b->p.train_rows, &nll, &n_loss));
out:
    free(seqs);
    return st;
}

static keel_status train_run(struct rig *r, struct bench *b, uint64_t *tokens)
{
    return train_rows(r, b, NULL, tokens);
}

static keel_status train_image_run(struct rig *r, struct bench *b, uint64_t *tokens)
{
    const struct keel_image_tokens image = { .at = 1, .n = keel_vision_info(b->vision)->n_tokens, .embeds = b->embeds };
    return train_rows(r, b, &image, tokens);
}

struct phase {
    const char *name;
    keel_status (*open)(struct rig *r, struct bench *b);
    keel_status (*prepare)(struct rig *r, struct bench *b); // may be NULL
    keel_status (*run)(struct rig *r, struct bench *b, uint64_t *tokens);
};

// Least time in nanoseconds that the measured peaks allow; 0 if they are unknown.
static double least_ns(const struct keel_caps *caps, const struct keel_profile_row *row)
{
    if (caps->gflops <= 0 || caps->gbps <= 0) {
        return 0;
    }
    const double compute_ns = (double)row->flops / caps->gflops;
    const double memory_ns = (double)row->bytes / caps->gbps;
    return KEEL_MAX(compute_ns, memory_ns);
}

static void collect_ops(struct bench *b, struct keel_bench_phase *out)
{
    struct keel_profile_row rows[KEEL_COUNT(out->op)];
    const size_t n = KEEL_MIN(keel_profile_rows(b->dev, rows, KEEL_COUNT(rows)), KEEL_COUNT(rows));
    double roof_ns = 0;
    for (size_t i = 0; i < n; i++) {
        struct keel_bench_op *op = &out->op[out->n_ops++];
        const double least = least_ns(keel_device_caps(b->dev), &rows[i]);
        *op = (struct keel_bench_op){
            .count = rows[i].count, .ns = rows[i].ns, .flops = rows[i].flops, .bytes = rows[i].bytes,
            .roof = rows[i].ns ? least / (double)rows[i].ns : 0,
        };
        strncpy(op->label, rows[i].label, sizeof op->label - 1);
        roof_ns += least;
        out->op_ns += op->ns;
        out->op_flops += op->flops;
    }
    out->roof = out->op_ns ? roof_ns / (double)out->op_ns : 0;
}

static keel_status profile_phase(struct bench *b, const struct phase *ph, struct keel_bench_phase *out)
{
    keel_status st = KEEL_OK;
    struct rig r = { 0 };
    uint64_t tokens;
    keel_profile_enable(b->dev, true);
    KEEL_TRY(ph->open(&r, b));
    if (ph->prepare) {
        KEEL_TRY(ph->prepare(&r, b));
    }
    keel_profile_reset(b->dev);
    KEEL_TRY(ph->run(&r, b, &tokens));
    collect_ops(b, out);
    if (b->trace) {
        keel_trace_add(b->trace, b->dev, ph->name);
    }
out:
    rig_close(&r);
    keel_profile_enable(b->dev, false);
    return st;
}

// One run; what it took counts if it was the `first` or the best.
static keel_status time_run(struct bench *b, const struct phase *ph, struct rig *r, bool first, struct keel_bench_phase *out)
{
    uint64_t dispatches[2], submits[2], barriers;
    keel_device_counts(b->dev, &dispatches[0], &submits[0], &barriers);
    const uint64_t busy = keel_device_busy_ns(b->dev), start = keel_now_ns();
    const clock_t cpu = clock();
    const keel_status st = ph->run(r, b, &out->tokens);
    const double seconds = (double)(keel_now_ns() - start) * 1e-9, cpu_seconds = (double)(clock() - cpu) / CLOCKS_PER_SEC;
    keel_device_counts(b->dev, &dispatches[1], &submits[1], &barriers);
    if (st == KEEL_OK && (first || cpu_seconds < out->cpu_seconds)) {
        out->cpu_seconds = cpu_seconds;
    }
    if (st == KEEL_OK && (first || seconds < out->seconds)) {
        out->seconds = seconds;
        out->host_seconds = KEEL_MAX(seconds - (double)(keel_device_busy_ns(b->dev) - busy) * 1e-9, 0.0);
        out->dispatches = dispatches[1] - dispatches[0];
        out->submits = submits[1] - submits[0];
    }
    return st;
}

static keel_status time_phase(struct bench *b, const struct phase *ph)
{
    keel_status st = KEEL_OK;
    struct rig r = { 0 };
    struct keel_bench_phase *out = &b->result->phase[b->result->n_phases];
    out->name = ph->name;
    KEEL_TRY(ph->open(&r, b));
    for (uint32_t i = 0; i < b->p.repeats; i++) {
        if (keel_interrupted()) {
            st = KEEL_INTERRUPTED;
            goto out;
        }
        if (b->p.progress) {
            b->p.progress(b->p.user, ph->name, i, b->p.repeats);
        }
        if (ph->prepare) {
            KEEL_TRY(ph->prepare(&r, b));
        }
        KEEL_TRY(time_run(b, ph, &r, i == 0, out));
    }
    out->tokens_per_second = out->seconds > 0 ? (double)out->tokens / out->seconds : 0;
    rig_close(&r);
    if (b->p.ops && keel_device_caps(b->dev)->timestamps) {
        KEEL_TRY(profile_phase(b, ph, out));
    }
    b->result->n_phases++;
out:
    rig_close(&r);
    return st;
}

static keel_status draw_ids(struct bench *b)
{
    struct keel_rng rng = keel_rng_make(1, 0);
    const uint32_t vocab = keel_model_info(b->model)->vocab;
    b->n_ids = KEEL_MAX(b->p.n_prompt, b->p.n_context + b->p.n_generate);
    b->n_ids = KEEL_MAX(b->n_ids, b->p.train_rows + b->p.train_row);
    b->ids = malloc(b->n_ids * sizeof *b->ids);
    if (!b->ids) {
        KEEL_ERROR(b->log, "out of memory");
        return KEEL_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < b->n_ids; i++) {
        b->ids[i] = (int32_t)keel_rng_below(&rng, vocab);
    }
    return KEEL_OK;
}

// Noise as patches and, until an image was run, as soft tokens.
static keel_status draw_image(struct bench *b)
{
    keel_status st = KEEL_OK;
    struct keel_rng rng = keel_rng_make(1, 1);
    b->vision = b->p.images ? keel_images_vision(b->p.images) : NULL;
    if (!b->vision) {
        return KEEL_OK;
    }
    const struct keel_vision_info *v = keel_vision_info(b->vision);
    const size_t n_patches = (size_t)keel_vision_patch_count(b->vision) * 3 * v->patch * v->patch, n_embeds = (size_t)v->n_tokens * v->out_width;
    if (b->p.train_rows && b->p.train_row < v->n_tokens + 2) {
        KEEL_FAIL(b->log, KEEL_ERR_ARG, "rows of %u tokens have no room for an image of %u; train on rows of at least %u, or on none",
                  b->p.train_row, v->n_tokens, v->n_tokens + 2);
    }
    b->patches = malloc(n_patches * sizeof *b->patches);
    b->embeds = malloc(n_embeds * sizeof *b->embeds);
    if (!b->patches || !b->embeds) {
        KEEL_FAIL(b->log, KEEL_ERR_NO_MEMORY, "no memory for an image");
    }
    for (size_t i = 0; i < n_patches; i++) {
        b->patches[i] = (float)keel_rng_uniform(&rng) * 2.0f - 1.0f;
    }
    for (size_t i = 0; i < n_embeds; i++) {
        b->embeds[i] = (float)keel_rng_normal(&rng);
    }
out:
    return st;
}

keel_status keel_bench(keel_model *model, const struct keel_bench_params *params, struct keel_bench_result *result)
{
    static const struct phase image = { "image", image_open, NULL, image_run };
    static const struct phase train_image = { "train_image", train_open, NULL, train_image_run };
    static const struct phase prefill = { "prefill", prefill_open, NULL, prefill_run };
    static const struct phase decode = { "decode", decode_open, decode_prepare, decode_run };
    static const struct phase train = { "train", train_open, NULL, train_run };
    keel_status st = KEEL_OK;
    struct bench b = {
        .model = model,
        .dev = keel_model_device(model),
        .p = params ? *params : (struct keel_bench_params){ KEEL_BENCH_DEFAULTS },
        .result = result,
    };
    memset(result, 0, sizeof *result);
    if (!b.dev) {
        KEEL_FAIL(NULL, KEEL_ERR_ARG, "keel_bench: the model is not loaded onto a device");
    }
    b.log = keel_device_log(b.dev);
    b.p.repeats = KEEL_MAX(b.p.repeats, 1u);
    b.p.n_context = KEEL_MAX(b.p.n_context, 1u);
    if (b.p.trace && !(b.p.ops && keel_device_caps(b.dev)->timestamps)) {
        KEEL_FAIL(b.log, KEEL_ERR_ARG, "%s: a trace needs the times of ops, %s", b.p.trace,
                  b.p.ops ? "and this device has no timestamps" : "which were turned off");
    }
    if (b.p.trace) {
        KEEL_TRY(keel_trace_create(&b.trace, b.log));
    }
    KEEL_TRY(keel_device_measure(b.dev));
    KEEL_TRY(draw_ids(&b));
    KEEL_TRY(draw_image(&b));
    result->gflops = keel_device_caps(b.dev)->gflops;
    result->gbps = keel_device_caps(b.dev)->gbps;
    if (b.vision) {
        KEEL_TRY(time_phase(&b, &image));
    }
    if (b.p.n_prompt) {
        KEEL_TRY(time_phase(&b, &prefill));
    }
    if (b.p.n_generate) {
        KEEL_TRY(time_phase(&b, &decode));
    }
    if (b.p.train_rows) {
        KEEL_TRY(time_phase(&b, &train));
    }
    if (b.p.train_rows && b.vision) {
        KEEL_TRY(time_phase(&b, &train_image));
    }
    uint64_t now;
    keel_device_memory(b.dev, &now, &result->peak_bytes);
    result->longest_submit_ns = keel_device_longest_submit_ns(b.dev);
    if (b.trace) {
        KEEL_TRY(keel_trace_write(b.trace, b.p.trace, keel_device_caps(b.dev)));
    }
out:
    keel_trace_destroy(&b.trace);
    free(b.ids);
    free(b.patches);
    free(b.embeds);
    return st;
}
