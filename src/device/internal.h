// SPDX-License-Identifier: MIT
// device/internal.h: what the files of this room share. Vulkan names live here and below, nowhere above.
#ifndef KEEL_DEVICE_INTERNAL_H
#define KEEL_DEVICE_INTERNAL_H

#include "base.h"
#include "coop.h"
#include "device.h"

#include <stdatomic.h>

#include <volk.h>

#define MAX_DEVICES 16
#define STAGE_SLOTS 2   // one fills while the other is copied
#define MAX_IN_FLIGHT 3 // submissions of one recorder: enough to hide the host, few enough to stay responsive

#define TARGET_NS 50000000u // aim of one submission; watchdogs start at 500 ms (portability.md 1)

// --- objects -------------------------------------------------------------------------------------

#define TEXEL_BYTES 16u // four 32-bit numbers
#define SPAN_ALIGN 256u // largest minStorageBufferOffsetAlignment that Vulkan allows

// A part of a buffer as texels, made when a shader first reads it so; lives as long as its block.
struct texel_view {
    struct texel_view *next;
    VkBufferView handle;
    uint64_t offset, bytes;
    bool is_float;
};

// One buffer with its memory. Spans are cut from it front to back.
struct keel_block {
    struct keel_block *next;
    keel_heap *heap;
    VkBuffer buffer;
    VkDeviceMemory memory;
    void *host; // mapped address, NULL where the host cannot see it
    uint64_t bytes, used;
    struct texel_view *views;
    bool coherent;
};

struct keel_heap {
    keel_heap *next; // in the device's list, for the out-of-memory message
    keel_device *dev;
    struct keel_block *blocks;
    const char *label;
    enum keel_heap_kind kind;
    uint64_t bytes; // of all blocks
};

// What a module declares, read from its SPIR-V.
struct shader_needs {
    uint32_t bindings;   // highest binding of set 0 + 1
    uint32_t push_bytes; // size of the push constant block
    uint32_t texel, texel_float; // bit i: binding i is read as texels; of floats
    bool ok;             // false: not SPIR-V, or a construct that keel does not use
};

struct pipeline {
    uint64_t hash;
    const struct keel_shader *shader;
    uint32_t spec[KEEL_MAX_SPEC], n_spec, n_bind, subgroup;
    uint32_t push_bytes; // least the shader reads
    VkPipeline handle;
    uint32_t texel, texel_float; // as in shader_needs
    VkPipelineLayout layout; // by layout_index(); not owned
    bool ran;                // recorded before; CPU drivers compile when it first runs
};

// Layouts differ in the number of bindings and in which of the first two are texels.
#define MAX_TEXEL_BINDS 2u
#define N_LAYOUTS ((KEEL_MAX_BINDS + 1u) << MAX_TEXEL_BINDS)
static inline uint32_t layout_index(uint32_t n_bind, uint32_t texel)
{
    return n_bind << MAX_TEXEL_BINDS | texel;
}

// Open addressing by hash; never shrinks.
struct pipeline_store {
    struct pipeline **slots;
    uint32_t n, cap; // cap is a power of two
    VkPipelineCache cache;
    VkDescriptorSetLayout set_layouts[N_LAYOUTS]; // by layout_index(), made at first use
    VkPipelineLayout layouts[N_LAYOUTS];
};

struct stage_slot {
    struct keel_span span;
    VkCommandBuffer cmd;
    VkFence fence;
    bool busy;
};

struct transfer {
    keel_heap *heap;
    VkCommandPool pool;
    struct stage_slot slots[STAGE_SLOTS];
    uint32_t next;
    struct keel_span dst; // open stage: where it goes
    int open;             // slot of the open stage, DIRECT or NONE
};
enum { STAGE_NONE = -1, STAGE_DIRECT = -2 };

struct profile {
    bool on;
    struct keel_profile_row *rows;
    size_t n, cap;
    struct keel_profile_event *events;
    size_t n_events, cap_events;
    uint64_t n_submissions;
    double clock_ns; // host's clock minus the device's, once `clock_set`
    bool clock_set;
};

enum fault_kind { FAULT_NONE, FAULT_COMPILE, FAULT_SKIP, FAULT_LOST, FAULT_DROP, FAULT_DIRTY };
struct fault {
    enum fault_kind kind;
    char shader[64];     // a part of its name
    uint64_t number;     // submission, from 0 since the device was opened; or byte that fills new memory
};

