// SPDX-License-Identifier: MIT
// study/projection.c: projections of the prompts' activations on a direction (science notes M5), through the steer room.
#include "along.h"

#include <stdlib.h>

keel_status keel_along_choose(struct keel_directions *d, const struct keel_measure_along *how, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (how->any_layer && d->n != 1) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: has directions of %u layers; say which with eval: projection: layer", how->directions,
                  d->n);
    }
    for (uint32_t i = 0; i < d->n; i++) {
        if (how->any_layer || d->at[i].layer == how->layer) {
            const struct keel_direction found = d->at[i];
            d->at[i] = d->at[0];
            d->at[0] = found;
            if (found.k != 1) {
                KEEL_FAIL(log, KEEL_ERR_ARG, "%s: layer %u has a subspace of %u directions, a projection takes one",
                          how->directions, found.layer, found.k);
            }
            goto out;
        }
    }
    KEEL_FAIL(log, KEEL_ERR_ARG, "%s: has no direction for layer %u", how->directions, how->layer);
out:
    return st;
}

keel_status keel_along_rows(struct keel_along *out, const struct keel_measure *m, const struct keel_probes *p, const size_t *which,
                            size_t n)
{
    keel_status st = KEEL_OK;
    *out = (struct keel_along){ .prompt = calloc(n + 1, sizeof *out->prompt) };
    out->rows.row = calloc(n + 1, sizeof *out->rows.row);
    if (!out->prompt || !out->rows.row) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", p->file);
    }
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(p, which ? which[i] : i);
        struct keel_prompt *prompt = &out->prompt[i];
        KEEL_TRY(keel_probe_prompt(m, &row, prompt));
        float *logprob = calloc(1, sizeof *logprob); // of the token that is put behind the prompt to run it
        if (!logprob) {
            KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", p->file);
        }
        out->rows.row[out->rows.n++] = (struct keel_score_row){ .ids = prompt->ids,
                                                                .n = prompt->n,
                                                                .first = prompt->n,
                                                                .logprobs = logprob,
                                                                .images = prompt->images,
                                                                .n_images = prompt->n_images };
        out->rows.longest = KEEL_MAX(out->rows.longest, prompt->n);
    }
out:
    return st;
}

void keel_along_finish(struct keel_along *a)
{
    for (size_t i = 0; i < a->rows.n; i++) {
        free(a->rows.row[i].logprobs);
        keel_prompt_finish(&a->prompt[i]);
    }
    free(a->rows.row);
    free(a->prompt);
    *a = (struct keel_along){ 0 };
}

keel_status keel_probes_project(const struct keel_probes *p, const struct keel_measure *m, const struct keel_measure_along *how,
                                const size_t *which, size_t n, double *value)
{
    keel_status st = KEEL_OK;
    struct keel_directions d = { 0 };
    struct keel_along a = { 0 };
    struct keel_positions at;
    KEEL_TRY(keel_directions_read(&d, how->directions, m->log));
    KEEL_TRY(keel_along_choose(&d, how, m->log));
    KEEL_TRY(keel_positions_parse(how->at, &at, m->log));
    KEEL_TRY(keel_along_rows(&a, m, p, which, n));
    const struct keel_directions one = { .width = d.width, .n = 1, .site = d.site, .model_hash = d.model_hash, .at = &d.at[0] };
    KEEL_TRY(keel_steer_project(m->session, &a.rows, &one, at, how->hooks, value, 1, m->progress, m->user));
    for (size_t i = 0; i < n; i++) {
        value[i] /= keel_direction_length(d.at[0].v, d.width);
    }
out:
    keel_along_finish(&a);
    keel_directions_finish(&d);
    return st;
}

keel_status keel_measure_projection(const struct keel_measure *m, const char *in, const char *out,
                                    const struct keel_measure_along *how)
{
    keel_status st = KEEL_OK;
    struct keel_probes p = { 0 };
    double *value = NULL;
    KEEL_TRY(keel_probes_read(&p, in, NULL, true, m->log));
    value = calloc(keel_probes_count(&p) + 1, sizeof *value);
    if (!value) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", in);
    }
    KEEL_TRY(keel_probes_project(&p, m, how, NULL, keel_probes_count(&p), value));
    for (size_t i = 0; i < keel_probes_count(&p); i++) {
        json_object_set_new(json_array_get(p.rows, i), "projection", json_real(value[i]));
    }
    KEEL_TRY(keel_probes_write(p.rows, out, m->log));
out:
    free(value);
    keel_probes_finish(&p);
    return st;
}
