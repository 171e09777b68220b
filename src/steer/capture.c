// SPDX-License-Identifier: MIT
// steer/capture.c: activations of rows: running sums on the device, row means, on request every token in a file.
#include "steer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct layer {
    struct run *run;
    struct keel_span sums, shift, cov; // on the device
    struct keel_span rows;             // host: [cap, width] segment sums, or every token of the batch where a file is written
    struct keel_span squares;          // host: [cap] squared lengths
    double *row_sum;                   // [n_rows, width]
    float *norms;                      // [n_tokens] of captured tokens
};

struct run {
    keel_session *session;
    keel_model *model;
    const keel_log *log;
    const struct keel_capture_params *p;
    struct keel_capture *out;
    struct layer *layer;
    keel_heap *device, *host;
    struct keel_span segments; // host: [cap, 2] u32
    uint32_t cap, width, n_segments;
    uint32_t n_all;            // layers where the site is
    uint32_t n_patches;        // of an image, at a site of the vision tower; else 0
    size_t seen;               // captured tokens so far
    bool probing;              // the first row, which shows where the sums should be shifted to
    struct keel_file_out file;
    uint64_t file_data;           // where its tensors begin
    uint32_t *raw_row, *raw_at;   // [n_tokens] captured tokens: row, place in it, id
    int32_t *raw_token;
    const struct keel_steer_rows *rows;
};

// --- buffers -------------------------------------------------------------------------------------

static keel_status want(keel_heap *heap, struct keel_span *span, uint64_t bytes)
{
    return keel_heap_alloc(heap, bytes, span);
}

static keel_status make_buffers(struct run *r)
{
    keel_status st = KEEL_OK;
    keel_device *dev = keel_model_device(r->model);
    const uint64_t row = 4ull * r->width, n = r->out->n_layers;
    const uint64_t device = n * (keel_align_up(6 * row, 256) + keel_align_up(row, 256) + (r->p->covariance ? keel_align_up(row * r->width, 256) : 0));
    const uint64_t host = n * (keel_align_up(row * r->cap, 256) + keel_align_up(4ull * r->cap, 256)) + keel_align_up(8ull * r->cap, 256);
    if (r->p->covariance && row * r->width > keel_device_caps(dev)->max_range) {
        KEEL_FAIL(r->log, KEEL_ERR_UNSUPPORTED, "a covariance of %u channels needs a binding of %.0f MB, this device takes %.0f MB", r->width,
                  (double)(row * r->width) / 1e6, (double)keel_device_caps(dev)->max_range / 1e6);
    }
    KEEL_TRY(keel_heap_create(&r->device, dev, KEEL_HEAP_DEVICE, "sums of activations"));
    KEEL_TRY(keel_heap_create(&r->host, dev, KEEL_HEAP_HOST, "captured activations"));
    KEEL_TRY(keel_heap_reserve(r->device, device));
    KEEL_TRY(keel_heap_reserve(r->host, host));
    KEEL_TRY(want(r->host, &r->segments, 8ull * r->cap));
    for (uint32_t i = 0; i < n; i++) {
        struct layer *l = &r->layer[i];
        KEEL_TRY(want(r->device, &l->sums, 6 * row));
        KEEL_TRY(want(r->device, &l->shift, row));
        if (r->p->covariance) {
            KEEL_TRY(want(r->device, &l->cov, row * r->width));
        }
        KEEL_TRY(want(r->host, &l->rows, row * r->cap));
        KEEL_TRY(want(r->host, &l->squares, 4ull * r->cap));
    }
out:
    return st;
}

static keel_status zero(struct run *r, struct keel_span s)
{
    float *nothing = calloc(s.bytes / 4, 4);
    const keel_status st = nothing ? keel_upload(keel_model_device(r->model), s, nothing, s.bytes) : KEEL_ERR_NO_MEMORY;
    free(nothing);
    return st;
}

