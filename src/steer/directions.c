// SPDX-License-Identifier: MIT
// steer/directions.c: directions of every layer from two captures, and their files.
// GGUF: architecture "controlvector", tensors direction.N [width] f32, as repeng writes and llama.cpp reads them; what keel knows
// beyond that stands under keel.*. safetensors: direction.N [width] or [k, width], the same facts as metadata.
#include "steer.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void keel_directions_finish(struct keel_directions *d)
{
    for (uint32_t i = 0; d->at && i < d->n; i++) {
        free(d->at[i].v);
    }
    free(d->at);
    *d = (struct keel_directions){ 0 };
}

// --- estimating ----------------------------------------------------------------------------------

static keel_status find_method(const struct keel_direction_params *params, enum keel_method *method, const keel_log *log)
{
    keel_status st = KEEL_OK;
    for (*method = 0; *method < KEEL_N_METHODS && strcmp(keel_method_name[*method], params->method) != 0; ++*method) {
    }
    if (*method == KEEL_N_METHODS) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "method \"%s\" is unknown; use mean, mean_z, mean_mask, lda, probe, pca_diff, pca_center or svd",
                  params->method);
    }
    if (keel_method_needs_pairs(*method) && !params->paired) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "method %s compares pairs, but the rows are no pairs; use mean, mean_z, mean_mask, lda or probe",
                  params->method);
    }
    if (params->k == 0 || (params->k > 1 && *method != KEEL_SVD)) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%u directions from method %s: only svd gives more than one", params->k, params->method);
    }
out:
    return st;
}

keel_status keel_directions_check(const struct keel_direction_params *params, const keel_log *log)
{
    enum keel_method method;
    return find_method(params, &method, log);
}

static keel_status check(const struct keel_capture *p, const struct keel_capture *n, const struct keel_direction_params *params,
                         enum keel_method *method, const keel_log *log)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(find_method(params, method, log));
    if (keel_method_needs_pairs(*method) && p->n_rows != n->n_rows) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "method %s compares pairs, but the rows are no pairs (%zu and %zu); use mean, mean_z, mean_mask, lda "
                  "or probe", params->method, p->n_rows, n->n_rows);
    }
    if (p->n_rows < 2 || n->n_rows < 2) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "a direction needs at least 2 rows of each class, there are %zu and %zu", p->n_rows, n->n_rows);
    }
    KEEL_ASSERT(p->width == n->width && p->n_layers == n->n_layers && p->site == n->site);
    for (uint32_t k = 0; k < p->n_layers; k++) {
        const struct keel_capture *side[2] = { p, n };
        KEEL_ASSERT(p->layer[k].layer == n->layer[k].layer);
        for (uint32_t s = 0; s < 2; s++) {
            for (size_t i = 0; i < side[s]->n_rows * side[s]->width; i++) {
                if (!isfinite(side[s]->layer[k].rows[i])) {
                    KEEL_FAIL(log, KEEL_ERR_NUMERIC, "row %zu at layer %u holds NaN or infinity", i / p->width + 1, p->layer[k].layer);
                }
            }
        }
    }
out:
    return st;
}

static keel_status estimate(struct keel_direction *out, const struct keel_sample *s, enum keel_method method,
                            const struct keel_direction_params *p, bool *found, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const size_t n = (size_t)p->k * s->width;
    size_t i = 0;
    double *v = malloc(n * sizeof *v);
    out->k = p->k;
    out->v = malloc(n * sizeof *out->v);
    if (!v || !out->v) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for directions");
    }
    KEEL_TRY(keel_estimate(s, method, p->k, v, log));
    for (*found = false; i < n && !*found; i++) {
        *found = v[i] != 0;
    }
    if (!*found) {
        goto out;
    }
    KEEL_TRY(keel_gates_compute(&out->gates, s, method, p->paired, v, p->seed + out->layer, log));
    out->has_gates = true;
    for (i = 0; i < n; i++) {
        out->v[i] = (float)v[i];
    }
