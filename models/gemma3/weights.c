// SPDX-License-Identifier: MIT
// gemma3/weights.c: checks the weights of a file for NaN and infinity and uploads them to the device.
// Owns the order of uploads. The tile layout is the ops room's.
#include "gemma3.h"

#include <math.h>
#include <stdlib.h>

const struct keel_matrix *keel_model_matrix(const keel_model *model, uint32_t layer, uint32_t proj)
{
    return proj == KEEL_N_PROJ ? model->w.head : &model->w.block[layer].proj[proj];
}

// --- NaN and infinity ----------------------------------------------------------------------------

// Where a block's floats lie: the values themselves, or the scales of a quantised block (all its codes are finite).
struct float_places {
    uint32_t first, n; // byte offset in the block, number of halves
};
static struct float_places half_places(enum keel_dtype type)
{
    switch (type) {
    case KEEL_Q4_1:
    case KEEL_Q5_1:
    case KEEL_Q4_K:
    case KEEL_Q5_K:
        return (struct float_places){0, 2}; // scale and minimum
    case KEEL_Q6_K:
        return (struct float_places){208, 1}; // after 128 + 64 bytes of codes and 16 sub-scales
    default:
        return (struct float_places){0, 1};
    }
}

#define CHECK_BYTES (2u << 20) // one job; a multiple of no particular block: jobs are cut in blocks
#define CHECK_JOBS 16u         // a slice: then its pages may leave again
struct check {
    const struct keel_gguf_tensor *t;
    uint32_t block_bytes;
    uint64_t n_blocks, per_job, job0;
    uint8_t bad[CHECK_JOBS];
};

static void check_job(void *user, uint32_t job)
{
    struct check *c = user;
    const struct float_places at = half_places(c->t->type);
    const uint16_t exp_mask = c->t->type == KEEL_BF16 ? 0x7F80 : 0x7C00;
    const uint64_t first = (c->job0 + job) * c->per_job, last = KEEL_MIN(first + c->per_job, c->n_blocks);
    bool bad = false;
    for (uint64_t i = first; i < last; i++) {
        const uint8_t *p = c->t->data + i * c->block_bytes;
        if (c->t->type == KEEL_F32) {
            const uint32_t bits = (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
            bad |= (bits & 0x7F800000u) == 0x7F800000u;
        } else {
            for (uint32_t k = 0; k < at.n; k++) {
                const uint8_t *h = p + at.first + (size_t)2 * k;
                bad |= (((uint32_t)h[0] | (uint32_t)h[1] << 8) & exp_mask) == exp_mask;
            }
        }
    }
    c->bad[job] = bad;
}

keel_status keel_weights_finite(const struct keel_uploader *u, const struct keel_gguf_tensor *t)
{
    keel_status st = KEEL_OK;
    const struct keel_dtype_info *info = keel_dtype_info((uint32_t)t->type);
    struct check c = {.t = t, .block_bytes = info->block_bytes, .n_blocks = t->n_elems / info->block_elems};
    c.per_job = KEEL_MAX(1u, CHECK_BYTES / info->block_bytes);
    const uint64_t jobs = (c.n_blocks + c.per_job - 1) / c.per_job;
    for (; c.job0 < jobs; c.job0 += CHECK_JOBS) {
        const uint32_t n = (uint32_t)KEEL_MIN((uint64_t)CHECK_JOBS, jobs - c.job0);
        const uint64_t at = c.job0 * c.per_job, end = KEEL_MIN(at + n * c.per_job, c.n_blocks);
        keel_parallel_for(n, check_job, &c);
        for (uint32_t j = 0; j < n; j++) {
            if (c.bad[j]) {
                KEEL_FAIL(u->log, KEEL_ERR_NUMERIC,
                          "%s: tensor \"%s\" holds NaN or infinity; the file is damaged, fetch it again", u->path,
                          t->name);
            }
        }
        keel_map_done_with(u->map, (size_t)(t->data - u->map->data) + (size_t)at * c.block_bytes,
                           (size_t)(end - at) * c.block_bytes);
    }
out:
    return st;
}

// --- upload --------------------------------------------------------------------------------------

keel_status keel_upload_matrix(const struct keel_uploader *u, struct keel_matrix *m, const struct keel_gguf_tensor *t)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_weights_finite(u, t));
    KEEL_TRY(keel_matrix_create(m, u->dev, u->heap, t->type, (uint32_t)t->dims[1], (uint32_t)t->dims[0], t->data, u->map));
