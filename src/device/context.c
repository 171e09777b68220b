// SPDX-License-Identifier: MIT
// device/context.c: the Vulkan instance, the list of devices, opening and closing one, and what to do when Vulkan fails.
// Does not own memory, pipelines or recordings; it only starts and ends them in the right order.
#define VOLK_IMPLEMENTATION
#include "internal.h"

#include "platform.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NO_VULKAN "install a Vulkan loader and a driver (on Debian: apt install libvulkan1 mesa-vulkan-drivers)"
#define VALIDATION_LAYER "VK_LAYER_KHRONOS_validation"

// --- failures ------------------------------------------------------------------------------------

static const char *result_text(VkResult r)
{
    switch (r) {
    case VK_ERROR_OUT_OF_HOST_MEMORY:
        return "out of host memory";
    case VK_ERROR_OUT_OF_DEVICE_MEMORY:
        return "out of device memory";
    case VK_ERROR_INITIALIZATION_FAILED:
        return "initialisation failed";
    case VK_ERROR_DEVICE_LOST:
        return "device lost";
    case VK_ERROR_MEMORY_MAP_FAILED:
        return "memory map failed";
    case VK_ERROR_LAYER_NOT_PRESENT:
        return "layer not present";
    case VK_ERROR_EXTENSION_NOT_PRESENT:
        return "extension not present";
    case VK_ERROR_FEATURE_NOT_PRESENT:
        return "feature not present";
    case VK_ERROR_INCOMPATIBLE_DRIVER:
        return "no compatible driver";
    case VK_ERROR_TOO_MANY_OBJECTS:
        return "too many objects";
    case VK_ERROR_FRAGMENTED_POOL:
        return "fragmented pool";
    case VK_ERROR_OUT_OF_POOL_MEMORY:
        return "out of pool memory";
    default:
        return "unknown error";
    }
}

keel_status keel_vk_failed(keel_device *dev, VkResult result, const char *what)
{
    if (result == VK_ERROR_DEVICE_LOST) {
        if (!dev->lost) {
            KEEL_ERROR(dev->log,
                       "%s: device lost during %s: the driver reset the GPU, often because one dispatch ran too long or "
                       "memory ran out; restart the command (from the last checkpoint), and see the kernel log for the cause",
                       dev->caps.name, what);
        }
        dev->lost = true;
        return KEEL_ERR_DEVICE_LOST;
    }
    KEEL_ERROR(dev->log, "%s: %s failed: %s (VkResult %d)", dev->caps.name, what, result_text(result), (int)result);
    return result == VK_ERROR_OUT_OF_HOST_MEMORY || result == VK_ERROR_OUT_OF_DEVICE_MEMORY ? KEEL_ERR_NO_MEMORY
                                                                                            : KEEL_ERR_DEVICE;
}

keel_status keel_wait_fence(keel_device *dev, VkFence fence, const char *what)
{
    const uint64_t minute = 60ull * 1000000000u;
    for (uint32_t minutes = 1;; ++minutes) {
        const VkResult r = dev->vk.vkWaitForFences(dev->handle, 1, &fence, VK_TRUE, minute);
        if (r == VK_SUCCESS) {
            return KEEL_OK;
        }
        if (r != VK_TIMEOUT) {
            return keel_vk_failed(dev, r, what);
        }
        KEEL_WARN(dev->log, "%s: %s has not finished after %" PRIu32 " min; still waiting", dev->caps.name, what, minutes);
    }
}

static VKAPI_ATTR VkBool32 VKAPI_CALL on_message(VkDebugUtilsMessageSeverityFlagBitsEXT severity,
                                                 VkDebugUtilsMessageTypeFlagsEXT types,
                                                 const VkDebugUtilsMessengerCallbackDataEXT *data, void *user)
{
    keel_device *dev = user;
    if (types & VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT) {
        atomic_fetch_add(&dev->validation, 1);
        KEEL_ERROR(dev->log, "validation: %s", data->pMessage);
    } else {
        // The loader and drivers use this channel too; not about keel's calls.
        KEEL_DEBUG(dev->log, "vulkan: %s", data->pMessage);
    }
    (void)severity;
    return VK_FALSE;
}

// --- instance ------------------------------------------------------------------------------------

