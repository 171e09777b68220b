// SPDX-License-Identifier: MIT
// study/study_file.c: reads a study file through libcyaml, which checks it against the schema below.
// Every optional number is a pointer in the schema: a key that is absent takes its default, a zero that was written is a zero.
#include "study_file.h"

#include <cyaml/cyaml.h>

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_BYTES (1u << 20) // a study file is a page of text
#define MAX_DATA 64
#define MAX_VALUES 32 // of one axis of a sweep
#define MAX_SEEDS 16  // as many runs as the eval room pools
#define MAX_RUNS 256

struct yaml_data {
    char *file;
    double *weight;
};
struct yaml_train {
    struct yaml_data *data;
    unsigned data_count;
    uint64_t *rank, *warmup, *steps, *batch, *accum, *seq_len;
    double *alpha, *alpha_per_rank, *lr, *epochs, *weight_decay, *grad_clip, *mixture;
    char *targets, *schedule, *filler;
};
struct yaml_eval {
    char *margin, *narrow, *kl, *slots, *prompts;
    uint64_t *answer_tokens, *examples, *context_rows, *context_probes;
};
struct yaml_sweep {
    uint64_t *rank, *seed;
    double *mixture;
    unsigned rank_count, seed_count, mixture_count;
    char *combine;
};
struct yaml_budget {
    double *kl_mean, *margin_drop, *flip_rate;
};
struct yaml_study {
    char *name, *model, *mmproj, *narrow_domain, *narrow_modality;
    uint64_t *seed;
    struct yaml_train train;
    struct yaml_eval eval;
    struct yaml_budget budget;
    struct yaml_sweep sweep;
};

#define PTR CYAML_FLAG_POINTER
#define OPT (CYAML_FLAG_POINTER | CYAML_FLAG_OPTIONAL)
#define TEXT(flags, type, member) CYAML_FIELD_STRING_PTR(#member, flags, struct type, member, 1, 4000)
#define COUNT(type, member) CYAML_FIELD_UINT_PTR(#member, OPT, struct type, member)
#define REAL(type, member) CYAML_FIELD_FLOAT_PTR(#member, OPT, struct type, member)