out:
    free(v);
    return st;
}

// Mean |h| of the tokens of both captures.
static void size_of_both(double *size, const struct keel_capture *p, const struct keel_capture *n, uint32_t k)
{
    const double share = (double)p->n_tokens / (double)(p->n_tokens + n->n_tokens);
    for (uint32_t c = 0; c < p->width; c++) {
        size[c] = share * p->layer[k].size[c] + (1 - share) * n->layer[k].size[c];
    }
}

keel_status keel_directions_estimate(struct keel_directions *out, const struct keel_capture *p, const struct keel_capture *n,
                                     const struct keel_direction_params *params, const keel_log *log)
{
    keel_status st = KEEL_OK;
    enum keel_method method;
    uint32_t *index = NULL;
    double *size = NULL;
    bool found;
    struct keel_text equal = { 0 }; // layers without a direction
    *out = (struct keel_directions){ .width = p->width, .site = p->site };
    KEEL_TRY(check(p, n, params, &method, log));
    snprintf(out->method, sizeof out->method, "%s", params->method);
    out->at = calloc(p->n_layers, sizeof *out->at);
    index = malloc(KEEL_MAX(p->n_rows, n->n_rows) * sizeof *index);
    size = malloc(p->width * sizeof *size);
    if (!out->at || !index || !size) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for directions of %u layers", p->n_layers);
    }
    for (uint32_t i = 0; i < KEEL_MAX(p->n_rows, n->n_rows); i++) {
        index[i] = i;
    }
    for (uint32_t k = 0; k < p->n_layers; k++) {
        const struct keel_sample s = { .pos = p->layer[k].rows, .neg = n->layer[k].rows, .ip = index, .in = index, .np = p->n_rows,
                                       .nn = n->n_rows, .width = p->width, .size = size };
        struct keel_direction *d = &out->at[out->n++];
        size_of_both(size, p, n, k);
        d->layer = p->layer[k].layer;
        d->median_norm = (p->layer[k].median_norm + n->layer[k].median_norm) / 2;
        st = estimate(d, &s, method, params, &found, log);
        if (st != KEEL_OK) {
            KEEL_FAIL(log, st, "layer %u: no direction (reason above)", d->layer);
        }
        if (!found) {
            keel_text_addf(&equal, "%s%u", equal.len ? ", " : "", d->layer);
            free(d->v);
            *d = (struct keel_direction){ .v = NULL };
            out->n--;
        }
    }
    if (out->n == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "the two classes have the same activations in every layer asked for (%s), or none that method %s tells "
                  "apart: there is no direction between them; choose other layers (--layers, in a study `layers:`), positions or rows",
                  equal.data ? equal.data : "", params->method);
    }
    if (equal.len > 0) {
        KEEL_WARN(log, "layers %s: the two classes have the same activations there, or none that method %s tells apart: no direction, left out",
                  equal.data, params->method);
    }
out:
    free(index);
    free(size);
    keel_text_finish(&equal);
    if (st != KEEL_OK) {
        keel_directions_finish(out);
    }
    return st;
}

// --- writing -------------------------------------------------------------------------------------

static bool is_gguf(const char *path)
{
    const size_t n = strlen(path);
    return n >= 5 && strcmp(path + n - 5, ".gguf") == 0;
}

