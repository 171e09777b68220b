// SPDX-License-Identifier: MIT
// gemma3/pack.c: streams a list of tensors into a GGUF: dequantise, check, add, quantise, write, piece by piece. Owns the
// pieces; knows no file format but the writer's.
#include "convert.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define JOB_ELEMS (64u << 10) // a multiple of every block
#define MAX_JOBS 16u          // pieces in flight

keel_status keel_pack_add(struct keel_pack *p, const struct keel_pack_tensor *t, const keel_log *log)
{
    if (p->n == p->cap) {
        const size_t cap = KEEL_MAX(p->cap * 2, (size_t)64);
        struct keel_pack_tensor *more = realloc(p->t, cap * sizeof *more);
        if (!more) {
            KEEL_ERROR(log, "no memory for a list of tensors");
            return KEEL_ERR_NO_MEMORY;
        }
        p->t = more;
        p->cap = cap;
    }
    p->t[p->n++] = *t;
    return KEEL_OK;
}

void keel_pack_finish(struct keel_pack *p)
{
    free(p->t);
    *p = (struct keel_pack){0};
}

keel_status keel_pack_gguf(struct keel_pack *p, keel_gguf_writer *w, const keel_gguf *g, const struct keel_map *map, const keel_log *log)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < keel_gguf_key_count(g); i++) {
        const char *key = keel_gguf_key_at(g, i, NULL);
        if (strcmp(key, "general.file_type") != 0 && strcmp(key, "general.quantization_version") != 0) {
            keel_gguf_put_copy(w, g, i);
        }
    }
    keel_gguf_put_u32(w, "general.quantization_version", 2);
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const struct keel_gguf_tensor *from = keel_gguf_tensor_at(g, i);
        struct keel_pack_tensor t = {
            .n_dims = from->n_dims, .n_elems = from->n_elems, .from = from->type, .data = from->data, .map = map};
        memcpy(t.dims, from->dims, sizeof t.dims);
        if (strlen(from->name) >= sizeof t.name) {
            KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: the name of tensor \"%s\" is too long", keel_gguf_name(g), from->name);
        }
        snprintf(t.name, sizeof t.name, "%s", from->name);
        KEEL_TRY(keel_pack_add(p, &t, log));
    }
out:
    return st;
}

// A run of pieces of one tensor, one a job.
struct batch {
    const struct keel_pack_tensor *t;
    uint64_t first;  // element
    float *value;    // [MAX_JOBS × JOB_ELEMS]
    uint8_t *out;    // [MAX_JOBS × JOB_ELEMS × 4]
    bool bad[MAX_JOBS];
};

static uint64_t job_range(const struct batch *b, uint32_t job, uint64_t *n)
{
    const uint64_t at = b->first + (uint64_t)job * JOB_ELEMS;
    *n = KEEL_MIN(b->t->n_elems - at, (uint64_t)JOB_ELEMS);
    return at;
}

// Adds scale B A to n elements from element `at` of the matrix, row by row.
static void add_delta(const struct keel_pack_delta *d, uint64_t width, uint64_t at, uint64_t n, float *x)
{
    for (uint64_t done = 0; done < n;) {
        const uint64_t row = (at + done) / width, column = (at + done) % width;
        const uint64_t run = KEEL_MIN(width - column, n - done);
        for (uint32_t r = 0; r < d->rank; r++) {
            const float b = d->scale * d->b[row * d->rank + r];
            const float *a = d->a + r * width + column;
            for (uint64_t k = 0; k < run; k++) {
                x[done + k] += b * a[k];
            }
        }
        done += run;
    }
}

