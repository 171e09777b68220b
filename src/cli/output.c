// SPDX-License-Identifier: MIT
// cli/output.c: progress lines, signals, files that appear only when complete, JSON and sizes as text.
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// --- signals -------------------------------------------------------------------------------------

static volatile sig_atomic_t stopped;

static void on_signal(int sig)
{
    if (stopped) {
        _exit(128 + sig);
    }
    stopped = 1;
    keel_interrupt(); // what has no progress callback looks there
}

void stop_breaks_reads(bool on)
{
    struct sigaction sa = { .sa_handler = on_signal, .sa_flags = on ? 0 : SA_RESTART };
    sigemptyset(&sa.sa_mask);
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
}

void stop_install(void)
{
    stop_breaks_reads(false);
}

bool stop_asked(void)
{
    return stopped != 0;
}

// --- progress ------------------------------------------------------------------------------------

static bool line_open; // a progress line stands on the terminal

uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void progress_clear(void)
{
    if (line_open) {
        fputs("\r\033[K", stderr);
        line_open = false;
    }
}

static void format_eta(char *out, size_t size, double seconds)
{
    const uint64_t s = (uint64_t)(seconds + 0.5);
    if (s < 60) {
        snprintf(out, size, "%us", (unsigned)s);
    } else if (s < 3600) {
        snprintf(out, size, "%um%02us", (unsigned)(s / 60), (unsigned)(s % 60));
    } else {
        snprintf(out, size, "%uh%02um", (unsigned)(s / 3600), (unsigned)(s / 60 % 60));
    }
}

void progress_show(struct progress *p, uint64_t done, uint64_t total, const char *extra)
{
    const bool tty = isatty(STDERR_FILENO);
    const uint64_t now = now_ns();
    char eta[32];
    if (p->off) {
        return;
    }
    if (p->start_ns == 0) {
        p->start_ns = p->last_ns = now;
        p->done0 = done;
    }
    // 5 lines a second on a terminal, one in 5 seconds in a file.
    if (done < total && now - p->last_ns < (tty ? 200000000ull : 5000000000ull)) {
        return;
    }
    p->last_ns = now;
    const double seconds = (double)(now - p->start_ns) * 1e-9;
    const double rate = seconds > 0 ? (double)(done - p->done0) / seconds : 0;
    format_eta(eta, sizeof eta, rate > 0 ? (double)(total - done) / rate : 0);
    progress_clear();
    fprintf(stderr, "%s: %llu/%llu %s%s%s, %.3g %s/s, ETA %s", p->what, (unsigned long long)done, (unsigned long long)total,
            p->unit, extra[0] ? ", " : "", extra, rate, p->unit, eta);
    if (tty) {
        fflush(stderr);
        line_open = true;
    } else {
        fputc('\n', stderr);
    }
}

void progress_end(struct progress *p)
{
    (void)p;
    if (line_open) {
        fputc('\n', stderr);
        line_open = false;
    }
}

bool progress_tokens(void *user, uint64_t done, uint64_t total)
{
    progress_show(user, done, total, "");
    return !stop_asked();
}

// --- files ---------------------------------------------------------------------------------------

static bool read_stream(FILE *f, char **data, size_t *len)
{
    size_t cap = 0, n = 0;
    char *buf = NULL;
    for (;;) {
        if (n == cap) {
            cap = cap ? cap * 2 : 1 << 16;
            char *more = realloc(buf, cap);
            if (!more) {
                free(buf);
                errno = ENOMEM;
                return false;
            }
            buf = more;
        }
        const size_t got = fread(buf + n, 1, cap - n, f);
        n += got;
        if (got == 0) {
            break;
        }
    }
    buf[n] = '\0'; // n < cap here: the last read had room
    *data = buf;
    *len = n;
    return !ferror(f);
}

bool read_all(const char *path, char **data, size_t *len)
{
    const bool std = strcmp(path, "-") == 0;
    FILE *f = std ? stdin : fopen(path, "rb");
    *data = NULL;
    *len = 0;
    const bool ok = f && read_stream(f, data, len);
    if (!ok) {
        progress_clear();
        fprintf(stderr, "error: %s: cannot be read: %s\n", path, strerror(errno));
        free(*data);
        *data = NULL;
    }
    if (f && !std) {
        fclose(f);
    }
    return ok;
}