// Sums start at zero, shifted by the mean of the first row.
static keel_status start_sums(struct run *r)
{
    keel_status st = KEEL_OK;
    float *shift = malloc(r->width * sizeof *shift);
    if (!shift) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "no memory for sums of %u channels", r->width);
    }
    for (uint32_t i = 0; i < r->out->n_layers; i++) {
        struct layer *l = &r->layer[i];
        for (uint32_t c = 0; c < r->width; c++) {
            shift[c] = (float)(l->row_sum[c] / r->out->row_tokens[0]);
        }
        KEEL_TRY(keel_upload(keel_model_device(r->model), l->shift, shift, l->shift.bytes));
        KEEL_TRY(zero(r, l->sums));
        if (r->p->covariance) {
            KEEL_TRY(zero(r, l->cov));
        }
        memset(l->row_sum, 0, r->out->n_rows * r->width * sizeof *l->row_sum);
    }
    memset(r->out->row_tokens, 0, r->out->n_rows * sizeof *r->out->row_tokens);
    r->seen = 0;
out:
    free(shift);
    return st;
}

// --- a batch -------------------------------------------------------------------------------------

// Runs of tokens of one row; written once a batch, when its lowest layer is recorded.
static void make_segments(struct run *r, const struct keel_batch_tokens *t)
{
    uint32_t *s = keel_span_host(r->segments);
    r->n_segments = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        if (i == 0 || t->row[i] != t->row[i - 1]) {
            s[2 * r->n_segments++] = i;
        }
        s[2 * r->n_segments - 1] = i + 1;
    }
    keel_span_flush(keel_model_device(r->model), r->segments);
}

static void capture(void *user, const struct keel_capture_call *c)
{
    struct layer *l = user;
    struct run *r = l->run;
    if (l == r->layer) {
        make_segments(r, c->tokens);
    }
    const struct keel_rows_sums_params sums = { .x = c->x, .marks = c->marks, .shift = l->shift, .sums = l->sums, .n_rows = c->n_rows,
                                                .width = c->width };
    keel_rows_square(c->rec, c->x, l->squares, c->n_rows, c->width);
    if (r->p->raw && !r->probing) {
        const uint64_t bytes = 4ull * c->n_rows * c->width;
        keel_record_copy(c->rec, keel_span_sub(l->rows, 0, bytes), keel_span_sub(c->x, 0, bytes));
    } else {
        keel_rows_pool(c->rec, &(struct keel_rows_pool_params){ .x = c->x, .marks = c->marks, .segments = r->segments, .y = l->rows,
                                                                .n_rows = c->n_rows, .n_segments = r->n_segments, .width = c->width });
    }
    if (!r->probing) {
        keel_rows_sums(c->rec, &sums);
    }
    if (r->p->covariance && !r->probing) {
        struct keel_rows_sums_params cov = sums;
        cov.sums = l->cov;
        keel_rows_cov(c->rec, &cov);
    }
}

static keel_status write_token(struct run *r, uint32_t layer, const float *x)
{
    const uint32_t size = r->p->raw_f16 ? 2 : 4;
    const uint64_t at = r->file_data + ((uint64_t)layer * r->out->n_tokens + r->seen) * r->width * size;
    if (fseeko(r->file.f, (off_t)at, SEEK_SET) != 0) {
        KEEL_ERROR(r->log, "%s: cannot be written", r->p->raw);
        return KEEL_ERR_IO;
    }
    if (!r->p->raw_f16) {
        fwrite(x, 4, r->width, r->file.f);
        return KEEL_OK;
    }
    for (uint32_t c = 0; c < r->width; c++) {
        const uint16_t h = keel_f32_to_f16(x[c]);
        if ((h & 0x7c00) == 0x7c00) {
            KEEL_ERROR(r->log, "%s: channel %u of layer %u is %g, beyond F16; write F32", r->p->raw, c, r->out->layer[layer].layer, (double)x[c]);
            return KEEL_ERR_NUMERIC;
        }
        fwrite(&h, 2, 1, r->file.f);
    }
    return KEEL_OK;
}

static void add_to(double *sum, const float *x, uint32_t n)
{
    for (uint32_t c = 0; c < n; c++) {
        sum[c] += (double)x[c];
    }
}

