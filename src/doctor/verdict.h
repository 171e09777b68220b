// SPDX-License-Identifier: MIT
// doctor/verdict.h: which variant each family uses on a device, and the file that remembers it.
#ifndef KEEL_DOCTOR_VERDICT_H
#define KEEL_DOCTOR_VERDICT_H

#include "variants.h"

struct verdict {
    enum keel_variant variant[KEEL_N_FAMILIES];
    uint32_t n_base_wrong;
};
// False if there is none for this device, driver, clamp profile and these shaders.
bool verdict_load(struct verdict *v, const keel_device *dev);
void verdict_save(const struct verdict *v, const keel_device *dev); // a file that cannot be written is not worth a word
void verdict_use(const struct verdict *v, keel_device *dev);

#endif
