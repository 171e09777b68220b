// SPDX-License-Identifier: MIT
// study/stages_file.c: the stages of a study file: what each does and which it starts from; and the directions it makes. An entry
// with several values of coef or scale makes one stage of each.
#include "study_yaml.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_NAME 40
#define MAX_STACK 8 // adapters in force at a time

void keel_study_stage_finish(struct study_stage *s)
{
    for (size_t i = 0; i < s->n_steer; i++) {
        free(s->steer[i]);
    }
    free(s->steer);
    free(s->train.data);
    free(s->name);
    free(s->group);
    *s = (struct study_stage){ 0 };
}

// One entry on its way: where it stands in the file, for messages.
struct entry {
    struct study_source src;                // from its name on
    char section[64], train[80], watch[80]; // "stages: NAME" and below
    const struct yaml_stage *y;
    struct study_file *f;
};

static struct entry entry_of(const struct study_source *src, struct study_file *f, const struct yaml_stage *y)
{
    struct entry e = { .src = keel_study_entry(src, "stages", y->name), .y = y, .f = f };
    snprintf(e.section, sizeof e.section, "stages: %.*s", MAX_NAME, y->name);
    snprintf(e.train, sizeof e.train, "%s: train", e.section);
    snprintf(e.watch, sizeof e.watch, "%s: watch", e.section);
    return e;
}

// --- names and order -----------------------------------------------------------------------------

static const struct study_stage *find(const struct study_file *f, const char *name)
{
    for (size_t i = 0; i < f->n_stages; i++) {
        if (strcmp(f->stage[i].name, name) == 0 || strcmp(f->stage[i].group, name) == 0) {
            return &f->stage[i];
        }
    }
    return NULL;
}

const char *keel_study_bad_name(const char *name)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    return strlen(name) > MAX_NAME || name[strspn(name, letters)] || strcmp(name, "base") == 0
               ? "must be up to 40 letters, digits, - and _, and not \"base\": it names a folder or a file"
               : NULL;
}

static keel_status check_name(const struct entry *e)
{
    const char *bad = keel_study_bad_name(e->y->name);
    bad = bad ? bad : find(e->f, e->y->name) ? "is the name of an earlier stage" : NULL;
    return bad ? keel_study_complain(&e->src, "stages", "name", bad) : KEEL_OK;
}

// The stage to start from: the one named, else the last training before.
static keel_status find_from(const struct entry *e, size_t *from)
{
    char reason[120];
    *from = STUDY_NO_STAGE;
    if (e->y->from && strcmp(e->y->from, "base") == 0) {
        return KEEL_OK;
    }
    for (size_t i = 0; i < e->f->n_stages; i++) {
        const struct study_stage *s = &e->f->stage[i];
        if (s->kind == STUDY_TRAIN && (!e->y->from || strcmp(s->name, e->y->from) == 0)) {
            *from = i;
        }
    }
    if (e->y->from && *from == STUDY_NO_STAGE) {
        snprintf(reason, sizeof reason, "%.60s is no earlier stage that trains; name one, or base", e->y->from);
        return keel_study_complain(&e->src, e->section, "from", reason);
    }
    return KEEL_OK;
}

// Adapters that are in force after a stage.
static uint32_t depth(const struct study_file *f, size_t stage)
{
    uint32_t n = 0;
    for (; stage != STUDY_NO_STAGE; stage = f->stage[stage].from) {
        n += f->stage[stage].stack || f->stage[stage].from == STUDY_NO_STAGE;
    }
    return n;
}

// --- training ------------------------------------------------------------------------------------

