// SPDX-License-Identifier: MIT
// doctor/doctor.c: walks the registry of variants: checks each that the device offers, times the right ones, chooses.
// Does not know what a kernel computes (cases.c) nor how it is remembered (verdict.c).
#include "cases.h"
#include "verdict.h"

#include "models.h"
#include "platform.h"
#include "ref.h"

#include <keel/doctor.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Runs of a case: drivers were seen to err in a quarter of runs (portability notes 3.3).
#define REPEATS_QUICK 3u
#define REPEATS_FULL 50u

struct doctor {
    keel_device *dev;
    const keel_log *log;
    const struct keel_doctor_params *p;
    struct keel_doctor_report *report;
    struct verdict verdict;
    struct bed bed;
    struct timing timing;
    keel_heap *heap; // of a matrix to time when there is no model
    struct keel_matrix matrix;
};

// --- shapes to time ------------------------------------------------------------------------------

static void add_matrix(struct timing *t, const struct keel_matrix *w)
{
    for (uint32_t i = 0; i < t->n_matrices; i++) {
        const struct keel_matrix *m = t->matrix[i].w;
        if (m->type == w->type && m->rows == w->rows && m->cols == w->cols) {
            t->matrix[i].count++;
            return;
        }
    }
    if (t->n_matrices < MAX_TIMED) {
        t->matrix[t->n_matrices++] = (struct timed_matrix){ .w = w, .count = 1 };
    }
}

static void shapes_of_model(struct timing *t, const keel_model *model)
{
    const struct keel_model_info *info = keel_model_info(model);
    *t = (struct timing){ .n_heads = info->n_heads, .n_kv_heads = info->n_kv_heads, .head_dim = info->head_dim, .rows = 128,
                          .keys = 512, .rank = 16 };
    for (uint32_t layer = 0; layer < info->n_layers; layer++) {
        for (uint32_t proj = 0; proj < KEEL_N_PROJ; proj++) {
            add_matrix(t, keel_model_matrix(model, layer, proj));
        }
    }
    add_matrix(t, keel_model_matrix(model, 0, KEEL_N_PROJ));
}

// Without a model: one matrix of the commonest type, about as large as those of the 270M model.
static keel_status middling_shapes(struct doctor *d)
{
    enum { N = 1024, K = 640, BYTES = N * K / 32 * 18 };
    keel_status st = KEEL_OK;
    struct keel_rng rng = keel_rng_make(1, 0);
    uint8_t *blocks = malloc(BYTES);
    if (!blocks) {
        KEEL_FAIL(d->log, KEEL_ERR_NO_MEMORY, "out of memory for timing kernels");
    }
    ref_random_blocks(&rng, KEEL_Q4_0, blocks, (size_t)N * K);
    KEEL_TRY(keel_heap_create(&d->heap, d->dev, KEEL_HEAP_DEVICE, "kernel timing"));
    KEEL_TRY(keel_matrix_create(&d->matrix, d->dev, d->heap, KEEL_Q4_0, N, K, blocks, NULL));
    KEEL_TRY(keel_stage_finish(d->dev));
    d->timing = (struct timing){ .matrix = { { &d->matrix, 1 } }, .n_matrices = 1, .n_heads = 4, .n_kv_heads = 1, .head_dim = 256,
                                 .rows = 64, .keys = 512, .rank = 16 };
out:
    free(blocks);
    return st;
}

// --- checking ------------------------------------------------------------------------------------

// Whether the device is still there. A variant that loses it ends the program: nothing can run on it any more.
static keel_status alive(struct doctor *d, const struct keel_doctor_row *row)
{
    keel_recorder_reset(d->bed.rec);
    if (keel_recorder_submit(d->bed.rec) != KEEL_ERR_DEVICE_LOST) {
        return KEEL_OK;
    }
    KEEL_ERROR(d->log, "%s: checking %s with variant %s lost the device; force another with --variant", keel_device_caps(d->dev)->name,
               row->op, row->variant);
    return KEEL_ERR_DEVICE_LOST;
}