// volk's function pointers are global. They are trampolines of the loader, the same for every instance, so the first
// instance loads them for good.
static keel_status load_volk(VkInstance instance, const keel_log *log)
{
    static atomic_flag busy = ATOMIC_FLAG_INIT;
    static bool loader, functions;
    keel_status st = KEEL_OK;
    while (atomic_flag_test_and_set(&busy)) {
    }
    if (!loader && volkInitialize() != VK_SUCCESS) {
        KEEL_FAIL(log, KEEL_ERR_NO_DEVICE, "no Vulkan loader (libvulkan.so.1) on this machine; " NO_VULKAN);
    }
    loader = true;
    if (instance && !functions) {
        volkLoadInstanceOnly(instance);
        functions = true;
    }
out:
    atomic_flag_clear(&busy);
    return st;
}

static bool has_instance_extension(const char *name)
{
    VkExtensionProperties ext[128];
    uint32_t n = KEEL_COUNT(ext);
    const VkResult r = vkEnumerateInstanceExtensionProperties(NULL, &n, ext);
    for (uint32_t i = 0; (r == VK_SUCCESS || r == VK_INCOMPLETE) && i < n; ++i) {
        if (strcmp(ext[i].extensionName, name) == 0) {
            return true;
        }
    }
    return false;
}

static bool has_layer(const char *name)
{
    VkLayerProperties layers[64];
    uint32_t n = KEEL_COUNT(layers);
    const VkResult r = vkEnumerateInstanceLayerProperties(&n, layers);
    for (uint32_t i = 0; (r == VK_SUCCESS || r == VK_INCOMPLETE) && i < n; ++i) {
        if (strcmp(layers[i].layerName, name) == 0) {
            return true;
        }
    }
    return false;
}

// `dev` is who receives validation messages, NULL for no validation.
static keel_status create_instance(VkInstance *out, keel_device *dev, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const char *layers[] = {VALIDATION_LAYER}, *extensions[2];
    const VkApplicationInfo app = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO, .pApplicationName = "keel",
                                   .pEngineName = "keel", .apiVersion = VK_API_VERSION_1_3};
    VkDebugUtilsMessengerCreateInfoEXT messenger = {
        .sType = VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT,
        .messageSeverity = VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT | VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT,
        .messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_GENERAL_BIT_EXT | VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT,
        .pfnUserCallback = on_message,
        .pUserData = dev,
    };
    // Hazards between dispatches are what the recorder derives barriers for, so have the layer look for them.
    const VkValidationFeatureEnableEXT sync = VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT;
    const VkValidationFeaturesEXT features = {.sType = VK_STRUCTURE_TYPE_VALIDATION_FEATURES_EXT, .pNext = &messenger,
                                              .enabledValidationFeatureCount = 1, .pEnabledValidationFeatures = &sync};
    VkInstanceCreateInfo info = {.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, .pApplicationInfo = &app,
                                 .ppEnabledExtensionNames = extensions, .ppEnabledLayerNames = layers};
    *out = VK_NULL_HANDLE;
    KEEL_TRY(load_volk(VK_NULL_HANDLE, log));
    if (!vkEnumerateInstanceVersion) {
        KEEL_FAIL(log, KEEL_ERR_NO_DEVICE, "the Vulkan loader is older than Vulkan 1.1; " NO_VULKAN);
    }
    if (has_instance_extension("VK_KHR_portability_enumeration")) {
        extensions[info.enabledExtensionCount++] = "VK_KHR_portability_enumeration";
        info.flags |= 0x00000001; // VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
    }
    if (dev) {
        if (!has_layer(VALIDATION_LAYER)) {
            KEEL_FAIL(log, KEEL_ERR_DEVICE, "the Vulkan validation layer is not installed; on Debian: apt install "
                                            "vulkan-validationlayers, or run without validation");
        }
        extensions[info.enabledExtensionCount++] = VK_EXT_DEBUG_UTILS_EXTENSION_NAME;
        info.enabledLayerCount = 1;
        info.pNext = &features;
    }
    const VkResult r = vkCreateInstance(&info, NULL, out);
    if (r != VK_SUCCESS) {
        *out = VK_NULL_HANDLE;
        KEEL_FAIL(log, KEEL_ERR_NO_DEVICE, "no usable Vulkan driver: %s (VkResult %d); " NO_VULKAN, result_text(r), (int)r);
    }
    KEEL_TRY(load_volk(*out, log));
    if (dev) {
        PFN_vkCreateDebugUtilsMessengerEXT create =
            (PFN_vkCreateDebugUtilsMessengerEXT)vkGetInstanceProcAddr(*out, "vkCreateDebugUtilsMessengerEXT");
        if (!create || create(*out, &messenger, NULL, &dev->messenger) != VK_SUCCESS) {
            KEEL_FAIL(log, KEEL_ERR_DEVICE, "the Vulkan loader offers no debug messages; run without validation");
        }
    }