static keel_status fill_watch(const struct entry *e, struct study_stage *s)
{
    keel_status st = KEEL_OK;
    const struct yaml_watch *y = e->y->watch;
    if (!y) {
        return KEEL_OK;
    }
    s->watch = (struct study_watch){ .every = 5,
                                     .probes = 32,
                                     .above = NAN,
                                     .below = NAN,
                                     .domain = y->domain ? y->domain : "other",
                                     .modality = y->modality ? y->modality : "" };
    KEEL_TRY(keel_study_count(&e->src, e->watch, "every", y->every, 1, 1000000, &s->watch.every));
    KEEL_TRY(keel_study_count(&e->src, e->watch, "probes", y->probes, 1, 1000000, &s->watch.probes));
    KEEL_TRY(keel_study_real(&e->src, e->watch, "above", y->above, 0, 1, &s->watch.above));
    KEEL_TRY(keel_study_real(&e->src, e->watch, "below", y->below, 0, 1, &s->watch.below));
    if (!e->f->eval.slots) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "watch", "needs the data of eval: slots, whose probes it asks"));
    }
    if (strcmp(s->train.schedule, "constant") != 0 || s->train.steps == 0) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "watch",
                                     "needs a constant schedule and a number of steps: its training may end before them"));
    }
    if (s->train.n_guard > 0 || s->train.lisa_data) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "watch", "stands beside guard or lisa_data, whose training cannot be done in parts"));
    }
out:
    return st;
}

// What belongs to an adapter is that of the stage that made it, if that is trained further.
static keel_status check_adapter(const struct entry *e, struct study_stage *s)
{
    keel_status st = KEEL_OK;
    const struct yaml_train *y = e->y->train;
    const struct study_train *made = s->from == STUDY_NO_STAGE ? NULL : &e->f->stage[s->from].train;
    if (e->y->adapter && strcmp(e->y->adapter, "continue") != 0 && strcmp(e->y->adapter, "stack") != 0) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "adapter", "must be continue or stack"));
    }
    s->stack = e->y->adapter && strcmp(e->y->adapter, "stack") == 0;
    if (e->y->adapter && !made) {
        KEEL_TRY(
            keel_study_complain(&e->src, e->section, "adapter", "has nothing to go on with: the stage starts from the base model"));
    }
    if (made && !s->stack) {
        if (y && (y->rank || y->alpha || y->alpha_per_rank || y->targets)) {
            KEEL_TRY(
                keel_study_complain(&e->src, e->section, "train",
                                    "goes on with an adapter, so that rank, alpha and targets are given; leave them away, or set "
                                    "adapter: stack"));
        }
        s->train.rank = made->rank;
        s->train.alpha = made->alpha;
        s->train.alpha_per_rank = made->alpha_per_rank;
        s->train.targets = made->targets;
        s->own_rank = e->f->stage[s->from].own_rank;
    }
    if (s->stack && depth(e->f, s->from) >= MAX_STACK) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "adapter", "stacks more than 8 adapters"));
    }
out:
    return st;
}

static keel_status fill_training(const struct entry *e, struct study_stage *s)
{
    keel_status st = KEEL_OK;
    const struct yaml_train *y = e->y->train;
    KEEL_TRY(keel_study_fill_train(&e->src, e->train, &e->f->train, &s->train, y));
    s->own_rank = y && y->rank;
    s->own_mixture = y && (y->data_count > 0 || y->mixture || y->filler);
    KEEL_TRY(check_adapter(e, s));
    KEEL_TRY(fill_watch(e, s));
out:
    return st;
}

// --- steering and scaling ------------------------------------------------------------------------

// FILE[@LAYERS][,KEY=VALUE]... with the coefficient after FILE.
static char *with_coef(const char *words, double coef, bool percent)
{
    struct keel_text t = { 0 };
    const size_t file = strcspn(words, "@,");
    keel_text_addf(&t, "%.*s:%g%s%s", (int)file, words, coef, percent ? "%" : "", words + file);
    return t.failed ? NULL : t.data;
}

static keel_status fill_steer(const struct entry *e, struct study_stage *s)
{
    const struct yaml_stage *y = e->y;
    s->steer = calloc(y->steer_count, sizeof *s->steer);
    for (unsigned i = 0; s->steer && i < y->steer_count; i++) {
        s->steer[i] = isnan(s->value) ? strdup(y->steer[i]) : with_coef(y->steer[i], s->value, s->percent);
        if (!s->steer[i]) {
            break;
        }
        s->n_steer++;
    }
    if (s->n_steer < y->steer_count) {
        KEEL_ERROR(e->src.log, "%s: out of memory", e->src.name);
        return KEEL_ERR_NO_MEMORY;
    }
    return KEEL_OK;
}

