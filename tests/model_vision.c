// SPDX-License-Identifier: MIT
// tests/model_vision.c: LoRA through the vision tower: gradients against central differences, training's forward pass against
// inference, adapters in force. Owns no oracle: tests/e2e compares tower and training with transformers and peft.
#include "formats_util.h"
#include "model_tiny.h"

#include "gemma3/vision_internal.h"

static const char model_path[] = "model_vision.gguf", tower_path[] = "model_vision_mmproj.gguf";
static const char image[] = IMAGES_DIR "/rgb.png";

// 576 patches: more than one part of a feed-forward layer. A grid of 24 that squares of 5 do not divide.
enum { IMAGE = 48, PATCH = 2, WIDTH = 24, FF = 40, HEADS = 3, LAYERS = 2, KERNEL = 5, OUT = 64, RANK = 3 };
enum { N_TOKENS = (IMAGE / PATCH / KERNEL) * (IMAGE / PATCH / KERNEL) };

// --- a small tower -------------------------------------------------------------------------------

static void put_tensor(struct tiny_file *f, const char *name, uint32_t n_dims, const uint64_t *dims, float mean, float scale)
{
    uint64_t n = 1;
    for (uint32_t i = 0; i < n_dims; i++) {
        n *= dims[i];
    }
    if (!f->data) {
        keel_gguf_put_tensor(f->w, name, KEEL_F32, n_dims, dims);
        return;
    }
    for (uint64_t i = 0; i < n; i++) {
        const float v = mean + scale * (float)keel_rng_normal(&f->rng);
        assert_int_equal(keel_gguf_writer_data(f->w, &v, sizeof v), KEEL_OK);
    }
}

static void put_vector(struct tiny_file *f, const char *name, uint64_t n, float mean)
{
    put_tensor(f, name, 1, &n, mean, 0.1f);
}

static void put_matrix(struct tiny_file *f, const char *name, uint64_t k, uint64_t n)
{
    put_tensor(f, name, 2, (const uint64_t[]){ k, n }, 0, 1.0f / sqrtf((float)k));
}

static void put_tensors(struct tiny_file *f)
{
    static const struct {
        const char *name;
        uint64_t k, n;
    } maps[] = { { "attn_q", WIDTH, WIDTH }, { "attn_k", WIDTH, WIDTH }, { "attn_v", WIDTH, WIDTH },
                 { "attn_out", WIDTH, WIDTH }, { "ffn_up", WIDTH, FF }, { "ffn_down", FF, WIDTH } };
    char name[64];
    put_tensor(f, "v.patch_embd.weight", 4, (const uint64_t[]){ PATCH, PATCH, 3, WIDTH }, 0, 0.3f);
    put_vector(f, "v.patch_embd.bias", WIDTH, 0);
    put_tensor(f, "v.position_embd.weight", 2, (const uint64_t[]){ WIDTH, (IMAGE / PATCH) * (IMAGE / PATCH) }, 0, 0.5f);
    put_vector(f, "v.post_ln.weight", WIDTH, 1);
    put_vector(f, "v.post_ln.bias", WIDTH, 0);
    put_vector(f, "mm.soft_emb_norm.weight", WIDTH, 1);
    put_tensor(f, "mm.input_projection.weight", 2, (const uint64_t[]){ OUT, WIDTH }, 0, 0.2f);
    for (uint32_t i = 0; i < LAYERS; i++) {
        for (size_t k = 0; k < KEEL_COUNT(maps); k++) {
            snprintf(name, sizeof name, "v.blk.%u.%s.weight", i, maps[k].name);
            put_matrix(f, name, maps[k].k, maps[k].n);
            snprintf(name, sizeof name, "v.blk.%u.%s.bias", i, maps[k].name);
            put_vector(f, name, maps[k].n, 0);
        }
        for (uint32_t k = 1; k <= 2; k++) {
            snprintf(name, sizeof name, "v.blk.%u.ln%u.weight", i, k);
            put_vector(f, name, WIDTH, 1);
            snprintf(name, sizeof name, "v.blk.%u.ln%u.bias", i, k);
            put_vector(f, name, WIDTH, 0);
        }
    }
}

