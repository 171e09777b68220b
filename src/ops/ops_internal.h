// SPDX-License-Identifier: MIT
// ops/ops_internal.h: what the ops share: short ways to fill in a dispatch, and splitting by cost.
#ifndef KEEL_OPS_INTERNAL_H
#define KEEL_OPS_INTERNAL_H

#include "ops.h"
#include "shaders.h"
#include "variants.h"

#include <assert.h>
#include <string.h>

#define LANES 64u // local size on a GPU: a multiple of 64 in x only (portability notes 0.3); on a CPU often less, below

#define READ(s) { (s), KEEL_READ }
#define WRITE(s) { (s), KEEL_WRITE }
#define UPDATE(s) { (s), KEEL_READ_WRITE }

static inline bool use_exchange(const keel_recorder *rec, enum keel_family f)
{
    return keel_variant_of(keel_recorder_device(rec), f) == KEEL_VARIANT_EXCHANGE;
}

static inline bool on_cpu(const keel_recorder *rec)
{
    return strcmp(keel_device_caps(keel_recorder_device(rec))->kind, "cpu") == 0;
}

// Local size for a shader that may be launched with less than LANES, where n lanes have work. On a CPU, which works through idle lanes
// too, as few whole subgroups as do it; on a GPU LANES.
static inline uint32_t lanes_for(const keel_recorder *rec, uint32_t n)
{
    const uint32_t unit = on_cpu(rec) ? KEEL_MAX(keel_device_caps(keel_recorder_device(rec))->subgroup_size, 8u) : LANES;
    return KEEL_MIN(keel_div_up(keel_div_up(n, keel_div_up(n, LANES)), unit) * unit, LANES);
}

// Local size of the shaders that sum over a workgroup (shaders/common/reduce.glsl).
static inline uint32_t reduce_lanes(const keel_recorder *rec)
{
    return lanes_for(rec, 1);
}

// The base module or the one that exchanges values between lanes.
#define PICK(rec, family, name) (use_exchange(rec, KEEL_FAMILY_##family) ? &keel_sh_##name##_x : &keel_sh_##name)

// How many of `total` units, each of `flops`, one dispatch of `label` should take: as many as the quantum allows, a multiple
// of `step`, at least `step`.
static inline uint32_t units_per_dispatch(const keel_recorder *rec, const char *label, uint32_t total, uint64_t flops,
                                          uint32_t step)
{
    const uint64_t n = keel_recorder_quantum(rec, label) / KEEL_MAX(flops, UINT64_C(1)) / step * step;
    return (uint32_t)KEEL_MIN(KEEL_MAX(n, (uint64_t)step), (uint64_t)total);
}

// Makes `all` reach over `s` too; what lies between belongs to it as well. Nothing joins anything. False, and no change, if no
// single binding can hold both.
bool span_join(const keel_recorder *rec, struct keel_span *all, struct keel_span s);
// Where `s` begins in `all`, in 32-bit words.
static inline uint32_t span_words(struct keel_span all, struct keel_span s)
{
    return (uint32_t)((s.offset - all.offset) / 4);
}

// A grid of `n` workgroups folded into two dimensions, for shaders that take x + y · gl_NumWorkGroups.x and check the end.
static inline void fold_groups(const keel_recorder *rec, uint64_t n, uint32_t groups[3])
{
    const uint64_t max_x = KEEL_MIN(keel_device_caps(keel_recorder_device(rec))->max_groups, 32768u);
    groups[0] = (uint32_t)KEEL_MIN(n, max_x);
    groups[1] = groups[0] ? (uint32_t)((n + groups[0] - 1) / groups[0]) : 0;
    groups[2] = 1;
}

#endif
