// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_safetensors.c: any bytes as a safetensors file; what parses is converted to f32.
#include "fuzz.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    keel_st *s;
    if (keel_st_parse(&s, data, len, "fuzz", &fuzz_silent) != KEEL_OK) {
        return 0;
    }
    for (size_t i = 0; i < keel_st_count(s); i++) {
        const struct keel_st_tensor *t = keel_st_at(s, i);
        float *y = malloc(t->n_elems * sizeof *y);
        if (y) {
            keel_st_to_f32(t, y);
        }
        free(y);
        KEEL_ASSERT(keel_st_find(s, t->name) == t);
    }
    keel_st_meta(s, "format");
    keel_st_destroy(&s);
    return 0;
}
