// SPDX-License-Identifier: MIT
// device/transfer.c: bytes between the host and device memory. Straight copies where the host sees the memory, else through
// a ring of staging buffers, so that one fills while the other is copied.
#include "internal.h"

#include <string.h>

// --- slots ---------------------------------------------------------------------------------------

static keel_status init_ring(keel_device *dev)
{
    struct transfer *t = &dev->transfer;
    const VkCommandPoolCreateInfo pool = {.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
                                          .flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
                                          .queueFamilyIndex = dev->family};
    keel_status st = KEEL_OK;
    if (t->pool) {
        return KEEL_OK;
    }
    VkResult r = dev->vk.vkCreateCommandPool(dev->handle, &pool, NULL, &t->pool);
    for (uint32_t i = 0; i < STAGE_SLOTS && r == VK_SUCCESS; ++i) {
        const VkCommandBufferAllocateInfo cmd = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
                                                 .commandPool = t->pool, .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
                                                 .commandBufferCount = 1};
        const VkFenceCreateInfo fence = {.sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO};
        r = dev->vk.vkAllocateCommandBuffers(dev->handle, &cmd, &t->slots[i].cmd);
        if (r == VK_SUCCESS) {
            r = dev->vk.vkCreateFence(dev->handle, &fence, NULL, &t->slots[i].fence);
        }
    }
    if (r != VK_SUCCESS) {
        st = keel_vk_failed(dev, r, "preparing transfers");
        goto out;
    }
    KEEL_TRY(keel_heap_create(&t->heap, dev, KEEL_HEAP_HOST, "staging"));
out:
    if (st != KEEL_OK) {
        keel_transfer_finish(dev);
    }
    return st;
}

void keel_transfer_finish(keel_device *dev)
{
    struct transfer *t = &dev->transfer;
    for (uint32_t i = 0; i < STAGE_SLOTS; ++i) {
        dev->vk.vkDestroyFence(dev->handle, t->slots[i].fence, NULL);
    }
    dev->vk.vkDestroyCommandPool(dev->handle, t->pool, NULL);
    keel_heap_destroy(&t->heap);
    *t = (struct transfer){.open = STAGE_NONE};
}

static keel_status wait_slot(keel_device *dev, struct stage_slot *s)
{
    if (!s->busy) {
        return KEEL_OK;
    }
    const keel_status st = keel_wait_fence(dev, s->fence, "a transfer");
    if (st == KEEL_OK) {
        s->busy = false;
        (void)dev->vk.vkResetFences(dev->handle, 1, &s->fence);
    }
    return st;
}

// Next slot of the ring, idle and with its buffer.
static keel_status take_slot(keel_device *dev, uint32_t *out)
{
    keel_status st = KEEL_OK;
    struct transfer *t = &dev->transfer;
    KEEL_TRY(init_ring(dev));
    struct stage_slot *s = &t->slots[t->next];
    KEEL_TRY(wait_slot(dev, s));
    if (!s->span.block) {
        KEEL_TRY(keel_heap_alloc(t->heap, KEEL_STAGE_MAX, &s->span));
    }
    *out = t->next;
    t->next = (t->next + 1) % STAGE_SLOTS;
out:
    return st;
}

// Starts a copy between a slot's buffer and device memory, ordered after all work submitted before and before all later work.
static keel_status submit_copy(keel_device *dev, struct stage_slot *s, struct keel_span dst, struct keel_span src)
{
    const VkMemoryBarrier before = {.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER, .srcAccessMask = VK_ACCESS_MEMORY_WRITE_BIT,
                                    .dstAccessMask = VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT};
    const VkMemoryBarrier after = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER, .srcAccessMask = VK_ACCESS_TRANSFER_WRITE_BIT,
        .dstAccessMask = VK_ACCESS_MEMORY_READ_BIT | VK_ACCESS_MEMORY_WRITE_BIT | VK_ACCESS_HOST_READ_BIT};
    const VkCommandBufferBeginInfo begin = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
                                            .flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT};
    const VkBufferCopy copy = {.srcOffset = src.offset, .dstOffset = dst.offset, .size = src.bytes};
    const VkSubmitInfo submit = {.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO, .commandBufferCount = 1, .pCommandBuffers = &s->cmd};
    VkResult r = dev->vk.vkBeginCommandBuffer(s->cmd, &begin);
    if (r == VK_SUCCESS) {
        dev->vk.vkCmdPipelineBarrier(s->cmd, VK_PIPELINE_STAGE_ALL_COMMANDS_BIT, VK_PIPELINE_STAGE_TRANSFER_BIT, 0, 1, &before,
                                     0, NULL, 0, NULL);
        dev->vk.vkCmdCopyBuffer(s->cmd, src.block->buffer, dst.block->buffer, 1, &copy);
        dev->vk.vkCmdPipelineBarrier(s->cmd, VK_PIPELINE_STAGE_TRANSFER_BIT,
                                     VK_PIPELINE_STAGE_ALL_COMMANDS_BIT | VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &after, 0, NULL, 0,
                                     NULL);
        r = dev->vk.vkEndCommandBuffer(s->cmd);
    }
    if (r == VK_SUCCESS) {
        r = dev->vk.vkQueueSubmit(dev->queue, 1, &submit, s->fence);
    }
    if (r != VK_SUCCESS) {
        return keel_vk_failed(dev, r, "a transfer");
    }
    s->busy = true;
    return KEEL_OK;
}