static int ascending(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static keel_status fill_map(const struct entry *e, struct study_stage *s)
{
    keel_status st = KEEL_OK;
    const struct yaml_stage *y = e->y;
    const char *bad = !e->f->eval.slots                      ? "needs the data of eval: slots, whose probes it asks"
                      : y->coef_count == 0                   ? "needs coef: the doses at each of the layers"
                      : y->coef_count > STUDY_MAX_DOSES      ? "has more than 9 doses (coef), which no plot shows"
                      : y->steer_count > 1                   ? "is for one direction in steer"
                      : strchr(y->steer[0], '@')             ? "stands beside layers in steer (@); give one of them"
                                                             : NULL;
    if (bad) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "layers", bad));
    }
    qsort(y->coef, y->coef_count, sizeof *y->coef, ascending);
    for (unsigned i = 1; i < y->coef_count; i++) {
        if (y->coef[i] == y->coef[i - 1]) {
            KEEL_TRY(keel_study_complain(&e->src, e->section, "coef", "has a value twice"));
        }
    }
    s->map = (struct study_map){ .coef = y->coef, .n_coef = y->coef_count, .layers = y->layers };
    KEEL_TRY(keel_study_count(&e->src, e->section, "probes", y->probes, 1, 1000000, &s->map.probes));
    KEEL_TRY(fill_steer(e, s));
out:
    return st;
}

static keel_status check_steer(const struct entry *e)
{
    for (unsigned i = 0; i < e->y->steer_count; i++) {
        if (strstr(e->y->steer[i], ",steps=")) {
            return keel_study_complain(&e->src, e->section, "steer", "has a schedule over training steps (steps=), and nothing is trained here");
        }
    }
    return KEEL_OK;
}

static keel_status check_kind(const struct entry *e, size_t from)
{
    keel_status st = KEEL_OK;
    const struct yaml_stage *y = e->y;
    const int kinds = (y->train != NULL) + (y->steer_count > 0) + (y->scale_count > 0);
    if (kinds != 1) {
        KEEL_TRY(
            keel_study_complain(&e->src, "stages", "name", "the stage must have one of train (which may be {}), steer and scale"));
    }
    if (!y->train && (y->watch || y->adapter)) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, y->watch ? "watch" : "adapter", "is for stages that train"));
    }
    if (y->coef_count > 0 && !y->steer_count) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "coef", "is for stages that steer"));
    }
    if (y->scale_count > 0 && from == STUDY_NO_STAGE) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "scale", "has no adapter to scale: no stage trains before"));
    }
    if (!y->steer_count && (y->layers || y->probes || y->percent)) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, y->layers ? "layers" : y->probes ? "probes" : "percent", "is for stages that steer"));
    }
    if (!y->layers && y->probes) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "probes", "is for a map: it stands beside layers"));
    }
    if (!y->coef_count && y->percent) {
        KEEL_TRY(keel_study_complain(&e->src, e->section, "percent", "says what coef means, and there is none"));
    }
    for (unsigned i = 0; y->coef_count > 0 && i < y->steer_count; i++) {
        const char *colon = memchr(y->steer[i], ':', strcspn(y->steer[i], "@,"));
        if (colon && strchr("+-.0123456789", colon[1])) {
            KEEL_TRY(keel_study_complain(&e->src, e->section, "coef", "stands beside a coefficient in steer; give one of them"));
        }
    }
out:
    return st;
}

// --- the whole -----------------------------------------------------------------------------------

static keel_status check_values(const struct entry *e)
{
    keel_status st = KEEL_OK;
    double value;
    for (unsigned i = 0; i < e->y->scale_count; i++) {
        KEEL_TRY(keel_study_real(&e->src, e->section, "scale", &e->y->scale[i], -10, 10, &value));
    }
    for (unsigned i = 0; i < e->y->coef_count; i++) {
        KEEL_TRY(keel_study_real(&e->src, e->section, "coef", &e->y->coef[i], -1e6, 1e6, &value));
    }
out:
    return st;
}

