// SPDX-License-Identifier: MIT
// device/caps.c: from Vulkan's properties to keel_caps, and the clamp profiles that make a desktop driver look like a small
// device. Limits of the profiles: docs/devices.md.
#include "internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define MIB (1024ull * 1024)

// A limit of 0 leaves the device's own. Features can only be taken away.
struct clamp {
    const char *name;
    uint32_t workgroup, shared, push, bindings, align, subgroup;
    uint64_t range, buffer;
    bool no_subgroup, no_arith, no_storage16, no_storage8, no_float16, no_int8, no_dot, no_unified, soft_half;
};

static const struct clamp clamps[] = {
    // what every Vulkan 1.1 device promises
    {.name = "min", .workgroup = 128, .shared = 16384, .push = 128, .bindings = 8, .align = 256, .range = 128 * MIB,
     .buffer = 128 * MIB, .no_subgroup = true, .no_arith = true, .no_storage16 = true, .no_storage8 = true,
     .no_float16 = true, .no_int8 = true, .no_dot = true, .soft_half = true},
    // Raspberry Pi 5, V3DV
    {.name = "rpi", .workgroup = 256, .shared = 16384, .push = 128, .bindings = 8, .align = 256, .subgroup = 16,
     .range = 1024 * MIB, .buffer = 1024 * MIB, .no_arith = true, .no_float16 = true, .no_int8 = true, .no_dot = true},
    // Mali Valhall, panvk
    {.name = "mali", .workgroup = 512, .shared = 32768, .push = 128, .subgroup = 16, .buffer = 1024 * MIB,
     .no_arith = true, .no_float16 = true, .no_dot = true},
    // a card whose memory the host cannot write, and the tile sizes that GPUs get
    {.name = "discrete", .no_unified = true, .no_subgroup = true, .no_arith = true},
};

static const struct clamp *find_clamp(const char *name)
{
    for (size_t i = 0; name && i < KEEL_COUNT(clamps); ++i) {
        if (strcmp(clamps[i].name, name) == 0) {
            return &clamps[i];
        }
    }
    return NULL;
}

bool keel_profile_known(const char *name)
{
    return !name || !name[0] || find_clamp(name);
}

static void clamp_u32(uint32_t *value, uint32_t most)
{
    if (most > 0 && *value > most) {
        *value = most;
    }
}

static void apply_clamp(struct keel_caps *c, const struct clamp *k)
{
    snprintf(c->profile, sizeof(c->profile), "%s", k->name);
    clamp_u32(&c->max_workgroup, k->workgroup);
    clamp_u32(&c->max_shared, k->shared);
    clamp_u32(&c->max_push, k->push);
    clamp_u32(&c->max_bindings, k->bindings);
    c->subgroup_size = k->no_subgroup ? 0 : c->subgroup_size;
    clamp_u32(&c->subgroup_size, k->subgroup);
    c->offset_align = KEEL_MAX(c->offset_align, k->align);
    c->max_range = k->range ? KEEL_MIN(c->max_range, k->range) : c->max_range;
    c->max_buffer = k->buffer ? KEEL_MIN(c->max_buffer, k->buffer) : c->max_buffer;
    c->subgroup_arith = c->subgroup_arith && !k->no_arith;
    c->exchange = c->exchange && !k->no_subgroup && !k->no_arith;
    c->storage16 = c->storage16 && !k->no_storage16;
    c->storage8 = c->storage8 && !k->no_storage8;
    c->float16 = c->float16 && !k->no_float16;
    c->int8 = c->int8 && !k->no_int8;
    c->soft_half = c->soft_half || k->soft_half;
    c->int_dot = c->int_dot && !k->no_dot;
    c->int_dot_fast = c->int_dot_fast && c->int_dot;
    c->coop.m = c->subgroup_arith && c->float16 ? c->coop.m : 0;
    if (k->no_unified) {
        c->unified = false;
        snprintf(c->kind, sizeof(c->kind), "discrete");
    }
}

// Lavapipe of Mesa 22.3.6 with LLVM 15 on arm64 (Debian 12) hands LLVM a conversion of halves that ends the process: "Cannot select:
// v4f32 = AArch64ISD::VLSHR". Mesa 25.0.7 with LLVM 19 does not; which release mended it is not known. x86 is not affected.
static bool breaks_halves(const char *driver)
{
#if defined(__x86_64__) || defined(__i386__)
    (void)driver;
    return false;
#else
    unsigned major = 0;
    return sscanf(driver, "llvmpipe, Mesa %u", &major) == 1 && major < 25;
#endif
}

