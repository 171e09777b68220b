// SPDX-License-Identifier: MIT
// platform/posix.c: files, threads, clock and signals on Linux and other POSIX systems.
#include "platform.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

keel_status keel_map_open(struct keel_map *out, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct stat sb;
    *out = (struct keel_map){ 0 };
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // else a FIFO without a writer waits here for ever
    if (fd < 0) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    }
    if (fstat(fd, &sb) != 0) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot read: %s", path, strerror(errno));
    }
    if (S_ISDIR(sb.st_mode)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: is a folder, a file was expected", path);
    }
    if (!S_ISREG(sb.st_mode)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: is not a regular file", path);
    }
    if (sb.st_size == 0) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: the file is empty", path);
    }
    void *p = mmap(NULL, (size_t)sb.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot map %lld bytes: %s", path, (long long)sb.st_size, strerror(errno));
    }
    *out = (struct keel_map){ .data = p, .len_bytes = (size_t)sb.st_size };
out:
    if (fd >= 0) {
        close(fd);
    }
    return st;
}

void keel_map_close(struct keel_map *map)
{
    if (map->data) {
        munmap((void *)(uintptr_t)map->data, map->len_bytes);
    }
    *map = (struct keel_map){ 0 };
}

void keel_map_done_with(const struct keel_map *map, size_t offset, size_t len)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t from = (offset + page - 1) / page * page; // whole pages only: neighbours may still be read
    const size_t to = (offset + len) / page * page;
    if (map->data && to > from && to <= map->len_bytes) {
        madvise((void *)(uintptr_t)(map->data + from), to - from, MADV_DONTNEED);
    }
}

// Whether the end of a file name, ".tmp-PID", is of a process that is gone: killed while it wrote.
static bool is_leftover(const char *end_of_name)
{
    char *end;
    if (strncmp(end_of_name, ".tmp-", 5) != 0) {
        return false;
    }
    const long pid = strtol(end_of_name + 5, &end, 10);
    return pid > 0 && *end == '\0' && kill((pid_t)pid, 0) != 0 && errno == ESRCH;
}

// Of the file that is about to be written.
static void remove_leftovers(const char *path)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    const size_t n = strlen(name);
    char *folder = slash ? strndup(path, (size_t)(slash - path) + 1) : strdup(".");
    DIR *d = folder ? opendir(folder) : NULL;
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        if (strncmp(e->d_name, name, n) == 0 && is_leftover(e->d_name + n)) {
            (void)unlinkat(dirfd(d), e->d_name, 0);
        }
    }
    if (d) {
        (void)closedir(d);
    }
    free(folder);
}

keel_status keel_file_create(struct keel_file_out *out, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_text tmp = { 0 };
    *out = (struct keel_file_out){ 0 };
    keel_text_addf(&tmp, "%s.tmp-%ld", path, (long)getpid());
    out->path = strdup(path);
    if (tmp.failed || !out->path) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    out->tmp = tmp.data;
    tmp = (struct keel_text){ 0 };
    remove_leftovers(path);
    out->f = fopen(out->tmp, "wbe");
    if (!out->f) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot create: %s", path, strerror(errno));
    }
out:
    keel_text_finish(&tmp);
    if (st != KEEL_OK) {
        keel_file_abort(out);
    }
    return st;
}

// Makes the new name itself durable; a file system that cannot is no reason to fail.
static void sync_folder_of(const char *path)
{
    char *dir = strdup(path);
    if (!dir) {
        return;
    }
    char *slash = strrchr(dir, '/');
    if (slash) {
        slash[slash == dir ? 1 : 0] = 0;
    }
    const int fd = open(slash ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(dir);
}

keel_status keel_file_commit(struct keel_file_out *out, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (ferror(out->f) || fflush(out->f) != 0 || fsync(fileno(out->f)) != 0) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot write: %s", out->path, strerror(errno ? errno : EIO));
    }
    if (fclose(out->f) != 0) {
        out->f = NULL;
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot write: %s", out->path, strerror(errno));
    }
    out->f = NULL;
    if (rename(out->tmp, out->path) != 0) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot put the finished file in place: %s", out->path, strerror(errno));
    }
    sync_folder_of(out->path);
    free(out->tmp);
    out->tmp = NULL; // nothing left to remove
