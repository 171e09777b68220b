// SPDX-License-Identifier: MIT
// doctor/whole.c: a whole model on the kernels in force: log-probabilities against golden ones, and one training step whose effect
// the gradient foretells. Kernels that pass alone may fail together, and a driver's compiler may fail on some shape of its own.
#include "base.h"
#include "device.h"
#include "models.h"
#include "platform.h"
#include "variants.h"

#include <keel/doctor.h>

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// fp32 in another order moves a log-probability of the clerk by about 1e-5 nats (docs/numerics.md); wrong kernels by whole nats.
#define TOLERANCE 1e-3
#define TOLERANCE_ROUGH 1e-2 // with a variant that rounds to f16, which --variant alone can bring about: 3e-3 nats
#define DROP 0.01       // nats that the training step should take off the loss: above rounding, small enough for the first order
#define DROP_PART 0.02  // and by what part the fall may miss that: the second order is below a thousandth of it

struct golden_row {
    int32_t *ids;
    double *logprobs; // [n - 1], of ids[1..n)
    uint32_t n;
};
struct golden {
    struct golden_row row[4];
    uint32_t n_rows;
};

static void golden_free(struct golden *g)
{
    for (uint32_t i = 0; i < g->n_rows; i++) {
        free(g->row[i].ids);
        free(g->row[i].logprobs);
    }
}

static bool read_row(struct golden_row *r, const json_t *row, uint32_t vocab)
{
    const json_t *ids = json_object_get(row, "ids"), *logprobs = json_object_get(row, "logprobs");
    bool ok = json_array_size(ids) >= 2 && json_array_size(logprobs) + 1 == json_array_size(ids);
    r->n = (uint32_t)json_array_size(ids);
    r->ids = calloc(KEEL_MAX(r->n, 1u), sizeof *r->ids);
    r->logprobs = calloc(KEEL_MAX(r->n, 1u), sizeof *r->logprobs);
    for (uint32_t i = 0; ok && r->ids && r->logprobs && i < r->n; i++) {
        const json_int_t id = json_integer_value(json_array_get(ids, i));
        ok = id >= 0 && id < (json_int_t)vocab;
        r->ids[i] = (int32_t)id;
        if (i > 0) {
            r->logprobs[i - 1] = json_number_value(json_array_get(logprobs, i - 1));
        }
    }
    return ok && r->ids && r->logprobs;
}

// Errors: FORMAT, MISMATCH (of another model).
static keel_status golden_read(struct golden *g, keel_model *model, const char *path)
{
    keel_status st = KEEL_OK;
    json_error_t error;
    char hash[17];
    const keel_log *log = keel_device_log(keel_model_device(model));
    json_t *doc = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (!doc) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s:%d: %s", path, error.line, error.text);
    }
    snprintf(hash, sizeof hash, "%016" PRIx64, keel_model_hash(model));
    const char *of = json_string_value(json_object_get(doc, "model_hash"));
    if (!of || strcmp(of, hash) != 0) {
        KEEL_FAIL(log, KEEL_ERR_MISMATCH, "%s: values of model %s, but %s is %s; make them anew with tests/oracle/make_golden.py", path,
                  of ? of : "none", keel_model_info(model)->path, hash);
    }
    const json_t *rows = json_object_get(doc, "rows");
    const size_t n = KEEL_MIN(json_array_size(rows), KEEL_COUNT(g->row));
    for (size_t i = 0; i < n; i++) {
        if (!read_row(&g->row[g->n_rows++], json_array_get(rows, i), keel_model_info(model)->vocab)) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: row %zu is no list of ids with one log-probability fewer", path, i);
        }
    }
    if (n == 0) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: no rows", path);
    }
out:
    json_decref(doc);
    return st;
}

static double tolerance(const keel_device *dev)
{
    bool exact = true;
    for (int f = 0; f < KEEL_N_FAMILIES; f++) {
        exact = exact && keel_variant_exact(keel_variant_of(dev, (enum keel_family)f));
    }
    return exact ? TOLERANCE : TOLERANCE_ROUGH;
}

// --- forward -------------------------------------------------------------------------------------

static keel_status check_forward(keel_model *model, const struct golden *g, struct keel_doctor_whole *out)
{
    keel_status st = KEEL_OK;
    keel_session *session = NULL;
    float *got = NULL;
    KEEL_TRY(keel_session_create(&session, model, &(struct keel_session_params){ .n_ctx = 256, .n_batch = 256 }));
    for (uint32_t i = 0; i < g->n_rows; i++) {
        const struct golden_row *r = &g->row[i];
        free(got);
        got = malloc(r->n * sizeof *got);
        if (!got) {
            KEEL_FAIL(keel_device_log(keel_model_device(model)), KEEL_ERR_NO_MEMORY, "out of memory");
        }
        struct keel_score_row row = { .ids = r->ids, .n = r->n, .first = 1, .logprobs = got };
        KEEL_TRY(keel_session_score(session, &row, 1, NULL, NULL));
        for (uint32_t k = 0; k + 1 < r->n; k++) {
            const double off = fabs((double)got[k] - r->logprobs[k]);
            out->worst = KEEL_MAX(out->worst, isnan(off) ? INFINITY : off);
            out->n_tokens++;
        }
    }
    out->forward_right = out->worst <= tolerance(keel_model_device(model));
out:
    free(got);
    keel_session_destroy(&session);
    return st;
}

