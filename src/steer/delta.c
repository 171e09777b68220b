// SPDX-License-Identifier: MIT
// steer/delta.c: what adapters add to the weights, ΔW = scale · B A, from r × r products: norms, and how the ΔW of two adapters lie
// to each other. Source: science notes 3.1, M7.
#include "steer.h"

#include <lapacke.h>
#include <math.h>
#include <stdlib.h>

// g [r, r] = xᵀ x of x [n, r], or x xᵀ of x [r, n].
static void small_gram(double *g, const float *x, uint32_t r, uint32_t n, bool tall)
{
    for (uint32_t i = 0; i < r; i++) {
        for (uint32_t j = 0; j <= i; j++) {
            double sum = 0;
            for (size_t c = 0; c < n; c++) {
                sum += (double)(tall ? x[c * r + i] : x[i * (size_t)n + c]) * (double)(tall ? x[c * r + j] : x[j * (size_t)n + c]);
            }
            g[i * r + j] = g[j * r + i] = sum;
        }
    }
}

// Makes a gram matrix g its columns V √λ: a square root up to a rotation, which does not matter. values [r]: λ, ascending.
static keel_status root(double *g, uint32_t r, double *values, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (LAPACKE_dsyev(LAPACK_ROW_MAJOR, 'V', 'U', (lapack_int)r, g, (lapack_int)r, values) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the spectrum of an adapter of rank %u did not converge", r);
    }
    for (uint32_t i = 0; i < r; i++) {
        for (uint32_t j = 0; j < r; j++) {
            g[i * r + j] *= sqrt(KEEL_MAX(values[j], 0));
        }
    }
out:
    return st;
}

// Squared singular values of B A, ascending, from BᵀB and A Aᵀ (both destroyed): the eigenvalues of (A Aᵀ)½ BᵀB (A Aᵀ)½.
static keel_status product_spectrum(double *gb, double *ga, uint32_t r, double *values, const keel_log *log)
{
    keel_status st = KEEL_OK;
    double *m = calloc((size_t)r * r, sizeof *m), *t = calloc((size_t)r * r, sizeof *t);
    if (!m || !t) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the spectrum of an adapter of rank %u", r);
    }
    KEEL_TRY(root(ga, r, values, log));
    for (uint32_t i = 0; i < r; i++) {
        for (uint32_t j = 0; j < r; j++) {
            for (uint32_t k = 0; k < r; k++) {
                t[i * r + j] += gb[i * r + k] * ga[k * r + j];
            }
        }
    }
    for (uint32_t i = 0; i < r; i++) {
        for (uint32_t j = 0; j < r; j++) {
            for (uint32_t k = 0; k < r; k++) {
                m[i * r + j] += ga[k * r + i] * t[k * r + j];
            }
        }
    }
    if (LAPACKE_dsyev(LAPACK_ROW_MAJOR, 'N', 'U', (lapack_int)r, m, (lapack_int)r, values) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NUMERIC, "the spectrum of an adapter of rank %u did not converge", r);
    }
out:
    free(m);
    free(t);
    return st;
}

// An adapter's pair in host memory: a [r, in], b [out, r].
struct factors {
    float *a, *b;
    uint32_t r, in, out;
    double scale;
};

static void factors_finish(struct factors *f)
{
    free(f->a);
    free(f->b);
    *f = (struct factors){ 0 };
}

static keel_status factors_read(struct factors *f, const struct keel_lora *p, keel_device *dev, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const size_t na = (size_t)p->rank * p->k * sizeof *f->a, nb = (size_t)p->rank * p->n * sizeof *f->b;
    *f = (struct factors){ .a = malloc(na), .b = malloc(nb), .r = p->rank, .in = p->k, .out = p->n, .scale = (double)p->scale };
    if (!f->a || !f->b) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for an adapter of rank %u", p->rank);
    }
    KEEL_TRY(keel_download(dev, f->a, keel_span_sub(p->a, 0, na), na));
    KEEL_TRY(keel_download(dev, f->b, keel_span_sub(p->b, 0, nb), nb));
