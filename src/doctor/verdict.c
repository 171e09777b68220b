// SPDX-License-Identifier: MIT
// doctor/verdict.c: see verdict.h. One line of text: "keel-verdict 1 HASH WRONG" and "FAMILY=VARIANT" for each family.
#include "verdict.h"

#include "platform.h"
#include "shaders.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

// Of the code of every shader: a verdict on other shaders says nothing.
static uint64_t shaders_hash(void)
{
    uint64_t h = KEEL_HASH_INIT;
    for (const struct keel_shader *const *s = keel_sh_all; *s; s++) {
        h = keel_hash(h, (*s)->code, (size_t)(*s)->code_words * 4);
    }
    return h;
}

bool verdict_load(struct verdict *v, const keel_device *dev)
{
    char path[4096], word[64];
    uint64_t hash = 0;
    FILE *f = keel_device_cache_path(dev, "verdict", path, sizeof path) ? fopen(path, "r") : NULL;
    if (!f) {
        return false;
    }
    bool ok = fscanf(f, "keel-verdict 1 %" SCNx64 " %" SCNu32, &hash, &v->n_base_wrong) == 2 && hash == shaders_hash();
    for (uint32_t i = 0; ok && i < KEEL_N_FAMILIES; i++) {
        ok = fscanf(f, " %63s", word) == 1;
        char *equals = ok ? strchr(word, '=') : NULL;
        if (equals) {
            *equals = '\0';
        }
        ok = equals && strcmp(word, keel_family_name((enum keel_family)i)) == 0 && keel_variant_parse(equals + 1, &v->variant[i])
             && keel_variant_supported(keel_device_caps(dev), (enum keel_family)i, v->variant[i]);
    }
    (void)fclose(f);
    return ok;
}

void verdict_save(const struct verdict *v, const keel_device *dev)
{
    const keel_log quiet = { .level = (enum keel_log_level)0 };
    struct keel_file_out file = { 0 };
    char path[4096];
    if (!keel_device_cache_path(dev, "verdict", path, sizeof path) || keel_file_create(&file, path, &quiet) != KEEL_OK) {
        return;
    }
    fprintf(file.f, "keel-verdict 1 %016" PRIx64 " %" PRIu32, shaders_hash(), v->n_base_wrong);
    for (uint32_t i = 0; i < KEEL_N_FAMILIES; i++) {
        fprintf(file.f, " %s=%s", keel_family_name((enum keel_family)i), keel_variant_name(v->variant[i]));
    }
    fputc('\n', file.f);
    (void)keel_file_commit(&file, &quiet);
}

void verdict_use(const struct verdict *v, keel_device *dev)
{
    for (uint32_t i = 0; i < KEEL_N_FAMILIES; i++) {
        (void)keel_variant_set(dev, (enum keel_family)i, v->variant[i]);
    }
}
