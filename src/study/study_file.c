// SPDX-License-Identifier: MIT
// study/study_file.c: reads a study file through libcyaml, which checks it against the schema below.
#include "study_file.h"

#include <cyaml/cyaml.h>

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define OPT CYAML_FLAG_OPTIONAL
#define STR(key, type, member) CYAML_FIELD_STRING_PTR(key, CYAML_FLAG_POINTER, type, member, 0, CYAML_UNLIMITED)
#define OPT_STR(key, type, member) CYAML_FIELD_STRING_PTR(key, CYAML_FLAG_POINTER | OPT, type, member, 0, CYAML_UNLIMITED)

static const cyaml_schema_field_t data_fields[] = {
    STR("file", struct study_data, file),
    CYAML_FIELD_FLOAT("weight", OPT, struct study_data, weight),
    CYAML_FIELD_END,
};
static const cyaml_schema_value_t data_entry = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, struct study_data, data_fields),
};
static const cyaml_schema_field_t train_fields[] = {
    CYAML_FIELD_SEQUENCE("data", CYAML_FLAG_POINTER, struct study_train, data, &data_entry, 1, 64),
    CYAML_FIELD_UINT("rank", OPT, struct study_train, rank),
    CYAML_FIELD_FLOAT("alpha", OPT, struct study_train, alpha),
    OPT_STR("targets", struct study_train, targets),
    CYAML_FIELD_FLOAT("lr", OPT, struct study_train, lr),
    OPT_STR("schedule", struct study_train, schedule),
    CYAML_FIELD_UINT("warmup", OPT, struct study_train, warmup),
    CYAML_FIELD_UINT("steps", OPT, struct study_train, steps),
    CYAML_FIELD_FLOAT("epochs", OPT, struct study_train, epochs),
    CYAML_FIELD_UINT("batch", OPT, struct study_train, batch),
    CYAML_FIELD_UINT("accum", OPT, struct study_train, accum),
    CYAML_FIELD_UINT("seq_len", OPT, struct study_train, seq_len),
    CYAML_FIELD_FLOAT("weight_decay", OPT, struct study_train, weight_decay),
    CYAML_FIELD_FLOAT("grad_clip", OPT, struct study_train, grad_clip),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t eval_fields[] = {
    OPT_STR("margin", struct study_eval, margin),
    OPT_STR("narrow", struct study_eval, narrow),
    OPT_STR("kl", struct study_eval, kl),
    CYAML_FIELD_UINT("answer_tokens", OPT, struct study_eval, answer_tokens),
    CYAML_FIELD_UINT("examples", OPT, struct study_eval, examples),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t budget_fields[] = {
    CYAML_FIELD_FLOAT("kl_mean", OPT, struct study_budget, kl_mean),
    CYAML_FIELD_FLOAT("margin_drop", OPT, struct study_budget, margin_drop),
    CYAML_FIELD_FLOAT("flip_rate", OPT, struct study_budget, flip_rate),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t top_fields[] = {
    STR("name", struct study_file, name),
    OPT_STR("model", struct study_file, model),
    OPT_STR("narrow_domain", struct study_file, narrow_domain),
    CYAML_FIELD_UINT("seed", OPT, struct study_file, seed),
    CYAML_FIELD_MAPPING("train", CYAML_FLAG_DEFAULT, struct study_file, train, train_fields),
    CYAML_FIELD_MAPPING("eval", CYAML_FLAG_DEFAULT, struct study_file, eval, eval_fields),
    CYAML_FIELD_MAPPING("budget", OPT, struct study_file, budget, budget_fields),
    CYAML_FIELD_END,
};
static const cyaml_schema_value_t top = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_POINTER, struct study_file, top_fields),
};

// libcyaml reports a fault and then where it stands, in several calls; they become one message.
struct collect {
    char text[700];
    size_t len;
};

static void collect(cyaml_log_t level, void *ctx, const char *fmt, va_list args)
{
    struct collect *c = ctx;
    if (level < CYAML_LOG_ERROR || c->len >= sizeof c->text) {
        return;
    }
    const int n = vsnprintf(c->text + c->len, sizeof c->text - c->len, fmt, args);
    c->len += n > 0 ? (size_t)n : 0;
    for (char *p = c->text; *p; p++) {
        *p = *p == '\n' ? ' ' : *p;
    }
}

static cyaml_config_t config_of(struct collect *c)
{
    return (cyaml_config_t){ .log_fn = collect, .log_ctx = c, .mem_fn = cyaml_mem, .log_level = CYAML_LOG_ERROR,
                             .flags = CYAML_CFG_DEFAULT };
}

static keel_status check(const struct study_file *f, const char *name, const keel_log *log)
{
    const struct {
        const char *key;
        double value, lo, hi;
    } range[] = {
        { "train: rank", f->train.rank, 1, 1024 },          { "train: batch", f->train.batch, 1, 4096 },
        { "train: accum", f->train.accum, 1, 65536 },       { "train: seq_len", f->train.seq_len, 2, 131072 },
        { "train: lr", f->train.lr, 0, 10 },                { "train: alpha", f->train.alpha, 0, 1e6 },
        { "train: epochs", f->train.epochs, 0, 1e6 },       { "train: weight_decay", f->train.weight_decay, 0, 10 },
        { "train: grad_clip", f->train.grad_clip, 0, 1e9 }, { "eval: answer_tokens", f->eval.answer_tokens, 1, 4096 },
        { "eval: examples", f->eval.examples, 0, 1000 },    { "budget: kl_mean", f->budget.kl_mean, 0, 1e9 },
        { "budget: margin_drop", f->budget.margin_drop, 0, 1e9 }, { "budget: flip_rate", f->budget.flip_rate, 0, 1 },
    };
    for (size_t i = 0; i < KEEL_COUNT(range); i++) {
        if (!(range[i].value >= range[i].lo && range[i].value <= range[i].hi)) {
            KEEL_ERROR(log, "%s: \"%s\" is %g, it must lie between %g and %g", name, range[i].key, range[i].value, range[i].lo,
                       range[i].hi);
            return KEEL_ERR_FORMAT;
        }
    }
    for (unsigned i = 0; i < f->train.data_count; i++) {
        if (!(f->train.data[i].weight > 0 && f->train.data[i].weight < 1e9)) {
            KEEL_ERROR(log, "%s: the weight of data file %u must be above 0", name, i + 1);
            return KEEL_ERR_FORMAT;
        }
    }
    if (!f->eval.margin && !f->eval.narrow && !f->eval.kl) {
        KEEL_ERROR(log, "%s: \"eval\" names no data (margin, narrow or kl), so there is nothing to measure", name);
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

keel_status keel_study_parse(struct study_file **out, const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct collect c = { .len = 0 };
    const cyaml_config_t config = config_of(&c);
    struct study_file *f = NULL;
    *out = NULL;
    const cyaml_err_t err = cyaml_load_data(data, len, &config, &top, (cyaml_data_t **)&f, NULL);
    if (err != CYAML_OK || !f) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: %s (%s)", name, c.len ? c.text : "the file holds no study", cyaml_strerror(err));
    }
    struct study_train *t = &f->train;
    t->rank = t->rank ? t->rank : 16;
    t->batch = t->batch ? t->batch : 4;
    t->accum = t->accum ? t->accum : 1;
    t->seq_len = t->seq_len ? t->seq_len : 512;
    t->lr = t->lr > 0 ? t->lr : 2e-4;
    t->epochs = t->epochs > 0 ? t->epochs : 1;
    t->grad_clip = t->grad_clip > 0 ? t->grad_clip : 1;
    f->eval.answer_tokens = f->eval.answer_tokens ? f->eval.answer_tokens : 16;
    f->seed = f->seed ? f->seed : 1;
    for (unsigned i = 0; i < t->data_count; i++) {
        t->data[i].weight = t->data[i].weight != 0 ? t->data[i].weight : 1;
    }
    KEEL_TRY(check(f, name, log));
    *out = f;
    f = NULL;
out:
    keel_study_free(&f);
    return st;
}

void keel_study_free(struct study_file **f)
{
    struct collect c = { .len = 0 };
    const cyaml_config_t config = config_of(&c);
    if (f && *f) {
        cyaml_free(&config, &top, *f, 0);
        *f = NULL;
    }
}