out:
    if (st != KEEL_OK) {
        factors_finish(f);
    }
    return st;
}

// --- norms ---------------------------------------------------------------------------------------

static keel_status measure(struct keel_delta *out, const struct factors *f, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t r = f->r;
    double *ga = malloc((size_t)r * r * sizeof *ga), *gb = malloc((size_t)r * r * sizeof *gb), *values = malloc(r * sizeof *values);
    if (!ga || !gb || !values) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for an adapter of rank %u", r);
    }
    small_gram(ga, f->a, r, f->in, false);
    small_gram(gb, f->b, r, f->out, true);
    KEEL_TRY(product_spectrum(gb, ga, r, values, log));
    double sum = 0;
    for (uint32_t i = 0; i < r; i++) {
        sum += KEEL_MAX(values[i], 0);
    }
    out->rank = r;
    out->frobenius = fabs(f->scale) * sqrt(sum);
    out->spectral = fabs(f->scale) * sqrt(KEEL_MAX(values[r - 1], 0));
    out->stable_rank = values[r - 1] > 0 ? sum / values[r - 1] : 0;
out:
    free(ga);
    free(gb);
    free(values);
    return st;
}

keel_status keel_geometry_adapter(struct keel_delta **out, size_t *n, keel_model *model, const char *path, float scale)
{
    keel_status st = KEEL_OK;
    keel_device *dev = keel_model_device(model);
    const keel_log *log = keel_device_log(dev);
    keel_adapter *a = NULL;
    struct factors f = { 0 };
    *out = NULL;
    *n = 0;
    KEEL_TRY(keel_adapter_load(&a, model, path, scale));
    *out = calloc((size_t)a->n_layers * KEEL_N_PROJ, sizeof **out);
    if (!*out) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the geometry of %s", path);
    }
    for (size_t i = 0; i < (size_t)a->n_layers * KEEL_N_PROJ; i++) {
        if (a->pair[i].rank == 0) {
            continue;
        }
        const uint32_t layer = (uint32_t)(i / KEEL_N_PROJ), proj = (uint32_t)(i % KEEL_N_PROJ);
        struct keel_delta *d = &(*out)[(*n)++];
        *d = (struct keel_delta){ .layer = layer, .module = keel_proj_name[proj] };
        KEEL_TRY(factors_read(&f, &a->pair[i], dev, log));
        KEEL_TRY(measure(d, &f, log));
        factors_finish(&f);
        KEEL_TRY(keel_model_proj_norm(model, layer, proj, &d->base));
    }
out:
    factors_finish(&f);
    keel_adapter_destroy(&a);
    if (st != KEEL_OK) {
        free(*out);
        *out = NULL;
    }
    return st;
}

// --- two adapters --------------------------------------------------------------------------------

// Rows that span what ΔW reads (out false: x [r, in]) or writes (out true: x [r, out]). Not the rows of A and the columns of B as they
// are: where one of the two lacks rank, what the other has there is never seen.
static keel_status space_of(float **x, const struct factors *f, bool out, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const uint32_t r = f->r, width = out ? f->out : f->in;
    double *g = malloc((size_t)r * r * sizeof *g), *values = malloc(r * sizeof *values);
    *x = malloc((size_t)r * width * sizeof **x);
    if (!g || !values || !*x) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory to compare adapters of rank %u", r);
    }
    small_gram(g, out ? f->a : f->b, r, out ? f->in : f->out, !out);
    KEEL_TRY(root(g, r, values, log));
    for (uint32_t i = 0; i < r; i++) {
        for (size_t c = 0; c < width; c++) {
            double sum = 0;
            for (uint32_t j = 0; j < r; j++) {
                sum += g[j * r + i] * (double)(out ? f->b[c * r + j] : f->a[j * (size_t)width + c]);
            }
            (*x)[i * (size_t)width + c] = (float)sum;
        }
    }
out:
    free(g);
    free(values);
    return st;
}

