// SPDX-License-Identifier: MIT
// study/study_file.c: the values of a study file, with defaults and checks. The schema is in study_yaml.c, stages in stages_file.c.
#include "study_yaml.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RUNS 256

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
static keel_status check_names(const struct study_source *src, const char *section, const struct study_train *t)
{
    static const char *const schedules[] = { "constant", "linear", "cosine" };
    static const char *const targets[] = { "all", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
                                           "vision.*", "vision.attn_q", "vision.attn_k", "vision.attn_v", "vision.attn_out",
                                           "vision.ffn_up", "vision.ffn_down", "vision.proj" };
    if (!in_list(t->schedule, strlen(t->schedule), schedules, KEEL_COUNT(schedules))) {
        return keel_study_complain(src, section, "schedule", "must be constant, linear or cosine");
    }
    for (const char *s = t->targets;; s++) {
        const size_t len = strcspn(s, ",");
        if (!in_list(s, len, targets, KEEL_COUNT(targets))) {
            return keel_study_complain(src, section, "targets",
                            "must be all, or names separated by commas without spaces: attn_q, attn_k, attn_v, attn_output, ffn_gate, "
                            "ffn_up, ffn_down, and vision.* or vision.NAME for the tower");
        }
        s += len;
        if (*s == 0) {
            return KEEL_OK;
        }
    }
}

// `def` without the data and what goes with them, if `y` names data of its own.
static void start_from(struct study_train *t, const struct study_train *def, const struct yaml_train *y)
{
    *t = *def;
    if (y && y->data_count > 0) {
        t->filler = NULL;
        t->mixture = 1;
    }
    if (y && y->epochs && !y->steps) {
        t->steps = 0;
    }
    if (y && (y->alpha || y->alpha_per_rank)) {
        t->alpha = t->alpha_per_rank = 0;
    }
}

static keel_status fill_data(const struct study_source *src, const char *section, const struct study_train *def, struct study_train *t,
                             const struct yaml_train *y)
{
    keel_status st = KEEL_OK;
    const bool own = y && y->data_count > 0;
    t->data_count = own ? y->data_count : def->data_count;
    t->data = calloc(t->data_count + 1, sizeof *t->data);
    if (!t->data) {
        KEEL_FAIL(src->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", src->name);
    }
    for (unsigned i = 0; i < t->data_count; i++) {
        t->data[i] = own ? (struct study_data){ y->data[i].file, 1 } : def->data[i];
        if (own) {
            KEEL_TRY(keel_study_real(src, section, "weight", y->data[i].weight, 1e-6, 1e6, &t->data[i].weight));
        }
    }
out:
    return st;
}

static keel_status fill_numbers(const struct study_source *src, const char *section, struct study_train *t, const struct yaml_train *y)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_study_count(src, section, "rank", y->rank, 1, 1024, &t->rank));
    KEEL_TRY(keel_study_count(src, section, "warmup", y->warmup, 0, 100000000, &t->warmup));
    KEEL_TRY(keel_study_count(src, section, "batch", y->batch, 1, 4096, &t->batch));
    KEEL_TRY(keel_study_count(src, section, "accum", y->accum, 1, 65536, &t->accum));
    KEEL_TRY(keel_study_count(src, section, "seq_len", y->seq_len, 2, 131072, &t->seq_len));
    KEEL_TRY(keel_study_real(src, section, "alpha", y->alpha, 0, 1e6, &t->alpha));
    KEEL_TRY(keel_study_real(src, section, "alpha_per_rank", y->alpha_per_rank, 1e-3, 1e3, &t->alpha_per_rank));
    if (y->alpha && y->alpha_per_rank) {
        KEEL_TRY(keel_study_complain(src, section, "alpha_per_rank", "stands beside alpha; give one of them"));
    }
    KEEL_TRY(keel_study_real(src, section, "lr", y->lr, 0, 10, &t->lr));
    KEEL_TRY(keel_study_real(src, section, "epochs", y->epochs, 1e-3, 1e6, &t->epochs));
    KEEL_TRY(keel_study_real(src, section, "weight_decay", y->weight_decay, 0, 10, &t->weight_decay));
    KEEL_TRY(keel_study_real(src, section, "grad_clip", y->grad_clip, 0, 1e9, &t->grad_clip));
    KEEL_TRY(keel_study_real(src, section, "mixture", y->mixture, 0, 1, &t->mixture));
out:
    return st;
}