// The stage of one value of an entry.
static keel_status add_stage(const struct entry *e, size_t from, double value, bool several)
{
    keel_status st = KEEL_OK;
    char name[MAX_NAME + 32];
    struct study_stage *s, *grown;
    snprintf(name, sizeof name, several ? "%s-%g" : "%s", e->y->name, value);
    for (size_t i = 0; i < e->f->n_stages; i++) {
        if (strcmp(e->f->stage[i].name, name) == 0) {
            return keel_study_complain(&e->src, e->section, e->y->scale_count ? "scale" : "coef", "makes two stages of one name");
        }
    }
    grown = realloc(e->f->stage, (e->f->n_stages + 1) * sizeof *grown);
    if (!grown) {
        KEEL_FAIL(e->src.log, KEEL_ERR_NO_MEMORY, "%s: out of memory", e->src.name);
    }
    e->f->stage = grown;
    s = &grown[e->f->n_stages++];
    *s = (struct study_stage){ .name = strdup(name),
                               .group = strdup(e->y->name),
                               .from = from,
                               .value = value,
                               .percent = e->y->percent && *e->y->percent,
                               .kind = e->y->train         ? STUDY_TRAIN
                                       : e->y->layers      ? STUDY_MAP
                                       : e->y->steer_count ? STUDY_STEER
                                                           : STUDY_SCALE };
    if (!s->name || !s->group) {
        KEEL_FAIL(e->src.log, KEEL_ERR_NO_MEMORY, "%s: out of memory", e->src.name);
    }
    KEEL_TRY(check_steer(e));
    KEEL_TRY(s->kind == STUDY_TRAIN   ? fill_training(e, s)
             : s->kind == STUDY_STEER ? fill_steer(e, s)
             : s->kind == STUDY_MAP   ? fill_map(e, s)
                                      : KEEL_OK);
out:
    return st;
}

keel_status keel_study_fill_stages(const struct study_source *src, struct study_file *f, const struct yaml_study *y)
{
    keel_status st = KEEL_OK;
    for (unsigned i = 0; i < y->stages_count; i++) {
        const struct entry e = entry_of(src, f, &y->stages[i]);
        const unsigned scan = e.y->layers ? 0 : e.y->scale_count + e.y->coef_count; // a map is one stage
        const double *values = e.y->scale_count ? e.y->scale : e.y->coef;
        size_t from;
        KEEL_TRY(check_name(&e));
        KEEL_TRY(find_from(&e, &from));
        KEEL_TRY(check_kind(&e, from));
        KEEL_TRY(check_values(&e));
        for (unsigned k = 0; k < KEEL_MAX(scan, 1u); k++) {
            KEEL_TRY(add_stage(&e, from, scan ? values[k] : NAN, scan > 1));
        }
        if (f->n_stages > STUDY_MAX_STAGES) {
            KEEL_TRY(keel_study_complain(src, "", "stages", "are more than 64"));
        }
    }
out:
    return st;
}

// --- directions ----------------------------------------------------------------------------------

const struct study_direction *keel_study_find_direction(const struct study_file *f, const char *words)
{
    const size_t len = strcspn(words, ":@,");
    for (size_t i = 0; i < f->n_directions; i++) {
        if (strlen(f->direction[i].name) == len && memcmp(f->direction[i].name, words, len) == 0) {
            return &f->direction[i];
        }
    }
    return NULL;
}

static keel_status check_direction(const struct study_source *src, const struct study_file *f, const struct yaml_direction *y)
{
    const char *bad = keel_study_bad_name(y->name);
    bool known = false;
    for (size_t i = 0; i < f->n_directions; i++) {
        bad = strcmp(f->direction[i].name, y->name) == 0 ? "is the name of an earlier direction" : bad;
        known = known || (y->random_like && strcmp(f->direction[i].name, y->random_like) == 0);
    }
    if (!bad && y->random_like) {
        bad = !known                                                ? "its random_like is no earlier direction"
              : y->rows || y->positive || y->negative || y->shift ? "random_like stands alone"
                                                                    : NULL;
    } else if (!bad && y->shift) {
        bad = !y->rows                     ? "its shift needs rows, on which the stage and the base model are compared"
              : y->positive || y->negative ? "shift stands beside system messages"
                                           : NULL;
    } else if (!bad && !(y->rows && y->positive && y->negative)) {
        bad = "the direction needs rows (prompts), and system messages as positive and negative, or a stage as shift; or random_like";
    }
    if (!bad && ((y->answers && !y->positive) || (y->samples && !y->answers))) {
        bad = y->samples && !y->answers ? "its samples are of answers: say how many tokens those have" : "answers are given under system messages";
    }
    return bad ? keel_study_complain(src, "directions", "name", bad) : KEEL_OK;
}

