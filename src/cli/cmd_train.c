// SPDX-License-Identifier: MIT
// cli/cmd_train.c: LoRA training from the command line.
#include "cli.h"
#include "commands.h"

#include <keel/steer.h>
#include <keel/train.h>

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct train_args {
    struct common common;
    struct arg_list data;
    const char *out, *targets, *layers, *schedule, *optimizer, *init_adapter, *resume, *log;
    const char *constrain, *kl_data, *lisa_data, *lisa_steps, *monitor, *monitor_direction, *on_breach;
    struct arg_list guard;
    uint32_t rank, warmup, batch, accum, seq_len, kl_rows, monitor_every;
    uint64_t steps, seed, save_every;
    double alpha, lr, epochs, beta1, beta2, eps, weight_decay, grad_clip, kl_weight, lisa_rho;
    bool no_shuffle, json;
};

struct train_progress {
    struct progress line;
    uint64_t tokens;
    uint64_t start_ns;
    double monitor[KEEL_N_MONITORED]; // as last measured
    bool monitored;
};

static bool on_step(void *user, const struct keel_step_info *info)
{
    struct train_progress *p = user;
    char extra[256];
    if (p->start_ns == 0) {
        p->start_ns = now_ns() - (uint64_t)(info->seconds * 1e9);
        // The rate counts from before the first step, so that a single step has one.
        p->line.start_ns = p->start_ns;
        p->line.done0 = info->step - 1;
    }
    p->tokens += info->tokens;
    const double seconds = (double)(now_ns() - p->start_ns) * 1e-9;
    int used = snprintf(extra, sizeof extra, "loss %.4f, grad norm %.3g, %.3g tokens/s", info->loss, info->grad_norm,
                        seconds > 0 ? (double)p->tokens / seconds : 0);
    if (info->monitor) {
        memcpy(p->monitor, info->monitor, sizeof p->monitor);
        p->monitored = true;
    }
    for (size_t i = 0; p->monitored && i < KEEL_N_MONITORED && used > 0 && (size_t)used < sizeof extra; i++) {
        if (isfinite(p->monitor[i])) {
            used += snprintf(extra + used, sizeof extra - (size_t)used, ", %s %.3g", keel_monitor_name[i], p->monitor[i]);
        }
    }
    progress_show(&p->line, info->step, info->n_steps, extra);
    return !stop_asked();
}

// "B1,B2,B3". False: said why.
static bool parse_constrain(const struct train_args *a, double constrain[3])
{
    char rest;
    if (a->constrain && sscanf(a->constrain, "%lf,%lf,%lf%c", &constrain[0], &constrain[1], &constrain[2], &rest) != 3) {
        fprintf(stderr, "keel train: --constrain %s: three numbers are needed, like 0.5,2,0.1\n", a->constrain);
        return false;
    }
    return true;
}

// "ALIGN,TASK". False: said why.
static bool parse_lisa(const struct train_args *a, uint32_t *align, uint32_t *task)
{
    char rest;
    if (sscanf(a->lisa_steps, "%" SCNu32 ",%" SCNu32 "%c", align, task, &rest) != 2 || strchr(a->lisa_steps, '-')) {
        fprintf(stderr, "keel train: --lisa-steps %s: two numbers of steps are needed, like 100,900\n", a->lisa_steps);
        return false;
    }
    return true;
}

// False: said why.
static bool parse_guard(const struct train_args *a, struct keel_guard *guard)
{
    const keel_log log = cli_log(&a->common);
    for (size_t i = 0; i < a->guard.n; i++) {
        if (keel_guard_parse(a->guard.at[i], &guard[i], &log) != KEEL_OK) {
            return false;
        }
    }
    return true;
}

static enum keel_on_breach parse_on_breach(const char *word)
{
    return strcmp(word, "stop") == 0 ? KEEL_BREACH_STOP : strcmp(word, "fail") == 0 ? KEEL_BREACH_FAIL : KEEL_BREACH_ROLLBACK;
}