static void warn_wrong(struct doctor *d, const struct keel_doctor_row *row, bool base)
{
    KEEL_WARN(d->log, "%s: %s, variant %s: %s; %s", keel_device_caps(d->dev)->name, row->op, row->variant, row->why,
              base ? "this device cannot be trusted" : "left out");
}

// Checks one op with the variant in force into a new row, and times it if it is right and has variants.
static keel_status check_op(struct doctor *d, const struct check *c, enum keel_variant v, struct keel_doctor_row **out)
{
    const keel_log quiet = { .level = (enum keel_log_level)0 }; // the row says what was wrong
    struct keel_doctor_row *row = &d->report->row[d->report->n_rows++];
    KEEL_ASSERT(d->report->n_rows <= KEEL_COUNT(d->report->row));
    *row = (struct keel_doctor_row){ 0 };
    snprintf(row->op, sizeof row->op, "%s", c->op);
    snprintf(row->family, sizeof row->family, "%s", c->family < 0 ? "" : keel_family_name((enum keel_family)c->family));
    snprintf(row->variant, sizeof row->variant, "%s", keel_variant_name(v));
    const keel_log *log = keel_device_set_log(d->dev, &quiet);
    row->right = c->run(&d->bed, d->p->quick, &row->cases, &row->worst);
    if (!row->right) {
        snprintf(row->why, sizeof row->why, "%s", d->bed.result.why);
    } else if (c->family >= 0) {
        row->ms = doctor_time(&d->bed, (enum keel_family)c->family, &d->timing) * 1e-6;
    }
    (void)keel_device_set_log(d->dev, log);
    *out = row;
    return alive(d, row);
}

static void done_with(struct doctor *d, const struct keel_doctor_row *row)
{
    if (!row->right) {
        warn_wrong(d, row, strcmp(row->variant, keel_variant_name(KEEL_VARIANT_BASE)) == 0);
    }
    if (d->p->progress) {
        d->p->progress(d->p->user, row);
    }
}

// All variants of an op; chooses the fastest of those that are right and exact. Times vary by a tenth, so the later one in the registry,
// which is made for more of the device, wins unless it is slower by more: the choice should not change from one check to the next.
static keel_status check_variants(struct doctor *d, const struct check *c)
{
    keel_status st = KEEL_OK;
    const enum keel_family f = (enum keel_family)c->family;
    struct keel_doctor_row *best = NULL;
    for (uint32_t i = 0; i < KEEL_N_VARIANTS; i++) {
        const enum keel_variant v = (enum keel_variant)i;
        struct keel_doctor_row *row = NULL;
        const bool slow = d->p->quick && keel_variant_emulated(keel_device_caps(d->dev), v);
        if (slow || !keel_variant_set(d->dev, f, v)) {
            continue; // not on this device, or not worth the seconds of a first use
        }
        KEEL_TRY(check_op(d, c, v, &row));
        done_with(d, row);
        if (row->right && row->ms > 0 && keel_variant_exact(v) && (!best || row->ms < 1.1 * best->ms)) {
            best = row;
            d->verdict.variant[f] = v;
        }
        if (!row->right && v == KEEL_VARIANT_BASE) {
            d->report->n_base_wrong++;
        }
    }
    if (best) {
        best->chosen = true;
    }
out:
    return st;
}

