// SPDX-License-Identifier: MIT
// ops/variants.c: the registry of kernel variants.
#include "variants.h"

#include <assert.h>
#include <string.h>

static_assert(KEEL_N_FAMILIES <= KEEL_MAX_CHOICES, "device.h");

#define FAMILY(f) (1u << KEEL_FAMILY_##f)

static bool can_exchange(const struct keel_caps *c)
{
    return c->exchange;
}

static const struct {
    const char *name;
    uint32_t families; // bits: where it exists
    bool exact;
    bool (*can)(const struct keel_caps *c); // NULL: every device
} variants[KEEL_N_VARIANTS] = {
    [KEEL_VARIANT_BASE] = { "base", UINT32_MAX, true, NULL },
    [KEEL_VARIANT_EXCHANGE] = { "exchange", FAMILY(MATVEC) | FAMILY(MATMUL) | FAMILY(MATMUL_BWD) | FAMILY(LORA) | FAMILY(ATTENTION),
                                true, can_exchange },
};

const char *keel_family_name(enum keel_family f)
{
    static const char *const names[KEEL_N_FAMILIES] = {
        [KEEL_FAMILY_MATVEC] = "matvec", [KEEL_FAMILY_MATMUL] = "matmul", [KEEL_FAMILY_MATMUL_BWD] = "matmul_bwd",
        [KEEL_FAMILY_LORA] = "lora", [KEEL_FAMILY_ATTENTION] = "attention",
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
    return variants[v].exact;
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