// Every marked token of the batch: to its row's sum and to the file.
static keel_status store_tokens(struct run *r, const struct keel_batch_tokens *t)
{
    keel_status st = KEEL_OK;
    for (uint32_t i = 0; i < t->n; i++) {
        if (t->marks[i] == 0) {
            continue;
        }
        for (uint32_t k = 0; k < r->out->n_layers; k++) {
            const float *x = (const float *)keel_span_host(r->layer[k].rows) + (size_t)i * r->width;
            add_to(r->layer[k].row_sum + (size_t)t->row[i] * r->width, x, r->width);
            KEEL_TRY(write_token(r, k, x));
        }
        KEEL_ASSERT(r->raw_row[r->seen] == t->row[i] && r->raw_at[r->seen] == t->at[i]);
        r->seen++;
    }
out:
    return st;
}

static keel_status after_batch(void *user, const struct keel_batch_tokens *t)
{
    struct run *r = user;
    keel_device *dev = keel_model_device(r->model);
    const uint32_t *segment = keel_span_host(r->segments);
    const size_t before = r->seen;
    for (uint32_t k = 0; k < r->out->n_layers; k++) {
        struct layer *l = &r->layer[k];
        keel_span_fetch(dev, l->rows);
        keel_span_fetch(dev, l->squares);
        size_t n = before;
        for (uint32_t i = 0; i < t->n; i++) {
            if (t->marks[i] != 0) {
                l->norms[n++] = sqrtf(((const float *)keel_span_host(l->squares))[i]);
            }
        }
        for (uint32_t i = 0; i < r->n_segments && !(r->p->raw && !r->probing); i++) {
            const float *x = (const float *)keel_span_host(l->rows) + (size_t)i * r->width;
            add_to(l->row_sum + (size_t)t->row[segment[2 * i]] * r->width, x, r->width);
        }
        r->seen = n;
    }
    for (uint32_t i = 0; i < t->n; i++) {
        r->out->row_tokens[t->row[i]] += t->marks[i] != 0;
    }
    if (r->p->raw && !r->probing) {
        r->seen = before;
        return store_tokens(r, t);
    }
    return KEEL_OK;
}

// --- the file of raw activations -----------------------------------------------------------------

// JSON list of the tokens' texts. Bytes beyond ASCII as Latin-1: a token may be part of a character.
static void token_texts(const struct run *r, struct keel_text *text)
{
    keel_text_addf(text, "[");
    for (uint64_t i = 0; i < r->out->n_tokens; i++) {
        size_t len;
        const char *bytes = keel_token_text(r->model, r->raw_token[i], true, &len);
        keel_text_addf(text, i ? ",\"" : "\"");
        for (size_t k = 0; bytes && k < len; k++) {
            const unsigned char ch = (unsigned char)bytes[k];
            keel_text_addf(text, ch < 0x20 || ch >= 0x7f || ch == '"' || ch == '\\' ? "\\u%04x" : "%c", ch);
        }
        keel_text_addf(text, "\"");
    }
    keel_text_addf(text, "]");
}

// The header with the sizes known beforehand, so that tokens can be written where they belong as they come.
static keel_status open_file(struct run *r)
{
    keel_status st = KEEL_OK;
    const uint32_t n = r->out->n_layers;
    const uint64_t n_tokens = r->out->n_tokens;
    char(*names)[24] = calloc(n, sizeof *names);
    struct keel_st_tensor *t = calloc(n + 3, sizeof *t);
    if (!names || !t) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "no memory for the header of %s", r->p->raw);
    }
    for (uint32_t i = 0; i < n; i++) {
        snprintf(names[i], sizeof names[i], "hidden.%u", r->out->layer[i].layer);
        t[i] = (struct keel_st_tensor){ .name = names[i], .type = r->p->raw_f16 ? KEEL_ST_F16 : KEEL_ST_F32, .n_dims = 2,
                                        .dims = { n_tokens, r->width } };
    }
    static const char *const lists[] = { "row", "position", "token" };
    for (uint32_t i = 0; i < 3; i++) {
        t[n + i] = (struct keel_st_tensor){ .name = lists[i], .type = KEEL_ST_I32, .n_dims = 1, .dims = { n_tokens } };
    }
    struct keel_text ids = { 0 }, texts = { 0 };
    token_texts(r, &texts);
    for (size_t i = 0; i < r->rows->n; i++) {
        keel_text_addf(&ids, "%s%s", i ? "," : "[", r->rows->id[i]);
    }
    keel_text_addf(&ids, "]");
    const struct keel_pair meta[] = { { "site", keel_site_name[r->p->site] }, { "model", keel_model_info(r->model)->path },
                                      { "ids", ids.data ? ids.data : "" }, { "tokens", texts.data ? texts.data : "" } };
    st = ids.failed || texts.failed ? KEEL_ERR_NO_MEMORY : KEEL_OK;
    st = st != KEEL_OK ? st : keel_file_create(&r->file, r->p->raw, r->log);
    if (st == KEEL_OK) {
        st = keel_st_write_header(r->file.f, t, n + 3, meta, KEEL_COUNT(meta), r->log);
    }
    keel_text_finish(&ids);
    keel_text_finish(&texts);
    r->file_data = st == KEEL_OK ? (uint64_t)ftello(r->file.f) : 0;