// FILE or FILE@LAYER, of the file's only layer. `file` owns what `d` points to.
static keel_status read_direction(struct context *c, const char *text, struct keel_directions *file, struct keel_monitor_direction *d)
{
    struct keel_steer_words words = { 0 };
    const struct keel_direction *one = NULL;
    keel_status st = keel_steer_parse_one(&words, text, &c->log);
    if (st == KEEL_OK) {
        st = keel_directions_read(file, words.file, &c->log);
    }
    if (st == KEEL_OK && file->width != keel_model_info(c->model)->width) {
        say(c, KEEL_LOG_ERROR, "%s: its directions are %u wide, the model is %u; make them with this model", words.file, file->width,
            keel_model_info(c->model)->width);
        st = KEEL_ERR_MISMATCH;
    }
    if (st == KEEL_OK) {
        st = keel_directions_one(&one, file, &words, &c->log);
    }
    if (st == KEEL_OK) {
        *d = (struct keel_monitor_direction){ one->v, one->layer, file->site };
    }
    keel_steer_words_finish(&words);
    return st;
}

static bool parse_data(const struct train_args *a, struct keel_train_data *data)
{
    for (size_t i = 0; i < a->data.n; i++) {
        double weight = 1.0;
        size_t len;
        if (!args_split_number(a->data.at[i], &len, &weight) || weight <= 0 || weight > 1e9) {
            fprintf(stderr, "keel train: --data %s: the weight after the colon must be above 0\n", a->data.at[i]);
            return false;
        }
        data[i].path = strndup(a->data.at[i], len);
        data[i].weight = (float)weight;
        if (!data[i].path) {
            fprintf(stderr, "keel train: out of memory\n");
            return false;
        }
    }
    return true;
}

// The adapters of --lora; their names are to be freed. False: said why.
static bool parse_frozen(const struct train_args *a, struct keel_train_base *frozen)
{
    for (size_t i = 0; i < a->common.lora.n; i++) {
        double scale = 1.0;
        size_t len;
        if (!args_split_number(a->common.lora.at[i], &len, &scale)) {
            fprintf(stderr, "keel train: --lora %s: the scale is not a number\n", a->common.lora.at[i]);
            return false;
        }
        frozen[i] = (struct keel_train_base){ strndup(a->common.lora.at[i], len), (float)scale };
        if (!frozen[i].path) {
            fprintf(stderr, "keel train: out of memory\n");
            return false;
        }
    }
    return true;
}

// `out`: the adapter, or NULL: none was written.
static void print_result(const struct context *c, const struct train_args *a, const struct keel_train_result *r, const char *out)
{
    if (a->json) {
        print_json(stdout, json_pack("{s:s?, s:I, s:f, s:f, s:I, s:f, s:I, s:I, s:b, s:f}", "out", out, "steps", (json_int_t)r->steps,
                                     "first_loss", r->first_loss, "last_loss", r->last_loss, "tokens", (json_int_t)r->tokens,
                                     "seconds", r->seconds, "rows", (json_int_t)r->n_rows, "parameters", (json_int_t)r->n_params,
                                     "breached", r->breached, "prepare_seconds", r->prepare_seconds));
        return;
    }
    say(c, KEEL_LOG_INFO, "%llu steps in %.1f s, loss %.4f to %.4f, %.1f tokens/s; adapter: %s", (unsigned long long)r->steps,
        r->seconds, r->first_loss, r->last_loss, r->seconds > 0 ? (double)r->tokens / r->seconds : 0, out);
}

// Before the model takes the device's memory.
static keel_status encode_images(struct context *c, const struct train_args *a, const struct keel_train_data *data)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; c->images && st == KEEL_OK && i < a->data.n; i++) {
        st = keel_images_scan(c->images, data[i].path, &c->log);
    }
    const char *const more[] = { a->kl_data, a->lisa_data, a->monitor };
    for (size_t i = 0; c->images && st == KEEL_OK && i < sizeof more / sizeof more[0]; i++) {
        st = more[i] ? keel_images_scan(c->images, more[i], &c->log) : KEEL_OK;
    }
    return st == KEEL_OK ? context_encode_images(c, &a->common) : st;
}