out:
    return st;
}

keel_status keel_upload_floats(const struct keel_uploader *u, struct keel_span *span, const struct keel_gguf_tensor *t)
{
    keel_status st = KEEL_OK;
    float *f = malloc((size_t)t->n_elems * sizeof *f);
    if (!f) {
        KEEL_FAIL(u->log, KEEL_ERR_NO_MEMORY, "%s: no memory for tensor \"%s\"", u->path, t->name);
    }
    KEEL_TRY(keel_weights_finite(u, t));
    keel_dequantize(t->type, t->data, f, (size_t)t->n_elems);
    KEEL_TRY(keel_heap_alloc(u->heap, t->n_elems * sizeof *f, span));
    KEEL_TRY(keel_upload(u->dev, *span, f, (size_t)t->n_elems * sizeof *f));
out:
    free(f);
    return st;
}

keel_status keel_gemma3_upload(keel_model *model)
{
    keel_status st = KEEL_OK;
    struct keel_gemma3_weights *w = &model->w;
    const struct keel_uploader u = {model->log, model->info.path, &model->map, model->dev, model->heap};
    w->block = calloc(model->cfg.n_layers, sizeof *w->block);
    if (!w->block) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "%s: no memory for the weights table", model->info.path);
    }
    KEEL_TRY(keel_upload_matrix(&u, &w->embd, model->src.embd));
    w->head = &w->embd;
    if (model->src.output) {
        KEEL_TRY(keel_upload_matrix(&u, &w->output, model->src.output));
        w->head = &w->output;
    }
    KEEL_TRY(keel_upload_floats(&u, &w->output_norm, model->src.output_norm));
    for (uint32_t i = 0; i < model->cfg.n_layers; i++) {
        const struct keel_gguf_tensor **t = model->src.block + (size_t)i * KEEL_N_BLOCK_TENSORS;
        for (uint32_t k = 0; k < KEEL_N_PROJ; k++) {
            KEEL_TRY(keel_upload_matrix(&u, &w->block[i].proj[k], t[k]));
        }
        for (uint32_t k = KEEL_N_PROJ; k < KEEL_N_BLOCK_TENSORS; k++) {
            KEEL_TRY(keel_upload_floats(&u, &w->block[i].norm[k - KEEL_N_PROJ], t[k]));
        }
    }
    KEEL_TRY(keel_stage_finish(model->dev));
out:
    return st;
}

static uint64_t tensor_bytes(const struct keel_gguf_tensor *t)
{
    return t->dims[1] > 1 ? keel_matrix_bytes(t->type, t->dims[1], t->dims[0]) : keel_align_up(t->n_elems * 4, 256);
}

void keel_gemma3_weight_bytes(const keel_model *model, uint64_t *embd, uint64_t *rest)
{
    const struct keel_gemma3_source *s = &model->src;
    *embd = tensor_bytes(s->embd) + (s->output ? tensor_bytes(s->output) : 0);
    *rest = tensor_bytes(s->output_norm);
    for (size_t i = 0; i < (size_t)model->cfg.n_layers * KEEL_N_BLOCK_TENSORS; i++) {
        *rest += tensor_bytes(s->block[i]);
    }
}

keel_status keel_model_proj_norm(const keel_model *model, uint32_t layer, uint32_t proj, double *norm)
{
    const struct keel_gguf_tensor *t = model->src.block[(size_t)layer * KEEL_N_BLOCK_TENSORS + proj];
    const uint64_t n = t->dims[0], rows = t->n_elems / n;
    float *row = malloc(n * sizeof *row);
    double sum = 0;
    if (!row) {
        KEEL_ERROR(model->log, "%s: no memory for a row of %s", model->info.path, t->name);
        return KEEL_ERR_NO_MEMORY;
    }
    for (uint64_t r = 0; r < rows; r++) {
        keel_dequantize(t->type, t->data + r * (t->bytes / rows), row, n);
        for (uint64_t i = 0; i < n; i++) {
            sum += (double)row[i] * (double)row[i];
        }
    }
    free(row);
    *norm = sqrt(sum);
    return KEEL_OK;
}
