// SPDX-License-Identifier: MIT
// steer/capture_file.c: writes what a capture added up.
#include "steer.h"

#include <stdlib.h>
#include <string.h>

struct parts {
    struct keel_st_tensor *t;
    char (*name)[24];
    void **own;
    size_t n, n_own;
};

// A tensor of `rows` rows (0: a list) of doubles, written as f32.
static bool put(struct parts *p, const char *what, uint32_t layer, const double *x, uint64_t rows, uint64_t cols)
{
    const uint64_t n = (rows ? rows : 1) * cols;
    float *f = malloc(n * sizeof *f);
    for (uint64_t i = 0; f && i < n; i++) {
        f[i] = (float)x[i];
    }
    snprintf(p->name[p->n], sizeof *p->name, "%s.%u", what, layer);
    p->t[p->n] = (struct keel_st_tensor){ .name = p->name[p->n], .type = KEEL_ST_F32, .n_dims = rows ? 2 : 1,
                                          .dims = { rows ? rows : cols, cols }, .n_elems = n, .data = (const uint8_t *)f, .bytes = 4 * n };
    p->own[p->n_own++] = f;
    p->n++;
    return f != NULL;
}

static bool put_layer(struct parts *p, const struct keel_capture *c, const struct keel_capture_layer *l)
{
    const uint64_t n = c->n_rows * (uint64_t)c->width;
    const bool ok = put(p, "mean", l->layer, l->mean, 0, c->width) && put(p, "var", l->layer, l->var, 0, c->width) &&
                    put(p, "abs", l->layer, l->size, 0, c->width) && (!l->cov || put(p, "cov", l->layer, l->cov, c->width, c->width));
    snprintf(p->name[p->n], sizeof *p->name, "rows.%u", l->layer);
    p->t[p->n] = (struct keel_st_tensor){ .name = p->name[p->n], .type = KEEL_ST_F32, .n_dims = 2, .dims = { c->n_rows, c->width },
                                          .n_elems = n, .data = (const uint8_t *)l->rows, .bytes = 4 * n };
    p->n++;
    return ok;
}

static float *sum_logprobs(const struct keel_steer_rows *rows)
{
    float *lp = calloc(rows->n, sizeof *lp);
    for (size_t i = 0; lp && i < rows->n; i++) {
        double sum = 0;
        for (uint32_t k = 0; k + rows->row[i].first < rows->row[i].n; k++) {
            sum += (double)rows->row[i].logprobs[k];
        }
        lp[i] = (float)sum;
    }
    return lp;
}

keel_status keel_capture_write(const struct keel_capture *c, const struct keel_steer_rows *rows, keel_model *model,
                               const struct keel_capture_params *params, const char *path)
{
    keel_status st = KEEL_OK;
    const keel_log *log = keel_device_log(keel_model_device(model));
    const size_t max = 5 * (size_t)c->n_layers + 2;
    struct parts p = { .t = calloc(max, sizeof *p.t), .name = calloc(max, sizeof *p.name), .own = calloc(max, sizeof *p.own) };
    float *lp = sum_logprobs(rows);
    struct keel_text ids = { 0 }, norms = { 0 };
    struct keel_file_out file = { 0 };
    char tokens[24], hash[24];
    bool ok = p.t && p.name && p.own && lp;
    for (uint32_t i = 0; ok && i < c->n_layers; i++) {
        ok = put_layer(&p, c, &c->layer[i]);
        keel_text_addf(&norms, "%s%.9g", i ? "," : "[", c->layer[i].median_norm);
    }
    for (size_t i = 0; i < rows->n; i++) {
        keel_text_addf(&ids, "%s%s", i ? "," : "[", rows->id[i]);
    }
    keel_text_addf(&ids, "]");
    keel_text_addf(&norms, "]");
    if (!ok || ids.failed || norms.failed) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory to write %s", path);
    }
    p.t[p.n++] = (struct keel_st_tensor){ .name = "row_tokens", .type = KEEL_ST_I32, .n_dims = 1, .dims = { c->n_rows },
                                          .n_elems = c->n_rows, .data = (const uint8_t *)c->row_tokens, .bytes = 4 * c->n_rows };
    p.t[p.n++] = (struct keel_st_tensor){ .name = "logprob", .type = KEEL_ST_F32, .n_dims = 1, .dims = { c->n_rows },
                                          .n_elems = c->n_rows, .data = (const uint8_t *)lp, .bytes = 4 * c->n_rows };
    snprintf(tokens, sizeof tokens, "%llu", (unsigned long long)c->n_tokens);
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)keel_model_hash(model));
    const struct keel_pair meta[] = { { "site", keel_site_name[params->site] }, { "model", keel_model_info(model)->path },
                                      { "model_hash", hash }, { "n_tokens", tokens }, { "median_norm", norms.data }, { "ids", ids.data } };
    KEEL_TRY(keel_file_create(&file, path, log));
    KEEL_TRY(keel_st_write(file.f, p.t, p.n, meta, KEEL_COUNT(meta), log));
    KEEL_TRY(keel_file_commit(&file, log));
out:
    keel_file_abort(&file);
    for (size_t i = 0; p.own && i < p.n_own; i++) {
        free(p.own[i]);
    }
    free(p.t);
    free(p.name);
    free(p.own);
    free(lp);
    keel_text_finish(&ids);
    keel_text_finish(&norms);
    return st;
}
