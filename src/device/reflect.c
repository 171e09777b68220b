// SPDX-License-Identifier: MIT
// device/reflect.c: what a SPIR-V module wants bound: its storage buffers and the size of its push constants, so that a
// dispatch that does not fit is a clear message and not a crash in the driver.
// Source: SPIR-V specification 1.3, sections 2.3 (layout) and 3.32 (instructions).
#include "internal.h"

#include <stdlib.h>

enum { OP_TYPE_IMAGE = 25, OP_TYPE_SAMPLED_IMAGE = 27, DIM_BUFFER = 5 };
enum { OP_TYPE_INT = 21, OP_TYPE_FLOAT = 22, OP_TYPE_VECTOR = 23, OP_TYPE_ARRAY = 28, OP_TYPE_STRUCT = 30, OP_TYPE_POINTER = 32 };
enum { OP_CONSTANT = 43, OP_VARIABLE = 59, OP_DECORATE = 71, OP_MEMBER_DECORATE = 72 };
enum { DECORATION_BINDING = 33, DECORATION_SET = 34, DECORATION_OFFSET = 35, DECORATION_ARRAY_STRIDE = 6 };
enum { STORAGE_PUSH_CONSTANT = 9 };

// One result id: what is known of it. `at` is the word of its instruction.
struct id_info {
    uint32_t at, stride, binding, last_offset, last_member;
    bool has_binding, wrong_set;
};

static uint32_t op_of(const uint32_t *code, const struct id_info *ids, uint32_t id)
{
    return ids[id].at ? code[ids[id].at] & 0xffff : 0;
}

// Size in bytes of a scalar, vector or array; 0 for anything else.
static uint32_t size_of(const uint32_t *code, const struct id_info *ids, uint32_t bound, uint32_t type)
{
    uint32_t factor = 1;
    for (int depth = 0; depth < 4 && type < bound; ++depth) {
        const uint32_t *w = code + ids[type].at;
        switch (op_of(code, ids, type)) {
        case OP_TYPE_INT:
        case OP_TYPE_FLOAT:
            return factor * (w[2] / 8);
        case OP_TYPE_VECTOR:
            factor *= w[3];
            type = w[2];
            break;
        case OP_TYPE_ARRAY:
            return w[3] < bound && op_of(code, ids, w[3]) == OP_CONSTANT ? ids[type].stride * code[ids[w[3]].at + 3] : 0;
        default:
            return 0;
        }
    }
    return 0;
}

static void decorate(struct id_info *i, uint32_t decoration, uint32_t value)
{
    if (decoration == DECORATION_BINDING) {
        i->binding = value;
        i->has_binding = true;
    } else if (decoration == DECORATION_SET) {
        i->wrong_set = value != 0;
    } else if (decoration == DECORATION_ARRAY_STRIDE) {
        i->stride = value;
    }
}

// Notes one instruction of `n` words. False where it cannot be right.
static bool visit(const uint32_t *code, uint32_t at, uint32_t n, struct id_info *ids, uint32_t bound)
{
    const uint32_t *w = code + at, op = w[0] & 0xffff;
    const bool is_type = op == OP_TYPE_INT || op == OP_TYPE_FLOAT || op == OP_TYPE_VECTOR || op == OP_TYPE_ARRAY
        || op == OP_TYPE_STRUCT || op == OP_TYPE_POINTER || op == OP_TYPE_IMAGE || op == OP_TYPE_SAMPLED_IMAGE;
    if (is_type && op != OP_TYPE_STRUCT && n < 3) {
        return false;
    }
    if (op == OP_TYPE_IMAGE && n < 9) {
        return false;
    }
    if ((op == OP_TYPE_VECTOR || op == OP_TYPE_ARRAY || op == OP_TYPE_POINTER || op == OP_CONSTANT || op == OP_VARIABLE) && n < 4) {
        return false;
    }
    const uint32_t id = op == OP_CONSTANT || op == OP_VARIABLE ? w[2] : is_type || op == OP_DECORATE || op == OP_MEMBER_DECORATE ? w[1] : 0;
    if (id >= bound) {
        return false;
    }
    if (is_type || op == OP_CONSTANT || op == OP_VARIABLE) {
        ids[id].at = at;
    } else if (op == OP_DECORATE && n >= 4) {
        decorate(&ids[id], w[2], w[3]);
    } else if (op == OP_MEMBER_DECORATE && n >= 5 && w[3] == DECORATION_OFFSET && w[4] >= ids[id].last_offset) {
        ids[id].last_offset = w[4];
        ids[id].last_member = w[2];
    }
    return true;
}

