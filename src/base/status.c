// SPDX-License-Identifier: MIT
// base/status.c: names of statuses.
#include "base.h"

#include <stdio.h>
#include <stdlib.h>

const char *keel_status_text(keel_status status)
{
    switch (status) {
    case KEEL_OK:
        return "ok";
    case KEEL_ERR_ARG:
        return "invalid argument";
    case KEEL_ERR_IO:
        return "input or output failed";
    case KEEL_ERR_FORMAT:
        return "malformed file";
    case KEEL_ERR_UNSUPPORTED:
        return "unsupported";
    case KEEL_ERR_MISMATCH:
        return "things do not belong together";
    case KEEL_ERR_DATA:
        return "unusable data";
    case KEEL_ERR_NO_MEMORY:
        return "out of memory";
    case KEEL_ERR_NO_DEVICE:
        return "no usable device";
    case KEEL_ERR_DEVICE:
        return "driver error";
    case KEEL_ERR_DEVICE_LOST:
        return "device lost";
    case KEEL_ERR_NUMERIC:
        return "not a finite number";
    case KEEL_INTERRUPTED:
        return "interrupted";
    case KEEL_OVER_BUDGET:
        return "drift budget exceeded";
    }
    return "unknown status";
}

_Noreturn void keel_assert_failed(const char *cond, const char *file, int line)
{
    fprintf(stderr, "keel: broken promise: %s (%s:%d); please report this\n", cond, file, line);
    abort();
}