out:
    return st;
}

// Physical devices that keel can use: Vulkan 1.1 and a compute queue.
static keel_status usable_devices(VkInstance instance, VkPhysicalDevice out[MAX_DEVICES], uint32_t *n, const keel_log *log)
{
    VkPhysicalDevice all[MAX_DEVICES];
    uint32_t n_all = MAX_DEVICES, bits, too_old = 0;
    const VkResult r = vkEnumeratePhysicalDevices(instance, &n_all, all);
    *n = 0;
    for (uint32_t i = 0; (r == VK_SUCCESS || r == VK_INCOMPLETE) && i < n_all; ++i) {
        VkPhysicalDeviceProperties p;
        vkGetPhysicalDeviceProperties(all[i], &p);
        if (p.apiVersion < VK_API_VERSION_1_1 || keel_compute_family(all[i], &bits) == UINT32_MAX) {
            ++too_old;
            continue;
        }
        out[(*n)++] = all[i];
    }
    if (*n == 0) {
        KEEL_ERROR(log, "no usable Vulkan device: %" PRIu32 " found without Vulkan 1.1 and a compute queue; " NO_VULKAN,
                   too_old);
        return KEEL_ERR_NO_DEVICE;
    }
    return KEEL_OK;
}

keel_status keel_device_list(struct keel_caps *out, size_t cap, size_t *n, const keel_log *log)
{
    keel_status st = KEEL_OK;
    VkInstance instance = VK_NULL_HANDLE;
    VkPhysicalDevice phys[MAX_DEVICES];
    uint32_t count = 0;
    *n = 0;
    KEEL_TRY(create_instance(&instance, NULL, log));
    KEEL_TRY(usable_devices(instance, phys, &count, log));
    for (uint32_t i = 0; i < count && i < cap; ++i) {
        keel_caps_read(&out[i], NULL, phys[i], NULL);
        out[i].index = i;
    }
    *n = count;
out:
    if (instance) {
        vkDestroyInstance(instance, NULL);
    }
    return st;
}

// --- opening -------------------------------------------------------------------------------------

static keel_status open_device(keel_device *dev, VkPhysicalDevice phys, uint32_t index, const char *profile)
{
    keel_status st = KEEL_OK;
    struct feature_set f;
    VkPhysicalDeviceProperties props;
    uint32_t bits = 0;
    const float priority = 1.0f;
    dev->phys = phys;
    dev->family = keel_compute_family(phys, &bits);
    keel_caps_read(&dev->caps, &f, phys, profile);
    dev->caps.index = index;
    dev->has_budget = f.budget;
    dev->timestamp_mask = bits >= 64 ? UINT64_MAX : ((uint64_t)1 << bits) - 1;
    vkGetPhysicalDeviceProperties(phys, &props);
    vkGetPhysicalDeviceMemoryProperties(phys, &dev->memory);
    dev->atom = KEEL_MAX(props.limits.nonCoherentAtomSize, 1u);
    memcpy(dev->cache_uuid, props.pipelineCacheUUID, VK_UUID_SIZE);

    VkPhysicalDeviceFeatures2 enable = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, .pNext = &f.storage16};
    void **tail = &f.storage16.pNext;
    *tail = NULL;
    if (dev->caps.storage8) {
        *tail = &f.storage8;
        tail = &f.storage8.pNext;
    }
    if (dev->caps.float16 || dev->caps.int8) {
        *tail = &f.float16_int8;
        tail = &f.float16_int8.pNext;
    }
    if (dev->caps.int_dot) {
        *tail = &f.dot;
        tail = &f.dot.pNext;
    }
    if (dev->caps.coop.m) {
        *tail = &f.coop;
        f.coop.pNext = &f.memory_model;
        f.memory_model.pNext = &f.subgroup_size;
    }
    const VkDeviceQueueCreateInfo queue = {.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO,
                                           .queueFamilyIndex = dev->family, .queueCount = 1, .pQueuePriorities = &priority};
    const VkDeviceCreateInfo info = {.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, .pNext = &enable,
                                     .queueCreateInfoCount = 1, .pQueueCreateInfos = &queue,
                                     .enabledExtensionCount = f.n_extensions, .ppEnabledExtensionNames = f.extensions};
    const VkResult r = vkCreateDevice(phys, &info, NULL, &dev->handle);
    if (r != VK_SUCCESS) {
        dev->handle = VK_NULL_HANDLE;
        st = keel_vk_failed(dev, r, "opening the device");
        goto out;
    }
    volkLoadDeviceTable(&dev->vk, dev->handle);
    dev->vk.vkGetDeviceQueue(dev->handle, dev->family, 0, &dev->queue);
    keel_cost_init(&dev->cost, 0.0, 0.0);
    KEEL_TRY(keel_pipelines_init(dev));
    if (!keel_speed_load(dev)) {
        KEEL_TRY(keel_speed_choose(dev));
    }
