// SPDX-License-Identifier: MIT
// study/persona.c: what persona vectors are made of (Chen et al. 2025, arXiv 2507.21509): a model answers the same questions under two
// system messages, and activations are taken over the tokens of its answers. The paper keeps answers by a judge's trait score; without a
// judge only slot probes can be told apart, by the probability of their contrary answer.
#include "along.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct side {
    struct keel_probes probes;
    struct keel_prompt *prompt;       // [n]
    struct keel_generate_row *answer; // [n, samples]
    int32_t *ids;                     // [n, samples, n_tokens]
    double *trait;                    // [n], NAN where the row is no slot probe
    struct keel_steer_rows rows;      // those that are kept
};

static void finish_side(struct side *s, size_t n)
{
    for (size_t i = 0; s->prompt && i < n; i++) {
        keel_prompt_finish(&s->prompt[i]);
    }
    for (size_t i = 0; i < s->rows.n; i++) {
        free((void *)(uintptr_t)s->rows.row[i].ids);
        free(s->rows.row[i].logprobs);
    }
    free(s->rows.row);
    free(s->prompt);
    free(s->answer);
    free(s->ids);
    free(s->trait);
    keel_probes_finish(&s->probes);
}

// Tokens of an answer, without the one that ends it.
static uint32_t length(const struct keel_measure *m, const struct keel_generate_row *g)
{
    return g->n_out - (g->n_out > 0 && keel_token_is_end(m->model, g->out[g->n_out - 1]));
}

// --- answering -----------------------------------------------------------------------------------

// The share of the contrary answer of the two at a probe's slot.
static keel_status measure_traits(struct side *s, const struct keel_measure *m, size_t n)
{
    static const char *const fields[2] = { "aligned", "contrary" };
    keel_status st = KEEL_OK;
    size_t *probe = calloc(n + 1, sizeof *probe), n_probes = 0;
    if (!probe) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", s->probes.file);
    }
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(&s->probes, i);
        s->trait[i] = NAN;
        if (!json_object_get(row.object, fields[0]) || !json_object_get(row.object, fields[1])) {
            continue;
        }
        for (int k = 0; k < 2; k++) {
            struct keel_probe_parts parts = { .name = fields[k] };
            KEEL_TRY(keel_row_opt_str(&row, "prefix", &parts.prefix, NULL));
            KEEL_TRY(keel_row_str(&row, fields[k], &parts.text, NULL));
            KEEL_TRY(keel_probes_add(&s->probes, m, &row, &parts));
        }
        probe[n_probes++] = i;
    }
    if (n_probes > 0) {
        KEEL_TRY(keel_probes_score(&s->probes, m));
    }
    for (size_t i = 0; i < n_probes; i++) {
        const double aligned = keel_probe_sum(&s->probes.seq[2 * i]), contrary = keel_probe_sum(&s->probes.seq[2 * i + 1]);
        s->trait[probe[i]] = 1 / (1 + exp(aligned - contrary));
    }
out:
    free(probe);
    return st;
}

static keel_status answer(struct side *s, const struct keel_measure *m, const struct keel_persona *how, const char *system, size_t *n)
{
    keel_status st = KEEL_OK;
    const struct keel_sample_params greedy = { KEEL_SAMPLE_DEFAULTS .temperature = 0.0f },
                                    drawn = { KEEL_SAMPLE_DEFAULTS .top_k = 0, .top_p = 1.0f, .seed = how->seed };
    KEEL_TRY(keel_probes_read(&s->probes, how->rows, NULL, false, m->log));
    *n = keel_probes_count(&s->probes);
    const size_t all = *n * how->samples;
    s->prompt = calloc(*n + 1, sizeof *s->prompt);
    s->answer = calloc(all + 1, sizeof *s->answer);
    s->ids = calloc(all * how->n_tokens + 1, sizeof *s->ids);
    s->trait = calloc(*n + 1, sizeof *s->trait);
    s->rows.row = calloc(all + 1, sizeof *s->rows.row);
    if (!s->prompt || !s->answer || !s->ids || !s->trait || !s->rows.row) {
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "no memory for %zu answers", all);
    }
    for (size_t i = 0; i < *n; i++) {
        KEEL_TRY(keel_along_under(&s->probes, i, system));
        const struct keel_row row = keel_probes_row(&s->probes, i);
        struct keel_prompt *p = &s->prompt[i];
        KEEL_TRY(keel_probe_prompt(m, &row, p));
        for (size_t k = i * how->samples; k < (i + 1) * how->samples; k++) {
            s->answer[k] = (struct keel_generate_row){ .ids = p->ids, .n = p->n, .images = p->images, .n_images = p->n_images,
                                                       .out = s->ids + k * how->n_tokens, .cap = how->n_tokens };
        }
    }
    KEEL_TRY(keel_session_generate(m->session, s->answer, all, how->samples > 1 ? &drawn : &greedy, 0, m->progress, m->user));
    KEEL_TRY(measure_traits(s, m, *n));