out:
    keel_file_abort(out);
    return st;
}

void keel_file_abort(struct keel_file_out *out)
{
    if (out->f) {
        fclose(out->f);
    }
    if (out->tmp) {
        unlink(out->tmp);
    }
    free(out->tmp);
    free(out->path);
    *out = (struct keel_file_out){ 0 };
}

keel_status keel_make_dirs(const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char *p = strdup(path);
    if (!p) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    for (char *c = p + 1;; c++) {
        if (*c != '/' && *c != 0) {
            continue;
        }
        const char keep = *c;
        *c = 0;
        if (mkdir(p, 0777) != 0 && errno != EEXIST) {
            KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot create the folder: %s", p, strerror(errno));
        }
        *c = keep;
        if (keep == 0) {
            break;
        }
    }
    if (!keel_path_is_dir(path)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: exists and is not a folder", path);
    }
out:
    free(p);
    return st;
}

bool keel_path_exists(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0;
}

bool keel_path_is_dir(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

bool keel_path_stamp(const char *path, uint64_t *bytes, uint64_t *changed_ns)
{
    struct stat sb;
    if (stat(path, &sb) != 0) {
        return false;
    }
    *bytes = (uint64_t)sb.st_size;
    *changed_ns = (uint64_t)sb.st_mtim.tv_sec * 1000000000u + (uint64_t)sb.st_mtim.tv_nsec;
    return true;
}

void keel_path_touch(const char *path)
{
    (void)utimensat(AT_FDCWD, path, NULL, 0);
}

// --- trimming a folder ---------------------------------------------------------------------------

struct trim_file {
    char name[256];
    uint64_t bytes, used_ns;
};

struct trim_list {
    struct trim_file *at;
    size_t n, cap;
    uint64_t bytes;
};

static int longest_unused_first(const void *a, const void *b)
{
    const struct trim_file *x = a, *y = b;
    return x->used_ns != y->used_ns ? (x->used_ns < y->used_ns ? -1 : 1) : strcmp(x->name, y->name);
}

// A file that cannot be looked at, or does not fit into memory, is as if it were not there.
static void trim_add(struct trim_list *l, int folder, const char *name)
{
    struct stat sb;
    if (strlen(name) >= sizeof l->at->name || fstatat(folder, name, &sb, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(sb.st_mode)) {
        return;
    }
    if (l->n == l->cap) {
        const size_t cap = l->cap ? l->cap * 2 : 64;
        struct trim_file *at = realloc(l->at, cap * sizeof *at);
        if (!at) {
            return;
        }
        l->at = at;
        l->cap = cap;
    }
    struct trim_file *f = &l->at[l->n++];
    *f = (struct trim_file){
        .bytes = (uint64_t)sb.st_size,
        .used_ns = (uint64_t)sb.st_mtim.tv_sec * 1000000000u + (uint64_t)sb.st_mtim.tv_nsec,
    };
    memcpy(f->name, name, strlen(name) + 1);
    l->bytes += f->bytes;
}

uint64_t keel_folder_trim(const char *folder, const char *suffix, uint64_t keep_bytes)
{
    struct trim_list l = { 0 };
    const size_t n_suffix = strlen(suffix);
    DIR *d = opendir(folder);
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        const size_t n = strlen(e->d_name);
        const char *tmp = strstr(e->d_name, ".tmp-");
        if (n >= n_suffix && strcmp(e->d_name + n - n_suffix, suffix) == 0) {
            trim_add(&l, dirfd(d), e->d_name);
        } else if (tmp && (size_t)(tmp - e->d_name) >= n_suffix && strncmp(tmp - n_suffix, suffix, n_suffix) == 0 && is_leftover(tmp)) {
            (void)unlinkat(dirfd(d), e->d_name, 0);
        }
    }
    if (l.bytes > keep_bytes) {
        qsort(l.at, l.n, sizeof *l.at, longest_unused_first);
    }
    for (size_t i = 0; i < l.n && l.bytes > keep_bytes; i++) {
        if (unlinkat(dirfd(d), l.at[i].name, 0) == 0 || errno == ENOENT) {
            l.bytes -= l.at[i].bytes;
        }
    }
    if (d) {
        (void)closedir(d);
    }
    free(l.at);
    return l.bytes;
}

bool keel_cache_dir(char *out, size_t out_bytes)
{
    static const keel_log quiet = { .level = 0 };
    const char *xdg = keel_env("XDG_CACHE_HOME");
    const char *home = keel_env("HOME");
    int n = -1;
    if (xdg && xdg[0] == '/') { // the XDG specification says that relative paths are to be ignored
        n = snprintf(out, out_bytes, "%s/keel", xdg);
    } else if (home && home[0]) {
        n = snprintf(out, out_bytes, "%s/.cache/keel", home);
    }
    return n > 0 && (size_t)n < out_bytes && keel_make_dirs(out, &quiet) == KEEL_OK;
}

const char *keel_env(const char *name)
{
    return getenv(name);
}

uint64_t keel_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t keel_unix_time(void)
{
    return (uint64_t)time(NULL);
}

uint64_t keel_ram_bytes(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (uint64_t)pages * (uint64_t)page : 0;
}

uint64_t keel_ram_free_bytes(void)
{
    FILE *f = fopen("/proc/meminfo", "re");
    char line[128];
    unsigned long long kib = 0;
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) {
            break;
        }
    }
    if (f) {
        fclose(f);
    }
    return (uint64_t)kib * 1024u;
}