static int train(const struct train_args *a, const struct keel_train_data *data, struct keel_train_base *frozen,
                 const struct keel_guard *guard)
{
    struct context c = { 0 };
    struct keel_directions direction = { 0 };
    struct keel_train_result result = { 0 };
    struct train_progress p = { .line = { .what = "train", .unit = "steps", .off = a->common.quiet } };
    struct keel_train_params params = {
        .data = data, .n_data = a->data.n, .out = a->out, .rank = a->rank, .alpha = (float)a->alpha, .targets = a->targets,
        .layers = a->layers,
        .lr = a->lr, .schedule = a->schedule, .warmup = a->warmup, .steps = a->steps, .epochs = a->epochs, .batch = a->batch,
        .accum = a->accum, .seq_len = a->seq_len, .seed = a->seed, .no_shuffle = a->no_shuffle, .beta1 = a->beta1,
        .beta2 = a->beta2, .eps = a->eps, .weight_decay = a->weight_decay, .grad_clip = a->grad_clip,
        .init_adapter = a->init_adapter, .frozen = frozen, .n_frozen = a->common.lora.n, .checkpoint = a->resume,
        .resume = a->resume != NULL, .save_every = a->save_every,
        .monitor = a->monitor, .monitor_every = a->monitor_every, .guard = guard, .n_guard = a->guard.n,
        .on_breach = parse_on_breach(a->on_breach), .lisa_data = a->lisa_data, .lisa_rho = a->lisa_rho, .kl_data = a->kl_data,
        .kl_weight = a->kl_weight, .kl_rows = a->kl_rows, .log = a->log, .on_step = on_step, .user = &p,
    };
    if (!parse_constrain(a, params.constrain) || !parse_lisa(a, &params.lisa_align, &params.lisa_task)) {
        return EXIT_USAGE;
    }
    keel_status st = context_open_model(&c, &a->common);
    if (st == KEEL_OK) {
        st = context_open_device(&c, &a->common);
    }
    if (st == KEEL_OK) {
        st = encode_images(&c, a, data);
    }
    if (st == KEEL_OK) {
        st = keel_model_load(c.model, c.dev);
    }
    params.images = c.images;
    if (st == KEEL_OK && !c.hooks) {
        st = context_steer(&c, &a->common, &c.hooks);
    }
    params.hooks = c.hooks;
    if (st == KEEL_OK && a->monitor_direction) {
        st = read_direction(&c, a->monitor_direction, &direction, &params.monitor_direction);
    }
    if (st == KEEL_OK) {
        st = keel_train(c.model, &params, &result);
        progress_end(&p.line);
    }
    if (st == KEEL_OK) {
        print_result(&c, a, &result, a->out);
    } else if (st == KEEL_OVER_BUDGET && result.breached && a->json) { // a training that a guard ended is a result too
        print_result(&c, a, &result, params.on_breach == KEEL_BREACH_FAIL ? NULL : a->out);
    } else if (st == KEEL_INTERRUPTED) {
        say(&c, KEEL_LOG_ERROR, "interrupted; the same command with --resume %s%s goes on", a->resume ? a->resume : a->out,
            a->resume ? "" : ".state");
    }
    keel_directions_finish(&direction);
    return context_close(&c, st);
}

static int train_run(const void *args)
{
    const struct train_args *a = args;
    struct keel_train_data *data = calloc(a->data.n, sizeof *data);
    struct keel_train_base *frozen = calloc(a->common.lora.n + 1, sizeof *frozen);
    struct keel_guard *guard = calloc(a->guard.n + 1, sizeof *guard);
    int code = EXIT_USAGE;
    if (data && frozen && guard && parse_data(a, data) && parse_frozen(a, frozen) && parse_guard(a, guard)) {
        code = train(a, data, frozen, guard);
    }
    free(guard);
    for (size_t i = 0; frozen && i < a->common.lora.n; i++) {
        free((void *)(uintptr_t)frozen[i].path);
    }
    free(frozen);
    for (size_t i = 0; data && i < a->data.n; i++) {
        free((void *)data[i].path);
    }
    free(data);
    return code;
}

