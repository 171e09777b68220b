// SPDX-License-Identifier: MIT
// device/descriptors.c: descriptor sets by layout. Owns their pools; what they point to is others'.
#include "internal.h"

#include <stdlib.h>

// Adds a pool and its sets to a list.
static keel_status grow(keel_device *dev, struct set_list *l, uint32_t layout)
{
    keel_status st = KEEL_OK;
    VkDescriptorSetLayout layouts[POOL_SETS];
    const VkDescriptorPoolSize size[2] = {
        {.type = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, .descriptorCount = POOL_SETS * (layout >> MAX_TEXEL_BINDS)},
        {.type = VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER, .descriptorCount = POOL_SETS * MAX_TEXEL_BINDS}};
    const VkDescriptorPoolCreateInfo pool = {.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO, .maxSets = POOL_SETS,
                                             .poolSizeCount = 2, .pPoolSizes = size};
    VkDescriptorPool *pools = realloc(l->pools, (l->n_pools + 1) * sizeof(VkDescriptorPool));
    l->pools = pools ? pools : l->pools;
    VkDescriptorSet *sets = realloc(l->sets, (size_t)(l->n_pools + 1) * POOL_SETS * sizeof(VkDescriptorSet));
    l->sets = sets ? sets : l->sets;
    if (!pools || !sets) {
        KEEL_FAIL(dev->log, KEEL_ERR_NO_MEMORY, "out of host memory while recording");
    }
    VkResult r = dev->vk.vkCreateDescriptorPool(dev->handle, &pool, NULL, &l->pools[l->n_pools]);
    if (r == VK_SUCCESS) {
        for (uint32_t i = 0; i < POOL_SETS; ++i) {
            layouts[i] = dev->pipelines.set_layouts[layout];
        }
        const VkDescriptorSetAllocateInfo info = {.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO,
                                                  .descriptorPool = l->pools[l->n_pools], .descriptorSetCount = POOL_SETS,
                                                  .pSetLayouts = layouts};
        r = dev->vk.vkAllocateDescriptorSets(dev->handle, &info, l->sets + (size_t)l->n_pools * POOL_SETS);
        if (r != VK_SUCCESS) {
            dev->vk.vkDestroyDescriptorPool(dev->handle, l->pools[l->n_pools], NULL);
        }
    }
    if (r != VK_SUCCESS) {
        st = keel_vk_failed(dev, r, "making descriptors");
        goto out;
    }
    ++l->n_pools;
out:
    return st;
}

static keel_status write_set(keel_device *dev, VkDescriptorSet set, const struct keel_dispatch *d, const struct pipeline *p)
{
    keel_status st = KEEL_OK;
    VkDescriptorBufferInfo buffers[KEEL_MAX_BINDS];
    VkBufferView views[KEEL_MAX_BINDS];
    VkWriteDescriptorSet writes[MAX_TEXEL_BINDS + 1];
    uint32_t n = 0, first = 0;
    while (first < d->n_bind && p->texel >> first & 1) {
        KEEL_TRY(keel_texel_view(dev, d->bind[first].span, p->texel_float >> first & 1, &views[first]));
        writes[n++] = (VkWriteDescriptorSet){.sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET, .dstSet = set, .dstBinding = first,
                                             .descriptorCount = 1, .descriptorType = VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER,
                                             .pTexelBufferView = &views[first]};
        ++first;
    }
    for (uint32_t i = first; i < d->n_bind; ++i) {
        const struct keel_span s = d->bind[i].span;
        buffers[i] = (VkDescriptorBufferInfo){.buffer = s.block->buffer, .offset = s.offset, .range = s.bytes};
    }
    if (first < d->n_bind) { // one write runs over consecutive bindings of one buffer each (Vulkan 1.1, 14.2.4)
        writes[n++] = (VkWriteDescriptorSet){.sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET, .dstSet = set, .dstBinding = first,
                                             .descriptorCount = d->n_bind - first,
                                             .descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, .pBufferInfo = buffers + first};
    }
    dev->vk.vkUpdateDescriptorSets(dev->handle, n, writes, 0, NULL);
out:
    return st;
}

keel_status keel_sets_next(keel_device *dev, struct set_list *l, uint32_t layout, const struct keel_dispatch *d,
                           const struct pipeline *p, VkDescriptorSet *set)
{
    keel_status st = KEEL_OK;
    if (l->used == l->n_pools * POOL_SETS) {
        KEEL_TRY(grow(dev, l, layout));
    }
    *set = l->sets[l->used++];
    KEEL_TRY(write_set(dev, *set, d, p));
out:
    return st;
}

void keel_sets_free(keel_device *dev, struct set_list *l)
{
    for (uint32_t i = 0; i < l->n_pools; ++i) {
        dev->vk.vkDestroyDescriptorPool(dev->handle, l->pools[i], NULL);
    }
    free(l->pools);
    free(l->sets);
}
