// SPDX-License-Identifier: MIT
// device/fault.c: failures on purpose, for the tests of what keel does about broken drivers. Without `fault` in the parameters of the
// device nothing here has an effect.
#include "internal.h"

#include <stdlib.h>
#include <string.h>

static const char *const kinds[] = {[FAULT_COMPILE] = "compile", [FAULT_SKIP] = "skip", [FAULT_LOST] = "lost", [FAULT_DROP] = "drop",
                                    [FAULT_DIRTY] = "dirty"};

keel_status keel_fault_init(keel_device *dev, const char *text)
{
    struct fault *f = &dev->fault;
    const char *colon = text ? strchr(text, ':') : NULL;
    *f = (struct fault){.kind = FAULT_NONE};
    for (enum fault_kind k = FAULT_COMPILE; colon && k <= FAULT_DIRTY; ++k) {
        const size_t n = strlen(kinds[k]);
        if ((size_t)(colon - text) == n && strncmp(text, kinds[k], n) == 0 && strlen(colon + 1) < sizeof(f->shader)) {
            f->kind = k;
            strcpy(f->shader, colon + 1);
            f->number = strtoull(colon + 1, NULL, 10);
        }
    }
    dev->no_cache = dev->no_cache || f->kind == FAULT_COMPILE || f->kind == FAULT_SKIP; // what these teach is not true
    if (text && text[0] && f->kind == FAULT_NONE) {
        KEEL_ERROR(dev->log, "fault \"%s\": there are compile:SHADER, skip:SHADER, lost:SUBMISSION, drop:SUBMISSION and dirty:BYTE", text);
        return KEEL_ERR_ARG;
    }
    return KEEL_OK;
}

bool keel_fault_shader(const keel_device *dev, enum fault_kind kind, const char *shader)
{
    return dev->fault.kind == kind && strstr(shader, dev->fault.shader);
}

bool keel_fault_submission(const keel_device *dev, enum fault_kind kind)
{
    return dev->fault.kind == kind && dev->n_submits == dev->fault.number;
}

void keel_fault_memory(const keel_device *dev, void *host, uint64_t bytes)
{
    if (dev->fault.kind == FAULT_DIRTY) {
        memset(host, (int)(dev->fault.number & 255u), (size_t)bytes);
    }
}