static keel_status write_gguf(const struct keel_directions *d, FILE *f, const keel_log *log)
{
    keel_status st = KEEL_OK;
    keel_gguf_writer *w = NULL;
    float *norms = malloc(d->n * sizeof *norms);
    int32_t *layers = malloc(d->n * sizeof *layers);
    uint32_t n = 0;
    if (!norms || !layers) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for a control vector");
    }
    KEEL_TRY(keel_gguf_writer_create(&w, log));
    keel_gguf_put_str(w, "general.architecture", "controlvector");
    for (uint32_t i = 0; i < d->n; i++) {
        if (d->at[i].layer > 0) {
            layers[n] = (int32_t)d->at[i].layer;
            norms[n++] = (float)d->at[i].median_norm;
        }
    }
    keel_gguf_put_str(w, "controlvector.model_hint", "gemma3");
    keel_gguf_put_u32(w, "controlvector.layer_count", n);
    keel_gguf_put_str(w, "keel.method", d->method);
    keel_gguf_put_u64(w, "keel.model_hash", d->model_hash);
    keel_gguf_put_i32s(w, "keel.layers", layers, n);
    keel_gguf_put_f32s(w, "keel.median_norm", norms, n);
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < d->n; i++) {
            char name[32];
            snprintf(name, sizeof name, "direction.%u", d->at[i].layer);
            if (d->at[i].layer > 0 && pass == 0) {
                keel_gguf_put_tensor(w, name, KEEL_F32, 1, (const uint64_t[]){ d->width });
            } else if (d->at[i].layer > 0) {
                KEEL_TRY(keel_gguf_writer_data(w, d->at[i].v, d->width * sizeof(float)));
            }
        }
        if (pass == 0) {
            KEEL_TRY(keel_gguf_writer_begin(w, f));
        }
    }
    KEEL_TRY(keel_gguf_writer_end(w));
out:
    keel_gguf_writer_destroy(&w);
    free(norms);
    free(layers);
    return st;
}

static keel_status write_st(const struct keel_directions *d, FILE *f, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_st_tensor *t = calloc(d->n, sizeof *t);
    char(*name)[32] = calloc(d->n, sizeof *name), hash[24];
    struct keel_text norms = { 0 };
    for (uint32_t i = 0; t && name && i < d->n; i++) {
        const struct keel_direction *a = &d->at[i];
        const uint64_t n = (uint64_t)a->k * d->width;
        snprintf(name[i], sizeof *name, "direction.%u", a->layer);
        t[i] = (struct keel_st_tensor){ .name = name[i], .type = KEEL_ST_F32, .n_dims = a->k > 1 ? 2 : 1,
                                        .dims = { a->k > 1 ? a->k : d->width, d->width }, .n_elems = n, .data = (const uint8_t *)a->v,
                                        .bytes = 4 * n };
        keel_text_addf(&norms, "%s%u:%.9g", i ? " " : "", a->layer, a->median_norm);
    }
    if (!t || !name || norms.failed) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "no memory for directions");
    }
    snprintf(hash, sizeof hash, "%016" PRIx64, d->model_hash);
    const struct keel_pair meta[] = { { "keel.site", keel_site_name[d->site] }, { "keel.method", d->method }, { "keel.model_hash", hash },
                                      { "keel.median_norm", norms.data } };
    KEEL_TRY(keel_st_write(f, t, d->n, meta, KEEL_COUNT(meta), log));
out:
    free(t);
    free(name);
    keel_text_finish(&norms);
    return st;
}

keel_status keel_directions_writable(const struct keel_directions *d, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (is_gguf(path)) {
        if (d->site != KEEL_SITE_POST) {
            KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: a control vector is added to what leaves a layer, these directions belong to \"%s\"; "
                      "write a .safetensors", path, keel_site_name[d->site]);
        }
        for (uint32_t i = 0; i < d->n; i++) {
            if (d->at[i].k > 1) {
                KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: a control vector has one direction a layer, layer %u has %u; write a .safetensors",
                          path, d->at[i].layer, d->at[i].k);
            }
        }
        if (d->n == 1 && d->at[0].layer == 0) {
            KEEL_FAIL(log, KEEL_ERR_UNSUPPORTED, "%s: a control vector has no place for layer 0; write a .safetensors", path);
        }
    }
out:
    return st;
}