// --- queries -------------------------------------------------------------------------------------

struct extension_list {
    VkExtensionProperties items[512];
    uint32_t n;
};

static void list_extensions(struct extension_list *l, VkPhysicalDevice phys)
{
    l->n = KEEL_COUNT(l->items);
    VkResult r = vkEnumerateDeviceExtensionProperties(phys, NULL, &l->n, l->items);
    if (r != VK_SUCCESS && r != VK_INCOMPLETE) {
        l->n = 0;
    }
}

static bool has_extension(const struct extension_list *l, const char *name)
{
    for (uint32_t i = 0; i < l->n; ++i) {
        if (strcmp(l->items[i].extensionName, name) == 0) {
            return true;
        }
    }
    return false;
}

// Puts a structure in front of a pNext chain.
static void chain(void *head, void *node)
{
    VkBaseOutStructure *h = head, *n = node;
    n->pNext = h->pNext;
    h->pNext = n;
}

// Notes an extension to enable if the device has it; true if its structures may be used.
static bool want(struct feature_set *f, const struct extension_list *l, const char *name, bool core)
{
    if (has_extension(l, name)) {
        KEEL_ASSERT(f->n_extensions < KEEL_COUNT(f->extensions));
        f->extensions[f->n_extensions++] = name;
        return true;
    }
    return core;
}

uint32_t keel_compute_family(VkPhysicalDevice phys, uint32_t *timestamp_bits)
{
    VkQueueFamilyProperties fam[32];
    uint32_t n = KEEL_COUNT(fam);
    vkGetPhysicalDeviceQueueFamilyProperties(phys, &n, fam);
    for (uint32_t i = 0; i < n; ++i) {
        if ((fam[i].queueFlags & VK_QUEUE_COMPUTE_BIT) && fam[i].queueCount > 0) {
            *timestamp_bits = fam[i].timestampValidBits;
            return i;
        }
    }
    *timestamp_bits = 0;
    return UINT32_MAX;
}

static uint64_t largest_local_heap(const VkPhysicalDeviceMemoryProperties *mem)
{
    uint64_t most = 0;
    for (uint32_t i = 0; i < mem->memoryHeapCount; ++i) {
        if (mem->memoryHeaps[i].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) {
            most = KEEL_MAX(most, mem->memoryHeaps[i].size);
        }
    }
    return most;
}

// Device memory that the host can write, and enough of it: a card without a resizable BAR shows only a 256 MiB window.
static bool is_unified(const VkPhysicalDeviceMemoryProperties *mem)
{
    const VkMemoryPropertyFlags both = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT | VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT;
    const uint64_t largest = largest_local_heap(mem);
    for (uint32_t i = 0; i < mem->memoryTypeCount; ++i) {
        if ((mem->memoryTypes[i].propertyFlags & both) == both
            && mem->memoryHeaps[mem->memoryTypes[i].heapIndex].size >= largest / 10 * 9) {
            return true;
        }
    }
    return false;
}

uint32_t keel_main_heap(const VkPhysicalDeviceMemoryProperties *mem, bool unified)
{
    const VkMemoryPropertyFlags need = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
        | (unified ? VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT : 0);
    uint32_t best = 0;
    uint64_t most = 0;
    for (uint32_t i = 0; i < mem->memoryTypeCount; ++i) {
        const uint32_t h = mem->memoryTypes[i].heapIndex;
        if ((mem->memoryTypes[i].propertyFlags & need) == need && mem->memoryHeaps[h].size > most) {
            most = mem->memoryHeaps[h].size;
            best = h;
        }
    }
    return best;
}

uint64_t keel_heap_free(VkPhysicalDevice phys, uint32_t memory_heap, bool has_budget)
{
    VkPhysicalDeviceMemoryBudgetPropertiesEXT budget = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
    VkPhysicalDeviceMemoryProperties2 mem = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2,
                                             .pNext = has_budget ? &budget : NULL};
    vkGetPhysicalDeviceMemoryProperties2(phys, &mem);
    const uint64_t size = mem.memoryProperties.memoryHeaps[memory_heap].size;
    if (!has_budget || budget.heapBudget[memory_heap] == 0) {
        return size;
    }
    const uint64_t usage = budget.heapUsage[memory_heap], total = KEEL_MIN(budget.heapBudget[memory_heap], size);
    return total > usage ? total - usage : 0;
}