static void write_tower(void)
{
    static const float half[3] = { 0.5f, 0.5f, 0.5f };
    struct tiny_file f = { .rng = keel_rng_make(30, 1) };
    f.f = fopen(tower_path, "wb");
    assert_non_null(f.f);
    assert_int_equal(keel_gguf_writer_create(&f.w, NULL), KEEL_OK);
    keel_gguf_put_str(f.w, "general.architecture", "clip");
    keel_gguf_put_str(f.w, "clip.projector_type", "gemma3");
    keel_gguf_put_bool(f.w, "clip.use_gelu", true);
    keel_gguf_put_u32(f.w, "clip.vision.image_size", IMAGE);
    keel_gguf_put_u32(f.w, "clip.vision.patch_size", PATCH);
    keel_gguf_put_u32(f.w, "clip.vision.embedding_length", WIDTH);
    keel_gguf_put_u32(f.w, "clip.vision.feed_forward_length", FF);
    keel_gguf_put_u32(f.w, "clip.vision.block_count", LAYERS);
    keel_gguf_put_u32(f.w, "clip.vision.attention.head_count", HEADS);
    keel_gguf_put_u32(f.w, "clip.vision.projection_dim", OUT);
    keel_gguf_put_u32(f.w, "clip.vision.projector.scale_factor", KERNEL);
    keel_gguf_put_f32(f.w, "clip.vision.attention.layer_norm_epsilon", 1e-6f);
    keel_gguf_put_f32s(f.w, "clip.vision.image_mean", half, 3);
    keel_gguf_put_f32s(f.w, "clip.vision.image_std", half, 3);
    put_tensors(&f);
    assert_int_equal(keel_gguf_writer_begin(f.w, f.f), KEEL_OK);
    f.data = true;
    put_tensors(&f);
    assert_int_equal(keel_gguf_writer_end(f.w), KEEL_OK);
    keel_gguf_writer_destroy(&f.w);
    assert_int_equal(fclose(f.f), 0);
}

// --- gradients -----------------------------------------------------------------------------------

struct vision_case {
    keel_model *m;
    keel_vision *v;
    keel_vision_trainer *t;
    keel_adapter *a;
    keel_heap *heap;
    struct keel_span grads;
    float *params, *g, *moved;
    float c[N_TOKENS * OUT]; // the loss is Σ c · tokens
};

static double loss(struct vision_case *c)
{
    static float tokens[N_TOKENS * OUT];
    double sum = 0;
    assert_int_equal(keel_vision_trainer_forward(c->t, c->a, (struct keel_view){ .path = image }, tokens), KEEL_OK);
    for (size_t i = 0; i < KEEL_COUNT(tokens); i++) {
        sum += (double)c->c[i] * (double)tokens[i];
    }
    return sum;
}

static void set_up(struct vision_case *c, uint32_t targets)
{
    const struct tiny t = { TINY_DEFAULTS .layers = 1 };
    struct keel_rng rng = keel_rng_make(31, 1);
    memset(c, 0, sizeof *c);
    tiny_write(&t, model_path);
    write_tower();
    assert_int_equal(keel_model_open(&c->m, model_path, NULL), KEEL_OK);
    assert_int_equal(keel_model_load(c->m, dev), KEEL_OK);
    assert_int_equal(keel_vision_open(&c->v, tower_path, c->m, NULL), KEEL_OK);
    keel_model_use_vision(c->m, c->v);
    assert_int_equal(keel_adapter_create(&c->a, c->m, RANK, 6.0f, targets, NULL, 5), KEEL_OK);
    assert_int_equal(keel_vision_trainer_create(&c->t, c->v, dev), KEEL_OK);
    const size_t n = c->a->n_floats;
    c->params = calloc(n, 4);
    c->g = calloc(n, 4);
    c->moved = calloc(n, 4);
    assert_true(c->params && c->g && c->moved);
    for (uint32_t i = 0; i < c->a->n_pairs; i++) {
        const struct keel_lora *p = &c->a->pair[i];
        for (uint64_t j = 0; p->rank > 0 && j < (uint64_t)RANK * p->k; j++) {
            c->params[(p->a.offset - c->a->params.offset) / 4 + j] = 0.2f * (float)keel_rng_normal(&rng);
        }
        for (uint64_t j = 0; p->rank > 0 && j < (uint64_t)RANK * p->n; j++) {
            c->params[(p->b.offset - c->a->params.offset) / 4 + j] = 0.2f * (float)keel_rng_normal(&rng);
        }
    }
    for (size_t i = 0; i < KEEL_COUNT(c->c); i++) {
        c->c[i] = (float)keel_rng_normal(&rng);
    }
    assert_int_equal(keel_upload(dev, c->a->params, c->params, n * 4), KEEL_OK);
    assert_int_equal(keel_heap_create(&c->heap, dev, KEEL_HEAP_DEVICE, "gradients"), KEEL_OK);
    assert_int_equal(keel_heap_alloc(c->heap, n * 4, &c->grads), KEEL_OK);
    assert_int_equal(keel_upload(dev, c->grads, c->g, n * 4), KEEL_OK); // zeros
}