#define AT(field) offsetof(struct train_args, field)
static const char *const schedules[] = { "constant", "linear", "cosine", NULL };
static const char *const breaches[] = { "rollback", "stop", "fail", NULL };
static const char *const optimizers[] = { "adamw", NULL };
static const struct arg_option options[] = {
    OPTION_MODEL,
    { .name = "--data", .type = ARG_LIST, .offset = AT(data), .file = ARG_IN, .value = "F[:WEIGHT]", .needed = true,
      .help = "JSONL rows {\"prompt\", \"completion\", \"eos\"?} or {\"messages\"}, with \"images\" if any; several are mixed by weight" },
    OPTIONS_IMAGES,
    { .name = "--out", .type = ARG_STR, .offset = AT(out), .file = ARG_OUT_MADE, .value = "A", .needed = true,
      .help = "adapter to write: NAME.gguf, or a folder for PEFT" },
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print the result as one JSON object" },
    { .type = ARG_HEAD, .help = "Adapter" },
    { .name = "--rank", .type = ARG_U32, .offset = AT(rank), .value = "N", .def = "16", .min = 1, .max = 1024, .help = "LoRA rank" },
    { .name = "--alpha", .type = ARG_NUM, .offset = AT(alpha), .value = "X", .def = "0", .min = 0, .max = 1e6,
      .help = "scale is alpha / rank; 0: twice the rank" },
    { .name = "--targets", .type = ARG_STR, .offset = AT(targets), .value = "LIST", .def = "all",
      .help = "attn_q,attn_k,attn_v,attn_output,ffn_gate,ffn_up,ffn_down, or all; vision.* or vision.NAME with --mmproj" },
    { .name = "--layers", .type = ARG_STR, .offset = AT(layers), .value = "LIST",
      .help = "layers of the language model that get an adapter, like 0-11 or 1,4-6; all if not given" },
    { .name = "--init-adapter", .type = ARG_STR, .offset = AT(init_adapter), .file = ARG_IN, .value = "A", .help = "start from this adapter" },
    { .name = "--lora", .type = ARG_LIST, .offset = OPT_COMMON(lora), .file = ARG_IN, .value = "A[:SCALE]",
      .help = "train on top of this adapter, which stays as it is and is not part of --out" },
    OPTION_STEER,
    { .type = ARG_HEAD, .help = "Steps" },
    { .name = "--lr", .type = ARG_NUM, .offset = AT(lr), .value = "X", .def = "2e-4", .min = 0, .max = 10, .help = "learning rate" },
    { .name = "--schedule", .type = ARG_STR, .offset = AT(schedule), .value = "S", .def = "constant", .choice = schedules,
      .help = "constant, linear or cosine; the last two fall to 0" },
    { .name = "--warmup", .type = ARG_U32, .offset = AT(warmup), .value = "N", .def = "0", .min = 0, .max = 1e9,
      .help = "steps of linear rise from 0" },
    { .name = "--steps", .type = ARG_U64, .offset = AT(steps), .value = "N", .def = "0", .min = 0, .max = 1e12,
      .help = "optimiser steps; 0: as many as --epochs makes" },
    { .name = "--epochs", .type = ARG_NUM, .offset = AT(epochs), .value = "X", .def = "1", .min = 0.0001, .max = 1e6,
      .help = "passes over the data" },
    { .name = "--batch", .type = ARG_U32, .offset = AT(batch), .value = "N", .def = "4", .min = 1, .max = 1024,
      .help = "rows a micro-batch" },
    { .name = "--accum", .type = ARG_U32, .offset = AT(accum), .value = "N", .def = "1", .min = 1, .max = 65536,
      .help = "micro-batches a step" },
    { .name = "--seq-len", .type = ARG_U32, .offset = AT(seq_len), .value = "N", .def = "512", .min = 2, .max = 131072,
      .help = "longest row in tokens; a longer one is an error" },
    { .name = "--seed", .type = ARG_U64, .offset = AT(seed), .value = "N", .def = "1", .help = "of the order of rows and of A" },
    { .name = "--no-shuffle", .type = ARG_FLAG, .offset = AT(no_shuffle), .help = "rows in the file's order" },
    { .type = ARG_HEAD, .help = "Optimiser" },
    { .name = "--optimizer", .type = ARG_STR, .offset = AT(optimizer), .value = "O", .def = "adamw", .choice = optimizers,
      .help = "adamw, as torch.optim.AdamW" },
    { .name = "--beta1", .type = ARG_NUM, .offset = AT(beta1), .value = "X", .def = "0.9", .min = 0, .max = 0.999999, .help = "AdamW" },
    { .name = "--beta2", .type = ARG_NUM, .offset = AT(beta2), .value = "X", .def = "0.999", .min = 0, .max = 0.9999999, .help = "AdamW" },
    { .name = "--eps", .type = ARG_NUM, .offset = AT(eps), .value = "X", .def = "1e-8", .min = 0, .max = 1, .help = "AdamW" },
    { .name = "--weight-decay", .type = ARG_NUM, .offset = AT(weight_decay), .value = "X", .def = "0", .min = 0, .max = 10,
      .help = "AdamW, decoupled" },
    { .name = "--grad-clip", .type = ARG_NUM, .offset = AT(grad_clip), .value = "X", .def = "1", .min = 0, .max = 1e9,
      .help = "longest gradient (L2); 0: any" },
    { .type = ARG_HEAD, .help = "Against drift" },
    { .name = "--constrain", .type = ARG_STR, .offset = AT(constrain), .value = "B1,B2,B3",
      .help = "constrained loss: beta of a response's first token, of tokens 2 to 5, of the others; the paper has 0.5,2,0.1" },
    { .name = "--kl-data", .type = ARG_STR, .offset = AT(kl_data), .file = ARG_IN, .value = "F.jsonl",
      .help = "rows on which the model is held to the base: adds KL(base || adapted)" },
    { .name = "--kl-weight", .needs = "--kl-data", .type = ARG_NUM, .offset = AT(kl_weight), .value = "X", .def = "1", .min = 0, .max = 1e6,
      .help = "how much of it" },
    { .name = "--kl-rows", .needs = "--kl-data", .type = ARG_U32, .offset = AT(kl_rows), .value = "N", .def = "4", .min = 1, .max = 65536,
      .help = "rows of it a step" },
    { .name = "--lisa-data", .type = ARG_STR, .offset = AT(lisa_data), .file = ARG_IN, .value = "F.jsonl",
      .help = "Lisa: steps on these rows take turns with steps on the data, each near where the other kind ended" },
    { .name = "--lisa-steps", .needs = "--lisa-data", .type = ARG_STR, .offset = AT(lisa_steps), .value = "ALIGN,TASK", .def = "100,900",
      .help = "how many of each in a turn" },
    { .name = "--lisa-rho", .needs = "--lisa-data", .type = ARG_NUM, .offset = AT(lisa_rho), .value = "X", .def = "1", .min = 0, .max = 1e6,
      .help = "weight of the distance between them" },
    { .type = ARG_HEAD, .help = "Monitor and guard" },
    { .name = "--monitor", .type = ARG_STR, .offset = AT(monitor), .file = ARG_IN, .value = "F.jsonl",
      .help = "rows to measure drift on while training: completions, chosen/rejected, aligned/contrary" },
    { .name = "--monitor-every", .needs = "--monitor", .type = ARG_U32, .offset = AT(monitor_every), .value = "N", .def = "10", .min = 1, .max = 1e9,
      .help = "steps between measurements; the last step is one too" },
    { .name = "--monitor-direction", .needs = "--monitor", .type = ARG_STR, .offset = AT(monitor_direction), .file = ARG_IN, .value = "V[@LAYER]",
      .help = "and their prompts' projection on this direction" },
    { .name = "--guard", .needs = "--monitor", .type = ARG_LIST, .offset = AT(guard), .value = "METRIC<=X",
      .help = "limit of kl_mean, margin_drop, flip_rate, p_contrary, p_incoherent or projection_shift" },
    { .name = "--on-breach", .needs = "--guard", .type = ARG_STR, .offset = AT(on_breach), .value = "WHAT", .def = "rollback", .choice = breaches,
      .help = "above a limit: rollback to the last measurement within, stop (exit 3), or fail (exit 3, no adapter)" },
    { .type = ARG_HEAD, .help = "State and log" },
    { .name = "--resume", .type = ARG_STR, .offset = AT(resume), .value = "DIR",
      .help = "keep the state in DIR, and go on from it if there is one; without it OUT.state, afresh" },
    { .name = "--save-every", .type = ARG_U64, .offset = AT(save_every), .value = "N", .def = "0", .min = 0, .max = 1e12,
      .help = "steps between states; 0: every five minutes; always at the end and on a stop" },
    { .name = "--log", .type = ARG_STR, .offset = AT(log), .file = ARG_OUT, .value = "L.jsonl",
      .help = "one line a step: step, loss, lr, grad_norm, tokens, seconds" },
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_train = {
    .name = "train", .summary = "fine-tune with LoRA on the quantised weights", .usage = "-m MODEL --data F[:WEIGHT]... --out A.gguf [options]",
    .notes = "The loss is over completions (or assistant turns with their end of turn) only: the mean over the loss tokens of a step.\n"
             "A completion ends with the end of turn only if its row says \"eos\": true.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct train_args), .run = train_run,
};