static keel_status check_monitor(const struct study_source *src, const char *section, const struct study_train *t, const struct yaml_train *y)
{
    static const char shift[] = "projection_shift<";
    const char *const alone = y->monitor_every ? "monitor_every" : y->monitor_direction ? "monitor_direction" : NULL;
    if (t->n_guard > 0 && !t->monitor) {
        return keel_study_complain(src, section, "guard", "needs the rows of monitor");
    }
    if (alone && !t->monitor) {
        return keel_study_complain(src, section, alone, "needs the rows of monitor");
    }
    for (unsigned i = 0; i < t->n_guard && !t->monitor_direction; i++) {
        if (strncmp(t->guard[i], shift, sizeof shift - 1) == 0) {
            return keel_study_complain(src, section, "guard", "limits projection_shift, which needs a direction: give monitor_direction");
        }
    }
    return KEEL_OK;
}

// A weight of 0 turns off what `train` of the study turned on.
static keel_status fill_mitigations(const struct study_source *src, const char *section, struct study_train *t, const struct yaml_train *y)
{
    keel_status st = KEEL_OK;
    t->layers = y->layers ? y->layers : t->layers;
    t->kl_data = y->kl_data ? y->kl_data : t->kl_data;
    t->lisa_data = y->lisa_data ? y->lisa_data : t->lisa_data;
    t->steer = y->steer_count > 0 ? y->steer : t->steer;
    t->n_steer = y->steer_count > 0 ? y->steer_count : t->n_steer;
    t->monitor = y->monitor ? y->monitor : t->monitor;
    t->monitor_direction = y->monitor_direction ? y->monitor_direction : t->monitor_direction;
    t->guard = y->guard_count > 0 ? y->guard : t->guard;
    t->n_guard = y->guard_count > 0 ? y->guard_count : t->n_guard;
    KEEL_TRY(keel_study_count(src, section, "monitor_every", y->monitor_every, 1, 1000000, &t->monitor_every));
    KEEL_TRY(check_monitor(src, section, t, y));
    KEEL_TRY(keel_study_real(src, section, "kl_weight", y->kl_weight, 0, 1e6, &t->kl_weight));
    KEEL_TRY(keel_study_count(src, section, "kl_rows", y->kl_rows, 1, 65536, &t->kl_rows));
    for (unsigned i = 0; i < y->constrain_count; i++) {
        KEEL_TRY(keel_study_real(src, section, "constrain", &y->constrain[i], 0, 1000, &t->constrain[i]));
    }
    if (y->lisa_steps_count > 0) {
        KEEL_TRY(keel_study_count(src, section, "lisa_steps", &y->lisa_steps[0], 1, 1u << 29, &t->lisa_align));
        KEEL_TRY(keel_study_count(src, section, "lisa_steps", &y->lisa_steps[1], 1, 1u << 29, &t->lisa_task));
    }
    KEEL_TRY(keel_study_real(src, section, "lisa_rho", y->lisa_rho, 0, 1e6, &t->lisa_rho));
    if ((y->kl_weight || y->kl_rows) && !t->kl_data) {
        KEEL_TRY(keel_study_complain(src, section, y->kl_weight ? "kl_weight" : "kl_rows", "needs the rows of kl_data"));
    }
    if ((y->lisa_rho || y->lisa_steps_count > 0) && !t->lisa_data) {
        KEEL_TRY(keel_study_complain(src, section, y->lisa_rho ? "lisa_rho" : "lisa_steps", "needs the rows of lisa_data"));
    }
out:
    return st;
}

keel_status keel_study_fill_train(const struct study_source *src, const char *section, const struct study_train *def, struct study_train *t,
                                  const struct yaml_train *y)
{
    keel_status st = KEEL_OK;
    start_from(t, def, y);
    KEEL_TRY(fill_data(src, section, def, t, y));
    if (y) {
        t->targets = y->targets ? y->targets : t->targets;
        t->schedule = y->schedule ? y->schedule : t->schedule;
        t->steps = y->steps ? *y->steps : t->steps;
        t->filler = y->filler ? y->filler : t->filler;
        KEEL_TRY(fill_numbers(src, section, t, y));
        KEEL_TRY(fill_mitigations(src, section, t, y));
    }
    if (t->mixture < 1 && !t->filler) {
        KEEL_TRY(keel_study_complain(src, section, "mixture", "below 1 needs the rows of train: filler"));
    }
    KEEL_TRY(check_names(src, section, t));
out:
    return st;
}

static keel_status fill_top_train(const struct study_source *src, struct study_train *t, const struct yaml_train *y)
{
    static const struct study_train defaults = { .rank = 16, .batch = 4, .accum = 1, .seq_len = 512, .lr = 2e-4, .epochs = 1, .grad_clip = 1,
                                                 .targets = "all", .schedule = "constant", .mixture = 1, .kl_weight = 1, .kl_rows = 4,
                                                 .lisa_align = 100, .lisa_task = 900, .lisa_rho = 1, .monitor_every = 10 };
    return y->data_count > 0 ? keel_study_fill_train(src, "train", &defaults, t, y)
                             : keel_study_complain(src, "", "train", "names no data; it needs data: [{file: ROWS.jsonl}]");
}