keel_status keel_directions_write(const struct keel_directions *d, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_file_out file = { 0 };
    KEEL_TRY(keel_directions_writable(d, path, log));
    if (is_gguf(path) && d->n > 0 && d->at[0].layer == 0) {
        KEEL_WARN(log, "%s: a control vector has no place for layer 0: its direction is left out", path);
    }
    KEEL_TRY(keel_file_create(&file, path, log));
    KEEL_TRY(is_gguf(path) ? write_gguf(d, file.f, log) : write_st(d, file.f, log));
    KEEL_TRY(keel_file_commit(&file, log));
out:
    keel_file_abort(&file);
    return st;
}

// --- reading -------------------------------------------------------------------------------------

// Room for the direction of a tensor of this name and shape; NULL and a message if it does not fit.
static struct keel_direction *add_tensor(struct keel_directions *d, const char *path, const char *name, uint64_t k, uint64_t width,
                                         const keel_log *log)
{
    uint32_t layer;
    int used = 0;
    if (sscanf(name, "direction.%u%n", &layer, &used) != 1 || name[used] != '\0' || layer > 65535) {
        KEEL_ERROR(log, "%s: tensor \"%s\" is no direction.N", path, name);
        return NULL;
    }
    if (width == 0 || width > UINT32_MAX || k == 0 || k > width || (d->n > 0 && width != d->width)) {
        KEEL_ERROR(log, "%s: tensor \"%s\" is [%" PRIu64 ", %" PRIu64 "], which is no direction beside width %u", path, name, k, width, d->width);
        return NULL;
    }
    struct keel_direction *at = realloc(d->at, (d->n + 1) * sizeof *at);
    float *v = malloc(k * width * sizeof *v);
    d->at = at ? at : d->at;
    if (!at || !v) {
        free(v);
        KEEL_ERROR(log, "%s: no memory for tensor \"%s\"", path, name);
        return NULL;
    }
    d->width = (uint32_t)width;
    d->at[d->n] = (struct keel_direction){ .layer = layer, .k = (uint32_t)k, .v = v };
    return &d->at[d->n++];
}

static keel_status read_gguf(struct keel_directions *d, const struct keel_map *map, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    keel_gguf *g = NULL;
    struct keel_gguf_array layers, norms;
    KEEL_TRY(keel_gguf_parse(&g, map->data, map->len_bytes, path, log));
    const char *arch = keel_gguf_str(g, "general.architecture", NULL), *method = keel_gguf_str(g, "keel.method", NULL);
    if (!arch || strcmp(arch, "controlvector") != 0) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: is no control vector but \"%s\"", path, arch ? arch : "a GGUF without an architecture");
    }
    snprintf(d->method, sizeof d->method, "%s", method ? method : "unknown");
    d->site = KEEL_SITE_POST;
    keel_gguf_u64(g, "keel.model_hash", &d->model_hash);
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const struct keel_gguf_tensor *t = keel_gguf_tensor_at(g, i);
        struct keel_direction *a = add_tensor(d, path, t->name, t->n_elems / t->dims[0], t->dims[0], log);
        if (!a) {
            st = KEEL_ERR_FORMAT;
            goto out;
        }
        if (t->n_elems % keel_dtype_info(t->type)->block_elems) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: tensor \"%s\" is no whole number of blocks", path, t->name);
        }
        keel_dequantize(t->type, t->data, a->v, t->n_elems);
    }
    if (keel_gguf_array(g, "keel.layers", &layers) && keel_gguf_array(g, "keel.median_norm", &norms) && layers.n == norms.n &&
        keel_gguf_type_is_int(layers.type) && keel_gguf_type_is_float(norms.type)) {
        for (uint64_t i = 0; i < layers.n * d->n; i++) {
            struct keel_direction *a = &d->at[i % d->n];
            a->median_norm = keel_gguf_array_int(&layers, i / d->n) == a->layer ? keel_gguf_array_num(&norms, i / d->n) : a->median_norm;
        }
    }