static const char *kind_name(VkPhysicalDeviceType type)
{
    switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_CPU:
        return "cpu";
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
        return "integrated";
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
        return "discrete";
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU:
        return "virtual";
    default:
        return "other";
    }
}

// --- reading -------------------------------------------------------------------------------------

static void read_limits(struct keel_caps *c, const VkPhysicalDeviceProperties *p, uint64_t max_alloc)
{
    const VkPhysicalDeviceLimits *l = &p->limits;
    snprintf(c->name, sizeof(c->name), "%.127s", p->deviceName);
    snprintf(c->kind, sizeof(c->kind), "%s", kind_name(p->deviceType));
    c->api_major = VK_API_VERSION_MAJOR(p->apiVersion);
    c->api_minor = VK_API_VERSION_MINOR(p->apiVersion);
    c->vendor_id = p->vendorID;
    c->device_id = p->deviceID;
    c->driver_version = p->driverVersion;
    c->max_workgroup = KEEL_MIN(l->maxComputeWorkGroupInvocations, l->maxComputeWorkGroupSize[0]);
    c->max_shared = l->maxComputeSharedMemorySize;
    c->max_push = l->maxPushConstantsSize;
    c->max_bindings = KEEL_MIN(l->maxPerStageDescriptorStorageBuffers, l->maxDescriptorSetStorageBuffers);
    c->max_groups = l->maxComputeWorkGroupCount[0];
    // Larger ones work on some drivers, but none of keel's tensors needs them and few drivers are tested there.
    c->max_range = KEEL_MIN((uint64_t)l->maxStorageBufferRange, 1024 * MIB);
    c->max_buffer = KEEL_MIN(max_alloc, 1024 * MIB);
    c->offset_align = (uint32_t)KEEL_MAX(l->minStorageBufferOffsetAlignment, 4u);
    c->timestamp_ns = (double)l->timestampPeriod;
}

static void read_memory(struct keel_caps *c, VkPhysicalDevice phys, bool budget)
{
    VkPhysicalDeviceMemoryProperties mem;
    vkGetPhysicalDeviceMemoryProperties(phys, &mem);
    const VkMemoryPropertyFlags cached = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
    for (uint32_t i = 0; i < mem.memoryTypeCount; ++i) {
        c->host_cached = c->host_cached || (mem.memoryTypes[i].propertyFlags & cached) == cached;
    }
    c->unified = c->unified && is_unified(&mem);
    const uint32_t heap = keel_main_heap(&mem, c->unified);
    c->heap = mem.memoryHeaps[heap].size;
    c->heap_free = keel_heap_free(phys, heap, budget);
}

static void read_features(struct keel_caps *c, struct feature_set *f, VkPhysicalDevice phys,
                          const struct extension_list *ext, uint32_t api)
{
    const bool v12 = api >= VK_API_VERSION_1_2, v13 = api >= VK_API_VERSION_1_3;
    VkPhysicalDeviceFeatures2 q = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2};
    f->storage16.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES;
    f->storage8.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_8BIT_STORAGE_FEATURES;
    f->float16_int8.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES;
    f->dot.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES;
    chain(&q, &f->storage16);
    if (want(f, ext, VK_KHR_8BIT_STORAGE_EXTENSION_NAME, v12)) {
        chain(&q, &f->storage8);
    }
    if (want(f, ext, VK_KHR_SHADER_FLOAT16_INT8_EXTENSION_NAME, v12)) {
        chain(&q, &f->float16_int8);
    }
    if (want(f, ext, VK_KHR_SHADER_INTEGER_DOT_PRODUCT_EXTENSION_NAME, v13)) {
        chain(&q, &f->dot);
    }
    // Asked for all at once: without one the others are of no use.
    f->coop.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR;
    f->memory_model.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_MEMORY_MODEL_FEATURES;
    f->subgroup_size.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES;
    if (v12 && (v13 || has_extension(ext, VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME))
        && want(f, ext, VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME, false)) {
        (void)want(f, ext, VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME, true);
        chain(&q, &f->coop);
        chain(&q, &f->memory_model);
        chain(&q, &f->subgroup_size);
    }
    f->budget = want(f, ext, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME, false);
    (void)want(f, ext, "VK_KHR_portability_subset", false); // must be enabled where it is listed (MoltenVK)
    vkGetPhysicalDeviceFeatures2(phys, &q);
    c->exchange = true; // until the properties say otherwise
    c->storage16 = f->storage16.storageBuffer16BitAccess;
    c->storage8 = f->storage8.storageBuffer8BitAccess;
    c->float16 = f->float16_int8.shaderFloat16;
    c->int8 = f->float16_int8.shaderInt8;
    c->int_dot = f->dot.shaderIntegerDotProduct;
    c->coop.m = c->float16 && f->coop.cooperativeMatrix && f->memory_model.vulkanMemoryModel && f->subgroup_size.subgroupSizeControl
        && f->subgroup_size.computeFullSubgroups; // and a shape that fits: read_coop()
}