// --- sweep ---------------------------------------------------------------------------------------

static keel_status take_ranks(const struct study_source *src, const struct yaml_sweep *y, uint32_t *ranks)
{
    keel_status st = KEEL_OK;
    for (unsigned i = 0; i < y->rank_count; i++) {
        KEEL_TRY(keel_study_count(src, "sweep", "rank", &y->rank[i], 1, 1024, &ranks[i]));
    }
out:
    return st;
}

static keel_status check_sweep(const struct study_source *src, const struct study_file *f, const struct yaml_sweep *y)
{
    keel_status st = KEEL_OK;
    double value = 1;
    for (unsigned i = 0; i < y->mixture_count; i++) {
        KEEL_TRY(keel_study_real(src, "sweep", "mixture", &y->mixture[i], 0, 1, &value));
        if (value < 1 && !f->train.filler) {
            KEEL_TRY(keel_study_complain(src, "sweep", "mixture", "needs the rows of train: filler"));
        }
    }
    if (y->combine && strcmp(y->combine, "product") != 0 && strcmp(y->combine, "axes") != 0) {
        KEEL_TRY(keel_study_complain(src, "sweep", "combine", "must be product or axes"));
    }
    if (y->rank_count + y->mixture_count + y->seed_count == 0) {
        KEEL_TRY(keel_study_complain(src, "", "sweep", "names nothing to vary (rank, mixture or seed)"));
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

// A number below zero arrives as one beyond what manifests can hold.
static keel_status check_seed(const struct study_source *src, const char *section, uint64_t seed)
{
    return seed <= INT64_MAX ? KEEL_OK : keel_study_complain(src, section, "seed", "must be a whole number from 0 to 2^63 - 1");
}

// The runs of the study; without a sweep the one that `train` describes. "product": every rank with every mixture; "axes": each varied
// alone, the other as in `train`. Each setting is run with every seed.
static keel_status fill_runs(const struct study_source *src, struct study_file *f, const struct yaml_sweep *y)
{
    keel_status st = KEEL_OK;
    const bool axes = y->combine && strcmp(y->combine, "axes") == 0;
    const unsigned n_ranks = KEEL_MAX(y->rank_count, 1u), n_mixtures = KEEL_MAX(y->mixture_count, 1u);
    const unsigned n_seeds = KEEL_MAX(y->seed_count, 1u), n = (axes ? n_ranks + n_mixtures : n_ranks * n_mixtures) * n_seeds;
    uint32_t ranks[STUDY_MAX_VALUES] = { f->train.rank };
    f->run = calloc(n, sizeof *f->run);
    if (!f->run) {
        KEEL_FAIL(src->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", src->name);
    }
    f->sweep = y->rank_count + y->mixture_count + y->seed_count > 0 || y->combine;
    if (f->sweep) {
        KEEL_TRY(check_sweep(src, f, y));
        for (unsigned i = 0; i < y->seed_count; i++) {
            KEEL_TRY(check_seed(src, "sweep", y->seed[i]));
        }
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
        KEEL_TRY(keel_study_complain(src, "", "sweep", "asks for more than 256 runs"));
    }
out:
    return st;
}

static keel_status fill_projection(const struct study_source *src, struct study_eval *e, const struct yaml_projection *y)
{
    keel_status st = KEEL_OK;
    if (!y) {
        return KEEL_OK;
    }
    e->projection = (struct study_projection){ .directions = y->directions, .at = y->at ? y->at : "last_prompt", .any_layer = !y->layer };
    KEEL_TRY(keel_study_count(src, "eval", "layer", y->layer, 0, 10000, &e->projection.layer));
    if (!e->slots) {
        KEEL_TRY(keel_study_complain(src, "eval", "projection", "needs the data of eval: slots, whose prompts are projected"));
    }
out:
    return st;
}

static keel_status fill_eval(const struct study_source *src, struct study_eval *e, const struct yaml_eval *y)
{
    keel_status st = KEEL_OK;
    *e = (struct study_eval){ .margin = y->margin, .narrow = y->narrow, .kl = y->kl, .slots = y->slots, .answer_tokens = 16,
                              .chat = y->prompts && strcmp(y->prompts, "chat") == 0, .kv = y->kv ? y->kv : "f32" };
    if (y->prompts && !e->chat && strcmp(y->prompts, "plain") != 0) {
        KEEL_TRY(keel_study_complain(src, "eval", "prompts", "must be plain or chat"));
    }
    if (strcmp(e->kv, "f32") != 0 && strcmp(e->kv, "f16") != 0 && strcmp(e->kv, "q8_0") != 0) {
        KEEL_TRY(keel_study_complain(src, "eval", "kv", "must be f32, f16 or q8_0"));
    }
    KEEL_TRY(keel_study_count(src, "eval", "answer_tokens", y->answer_tokens, 1, 4096, &e->answer_tokens));
    KEEL_TRY(keel_study_count(src, "eval", "examples", y->examples, 0, 1000, &e->examples));
    KEEL_TRY(keel_study_count(src, "eval", "context_rows", y->context_rows, 0, 16, &e->context_rows));
    KEEL_TRY(keel_study_count(src, "eval", "context_probes", y->context_probes, 0, 1000000, &e->context_probes));
    if (!e->margin && !e->narrow && !e->kl && !e->slots) {
        KEEL_TRY(keel_study_complain(src, "", "eval", "names no data (margin, narrow, kl or slots), so there is nothing to measure"));
    }
    if (e->context_rows > 0 && !e->slots) {
        KEEL_TRY(keel_study_complain(src, "eval", "context_rows", "needs the data of eval: slots"));
    }
    KEEL_TRY(fill_projection(src, e, y->projection));
out:
    return st;
}

static keel_status fill(const struct study_source *src, struct study_file *f, const struct yaml_study *y)
{
    keel_status st = KEEL_OK;
    f->name = y->name;
    f->model = y->model;
    f->type = y->type;
    f->mmproj = y->mmproj;
    f->pan_and_scan = y->pan_and_scan && *y->pan_and_scan;
    f->narrow_domain = y->narrow_domain;
    f->narrow_modality = y->narrow_modality;
    KEEL_TRY(y->seed ? check_seed(src, "", *y->seed) : KEEL_OK);
    f->seed = y->seed ? *y->seed : 1;
    f->budget = (struct study_budget){ NAN, NAN, NAN };
    KEEL_TRY(fill_top_train(src, &f->train, &y->train));
    KEEL_TRY(fill_eval(src, &f->eval, &y->eval));
    KEEL_TRY(fill_runs(src, f, &y->sweep));
    KEEL_TRY(keel_study_fill_directions(src, f, y));
    KEEL_TRY(keel_study_fill_stages(src, f, y));
    KEEL_TRY(keel_study_order_directions(src, f));
    KEEL_TRY(keel_study_real(src, "budget", "kl_mean", y->budget.kl_mean, 0, 1e9, &f->budget.kl_mean));
    KEEL_TRY(keel_study_real(src, "budget", "margin_drop", y->budget.margin_drop, 0, 1e9, &f->budget.margin_drop));
    KEEL_TRY(keel_study_real(src, "budget", "flip_rate", y->budget.flip_rate, 0, 1, &f->budget.flip_rate));
    if (!isnan(f->budget.kl_mean) && !f->eval.kl) {
        KEEL_TRY(keel_study_complain(src, "budget", "kl_mean", "needs the data of eval: kl"));
    }
    if (!isnan(f->budget.margin_drop) && !f->eval.margin) {
        KEEL_TRY(keel_study_complain(src, "budget", "margin_drop", "needs the data of eval: margin"));
    }
    if (!isnan(f->budget.flip_rate) && !f->eval.margin) {
        KEEL_TRY(keel_study_complain(src, "budget", "flip_rate", "needs the data of eval: margin"));
    }
out:
    return st;
}

keel_status keel_study_parse(struct study_file **out, const uint8_t *data, size_t len, const char *name, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct study_source src = { .data = (const char *)data, .name = name, .len = len, .log = log };
    struct yaml_study *y = NULL;
    struct study_file *f = calloc(1, sizeof *f);
    *out = NULL;
    if (!f) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    KEEL_TRY(keel_study_yaml_load(&y, &src));
    f->yaml = y;
    KEEL_TRY(fill(&src, f, y));
    *out = f;
    f = NULL;
out:
    keel_study_free(&f);
    return st;
}

void keel_study_free(struct study_file **f)
{
    if (f && *f) {
        keel_study_yaml_free((*f)->yaml);
        for (size_t i = 0; i < (*f)->n_stages; i++) {
            keel_study_stage_finish(&(*f)->stage[i]);
        }
        free((*f)->stage);
        free((*f)->direction);
        free((*f)->train.data);
        free((*f)->run);
        free(*f);
        *f = NULL;
    }
}
