// SPDX-License-Identifier: MIT
// keel/status.h: the result of every call that can fail.
//
// The reason for a failure goes to the log of the object concerned (keel/log.h), as one message that names the thing, its
// place and the remedy; the status says what kind of failure it was, so that a program can react.
#ifndef KEEL_STATUS_H
#define KEEL_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KEEL_API __attribute__((visibility("default")))
#else
#define KEEL_API
#endif

typedef enum keel_status {
    KEEL_OK = 0,
    KEEL_ERR_ARG,         // the caller passed something that can never work
    KEEL_ERR_IO,          // a file could not be opened, read or written
    KEEL_ERR_FORMAT,      // a file's contents are malformed
    KEEL_ERR_UNSUPPORTED, // well-formed, but keel does not do this (architecture, tensor type, ...)
    KEEL_ERR_MISMATCH,    // two things do not belong together (adapter and model, checkpoint and run)
    KEEL_ERR_DATA,        // a data row cannot be used (too long, empty, invalid text)
    KEEL_ERR_NO_MEMORY,   // host or device memory is not enough
    KEEL_ERR_NO_DEVICE,   // no Vulkan loader, driver or usable device
    KEEL_ERR_DEVICE,      // the driver refused something it promised
    KEEL_ERR_DEVICE_LOST, // the device went away or was reset; destroy it and start again
    KEEL_ERR_NUMERIC,     // NaN or infinity where a number was due
    KEEL_INTERRUPTED,     // stopped on request; state was saved where the call says so
    KEEL_OVER_BUDGET,     // a drift budget was exceeded
} keel_status;

// Asks whatever this process is computing to end soon with INTERRUPTED, and all that begins later too, until it is cleared. Both may
// be called by signal handlers and by any thread.
KEEL_API void keel_interrupt(void);
KEEL_API void keel_interrupt_clear(void);

// A short English name for `status`, such as "out of memory". Never NULL; static storage. Thread-safe.
KEEL_API const char *keel_status_text(keel_status status);

#ifdef __cplusplus
}
#endif
#endif