uint64_t keel_peak_rss_bytes(void)
{
    struct rusage ru;
    return getrusage(RUSAGE_SELF, &ru) == 0 ? (uint64_t)ru.ru_maxrss * 1024u : 0;
}

uint32_t keel_cpu_count(void)
{
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (uint32_t)n : 1;
}

struct parallel {
    atomic_uint next;
    uint32_t n;
    void (*job)(void *user, uint32_t i);
    void *user;
};

static void *parallel_run(void *arg)
{
    struct parallel *p = arg;
    for (uint32_t i; (i = atomic_fetch_add(&p->next, 1)) < p->n;) {
        p->job(p->user, i);
    }
    return NULL;
}

void keel_parallel_for(uint32_t n, void (*job)(void *user, uint32_t i), void *user)
{
    struct parallel p = { .n = n, .job = job, .user = user };
    pthread_t threads[63];
    uint32_t started = 0;
    const uint32_t want = KEEL_MIN(KEEL_MIN(keel_cpu_count(), n), 64u);
    for (; started + 1 < want; started++) {
        if (pthread_create(&threads[started], NULL, parallel_run, &p) != 0) {
            break; // this thread does the rest
        }
    }
    parallel_run(&p);
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(threads[i], NULL);
    }
}

static volatile sig_atomic_t interrupted;

void keel_interrupt(void)
{
    interrupted = 1;
}

void keel_interrupt_clear(void)
{
    interrupted = 0;
}

bool keel_interrupted(void)
{
    return interrupted != 0;
}

int keel_run_program(char *const argv[])
{
    posix_spawn_file_actions_t fa;
    pid_t pid;
    int code = -1, wstatus;
    if (posix_spawn_file_actions_init(&fa) != 0) {
        return -1;
    }
    posix_spawn_file_actions_addopen(&fa, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&fa, 1, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&fa, 2, "/dev/null", O_WRONLY, 0);
    if (posix_spawnp(&pid, argv[0], &fa, NULL, argv, environ) == 0) {
        while (waitpid(pid, &wstatus, 0) < 0 && errno == EINTR) {
        }
        code = WIFEXITED(wstatus) ? WEXITSTATUS(wstatus) : -1;
    }
    posix_spawn_file_actions_destroy(&fa);
    return code;
}
