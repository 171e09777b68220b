// SPDX-License-Identifier: MIT
// tests/fuzz/fuzz_study.c: any bytes as a study file.
#include "fuzz.h"

#include "study_file.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct study_file *f;
    if (len > 0 && keel_study_parse(&f, data, len, "fuzz", &fuzz_silent) == KEEL_OK) {
        fuzz_use(f->name, strlen(f->name));
        for (unsigned i = 0; i < f->train.data_count; i++) {
            fuzz_use(f->train.data[i].file, strlen(f->train.data[i].file));
        }
        keel_study_free(&f);
    }
    return 0;
}