out:
    free(names);
    free(t);
    return st;
}

static keel_status close_file(struct run *r)
{
    const uint64_t n = r->out->n_tokens, size = r->p->raw_f16 ? 2 : 4;
    if (fseeko(r->file.f, (off_t)(r->file_data + r->out->n_layers * n * r->width * size), SEEK_SET) != 0) {
        KEEL_ERROR(r->log, "%s: cannot be written", r->p->raw);
        return KEEL_ERR_IO;
    }
    fwrite(r->raw_row, 4, n, r->file.f);
    fwrite(r->raw_at, 4, n, r->file.f);
    fwrite(r->raw_token, 4, n, r->file.f);
    return keel_file_commit(&r->file, r->log);
}

// --- results -------------------------------------------------------------------------------------

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static keel_status finish_layer(struct run *r, uint32_t k)
{
    keel_status st = KEEL_OK;
    struct layer *l = &r->layer[k];
    struct keel_capture_layer *o = &r->out->layer[k];
    const uint32_t d = r->width;
    const double n = (double)r->out->n_tokens;
    keel_device *dev = keel_model_device(r->model);
    float *sums = malloc(6 * (size_t)d * sizeof *sums), *shift = malloc(d * sizeof *shift);
    float *cov = r->p->covariance ? malloc((size_t)d * d * sizeof *cov) : NULL;
    if (!sums || !shift || (r->p->covariance && !cov)) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "no memory for the sums of %u channels", d);
    }
    KEEL_TRY(keel_download(dev, sums, l->sums, 6ull * d * sizeof *sums));
    KEEL_TRY(keel_download(dev, shift, l->shift, d * sizeof *shift));
    for (uint32_t c = 0; c < d; c++) {
        const double off = ((double)sums[c] + (double)sums[d + c]) / n; // mean - shift
        o->mean[c] = (double)shift[c] + off;
        o->var[c] = KEEL_MAX(((double)sums[2 * d + c] + (double)sums[3 * d + c]) / n - off * off, 0);
        o->size[c] = ((double)sums[4 * d + c] + (double)sums[5 * d + c]) / n;
        if (!isfinite(o->mean[c]) || !isfinite(o->var[c])) {
            KEEL_FAIL(r->log, KEEL_ERR_NUMERIC, "channel %u of layer %u is NaN or infinity; run `keel devices` and report the driver", c, o->layer);
        }
    }
    if (cov) {
        KEEL_TRY(keel_download(dev, cov, l->cov, (size_t)d * d * sizeof *cov));
        for (size_t i = 0; i < (size_t)d * d; i++) {
            const uint32_t a = (uint32_t)(i / d), b = (uint32_t)(i % d);
            o->cov[i] = (double)cov[i] / n - (o->mean[a] - (double)shift[a]) * (o->mean[b] - (double)shift[b]);
        }
    }
    for (size_t i = 0; i < r->out->n_rows; i++) {
        for (uint32_t c = 0; c < d; c++) {
            o->rows[i * d + c] = (float)(l->row_sum[i * d + c] / r->out->row_tokens[i]);
        }
    }
    qsort(l->norms, r->out->n_tokens, sizeof *l->norms, ascending);
    o->median_norm = ((double)l->norms[(r->out->n_tokens - 1) / 2] + (double)l->norms[r->out->n_tokens / 2]) / 2;
out:
    free(sums);
    free(shift);
    free(cov);
    return st;
}

static uint32_t count_tokens(const struct run *r, const struct keel_score_row *row)
{
    uint32_t n = row->n_images * r->n_patches;
    for (uint32_t t = 0; r->n_patches == 0 && t < row->n; t++) {
        n += keel_steer_marked(row, r->p->at, t);
    }
    return n;
}

