// SPDX-License-Identifier: MIT
// device/sentinel.c: a word that the device writes at the end of each submission. Drivers can reset a GPU and report success
// (portability notes 0.7): then the word is missing, and what the submission should have computed too.
#include "internal.h"

#define DONE_WORD 0x6b65656cu

#define MARK_BYTES 256u // spans are aligned so
#define MARKS 16u       // in a block: a recorder has a few submissions, a long list for replay more

keel_status keel_sentinel_alloc(keel_device *dev, keel_heap **heap, uint32_t index, struct keel_span *mark)
{
    keel_status st = KEEL_OK;
    if (!*heap) {
        KEEL_TRY(keel_heap_create(heap, dev, KEEL_HEAP_HOST, "sentinels"));
    }
    if (index % MARKS == 0) {
        KEEL_TRY(keel_heap_reserve(*heap, MARKS * MARK_BYTES)); // blocks are larger unless told
    }
    KEEL_TRY(keel_heap_alloc(*heap, MARK_BYTES, mark));
out:
    return st;
}

void keel_sentinel_clear(keel_device *dev, struct keel_span mark)
{
    *(volatile uint32_t *)keel_span_host(mark) = 0;
    keel_span_flush(dev, mark);
}

void keel_sentinel_record(keel_device *dev, VkCommandBuffer cmd, struct keel_span mark)
{
    const VkMemoryBarrier written = {.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER, .srcAccessMask = VK_ACCESS_TRANSFER_WRITE_BIT,
                                     .dstAccessMask = VK_ACCESS_HOST_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT};
    dev->vk.vkCmdFillBuffer(cmd, mark.block->buffer, mark.offset, 4, DONE_WORD);
    dev->vk.vkCmdPipelineBarrier(cmd, VK_PIPELINE_STAGE_TRANSFER_BIT, VK_PIPELINE_STAGE_HOST_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT, 0, 1,
                                 &written, 0, NULL, 0, NULL);
}

keel_status keel_sentinel_check(keel_device *dev, struct keel_span mark)
{
    keel_span_fetch(dev, mark);
    if (*(volatile uint32_t *)keel_span_host(mark) == DONE_WORD) {
        return KEEL_OK;
    }
    KEEL_ERROR(dev->log, "%s: a submission ended without having run: the driver reset the GPU and did not say so; restart the command (from the "
               "last checkpoint), and see the kernel log for the cause", dev->caps.name);
    dev->lost = true;
    return KEEL_ERR_DEVICE_LOST;
}