out:
    return st;
}

// --- keeping -------------------------------------------------------------------------------------

static bool keeps(const struct side side[2], const struct keel_measure *m, const struct keel_persona *how, size_t k)
{
    const double positive = side[0].trait[k / how->samples], negative = side[1].trait[k / how->samples];
    return length(m, &side[0].answer[k]) > 0 && length(m, &side[1].answer[k]) > 0 &&
           (isnan(positive) || isnan(negative) || (positive > 0.5 && negative < 0.5));
}

static keel_status keep(struct side *s, const struct keel_measure *m, const struct keel_persona *how, size_t k)
{
    keel_status st = KEEL_OK;
    const struct keel_prompt *p = &s->prompt[k / how->samples];
    const uint32_t n = length(m, &s->answer[k]);
    int32_t *ids = calloc(p->n + n, sizeof *ids);
    float *logprobs = calloc(n + 1, sizeof *logprobs); // one for the token that is put behind the answer to run it
    if (!ids || !logprobs) {
        free(ids);
        free(logprobs);
        KEEL_FAIL(m->log, KEEL_ERR_NO_MEMORY, "no memory for an answer");
    }
    memcpy(ids, p->ids, p->n * sizeof *ids);
    memcpy(ids + p->n, s->answer[k].out, n * sizeof *ids);
    s->rows.row[s->rows.n++] = (struct keel_score_row){ .ids = ids, .n = p->n + n, .first = p->n, .logprobs = logprobs,
                                                        .images = p->images, .n_images = p->n_images };
    s->rows.longest = KEEL_MAX(s->rows.longest, p->n + n);
    s->rows.n_responses++;
out:
    return st;
}

// One line of the record of answers.
static json_t *line_of(const struct side *s, const struct keel_measure *m, const struct keel_persona *how, size_t k, bool positive, bool kept)
{
    struct keel_text text = { 0 };
    const json_t *row = keel_probes_row(&s->probes, k / how->samples).object;
    json_t *line = json_object(), *ids = json_array();
    for (uint32_t i = 0; i < length(m, &s->answer[k]); i++) {
        size_t len;
        const char *bytes = keel_token_text(m->model, s->answer[k].out[i], false, &len);
        keel_text_add(&text, bytes, len);
        json_array_append_new(ids, json_integer(s->answer[k].out[i]));
    }
    size_t good = text.len;
    if (text.len > 0) {
        keel_utf8_valid(text.data, text.len, &good); // an answer may end inside a character
    }
    json_object_set(line, "id", json_object_get(row, "id"));
    json_object_set_new(line, "system", json_string(positive ? "positive" : "negative"));
    json_object_set_new(line, "sample", json_integer((json_int_t)(k % how->samples)));
    json_object_set(line, "prompt", json_object_get(row, "prompt"));
    json_object_set_new(line, "ids", ids);
    json_object_set_new(line, "text", json_stringn(text.data ? text.data : "", KEEL_MIN(good, text.len)));
    if (!isnan(s->trait[k / how->samples])) {
        json_object_set_new(line, "trait", json_real(s->trait[k / how->samples]));
    }
    json_object_set_new(line, "kept", json_boolean(kept));
    keel_text_finish(&text);
    return line;
}

keel_status keel_persona_capture(struct keel_capture out[2], const struct keel_measure *m, const struct keel_persona *how,
                                 const struct keel_capture_params *params, size_t *all, size_t *kept)
{
    keel_status st = KEEL_OK;
    struct side side[2] = { { .trait = NULL } };
    json_t *record = json_array();
    size_t n = 0;
    *kept = 0;
    for (int k = 0; k < 2; k++) {
        KEEL_TRY(answer(&side[k], m, how, how->system[k], &n));
    }
    *all = n * how->samples;
    for (size_t i = 0; i < *all; i++) {
        const bool good = keeps(side, m, how, i);
        *kept += good;
        for (int k = 0; k < 2; k++) {
            json_array_append_new(record, line_of(&side[k], m, how, i, k == 0, good));
            if (good) {
                KEEL_TRY(keep(&side[k], m, how, i));
            }
        }
    }
    KEEL_TRY(keel_probes_write(record, how->record, m->log));
    if (*kept < 2) {
        KEEL_FAIL(m->log, KEEL_ERR_DATA, "direction %s: %zu of %zu pairs of answers are of use, at least 2 are needed; %s says which: an answer "
                  "must not be empty, and at slot probes the contrary one must be the likelier under the positive message alone",
                  how->name, *kept, *all, how->record);
    }
    for (int k = 0; k < 2; k++) {
        KEEL_TRY(keel_capture_run(&out[k], m->session, &side[k].rows, params, m->progress, m->user));
    }
out:
    json_decref(record);
    finish_side(&side[0], n);
    finish_side(&side[1], n);
    return st;
}