keel_status keel_doctor_run(keel_device *dev, const struct keel_doctor_params *params, struct keel_doctor_report *report)
{
    keel_status st = KEEL_OK;
    const struct keel_doctor_params none = { 0 };
    struct doctor d = { .dev = dev, .log = keel_device_log(dev), .p = params ? params : &none, .report = report };
    size_t n = 0;
    const struct check *checks = doctor_checks(&n);
    memset(report, 0, sizeof *report);
    report->lacks_coop = keel_variant_missing(keel_device_caps(dev));
    KEEL_TRY(bed_open(&d.bed, dev, d.p->quick ? REPEATS_QUICK : REPEATS_FULL));
    if (d.p->model) {
        shapes_of_model(&d.timing, d.p->model);
    } else {
        KEEL_TRY(middling_shapes(&d));
    }
    for (size_t i = 0; i < n; i++) {
        struct keel_doctor_row *row = NULL;
        if (keel_interrupted()) {
            st = KEEL_INTERRUPTED;
            goto out;
        }
        if (checks[i].family >= 0) {
            KEEL_TRY(check_variants(&d, &checks[i]));
        } else if (!d.p->quick) {
            KEEL_TRY(check_op(&d, &checks[i], KEEL_VARIANT_BASE, &row));
            report->n_base_wrong += !row->right;
            row->chosen = row->right;
            done_with(&d, row);
        }
    }
    d.verdict.n_base_wrong = report->n_base_wrong;
    verdict_use(&d.verdict, dev);
    verdict_save(&d.verdict, dev);
out:
    bed_close(&d.bed);
    keel_heap_destroy(&d.heap);
    return st;
}

// --- what a program uses -------------------------------------------------------------------------

// Forces one word of --variant.
static keel_status force(keel_device *dev, const char *family, const char *name)
{
    keel_status st = KEEL_OK;
    enum keel_variant v;
    bool known = !family, used = false;
    if (!keel_variant_parse(name, &v)) {
        KEEL_FAIL(keel_device_log(dev), KEEL_ERR_ARG, "there is no variant \"%s\"; keel doctor lists them", name);
    }
    for (uint32_t f = 0; f < KEEL_N_FAMILIES; f++) {
        if (!family || strcmp(family, keel_family_name((enum keel_family)f)) == 0) {
            known = true;
            used = keel_variant_set(dev, (enum keel_family)f, v) || used;
        }
    }
    if (!known) {
        KEEL_FAIL(keel_device_log(dev), KEEL_ERR_ARG, "there is no family of ops \"%s\"; keel doctor lists them", family);
    }
    if (!used) {
        KEEL_FAIL(keel_device_log(dev), KEEL_ERR_ARG, "%s offers no variant \"%s\"%s%s; keel doctor lists what it offers",
                  keel_device_caps(dev)->name, name, family ? " of " : "", family ? family : "");
    }
out:
    return st;
}

static keel_status force_all(keel_device *dev, const char *text)
{
    keel_status st = KEEL_OK;
    char *rest = NULL, *copy = strdup(text);
    if (!copy) {
        KEEL_FAIL(keel_device_log(dev), KEEL_ERR_NO_MEMORY, "out of memory");
    }
    for (char *word = strtok_r(copy, ",", &rest); word; word = strtok_r(NULL, ",", &rest)) {
        char *equals = strchr(word, '=');
        if (equals) {
            *equals = '\0';
        }
        KEEL_TRY(force(dev, equals ? word : NULL, equals ? equals + 1 : word));
    }
out:
    free(copy);
    return st;
}

keel_status keel_doctor_prepare(keel_device *dev, const char *variant)
{
    keel_status st = KEEL_OK;
    struct verdict v = { 0 };
    struct keel_doctor_report *report = NULL;
    if (variant && variant[0]) {
        return force_all(dev, variant);
    }
    if (verdict_load(&v, dev)) {
        verdict_use(&v, dev);
        if (v.n_base_wrong > 0) {
            KEEL_WARN(keel_device_log(dev), "%s computes %u ops wrong; keel doctor says which", keel_device_caps(dev)->name, v.n_base_wrong);
        }
        return KEEL_OK;
    }
    report = calloc(1, sizeof *report);
    if (!report) {
        KEEL_FAIL(keel_device_log(dev), KEEL_ERR_NO_MEMORY, "out of memory");
    }
    KEEL_INFO(keel_device_log(dev), "%s: first use; checking kernels, once, for some seconds", keel_device_caps(dev)->name);
    KEEL_TRY(keel_doctor_run(dev, &(struct keel_doctor_params){ .quick = true }, report));
out:
    free(report);
    return st;
}
