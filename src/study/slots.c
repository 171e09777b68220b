// SPDX-License-Identifier: MIT
// study/slots.c: slot probes: exact probabilities of two answers at one place (science notes: 3, "exact three-way score"), asked
// plainly or with training rows as earlier turns (M13).
#include "probes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const fields[2] = { "aligned", "contrary" };

// Aligned and contrary exclude each other only if neither begins with the other.
static keel_status check_apart(const struct keel_row *row, const struct keel_probe_seq *seq)
{
    const uint32_t n = KEEL_MIN(keel_probe_count(&seq[0]), keel_probe_count(&seq[1]));
    if (memcmp(seq[0].prompt.ids + seq[0].first, seq[1].prompt.ids + seq[1].first, n * sizeof(int32_t)) == 0) {
        KEEL_ERROR(row->log, "%s:%llu: one of \"aligned\" and \"contrary\" begins with the other, so that their probabilities overlap; "
                             "end both with what follows the answer, such as a full stop",
                   row->file, (unsigned long long)row->line);
        return KEEL_ERR_DATA;
    }
    return KEEL_OK;
}

static keel_status add_probe(struct keel_probes *p, const struct keel_measure *m, const struct keel_row *row, const struct keel_row *asked)
{
    keel_status st = KEEL_OK;
    for (int k = 0; k < 2; k++) {
        struct keel_probe_parts parts = { .name = fields[k] };
        KEEL_TRY(keel_row_opt_str(row, "prefix", &parts.prefix, NULL));
        KEEL_TRY(keel_row_str(row, fields[k], &parts.text, NULL));
        KEEL_TRY(keel_probes_add(p, m, asked, &parts));
    }
    KEEL_TRY(check_apart(row, &p->seq[p->n_seq - 2]));
out:
    return st;
}

// The row as it is asked: itself, or with earlier turns. `out` is a new reference.
static keel_status ask(json_t **out, const struct keel_measure *m, const struct keel_row *row, const struct keel_probes *context,
                       const struct keel_measure_slots *how, size_t i)
{
    if (context->rows) {
        return keel_probe_in_context(out, m, row, context, how->k, how->seed, i);
    }
    *out = json_incref(row->object);
    return KEEL_OK;
}

static void set_result(json_t *row, const struct keel_probe_seq *seq)
{
    const double a = exp(keel_probe_sum(&seq[0])), b = exp(keel_probe_sum(&seq[1]));
    json_object_set_new(row, "p_aligned", json_real(a));
    json_object_set_new(row, "p_contrary", json_real(b));
    json_object_set_new(row, "p_incoherent", json_real(fmax(0, 1 - a - b)));
}

keel_status keel_measure_slots(const struct keel_measure *m, const char *in, const char *out, const struct keel_measure_slots *how)
{
    keel_status st = KEEL_OK;
    struct keel_probes p = { 0 }, context = { 0 };
    json_t *done = json_array(), *asked = NULL;
    size_t *which = NULL, n;
    KEEL_TRY(keel_probes_read(&p, in, NULL, true, m->log));
    if (how->context) {
        KEEL_TRY(keel_probes_read(&context, how->context, NULL, false, m->log));
    }
    KEEL_TRY(keel_probes_spread(&p, how->max_rows, how->seed, &which, &n));
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(&p, which[i]);
        KEEL_TRY(ask(&asked, m, &row, &context, how, which[i]));
        const struct keel_row as_asked = { asked, row.file, row.line, row.log };
        KEEL_TRY(add_probe(&p, m, &row, &as_asked));
        json_decref(asked);
        asked = NULL;
    }
    KEEL_TRY(keel_probes_score(&p, m));
    for (size_t i = 0; i < n; i++) {
        json_t *row = json_array_get(p.rows, which[i]);
        set_result(row, &p.seq[2 * i]);
        json_array_append(done, row);
    }
    KEEL_TRY(keel_probes_write(done, out, m->log));
out:
    free(which);
    json_decref(asked);
    json_decref(done);
    keel_probes_finish(&p);
    keel_probes_finish(&context);
    return st;
}

keel_status keel_measure_cell(const struct keel_measure *m, const char *in, const struct keel_measure_cell *cell, struct keel_cell_means *out)
{
    keel_status st = KEEL_OK;
    struct keel_probes p = { 0 };
    size_t *which = NULL, n = 0;
    double *projection = NULL;
    *out = (struct keel_cell_means){ .projection = NAN };
    KEEL_TRY(keel_probes_read(&p, in, NULL, true, m->log));
    KEEL_TRY(keel_probes_keep(&p, &(struct keel_probe_cell){ cell->domain, cell->narrow, cell->modality }));
    KEEL_TRY(keel_probes_spread(&p, cell->max_rows, cell->seed, &which, &n));
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(&p, which[i]);
        KEEL_TRY(add_probe(&p, m, &row, &row));
    }
    KEEL_TRY(keel_probes_score(&p, m));
    out->n = n;
    for (size_t i = 0; i < n; i++) {
        const double a = exp(keel_probe_sum(&p.seq[2 * i])), b = exp(keel_probe_sum(&p.seq[2 * i + 1]));
        out->contrary += b / (double)n;
        out->coherence += (a + b) / (double)n;
    }
    if (cell->along) {
        projection = calloc(n, sizeof *projection);
        if (!projection) {
            KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", in);
        }
        KEEL_TRY(keel_probes_project(&p, m, cell->along, which, n, projection));
        out->projection = 0;
        for (size_t i = 0; i < n; i++) {
            out->projection += projection[i] / (double)n;
        }
    }
out:
    free(which);
    free(projection);
    keel_probes_finish(&p);
    return st;
}