static void tear_down(struct vision_case *c)
{
    keel_heap_destroy(&c->heap);
    keel_adapter_destroy(&c->a);
    keel_vision_trainer_destroy(&c->t);
    keel_vision_close(&c->v);
    keel_model_close(&c->m);
    free(c->params);
    free(c->g);
    free(c->moved);
}

// Derivative along the gradient's own direction, restricted to one side of one pair: must be its norm.
static void check_direction(struct vision_case *c, struct keel_span side, uint64_t n, const char *what, uint32_t pair)
{
    const uint64_t at = (side.offset - c->a->params.offset) / 4;
    double norm = 0, sum[2];
    for (uint64_t j = 0; j < n; j++) {
        norm += (double)c->g[at + j] * (double)c->g[at + j];
    }
    norm = sqrt(norm);
    if (!(norm > 1e-3)) {
        fail_msg("pair %u, %s: gradient norm is %g", pair, what, norm);
    }
    const double step = 5e-3; // the loss is about 10, its rounding 1e-5; the cubic term is below 1e-3 of the slope at this step
    for (uint32_t k = 0; k < 2; k++) {
        memcpy(c->moved, c->params, c->a->n_floats * 4);
        for (uint64_t j = 0; j < n; j++) {
            c->moved[at + j] += (float)((k ? 1.0 : -1.0) * step * (double)c->g[at + j] / norm);
        }
        assert_int_equal(keel_upload(dev, c->a->params, c->moved, c->a->n_floats * 4), KEEL_OK);
        sum[k] = loss(c);
    }
    const double diff = (sum[1] - sum[0]) / (2 * step);
    if (fabs(diff - norm) > 0.01 * norm + 5e-3) {
        fail_msg("pair %u, %s: central difference %g, gradient %g", pair, what, diff, norm);
    }
    assert_int_equal(keel_upload(dev, c->a->params, c->params, c->a->n_floats * 4), KEEL_OK);
}

static void check_gradients(uint32_t targets)
{
    static struct vision_case c;
    set_up(&c, targets);
    assert_int_equal(keel_vision_trainer_backward(c.t, c.a, c.grads, (struct keel_view){ .path = image }, c.c), KEEL_OK);
    assert_int_equal(keel_download(dev, c.g, c.grads, c.a->n_floats * 4), KEEL_OK);
    for (uint32_t i = 0; i < c.a->n_pairs; i++) {
        const struct keel_lora *p = &c.a->pair[i];
        if (p->rank > 0) {
            check_direction(&c, p->a, (uint64_t)RANK * p->k, "a", i);
            check_direction(&c, p->b, (uint64_t)RANK * p->n, "b", i);
        }
    }
    // A second call adds.
    float *twice = calloc(c.a->n_floats, 4);
    assert_non_null(twice);
    assert_int_equal(keel_vision_trainer_backward(c.t, c.a, c.grads, (struct keel_view){ .path = image }, c.c), KEEL_OK);
    assert_int_equal(keel_download(dev, twice, c.grads, c.a->n_floats * 4), KEEL_OK);
    for (size_t i = 0; i < c.a->n_floats; i++) {
        assert_true(fabsf(twice[i] - 2 * c.g[i]) <= 1e-5f + 1e-5f * fabsf(c.g[i]));
    }
    free(twice);
    tear_down(&c);
}

static void test_gradients(void **state)
{
    (void)state;
    check_gradients(((1u << (KEEL_V_N_PROJ + 1)) - 1) << KEEL_N_PROJ);
}

// Only some maps: the pass back ends early, or at the projector.
static void test_some_targets(void **state)
{
    (void)state;
    check_gradients(1u << (KEEL_N_PROJ + KEEL_V_UP));
    check_gradients(1u << (KEEL_N_PROJ + KEEL_V_N_PROJ));
}

// --- forward -------------------------------------------------------------------------------------