out:
    return st;
}

static bool contains_nocase(const char *text, const char *part)
{
    const size_t n = strlen(part);
    for (; *text; ++text) {
        size_t i = 0;
        while (i < n && text[i] && (text[i] | 32) == (part[i] | 32)) {
            ++i;
        }
        if (i == n) {
            return true;
        }
    }
    return n == 0;
}

// Each weight once for a token that is decoded, 0.6 bytes, and for ten of a prompt, 20 FLOP. The product is measured on few weights,
// which a cache may hold, so the memory bounds it.
double keel_device_weight_ns(const struct keel_caps *c)
{
    const double gbps = KEEL_MIN(c->matvec_gbps, c->gbps);
    return c->gflops > 0.0 && gbps > 0.0 ? 20.0 / c->gflops + 0.6 / gbps : (double)INFINITY;
}

// The fastest by measurement; speeds measured before come from the cache.
static uint32_t fastest(const keel_log *log, uint32_t n, bool no_cache)
{
    uint32_t best = 0;
    double best_ns = (double)INFINITY;
    for (uint32_t i = 0; i < n; ++i) {
        char index[16];
        keel_device *d = NULL;
        snprintf(index, sizeof(index), "%" PRIu32, i);
        const struct keel_device_params p = {.select = index, .no_cache = no_cache};
        if (keel_device_create(&d, &p, log) != KEEL_OK) {
            continue; // it was logged; another device may do
        }
        if (d->caps.matvec_gbps > 0.0 || keel_device_measure(d) == KEEL_OK) {
            const double ns = keel_device_weight_ns(&d->caps);
            KEEL_INFO(log, "device %" PRIu32 " %s: %.0f GFLOP/s, %.2f GB/s of weights", i, d->caps.name, d->caps.gflops, d->caps.matvec_gbps);
            if (ns < best_ns) {
                best_ns = ns;
                best = i;
            }
        }
        keel_device_destroy(&d);
    }
    return best;
}

static keel_status choose(uint32_t *out, const char *select, const VkPhysicalDevice *phys, uint32_t n, bool no_cache,
                          const keel_log *log)
{
    if (!select || !select[0]) {
        *out = n == 1 ? 0 : fastest(log, n, no_cache);
        return KEEL_OK;
    }
    char *end = NULL;
    const unsigned long index = strtoul(select, &end, 10);
    if (*end == '\0' && select[0] >= '0' && select[0] <= '9') {
        if (index < n) {
            *out = (uint32_t)index;
            return KEEL_OK;
        }
    }
    for (uint32_t i = 0; i < n; ++i) {
        VkPhysicalDeviceProperties p;
        vkGetPhysicalDeviceProperties(phys[i], &p);
        if (contains_nocase(p.deviceName, select)) {
            *out = i;
            return KEEL_OK;
        }
    }
    KEEL_ERROR(log, "no device matches \"%s\" among %" PRIu32 "; `keel devices` lists them, give an index or a part of a name",
               select, n);
    return KEEL_ERR_NO_DEVICE;
}

