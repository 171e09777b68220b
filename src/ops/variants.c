// SPDX-License-Identifier: MIT
// ops/variants.c: the registry of kernel variants.
#include "variants.h"

#include "shaders.h"

#include <assert.h>
#include <string.h>

static_assert(KEEL_N_FAMILIES <= KEEL_MAX_CHOICES, "device.h");

#define FAMILY(f) (1u << KEEL_FAMILY_##f)

static bool can_exchange(const struct keel_caps *c)
{
    return c->exchange;
}

static bool can_dot(const struct keel_caps *c)
{
    return c->int_dot;
}

static bool can_coop(const struct keel_caps *c)
{
    return c->coop.m > 0 && !keel_variant_missing(c);
}

// A sum of two f16 holds a number within 2^-23 of itself, and the product of the lesser parts, which is left out, is below 2^-24; one
// f16 holds it within 2^-11, and 8 bits within half of 1/127 of the largest.
static const struct {
    const char *name;
    uint32_t families; // bits: where it exists
    double rounding; // keel_variant_rounding()
    bool (*can)(const struct keel_caps *c); // NULL: every device
} variants[KEEL_N_VARIANTS] = {
    [KEEL_VARIANT_BASE] = { "base", UINT32_MAX, 0, NULL },
    [KEEL_VARIANT_EXCHANGE] = { "exchange", FAMILY(MATVEC) | FAMILY(MATMUL) | FAMILY(MATMUL_BWD) | FAMILY(LORA) | FAMILY(ATTENTION)
                                | FAMILY(PATCHES), 0, can_exchange },
    [KEEL_VARIANT_COOP] = { "coop", FAMILY(MATMUL) | FAMILY(MATMUL_BWD), 0x1.4p-22, can_coop },
    [KEEL_VARIANT_COOP16] = { "coop16", FAMILY(MATMUL) | FAMILY(MATMUL_BWD), 0x1.1p-10, can_coop },
    [KEEL_VARIANT_DOT] = { "dot", FAMILY(MATVEC), 1.01 / 254, can_dot },
};

const char *keel_family_name(enum keel_family f)
{
    static const char *const names[KEEL_N_FAMILIES] = {
        [KEEL_FAMILY_MATVEC] = "matvec", [KEEL_FAMILY_MATMUL] = "matmul", [KEEL_FAMILY_MATMUL_BWD] = "matmul_bwd",
        [KEEL_FAMILY_LORA] = "lora", [KEEL_FAMILY_ATTENTION] = "attention", [KEEL_FAMILY_PATCHES] = "patches",
    };
    return names[f];
}

const char *keel_variant_name(enum keel_variant v)
{
    return variants[v].name;
}

bool keel_variant_parse(const char *name, enum keel_variant *out)
{
    for (uint32_t v = 0; v < KEEL_N_VARIANTS; v++) {
        if (strcmp(variants[v].name, name) == 0) {
            *out = (enum keel_variant)v;
            return true;
        }
    }
    return false;
}

bool keel_variant_supported(const struct keel_caps *caps, enum keel_family f, enum keel_variant v)
{
    return (variants[v].families >> f & 1u) && (!variants[v].can || variants[v].can(caps));
}

bool keel_variant_exact(enum keel_variant v)
{
    return variants[v].rounding < 0x1p-20;
}

bool keel_variant_emulated(const struct keel_caps *caps, enum keel_variant v)
{
    return (variants[v].can == can_coop && strcmp(caps->kind, "cpu") == 0) || (variants[v].can == can_dot && !caps->int_dot_fast);
}

bool keel_variant_missing(const struct keel_caps *caps)
{
    return caps->coop.m > 0 && keel_sh_linear_coop_fwd_Q4_0.code_words == 0;
}

double keel_variant_rounding(enum keel_variant v)
{
    return variants[v].rounding;
}

// Choices are kept by the device, which knows nothing of their meaning: 0 is none, else the variant plus one.
enum keel_variant keel_variant_of(const keel_device *dev, enum keel_family f)
{
    const uint8_t choice = keel_device_choice(dev, f);
    if (choice > 0) {
        return (enum keel_variant)(choice - 1);
    }
    return keel_variant_supported(keel_device_caps(dev), f, KEEL_VARIANT_EXCHANGE) ? KEEL_VARIANT_EXCHANGE : KEEL_VARIANT_BASE;
}

bool keel_variant_set(keel_device *dev, enum keel_family f, enum keel_variant v)
{
    if (!keel_variant_supported(keel_device_caps(dev), f, v)) {
        return false;
    }
    keel_device_choose(dev, f, (uint8_t)(v + 1));
    return true;
}

void keel_variant_unset(keel_device *dev, enum keel_family f)
{
    keel_device_choose(dev, f, 0);
}