static const cyaml_schema_field_t data_fields[] = {
    TEXT(PTR, yaml_data, file), REAL(yaml_data, weight), CYAML_FIELD_END
};
static const cyaml_schema_value_t data_entry = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, struct yaml_data, data_fields),
};
static const cyaml_schema_field_t train_fields[] = {
    CYAML_FIELD_SEQUENCE("data", PTR, struct yaml_train, data, &data_entry, 1, MAX_DATA),
    COUNT(yaml_train, rank),
    REAL(yaml_train, alpha),
    REAL(yaml_train, alpha_per_rank),
    TEXT(OPT, yaml_train, targets),
    REAL(yaml_train, lr),
    TEXT(OPT, yaml_train, schedule),
    COUNT(yaml_train, warmup),
    COUNT(yaml_train, steps),
    REAL(yaml_train, epochs),
    COUNT(yaml_train, batch),
    COUNT(yaml_train, accum),
    COUNT(yaml_train, seq_len),
    REAL(yaml_train, weight_decay),
    REAL(yaml_train, grad_clip),
    TEXT(OPT, yaml_train, filler),
    REAL(yaml_train, mixture),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t eval_fields[] = {
    TEXT(OPT, yaml_eval, margin),
    TEXT(OPT, yaml_eval, narrow),
    TEXT(OPT, yaml_eval, kl),
    TEXT(OPT, yaml_eval, slots),
    TEXT(OPT, yaml_eval, prompts),
    COUNT(yaml_eval, answer_tokens),
    COUNT(yaml_eval, examples),
    COUNT(yaml_eval, context_rows),
    COUNT(yaml_eval, context_probes),
    CYAML_FIELD_END,
};
static const cyaml_schema_value_t count_entry = { CYAML_VALUE_UINT(CYAML_FLAG_DEFAULT, uint64_t) };
static const cyaml_schema_value_t real_entry = { CYAML_VALUE_FLOAT(CYAML_FLAG_DEFAULT, double) };
static const cyaml_schema_field_t sweep_fields[] = {
    CYAML_FIELD_SEQUENCE("rank", OPT, struct yaml_sweep, rank, &count_entry, 1, MAX_VALUES),
    CYAML_FIELD_SEQUENCE("mixture", OPT, struct yaml_sweep, mixture, &real_entry, 1, MAX_VALUES),
    CYAML_FIELD_SEQUENCE("seed", OPT, struct yaml_sweep, seed, &count_entry, 1, MAX_SEEDS),
    TEXT(OPT, yaml_sweep, combine),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t budget_fields[] = {
    REAL(yaml_budget, kl_mean), REAL(yaml_budget, margin_drop), REAL(yaml_budget, flip_rate), CYAML_FIELD_END
};
static const cyaml_schema_field_t top_fields[] = {
    TEXT(PTR, yaml_study, name),
    TEXT(OPT, yaml_study, model),
    TEXT(OPT, yaml_study, mmproj),
    TEXT(OPT, yaml_study, narrow_domain),
    TEXT(OPT, yaml_study, narrow_modality),
    COUNT(yaml_study, seed),
    CYAML_FIELD_MAPPING("train", CYAML_FLAG_DEFAULT, struct yaml_study, train, train_fields),
    CYAML_FIELD_MAPPING("eval", CYAML_FLAG_DEFAULT, struct yaml_study, eval, eval_fields),
    CYAML_FIELD_MAPPING("budget", CYAML_FLAG_OPTIONAL, struct yaml_study, budget, budget_fields),
    CYAML_FIELD_MAPPING("sweep", CYAML_FLAG_OPTIONAL, struct yaml_study, sweep, sweep_fields),
    CYAML_FIELD_END,
};
static const cyaml_schema_value_t top = {
    CYAML_VALUE_MAPPING(PTR, struct yaml_study, top_fields),
};

// --- messages ------------------------------------------------------------------------------------

// libcyaml reports a fault in several calls: the reason, the word "Backtrace", then the places from the inside out. The line
// is that of the innermost place.
struct fault {
    char reason[400], place[200];
    unsigned line;
};

static void collect(cyaml_log_t level, void *ctx, const char *fmt, va_list args)
{
    struct fault *f = ctx;
    char text[400];
    if (level < CYAML_LOG_ERROR || vsnprintf(text, sizeof text, fmt, args) < 0) {
        return;
    }
    text[strcspn(text, "\n")] = 0;
    const char *s = strncmp(text, "Load: ", 6) == 0 ? text + 6 : text;
    s += strspn(s, " ");
    const char *at = strstr(s, " (line: ");
    if (at && strncmp(s, "in ", 3) == 0) {
        const size_t used = strlen(f->place);
        if (f->line == 0 && sscanf(at, " (line: %u", &f->line) != 1) {
            f->line = 0;
        }
        snprintf(f->place + used, sizeof f->place - used, "%s%.*s", used ? ", " : "", (int)(at - s), s);
    } else if (!f->reason[0] && strcmp(s, "Backtrace:") != 0) {
        snprintf(f->reason, sizeof f->reason, "%s", s);
    }
}

static cyaml_config_t config_of(struct fault *f)
{
    return (cyaml_config_t){ .log_fn = collect, .log_ctx = f, .mem_fn = cyaml_mem, .log_level = CYAML_LOG_ERROR,
                             .flags = CYAML_CFG_NO_ALIAS };
}

// The text under check, for messages.
struct source {
    const char *data, *name;
    size_t len;
    const keel_log *log;
};

// Offset behind `key` where it is first given a value at or after `from`, or 0.
static size_t find_key(const struct source *src, const char *key, size_t key_len, size_t from)
{
    bool comment = false;
    for (size_t i = from; i + key_len < src->len; i++) {
        const char c = src->data[i];
        const bool starts = i == 0 || strchr(" \t\n{,", src->data[i - 1]) != NULL;
        if (c == '\n') {
            comment = false;
        } else if (c == '#' && starts) {
            comment = true;
        } else if (!comment && starts && memcmp(src->data + i, key, key_len) == 0 && src->data[i + key_len] == ':') {
            return i + key_len;
        }
    }
    return 0;
}

// Line on which `key` of `section` ("" is the top) is given a value, or 0. libcyaml does not keep the places of values, and a key's
// name is unique within its section but for those of a list.
static unsigned line_of(const struct source *src, const char *section, const char *key)
{
    const size_t from = section[0] ? find_key(src, section, strcspn(section, ":"), 0) : 0;
    const size_t at = find_key(src, key, strlen(key), from);
    unsigned line = 1;
    for (size_t i = 0; i < at; i++) {
        line += src->data[i] == '\n';
    }
    return at ? line : 0;
}

static keel_status complain(const struct source *src, const char *section, const char *key, const char *reason)
{
    KEEL_ERROR(src->log, "%s:%u: %s%s%s: %s", src->name, KEEL_MAX(line_of(src, section, key), 1u), section, section[0] ? ": " : "", key, reason);
    return KEEL_ERR_FORMAT;
}

// --- values --------------------------------------------------------------------------------------

// Reads an optional number; checks that it is finite and in [lo, hi].
static keel_status take(const struct source *src, const char *section, const char *key, const double *v, double lo, double hi,
                        double *out)
{
    char reason[160];
    if (!v) {
        return KEEL_OK;
    }
    if (!(*v >= lo && *v <= hi)) {
        snprintf(reason, sizeof reason, "%g is out of range, it must lie between %g and %g", *v, lo, hi);
        return complain(src, section, key, reason);
    }
    *out = *v;
    return KEEL_OK;
}

static keel_status take_count(const struct source *src, const char *section, const char *key, const uint64_t *v, uint32_t lo,
                              uint32_t hi, uint32_t *out)
{
    char reason[160];
    if (!v) {
        return KEEL_OK;
    }
    if (*v < lo || *v > hi) {
        snprintf(reason, sizeof reason, "%llu is out of range, it must lie between %u and %u", (unsigned long long)*v, lo, hi);
        return complain(src, section, key, reason);
    }
    *out = (uint32_t)*v;
    return KEEL_OK;
}

static bool in_list(const char *word, size_t len, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (strlen(list[i]) == len && memcmp(list[i], word, len) == 0) {
            return true;
        }
    }
    return false;
}

// Names are checked here although training checks them too: a study would find out only after the base evaluation.
static keel_status check_names(const struct source *src, const struct study_train *t)
{
    static const char *const schedules[] = { "constant", "linear", "cosine" };
    static const char *const targets[] = { "all", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
                                           "vision.*", "vision.attn_q", "vision.attn_k", "vision.attn_v", "vision.attn_out",
                                           "vision.ffn_up", "vision.ffn_down", "vision.proj" };
    if (!in_list(t->schedule, strlen(t->schedule), schedules, KEEL_COUNT(schedules))) {
        return complain(src, "train", "schedule", "must be constant, linear or cosine");
    }
    for (const char *s = t->targets;; s++) {
        const size_t len = strcspn(s, ",");
        if (!in_list(s, len, targets, KEEL_COUNT(targets))) {
            return complain(src, "train", "targets",
                            "must be all, or names separated by commas without spaces: attn_q, attn_k, attn_v, attn_output, ffn_gate, "
                            "ffn_up, ffn_down, and vision.* or vision.NAME for the tower");
        }
        s += len;
        if (*s == 0) {
            return KEEL_OK;
        }
    }
}

static keel_status fill_train(const struct source *src, struct study_train *t, const struct yaml_train *y)
{
    keel_status st = KEEL_OK;
    *t = (struct study_train){ .rank = 16, .batch = 4, .accum = 1, .seq_len = 512, .lr = 2e-4, .epochs = 1, .grad_clip = 1,
                               .targets = y->targets ? y->targets : "all", .schedule = y->schedule ? y->schedule : "constant",
                               .steps = y->steps ? *y->steps : 0, .filler = y->filler, .mixture = 1 };
    KEEL_TRY(take_count(src, "train", "rank", y->rank, 1, 1024, &t->rank));
    KEEL_TRY(take_count(src, "train", "warmup", y->warmup, 0, 100000000, &t->warmup));
    KEEL_TRY(take_count(src, "train", "batch", y->batch, 1, 4096, &t->batch));
    KEEL_TRY(take_count(src, "train", "accum", y->accum, 1, 65536, &t->accum));
    KEEL_TRY(take_count(src, "train", "seq_len", y->seq_len, 2, 131072, &t->seq_len));
    KEEL_TRY(take(src, "train", "alpha", y->alpha, 0, 1e6, &t->alpha));
    KEEL_TRY(take(src, "train", "alpha_per_rank", y->alpha_per_rank, 1e-3, 1e3, &t->alpha_per_rank));
    if (y->alpha && y->alpha_per_rank) {
        KEEL_TRY(complain(src, "train", "alpha_per_rank", "stands beside alpha; give one of them"));
    }
    KEEL_TRY(take(src, "train", "lr", y->lr, 0, 10, &t->lr));
    KEEL_TRY(take(src, "train", "epochs", y->epochs, 1e-3, 1e6, &t->epochs));
    KEEL_TRY(take(src, "train", "weight_decay", y->weight_decay, 0, 10, &t->weight_decay));
    KEEL_TRY(take(src, "train", "grad_clip", y->grad_clip, 0, 1e9, &t->grad_clip));
    KEEL_TRY(take(src, "train", "mixture", y->mixture, 0, 1, &t->mixture));
    if (t->mixture < 1 && !t->filler) {
        KEEL_TRY(complain(src, "train", "mixture", "below 1 needs the rows of train: filler"));
    }
    KEEL_TRY(check_names(src, t));
    t->data = calloc(y->data_count, sizeof *t->data);
    if (!t->data) {
        KEEL_FAIL(src->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", src->name);
    }
    t->data_count = y->data_count;
    for (unsigned i = 0; i < y->data_count; i++) {
        t->data[i] = (struct study_data){ y->data[i].file, 1 };
        KEEL_TRY(take(src, "train: data", "weight", y->data[i].weight, 1e-6, 1e6, &t->data[i].weight));
    }
out:
    return st;
}

// --- sweep ---------------------------------------------------------------------------------------

static keel_status take_ranks(const struct source *src, const struct yaml_sweep *y, uint32_t *ranks)
{
    keel_status st = KEEL_OK;
    for (unsigned i = 0; i < y->rank_count; i++) {
        KEEL_TRY(take_count(src, "sweep", "rank", &y->rank[i], 1, 1024, &ranks[i]));
    }
out:
    return st;
}

static keel_status check_sweep(const struct source *src, const struct study_file *f, const struct yaml_sweep *y)
{
    keel_status st = KEEL_OK;
    double value = 1;
    for (unsigned i = 0; i < y->mixture_count; i++) {
        KEEL_TRY(take(src, "sweep", "mixture", &y->mixture[i], 0, 1, &value));
        if (value < 1 && !f->train.filler) {
            KEEL_TRY(complain(src, "sweep", "mixture", "needs the rows of train: filler"));
        }
    }
    if (y->combine && strcmp(y->combine, "product") != 0 && strcmp(y->combine, "axes") != 0) {
        KEEL_TRY(complain(src, "sweep", "combine", "must be product or axes"));
    }
    if (y->rank_count + y->mixture_count + y->seed_count == 0) {
        KEEL_TRY(complain(src, "", "sweep", "names nothing to vary (rank, mixture or seed)"));
    }
out:
    return st;
}

// Adds a setting once for each seed, unless it is there.
static void add_setting(struct study_file *f, const struct yaml_sweep *y, uint32_t rank, double mixture)
{
    for (size_t i = 0; i < f->n_runs; i++) {
        if (f->run[i].rank == rank && f->run[i].mixture == mixture) {
            return;
        }
    }
    for (unsigned k = 0; k < KEEL_MAX(y->seed_count, 1u); k++) {
        const struct study_setting run = { rank, mixture, y->seed_count ? y->seed[k] : f->seed };
        bool seen = false;
        for (unsigned j = 0; j < k; j++) {
            seen = seen || y->seed[j] == run.seed;
        }
        if (!seen) {
            f->run[f->n_runs++] = run;
        }
    }
}

// The runs of the study; without a sweep the one that `train` describes. "product": every rank with every mixture; "axes": each varied
// alone, the other as in `train`. Each setting is run with every seed.
static keel_status fill_runs(const struct source *src, struct study_file *f, const struct yaml_sweep *y)
{
    keel_status st = KEEL_OK;
    const bool axes = y->combine && strcmp(y->combine, "axes") == 0;
    const unsigned n_ranks = KEEL_MAX(y->rank_count, 1u), n_mixtures = KEEL_MAX(y->mixture_count, 1u);
    const unsigned n_seeds = KEEL_MAX(y->seed_count, 1u), n = (axes ? n_ranks + n_mixtures : n_ranks * n_mixtures) * n_seeds;
    uint32_t ranks[MAX_VALUES] = { f->train.rank };
    f->run = calloc(n, sizeof *f->run);
    if (!f->run) {
        KEEL_FAIL(src->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", src->name);
    }
    f->sweep = y->rank_count + y->mixture_count + y->seed_count > 0 || y->combine;
    if (f->sweep) {
        KEEL_TRY(check_sweep(src, f, y));
        KEEL_TRY(take_ranks(src, y, ranks));
    }
    for (unsigned i = 0; i < n_ranks; i++) {
        for (unsigned k = 0; k < (axes ? 1 : n_mixtures); k++) {
            add_setting(f, y, ranks[i], y->mixture_count && !axes ? y->mixture[k] : f->train.mixture);
        }
    }
    for (unsigned k = 0; axes && k < y->mixture_count; k++) {
        add_setting(f, y, f->train.rank, y->mixture[k]);
    }
    if (f->n_runs > MAX_RUNS) {
        KEEL_TRY(complain(src, "", "sweep", "asks for more than 256 runs"));
    }
out:
    return st;
}

static keel_status fill_eval(const struct source *src, struct study_eval *e, const struct yaml_eval *y)
{
    keel_status st = KEEL_OK;
    *e = (struct study_eval){ .margin = y->margin, .narrow = y->narrow, .kl = y->kl, .slots = y->slots, .answer_tokens = 16,
                              .chat = y->prompts && strcmp(y->prompts, "chat") == 0 };
    if (y->prompts && !e->chat && strcmp(y->prompts, "plain") != 0) {
        KEEL_TRY(complain(src, "eval", "prompts", "must be plain or chat"));
    }
    KEEL_TRY(take_count(src, "eval", "answer_tokens", y->answer_tokens, 1, 4096, &e->answer_tokens));
    KEEL_TRY(take_count(src, "eval", "examples", y->examples, 0, 1000, &e->examples));
    KEEL_TRY(take_count(src, "eval", "context_rows", y->context_rows, 0, 16, &e->context_rows));
    KEEL_TRY(take_count(src, "eval", "context_probes", y->context_probes, 0, 1000000, &e->context_probes));
    if (!e->margin && !e->narrow && !e->kl && !e->slots) {
        KEEL_TRY(complain(src, "", "eval", "names no data (margin, narrow, kl or slots), so there is nothing to measure"));
    }
    if (e->context_rows > 0 && !e->slots) {
        KEEL_TRY(complain(src, "eval", "context_rows", "needs the data of eval: slots"));
    }
out:
    return st;
}

static keel_status fill(const struct source *src, struct study_file *f, const struct yaml_study *y)
{
    keel_status st = KEEL_OK;
    f->name = y->name;
    f->model = y->model;
    f->mmproj = y->mmproj;
    f->narrow_domain = y->narrow_domain;
    f->narrow_modality = y->narrow_modality;
    f->seed = y->seed ? *y->seed : 1;
    f->budget = (struct study_budget){ NAN, NAN, NAN };
    KEEL_TRY(fill_train(src, &f->train, &y->train));
    KEEL_TRY(fill_eval(src, &f->eval, &y->eval));
    KEEL_TRY(fill_runs(src, f, &y->sweep));
    KEEL_TRY(take(src, "budget", "kl_mean", y->budget.kl_mean, 0, 1e9, &f->budget.kl_mean));
    KEEL_TRY(take(src, "budget", "margin_drop", y->budget.margin_drop, 0, 1e9, &f->budget.margin_drop));
    KEEL_TRY(take(src, "budget", "flip_rate", y->budget.flip_rate, 0, 1, &f->budget.flip_rate));
    if (!isnan(f->budget.kl_mean) && !f->eval.kl) {
        KEEL_TRY(complain(src, "budget", "kl_mean", "needs the data of eval: kl"));
    }
    if (!isnan(f->budget.margin_drop) && !f->eval.margin) {
        KEEL_TRY(complain(src, "budget", "margin_drop", "needs the data of eval: margin"));
    }
    if (!isnan(f->budget.flip_rate) && !f->eval.margin) {
        KEEL_TRY(complain(src, "budget", "flip_rate", "needs the data of eval: margin"));
    }
out:
    return st;
}

keel_status keel_study_parse(struct study_file **out, const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct fault fault = { .line = 0 };
    const cyaml_config_t config = config_of(&fault);
    const struct source src = { (const char *)data, name, len, log };
    struct study_file *f = calloc(1, sizeof *f);
    *out = NULL;
    if (!f) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    if (len > MAX_BYTES || memchr(data, 0, len)) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s:1: is no study file (it is larger than 1 MiB or holds binary data)", name);
    }
    const cyaml_err_t err = cyaml_load_data(data, len, &config, &top, (cyaml_data_t **)&f->yaml, NULL);
    if (err != CYAML_OK || !f->yaml) {
        static const char unknown[] = "Unexpected key: "; // reported at the place of the mapping, not of the key
        const size_t skip = sizeof unknown - 1;
        const unsigned at = strncmp(fault.reason, unknown, skip) == 0 ? line_of(&src, "", fault.reason + skip) : 0;
        fault.line = at ? at : fault.line;
        KEEL_FAIL(log, err == CYAML_ERR_OOM ? KEEL_ERR_NO_MEMORY : KEEL_ERR_FORMAT, "%s:%u: %s (%s)", name, KEEL_MAX(fault.line, 1u),
                  fault.reason[0] ? fault.reason : err == CYAML_OK ? "the file holds no study" : cyaml_strerror(err),
                  fault.place[0] ? fault.place : "at the top");
    }
    KEEL_TRY(fill(&src, f, f->yaml));
    *out = f;
    f = NULL;
out:
    keel_study_free(&f);
    return st;
}

void keel_study_free(struct study_file **f)
{
    struct fault fault = { .line = 0 };
    const cyaml_config_t config = config_of(&fault);
    if (f && *f) {
        cyaml_free(&config, &top, (*f)->yaml, 0);
        free((*f)->train.data);
        free((*f)->run);
        free(*f);
        *f = NULL;
    }
}
