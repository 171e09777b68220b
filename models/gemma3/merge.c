// SPDX-License-Identifier: MIT
// gemma3/merge.c: adds LoRA adapters to the weights of a model and writes the sum as a GGUF. Owns nothing beyond the call.
// Source: Hu et al. 2021: W + (alpha / rank) B A.
#include "convert.h"
#include "gemma3.h"

#include <stdlib.h>
#include <string.h>

struct merge {
    keel_model *model;
    struct keel_adapter_file *file; // [n]
    size_t n;
    struct keel_pack_delta *delta;  // [tensors of the pack × n]
    struct keel_pack pack;
};

static void finish(struct merge *m)
{
    for (size_t i = 0; m->file && i < m->n; i++) {
        keel_adapter_file_finish(&m->file[i]);
    }
    free(m->file);
    free(m->delta);
    keel_pack_finish(&m->pack);
    keel_model_close(&m->model);
}

// The adapters' parts for one tensor of a block, appended at `delta`; returns how many.
static uint32_t find_deltas(const struct merge *m, const struct keel_merge_adapter *adapters, const char *name,
                            struct keel_pack_delta *delta)
{
    unsigned layer;
    int at = 0;
    uint32_t n = 0;
    if (sscanf(name, "blk.%u.%n", &layer, &at) != 1 || at == 0) {
        return 0;
    }
    for (uint32_t proj = 0; proj < KEEL_N_PROJ; proj++) {
        const size_t len = strlen(keel_proj_name[proj]);
        if (strncmp(name + at, keel_proj_name[proj], len) != 0 || strcmp(name + at + len, ".weight") != 0) {
            continue;
        }
        for (size_t i = 0; i < m->n; i++) {
            const struct keel_adapter_pair *p = &m->file[i].pair[(size_t)layer * KEEL_N_PROJ + proj];
            if (p->rank > 0) {
                delta[n++] = (struct keel_pack_delta){p->rank, p->scale * adapters[i].scale, p->a, p->b};
            }
        }
    }
    return n;
}

static keel_status read_all(struct merge *m, const char *from, const struct keel_merge_adapter *adapters, keel_gguf_writer *w,
                            const keel_log *log)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_model_open(&m->model, from, log));
    const size_t n_tensors = keel_gguf_tensor_count(m->model->gguf);
    m->file = calloc(m->n, sizeof *m->file);
    m->delta = calloc(n_tensors * m->n, sizeof *m->delta);
    if (!m->file || !m->delta) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory to merge adapters", from);
    }
    for (size_t i = 0; i < m->n; i++) {
        KEEL_TRY(keel_adapter_file_read(&m->file[i], m->model, adapters[i].path));
        if (m->file[i].n_skipped > 0) {
            KEEL_WARN(log, "%s: what it changes in the vision tower (%u tensors) is left out of the merged model", adapters[i].path,
                      m->file[i].n_skipped);
        }
    }
    KEEL_TRY(keel_pack_gguf(&m->pack, w, m->model->gguf, &m->model->map, log));
    for (size_t i = 0; i < n_tensors; i++) {
        m->pack.t[i].delta = m->delta + i * m->n;
        m->pack.t[i].n_delta = find_deltas(m, adapters, m->pack.t[i].name, m->delta + i * m->n);
    }
out:
    return st;
}

keel_status keel_merge(const char *from, const struct keel_merge_adapter *adapters, size_t n, const char *to,
                       const struct keel_convert_params *params, const keel_log *log)
{
    static const struct keel_convert_params none = {0};
    keel_status st = KEEL_OK;
    struct merge m = {.n = n};
    struct keel_file_out out = {0};
    keel_gguf_writer *w = NULL;
    const struct keel_recipe *recipe;
    params = params ? params : &none;
    KEEL_TRY(keel_recipe_of(&recipe, params->type, log));
    if (n == 0 || strcmp(from, to) == 0) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "%s: a merge needs an adapter, and a name for the result that is not the model's", from);
    }
    KEEL_TRY(keel_gguf_writer_create(&w, log));
    KEEL_TRY(read_all(&m, from, adapters, w, log));
    keel_recipe_apply(recipe, &m.pack, log);
    keel_gguf_put_u32(w, "general.file_type", keel_recipe_file_type(recipe, &m.pack));
    KEEL_TRY(keel_file_create(&out, to, log));
    KEEL_TRY(keel_pack_write(&m.pack, w, out.f, params, from, log));
    KEEL_TRY(keel_file_commit(&out, log));
out:
    keel_file_abort(&out);
    keel_gguf_writer_destroy(&w);
    finish(&m);
    return st;
}