// The tokens that will be captured, in the order in which they come. Patches have the id of their image's soft tokens.
static void list_tokens(struct run *r)
{
    size_t n = 0;
    for (uint32_t i = 0; i < r->rows->n; i++) {
        const struct keel_score_row *row = &r->rows->row[i];
        for (uint32_t t = 0; t < row->n_images * r->n_patches; t++) {
            r->raw_row[n] = i;
            r->raw_at[n] = t;
            r->raw_token[n++] = row->ids[row->images[t / r->n_patches].at];
        }
        if (r->n_patches > 0) {
            continue;
        }
        for (uint32_t t = 0; t < row->n; t++) {
            if (keel_steer_marked(row, r->p->at, t)) {
                r->raw_row[n] = i;
                r->raw_at[n] = t;
                r->raw_token[n++] = row->ids[t];
            }
        }
    }
}

static keel_status make_results(struct run *r)
{
    keel_status st = KEEL_OK;
    struct keel_capture *o = r->out;
    const size_t d = r->width;
    o->layer = calloc(o->n_layers, sizeof *o->layer);
    o->row_tokens = calloc(o->n_rows, sizeof *o->row_tokens);
    r->layer = calloc(o->n_layers, sizeof *r->layer);
    r->raw_row = calloc(o->n_tokens, sizeof *r->raw_row);
    r->raw_at = calloc(o->n_tokens, sizeof *r->raw_at);
    r->raw_token = calloc(o->n_tokens, sizeof *r->raw_token);
    bool ok = o->layer && o->row_tokens && r->layer && r->raw_row && r->raw_at && r->raw_token;
    for (uint32_t i = 0, k = 0; ok && i < r->n_all; i++) {
        if (r->p->layers && !r->p->layers[i]) {
            continue;
        }
        struct keel_capture_layer *l = &o->layer[k];
        *l = (struct keel_capture_layer){ .layer = i, .mean = calloc(d, 8), .var = calloc(d, 8), .size = calloc(d, 8),
                                          .cov = r->p->covariance ? calloc(d * d, 8) : NULL, .rows = calloc(o->n_rows * d, 4) };
        r->layer[k].run = r;
        r->layer[k].row_sum = calloc(o->n_rows * d, 8);
        r->layer[k].norms = calloc(o->n_tokens, 4);
        ok = l->mean && l->var && l->size && l->rows && (l->cov || !r->p->covariance) && r->layer[k].row_sum && r->layer[k].norms;
        k++;
    }
    if (!ok) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "no memory for activations of %zu rows at %u layers", o->n_rows, o->n_layers);
    }
    list_tokens(r);
out:
    return st;
}

void keel_capture_finish(struct keel_capture *c)
{
    for (uint32_t i = 0; c->layer && i < c->n_layers; i++) {
        struct keel_capture_layer *l = &c->layer[i];
        free(l->mean);
        free(l->var);
        free(l->size);
        free(l->cov);
        free(l->rows);
    }
    free(c->layer);
    free(c->row_tokens);
    *c = (struct keel_capture){ 0 };
}

static keel_status check(struct run *r)
{
    keel_status st = KEEL_OK;
    for (uint32_t i = 0; i < r->n_all; i++) {
        r->out->n_layers += !r->p->layers || r->p->layers[i];
    }
    if (r->out->n_layers == 0 || r->rows->n == 0) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "nothing to capture: no layers or no rows");
    }
    for (size_t i = 0; i < r->rows->n; i++) {
        const uint32_t tokens = count_tokens(r, &r->rows->row[i]);
        if (tokens == 0 && r->n_patches > 0) {
            KEEL_FAIL(r->log, KEEL_ERR_DATA, "row %zu has no image, and %s is in the vision tower", i + 1, keel_site_name[r->p->site]);
        }
        if (tokens == 0) {
            KEEL_FAIL(r->log, KEEL_ERR_DATA, "row %zu has no token at the positions asked for (%u tokens of prompt, %u of response)", i + 1,
                      r->rows->row[i].first, r->rows->row[i].n - r->rows->row[i].first);
        }
        r->out->n_tokens += tokens;
    }
out:
    return st;
}

