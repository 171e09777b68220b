// SPDX-License-Identifier: MIT
// study/train.c: one training of a study: its data, mixture and parameters, on the base model or on adapters of earlier stages.
#include "run.h"

#include <keel/steer.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

// The files of a mixture: the study's data with share `mixture` in all, the filler with the rest. `paths` and `data` hold one more
// than the data files. Returns how many there are.
static size_t mix(const struct study *s, const struct study_train *t, double mixture, char (*paths)[4200], struct keel_train_data *data)
{
    double sum = 0;
    size_t n = 0;
    for (unsigned i = 0; i < t->data_count; i++) {
        sum += t->data[i].weight;
    }
    for (unsigned i = 0; i < t->data_count && mixture > 0; i++) {
        keel_study_path(paths[n], s->folder, t->data[i].file);
        data[n] = (struct keel_train_data){ paths[n], (float)(mixture < 1 ? mixture * t->data[i].weight / sum : t->data[i].weight) };
        n++;
    }
    if (mixture < 1) {
        keel_study_path(paths[n], s->folder, t->filler);
        data[n] = (struct keel_train_data){ paths[n], (float)(1 - mixture) };
        n++;
    }
    return n;
}

static struct keel_train_params train_params(const struct study_training *how)
{
    const struct study_train *t = how->train;
    struct keel_train_params p = { KEEL_TRAIN_DEFAULTS };
    p.rank = how->rank;
    p.seed = how->seed;
    p.alpha = (float)(t->alpha_per_rank > 0 ? t->alpha_per_rank * how->rank : t->alpha); // 0: training takes twice the rank
    p.targets = t->targets;
    p.lr = t->lr;
    p.schedule = t->schedule;
    p.warmup = t->warmup;
    p.steps = how->steps ? how->steps : t->steps;
    p.epochs = t->epochs;
    p.batch = t->batch;
    p.accum = t->accum;
    p.seq_len = t->seq_len;
    p.weight_decay = t->weight_decay;
    p.grad_clip = t->grad_clip;
    p.layers = t->layers;
    memcpy(p.constrain, t->constrain, sizeof p.constrain);
    p.resume = true;
    p.save_every = 10;
    return p;
}

// What acts on a training besides its data; holds what its parameters point to.
struct mitigations {
    char kl[4200], lisa[4200], monitor[4200];
    struct keel_guard guard[STUDY_MAX_GUARDS];
    struct keel_directions along; // of the monitor
    keel_hooks *hooks;
};

static keel_status read_monitor_direction(const struct study *s, const char *name, struct keel_directions *file,
                                          struct keel_monitor_direction *out)
{
    keel_status st = KEEL_OK;
    char words[4200];
    struct keel_steer_words w = { 0 };
    const struct keel_direction *one;
    keel_study_direction_path(s, words, name);
    KEEL_TRY(keel_steer_parse_one(&w, words, s->log));
    KEEL_TRY(keel_directions_read(file, w.file, s->log));
    KEEL_TRY(keel_directions_one(&one, file, &w, s->log));
    *out = (struct keel_monitor_direction){ one->v, one->layer, file->site };
out:
    keel_steer_words_finish(&w);
    return st;
}

static keel_status mitigate(struct study *s, const struct study_train *t, struct keel_train_params *p, struct mitigations *m)
{
    const struct study_state steered = { .steer = t->steer, .n_steer = t->n_steer };
    keel_status st = KEEL_OK;
    if (t->kl_data && t->kl_weight > 0) {
        keel_study_path(m->kl, s->folder, t->kl_data);
        p->kl_data = m->kl;
        p->kl_weight = t->kl_weight;
        p->kl_rows = t->kl_rows;
    }
    if (t->lisa_data) {
        keel_study_path(m->lisa, s->folder, t->lisa_data);
        p->lisa_data = m->lisa;
        p->lisa_align = t->lisa_align;
        p->lisa_task = t->lisa_task;
        p->lisa_rho = t->lisa_rho;
    }
    if (t->monitor) {
        keel_study_path(m->monitor, s->folder, t->monitor);
        p->monitor = m->monitor;
        p->monitor_every = t->monitor_every;
    }
    if (t->monitor_direction) {
        KEEL_TRY(read_monitor_direction(s, t->monitor_direction, &m->along, &p->monitor_direction));
    }
    for (unsigned i = 0; i < t->n_guard; i++) {
        KEEL_TRY(keel_guard_parse(t->guard[i], &m->guard[i], s->log));
    }
    p->guard = m->guard;
    p->n_guard = t->n_guard;
    KEEL_TRY(keel_study_hooks(s, &steered, &m->hooks));
    p->hooks = m->hooks;
out:
    return st;
}