keel_status keel_study_fill_directions(const struct study_source *src, struct study_file *f, const struct yaml_study *y)
{
    keel_status st = KEEL_OK;
    f->direction = calloc(y->directions_count + 1, sizeof *f->direction);
    if (!f->direction) {
        KEEL_FAIL(src->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", src->name);
    }
    for (unsigned i = 0; i < y->directions_count; i++) {
        const struct yaml_direction *d = &y->directions[i];
        const struct study_source at = keel_study_entry(src, "directions", d->name);
        KEEL_TRY(check_direction(&at, f, d));
        struct study_direction *to = &f->direction[f->n_directions++];
        *to = (struct study_direction){
            .name = d->name,
            .rows = d->rows,
            .positive = d->positive,
            .negative = d->negative,
            .layers = d->layers ? d->layers : "all",
            .at = d->at || d->shift ? d->at : d->answers ? "response" : "last_prompt",
            .method = d->method ? d->method : "mean_mask",
            .random_like = d->random_like,
            .shift = d->shift,
            .samples = 1,
            .after = STUDY_NO_STAGE,
        };
        KEEL_TRY(keel_study_count(&at, "directions", "answers", d->answers, 1, 512, &to->answers));
        KEEL_TRY(keel_study_count(&at, "directions", "samples", d->samples, 1, 100, &to->samples));
    }
out:
    return st;
}

// When each direction can be made, and that nothing asks for it before.
static keel_status check_early(const struct study_source *src, const struct study_file *f, size_t stage, const char *key,
                               char *const *words, size_t n)
{
    char reason[200];
    for (size_t i = 0; i < n; i++) {
        const struct study_direction *d = keel_study_find_direction(f, words[i]);
        if (d && d->after != STUDY_NO_STAGE && d->after >= stage) {
            const struct study_source at = keel_study_entry(src, "stages", f->stage[stage].group);
            snprintf(reason, sizeof reason, "direction %.40s is the shift of stage %.40s, so only later stages can use it", d->name,
                     f->stage[d->after].name);
            return keel_study_complain(&at, "stages", key, reason);
        }
    }
    return KEEL_OK;
}

keel_status keel_study_order_directions(const struct study_source *src, struct study_file *f)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < f->n_directions; i++) {
        struct study_direction *d = &f->direction[i];
        const struct study_source at = keel_study_entry(src, "directions", d->name);
        for (size_t k = 0; d->shift && k < f->n_stages; k++) {
            d->after = f->stage[k].kind == STUDY_TRAIN && strcmp(f->stage[k].name, d->shift) == 0 ? k : d->after;
        }
        if (d->shift && d->after == STUDY_NO_STAGE) {
            KEEL_TRY(keel_study_complain(&at, "directions", "shift", "is no stage that trains"));
        }
        d->after = d->random_like ? keel_study_find_direction(f, d->random_like)->after : d->after;
    }
    const struct study_direction *along = f->eval.projection.directions ? keel_study_find_direction(f, f->eval.projection.directions) : NULL;
    if (along && along->after != STUDY_NO_STAGE) {
        KEEL_TRY(keel_study_complain(src, "eval", "projection", "is of the base model too, before a shift is there to project on"));
    }
    for (size_t i = 0; i < f->n_stages; i++) {
        const struct study_stage *s = &f->stage[i];
        KEEL_TRY(check_early(src, f, i, "steer", s->steer, s->n_steer));
        KEEL_TRY(check_early(src, f, i, "steer", s->train.steer, s->train.n_steer));
        KEEL_TRY(check_early(src, f, i, "monitor_direction", &s->train.monitor_direction, s->train.monitor_direction != NULL));
    }
out:
    return st;
}