// What submissions are estimated with (estimate.c): the device's rates, and how many times slower each kind of work is than they
// say. A kind is a label whose declared cost is mostly bytes, or mostly arithmetic: one token or many.
#define MAX_COSTS 256u
struct cost_model {
    double flops, bytes; // per second
    struct {
        const char *label;
        bool arithmetic;
        double slow;
    } of[MAX_COSTS]; // of[0] stands for all kinds that find no place
    uint32_t n;
};

struct keel_device {
    const keel_log *log;
    struct fault fault;
    struct keel_caps caps;
    bool no_cache;
    uint64_t memory_limit;

    VkInstance instance;
    VkDebugUtilsMessengerEXT messenger;
    VkPhysicalDevice phys;
    VkDevice handle;
    VkQueue queue;
    uint32_t family;
    struct VolkDeviceTable vk;
    VkPhysicalDeviceMemoryProperties memory;
    uint64_t atom; // nonCoherentAtomSize
    uint64_t timestamp_mask;
    bool has_budget;
    uint8_t cache_uuid[VK_UUID_SIZE];
    atomic_uint validation;
    bool lost;

    keel_heap *heaps;
    uint64_t bytes_now, bytes_peak;
    struct pipeline_store pipelines;
    struct transfer transfer;
    struct profile profile;

    uint8_t choices[KEEL_MAX_CHOICES];

    struct cost_model cost;
    uint64_t longest_ns, busy_ns;
    double busy_until_ns; // end of the latest submission by the device's clock
    uint64_t n_dispatches, n_submits, n_barriers;
};

// --- context.c -----------------------------------------------------------------------------------

// Turns a failed VkResult into a status and logs it once with what was being done. DEVICE_LOST is remembered.
keel_status keel_vk_failed(keel_device *dev, VkResult result, const char *what);
// Waits for a fence however long it takes; warns once a minute. `what` names the work.
keel_status keel_wait_fence(keel_device *dev, VkFence fence, const char *what);

// --- caps.c --------------------------------------------------------------------------------------

// Which optional features to turn on when the device is opened, as clamped.
struct feature_set {
    VkPhysicalDevice16BitStorageFeatures storage16;
    VkPhysicalDevice8BitStorageFeatures storage8;
    VkPhysicalDeviceShaderFloat16Int8Features float16_int8;
    VkPhysicalDeviceShaderIntegerDotProductFeatures dot;
    VkPhysicalDeviceCooperativeMatrixFeaturesKHR coop;
    VkPhysicalDeviceVulkanMemoryModelFeatures memory_model;     // both for cooperative matrices
    VkPhysicalDeviceSubgroupSizeControlFeatures subgroup_size;
    const char *extensions[12];
    uint32_t n_extensions;
    bool budget;
};
bool keel_profile_known(const char *name);
// Reads limits and features of a physical device and clamps them. `features` (may be NULL) is what to enable.
void keel_caps_read(struct keel_caps *out, struct feature_set *features, VkPhysicalDevice phys, const char *profile);
// First queue family that computes, or UINT32_MAX.
uint32_t keel_compute_family(VkPhysicalDevice phys, uint32_t *timestamp_bits);
// Bytes left of the heap that device memory comes from; the heap's size where the driver cannot tell.
uint64_t keel_heap_free(VkPhysicalDevice phys, uint32_t memory_heap, bool has_budget);
// Heap of the best memory type for KEEL_HEAP_DEVICE.
uint32_t keel_main_heap(const VkPhysicalDeviceMemoryProperties *mem, bool unified);

// --- estimate.c ----------------------------------------------------------------------------------

// Sets the rates from measured peaks, or careful ones where they are 0.
void keel_cost_init(struct cost_model *m, double gflops, double gbps);
// Place in the model of work with this label (static storage) and cost; made at first use.
uint32_t keel_cost_find(struct cost_model *m, const char *label, uint64_t flops, uint64_t bytes);
double keel_cost_ns(const struct cost_model *m, uint32_t kind, uint64_t flops, uint64_t bytes);
// Learns from a submission that took `ns`: est_ns[i] is what kind i was expected to take in it, n kinds.
void keel_cost_learn(struct cost_model *m, const double *est_ns, uint32_t n, double ns);

// --- speed.c -------------------------------------------------------------------------------------

// Speeds measured earlier on this device and driver. False if there are none.
bool keel_speed_load(keel_device *dev);
void keel_speed_save(const keel_device *dev);
// Decides by a short measurement whether variants with caps.exchange may pay; clears the flag if not or if they compute wrong. On a CPU only what is
// plainly slower goes: the doctor times each family of ops.
keel_status keel_speed_choose(keel_device *dev);

// --- memory.c ------------------------------------------------------------------------------------