// Every image of every row through the tower.
static keel_status run_tower(const struct run *r, size_t n_rows, bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < n_rows; i++) {
        const struct keel_score_row *row = &r->rows->row[i];
        for (uint32_t k = 0; k < row->n_images; k++) {
            KEEL_TRY(keel_images_capture(r->p->images, keel_model_device(r->model), row->images[k].embeds, (uint32_t)i, k * r->n_patches));
        }
        if ((progress && !progress(user, (i + 1) * r->n_patches, n_rows * r->n_patches)) || keel_interrupted()) {
            KEEL_FAIL(r->log, KEEL_INTERRUPTED, "capture stopped");
        }
    }
out:
    return st;
}

static keel_status run_rows(const struct run *r, size_t n_rows, keel_hooks *hooks,
                            bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    struct keel_steer_rows some = *r->rows;
    some.n = n_rows;
    return r->n_patches > 0 ? run_tower(r, n_rows, progress, user) : keel_steer_run(r->session, &some, hooks, progress, user);
}

// Where the site is: the model or its tower.
static keel_status find_site(struct run *r, keel_hooks *hooks)
{
    keel_status st = KEEL_OK;
    const struct keel_capture_params *p = r->p;
    if (p->site >= KEEL_SITE_TOWER) {
        if (!p->images || (p->at.kind != KEEL_AT_ALL && p->at.kind != KEEL_AT_IMAGE)) {
            KEEL_FAIL(r->log, KEEL_ERR_ARG, "%s is in the vision tower: give --mmproj, and positions all or image", keel_site_name[p->site]);
        }
        r->n_patches = r->cap = keel_vision_patch_count(keel_images_vision(p->images));
        keel_hooks_use_images(hooks, p->images);
    }
    keel_hooks_shape(hooks, p->site, &r->n_all, &r->width);
    r->out->width = r->width;
out:
    return st;
}

keel_status keel_capture_run(struct keel_capture *out, keel_session *session, struct keel_steer_rows *rows,
                             const struct keel_capture_params *params,
                             bool (*progress)(void *user, uint64_t done, uint64_t total), void *user)
{
    keel_status st = KEEL_OK;
    keel_hooks *own = NULL, *hooks = params->hooks;
    struct run r = { .session = session, .model = keel_session_model(session), .log = keel_session_log(session), .p = params, .out = out,
                     .rows = rows, .cap = keel_session_batch_tokens(session) };
    *out = (struct keel_capture){ .site = params->site, .n_rows = rows->n };
    if (!hooks) {
        KEEL_TRY(keel_hooks_create(&own, r.model));
        hooks = own;
    }
    KEEL_TRY(find_site(&r, hooks));
    KEEL_TRY(check(&r));
    KEEL_TRY(make_results(&r));
    KEEL_TRY(make_buffers(&r));
    for (uint32_t k = 0; k < out->n_layers; k++) {
        KEEL_TRY(keel_hooks_add_capture(hooks, params->site, out->layer[k].layer, params->at, capture, &r.layer[k]));
    }
    KEEL_TRY(keel_hooks_after_batch(hooks, params->at, after_batch, &r));
    r.probing = true;
    KEEL_TRY(run_rows(&r, 1, hooks, NULL, NULL));
    KEEL_TRY(start_sums(&r));
    r.probing = false;
    if (params->raw) {
        KEEL_TRY(open_file(&r));
    }
    KEEL_TRY(run_rows(&r, rows->n, hooks, progress, user));
    KEEL_ASSERT(r.seen == out->n_tokens);
    for (uint32_t k = 0; k < out->n_layers; k++) {
        KEEL_TRY(finish_layer(&r, k));
    }
    if (params->raw) {
        KEEL_TRY(close_file(&r));
    }
out:
    keel_hooks_destroy(&own);
    keel_file_abort(&r.file);
    keel_heap_destroy(&r.device);
    keel_heap_destroy(&r.host);
    for (uint32_t k = 0; r.layer && k < out->n_layers; k++) {
        free(r.layer[k].row_sum);
        free(r.layer[k].norms);
    }
    free(r.layer);
    free(r.raw_row);
    free(r.raw_at);
    free(r.raw_token);
    if (st != KEEL_OK) {
        keel_capture_finish(out);
    }
    return st;
}