// --- training step -------------------------------------------------------------------------------

struct step {
    keel_device *dev;
    keel_adapter *adapter;
    keel_trainer *trainer;
    keel_heap *heap;
    keel_recorder *rec;
    struct keel_span grads, m, v, sums, partial;
    struct keel_seq seq;
    double loss, slope; // Σ |gradient|
};

static keel_status step_open(struct step *s, keel_model *model, const struct golden_row *row)
{
    keel_status st = KEEL_OK;
    uint32_t targets;
    KEEL_TRY(keel_targets_parse("all", &targets, keel_device_log(s->dev)));
    KEEL_TRY(keel_adapter_create(&s->adapter, model, 4, 8.0f, targets, NULL, 1));
    const uint64_t bytes = s->adapter->n_floats * 4;
    KEEL_TRY(keel_heap_create(&s->heap, s->dev, KEEL_HEAP_DEVICE, "check of training"));
    KEEL_TRY(keel_heap_alloc(s->heap, 256, &s->sums));
    KEEL_TRY(keel_heap_alloc(s->heap, KEEL_MAX(keel_sumsq_scratch(s->adapter->n_floats), 256), &s->partial));
    struct keel_span *const states[] = { &s->grads, &s->m, &s->v };
    KEEL_TRY(keel_recorder_create(&s->rec, s->dev, NULL));
    for (size_t i = 0; i < KEEL_COUNT(states); i++) {
        KEEL_TRY(keel_heap_alloc(s->heap, bytes, states[i]));
        keel_record_fill(s->rec, *states[i], 0);
    }
    KEEL_TRY(keel_recorder_submit(s->rec));
    KEEL_TRY(keel_recorder_wait(s->rec));
    s->seq = (struct keel_seq){ .ids = row->ids, .n = row->n, .first = 1, .weight = 1.0f / (float)(row->n - 1) };
    KEEL_TRY(keel_trainer_create(&s->trainer, model, row->n, row->n, row->n));
out:
    return st;
}

static void step_close(struct step *s)
{
    keel_trainer_destroy(&s->trainer);
    keel_recorder_destroy(&s->rec);
    keel_heap_destroy(&s->heap);
    keel_adapter_destroy(&s->adapter);
}

// Loss and gradient of the row; the gradient is added to s->grads.
static keel_status gradient(struct step *s)
{
    uint64_t n = 0;
    const keel_status st = keel_trainer_step(s->trainer, s->adapter, s->grads, &s->seq, 1, &s->loss, &n);
    s->loss /= (double)KEEL_MAX(n, 1u);
    return st;
}

// The first step of Adam moves each weight by the learning rate against the sign of its gradient: the loss should fall by the
// learning rate times Σ |gradient|.
static keel_status update(struct step *s)
{
    keel_status st = KEEL_OK;
    float *g = malloc(s->grads.bytes);
    if (!g) {
        KEEL_FAIL(keel_device_log(s->dev), KEEL_ERR_NO_MEMORY, "out of memory");
    }
    KEEL_TRY(keel_download(s->dev, g, s->grads, s->grads.bytes));
    for (uint64_t i = 0; i < s->adapter->n_floats; i++) {
        s->slope += fabs((double)g[i]);
    }
    keel_sumsq(s->rec, s->grads, s->partial, s->sums, s->adapter->n_floats);
    keel_adamw(s->rec, &(struct keel_adamw_params){
        .w = keel_span_sub(s->adapter->params, 0, s->grads.bytes), .g = s->grads, .m = s->m, .v = s->v, .sums = s->sums,
        .n = s->adapter->n_floats, .lr = (float)(DROP / KEEL_MAX(s->slope, 1e-30)), .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-12f,
        .bias1 = 0.1f, .bias2 = 0.001f });
    KEEL_TRY(keel_recorder_submit(s->rec));
    KEEL_TRY(keel_recorder_wait(s->rec));
out:
    free(g);
    return st;
}

static keel_status check_step(keel_model *model, const struct golden *g, struct keel_doctor_whole *out)
{
    keel_status st = KEEL_OK;
    struct step s = { .dev = keel_model_device(model) };
    KEEL_TRY(step_open(&s, model, &g->row[g->n_rows - 1]));
    KEEL_TRY(gradient(&s));
    out->loss_before = s.loss;
    KEEL_TRY(update(&s));
    KEEL_TRY(gradient(&s));
    out->loss_after = s.loss;
    out->fall_foretold = DROP;
    out->step_right = fabs((out->loss_before - out->loss_after) / DROP - 1) <= DROP_PART; // false for NaN
out:
    step_close(&s);
    return st;
}

keel_status keel_doctor_model(keel_model *model, const char *golden_path, struct keel_doctor_whole *out)
{
    keel_status st = KEEL_OK;
    struct golden g = { 0 };
    *out = (struct keel_doctor_whole){ 0 };
    KEEL_TRY(golden_read(&g, model, golden_path));
    KEEL_TRY(check_forward(model, &g, out));
    KEEL_TRY(check_step(model, &g, out));
out:
    golden_free(&g);
    return st;
}
