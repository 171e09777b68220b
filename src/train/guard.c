// SPDX-License-Identifier: MIT
// train/guard.c: limits on what the monitor measures, and the way back to the last state within them.
#include "platform.h"
#include "run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

keel_status keel_guard_parse(const char *text, struct keel_guard *out, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const char *limit = strstr(text, "<=");
    const size_t len = limit ? (size_t)(limit - text) : strlen(text);
    size_t metric = 0;
    char *end = NULL;
    while (metric < KEEL_N_MONITORED && (strlen(keel_monitor_name[metric]) != len || memcmp(keel_monitor_name[metric], text, len) != 0)) {
        metric++;
    }
    *out = (struct keel_guard){ (enum keel_monitor_metric)metric, limit ? strtod(limit + 2, &end) : 0 };
    if (metric == KEEL_N_MONITORED || !limit || end == limit + 2 || *end != 0 || !isfinite(out->limit)) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "guard \"%s\": METRIC<=NUMBER is needed; metrics are kl_mean, margin_drop, flip_rate, p_contrary, "
                  "p_incoherent, projection_shift", text);
    }
out:
    return st;
}

// The first limit that the last measurement exceeds, or NULL. What could not be measured is not within a limit.
static const struct keel_guard *exceeded(const struct keel_train_run *r)
{
    for (size_t i = 0; i < r->p->n_guard; i++) {
        if (!(r->monitor.value[r->p->guard[i].metric] <= r->p->guard[i].limit)) {
            return &r->p->guard[i];
        }
    }
    return NULL;
}

static void tell(const struct keel_train_run *r, const struct keel_guard *g, const char *what)
{
    KEEL_WARN(r->log, "step %llu: %s is %.4g, above the limit of %.4g: %s", (unsigned long long)r->state.step, keel_monitor_name[g->metric],
              r->monitor.value[g->metric], g->limit, what);
}

keel_status keel_train_guard_start(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    if (r->p->n_guard == 0 || (r->state.step > 0 && keel_path_exists(r->good_path))) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_train_monitor_measure(r));
    const struct keel_guard *g = exceeded(r);
    if (g) {
        KEEL_FAIL(r->log, KEEL_OVER_BUDGET, "step %llu: %s is %.4g, above the limit of %.4g, before this run has trained: there is nothing to "
                  "go back to; raise the limit of --guard or start from another adapter",
                  (unsigned long long)r->state.step, keel_monitor_name[g->metric], r->monitor.value[g->metric], g->limit);
    }
    KEEL_TRY(keel_train_state_save(&r->state, r->good_path));
out:
    return st;
}

keel_status keel_train_guard_check(struct keel_train_run *r)
{
    const struct keel_guard *g = exceeded(r);
    if (r->p->n_guard == 0) {
        return KEEL_OK;
    }
    if (!g) {
        return keel_train_state_save(&r->state, r->good_path);
    }
    r->breached = true;
    r->breach = (struct keel_breach){ *g, r->monitor.value[g->metric], r->state.step };
    if (r->p->on_breach != KEEL_BREACH_ROLLBACK) {
        tell(r, g, r->p->on_breach == KEEL_BREACH_STOP ? "stopped, the adapter is written as it is" : "stopped, no adapter is written");
        return KEEL_OK;
    }
    tell(r, g, "back to the last measurement within the limits");
    return keel_train_state_load(&r->state, r->good_path);
}
