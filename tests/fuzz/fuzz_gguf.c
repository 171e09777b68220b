// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_gguf.c: any bytes as a GGUF file; what parses is read through every getter, tensors are
// dequantised.
#include "fuzz.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    keel_gguf *g;
    if (keel_gguf_parse(&g, data, len, "fuzz", &fuzz_silent) != KEEL_OK) {
        return 0;
    }
    for (size_t i = 0; i < keel_gguf_key_count(g); i++) {
        const char *key = keel_gguf_key_at(g, i, NULL);
        struct keel_gguf_array a;
        uint64_t u;
        int64_t s;
        double d;
        bool b;
        size_t n;
        const char *str = keel_gguf_str(g, key, &n);
        fuzz_use(str, str ? n : 0);
        keel_gguf_u64(g, key, &u);
        keel_gguf_i64(g, key, &s);
        keel_gguf_f64(g, key, &d);
        keel_gguf_bool(g, key, &b);
        for (uint64_t k = 0; keel_gguf_array(g, key, &a) && k < a.n; k++) {
            if (a.type == KEEL_GGUF_STR) {
                str = keel_gguf_array_str(&a, k, &n);
                fuzz_use(str, n);
            } else if (keel_gguf_type_is_float(a.type)) {
                d = keel_gguf_array_num(&a, k);
            } else {
                s = keel_gguf_array_int(&a, k);
            }
        }
    }
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const struct keel_gguf_tensor *t = keel_gguf_tensor_at(g, i);
        float *y = malloc(t->n_elems * sizeof *y);
        if (y) {
            keel_dequantize(t->type, t->data, y, t->n_elems);
        }
        free(y);
    }
    keel_gguf_destroy(&g);
    return 0;
}