static json_t *number_or_null(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

static json_t *monitor_json(const struct study_train *t)
{
    json_t *guards = json_array();
    for (unsigned i = 0; i < t->n_guard; i++) {
        json_array_append_new(guards, json_string(t->guard[i]));
    }
    return json_pack("{s:s, s:s?, s:o}", "rows", t->monitor, "direction", t->monitor_direction, "guard", guards);
}

// What the manifest says of a training. Without a step there is no loss.
static json_t *training_json(const struct study_train *t, const struct keel_train_result *r)
{
    json_t *v = json_pack("{s:I, s:o, s:o, s:I, s:I, s:b, s:f}", "steps", (json_int_t)r->steps, "first_loss",
                          number_or_null(r->steps > 0 ? r->first_loss : NAN), "last_loss", number_or_null(r->steps > 0 ? r->last_loss : NAN),
                          "rows", (json_int_t)r->n_rows, "parameters", (json_int_t)r->n_params, "breached", r->breached, "prepare_seconds",
                          r->prepare_seconds);
    if (t->monitor) {
        json_object_set_new(v, "monitor", monitor_json(t));
    }
    if (r->breached) {
        json_object_set_new(v, "breach",
                            json_pack("{s:s, s:f, s:o, s:I}", "metric", keel_monitor_name[r->breach.guard.metric], "limit",
                                      r->breach.guard.limit, "value", number_or_null(r->breach.value), "step", (json_int_t)r->breach.step));
    }
    return v;
}

keel_status keel_study_train(struct study *s, struct study_folder *folder, const struct study_training *t, const char *adapter)
{
    keel_status st = KEEL_OK;
    const unsigned n = t->train->data_count + 1;
    const size_t fixed = t->from->n_adapters - (t->go_on ? 1 : 0);
    char state[4200], log[4200];
    char(*paths)[4200] = calloc(n, sizeof *paths);
    struct keel_train_data *data = calloc(n, sizeof *data);
    struct keel_train_base frozen[STUDY_MAX_ADAPTERS];
    struct keel_train_params params = train_params(t);
    struct keel_train_result result;
    struct mitigations extra = { 0 };
    if (!paths || !data) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for the list of data files");
    }
    for (size_t i = 0; i < fixed; i++) {
        frozen[i] = (struct keel_train_base){ t->from->adapter[i].path, t->from->adapter[i].scale };
    }
    if (t->go_on) {
        params.init_adapter = t->from->adapter[fixed].path;
        params.alpha = 0; // its own
    }
    keel_study_path(state, folder->path, "train/state");
    keel_study_path(log, folder->path, "train/log.jsonl");
    params.no_steps = t->no_steps;
    params.data = data;
    params.n_data = mix(s, t->train, t->mixture, paths, data);
    params.out = adapter;
    params.frozen = frozen;
    params.n_frozen = fixed;
    params.images = s->images;
    params.checkpoint = state;
    params.log = log;
    params.on_step = keel_study_step;
    params.user = s;
    KEEL_TRY(keel_study_images(s, t->from, fixed));
    KEEL_TRY(mitigate(s, t->train, &params, &extra));
    KEEL_TRY(keel_train(s->model, &params, &result));
    json_object_set_new(folder->manifest, "training", training_json(t->train, &result));
out:
    keel_hooks_destroy(&extra.hooks);
    keel_directions_finish(&extra.along);
    free(paths);
    free(data);
    return st;
}
