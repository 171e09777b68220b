// SPDX-License-Identifier: MIT
// gemma3/vision_cache.c: soft tokens of images on disk, so that epochs, studies and evaluations compute each image once.
// One file an image and tower: "vision/KEY.tokens" in the cache folder. A file that is damaged or of something else is as good
// as none. Above a size the longest unused go. Processes may share the folder: a file appears complete, or not at all.
#include "vision_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct entry {
    char magic[8];
    uint32_t n_tokens, width;
    uint64_t pixels, tower; // hashes; that of the tower includes the adapters and hooks in force
    uint64_t checksum;      // of the tokens that follow, f32
};
static const char suffix[] = ".tokens";
static const char magic[8] = {'K', 'E', 'E', 'L', 'I', 'M', 'G', '1'};

static struct entry entry_of(const keel_vision *v, uint64_t pixels)
{
    struct entry e = {.n_tokens = v->cfg.n_tokens, .width = v->cfg.out_width, .pixels = pixels, .tower = v->info.hash};
    memcpy(e.magic, magic, sizeof magic);
    if (v->n_adapters > 0) {
        e.tower = keel_hash(e.tower, v->adapter_hash, v->n_adapters * sizeof v->adapter_hash[0]);
    }
    e.tower = keel_hooks_tower_hash(v->hooks, e.tower);
    return e;
}

static bool entry_path(const struct entry *e, bool folder, char *out, size_t n)
{
    char dir[4096];
    if (!keel_cache_dir(dir, sizeof dir)) {
        return false;
    }
    const uint64_t key = keel_hash(KEEL_HASH_INIT, e, offsetof(struct entry, checksum));
    const int len = folder ? snprintf(out, n, "%s/vision", dir) : snprintf(out, n, "%s/vision/%016" PRIx64 "%s", dir, key, suffix);
    return len > 0 && (size_t)len < n;
}

#define DEFAULT_LIMIT (UINT64_C(2) << 30) // 800 images of the 4B

keel_status keel_vision_cache_open(keel_vision *v)
{
    const char *limit = keel_env("KEEL_IMAGE_CACHE");
    v->cache_limit = DEFAULT_LIMIT;
    if (limit && *limit && !keel_parse_size(limit, &v->cache_limit)) {
        KEEL_ERROR(v->log, "KEEL_IMAGE_CACHE=%s: not a size such as 512M or 2.5G; it bounds the images kept on disk, 0 keeps none", limit);
        return KEEL_ERR_ARG;
    }
    return KEEL_OK;
}

// What is left when the limit was passed: less than it, so that not every image costs a look at the folder.
static uint64_t trimmed_bytes(const keel_vision *v)
{
    return v->cache_limit / 10 * 9;
}

// After an entry was written. What other processes write in the meantime is seen when this one trims.
static void trim(keel_vision *v, const char *folder, uint64_t written)
{
    v->cache_bytes = v->cache_bytes > 0 ? v->cache_bytes + written : keel_folder_trim(folder, suffix, UINT64_MAX);
    if (v->cache_bytes > v->cache_limit) {
        v->cache_bytes = keel_folder_trim(folder, suffix, trimmed_bytes(v));
    }
}

bool keel_vision_cache_read(const keel_vision *v, uint64_t pixels, float *tokens)
{
    const keel_log silent = {0};
    struct entry want = entry_of(v, pixels), got;
    const size_t bytes = (size_t)want.n_tokens * want.width * sizeof *tokens;
    struct keel_map map = {0};
    char path[4200];
    if (v->cache_limit == 0 || !entry_path(&want, false, path, sizeof path) || !keel_path_exists(path) || keel_map_open(&map, path, &silent) != KEEL_OK) {
        return false;
    }
    bool ok = map.len_bytes == sizeof got + bytes;
    if (ok) {
        memcpy(&got, map.data, sizeof got);
        want.checksum = keel_hash(KEEL_HASH_INIT, map.data + sizeof got, bytes);
        ok = memcmp(&got, &want, sizeof got) == 0;
    }
    if (ok) {
        memcpy(tokens, map.data + sizeof got, bytes);
        keel_path_touch(path);
    } else {
        KEEL_DEBUG(v->log, "%s: damaged or not of this image; it is computed again", path);
    }
    keel_map_close(&map);
    return ok;
}

void keel_vision_cache_write(keel_vision *v, uint64_t pixels, const float *tokens)
{
    const keel_log silent = {0};
    struct entry e = entry_of(v, pixels);
    const size_t n = (size_t)e.n_tokens * e.width;
    struct keel_file_out f = {0};
    char dir[4200], path[4200];
    if (sizeof e + n * sizeof *tokens > trimmed_bytes(v)) {
        return; // it could not stay
    }
    if (!entry_path(&e, true, dir, sizeof dir) || !entry_path(&e, false, path, sizeof path)) {
        return; // no cache folder on this system
    }
    e.checksum = keel_hash(KEEL_HASH_INIT, tokens, n * sizeof *tokens);
    keel_status st = keel_make_dirs(dir, &silent);
    if (st == KEEL_OK) {
        st = keel_file_create(&f, path, &silent);
    }
    if (st == KEEL_OK) {
        fwrite(&e, sizeof e, 1, f.f);
        fwrite(tokens, sizeof *tokens, n, f.f);
        st = keel_file_commit(&f, &silent);
    }
    if (st == KEEL_OK) {
        trim(v, dir, sizeof e + n * sizeof *tokens);
    }
    if (st != KEEL_OK && !v->cache_warned) {
        KEEL_WARN(v->log, "%s: cannot be written (%s); images will be encoded again in the next run", dir, keel_status_text(st));
        v->cache_warned = true;
    }
}
