// SPDX-License-Identifier: MIT
// device/device.h: the room's only header. Memory by lifetime, shaders, recording and replaying dispatches, transfers, times.
//
// No Vulkan name leaves this room, and it does not know what a layer is. Ops (src/ops) describe a dispatch as data:
// shader, specialisation constants, bindings with read or write, push constants, grid, cost. The recorder turns a list of
// them into command buffers, derives the barriers and keeps every submission short.
#ifndef KEEL_DEVICE_ROOM_H
#define KEEL_DEVICE_ROOM_H

#include "base.h"

#include <keel/device.h>

const keel_log *keel_device_log(const keel_device *dev); // may be NULL
// From now on messages go there; the log until now, which must be put back before `log` ends. For what is expected to fail.
const keel_log *keel_device_set_log(keel_device *dev, const keel_log *log);
// Path in the cache folder for what was learnt of this device, driver and clamp profile: "WHAT-UUID-...". False: caches are off or
// there is no folder.
bool keel_device_cache_path(const keel_device *dev, const char *what, char *out, size_t out_bytes);

// --- memory --------------------------------------------------------------------------------------

// A heap: device memory of one lifetime, freed as a whole. Grows by blocks of at most caps.max_buffer (and at most 256 MiB
// where the request is smaller); each block is one buffer.
typedef struct keel_heap keel_heap;

// A range of a heap. Plain data, copied freely; valid until its heap is reset or destroyed. All-zero is "nothing".
struct keel_span {
    struct keel_block *block;
    uint64_t offset, bytes; // offset is a multiple of 256
};

enum keel_heap_kind {
    KEEL_HEAP_DEVICE, // fastest for shaders; host-visible too where caps.unified
    KEEL_HEAP_HOST,   // host-visible, coherent to the host by keel_span_flush/_fetch; for parameters and read-back
};

// `label` names the lifetime in messages ("weights", "kv cache"); static storage.
keel_status keel_heap_create(keel_heap **out, keel_device *dev, enum keel_heap_kind kind, const char *label);
// Makes one block of exactly `bytes` for the spans to come, so that a heap whose size is known holds no slack. Does nothing
// above caps.max_buffer: such a heap grows by blocks. Errors: NO_MEMORY as below.
keel_status keel_heap_reserve(keel_heap *heap, uint64_t bytes);
// Allocates `bytes` (above 0, at most caps.max_buffer), 256-byte aligned, contents undefined. A span larger than
// caps.max_range cannot be bound whole. Errors: NO_MEMORY, with a message that says what was asked, what is in use by
// lifetime and what the limit is.
keel_status keel_heap_alloc(keel_heap *heap, uint64_t bytes, struct keel_span *out);
void keel_heap_reset(keel_heap *heap);    // forgets all spans, keeps the blocks for reuse; no work may be in flight
void keel_heap_destroy(keel_heap **heap); // accepts NULL and pointers to NULL; no work may be in flight
uint64_t keel_heap_bytes(const keel_heap *heap);

// Host address of a span, or NULL when the host cannot see it.
void *keel_span_host(struct keel_span s);
// Makes host writes visible to the device / device writes visible to the host, for memory that is not coherent. Cheap
// where there is nothing to do. Call fetch after keel_recorder_wait().
void keel_span_flush(keel_device *dev, struct keel_span s);
void keel_span_fetch(keel_device *dev, struct keel_span s);
// A part of a span; offset must be a multiple of 256 for binding.
struct keel_span keel_span_sub(struct keel_span s, uint64_t offset, uint64_t bytes);

// Copies between host and device memory, whatever kind it is. Block until done. Errors: NO_MEMORY, DEVICE_LOST.
keel_status keel_upload(keel_device *dev, struct keel_span dst, const void *src, size_t bytes);
keel_status keel_download(keel_device *dev, void *dst, struct keel_span src, size_t bytes);

// Upload without an extra copy: `*ptr` is where to write `bytes` (at most KEEL_STAGE_MAX) of `dst`: the memory itself on a
// unified device, else a staging buffer that keel_stage_end() copies asynchronously. One stage open at a time.
#define KEEL_STAGE_MAX (16u << 20)
keel_status keel_stage_begin(keel_device *dev, struct keel_span dst, size_t bytes, void **ptr);
keel_status keel_stage_end(keel_device *dev);
keel_status keel_stage_finish(keel_device *dev); // waits until all staged bytes have arrived

// --- shaders -------------------------------------------------------------------------------------

// A SPIR-V module built into the program (shaders/meson.build makes these). No code: the build's compiler could not make it.
struct keel_shader {
    const char *name;
    const uint32_t *code;
    uint32_t code_words;
};

// Which variant of its kernels a room above uses on this device: small numbers that this room only keeps, 0 until set.
#define KEEL_MAX_CHOICES 16u
uint8_t keel_device_choice(const keel_device *dev, uint32_t slot);
void keel_device_choose(keel_device *dev, uint32_t slot, uint8_t choice);

// --- recording -----------------------------------------------------------------------------------

enum keel_access { KEEL_READ, KEEL_WRITE, KEEL_READ_WRITE };

