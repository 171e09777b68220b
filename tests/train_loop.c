// SPDX-License-Identifier: MIT
// tests/train_loop.c: keel_train() from end to end on a stand-in for the models room, whose loss is a
// parabola for each token: the loop, the optimiser on the device, states, logs and errors, without a model.
#include "models.h"
#include "platform.h"

#include <keel/train.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 3000, RANK = 4 };

static keel_device *dev;
static char said[8000];
static uint32_t nan_at_step; // the trainer's loss is not a number at this call, if above 0
static uint32_t calls;
static uint64_t plan_bytes;
static float weight_sum; // Σ weight over loss places of the last step's micro-batches

static void hear(void *user, enum keel_log_level level, const char *text)
{
    (void)user;
    if (level == KEEL_LOG_ERROR) {
        snprintf(said + strlen(said), sizeof said - strlen(said), "%s\n", text);
    }
}
static const keel_log ear = { .level = KEEL_LOG_ERROR, .write = hear };

// --- the stand-in --------------------------------------------------------------------------------

struct keel_trainer {
    float w[N], g[N];
};

const char *const keel_proj_name[KEEL_N_PROJ] = { "attn_q" };

keel_device *keel_model_device(const keel_model *model)
{
    (void)model;
    return dev;
}

const struct keel_model_info *keel_model_info(const keel_model *model)
{
    static const struct keel_model_info info = { .context = 64 };
    (void)model;
    return &info;
}

uint64_t keel_model_hash(keel_model *model)
{
    (void)model;
    return 42;
}

keel_status keel_targets_parse(const char *text, uint32_t *bits, const keel_log *log)
{
    (void)log;
    *bits = 1;
    return strcmp(text, "all") == 0 ? KEEL_OK : KEEL_ERR_ARG;
}

// The vision tower: a run without images has none.
void keel_model_use_vision(keel_model *model, keel_vision *vision)
{
    (void)model;
    assert_null(vision);
}

bool keel_adapter_pair_wanted(const keel_model *model, uint32_t i, uint32_t targets, const uint8_t *layers)
{
    (void)model;
    (void)targets;
    (void)layers;
    return i == 0;
}

void keel_adapter_pair_name(const keel_model *model, uint32_t i, char name[64])
{
    (void)model;
    snprintf(name, 64, "pair %u", i);
}

keel_vision *keel_images_vision(keel_images *images)
{
    (void)images;
    return NULL;
}

keel_status keel_image_trainer_create(keel_image_trainer **out, keel_model *model, keel_images *images, keel_trainer *trainer)
{
    (void)model;
    (void)images;
    (void)trainer;
    *out = NULL;
    return KEEL_ERR_ARG;
}

void keel_image_trainer_destroy(keel_image_trainer **trainer)
{
    assert_null(*trainer);
}

keel_status keel_image_trainer_forward(keel_image_trainer *trainer, const keel_adapter *adapter, const struct keel_seq *seqs,
                                       size_t n_seqs)
{
    (void)trainer;
    (void)adapter;
    (void)seqs;
    (void)n_seqs;
    return KEEL_ERR_ARG;
}

keel_status keel_image_trainer_backward(keel_image_trainer *trainer, const keel_adapter *adapter, struct keel_span grads,
                                        const struct keel_seq *seqs, size_t n_seqs)
{
    (void)grads;
    return keel_image_trainer_forward(trainer, adapter, seqs, n_seqs);
}

keel_status keel_model_plan(const keel_model *model, const struct keel_plan_params *p, struct keel_plan *out)
{
    (void)model;
    assert_int_equal(p->train_rank, RANK);
    *out = (struct keel_plan){ .row = { { "LoRA weights", plan_bytes, false } },
                               .n_rows = 1,
                               .device_bytes = plan_bytes };
    return KEEL_OK;
}

keel_status keel_adapter_create(keel_adapter **out, keel_model *model, uint32_t rank, float alpha,
                                uint32_t targets, const uint8_t *layers, uint64_t seed)
{
    (void)model;
    (void)targets;
    assert_null(layers);
    float w[N];
    struct keel_rng rng = keel_rng_make(seed, 0);
    keel_adapter *a = calloc(1, sizeof *a);
    *a = (keel_adapter){ .rank = rank, .alpha = alpha, .n_layers = 1, .n_floats = N, .n_params = N };
    assert_int_equal(keel_heap_create(&a->heap, dev, KEEL_HEAP_DEVICE, "adapter"), KEEL_OK);
    assert_int_equal(keel_heap_alloc(a->heap, N * sizeof(float), &a->params), KEEL_OK);
    for (size_t i = 0; i < N; i++) {
        w[i] = (float)keel_rng_uniform(&rng);
    }
    assert_int_equal(keel_upload(dev, a->params, w, sizeof w), KEEL_OK);
    *out = a;
    return KEEL_OK;
}