// The pass of training is that of inference, with the adapter and, under a zero adapter, without.
static void test_forward(void **state)
{
    static struct vision_case c;
    static float train[N_TOKENS * OUT], infer[N_TOKENS * OUT], plain[N_TOKENS * OUT];
    (void)state;
    set_up(&c, 127u << KEEL_N_PROJ);
    assert_int_equal(keel_vision_encode(c.v, dev, image, 0, plain), KEEL_OK);
    assert_int_equal(keel_vision_trainer_forward(c.t, c.a, (struct keel_view){ .path = image }, train), KEEL_OK);
    assert_int_equal(keel_vision_use_adapter(c.v, dev, c.a), KEEL_OK);
    assert_int_equal(keel_vision_encode(c.v, dev, image, 0, infer), KEEL_OK);
    double moved = 0;
    for (size_t i = 0; i < KEEL_COUNT(train); i++) {
        assert_true(fabsf(train[i] - infer[i]) <= 1e-5f);
        moved += fabs((double)(infer[i] - plain[i]));
    }
    assert_true(moved > 1);
    // Both results are in the cache now, each under its own key.
    assert_int_equal(keel_vision_encode(c.v, NULL, image, 0, train), KEEL_OK);
    assert_memory_equal(train, infer, sizeof train);
    keel_vision_drop_adapter(c.v, c.a);
    assert_int_equal(keel_vision_encode(c.v, NULL, image, 0, train), KEEL_OK);
    assert_memory_equal(train, plain, sizeof train);
    tear_down(&c);
}

// --- crops ---------------------------------------------------------------------------------------

// Against transformers' Gemma3ImageProcessor.pan_and_scan (5.24), which was asked for these sizes.
static void test_crops(void **state)
{
    static const struct {
        uint32_t width, height;
        struct keel_pan_and_scan p;
        uint32_t n;
        struct keel_box box[4];
    } cases[] = {
        { 600, 256, { 256, 4, 1.2 }, 2, { { 0, 0, 300, 256 }, { 300, 0, 300, 256 } } },
        { 1001, 333, { 256, 4, 1.2 }, 3, { { 0, 0, 334, 333 }, { 334, 0, 334, 333 }, { 668, 0, 333, 333 } } },
        { 256, 900, { 256, 4, 1.2 }, 3, { { 0, 0, 256, 300 }, { 0, 300, 256, 300 }, { 0, 600, 256, 300 } } },
        { 2000, 300, { 256, 4, 1.2 }, 4, { { 0, 0, 500, 300 }, { 500, 0, 500, 300 }, { 1000, 0, 500, 300 }, { 1500, 0, 500, 300 } } },
        { 520, 430, { 256, 4, 1.2 }, 2, { { 0, 0, 260, 430 }, { 260, 0, 260, 430 } } },
        { 300, 280, { 256, 4, 1.2 }, 0, { { 0, 0, 0, 0 } } },
        { 640, 200, { 256, 4, 1.2 }, 0, { { 0, 0, 0, 0 } } },
        { 1200, 1000, { 256, 4, 1.2 }, 2, { { 0, 0, 600, 1000 }, { 600, 0, 600, 1000 } } },
        { 1199, 1000, { 256, 4, 1.2 }, 0, { { 0, 0, 0, 0 } } },
        { 35, 10, { 3, 16, 1.0 }, 4, { { 0, 0, 9, 10 }, { 9, 0, 9, 10 }, { 18, 0, 9, 10 }, { 27, 0, 8, 10 } } },
        { 10, 25, { 4, 3, 1.5 }, 3, { { 0, 0, 10, 9 }, { 0, 9, 10, 9 }, { 0, 18, 10, 7 } } },
        { 64, 64, { 8, 4, 1.0 }, 2, { { 0, 0, 32, 64 }, { 32, 0, 32, 64 } } },
        { 90, 40, { 40, 8, 2.0 }, 2, { { 0, 0, 45, 40 }, { 45, 0, 45, 40 } } },
    };
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        struct keel_box box[KEEL_MAX_CROPS];
        assert_int_equal(keel_crops(&cases[i].p, cases[i].width, cases[i].height, box), cases[i].n);
        assert_memory_equal(box, cases[i].box, cases[i].n * sizeof box[0]);
    }
    const struct keel_pan_and_scan tiny = { 1, 16, 1.0 };
    struct keel_box box[KEEL_MAX_CROPS];
    assert_int_equal(keel_crops(&tiny, 17, 1, box), 9); // crops of two pixels; transformers would add empty ones
    assert_int_equal(box[8].width, 1);
    assert_int_equal(keel_crops(&(struct keel_pan_and_scan){ 0 }, 1000, 1, box), 0);
}

static int open_device(void **state)
{
    setenv("XDG_CACHE_HOME", ".", 1); // cached tokens are part of the test, the user's cache is not
    return tiny_open_device(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_some_targets),
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_crops),
    };
    return cmocka_run_group_tests(tests, open_device, tiny_close_device);
}
