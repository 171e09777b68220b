// SPDX-License-Identifier: MIT
// device/estimate.c: how long work will take, so that submissions can be cut short. Kernels reach very different parts of the
// device's peak, so the model holds a factor for each kind of work and corrects it by what whole submissions took.
#include "internal.h"

#include <math.h>
#include <string.h>

#define DISPATCH_NS 5e3 // a dispatch that does nothing
#define UNKNOWN 2.0     // slowness of a kind that never ran: rather two short submissions than one that a watchdog ends
#define SHORT_NS 2e6    // below it a submission is mostly the cost of starting it

void keel_cost_init(struct cost_model *m, double gflops, double gbps)
{
    // Kernels reach about an eighth of the arithmetic peak and half of the bandwidth (portability.md 3.1). Without peaks, what a
    // slow board reaches.
    m->flops = gflops > 0.0 ? fmax(gflops * 1e9 / 8.0, 1e8) : 2e9;
    m->bytes = gbps > 0.0 ? fmax(gbps * 1e9 / 2.0, 1e8) : 4e9;
    (void)keel_cost_find(m, "other", 0, 0);
    for (uint32_t i = 0; i < m->n; ++i) {
        m->of[i].slow = UNKNOWN;
    }
}

uint32_t keel_cost_find(struct cost_model *m, const char *label, uint64_t flops, uint64_t bytes)
{
    const bool arithmetic = (double)flops / m->flops > (double)bytes / m->bytes;
    for (uint32_t i = 0; i < m->n; ++i) {
        if (m->of[i].arithmetic == arithmetic && (m->of[i].label == label || strcmp(m->of[i].label, label) == 0)) {
            return i;
        }
    }
    if (m->n == MAX_COSTS) {
        return 0;
    }
    m->of[m->n].label = label;
    m->of[m->n].arithmetic = arithmetic;
    m->of[m->n].slow = UNKNOWN;
    return m->n++;
}

double keel_cost_ns(const struct cost_model *m, uint32_t kind, uint64_t flops, uint64_t bytes)
{
    return m->of[kind].slow * ((double)flops / m->flops * 1e9 + (double)bytes / m->bytes * 1e9 + DISPATCH_NS);
}

// Slower at once, because a watchdog may wait; faster by and by. Each kind moves by its share of what was expected: those that
// fill submissions are learnt soon, and the others matter little.
void keel_cost_learn(struct cost_model *m, const double *est_ns, uint32_t n, double ns)
{
    double est = 0.0;
    for (uint32_t i = 0; i < n; ++i) {
        est += est_ns[i];
    }
    if (est <= 0.0 || (est < SHORT_NS && ns < SHORT_NS)) {
        return;
    }
    const double ratio = fmax(ns, 1.0) / est;
    const double step = log(ratio > 1.0 ? fmin(ratio, 4.0) : fmax(1.0 / (1.0 + (1.0 / ratio - 1.0) / 4.0), 0.5));
    for (uint32_t i = 0; i < n; ++i) {
        m->of[i].slow = fmin(fmax(m->of[i].slow * exp(step * est_ns[i] / est), 1e-4), 1e4);
    }
}
