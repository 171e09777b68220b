// SPDX-License-Identifier: MIT
// keel/log.h: where messages go.
//
// A keel_log is a small struct that the caller owns and keeps alive as long as any object made with it. Wherever a function
// takes a `const keel_log *`, NULL means: warnings and errors to stderr.
#ifndef KEEL_LOG_H
#define KEEL_LOG_H

#include <keel/status.h>

#ifdef __cplusplus
extern "C" {
#endif

enum keel_log_level {
    KEEL_LOG_ERROR = 1, // the call fails; one message a failure
    KEEL_LOG_WARN,      // the result may not be what was meant
    KEEL_LOG_INFO,      // what a user wants to know (device chosen, file written)
    KEEL_LOG_DEBUG,     // what a developer wants to know
};

typedef struct keel_log {
    enum keel_log_level level; // messages above this level are dropped
    // Receives one message without newline; `text` is valid during the call only. May be called from any thread that uses
    // an object with this log, one call at a time for each object. NULL: write to stderr.
    void (*write)(void *user, enum keel_log_level level, const char *text);
    void *user; // passed to `write`
} keel_log;

#ifdef __cplusplus
}
#endif
#endif