out:
    keel_gguf_destroy(&g);
    return st;
}

static void read_norms(struct keel_directions *d, const char *text)
{
    unsigned layer;
    double norm;
    int used;
    while (text && sscanf(text, " %u:%lf%n", &layer, &norm, &used) == 2) {
        for (uint32_t i = 0; i < d->n; i++) {
            d->at[i].median_norm = d->at[i].layer == layer ? norm : d->at[i].median_norm;
        }
        text += used;
    }
}

static keel_status read_st(struct keel_directions *d, const struct keel_map *map, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    keel_st *s = NULL;
    KEEL_TRY(keel_st_parse(&s, map->data, map->len_bytes, path, log));
    const char *site = keel_st_meta(s, "keel.site"), *method = keel_st_meta(s, "keel.method"), *hash = keel_st_meta(s, "keel.model_hash");
    d->site = KEEL_SITE_POST;
    if (site) {
        uint32_t i = 0;
        while (i < KEEL_N_SITES && strcmp(site, keel_site_name[i]) != 0) {
            i++;
        }
        if (i == KEEL_N_SITES) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: its directions are for a site \"%s\", which is unknown; keel.site is pre, post, attn or mlp, or "
                      "tower.pre and so on", path, site);
        }
        d->site = (enum keel_site)i;
    }
    snprintf(d->method, sizeof d->method, "%s", method ? method : "unknown");
    d->model_hash = hash ? strtoull(hash, NULL, 16) : 0;
    for (size_t i = 0; i < keel_st_count(s); i++) {
        const struct keel_st_tensor *t = keel_st_at(s, i);
        const uint64_t k = t->n_dims == 2 ? t->dims[0] : 1, width = t->n_dims == 1 || t->n_dims == 2 ? t->dims[t->n_dims - 1] : 0;
        struct keel_direction *a = add_tensor(d, path, t->name, k, width, log);
        if (!a) {
            st = KEEL_ERR_FORMAT;
            goto out;
        }
        keel_st_to_f32(t, a->v);
    }
    read_norms(d, keel_st_meta(s, "keel.median_norm"));
out:
    keel_st_destroy(&s);
    return st;
}

static int by_layer(const void *a, const void *b)
{
    const struct keel_direction *x = a, *y = b;
    return (x->layer > y->layer) - (x->layer < y->layer);
}

keel_status keel_directions_read(struct keel_directions *out, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    *out = (struct keel_directions){ 0 };
    KEEL_TRY(keel_map_open(&map, path, log));
    KEEL_TRY(map.len_bytes >= 4 && memcmp(map.data, "GGUF", 4) == 0 ? read_gguf(out, &map, path, log) : read_st(out, &map, path, log));
    if (out->n == 0) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: no tensor direction.N in it", path);
    }
    qsort(out->at, out->n, sizeof *out->at, by_layer);
    for (uint32_t i = 0; i < out->n; i++) {
        double length = 0;
        if (i > 0 && out->at[i].layer == out->at[i - 1].layer) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: two directions for layer %u", path, out->at[i].layer);
        }
        for (size_t c = 0; c < (size_t)out->at[i].k * out->width; c++) {
            if (!isfinite(out->at[i].v[c])) {
                KEEL_FAIL(log, KEEL_ERR_NUMERIC, "%s: the direction of layer %u holds NaN or infinity", path, out->at[i].layer);
            }
        }
        for (uint32_t k = 0; k < out->at[i].k; k++) {
            length = KEEL_MAX(length, keel_direction_length(out->at[i].v + (size_t)k * out->width, out->width));
        }
        if (length < 1e-30) { // nothing to steer along, to project on or to compare
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the direction of layer %u has length 0; leave the layer out of the file", path, out->at[i].layer);
        }
    }
out:
    keel_map_close(&map);
    if (st != KEEL_OK) {
        keel_directions_finish(out);
    }
    return st;
}