keel_status keel_adapter_load(keel_adapter **out, keel_model *model, const char *path, float scale)
{
    (void)path;
    (void)scale;
    return keel_adapter_create(out, model, RANK, 8, 1, NULL, 1);
}

void keel_adapter_destroy(keel_adapter **a)
{
    if (*a) {
        keel_heap_destroy(&(*a)->heap);
        free(*a);
        *a = NULL;
    }
}

keel_status keel_adapter_save(const keel_adapter *a, const keel_model *model, const char *path)
{
    (void)model;
    float w[N];
    assert_int_equal(keel_download(dev, w, a->params, sizeof w), KEEL_OK);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fwrite(w, sizeof w, 1, f);
    fclose(f);
    return KEEL_OK;
}

void keel_trainer_set_frozen(keel_trainer *t, keel_adapter *const *adapters, uint32_t n)
{
    (void)t;
    (void)adapters;
    assert_int_equal(n, 0);
}

keel_status keel_trainer_create(keel_trainer **out, keel_model *model, uint32_t max_tokens, uint32_t max_row,
                                uint32_t max_loss)
{
    (void)model;
    assert_true(max_tokens >= max_row && max_loss > 0 && max_loss < max_tokens);
    *out = calloc(1, sizeof **out);
    return KEEL_OK;
}

// Layers are not chosen here.
keel_status keel_layers_parse(const char *text, uint8_t *use, uint32_t n, const keel_log *log)
{
    (void)text;
    (void)use;
    (void)n;
    (void)log;
    return KEEL_ERR_ARG;
}

// Hooks belong to the models room; no run here has any.
keel_status keel_trainer_set_hooks(keel_trainer *t, const keel_hooks *hooks)
{
    (void)t;
    assert_null(hooks);
    return KEEL_OK;
}

uint64_t keel_hooks_hash(const keel_hooks *hooks, uint64_t hash)
{
    assert_null(hooks);
    return hash;
}

void keel_trainer_set_step(keel_trainer *t, uint64_t done)
{
    (void)t;
    (void)done;
}

void keel_trainer_destroy(keel_trainer **t)
{
    free(*t);
    *t = NULL;
}

// nll of token id: (w[id] - 1)² summed with its next 20 neighbours.
keel_status keel_trainer_step(keel_trainer *t, const keel_adapter *a, struct keel_span grads,
                              const struct keel_seq *seqs, size_t n_seqs, double *nll_sum, uint64_t *n_loss)
{
    assert_int_equal(keel_download(dev, t->w, a->params, sizeof t->w), KEEL_OK);
    assert_int_equal(keel_download(dev, t->g, grads, sizeof t->g), KEEL_OK);
    *nll_sum = 0;
    *n_loss = 0;
    for (size_t s = 0; s < n_seqs; s++) {
        for (uint32_t i = seqs[s].first; i < seqs[s].n; i++) {
            if (seqs[s].mask && !seqs[s].mask[i]) {
                continue;
            }
            for (int32_t k = seqs[s].ids[i]; k < seqs[s].ids[i] + 20; k++) {
                *nll_sum += (double)(t->w[k] - 1) * (t->w[k] - 1);
                t->g[k] += seqs[s].weight * 2 * (t->w[k] - 1);
            }
            weight_sum += seqs[s].weight;
            ++*n_loss;
        }
    }
    assert_int_equal(keel_upload(dev, grads, t->g, sizeof t->g), KEEL_OK);
    *nll_sum = ++calls == nan_at_step ? NAN : *nll_sum;
    return KEEL_OK;
}

// No run here is held to a base.
keel_status keel_trainer_top(keel_trainer *t, const struct keel_seq *seqs, size_t n_seqs, struct keel_top *out)
{
    (void)t;
    (void)seqs;
    (void)n_seqs;
    (void)out;
    return KEEL_ERR_ARG;
}