// The view of a span as texels, made at first use. Errors: NO_MEMORY, DEVICE.
keel_status keel_texel_view(keel_device *dev, struct keel_span s, bool is_float, VkBufferView *out);
void keel_memory_free_all(keel_device *dev); // at destruction: whatever heaps are left

// --- transfer.c ----------------------------------------------------------------------------------

void keel_transfer_finish(keel_device *dev);

// --- sentinel.c ----------------------------------------------------------------------------------

// The word of one submission, from `*heap`, which is made at first use; `index` counts them. Errors: NO_MEMORY.
keel_status keel_sentinel_alloc(keel_device *dev, keel_heap **heap, uint32_t index, struct keel_span *mark);
void keel_sentinel_clear(keel_device *dev, struct keel_span mark); // before the submission
void keel_sentinel_record(keel_device *dev, VkCommandBuffer cmd, struct keel_span mark); // last, after a barrier
// After the submission ended. Errors: DEVICE_LOST, logged.
keel_status keel_sentinel_check(keel_device *dev, struct keel_span mark);

// --- fault.c -------------------------------------------------------------------------------------

// Errors: ARG (not understood). NULL or "": none.
keel_status keel_fault_init(keel_device *dev, const char *text);
// Whether this shader, or the submission that comes now, is to fail so.
bool keel_fault_shader(const keel_device *dev, enum fault_kind kind, const char *shader);
bool keel_fault_submission(const keel_device *dev, enum fault_kind kind);
// Fills new memory that the host sees: 255 makes it NaN, and what reads memory before writing it shows.
void keel_fault_memory(const keel_device *dev, void *host, uint64_t bytes);

// --- reflect.c -----------------------------------------------------------------------------------

struct shader_needs keel_reflect(const uint32_t *code, uint32_t words);

// --- pipeline.c ----------------------------------------------------------------------------------

keel_status keel_pipelines_init(keel_device *dev);
void keel_pipelines_finish(keel_device *dev);
// Finds or makes the pipeline of a dispatch. Errors: ARG (the dispatch does not fit the shader), DEVICE.
// The same without compiling it, and then all such ones, several at once.
keel_status keel_pipeline_find(keel_device *dev, const struct keel_dispatch *d, struct pipeline **out);
void keel_pipelines_compile(keel_device *dev);
keel_status keel_pipeline_get(keel_device *dev, const struct keel_dispatch *d, struct pipeline **out);

// --- profile.c -----------------------------------------------------------------------------------

// Books what ran: start_ns of a dispatch is by the device's clock, of a submission by the host's.
void keel_profile_add(keel_device *dev, struct keel_profile_event event);
// Sets the clocks to each other: `device_ns` by the device's was `host_ns`. Only the first call since the reset counts.
void keel_profile_set_clock(keel_device *dev, double device_ns, uint64_t host_ns);
void keel_profile_finish(keel_device *dev);

// --- hazards.c -----------------------------------------------------------------------------------

#define HAZARDS_MOST 64u // ranges remembered since the last barrier; beyond it a barrier is cheaper than a long search

struct range {
    const struct keel_block *block;
    uint64_t lo, hi;
};

struct range_list {
    struct range items[HAZARDS_MOST];
    uint32_t n;
};

struct hazards {
    VkPipelineStageFlags stages; // that did work since the last barrier
    struct range_list written, read;
};

// Whether a command with these bindings needs a barrier before it: it reads what earlier ones wrote (RAW), or writes what they
// wrote or read (WAW, WAR).
bool keel_hazards_meet(const struct hazards *h, const struct keel_bind *binds, uint32_t n);
// After the barrier, if there was one: remembers what the command touches. At most HAZARDS_MOST ranges fit; meet() sees to it.
void keel_hazards_add(struct hazards *h, const struct keel_bind *binds, uint32_t n, VkPipelineStageFlags stage);
void keel_hazards_clear(struct hazards *h);

// --- descriptors.c -------------------------------------------------------------------------------

#define POOL_SETS 256u // descriptor sets in one pool, all of one layout

// Descriptor sets of one layout. They are allocated once and written again for each list: allocating costs some drivers 10 us a
// set (lavapipe 26.1.6), writing next to nothing.
struct set_list {
    VkDescriptorPool *pools;
    VkDescriptorSet *sets; // POOL_SETS from each pool
    uint32_t n_pools, used;
};

// The next free set of a list, written for a dispatch. The layout is layout_index()'s, the same for all calls on a list.
keel_status keel_sets_next(keel_device *dev, struct set_list *l, uint32_t layout, const struct keel_dispatch *d,
                           const struct pipeline *p, VkDescriptorSet *set);
void keel_sets_free(keel_device *dev, struct set_list *l);

#endif
