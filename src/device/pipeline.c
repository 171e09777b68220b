// SPDX-License-Identifier: MIT
// device/pipeline.c: compute pipelines by shader and specialisation, made at first use and kept on disk between runs.
// Does not own shaders (they are data of the program).
#include "internal.h"

#include "platform.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CACHE_MOST (256u << 20) // a larger file is not ours
#define SPEC_SOFT_HALF 100u     // constant of shaders/common/half.glsl, set for all

// --- disk cache ----------------------------------------------------------------------------------

static bool cache_path(const keel_device *dev, char *out, size_t out_bytes)
{
    char dir[2048], uuid[2 * VK_UUID_SIZE + 1];
    if (dev->no_cache || !keel_cache_dir(dir, sizeof(dir))) {
        return false;
    }
    for (size_t i = 0; i < VK_UUID_SIZE; ++i) {
        snprintf(uuid + 2 * i, 3, "%02x", dev->cache_uuid[i]);
    }
    const int n = snprintf(out, out_bytes, "%s/pipelines-%s-%08" PRIx32 ".bin", dir, uuid, dev->caps.driver_version);
    return n > 0 && (size_t)n < out_bytes;
}

// The head that Vulkan prescribes; some drivers trust what follows it, so check it before they see it.
static bool cache_fits(const keel_device *dev, const uint8_t *data, size_t len)
{
    VkPipelineCacheHeaderVersionOne h;
    if (len < sizeof(h)) {
        return false;
    }
    memcpy(&h, data, sizeof(h));
    return h.headerSize >= sizeof(h) && h.headerSize <= len && h.headerVersion == VK_PIPELINE_CACHE_HEADER_VERSION_ONE
        && h.vendorID == dev->caps.vendor_id && h.deviceID == dev->caps.device_id
        && memcmp(h.pipelineCacheUUID, dev->cache_uuid, VK_UUID_SIZE) == 0;
}

// On disk: 8 bytes FNV-1a of the rest, then what the driver gave. A damaged or foreign file is ignored, and replaced at the end.
keel_status keel_pipelines_init(keel_device *dev)
{
    struct keel_map map = {0};
    VkPipelineCacheCreateInfo info = {.sType = VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO};
    char path[4096];
    if (cache_path(dev, path, sizeof(path)) && keel_path_exists(path)) {
        uint64_t sum = 0;
        const keel_log quiet = {.level = (enum keel_log_level)0};
        if (keel_map_open(&map, path, &quiet) == KEEL_OK && map.len_bytes > sizeof(sum) && map.len_bytes < CACHE_MOST) {
            memcpy(&sum, map.data, sizeof(sum));
            const uint8_t *data = map.data + sizeof(sum);
            const size_t len = map.len_bytes - sizeof(sum);
            if (sum == keel_hash(KEEL_HASH_INIT, data, len) && cache_fits(dev, data, len)) {
                info.pInitialData = data;
                info.initialDataSize = len;
            }
        }
        if (!info.pInitialData) {
            KEEL_DEBUG(dev->log, "%s: damaged or of another driver; it will be made anew", path);
        }
    }
    VkResult r = dev->vk.vkCreatePipelineCache(dev->handle, &info, NULL, &dev->pipelines.cache);
    if (r != VK_SUCCESS && info.pInitialData) {
        info.pInitialData = NULL;
        info.initialDataSize = 0;
        r = dev->vk.vkCreatePipelineCache(dev->handle, &info, NULL, &dev->pipelines.cache);
    }
    keel_map_close(&map);
    return r == VK_SUCCESS ? KEEL_OK : keel_vk_failed(dev, r, "making a pipeline cache");
}