// The largest shape of f16 products into f32 by a subgroup, of those that the tiles of shaders/linear/linear_coop.comp are made of.
static void read_coop(struct keel_caps *c, VkPhysicalDevice phys)
{
    VkCooperativeMatrixPropertiesKHR shape[64];
    uint32_t n = KEEL_COUNT(shape), most = 0;
    // By name: older loaders of functions do not know it.
    PFN_vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR get = (PFN_vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR)(void (*)(void))
        vkGetInstanceProcAddr(volkGetLoadedInstance(), "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR");
    c->coop.m = 0;
    for (uint32_t i = 0; i < n; ++i) {
        shape[i] = (VkCooperativeMatrixPropertiesKHR){.sType = VK_STRUCTURE_TYPE_COOPERATIVE_MATRIX_PROPERTIES_KHR};
    }
    const VkResult r = get ? get(phys, &n, shape) : VK_ERROR_EXTENSION_NOT_PRESENT;
    for (uint32_t i = 0; i < n && (r == VK_SUCCESS || r == VK_INCOMPLETE); ++i) {
        const VkCooperativeMatrixPropertiesKHR *s = &shape[i];
        const bool fits = s->AType == VK_COMPONENT_TYPE_FLOAT16_KHR && s->BType == s->AType && s->CType == VK_COMPONENT_TYPE_FLOAT32_KHR
            && s->ResultType == s->CType && s->scope == VK_SCOPE_SUBGROUP_KHR && (s->MSize == 8 || s->MSize == 16)
            && (s->NSize == 8 || s->NSize == 16) && (s->KSize == 8 || s->KSize == 16 || s->KSize == 32);
        if (fits && s->MSize * s->NSize * s->KSize > most) {
            most = s->MSize * s->NSize * s->KSize;
            c->coop.m = s->MSize;
            c->coop.n = s->NSize;
            c->coop.k = s->KSize;
        }
    }
}

