// SPDX-License-Identifier: MIT
// cli/bench_compare.c: two runs of `keel bench --json` beside each other. Ops are compared by time per token, so the runs may differ in
// length.
#include "bench_compare.h"

#include <stdlib.h>
#include <string.h>

static const json_t *find(const json_t *list, const char *key, const char *name)
{
    size_t i;
    const json_t *o;
    json_array_foreach((json_t *)list, i, o) {
        const char *s = json_string_value(json_object_get(o, key));
        if (s && strcmp(s, name) == 0) {
            return o;
        }
    }
    return NULL;
}

// What bench_compare() relies on.
static bool is_run(const json_t *run)
{
    size_t i, j;
    const json_t *phase, *op, *phases = json_object_get(run, "phases");
    if (!json_is_array(phases)) {
        return false;
    }
    json_array_foreach((json_t *)phases, i, phase) {
        const json_t *ops = json_object_get(phase, "ops");
        if (!json_is_string(json_object_get(phase, "phase")) || !json_is_number(json_object_get(phase, "tokens_per_second"))
            || json_integer_value(json_object_get(phase, "tokens")) < 1 || !json_is_array(ops)) {
            return false;
        }
        json_array_foreach((json_t *)ops, j, op) {
            if (!json_is_string(json_object_get(op, "op")) || !json_is_number(json_object_get(op, "ms"))) {
                return false;
            }
        }
    }
    return true;
}

json_t *bench_saved_load(const char *path, const struct context *c)
{
    json_error_t error;
    char *text = NULL;
    size_t len = 0;
    if (!read_all(path, &text, &len)) {
        return NULL;
    }
    json_t *run = json_loadb(text, len, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!run) {
        say(c, KEEL_LOG_ERROR, "%s:%d: %s; save a run with: keel bench --json > FILE", path, error.line, error.text);
    } else if (!is_run(run)) {
        say(c, KEEL_LOG_ERROR, "%s: not a run of keel bench; save one with: keel bench --json > FILE", path);
        json_decref(run);
        run = NULL;
    }
    return run;
}

static double us_per_token(const json_t *phase, const json_t *op)
{
    return json_number_value(json_object_get(op, "ms")) * 1e3 / (double)json_integer_value(json_object_get(phase, "tokens"));
}

// A number, or null where there is no op.
static json_t *time_or_null(const json_t *phase, const json_t *op)
{
    return op ? json_real(us_per_token(phase, op)) : json_null();
}

static void add_op(json_t *ops, const char *name, const json_t *saved, const json_t *old, const json_t *now, const json_t *new)
{
    const double then = old ? us_per_token(saved, old) : 0, t = new ? us_per_token(now, new) : 0;
    json_array_append_new(ops, json_pack("{s:s, s:o, s:o, s:o}", "op", name, "saved_us_per_token", time_or_null(saved, old),
                                         "us_per_token", time_or_null(now, new), "ratio", then > 0 && t > 0 ? json_real(then / t) : json_null()));
}

static json_t *compare_phase(const json_t *saved, const json_t *now)
{
    size_t i;
    const json_t *op;
    json_t *ops = json_array();
    const json_t *old_ops = json_object_get(saved, "ops"), *new_ops = json_object_get(now, "ops");
    const double then = json_number_value(json_object_get(saved, "tokens_per_second"));
    const double t = json_number_value(json_object_get(now, "tokens_per_second"));
    json_array_foreach((json_t *)new_ops, i, op) {
        const char *name = json_string_value(json_object_get(op, "op"));
        add_op(ops, name, saved, find(old_ops, "op", name), now, op);
    }
    json_array_foreach((json_t *)old_ops, i, op) {
        const char *name = json_string_value(json_object_get(op, "op"));
        if (!find(new_ops, "op", name)) {
            add_op(ops, name, saved, op, now, NULL);
        }
    }
    return json_pack("{s:O, s:f, s:f, s:f, s:o}", "phase", json_object_get(now, "phase"), "saved_tokens_per_second", then,
                     "tokens_per_second", t, "ratio", then > 0 ? t / then : 0.0, "ops", ops);
}

json_t *bench_compare(const json_t *saved, const json_t *now, const struct context *c)
{
    static const char *const same[] = { "device", "driver", "model" };
    size_t i;
    const json_t *phase;
    json_t *out = json_array();
    for (i = 0; i < sizeof same / sizeof same[0]; i++) {
        const char *a = json_string_value(json_object_get(saved, same[i])), *b = json_string_value(json_object_get(now, same[i]));
        if (!a || !b || strcmp(a, b) != 0) {
            say(c, KEEL_LOG_WARN, "the saved run has another %s: %s, now %s", same[i], a ? a : "none", b ? b : "none");
        }
    }
    json_array_foreach((json_t *)json_object_get(now, "phases"), i, phase) {
        const json_t *old = find(json_object_get(saved, "phases"), "phase", json_string_value(json_object_get(phase, "phase")));
        if (old) {
            json_array_append_new(out, compare_phase(old, phase));
        }
    }
    return out;
}

static void print_cell(const json_t *o, const char *key, int width, int digits)
{
    const json_t *v = json_object_get(o, key);
    if (json_is_number(v)) {
        printf(" %*.*f", width, digits, json_number_value(v));
    } else {
        printf(" %*s", width, "-");
    }
}

void bench_compare_print(const json_t *compared, const char *path)
{
    size_t i, j;
    const json_t *phase, *op;
    printf("\nBeside %s (ratio above 1: faster now)\n", path);
    json_array_foreach((json_t *)compared, i, phase) {
        printf("  %-26s", json_string_value(json_object_get(phase, "phase")));
        print_cell(phase, "saved_tokens_per_second", 12, 2);
        print_cell(phase, "tokens_per_second", 12, 2);
        print_cell(phase, "ratio", 7, 2);
        printf("  tokens/s\n");
        json_array_foreach(json_object_get(phase, "ops"), j, op) {
            printf("    %-24s", json_string_value(json_object_get(op, "op")));
            print_cell(op, "saved_us_per_token", 12, 1);
            print_cell(op, "us_per_token", 12, 1);
            print_cell(op, "ratio", 7, 2);
            printf("  us/token\n");
        }
    }
}