static void save_cache(keel_device *dev)
{
    const keel_log quiet = {.level = (enum keel_log_level)0}; // a cache that cannot be written is not worth a word
    struct keel_file_out file = {0};
    char path[4096];
    uint8_t *data = NULL;
    size_t len = 0;
    if (dev->lost || dev->pipelines.n == 0 || !cache_path(dev, path, sizeof(path))
        || dev->vk.vkGetPipelineCacheData(dev->handle, dev->pipelines.cache, &len, NULL) != VK_SUCCESS || len == 0) {
        return;
    }
    data = malloc(len);
    if (data && dev->vk.vkGetPipelineCacheData(dev->handle, dev->pipelines.cache, &len, data) == VK_SUCCESS
        && keel_file_create(&file, path, &quiet) == KEEL_OK) {
        const uint64_t sum = keel_hash(KEEL_HASH_INIT, data, len);
        if (fwrite(&sum, sizeof(sum), 1, file.f) == 1 && fwrite(data, 1, len, file.f) == len) {
            (void)keel_file_commit(&file, &quiet);
        } else {
            keel_file_abort(&file);
        }
    }
    free(data);
}

void keel_pipelines_finish(keel_device *dev)
{
    struct pipeline_store *s = &dev->pipelines;
    save_cache(dev);
    for (uint32_t i = 0; i < s->cap; ++i) {
        if (s->slots[i]) {
            dev->vk.vkDestroyPipeline(dev->handle, s->slots[i]->handle, NULL);
            free(s->slots[i]);
        }
    }
    free(s->slots);
    for (uint32_t i = 0; i < N_LAYOUTS; ++i) {
        dev->vk.vkDestroyPipelineLayout(dev->handle, s->layouts[i], NULL);
        dev->vk.vkDestroyDescriptorSetLayout(dev->handle, s->set_layouts[i], NULL);
    }
    dev->vk.vkDestroyPipelineCache(dev->handle, s->cache, NULL);
    *s = (struct pipeline_store){0};
}

// --- making --------------------------------------------------------------------------------------

// The layout of n buffers, of which `texel` are texels, and the full push range: shared by all pipelines of the kind.
static keel_status get_layout(keel_device *dev, uint32_t n, uint32_t texel)
{
    struct pipeline_store *s = &dev->pipelines;
    VkDescriptorSetLayoutBinding bindings[KEEL_MAX_BINDS];
    const uint32_t k = layout_index(n, texel);
    if (s->layouts[k]) {
        return KEEL_OK;
    }
    for (uint32_t i = 0; i < n; ++i) {
        bindings[i] = (VkDescriptorSetLayoutBinding){.binding = i, .descriptorType = texel >> i & 1 ? VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER
                                                                                       : VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                                                     .descriptorCount = 1, .stageFlags = VK_SHADER_STAGE_COMPUTE_BIT};
    }
    const VkDescriptorSetLayoutCreateInfo set = {.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO,
                                                 .bindingCount = n, .pBindings = bindings};
    VkResult r = VK_SUCCESS;
    if (!s->set_layouts[k]) {
        r = dev->vk.vkCreateDescriptorSetLayout(dev->handle, &set, NULL, &s->set_layouts[k]);
    }
    if (r == VK_SUCCESS) {
        const VkPushConstantRange push = {.stageFlags = VK_SHADER_STAGE_COMPUTE_BIT, .size = KEEL_MAX_PUSH};
        const VkPipelineLayoutCreateInfo layout = {.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO, .setLayoutCount = 1,
                                                   .pSetLayouts = &s->set_layouts[k], .pushConstantRangeCount = 1,
                                                   .pPushConstantRanges = &push};
        r = dev->vk.vkCreatePipelineLayout(dev->handle, &layout, NULL, &s->layouts[k]);
    }
    return r == VK_SUCCESS ? KEEL_OK : keel_vk_failed(dev, r, "making a pipeline layout");
}