keel_status keel_trainer_kl_step(keel_trainer *t, const keel_adapter *a, struct keel_span grads,
                                 const struct keel_seq *seqs, size_t n_seqs, double *kl_sum, uint64_t *n)
{
    (void)a;
    (void)grads;
    *kl_sum = 0;
    *n = 0;
    return keel_trainer_top(t, seqs, n_seqs, NULL);
}

keel_status keel_trainer_eval(keel_trainer *t, const keel_adapter *a, const struct keel_seq *seqs, size_t n_seqs,
                              float *logprob, float *kl)
{
    (void)a;
    (void)logprob;
    (void)kl;
    return keel_trainer_top(t, seqs, n_seqs, NULL);
}

double keel_trainer_weighted(const keel_trainer *t)
{
    (void)t;
    return 0;
}

keel_status keel_hooks_create(keel_hooks **out, keel_model *model)
{
    (void)out;
    (void)model;
    return KEEL_ERR_ARG;
}

void keel_hooks_destroy(keel_hooks **hooks)
{
    assert_null(*hooks);
}

keel_status keel_hooks_add_capture(keel_hooks *hooks, enum keel_site site, uint32_t layer, struct keel_positions at,
                                   void (*fn)(void *user, const struct keel_capture_call *call), void *user)
{
    (void)hooks;
    (void)site;
    (void)layer;
    (void)at;
    (void)fn;
    (void)user;
    return KEEL_ERR_ARG;
}

keel_status keel_hooks_after_batch(keel_hooks *hooks, struct keel_positions at,
                                   keel_status (*fn)(void *user, const struct keel_batch_tokens *tokens), void *user)
{
    (void)hooks;
    (void)at;
    (void)fn;
    (void)user;
    return KEEL_ERR_ARG;
}

// --- runs ----------------------------------------------------------------------------------------

static struct keel_train_data data = { "train_loop.jsonl", 1 };

static bool stop_at_three(void *user, const struct keel_step_info *info)
{
    (void)user;
    return info->step != 3;
}

static bool check_weights(void *user, const struct keel_step_info *info)
{
    (void)user;
    assert_true(fabsf(weight_sum - 1) <
                1e-5f); // the mean over all loss tokens of the step, whatever the micro-batches
    weight_sum = 0;
    assert_true(info->loss_tokens < info->tokens);
    return true;
}

static struct keel_train_params params(const char *out)
{
    said[0] = '\0';
    calls = 0;
    nan_at_step = 0;
    plan_bytes = 1000;
    weight_sum = 0;
    return (struct keel_train_params){ KEEL_TRAIN_DEFAULTS.data = &data,
                                       .n_data = 1,
                                       .out = out,
                                       .rank = RANK,
                                       .seq_len = 64,
                                       .lr = 0.05,
                                       .batch = 2,
                                       .accum = 2,
                                       .schedule = "cosine",
                                       .warmup = 1,
                                       .epochs = 2.5 };
}

static size_t slurp(const char *path, char *out, size_t cap)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    const size_t n = fread(out, 1, cap - 1, f);
    fclose(f);
    out[n] = '\0';
    return n;
}

static void clean(void)
{
    static const char *const names[] = { "a.gguf",       "a.gguf.state/state.safetensors",
                                         "a.gguf.state", "a.jsonl",
                                         "b.gguf",       "b.gguf.state/state.safetensors",
                                         "b.gguf.state", "b.jsonl" };
    for (size_t i = 0; i < KEEL_COUNT(names); i++) {
        char path[100];
        snprintf(path, sizeof path, "train_loop_%s", names[i]);
        remove(path);
    }
}