keel_status keel_device_create(keel_device **out, const struct keel_device_params *params, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct keel_device_params p = params ? *params : (struct keel_device_params){0};
    VkPhysicalDevice phys[MAX_DEVICES];
    uint32_t n = 0, index = 0;
    keel_device *dev = NULL;
    *out = NULL;
    if (!keel_profile_known(p.profile)) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "unknown clamp profile \"%s\"; there are min, rpi, mali and discrete", p.profile);
    }
    dev = calloc(1, sizeof(*dev));
    if (!dev) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "out of host memory while opening a device");
    }
    dev->log = log;
    dev->no_cache = p.no_cache;
    dev->memory_limit = p.memory_limit;
    dev->transfer.open = STAGE_NONE;
    KEEL_TRY(keel_fault_init(dev, p.fault));
    KEEL_TRY(create_instance(&dev->instance, p.validate ? dev : NULL, log));
    KEEL_TRY(usable_devices(dev->instance, phys, &n, log));
    KEEL_TRY(choose(&index, p.select, phys, n, p.no_cache, log));
    KEEL_TRY(open_device(dev, phys[index], index, p.profile));
    KEEL_DEBUG(log, "device %" PRIu32 ": %s, %s", index, dev->caps.name, dev->caps.driver);
    *out = dev;
    dev = NULL;
out:
    keel_device_destroy(&dev);
    return st;
}

void keel_device_destroy(keel_device **pdev)
{
    keel_device *dev = pdev ? *pdev : NULL;
    if (!dev) {
        return;
    }
    *pdev = NULL;
    if (dev->handle) {
        (void)dev->vk.vkDeviceWaitIdle(dev->handle);
        KEEL_DEBUG(dev->log, "%s: %" PRIu64 " dispatches, %" PRIu64 " barriers, %" PRIu64 " submissions, longest %.1f ms, peak %.1f MiB",
                   dev->caps.name, dev->n_dispatches, dev->n_barriers, dev->n_submits, (double)dev->longest_ns * 1e-6,
                   (double)dev->bytes_peak / (1024.0 * 1024.0));
        keel_transfer_finish(dev);
        keel_pipelines_finish(dev);
        keel_memory_free_all(dev);
        dev->vk.vkDestroyDevice(dev->handle, NULL);
    }
    keel_profile_finish(dev);
    if (dev->messenger) {
        PFN_vkDestroyDebugUtilsMessengerEXT destroy =
            (PFN_vkDestroyDebugUtilsMessengerEXT)vkGetInstanceProcAddr(dev->instance, "vkDestroyDebugUtilsMessengerEXT");
        if (destroy) {
            destroy(dev->instance, dev->messenger, NULL);
        }
    }
    if (dev->instance) {
        vkDestroyInstance(dev->instance, NULL);
    }
    free(dev);
}

// --- questions -----------------------------------------------------------------------------------

const struct keel_caps *keel_device_caps(const keel_device *dev)
{
    return &dev->caps;
}

uint8_t keel_device_choice(const keel_device *dev, uint32_t slot)
{
    KEEL_ASSERT(slot < KEEL_MAX_CHOICES);
    return dev->choices[slot];
}

void keel_device_choose(keel_device *dev, uint32_t slot, uint8_t choice)
{
    KEEL_ASSERT(slot < KEEL_MAX_CHOICES);
    dev->choices[slot] = choice;
}

const keel_log *keel_device_log(const keel_device *dev)
{
    return dev->log;
}

const keel_log *keel_device_set_log(keel_device *dev, const keel_log *log)
{
    const keel_log *old = dev->log;
    dev->log = log;
    return old;
}

void keel_device_memory(const keel_device *dev, uint64_t *now, uint64_t *peak)
{
    *now = dev->bytes_now;
    *peak = dev->bytes_peak;
}

void keel_device_reset_peak(keel_device *dev)
{
    dev->bytes_peak = dev->bytes_now;
}

uint32_t keel_device_validation_count(const keel_device *dev)
{
    return atomic_load(&dev->validation);
}

uint64_t keel_device_longest_submit_ns(const keel_device *dev)
{
    return dev->longest_ns;
}

uint64_t keel_device_busy_ns(const keel_device *dev)
{
    return dev->busy_ns;
}

void keel_device_counts(const keel_device *dev, uint64_t *dispatches, uint64_t *submits, uint64_t *barriers)
{
    *dispatches = dev->n_dispatches;
    *submits = dev->n_submits;
    *barriers = dev->n_barriers;
}
