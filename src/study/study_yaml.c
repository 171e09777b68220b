// SPDX-License-Identifier: MIT
// study/study_yaml.c: the schema of study files, loading through libcyaml, and messages that name line and key.
#include "study_yaml.h"

#include <cyaml/cyaml.h>

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define MAX_BYTES (1u << 20) // a study file is a page of text

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
static const cyaml_schema_value_t count_entry = { CYAML_VALUE_UINT(CYAML_FLAG_DEFAULT, uint64_t) };
static const cyaml_schema_value_t real_entry = { CYAML_VALUE_FLOAT(CYAML_FLAG_DEFAULT, double) };
static const cyaml_schema_value_t text_entry = { CYAML_VALUE_STRING(CYAML_FLAG_POINTER, char, 1, 4000) };
static const cyaml_schema_field_t train_fields[] = {
    CYAML_FIELD_SEQUENCE("data", OPT, struct yaml_train, data, &data_entry, 1, STUDY_MAX_DATA),
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
    TEXT(OPT, yaml_train, layers),
    TEXT(OPT, yaml_train, kl_data),
    REAL(yaml_train, kl_weight),
    COUNT(yaml_train, kl_rows),
    CYAML_FIELD_SEQUENCE("constrain", OPT, struct yaml_train, constrain, &real_entry, 3, 3),
    TEXT(OPT, yaml_train, lisa_data),
    CYAML_FIELD_SEQUENCE("lisa_steps", OPT, struct yaml_train, lisa_steps, &count_entry, 2, 2),
    REAL(yaml_train, lisa_rho),
    TEXT(OPT, yaml_train, monitor),
    TEXT(OPT, yaml_train, monitor_direction),
    COUNT(yaml_train, monitor_every),
    CYAML_FIELD_SEQUENCE("guard", OPT, struct yaml_train, guard, &text_entry, 1, STUDY_MAX_GUARDS),
    CYAML_FIELD_SEQUENCE("steer", OPT, struct yaml_train, steer, &text_entry, 1, STUDY_MAX_VALUES),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t projection_fields[] = {
    TEXT(PTR, yaml_projection, directions), COUNT(yaml_projection, layer), TEXT(OPT, yaml_projection, at), CYAML_FIELD_END
};
static const cyaml_schema_field_t eval_fields[] = {
    TEXT(OPT, yaml_eval, margin),
    TEXT(OPT, yaml_eval, narrow),
    TEXT(OPT, yaml_eval, kl),
    TEXT(OPT, yaml_eval, slots),
    TEXT(OPT, yaml_eval, prompts),
    TEXT(OPT, yaml_eval, kv),
    COUNT(yaml_eval, answer_tokens),
    COUNT(yaml_eval, examples),
    COUNT(yaml_eval, context_rows),
    COUNT(yaml_eval, context_probes),
    CYAML_FIELD_MAPPING_PTR("projection", CYAML_FLAG_OPTIONAL, struct yaml_eval, projection, projection_fields),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t sweep_fields[] = {
    CYAML_FIELD_SEQUENCE("rank", OPT, struct yaml_sweep, rank, &count_entry, 1, STUDY_MAX_VALUES),
    CYAML_FIELD_SEQUENCE("mixture", OPT, struct yaml_sweep, mixture, &real_entry, 1, STUDY_MAX_VALUES),
    CYAML_FIELD_SEQUENCE("seed", OPT, struct yaml_sweep, seed, &count_entry, 1, STUDY_MAX_SEEDS),
    TEXT(OPT, yaml_sweep, combine),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t watch_fields[] = {
    COUNT(yaml_watch, every),
    COUNT(yaml_watch, probes),
    REAL(yaml_watch, above),
    REAL(yaml_watch, below),
    TEXT(OPT, yaml_watch, domain),
    TEXT(OPT, yaml_watch, modality),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t stage_fields[] = {
    TEXT(PTR, yaml_stage, name),
    TEXT(OPT, yaml_stage, from),
    TEXT(OPT, yaml_stage, adapter),
    CYAML_FIELD_MAPPING_PTR("train", CYAML_FLAG_OPTIONAL, struct yaml_stage, train, train_fields),
    CYAML_FIELD_MAPPING_PTR("watch", CYAML_FLAG_OPTIONAL, struct yaml_stage, watch, watch_fields),
    CYAML_FIELD_SEQUENCE("steer", OPT, struct yaml_stage, steer, &text_entry, 1, STUDY_MAX_VALUES),
    CYAML_FIELD_SEQUENCE("coef", OPT, struct yaml_stage, coef, &real_entry, 1, STUDY_MAX_VALUES),
    TEXT(OPT, yaml_stage, layers),
    COUNT(yaml_stage, probes),
    CYAML_FIELD_BOOL_PTR("percent", OPT, struct yaml_stage, percent),
    CYAML_FIELD_SEQUENCE("scale", OPT, struct yaml_stage, scale, &real_entry, 1, STUDY_MAX_VALUES),
    CYAML_FIELD_END,
};
static const cyaml_schema_field_t direction_fields[] = {
    TEXT(PTR, yaml_direction, name),
    TEXT(OPT, yaml_direction, rows),
    TEXT(OPT, yaml_direction, positive),
    TEXT(OPT, yaml_direction, negative),
    TEXT(OPT, yaml_direction, layers),
    TEXT(OPT, yaml_direction, at),
    TEXT(OPT, yaml_direction, method),
    TEXT(OPT, yaml_direction, random_like),
    TEXT(OPT, yaml_direction, shift),
    COUNT(yaml_direction, answers),
    COUNT(yaml_direction, samples),
    CYAML_FIELD_END,
};
static const cyaml_schema_value_t direction_entry = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, struct yaml_direction, direction_fields),
};
static const cyaml_schema_value_t stage_entry = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, struct yaml_stage, stage_fields),
};
static const cyaml_schema_field_t budget_fields[] = {
    REAL(yaml_budget, kl_mean), REAL(yaml_budget, margin_drop), REAL(yaml_budget, flip_rate), CYAML_FIELD_END
};
static const cyaml_schema_field_t top_fields[] = {
    TEXT(PTR, yaml_study, name),
    TEXT(OPT, yaml_study, model),
    TEXT(OPT, yaml_study, type),
    TEXT(OPT, yaml_study, mmproj),
    CYAML_FIELD_BOOL_PTR("pan_and_scan", OPT, struct yaml_study, pan_and_scan),
    TEXT(OPT, yaml_study, narrow_domain),
    TEXT(OPT, yaml_study, narrow_modality),
    COUNT(yaml_study, seed),
    CYAML_FIELD_MAPPING("train", CYAML_FLAG_DEFAULT, struct yaml_study, train, train_fields),
    CYAML_FIELD_MAPPING("eval", CYAML_FLAG_DEFAULT, struct yaml_study, eval, eval_fields),
    CYAML_FIELD_MAPPING("budget", CYAML_FLAG_OPTIONAL, struct yaml_study, budget, budget_fields),
    CYAML_FIELD_MAPPING("sweep", CYAML_FLAG_OPTIONAL, struct yaml_study, sweep, sweep_fields),
    CYAML_FIELD_SEQUENCE("directions", OPT, struct yaml_study, directions, &direction_entry, 1, STUDY_MAX_DIRECTIONS),
    CYAML_FIELD_SEQUENCE("stages", OPT, struct yaml_study, stages, &stage_entry, 1, STUDY_MAX_STAGES),
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

// Offset behind `key` where it is first given a value at or after `from`, or 0.
static size_t find_key(const struct study_source *src, const char *key, size_t key_len, size_t from)
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
static unsigned line_of(const struct study_source *src, const char *section, const char *key)
{
    const size_t from = src->from || !section[0] ? src->from : find_key(src, section, strcspn(section, ":"), 0);
    const size_t found = find_key(src, key, strlen(key), from), at = found ? found : src->from; // no key: where the entry begins
    unsigned line = 1;
    for (size_t i = 0; i < at; i++) {
        line += src->data[i] == '\n';
    }
    return at ? line : 0;
}

void keel_study_place(char *out, size_t cap, const struct study_source *src, const char *section, const char *key)
{
    snprintf(out, cap, "%s:%u: %s%s%s: ", src->name, KEEL_MAX(line_of(src, section, key), 1u), section, section[0] ? ": " : "", key);
}

keel_status keel_study_complain(const struct study_source *src, const char *section, const char *key, const char *reason)
{
    char place[1024];
    keel_study_place(place, sizeof place, src, section, key);
    KEEL_ERROR(src->log, "%s%s", place, reason);
    return KEEL_ERR_FORMAT;
}

struct study_source keel_study_entry(const struct study_source *src, const char *key, const char *text)
{
    struct study_source at = *src;
    const size_t len = strlen(text), from = find_key(src, key, strlen(key), 0);
    for (size_t i = from; i + len <= src->len; i++) {
        const bool starts = i > 0 && strchr(" \t'\"", src->data[i - 1]), ends = i + len == src->len || strchr(" \t\r\n'\",}#", src->data[i + len]);
        if (starts && ends && memcmp(src->data + i, text, len) == 0) {
            at.from = i;
            return at;
        }
    }
    return at;
}

// --- values --------------------------------------------------------------------------------------

keel_status keel_study_real(const struct study_source *src, const char *section, const char *key, const double *v, double lo, double hi,
                        double *out)
{
    char reason[160];
    if (!v) {
        return KEEL_OK;
    }
    if (!(*v >= lo && *v <= hi)) {
        snprintf(reason, sizeof reason, "%g is out of range, it must lie between %g and %g", *v, lo, hi);
        return keel_study_complain(src, section, key, reason);
    }
    *out = *v;
    return KEEL_OK;
}

keel_status keel_study_count(const struct study_source *src, const char *section, const char *key, const uint64_t *v, uint32_t lo,
                              uint32_t hi, uint32_t *out)
{
    char reason[160];
    if (!v) {
        return KEEL_OK;
    }
    if (*v < lo || *v > hi) {
        snprintf(reason, sizeof reason, "%llu is out of range, it must lie between %u and %u", (unsigned long long)*v, lo, hi);
        return keel_study_complain(src, section, key, reason);
    }
    *out = (uint32_t)*v;
    return KEEL_OK;
}

// --- loading -------------------------------------------------------------------------------------

keel_status keel_study_yaml_load(struct yaml_study **out, const struct study_source *src)
{
    keel_status st = KEEL_OK;
    struct fault fault = { .line = 0 };
    const cyaml_config_t config = config_of(&fault);
    *out = NULL;
    if (src->len > MAX_BYTES || memchr(src->data, 0, src->len)) {
        KEEL_FAIL(src->log, KEEL_ERR_FORMAT, "%s:1: is no study file (it is larger than 1 MiB or holds binary data)", src->name);
    }
    const cyaml_err_t err = cyaml_load_data((const uint8_t *)src->data, src->len, &config, &top, (cyaml_data_t **)out, NULL);
    if (err != CYAML_OK || !*out) {
        static const char unknown[] = "Unexpected key: "; // reported at the place of the mapping, not of the key
        const size_t skip = sizeof unknown - 1;
        const unsigned at = strncmp(fault.reason, unknown, skip) == 0 ? line_of(src, "", fault.reason + skip) : 0;
        fault.line = at ? at : fault.line;
        KEEL_FAIL(src->log, err == CYAML_ERR_OOM ? KEEL_ERR_NO_MEMORY : KEEL_ERR_FORMAT, "%s:%u: %s (%s)", src->name,
                  KEEL_MAX(fault.line, 1u), fault.reason[0] ? fault.reason : err == CYAML_OK ? "the file holds no study" : cyaml_strerror(err),
                  fault.place[0] ? fault.place : "at the top");
    }
out:
    return st;
}

void keel_study_yaml_free(struct yaml_study *y)
{
    struct fault fault = { .line = 0 };
    const cyaml_config_t config = config_of(&fault);
    cyaml_free(&config, &top, y, 0);
}