// A run stopped after step 3 and resumed writes the same bytes as one that never stopped.
static void test_resume(void **state)
{
    (void)state;
    static char a[100000], b[100000];
    struct keel_train_result r;
    struct keel_train_params p = params("train_loop_a.gguf");
    clean();
    p.log = "train_loop_a.jsonl";
    p.on_step = check_weights;
    assert_int_equal(keel_train(NULL, &p, &r), KEEL_OK);
    assert_int_equal(r.steps, 7); // 11 rows × 2.5 = 28 rows, 4 a step
    assert_int_equal(r.n_rows, 11);
    assert_int_equal(r.n_params, N);
    assert_true(r.last_loss < r.first_loss);
    p = params("train_loop_b.gguf");
    p.log = "train_loop_b.jsonl";
    p.on_step = stop_at_three;
    assert_int_equal(keel_train(NULL, &p, &r), KEEL_INTERRUPTED);
    assert_int_equal(r.steps, 3);
    assert_false(keel_path_exists(p.out));
    FILE *f = fopen(p.log, "ab"); // what a killed run leaves
    fputs("{\"step\": 4, \"loss\": 77}\n{\"st", f);
    fclose(f);
    p.on_step = NULL;
    p.resume = true;
    p.lr = 0.06;
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_MISMATCH);
    assert_non_null(strstr(said, "--lr was "));
    p.lr = 0.05;
    assert_int_equal(keel_train(NULL, &p, &r), KEEL_OK);
    assert_int_equal(r.steps, 7);
    const size_t n = slurp("train_loop_a.gguf", a, sizeof a);
    assert_int_equal(n, N * sizeof(float));
    assert_int_equal(slurp("train_loop_b.gguf", b, sizeof b), n);
    assert_memory_equal(a, b, n);
    const size_t m = slurp("train_loop_a.gguf.state/state.safetensors", a, sizeof a);
    assert_int_equal(slurp("train_loop_b.gguf.state/state.safetensors", b, sizeof b), m);
    assert_memory_equal(a, b, m);
    slurp("train_loop_a.jsonl", a, sizeof a);
    slurp("train_loop_b.jsonl", b, sizeof b);
    const char *x = a, *y = b;
    for (int step = 1; step <= 7; step++) { // the same lines but for the seconds
        const size_t len = (size_t)(strstr(x, "\"seconds\"") - x);
        assert_memory_equal(x, y, len);
        x = strchr(x, '\n') + 1;
        y = strchr(y, '\n') + 1;
    }
    assert_true(*x == '\0' && *y == '\0');
    clean();
}

// The update of a step whose loss is no number is not applied, and the last state stays.
static void test_not_finite(void **state)
{
    (void)state;
    static char a[100000], b[100000];
    struct keel_train_params p = params("train_loop_a.gguf");
    p.save_every = 2;
    p.steps = 2;
    p.schedule = "constant";
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_OK);
    const size_t n = slurp("train_loop_a.gguf.state/state.safetensors", a, sizeof a);
    p = params("train_loop_a.gguf");
    p.save_every = 2;
    p.steps = 9;
    p.schedule = "constant";
    nan_at_step = 6; // of two calls a step: step 3
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_NUMERIC);
    assert_non_null(strstr(said, "step 3"));
    assert_int_equal(slurp("train_loop_a.gguf.state/state.safetensors", b, sizeof b), n);
    assert_memory_equal(a, b, n);
    clean();
}

static void test_errors(void **state)
{
    (void)state;
    struct keel_train_params p = params("train_loop_a.gguf");
    p.rank = 0;
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_ARG);
    assert_non_null(strstr(said, "--rank"));
    p = params("train_loop_a.gguf");
    p.schedule = "cos";
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_ARG);
    assert_non_null(strstr(said, "--schedule cos"));
    p = params("train_loop_a.gguf");
    p.seq_len = 65;
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_ARG);
    assert_non_null(strstr(said, "context of 64"));
    p = params("train_loop_a.gguf");
    plan_bytes = UINT64_MAX / 2;
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_NO_MEMORY);
    assert_non_null(strstr(said, "LoRA weights"));
    p = params("train_loop.jsonl/a.gguf"); // below a file
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_IO);
    p = params("train_loop_a.gguf");
    p.log = "/train_loop/no such folder/a.jsonl";
    assert_int_equal(keel_train(NULL, &p, NULL), KEEL_ERR_IO);
    assert_non_null(strstr(said, p.log));
    assert_int_equal(calls, 0);
    clean();
}

static int set_up(void **state)
{
    (void)state;
    FILE *f = fopen(data.path, "wb");
    for (int i = 0; i < 10; i++) {
        fprintf(f, "{\"prompt\": \"p%d\", \"completion\": \"%.*s\", \"eos\": true}\n", i, i + 1,
                "completion");
    }
    fputs("{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"},"
          "{\"role\":\"user\",\"content\":\"c\"},{\"role\":\"assistant\",\"content\":\"d\"}]}\n",
          f);
    fclose(f);
    return keel_device_create(&dev, &(struct keel_device_params){ .no_cache = true }, &ear) == KEEL_OK ? 0
                                                                                                       : -1;
}

static int tear_down(void **state)
{
    (void)state;
    remove(data.path);
    keel_device_destroy(&dev);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