static void read_properties(struct keel_caps *c, VkPhysicalDevice phys, const struct extension_list *ext, uint32_t api)
{
    VkPhysicalDeviceProperties2 q = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2};
    VkPhysicalDeviceIDProperties id = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES};
    VkPhysicalDeviceSubgroupProperties sub = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES};
    VkPhysicalDeviceMaintenance3Properties m3 = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES};
    VkPhysicalDeviceDriverProperties drv = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES};
    VkPhysicalDeviceShaderIntegerDotProductProperties dot = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_PROPERTIES};
    VkPhysicalDeviceSubgroupSizeControlProperties sizes = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES};
    if (c->coop.m) {
        chain(&q, &sizes);
    }
    chain(&q, &id);
    chain(&q, &sub);
    chain(&q, &m3);
    const bool has_drv = api >= VK_API_VERSION_1_2 || has_extension(ext, VK_KHR_DRIVER_PROPERTIES_EXTENSION_NAME);
    if (has_drv) {
        chain(&q, &drv);
    }
    if (c->int_dot) {
        chain(&q, &dot);
    }
    vkGetPhysicalDeviceProperties2(phys, &q);

    read_limits(c, &q.properties, m3.maxMemoryAllocationSize);
    if (has_drv) {
        snprintf(c->driver, sizeof(c->driver), "%.60s, %.60s", drv.driverName, drv.driverInfo);
    } else {
        snprintf(c->driver, sizeof(c->driver), "driver %" PRIu32, q.properties.driverVersion);
    }
    c->soft_half = breaks_halves(c->driver);
    for (size_t i = 0; i < VK_UUID_SIZE; ++i) {
        snprintf(c->uuid + 2 * i, 3, "%02x", id.deviceUUID[i]);
    }
    if ((sub.supportedStages & VK_SHADER_STAGE_COMPUTE_BIT) && (sub.supportedOperations & VK_SUBGROUP_FEATURE_BASIC_BIT)) {
        c->subgroup_size = sub.subgroupSize;
        c->subgroup_arith = sub.supportedOperations & VK_SUBGROUP_FEATURE_ARITHMETIC_BIT;
        // Eight lanes share; a group of more than 64 would hold lanes that work on other parts of a sum.
        // Their operands are read as texels of 16 bytes, so a texel buffer must reach as far as a binding.
        c->exchange = c->exchange && q.properties.limits.maxTexelBufferElements >= c->max_range / 16 &&
                      (sub.supportedOperations & VK_SUBGROUP_FEATURE_SHUFFLE_BIT) && sub.subgroupSize >= 8 && sub.subgroupSize <= 64;
    } else {
        c->exchange = false;
    }
    c->int_dot_fast = c->int_dot && dot.integerDotProduct4x8BitPackedSignedAccelerated;
    if (c->coop.m) {
        read_coop(c, phys);
        c->coop.m = c->subgroup_arith && (sizes.requiredSubgroupSizeStages & VK_SHADER_STAGE_COMPUTE_BIT) ? c->coop.m : 0;
    }
}

// Leaves on only what the caps say, so that a shader that uses more fails under validation.
static void keep_features(struct feature_set *f, const struct keel_caps *c)
{
    f->storage16 = (VkPhysicalDevice16BitStorageFeatures){.sType = f->storage16.sType, .storageBuffer16BitAccess = c->storage16};
    f->storage8 = (VkPhysicalDevice8BitStorageFeatures){.sType = f->storage8.sType, .storageBuffer8BitAccess = c->storage8};
    f->float16_int8 = (VkPhysicalDeviceShaderFloat16Int8Features){
        .sType = f->float16_int8.sType, .shaderFloat16 = c->float16, .shaderInt8 = c->int8};
    f->dot = (VkPhysicalDeviceShaderIntegerDotProductFeatures){.sType = f->dot.sType, .shaderIntegerDotProduct = c->int_dot};
    f->coop = (VkPhysicalDeviceCooperativeMatrixFeaturesKHR){.sType = f->coop.sType, .cooperativeMatrix = c->coop.m > 0};
    f->memory_model = (VkPhysicalDeviceVulkanMemoryModelFeatures){.sType = f->memory_model.sType, .vulkanMemoryModel = c->coop.m > 0};
    f->subgroup_size = (VkPhysicalDeviceSubgroupSizeControlFeatures){
        .sType = f->subgroup_size.sType, .subgroupSizeControl = c->coop.m > 0, .computeFullSubgroups = c->coop.m > 0};
}

void keel_caps_read(struct keel_caps *out, struct feature_set *features, VkPhysicalDevice phys, const char *profile)
{
    struct feature_set local = {0};
    struct feature_set *f = features ? features : &local;
    struct extension_list ext;
    struct keel_caps c = {0};
    uint32_t bits = 0;
    VkPhysicalDeviceProperties basic;
    const struct clamp *k = find_clamp(profile);
    *f = (struct feature_set){0};

    vkGetPhysicalDeviceProperties(phys, &basic);
    list_extensions(&ext, phys);
    read_features(&c, f, phys, &ext, basic.apiVersion);
    read_properties(&c, phys, &ext, basic.apiVersion);
    (void)keel_compute_family(phys, &bits);
    c.timestamps = bits > 0 && c.timestamp_ns > 0.0;
    c.unified = !(k && k->no_unified);
    read_memory(&c, phys, f->budget);
    if (k) {
        apply_clamp(&c, k);
    }
    keep_features(f, &c);
    *out = c;
}
