// SPDX-License-Identifier: MIT
// base/log.c: formats messages and hands them to the log's callback.
#include "base.h"

#include <stdarg.h>
#include <stdio.h>

void keel_log_write(const keel_log *log, enum keel_log_level level, const char *fmt, ...)
{
    static const char *const prefix[] = { "", "error: ", "warning: ", "", "" };
    const enum keel_log_level max = log ? log->level : KEEL_LOG_WARN;
    if (level > max) {
        return;
    }
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (log && log->write) {
        log->write(log->user, level, text);
    } else {
        fprintf(stderr, "%s%s\n", prefix[level], text);
    }
}