// Refuses what the device or the shader cannot take, before the driver sees it.
static keel_status check_dispatch(keel_device *dev, const struct keel_dispatch *d, const struct shader_needs *needs)
{
    keel_status st = KEEL_OK;
    const struct keel_caps *c = &dev->caps;
    if (!needs->ok) {
        KEEL_FAIL(dev->log, KEEL_ERR_ARG, "shader %s is no SPIR-V that keel can bind: one set, at most %d buffers and %d bytes of "
                  "push constants", d->shader->name, KEEL_MAX_BINDS, KEEL_MAX_PUSH);
    }
    if (needs->bindings > d->n_bind || d->n_bind > c->max_bindings) {
        KEEL_FAIL(dev->log, KEEL_ERR_ARG, "shader %s has %" PRIu32 " buffers, its dispatch binds %" PRIu32 ", the device allows %" PRIu32,
                  d->shader->name, needs->bindings, d->n_bind, c->max_bindings);
    }
    if (d->n_spec == 0 || d->spec[0] == 0 || d->spec[0] > c->max_workgroup) {
        KEEL_FAIL(dev->log, KEEL_ERR_ARG, "shader %s wants a workgroup of %" PRIu32 ", %s allows 1..%" PRIu32, d->shader->name,
                  d->n_spec ? d->spec[0] : 0, c->name, c->max_workgroup);
    }
out:
    return st;
}

// Fills in what the shader says; no driver compiles anything yet.
static keel_status describe(keel_device *dev, struct pipeline *p, const struct keel_dispatch *d)
{
    keel_status st = KEEL_OK;
    const struct shader_needs needs = keel_reflect(d->shader->code, d->shader->code_words);
    KEEL_TRY(check_dispatch(dev, d, &needs));
    KEEL_TRY(get_layout(dev, d->n_bind, needs.texel));
    p->shader = d->shader;
    p->n_bind = d->n_bind;
    p->n_spec = d->n_spec;
    p->subgroup = d->subgroup;
    memcpy(p->spec, d->spec, sizeof(p->spec));
    p->layout = dev->pipelines.layouts[layout_index(d->n_bind, needs.texel)];
    p->texel = needs.texel;
    p->texel_float = needs.texel_float;
    p->push_bytes = needs.push_bytes;
out:
    return st;
}

// From any thread, for different pipelines. Without a success there is no handle.
static VkResult compile(keel_device *dev, struct pipeline *p)
{
    VkSpecializationMapEntry entries[KEEL_MAX_SPEC + 1];
    uint32_t values[KEEL_MAX_SPEC + 1];
    VkShaderModule module = VK_NULL_HANDLE;
    for (uint32_t i = 0; i < p->n_spec; ++i) {
        entries[i] = (VkSpecializationMapEntry){.constantID = i, .offset = 4 * i, .size = 4};
        values[i] = p->spec[i];
    }
    // A constant that a shader does not have is ignored (Vulkan 1.1, 9.7).
    entries[p->n_spec] = (VkSpecializationMapEntry){.constantID = SPEC_SOFT_HALF, .offset = 4 * p->n_spec, .size = 4};
    values[p->n_spec] = dev->caps.soft_half;
    const VkSpecializationInfo spec = {.mapEntryCount = p->n_spec + 1, .pMapEntries = entries, .dataSize = 4u * (p->n_spec + 1),
                                       .pData = values};
    const VkShaderModuleCreateInfo code = {.sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO,
                                           .codeSize = 4u * p->shader->code_words, .pCode = p->shader->code};
    VkResult r = dev->vk.vkCreateShaderModule(dev->handle, &code, NULL, &module);
    if (keel_fault_shader(dev, FAULT_COMPILE, p->shader->name)) {
        r = VK_ERROR_UNKNOWN;
    }
    if (r == VK_SUCCESS) {
        const VkPipelineShaderStageRequiredSubgroupSizeCreateInfo lanes = {
            .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO, .requiredSubgroupSize = p->subgroup};
        const VkComputePipelineCreateInfo info = {
            .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
            .stage = {.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO, .pNext = p->subgroup ? &lanes : NULL,
                      .flags = p->subgroup ? VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT : 0,
                      .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                      .module = module, .pName = "main", .pSpecializationInfo = &spec},
            .layout = p->layout};
        r = dev->vk.vkCreateComputePipelines(dev->handle, dev->pipelines.cache, 1, &info, NULL, &p->handle);
    }
    p->handle = r == VK_SUCCESS ? p->handle : VK_NULL_HANDLE;
    dev->vk.vkDestroyShaderModule(dev->handle, module, NULL);
    return r;
}