// Notes whether a bound variable is a texel buffer. False for any other kind of image.
static bool note_texels(struct shader_needs *out, const uint32_t *code, const struct id_info *ids, uint32_t bound, uint32_t id)
{
    const uint32_t pointer = code[ids[id].at + 1], binding = ids[id].binding;
    uint32_t type = pointer < bound && op_of(code, ids, pointer) == OP_TYPE_POINTER ? code[ids[pointer].at + 3] : 0;
    if (type < bound && op_of(code, ids, type) == OP_TYPE_SAMPLED_IMAGE) {
        type = code[ids[type].at + 2];
    }
    if (type >= bound || op_of(code, ids, type) != OP_TYPE_IMAGE) {
        return true;
    }
    const uint32_t *w = code + ids[type].at;
    if (w[3] != DIM_BUFFER || w[7] != 1 || binding >= MAX_TEXEL_BINDS || w[2] >= bound) {
        return false;
    }
    out->texel |= 1u << binding;
    out->texel_float |= (uint32_t)(op_of(code, ids, w[2]) == OP_TYPE_FLOAT) << binding;
    return true;
}

// Adds one variable to what is needed.
static bool add_variable(struct shader_needs *out, const uint32_t *code, const struct id_info *ids, uint32_t bound, uint32_t id)
{
    const uint32_t *w = code + ids[id].at;
    if (ids[id].has_binding) {
        out->bindings = KEEL_MAX(out->bindings, ids[id].binding + 1);
        return !ids[id].wrong_set && ids[id].binding < KEEL_MAX_BINDS && note_texels(out, code, ids, bound, id);
    }
    if (w[3] != STORAGE_PUSH_CONSTANT) {
        return true;
    }
    if (w[1] >= bound || op_of(code, ids, w[1]) != OP_TYPE_POINTER) {
        return false;
    }
    const uint32_t type = code[ids[w[1]].at + 3];
    if (type >= bound || op_of(code, ids, type) != OP_TYPE_STRUCT) {
        return false;
    }
    const uint32_t *s = code + ids[type].at, members = (s[0] >> 16) - 2;
    if (ids[type].last_member >= members) {
        return false;
    }
    out->push_bytes = ids[type].last_offset + size_of(code, ids, bound, s[2 + ids[type].last_member]);
    return out->push_bytes <= KEEL_MAX_PUSH;
}

struct shader_needs keel_reflect(const uint32_t *code, uint32_t words)
{
    struct shader_needs out = {0};
    if (words < 5 || code[0] != 0x07230203 || code[3] > 1u << 22) {
        return out;
    }
    const uint32_t bound = code[3];
    struct id_info *ids = calloc(bound, sizeof(*ids));
    out.ok = ids != NULL;
    for (uint32_t at = 5; at < words && out.ok;) {
        const uint32_t n = code[at] >> 16;
        out.ok = n > 0 && n <= words - at && visit(code, at, n, ids, bound);
        at += n;
    }
    for (uint32_t id = 0; id < bound && out.ok; ++id) {
        if (op_of(code, ids, id) == OP_VARIABLE) {
            out.ok = add_variable(&out, code, ids, bound, id);
        }
    }
    out.ok = out.ok && (out.texel & (out.texel + 1)) == 0; // texels come first: bindings 0, then 1
    free(ids);
    return out;
}
