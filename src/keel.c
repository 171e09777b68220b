// SPDX-License-Identifier: MIT
// keel.c: what belongs to the library as a whole.
#include <keel/keel.h>

const char *keel_version(void)
{
    return KEEL_VERSION;
}