static void job(void *user, uint32_t i)
{
    struct batch *b = user;
    const struct keel_pack_tensor *t = b->t;
    uint64_t n;
    const uint64_t at = job_range(b, i, &n);
    float *x = b->value + (size_t)i * JOB_ELEMS;
    uint8_t *out = b->out + keel_dtype_bytes(t->to, (uint64_t)i * JOB_ELEMS);
    const uint8_t *src = t->data + keel_dtype_bytes(t->from, at);
    bool bad = false;
    keel_dequantize(t->from, src, x, (size_t)n);
    for (uint32_t k = 0; k < t->n_delta; k++) {
        add_delta(&t->delta[k], t->dims[0], at, n, x);
    }
    for (uint64_t k = 0; k < n; k++) {
        x[k] += t->add;
        bad |= !isfinite(x[k]);
    }
    b->bad[i] = bad;
    if (t->from == t->to && t->add == 0 && t->n_delta == 0) {
        memcpy(out, src, (size_t)keel_dtype_bytes(t->to, n)); // a second rounding would not give the same bits
    } else if (!bad) {
        keel_quantize(t->to, x, out, (size_t)n);
        // What is beyond f16's range becomes infinity there, and the scales of blocks are f16.
        const bool wide = t->to == KEEL_F32 || t->to == KEEL_BF16;
        for (uint64_t k = 0; !wide && k < n && !bad; k++) {
            bad = fabsf(x[k]) >= 65520.0f;
        }
        b->bad[i] = bad;
    }
}

static keel_status write_tensor(struct batch *b, keel_gguf_writer *w, const struct keel_convert_params *params, uint64_t *done,
                                uint64_t total, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct keel_pack_tensor *t = b->t;
    for (b->first = 0; b->first < t->n_elems; b->first += (uint64_t)MAX_JOBS * JOB_ELEMS) {
        const uint64_t n = KEEL_MIN(t->n_elems - b->first, (uint64_t)MAX_JOBS * JOB_ELEMS);
        const uint32_t jobs = (uint32_t)((n + JOB_ELEMS - 1) / JOB_ELEMS);
        keel_parallel_for(jobs, job, b);
        for (uint32_t i = 0; i < jobs; i++) {
            if (b->bad[i]) {
                KEEL_FAIL(log, KEEL_ERR_NUMERIC,
                          "%s: tensor \"%s\" holds NaN, infinity or a value beyond the range of %s; the file is damaged, or needs "
                          "--type bf16 or f32",
                          name, t->name, keel_dtype_info((uint32_t)t->to)->name);
            }
        }
        KEEL_TRY(keel_gguf_writer_data(w, b->out, (size_t)keel_dtype_bytes(t->to, n)));
        const uint64_t from = keel_dtype_bytes(t->from, b->first), bytes = keel_dtype_bytes(t->from, n);
        keel_map_done_with(t->map, (size_t)(t->data - t->map->data) + (size_t)from, (size_t)bytes);
        *done += bytes;
        if ((params->progress && !params->progress(params->user, *done, total)) || keel_interrupted()) {
            KEEL_FAIL(log, KEEL_INTERRUPTED, "%s: stopped; nothing was written", name);
        }
    }
out:
    return st;
}

keel_status keel_pack_write(const struct keel_pack *p, keel_gguf_writer *w, FILE *f, const struct keel_convert_params *params,
                            const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    uint64_t done = 0, total = 0;
    struct batch b = {
        .value = malloc((size_t)MAX_JOBS * JOB_ELEMS * sizeof(float)),
        .out = malloc((size_t)MAX_JOBS * JOB_ELEMS * sizeof(float)),
    };
    if (!b.value || !b.out) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory to convert tensors", name);
    }
    for (size_t i = 0; i < p->n; i++) {
        keel_gguf_put_tensor(w, p->t[i].name, p->t[i].to, p->t[i].n_dims, p->t[i].dims);
        total += keel_dtype_bytes(p->t[i].from, p->t[i].n_elems);
    }
    KEEL_TRY(keel_gguf_writer_begin(w, f));
    for (size_t i = 0; i < p->n; i++) {
        b.t = &p->t[i];
        KEEL_TRY(write_tensor(&b, w, params, &done, total, name, log));
    }
    KEEL_TRY(keel_gguf_writer_end(w));
out:
    free(b.value);
    free(b.out);
    return st;
}
