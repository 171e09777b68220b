// SPDX-License-Identifier: MIT
// cli/bench_compare.h: two runs of `keel bench --json` beside each other.
#ifndef KEEL_BENCH_COMPARE_H
#define KEEL_BENCH_COMPARE_H

#include "cli.h"

// Reads a saved run. NULL: said why.
json_t *bench_saved_load(const char *path, const struct context *c);
// [{"phase", "saved_tokens_per_second", "tokens_per_second", "ratio", "ops": [{"op", "saved_us_per_token", "us_per_token", "ratio"}]}] for
// the phases that both have; a ratio above 1 means that `now` is faster. What only one has is null in the other's place.
// Warns where device, driver or model differ. The caller frees it.
json_t *bench_compare(const json_t *saved, const json_t *now, const struct context *c);
void bench_compare_print(const json_t *compared, const char *path);

#endif
