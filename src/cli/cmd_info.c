// SPDX-License-Identifier: MIT
// cli/cmd_info.c: what a model is, and the memory that a use of it will take, before anything is loaded.
#include "cli.h"
#include "commands.h"

#include <keel/vision.h>

struct info_args {
    struct common common;
    bool json, lisa;
    uint32_t ctx, rank, batch, seq_len;
    const char *targets, *layers;
    uint64_t constrain_tokens, kl_tokens;
    struct arg_list words;
};

static json_t *info_json(const struct keel_model_info *m, uint64_t hash)
{
    char hex[17];
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)hash);
    return json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:I, s:s}", "path", m->path, "name",
                     m->name, "arch", m->arch, "types", m->types, "n_layers", (int)m->n_layers, "width", (int)m->width,
                     "ff_width", (int)m->ff_width, "n_heads", (int)m->n_heads, "n_kv_heads", (int)m->n_kv_heads, "head_dim",
                     (int)m->head_dim, "vocab", (int)m->vocab, "window", (int)m->window, "context", (int)m->context,
                     "n_global_layers", (int)m->n_global_layers, "n_params", (json_int_t)m->n_params, "file_bytes",
                     (json_int_t)m->file_bytes, "hash", hex);
}

static void info_print(const struct keel_model_info *m)
{
    printf("%s: %s, architecture %s\n", m->path, m->name, m->arch);
    printf("  %-28s %.1f million in %s\n", "parameters", (double)m->n_params * 1e-6, bytes_text(m->file_bytes));
    printf("  %-28s %s\n", "tensors", m->types);
    printf("  %-28s %u (%u global, %u with a window of %u tokens)\n", "layers", m->n_layers, m->n_global_layers,
           m->n_layers - m->n_global_layers, m->window);
    printf("  %-28s %u, feed-forward %u, vocabulary %u\n", "width", m->width, m->ff_width, m->vocab);
    printf("  %-28s %u query, %u key/value, %u wide\n", "heads", m->n_heads, m->n_kv_heads, m->head_dim);
    printf("  %-28s %u tokens\n", "context", m->context);
}

// --- a vision tower ------------------------------------------------------------------------------

static json_t *vision_json(const struct keel_vision_info *v, const struct keel_plan *plan)
{
    char hex[17];
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)v->hash);
    return json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:I, s:s, s:o}", "path", v->path, "arch", "clip",
                     "image_size", (int)v->image_size, "patch", (int)v->patch, "width", (int)v->width, "ff_width", (int)v->ff_width,
                     "n_layers", (int)v->n_layers, "n_heads", (int)v->n_heads, "n_tokens", (int)v->n_tokens, "out_width",
                     (int)v->out_width, "n_params", (json_int_t)v->n_params, "file_bytes", (json_int_t)v->file_bytes, "hash", hex,
                     "plan_vision", plan_json(plan));
}

static void vision_print(const struct keel_vision_info *v, const struct keel_plan *plan)
{
    printf("%s: vision tower (mmproj) for a Gemma 3 model\n", v->path);
    printf("  %-28s %.1f million in %s\n", "parameters", (double)v->n_params * 1e-6, bytes_text(v->file_bytes));
    printf("  %-28s %u × %u pixels in patches of %u × %u\n", "image", v->image_size, v->image_size, v->patch, v->patch);
    printf("  %-28s %u\n", "layers", v->n_layers);
    printf("  %-28s %u, feed-forward %u, %u heads\n", "width", v->width, v->ff_width, v->n_heads);
    printf("  %-28s %u tokens of width %u\n", "an image becomes", v->n_tokens, v->out_width);
    printf("memory while images are encoded\n");
    plan_print(stdout, plan);
}

// The tower of --mmproj, as a part of what is said of its model.
static keel_status show_tower(const struct context *c, const struct info_args *a, json_t *out)
{
    struct keel_plan plan;
    keel_vision *v = NULL;
    keel_status st = keel_vision_open(&v, a->common.mmproj, c->model, &c->log);
    if (st == KEEL_OK) {
        st = keel_vision_plan(v, &plan);
    }
    if (st == KEEL_OK && a->json) {
        keel_vision_hash(v);
        json_object_set_new(out, "vision", vision_json(keel_vision_info(v), &plan));
    } else if (st == KEEL_OK) {
        vision_print(keel_vision_info(v), &plan);
    }
    keel_vision_close(&v);
    return st;
}

static int info_vision(const struct info_args *a)
{
    struct context c = { .log = cli_log(&a->common) };
    struct keel_plan plan;
    keel_vision *v = NULL;
    keel_status st = keel_vision_open(&v, a->words.at[0], NULL, &c.log);
    if (st == KEEL_OK) {
        st = keel_vision_plan(v, &plan);
    }
    if (st == KEEL_OK && a->json) {
        keel_vision_hash(v);
        print_json(stdout, vision_json(keel_vision_info(v), &plan));
    } else if (st == KEEL_OK) {
        vision_print(keel_vision_info(v), &plan);
    }
    keel_vision_close(&v);
    return context_close(&c, st);
}

// --- a model -------------------------------------------------------------------------------------

