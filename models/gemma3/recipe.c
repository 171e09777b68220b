// SPDX-License-Identifier: MIT
// gemma3/recipe.c: which type each tensor of a new file gets. Source: llama.cpp's llama-quant.cpp, the rules that apply to
// Gemma 3 without an importance matrix, so that a file made here has the types of one made there.
#include "convert.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { PLAIN, MEDIUM, SMALL }; // K-quant mixtures: which of attn_v and ffn_down get more bits

static const struct keel_recipe recipes[] = {
    {"f32", KEEL_F32, 0, PLAIN},     {"f16", KEEL_F16, 1, PLAIN},      {"bf16", KEEL_BF16, 32, PLAIN},
    {"q8_0", KEEL_Q8_0, 7, PLAIN},   {"q6_k", KEEL_Q6_K, 18, PLAIN},   {"q5_k_m", KEEL_Q5_K, 17, MEDIUM},
    {"q5_k_s", KEEL_Q5_K, 16, SMALL}, {"q5_1", KEEL_Q5_1, 9, PLAIN},    {"q5_0", KEEL_Q5_0, 8, PLAIN},
    {"q4_k_m", KEEL_Q4_K, 15, MEDIUM}, {"q4_k_s", KEEL_Q4_K, 14, SMALL}, {"q4_1", KEEL_Q4_1, 3, PLAIN},
    {"q4_0", KEEL_Q4_0, 2, PLAIN},
};

static const struct keel_recipe *find_recipe(const char *name)
{
    for (size_t i = 0; name && i < KEEL_COUNT(recipes); i++) {
        if (strcasecmp(recipes[i].name, name) == 0) {
            return &recipes[i];
        }
    }
    return NULL;
}

keel_status keel_recipe_of(const struct keel_recipe **out, const char *name, const keel_log *log)
{
    char names[160] = "";
    size_t at = 0;
    *out = find_recipe(name);
    if (!name || *out) {
        return KEEL_OK;
    }
    for (size_t i = 0; i < KEEL_COUNT(recipes) && at < sizeof names; i++) {
        at += (size_t)snprintf(names + at, sizeof names - at, " %s", recipes[i].name);
    }
    KEEL_ERROR(log, "\"%s\" is no type to store weights in; there are:%s", name, names);
    return KEEL_ERR_ARG;
}

static uint32_t block_of(enum keel_dtype type)
{
    return keel_dtype_info((uint32_t)type)->block_elems;
}

// llama.cpp's use_more_bits: the first and last eighth, and every third between.
static bool wants_more(uint32_t layer, uint32_t n)
{
    return layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
}

static enum keel_dtype mixed(const struct keel_recipe *r, const char *part, uint32_t layer, uint32_t n_layers)
{
    const bool v = strcmp(part, "attn_v.weight") == 0, down = strcmp(part, "ffn_down.weight") == 0;
    if (r->mix == MEDIUM && (v || down) && wants_more(layer, n_layers)) {
        return KEEL_Q6_K;
    }
    if (r->mix == SMALL && r->base == KEEL_Q4_K && ((v && layer < 4) || (down && layer < n_layers / 8))) {
        return KEEL_Q5_K;
    }
    return r->base;
}

// The type with 32-element blocks, or none, that replaces one whose blocks do not fit the row.
static enum keel_dtype fitting(enum keel_dtype type, uint64_t row)
{
    if (row % block_of(type) != 0) {
        type = type == KEEL_Q4_K ? KEEL_Q5_0 : type == KEEL_Q5_K ? KEEL_Q5_1 : type == KEEL_Q6_K ? KEEL_Q8_0 : KEEL_F16;
    }
    return row % block_of(type) != 0 ? KEEL_F16 : type;
}

static enum keel_dtype head_type(const struct keel_recipe *r, uint64_t row)
{
    if (r->base == KEEL_Q8_0 || row % block_of(r->base) != 0) {
        return KEEL_Q8_0;
    }
    return KEEL_Q6_K;
}

void keel_recipe_apply(const struct keel_recipe *r, struct keel_pack *p, const keel_log *log)
{
    uint32_t n_layers = 0, n_replaced = 0;
    bool has_head = false;
    const char *example = NULL;
    for (size_t i = 0; i < p->n; i++) {
        unsigned layer;
        has_head = has_head || strcmp(p->t[i].name, "output.weight") == 0;
        n_layers = sscanf(p->t[i].name, "blk.%u.", &layer) == 1 && layer >= n_layers ? layer + 1 : n_layers;
    }
    for (size_t i = 0; i < p->n; i++) {
        struct keel_pack_tensor *t = &p->t[i];
        const char *head = has_head ? "output.weight" : "token_embd.weight";
        unsigned layer = 0;
        int at = 0;
        if (t->n_dims < 2 || !r) {
            t->to = t->n_dims < 2 ? KEEL_F32 : t->from;
            continue;
        }
        enum keel_dtype want = r->base;
        if (strcmp(t->name, head) == 0 && block_of(r->base) > 1) {
            want = head_type(r, t->dims[0]);
        } else if (sscanf(t->name, "blk.%u.%n", &layer, &at) == 1 && at > 0) {
            want = mixed(r, t->name + at, layer, n_layers);
        }
        t->to = fitting(want, t->dims[0]);
        if (t->to != want) {
            n_replaced++;
            example = t->name;
        }
    }
    if (n_replaced > 0) {
        KEEL_INFO(log, "%u tensors have rows that the blocks of %s do not divide and get a type with smaller ones (as \"%s\")",
                  n_replaced, r->name, example);
    }
}

// Embeddings of patches and positions and all vectors are f32, as in llama.cpp's converter; the projection, which is stored
// the other way round, has no blocks along its rows and stays f16.
void keel_recipe_apply_vision(const struct keel_recipe *r, struct keel_pack *p)
{
    for (size_t i = 0; i < p->n; i++) {
        struct keel_pack_tensor *t = &p->t[i];
        const bool full = r ? r->base == KEEL_F32 : t->from == KEEL_F32;
        const bool block = strncmp(t->name, "v.blk.", 6) == 0;
        if (t->n_dims < 2 || strstr(t->name, "_embd") || full) {
            t->to = KEEL_F32;
        } else if (r && block) {
            t->to = fitting(r->base, t->dims[0]);
        } else {
            t->to = KEEL_F16;
        }
    }
}

uint32_t keel_recipe_file_type(const struct keel_recipe *recipe, const struct keel_pack *p)
{
    uint64_t most = 0;
    uint32_t best = 0;
    if (recipe) {
        return recipe->file_type;
    }
    for (size_t k = 0; k < KEEL_COUNT(recipes); k++) {
        uint64_t bytes = 0;
        for (size_t i = 0; i < p->n; i++) {
            bytes += p->t[i].to == recipes[k].base ? keel_dtype_bytes(p->t[i].to, p->t[i].n_elems) : 0;
        }
        if (bytes > most) {
            most = bytes;
            best = recipes[k].file_type;
        }
    }
    return best;
}