// --- stage ---------------------------------------------------------------------------------------

keel_status keel_stage_begin(keel_device *dev, struct keel_span dst, size_t bytes, void **ptr)
{
    keel_status st = KEEL_OK;
    struct transfer *t = &dev->transfer;
    uint32_t slot = 0;
    KEEL_ASSERT(t->open == STAGE_NONE);
    *ptr = NULL;
    if (bytes == 0 || bytes > KEEL_STAGE_MAX || bytes > dst.bytes) {
        KEEL_FAIL(dev->log, KEEL_ERR_ARG, "a stage of %zu bytes does not fit its span of %llu bytes (at most %u at a time)", bytes,
                  (unsigned long long)dst.bytes, KEEL_STAGE_MAX);
    }
    t->dst = (struct keel_span){.block = dst.block, .offset = dst.offset, .bytes = bytes};
    *ptr = keel_span_host(dst);
    if (*ptr) {
        t->open = STAGE_DIRECT;
        goto out;
    }
    KEEL_TRY(take_slot(dev, &slot));
    t->open = (int)slot;
    *ptr = keel_span_host(t->slots[slot].span);
out:
    return st;
}

keel_status keel_stage_end(keel_device *dev)
{
    struct transfer *t = &dev->transfer;
    const int open = t->open;
    KEEL_ASSERT(open != STAGE_NONE);
    t->open = STAGE_NONE;
    if (open == STAGE_DIRECT) {
        keel_span_flush(dev, t->dst);
        return KEEL_OK;
    }
    struct stage_slot *s = &t->slots[open];
    const struct keel_span src = keel_span_sub(s->span, 0, t->dst.bytes);
    keel_span_flush(dev, src);
    return submit_copy(dev, s, t->dst, src);
}

keel_status keel_stage_finish(keel_device *dev)
{
    keel_status st = KEEL_OK;
    for (uint32_t i = 0; i < STAGE_SLOTS; ++i) {
        KEEL_TRY(wait_slot(dev, &dev->transfer.slots[i]));
    }
out:
    return st;
}

// --- whole copies --------------------------------------------------------------------------------

keel_status keel_upload(keel_device *dev, struct keel_span dst, const void *src, size_t bytes)
{
    keel_status st = KEEL_OK;
    KEEL_ASSERT(bytes <= dst.bytes);
    if (keel_span_host(dst)) {
        const struct keel_span part = keel_span_sub(dst, 0, bytes);
        memcpy(keel_span_host(dst), src, bytes);
        keel_span_flush(dev, part);
        return dev->lost ? KEEL_ERR_DEVICE_LOST : KEEL_OK;
    }
    for (size_t done = 0; done < bytes;) {
        const size_t n = KEEL_MIN(bytes - done, (size_t)KEEL_STAGE_MAX);
        void *ptr;
        KEEL_TRY(keel_stage_begin(dev, keel_span_sub(dst, done, n), n, &ptr));
        memcpy(ptr, (const uint8_t *)src + done, n);
        KEEL_TRY(keel_stage_end(dev));
        done += n;
    }
    KEEL_TRY(keel_stage_finish(dev));
out:
    return st;
}

keel_status keel_download(keel_device *dev, void *dst, struct keel_span src, size_t bytes)
{
    keel_status st = KEEL_OK;
    KEEL_ASSERT(bytes <= src.bytes);
    if (keel_span_host(src)) {
        keel_span_fetch(dev, keel_span_sub(src, 0, bytes));
        memcpy(dst, keel_span_host(src), bytes);
        return dev->lost ? KEEL_ERR_DEVICE_LOST : KEEL_OK;
    }
    uint32_t slot[STAGE_SLOTS];
    // One copy runs on the device while the host empties the one before.
    for (size_t asked = 0, done = 0, i = 0; done < bytes; ++i) {
        if (asked < bytes) {
            const size_t n = KEEL_MIN(bytes - asked, (size_t)KEEL_STAGE_MAX);
            KEEL_TRY(take_slot(dev, &slot[i % STAGE_SLOTS]));
            struct stage_slot *s = &dev->transfer.slots[slot[i % STAGE_SLOTS]];
            KEEL_TRY(submit_copy(dev, s, keel_span_sub(s->span, 0, n), keel_span_sub(src, asked, n)));
            asked += n;
        }
        if (i > 0) {
            const size_t n = KEEL_MIN(bytes - done, (size_t)KEEL_STAGE_MAX);
            struct stage_slot *s = &dev->transfer.slots[slot[(i - 1) % STAGE_SLOTS]];
            KEEL_TRY(wait_slot(dev, s));
            keel_span_fetch(dev, keel_span_sub(s->span, 0, n));
            memcpy((uint8_t *)dst + done, keel_span_host(s->span), n);
            done += n;
        }
    }
out:
    return st;
}