static keel_status show_plan(const struct context *c, const struct info_args *a, bool train, json_t *out)
{
    struct keel_plan plan;
    struct keel_plan_params p = { .n_ctx = a->ctx, .n_batch = a->common.batch_tokens, .kv = a->common.kv, .targets = a->targets,
                                  .images = a->common.mmproj != NULL };
    if (train) {
        p = (struct keel_plan_params){
            .layers = a->layers, .train_lisa = a->lisa, .train_constrain_tokens = a->constrain_tokens,
            .train_kl_tokens = a->kl_tokens, .train_rank = a->rank, .train_tokens = a->batch * a->seq_len, .train_row = a->seq_len, .targets = a->targets,
            .images = a->common.mmproj != NULL
        };
    }
    const keel_status st = keel_model_plan(c->model, &p, &plan);
    if (st != KEEL_OK) {
        return st;
    }
    if (a->json) {
        json_object_set_new(out, train ? "plan_train" : "plan_run", plan_json(&plan));
        return st;
    }
    if (train) {
        printf("memory to train rank %u, %u rows of %u tokens a micro-batch\n", a->rank, a->batch, a->seq_len);
    } else {
        printf("memory to run with %u tokens of context, %u a pass, keys and values as %s\n", a->ctx, p.n_batch, p.kv);
    }
    plan_print(stdout, &plan);
    return st;
}

static int info_run(const void *args)
{
    struct info_args named = *(const struct info_args *)args;
    const struct info_args *a = &named;
    struct context c = { 0 };
    json_t *out = NULL;
    if (keel_vision_is_file(a->words.at[0])) {
        return info_vision(a);
    }
    named.common.model = a->words.at[0];
    shipped_resolve(&named.common);
    struct common common = a->common;
    common.mmproj = NULL; // show_tower() opens it
    keel_status st = context_open_model(&c, &common);
    if (st == KEEL_OK) {
        const uint64_t hash = a->json ? keel_model_hash(c.model) : 0;
        const struct keel_model_info *m = keel_model_info(c.model);
        if (a->json) {
            out = info_json(m, hash);
        } else {
            info_print(m);
        }
        st = a->common.mmproj ? show_tower(&c, a, out) : KEEL_OK;
    }
    if (st == KEEL_OK) {
        st = show_plan(&c, a, false, out);
    }
    if (st == KEEL_OK && a->rank > 0) {
        st = show_plan(&c, a, true, out);
    }
    if (st == KEEL_OK && a->json) {
        print_json(stdout, out);
    } else {
        json_decref(out);
    }
    return context_close(&c, st);
}

#define AT(field) offsetof(struct info_args, field)
static const struct arg_option options[] = {
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print one JSON object, with the file's hash" },
    OPTION_TYPE,
    OPTION_MMPROJ,
    { .name = "--ctx", .type = ARG_U32, .offset = AT(ctx), .value = "N", .def = "4096", .min = 1, .max = 1 << 24,
      .help = "plan for a context of N tokens" },
    { .name = "--batch-tokens", .type = ARG_U32, .offset = OPT_COMMON(batch_tokens), .value = "N", .def = "256", .min = 1,
      .max = 65536, .help = "and N tokens a pass" },
    OPTION_KV,
    { .name = "--rank", .type = ARG_U32, .offset = AT(rank), .value = "N", .def = "0", .min = 0, .max = 1024,
      .help = "plan training of this LoRA rank too; 0: no" },
    { .name = "--batch", .type = ARG_U32, .offset = AT(batch), .value = "N", .def = "4", .min = 1, .max = 1024,
      .help = "with so many rows a micro-batch" },
    { .name = "--seq-len", .type = ARG_U32, .offset = AT(seq_len), .value = "N", .def = "512", .min = 2, .max = 131072,
      .help = "of so many tokens" },
    { .name = "--targets", .type = ARG_STR, .offset = AT(targets), .value = "LIST", .def = "all",
      .help = "projections that get an adapter" },
    { .name = "--layers", .type = ARG_STR, .offset = AT(layers), .value = "LIST", .help = "and layers that do; all if not given" },
    { .name = "--lisa", .type = ARG_FLAG, .offset = AT(lisa), .help = "and Lisa's copies of the adapter (train --lisa-data)" },
    { .name = "--constrain-tokens", .type = ARG_U64, .offset = AT(constrain_tokens), .value = "N", .def = "0", .min = 0, .max = 1e12,
      .help = "and so many loss tokens under train --constrain" },
    { .name = "--kl-tokens", .type = ARG_U64, .offset = AT(kl_tokens), .value = "N", .def = "0", .min = 0, .max = 1e12,
      .help = "and so many loss tokens in train --kl-data and --monitor" },
    OPTIONS_LOG,
};
const struct arg_command cmd_info = {
    .name = "info", .summary = "show what a model or vision tower is and the memory it will take",
    .usage = "MODEL [--mmproj P] [--ctx N] [--rank N] [--json]", .options = options, .n_options = sizeof options / sizeof options[0],
    .args_bytes = sizeof(struct info_args), .positional = AT(words), .min_words = 1, .max_words = 1, .word = "MODEL",
    .run = info_run,
};