// --- finding -------------------------------------------------------------------------------------

static uint64_t hash_of(const struct keel_dispatch *d)
{
    uint64_t h = (uint64_t)(uintptr_t)d->shader * 0x9e3779b97f4a7c15ull + d->n_bind + (uint64_t)d->subgroup * KEEL_MAX_BINDS * 2;
    for (uint32_t i = 0; i < d->n_spec; ++i) {
        h = (h ^ d->spec[i]) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
    }
    return h;
}

static bool matches(const struct pipeline *p, const struct keel_dispatch *d, uint64_t h)
{
    return p->hash == h && p->shader == d->shader && p->n_bind == d->n_bind && p->n_spec == d->n_spec && p->subgroup == d->subgroup
        && memcmp(p->spec, d->spec, 4u * d->n_spec) == 0;
}

static bool grow_store(struct pipeline_store *s)
{
    const uint32_t cap = s->cap ? 2 * s->cap : 256;
    struct pipeline **slots = calloc(cap, sizeof(struct pipeline *));
    if (!slots) {
        return false;
    }
    for (uint32_t i = 0; i < s->cap; ++i) {
        if (s->slots[i]) {
            uint32_t at = (uint32_t)s->slots[i]->hash & (cap - 1);
            while (slots[at]) {
                at = (at + 1) & (cap - 1);
            }
            slots[at] = s->slots[i];
        }
    }
    free(s->slots);
    s->slots = slots;
    s->cap = cap;
    return true;
}

keel_status keel_pipeline_find(keel_device *dev, const struct keel_dispatch *d, struct pipeline **out)
{
    struct pipeline_store *s = &dev->pipelines;
    const uint64_t h = hash_of(d);
    KEEL_ASSERT(d->n_spec <= KEEL_MAX_SPEC && d->n_bind <= KEEL_MAX_BINDS);
    if (2 * s->n >= s->cap && !grow_store(s)) {
        KEEL_ERROR(dev->log, "out of host memory for pipelines");
        return KEEL_ERR_NO_MEMORY;
    }
    uint32_t at = (uint32_t)h & (s->cap - 1);
    for (; s->slots[at]; at = (at + 1) & (s->cap - 1)) {
        if (matches(s->slots[at], d, h)) {
            *out = s->slots[at];
            return KEEL_OK;
        }
    }
    struct pipeline *p = calloc(1, sizeof(*p));
    if (!p) {
        KEEL_ERROR(dev->log, "out of host memory for a pipeline");
        return KEEL_ERR_NO_MEMORY;
    }
    const keel_status st = describe(dev, p, d);
    if (st != KEEL_OK) {
        free(p);
        return st;
    }
    p->hash = h;
    s->slots[at] = p;
    ++s->n;
    *out = p;
    return KEEL_OK;
}

keel_status keel_pipeline_get(keel_device *dev, const struct keel_dispatch *d, struct pipeline **out)
{
    const keel_status st = keel_pipeline_find(dev, d, out);
    const VkResult r = st != KEEL_OK || (*out)->handle ? VK_SUCCESS : compile(dev, *out);
    if (r != VK_SUCCESS) {
        char what[128];
        snprintf(what, sizeof(what), "compiling shader %.80s", d->shader->name);
        return keel_vk_failed(dev, r, what);
    }
    return st;
}

struct batch {
    keel_device *dev;
    struct pipeline **p;
};

static void compile_one(void *user, uint32_t i)
{
    const struct batch *b = user;
    (void)compile(b->dev, b->p[i]); // keel_pipeline_get() tries again and says why
}

void keel_pipelines_compile(keel_device *dev)
{
    const struct pipeline_store *s = &dev->pipelines;
    struct batch b = {.dev = dev, .p = malloc((s->n + 1) * sizeof(*b.p))};
    uint32_t n = 0;
    for (uint32_t i = 0; b.p && i < s->cap; ++i) {
        if (s->slots[i] && !s->slots[i]->handle) {
            b.p[n++] = s->slots[i];
        }
    }
    keel_parallel_for(n, compile_one, &b);
    free(b.p);
}
