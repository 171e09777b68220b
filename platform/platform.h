// SPDX-License-Identifier: MIT
// platform/platform.h: the whole contract with the operating system. Porting keel means one more file beside posix.c.
#ifndef KEEL_PLATFORM_H
#define KEEL_PLATFORM_H

#include "base.h"

#include <stdio.h>

// A read-only file map. All-zero is "not mapped".
struct keel_map {
    const uint8_t *data;
    size_t len_bytes;
};
// Maps a whole regular file. Errors (logged with the path): IO when missing, unreadable, a directory or empty.
keel_status keel_map_open(struct keel_map *out, const char *path, const keel_log *log);
void keel_map_close(struct keel_map *map); // accepts all-zero
// Says that the bytes will not be read again soon, so that the system may drop the pages. A hint; never fails.
void keel_map_done_with(const struct keel_map *map, size_t offset, size_t len);

// A file that appears under its final name only when it is complete: written as PATH.tmp-PID beside it, fsynced, renamed.
// Whatever happens before the commit, an older file under that name stays as it was. Creating it again removes what a killed
// process left.
struct keel_file_out {
    FILE *f; // write with stdio; errors are found at commit
    char *path, *tmp;
};
keel_status keel_file_create(struct keel_file_out *out, const char *path, const keel_log *log);
keel_status keel_file_commit(struct keel_file_out *out, const keel_log *log); // closes in every case
void keel_file_abort(struct keel_file_out *out);                              // closes and removes; accepts all-zero

// Creates the folder and its parents; fine if it exists. Errors: IO.
keel_status keel_make_dirs(const char *path, const keel_log *log);
bool keel_path_exists(const char *path);
bool keel_path_is_dir(const char *path);
// Size and time of the last change in nanoseconds; false, and both untouched, if there is no such file.
bool keel_path_stamp(const char *path, uint64_t *bytes, uint64_t *changed_ns);
// Says that a file was of use just now, which keel_folder_trim() looks at. A hint; never fails.
void keel_path_touch(const char *path);
// Removes files of a folder whose names end in `suffix`, the longest unused first, until the others take at most `keep_bytes`,
// and what killed processes left of such files. Returns what the others take. Files that come or go meanwhile are no error, so
// several processes may trim one folder.
uint64_t keel_folder_trim(const char *folder, const char *suffix, uint64_t keep_bytes);
// XDG cache folder for keel, created on first use ("$XDG_CACHE_HOME/keel" or "$HOME/.cache/keel"). False if there is none.
bool keel_cache_dir(char *out, size_t out_bytes);
// Value of an environment variable or NULL. The only getenv outside src/cli.
const char *keel_env(const char *name);

uint64_t keel_now_ns(void);          // monotonic
uint64_t keel_unix_time(void);       // seconds since 1970, for manifests
uint64_t keel_ram_bytes(void);       // physical memory of the machine, 0 if unknown
uint64_t keel_ram_free_bytes(void);  // memory available without swapping, 0 if unknown
uint64_t keel_peak_rss_bytes(void);  // highest resident set of this process so far, 0 if unknown
uint32_t keel_cpu_count(void);       // at least 1

// Runs `job(user, i)` for every i in [0, n) on up to `keel_cpu_count()` threads; returns when all are done.
void keel_parallel_for(uint32_t n, void (*job)(void *user, uint32_t i), void *user);

bool keel_interrupted(void); // keel_interrupt() was called (keel/status.h)

// Runs a program found in PATH with `argv` (NULL-terminated), stdin closed, stdout and stderr discarded. Returns its exit
// code, or -1 if it could not be started.
int keel_run_program(char *const argv[]);

#endif