bool out_open(struct out_file *o, const char *path)
{
    o->path = path;
    o->tmp[0] = '\0';
    if (strcmp(path, "-") == 0) {
        o->f = stdout;
        return true;
    }
    const int n = snprintf(o->tmp, sizeof o->tmp, "%s.tmp-%ld", path, (long)getpid());
    o->f = n > 0 && (size_t)n < sizeof o->tmp ? fopen(o->tmp, "wb") : NULL;
    if (!o->f) {
        fprintf(stderr, "error: %s: cannot be written: %s\n", path, strerror(errno));
        o->tmp[0] = '\0';
    }
    return o->f != NULL;
}

bool out_commit(struct out_file *o)
{
    FILE *f = o->f;
    o->f = NULL;
    bool ok = fflush(f) == 0 && !ferror(f);
    if (f != stdout) {
        ok = ok && fsync(fileno(f)) == 0;
        ok = (fclose(f) == 0) && ok;
        ok = ok && rename(o->tmp, o->path) == 0;
        if (!ok) {
            const int why = errno;
            unlink(o->tmp);
            errno = why;
        }
    }
    if (!ok) {
        progress_clear();
        fprintf(stderr, "error: %s: cannot be written: %s\n", o->path, strerror(errno));
    }
    return ok;
}

void out_abort(struct out_file *o)
{
    if (o->f && o->f != stdout) {
        fclose(o->f);
        unlink(o->tmp);
    }
    o->f = NULL;
}

// --- text ----------------------------------------------------------------------------------------

void print_json(FILE *f, json_t *value)
{
    if (value) {
        json_dumpf(value, f, JSON_COMPACT | JSON_REAL_PRECISION(9));
        fputc('\n', f);
        json_decref(value);
    }
}

// Length of the well-formed UTF-8 character at s[0..n), 0 if there is none.
static size_t utf8_char(const unsigned char *s, size_t n)
{
    const unsigned c = s[0];
    if (c < 0x80) {
        return 1;
    }
    const size_t len = c >= 0xC2 && c <= 0xDF ? 2 : c >= 0xE0 && c <= 0xEF ? 3 : c >= 0xF0 && c <= 0xF4 ? 4 : 0;
    if (len == 0 || len > n) {
        return 0;
    }
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xC0) != 0x80) {
            return 0;
        }
    }
    if ((c == 0xE0 && s[1] < 0xA0) || (c == 0xED && s[1] > 0x9F) || (c == 0xF0 && s[1] < 0x90) || (c == 0xF4 && s[1] > 0x8F)) {
        return 0;
    }
    return len;
}

json_t *json_text(const char *bytes, size_t len)
{
    json_t *whole = json_stringn(bytes, len); // NULL if it is no valid UTF-8
    if (whole || len == 0) {
        return whole;
    }
    char *buf = malloc(len * 3);
    size_t n = 0;
    if (!buf) {
        return NULL;
    }
    for (size_t i = 0; i < len;) {
        const size_t k = utf8_char((const unsigned char *)bytes + i, len - i);
        if (k) {
            memcpy(buf + n, bytes + i, k);
        } else {
            memcpy(buf + n, "\xEF\xBF\xBD", 3);
        }
        n += k ? k : 3;
        i += k ? k : 1;
    }
    json_t *s = json_stringn(buf, n);
    free(buf);
    return s;
}

const char *bytes_text(uint64_t bytes)
{
    static char ring[8][32];
    static unsigned at;
    char *out = ring[at++ % 8];
    if (bytes >= 1000000000) {
        snprintf(out, sizeof ring[0], "%.2f GB", (double)bytes * 1e-9);
    } else if (bytes >= 1000000) {
        snprintf(out, sizeof ring[0], "%.1f MB", (double)bytes * 1e-6);
    } else {
        snprintf(out, sizeof ring[0], "%.1f kB", (double)bytes * 1e-3);
    }
    return out;
}

json_t *plan_json(const struct keel_plan *plan)
{
    json_t *rows = json_array();
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        json_array_append_new(rows, json_pack("{s:s, s:I, s:s}", "what", plan->row[i].what, "bytes",
                                              (json_int_t)plan->row[i].bytes, "where", plan->row[i].host ? "host" : "device"));
    }
    return json_pack("{s:o, s:I, s:I}", "rows", rows, "device_bytes", (json_int_t)plan->device_bytes, "host_bytes",
                     (json_int_t)plan->host_bytes);
}

void plan_print(FILE *f, const struct keel_plan *plan)
{
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        fprintf(f, "  %-28s %12s  %s\n", plan->row[i].what, bytes_text(plan->row[i].bytes), plan->row[i].host ? "host" : "device");
    }
    fprintf(f, "  %-28s %12s  device\n", "sum", bytes_text(plan->device_bytes));
    fprintf(f, "  %-28s %12s  host\n", "sum", bytes_text(plan->host_bytes));
}
