// SPDX-License-Identifier: MIT
// ops/variants.h: the registry of kernel variants: which exist, what a device must offer for each, which one an op uses.
//
// Every family has a base variant that runs on any device. An op asks keel_variant_of() each time it records; a shape that the
// chosen variant does not serve (the comments of the enum say which) takes the base variant. `keel doctor` walks the registry,
// checks each supported variant against the CPU reference, times it and sets its verdict with keel_variant_set().
#ifndef KEEL_VARIANTS_H
#define KEEL_VARIANTS_H

#include "device.h"

// Ops that are chosen for together.
enum keel_family {
    KEEL_FAMILY_MATVEC,     // keel_linear() on fewer than KEEL_MATMUL_TOKENS tokens
    KEEL_FAMILY_MATMUL,     // keel_linear() on more
    KEEL_FAMILY_MATMUL_BWD, // keel_linear_bwd()
    KEEL_FAMILY_LORA,       // keel_lora_*()
    KEEL_FAMILY_ATTENTION,  // keel_attention(), keel_attention_bwd()
    KEEL_FAMILY_PATCHES,    // keel_attention() where every token sees every key
    KEEL_N_FAMILIES
};
#define KEEL_MATMUL_TOKENS 8u

enum keel_variant {
    KEEL_VARIANT_BASE,     // u32 and f32, no subgroup operation
    KEEL_VARIANT_EXCHANGE, // lanes hand values to each other and read texels. Linear: K (backward: N) a multiple of 4
    KEEL_VARIANT_COOP,     // cooperative matrices of pairs of f16, as good as f32. Products of many tokens with weights, both ways
    KEEL_VARIANT_COOP16,   // the same of single f16: a third of the products
    KEEL_VARIANT_DOT,      // x in 8 bits, integer dot products. Q8_0 and Q4_0, one token, where shared memory holds x
    KEEL_N_VARIANTS
};

const char *keel_family_name(enum keel_family f);   // "matvec"; static storage
const char *keel_variant_name(enum keel_variant v); // "exchange"; static storage
// False if the name is unknown.
bool keel_variant_parse(const char *name, enum keel_variant *out);
// Whether keel has this variant of the family and the device's capabilities allow it. Base always.
bool keel_variant_supported(const struct keel_caps *caps, enum keel_family f, enum keel_variant v);
// Whether the variant computes as well as f32 does, so that evaluation may use it unasked (design 7; docs/numerics.md).
bool keel_variant_exact(enum keel_variant v);
// Whether the device makes up in software what the variant uses, so that it cannot pay: cooperative matrices of a CPU driver,
// integer dot products without an instruction.
bool keel_variant_emulated(const struct keel_caps *caps, enum keel_variant v);
// Whether the build's compiler was too old to make the shaders of a variant that the device could use.
bool keel_variant_missing(const struct keel_caps *caps);
// What it may add to the error of a product of two numbers, in parts of that product, beyond f32's rounding; dot: in parts
// of the weight times the largest number of its 32 columns.
double keel_variant_rounding(enum keel_variant v);

// What an op of the family uses on this device: what was set, else exchange where caps.exchange says that it pays, else base.
enum keel_variant keel_variant_of(const keel_device *dev, enum keel_family f);
// Sets it from now on; lists that are recorded already keep theirs. False, and no change, if it is not supported.
bool keel_variant_set(keel_device *dev, enum keel_family f, enum keel_variant v);
// Back to the default.
void keel_variant_unset(keel_device *dev, enum keel_family f);

#endif
