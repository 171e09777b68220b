// SPDX-License-Identifier: MIT
// keel/device.h: Vulkan devices: listing them, opening one, what it offers.
#ifndef KEEL_DEVICE_H
#define KEEL_DEVICE_H

#include <keel/log.h>
#include <keel/status.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// An open device with its queue and pipelines. Thread safety: one thread at a time.
typedef struct keel_device keel_device;

// What keel uses of a device's limits and features, after any clamp. Sizes in bytes unless said otherwise.
struct keel_caps {
    char name[128];             // "llvmpipe (LLVM 15.0.6, 256 bits)"
    char driver[128];           // "llvmpipe, Mesa 22.3.6 (LLVM 15.0.6)"
    char kind[16];              // "cpu", "integrated", "discrete", "virtual", "other"
    char uuid[33];              // device UUID in hexadecimal
    char profile[16];           // name of the clamp profile in force, "" if none
    uint32_t index;             // position in keel_device_list()
    uint32_t api_major, api_minor;
    uint32_t vendor_id, device_id, driver_version;
    uint32_t subgroup_size;     // lanes; 0 if subgroup operations are not used
    uint32_t max_workgroup;     // invocations in a workgroup
    uint32_t max_shared;        // shared memory of a workgroup
    uint32_t max_push;          // push constants
    uint32_t max_bindings;      // storage buffers a shader may use
    uint32_t max_groups;        // workgroups in x
    uint64_t max_range;         // one binding
    uint64_t max_buffer;        // one buffer, and one allocation
    uint32_t offset_align;      // binding offsets
    uint64_t heap;              // size of the heap that keel allocates from
    uint64_t heap_free;         // what the driver says is left of it (VK_EXT_memory_budget), else the heap size
    bool unified;               // device memory can be written by the host: no staging copies
    bool host_cached;           // cached host memory for reading back
    bool subgroup_arith;        // subgroupAdd and the like may be used
    bool exchange;              // variants that hand values from lane to lane and read texels are used: supported and measured
                                // faster than equal loads by all lanes
    bool storage16, storage8;   // 16- and 8-bit storage buffers may be used
    bool float16, int8;         // 16-bit float and 8-bit integer arithmetic may be used
    bool soft_half;             // 16-bit floats are taken apart by integer arithmetic: the driver's own conversion does not work
    bool int_dot, int_dot_fast; // 4×8-bit integer dot product may be used; in one instruction
    struct {
        uint32_t m, n, k;       // shape of one cooperative matrix product of a subgroup, f16 × f16 into f32; 0: none that keel uses
    } coop;
    bool timestamps;            // the queue can time dispatches
    double timestamp_ns;        // nanoseconds a tick
    double gflops;              // measured fp32 multiply-adds, 10^9 FLOP/s; 0 until keel_device_measure()
    double gbps;                // measured copy bandwidth, 10^9 bytes/s (read + write); 0 until measured
    double matvec_gbps;         // measured product of 4-bit weights with a vector, 10^9 bytes of weights a second; 0 until measured
};

// Lists the Vulkan devices of this machine into `out` (room for `cap`); `*n` is how many there are, even if above `cap`.
// Errors: NO_DEVICE when there is no Vulkan loader or no device at all. Thread-safe.
KEEL_API keel_status keel_device_list(struct keel_caps *out, size_t cap, size_t *n, const keel_log *log);

struct keel_device_params {
    const char *select;  // index as text, or a part of the name, case-insensitive; NULL or "": the fastest by measurement
    const char *profile; // clamp profile: "min", "rpi", "mali", "discrete"; NULL or "": none (docs/devices.md)
    bool validate;       // turn on the validation layer; its messages become log errors and are counted
    bool no_cache;       // neither read nor write the caches on disk (pipelines, measured speeds)
    uint64_t memory_limit; // refuse to allocate more device memory than this; 0: what the device offers
    const char *fault;   // for tests of what happens on broken drivers; NULL: none. "compile:SHADER": shaders whose names hold that do not
                         // compile; "skip:SHADER": their dispatches do nothing; "lost:N": submission N, from 0, loses the device;
                         // "drop:N": it does nothing, as after a reset that the driver hides; "dirty:BYTE": new memory
                         // that the host sees is filled with it
};

// Opens a device. NULL params: the defaults above. On success `*out` is released with keel_device_destroy().
// Errors: ARG (unknown profile), NO_DEVICE (none, or none matches), DEVICE. `log` must live as long as the device.
KEEL_API keel_status keel_device_create(keel_device **out, const struct keel_device_params *params, const keel_log *log);
// Waits for the device, writes the pipeline cache and frees all. Accepts NULL and pointers to NULL.
KEEL_API void keel_device_destroy(keel_device **dev);

// Capabilities as used. Valid as long as the device.
KEEL_API const struct keel_caps *keel_device_caps(const keel_device *dev);
// Measures fp32 throughput, copy bandwidth and a product of 4-bit weights with keel's own micro-kernels (well below a second), fills
// the caps and remembers the result on disk. Errors: DEVICE, DEVICE_LOST.
KEEL_API keel_status keel_device_measure(keel_device *dev);
// What devices are ordered by: nanoseconds a weight that measured speeds promise for a mix of decoding and prompts; less is faster.
// Infinite until measured.
KEEL_API double keel_device_weight_ns(const struct keel_caps *caps);

// Memory held now and the highest so far, in bytes of device memory.
KEEL_API void keel_device_memory(const keel_device *dev, uint64_t *now, uint64_t *peak);
KEEL_API void keel_device_reset_peak(keel_device *dev); // the highest from now on
// Number of validation messages since creation; 0 without `validate`.
KEEL_API uint32_t keel_device_validation_count(const keel_device *dev);
// Longest single submission since creation in nanoseconds, by the device's clock where it has one, else from submission to
// completion as the host saw it. Not counted: submissions where a shader runs for the first time (CPU drivers compile then).
KEEL_API uint64_t keel_device_longest_submit_ns(const keel_device *dev);

#ifdef __cplusplus
}
#endif
#endif
