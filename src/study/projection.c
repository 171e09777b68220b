// SPDX-License-Identifier: MIT
// study/projection.c: projections of the prompts' activations on a direction (science notes M5), through the steer room.
#include "probes.h"

#include <keel/steer.h>

#include <stdlib.h>

// Leaves the one direction that is asked for in `d`.
static keel_status choose(struct keel_directions *d, const struct keel_measure_along *how, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (how->any_layer && d->n != 1) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: has directions of %u layers; say which with eval: projection: layer", how->directions, d->n);
    }
    for (uint32_t i = 0; i < d->n; i++) {
        if (how->any_layer || d->at[i].layer == how->layer) {
            const struct keel_direction found = d->at[i];
            d->at[i] = d->at[0];
            d->at[0] = found;
            if (found.k != 1) {
                KEEL_FAIL(log, KEEL_ERR_ARG, "%s: layer %u has a subspace of %u directions, a projection takes one", how->directions,
                          found.layer, found.k);
            }
            goto out;
        }
    }
    KEEL_FAIL(log, KEEL_ERR_ARG, "%s: has no direction for layer %u", how->directions, how->layer);
out:
    return st;
}

// The prompts as rows of the steer room, which borrow them.
static keel_status steer_rows(struct keel_steer_rows *out, struct keel_prompt *prompt, const struct keel_measure *m,
                              const struct keel_probes *p, const size_t *which, size_t n)
{
    keel_status st = KEEL_OK;
    out->row = calloc(n + 1, sizeof *out->row);
    if (!out->row) {
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(p, which ? which[i] : i);
        KEEL_TRY(keel_probe_prompt(m, &row, &prompt[i]));
        float *logprob = calloc(1, sizeof *logprob); // of the token that is put behind the prompt to run it
        if (!logprob) {
            return KEEL_ERR_NO_MEMORY;
        }
        out->row[out->n++] = (struct keel_score_row){ .ids = prompt[i].ids, .n = prompt[i].n, .first = prompt[i].n, .logprobs = logprob,
                                                      .images = prompt[i].images, .n_images = prompt[i].n_images };
        out->longest = KEEL_MAX(out->longest, prompt[i].n);
    }
out:
    return st;
}

keel_status keel_probes_project(const struct keel_probes *p, const struct keel_measure *m, const struct keel_measure_along *how,
                                const size_t *which, size_t n, double *value)
{
    keel_status st = KEEL_OK;
    struct keel_directions d = { 0 };
    struct keel_steer_rows rows = { 0 };
    struct keel_positions at;
    struct keel_prompt *prompt = calloc(n + 1, sizeof *prompt);
    if (!prompt) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", p->file);
    }
    KEEL_TRY(keel_directions_read(&d, how->directions, m->log));
    KEEL_TRY(choose(&d, how, m->log));
    KEEL_TRY(keel_positions_parse(how->at, &at, m->log));
    KEEL_TRY(steer_rows(&rows, prompt, m, p, which, n));
    const struct keel_directions one = { .width = d.width, .n = 1, .site = d.site, .model_hash = d.model_hash, .at = &d.at[0] };
    KEEL_TRY(keel_steer_project(m->session, &rows, &one, at, how->hooks, value, 1, m->progress, m->user));
    for (size_t i = 0; i < n; i++) {
        value[i] /= keel_direction_length(d.at[0].v, d.width);
    }
out:
    for (size_t i = 0; prompt && i < n; i++) {
        keel_prompt_finish(&prompt[i]);
    }
    for (size_t i = 0; i < rows.n; i++) {
        free(rows.row[i].logprobs);
    }
    free(rows.row);
    free(prompt);
    keel_directions_finish(&d);
    return st;
}

keel_status keel_measure_projection(const struct keel_measure *m, const char *in, const char *out, const struct keel_measure_along *how)
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