struct keel_bind {
    struct keel_span span; // offset a multiple of 256, bytes at most caps.max_range
    enum keel_access access;
};

#define KEEL_MAX_BINDS 8
#define KEEL_MAX_SPEC 12
#define KEEL_MAX_PUSH 128

// One dispatch. Specialisation constant i has id i; constant 0 is local_size_x.
struct keel_dispatch {
    const struct keel_shader *shader;
    uint32_t spec[KEEL_MAX_SPEC], n_spec;
    uint32_t subgroup;       // lanes that each subgroup must have, all of them in use (caps.coop); 0: as the driver likes
    struct keel_bind bind[KEEL_MAX_BINDS];
    uint32_t n_bind;         // binding i of set 0; one that the shader declares as a texel buffer (only 0, or 0 and 1, and only
                             // to read) is bound as texels of four 32-bit numbers
    const void *push;        // copied
    uint32_t push_bytes;
    uint32_t groups[3];      // 0 in any: nothing is recorded
    uint64_t flops, bytes;   // declared cost, for scheduling and reports
    const char *label;       // static storage: "linear Q4_K", "rmsnorm"
};

// A list of dispatches. Thread safety: one thread. Errors are sticky: after the first one, recording does nothing and
// keel_recorder_submit/_wait return it; so ops need not return a status.
typedef struct keel_recorder keel_recorder;

struct keel_recorder_params {
    bool replay; // keep the command buffers so that keel_recorder_replay() can submit them again
};

keel_status keel_recorder_create(keel_recorder **out, keel_device *dev, const struct keel_recorder_params *params);
void keel_recorder_destroy(keel_recorder **rec); // waits first
keel_device *keel_recorder_device(const keel_recorder *rec);

// Records a dispatch. Compiles the pipeline at first use (kept by the device, cached on disk). Inserts a memory barrier
// when a binding overlaps memory written since the last barrier, or writes memory read since.
// Starts a submission by itself when the recorded cost reaches the time aimed at, up to three are in flight (not in
// replay mode, where the list is cut at the same places and submitted by keel_recorder_submit()).
void keel_record(keel_recorder *rec, const struct keel_dispatch *d);
// Fills a span (offset and bytes multiples of 4) with a 32-bit word; copies between spans of equal size. Ordered like dispatches.
void keel_record_fill(keel_recorder *rec, struct keel_span dst, uint32_t word);
void keel_record_copy(keel_recorder *rec, struct keel_span dst, struct keel_span src);
// Between true and false nothing is recorded: it is only noted which pipelines are used. At false those that are new are compiled, several
// at once, which recording would do one after the other. An error stays with the recorder.
void keel_recorder_note(keel_recorder *rec, bool on);
// Most floating-point operations that one dispatch of this label (static storage) should hold on this device, so that it lasts
// about 50 ms; ops split by it. At least 1e6. Adapts to what submissions took.
uint64_t keel_recorder_quantum(const keel_recorder *rec, const char *label);

// Marks the recorder as failed with `status` (an op that finds a broken precondition); the reason was logged.
void keel_recorder_fail(keel_recorder *rec, keel_status status);
// Hands everything recorded to the device.
keel_status keel_recorder_submit(keel_recorder *rec);
// Waits until all that was submitted is done, and lets a recorder without `replay` start a new list.
// Errors: the sticky one, DEVICE_LOST.
keel_status keel_recorder_wait(keel_recorder *rec);
// Submits the whole list again; wait before the next replay. Only with `replay`, after keel_recorder_submit().
keel_status keel_recorder_replay(keel_recorder *rec);
// Forgets the list and any sticky error, to record a new one. Waits first.
void keel_recorder_reset(keel_recorder *rec);

// --- profile -------------------------------------------------------------------------------------

// Time and cost by label since the last reset; only dispatches of recorders made while profiling was on.
struct keel_profile_row {
    const char *label;
    uint64_t count, ns, flops, bytes;
};
void keel_profile_enable(keel_device *dev, bool on); // timestamps around each dispatch; costs a few percent
void keel_profile_reset(keel_device *dev);           // forgets rows and events
// Copies up to `cap` rows, longest time first, and returns how many there are.
size_t keel_profile_rows(keel_device *dev, struct keel_profile_row *out, size_t cap);
// What ran when, in the order of completion. Times by keel_now_ns(); the device's clock is set to it where the first submission since
// the reset begins, since Vulkan 1.1 relates the two no better.
struct keel_profile_event {
    const char *label;    // of a dispatch; NULL: a submission, from the call to when the host saw its end
    uint64_t start_ns, ns, flops, bytes;
    uint64_t submission;  // counts up; the one a dispatch belongs to
};
// Valid until the next submission ends or reset. Returns how many.
size_t keel_profile_events(const keel_device *dev, const struct keel_profile_event **out);
// Time since creation during which a submission was at work, by the device's clock where it has one.
uint64_t keel_device_busy_ns(const keel_device *dev);
// Dispatches and submissions since creation, for tests and bench.
void keel_device_counts(const keel_device *dev, uint64_t *dispatches, uint64_t *submits, uint64_t *barriers);

#endif
