// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_jsonl.c: any bytes as a JSONL file; every row's fields are asked for.
#include "fuzz.h"

#include <jansson.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct keel_jsonl r = keel_jsonl_make(data, len, "fuzz", &fuzz_silent);
    struct keel_row row;
    while (keel_jsonl_next(&r, &row) == KEEL_OK && row.object) {
        const char *s;
        size_t n;
        double d;
        int64_t i;
        bool b;
        json_t *a;
        if (keel_row_str(&row, "prompt", &s, &n) == KEEL_OK) {
            fuzz_use(s, n);
        }
        keel_row_opt_num(&row, "n", &d);
        keel_row_opt_int(&row, "n", &i);
        keel_row_opt_bool(&row, "eos", &b);
        keel_row_opt_array(&row, "messages", &a);
        json_decref(row.object);
    }
    return 0;
}