// Overlap of the spaces that two ΔW read or write.
static keel_status overlap_of(double *overlap, const struct factors *x, const struct factors *y, bool out, uint32_t rank[2], const keel_log *log)
{
    keel_status st = KEEL_OK;
    double *cosines = malloc(KEEL_MIN(x->r, y->r) * sizeof *cosines);
    struct keel_direction a = { .k = x->r }, b = { .k = y->r };
    if (!cosines) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory to compare adapters of rank %u and %u", x->r, y->r);
    }
    KEEL_TRY(space_of(&a.v, x, out, log));
    KEEL_TRY(space_of(&b.v, y, out, log));
    KEEL_TRY(keel_geometry_overlap(&a, &b, out ? x->out : x->in, cosines, overlap, rank, log));
out:
    free(cosines);
    free(a.v);
    free(b.v);
    return st;
}

// <ΔWx, ΔWy> = tr((BxᵀBy)(Ay Axᵀ)) without the matrices.
static double inner(const struct factors *x, const struct factors *y)
{
    double sum = 0;
    for (uint32_t i = 0; i < x->r; i++) {
        for (uint32_t j = 0; j < y->r; j++) {
            double a = 0, b = 0;
            for (size_t c = 0; c < x->in; c++) {
                a += (double)x->a[i * (size_t)x->in + c] * (double)y->a[j * (size_t)y->in + c];
            }
            for (size_t c = 0; c < x->out; c++) {
                b += (double)x->b[c * x->r + i] * (double)y->b[c * y->r + j];
            }
            sum += a * b;
        }
    }
    return sum * x->scale * y->scale;
}

static keel_status compare(struct keel_delta_overlap *o, const struct factors *x, const struct factors *y, const keel_log *log)
{
    keel_status st = KEEL_OK;
    o->cosine = inner(x, y) / sqrt(inner(x, x) * inner(y, y));
    KEEL_TRY(overlap_of(&o->in, x, y, false, o->rank, log));
    KEEL_TRY(overlap_of(&o->out, x, y, true, o->rank, log));
    const uint32_t larger = KEEL_MAX(o->rank[0], o->rank[1]);
    o->random_in = KEEL_MIN(1, (double)larger / x->in);
    o->random_out = KEEL_MIN(1, (double)larger / x->out);
out:
    return st;
}

keel_status keel_geometry_adapters(struct keel_delta_overlap **out, size_t *n, keel_model *model, const char *first, const char *second,
                                   const float scale[2])
{
    keel_status st = KEEL_OK;
    keel_device *dev = keel_model_device(model);
    const keel_log *log = keel_device_log(dev);
    keel_adapter *a = NULL, *b = NULL;
    struct factors x = { 0 }, y = { 0 };
    *out = NULL;
    *n = 0;
    KEEL_TRY(keel_adapter_load(&a, model, first, scale[0]));
    KEEL_TRY(keel_adapter_load(&b, model, second, scale[1]));
    *out = calloc((size_t)a->n_layers * KEEL_N_PROJ, sizeof **out);
    if (!*out) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for the geometry of %s", first);
    }
    for (size_t i = 0; i < (size_t)a->n_layers * KEEL_N_PROJ; i++) {
        if (a->pair[i].rank == 0 || b->pair[i].rank == 0) {
            continue;
        }
        KEEL_TRY(factors_read(&x, &a->pair[i], dev, log));
        KEEL_TRY(factors_read(&y, &b->pair[i], dev, log));
        if (inner(&x, &x) > 0 && inner(&y, &y) > 0) { // an untrained B adds nothing and has no space
            struct keel_delta_overlap *o = &(*out)[(*n)++];
            *o = (struct keel_delta_overlap){ .layer = (uint32_t)(i / KEEL_N_PROJ), .module = keel_proj_name[i % KEEL_N_PROJ] };
            KEEL_TRY(compare(o, &x, &y, log));
        }
        factors_finish(&x);
        factors_finish(&y);
    }
out:
    factors_finish(&x);
    factors_finish(&y);
    keel_adapter_destroy(&a);
    keel_adapter_destroy(&b);
    if (st != KEEL_OK) {
        free(*out);
        *out = NULL;
    }
    return st;
}
