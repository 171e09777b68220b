// SPDX-License-Identifier: MIT
// device/memory.c: heaps. A heap is memory of one lifetime: blocks of one buffer each, filled front to back, freed as a whole.
// Owns the choice of memory types and the account of what is in use.
#include "internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define MIB (1024ull * 1024)
#define LARGE (8 * MIB) // spans from here on share no block
#define LOCAL VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
#define VISIBLE VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT
#define COHERENT VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
#define CACHED VK_MEMORY_PROPERTY_HOST_CACHED_BIT

// Wishes in falling order; `avoid` keeps plain device memory out of the small host-visible window of a card.
struct wish {
    VkMemoryPropertyFlags need, avoid;
};

static const struct wish wishes_unified[] = {{LOCAL | VISIBLE | COHERENT, 0}, {LOCAL | VISIBLE, 0}, {LOCAL, 0}, {VISIBLE, 0}};
static const struct wish wishes_card[] = {{LOCAL, VISIBLE}, {LOCAL, 0}, {0, 0}};
static const struct wish wishes_host[] = {{VISIBLE | CACHED | COHERENT, 0}, {VISIBLE | CACHED, 0},
                                          {VISIBLE | COHERENT, LOCAL}, {VISIBLE, 0}};

// AMD offers memory for debugging that bypasses caches; never pick it, nor protected or lazily allocated memory.
#define UNUSUAL                                                                                                        \
    (VK_MEMORY_PROPERTY_LAZILY_ALLOCATED_BIT | VK_MEMORY_PROPERTY_PROTECTED_BIT                                         \
     | VK_MEMORY_PROPERTY_DEVICE_COHERENT_BIT_AMD | VK_MEMORY_PROPERTY_DEVICE_UNCACHED_BIT_AMD)

// --- account -------------------------------------------------------------------------------------

// Memory that counts against the limit: the device's, which on a unified device is all.
static bool is_counted(const keel_device *dev, enum keel_heap_kind kind)
{
    return kind == KEEL_HEAP_DEVICE || dev->caps.unified;
}

static void report_no_memory(const keel_heap *heap, uint64_t asked, bool by_limit)
{
    keel_device *dev = heap->dev;
    struct keel_text t = {0};
    const double m = 1.0 / (double)MIB;
    for (const keel_heap *h = dev->heaps; h; h = h->next) {
        if (h->bytes > 0 && is_counted(dev, h->kind)) {
            keel_text_addf(&t, "%s%s %.1f MiB", t.len ? ", " : "", h->label, (double)h->bytes * m);
        }
    }
    const uint64_t heap_free = keel_heap_free(dev->phys, keel_main_heap(&dev->memory, dev->caps.unified), dev->has_budget);
    KEEL_ERROR(dev->log,
               "out of memory on %s: %.1f MiB more for %s do not fit; in use %.1f MiB (%s); %s %.1f MiB, the driver says "
               "%.1f MiB are left; use a smaller model, context or batch%s",
               dev->caps.name, (double)asked * m, heap->label, (double)dev->bytes_now * m, t.len ? t.data : "nothing yet",
               by_limit ? "the memory limit set is" : "the device has",
               (double)(by_limit ? dev->memory_limit : dev->caps.heap) * m, (double)heap_free * m,
               by_limit ? ", or raise the limit" : "");
    keel_text_finish(&t);
}

// --- blocks --------------------------------------------------------------------------------------

static void free_block(keel_device *dev, struct keel_block *b)
{
    if (b->host) {
        dev->vk.vkUnmapMemory(dev->handle, b->memory);
    }
    for (struct texel_view *v = b->views; v;) {
        struct texel_view *next = v->next;
        dev->vk.vkDestroyBufferView(dev->handle, v->handle, NULL);
        free(v);
        v = next;
    }
    dev->vk.vkDestroyBuffer(dev->handle, b->buffer, NULL);
    dev->vk.vkFreeMemory(dev->handle, b->memory, NULL);
    free(b);
}

// Tries the memory types that a wish allows, in the driver's order, which is best first.
static VkResult try_wish(keel_device *dev, struct keel_block *b, const struct wish *w, const VkMemoryRequirements *req,
                         bool card)
{
    VkResult r = VK_ERROR_OUT_OF_DEVICE_MEMORY;
    for (uint32_t i = 0; i < dev->memory.memoryTypeCount; ++i) {
        const VkMemoryPropertyFlags f = dev->memory.memoryTypes[i].propertyFlags;
        const bool fits = (req->memoryTypeBits >> i & 1) && (f & w->need) == w->need && !(f & (w->avoid | UNUSUAL));
        if (!fits || dev->memory.memoryHeaps[dev->memory.memoryTypes[i].heapIndex].size < req->size) {
            continue;
        }
        const VkMemoryAllocateInfo info = {.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, .allocationSize = req->size,
                                           .memoryTypeIndex = i};
        r = dev->vk.vkAllocateMemory(dev->handle, &info, NULL, &b->memory);
        if (r == VK_SUCCESS && (f & VISIBLE) && !card) {
            r = dev->vk.vkMapMemory(dev->handle, b->memory, 0, VK_WHOLE_SIZE, 0, &b->host);
            if (r != VK_SUCCESS) { // no address space left (32-bit boards): other memory may do
                dev->vk.vkFreeMemory(dev->handle, b->memory, NULL);
                b->memory = VK_NULL_HANDLE;
                b->host = NULL;
            }
        }
        if (r == VK_SUCCESS) {
            b->coherent = f & COHERENT;
            if (b->host) {
                keel_fault_memory(dev, b->host, req->size);
            }
            return r;
        }
        b->memory = VK_NULL_HANDLE;
    }
    return r;
}

// Makes a block without a message on failure, so that the caller can try a smaller one.
static VkResult new_block(struct keel_block **out, keel_heap *heap, uint64_t bytes)
{
    keel_device *dev = heap->dev;
    const bool card = heap->kind == KEEL_HEAP_DEVICE && !dev->caps.unified;
    const struct wish *w = heap->kind == KEEL_HEAP_HOST ? wishes_host : card ? wishes_card : wishes_unified;
    const size_t n = heap->kind == KEEL_HEAP_HOST ? KEEL_COUNT(wishes_host)
                     : card                       ? KEEL_COUNT(wishes_card)
                                                  : KEEL_COUNT(wishes_unified);
    struct keel_block *b = calloc(1, sizeof(*b));
    VkResult r = VK_ERROR_OUT_OF_HOST_MEMORY;
    if (!b) {
        return r;
    }
    const VkBufferCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO, .size = bytes, .sharingMode = VK_SHARING_MODE_EXCLUSIVE,
        .usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_UNIFORM_TEXEL_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT};
    r = dev->vk.vkCreateBuffer(dev->handle, &info, NULL, &b->buffer);
    if (r == VK_SUCCESS) {
        VkMemoryRequirements req;
        dev->vk.vkGetBufferMemoryRequirements(dev->handle, b->buffer, &req);
        r = VK_ERROR_OUT_OF_DEVICE_MEMORY;
        for (size_t i = 0; i < n && r != VK_SUCCESS; ++i) {
            r = try_wish(dev, b, &w[i], &req, card);
        }
    } else {
        b->buffer = VK_NULL_HANDLE;
    }
    if (r == VK_SUCCESS) {
        r = dev->vk.vkBindBufferMemory(dev->handle, b->buffer, b->memory, 0);
    }
    if (r != VK_SUCCESS) {
        free_block(dev, b);
        return r;
    }
    b->heap = heap;
    b->bytes = bytes;
    *out = b;
    return VK_SUCCESS;
}

// Adds a block for at least `bytes`: larger where the heap has grown, so that many small spans share few buffers, but never
// more than 64 MiB of slack on a small board. Large spans get blocks of their own size: one of 53 MB, as the 4B's layers are, would
// leave a fifth of such a block unused.
static keel_status grow(keel_heap *heap, uint64_t bytes, bool exact)
{
    keel_device *dev = heap->dev;
    const bool counted = is_counted(dev, heap->kind);
    const uint64_t limit = counted && dev->memory_limit ? dev->memory_limit : UINT64_MAX;
    const uint64_t slack = exact || bytes >= LARGE ? 0 : KEEL_MIN(KEEL_MAX(heap->bytes / 4, MIB), 64 * MIB);
    uint64_t want = KEEL_MIN(KEEL_MAX(bytes, keel_align_up(slack, SPAN_ALIGN)), dev->caps.max_buffer);
    struct keel_block *b = NULL;
    if (dev->lost) {
        return KEEL_ERR_DEVICE_LOST;
    }
    const uint64_t used = counted ? dev->bytes_now : 0;
    if (bytes > limit || used > limit - bytes) {
        report_no_memory(heap, bytes, true);
        return KEEL_ERR_NO_MEMORY;
    }
    want = KEEL_MIN(want, limit - used);
    VkResult r = new_block(&b, heap, want);
    if (r != VK_SUCCESS && want > bytes) {
        r = new_block(&b, heap, bytes);
    }
    if (r == VK_ERROR_OUT_OF_DEVICE_MEMORY || r == VK_ERROR_OUT_OF_HOST_MEMORY || r == VK_ERROR_TOO_MANY_OBJECTS) {
        report_no_memory(heap, bytes, false);
        return KEEL_ERR_NO_MEMORY;
    }
    if (r != VK_SUCCESS) {
        return keel_vk_failed(dev, r, "allocating memory");
    }
    b->next = heap->blocks;
    heap->blocks = b;
    heap->bytes += b->bytes;
    if (counted) {
        dev->bytes_now += b->bytes;
        dev->bytes_peak = KEEL_MAX(dev->bytes_peak, dev->bytes_now);
    }
    return KEEL_OK;
}

// --- heaps ---------------------------------------------------------------------------------------

keel_status keel_heap_create(keel_heap **out, keel_device *dev, enum keel_heap_kind kind, const char *label)
{
    *out = NULL;
    keel_heap *h = calloc(1, sizeof(*h));
    if (!h) {
        KEEL_ERROR(dev->log, "out of host memory for the heap of %s", label);
        return KEEL_ERR_NO_MEMORY;
    }
    h->dev = dev;
    h->kind = kind;
    h->label = label;
    h->next = dev->heaps;
    dev->heaps = h;
    *out = h;
    return KEEL_OK;
}

keel_status keel_heap_reserve(keel_heap *heap, uint64_t bytes)
{
    return bytes > 0 && bytes <= heap->dev->caps.max_buffer ? grow(heap, bytes, true) : KEEL_OK;
}

keel_status keel_heap_alloc(keel_heap *heap, uint64_t bytes, struct keel_span *out)
{
    keel_device *dev = heap->dev;
    *out = (struct keel_span){0};
    if (bytes == 0 || bytes > dev->caps.max_buffer) {
        KEEL_ERROR(dev->log, "%s: a span of %" PRIu64 " bytes for %s is outside 1..%" PRIu64 ", the largest buffer of this device",
                   dev->caps.name, bytes, heap->label, dev->caps.max_buffer);
        return bytes == 0 ? KEEL_ERR_ARG : KEEL_ERR_NO_MEMORY;
    }
    for (int pass = 0; pass < 2; ++pass) {
        for (struct keel_block *b = heap->blocks; b; b = b->next) {
            if (b->bytes - b->used >= bytes) {
                *out = (struct keel_span){.block = b, .offset = b->used, .bytes = bytes};
                b->used = KEEL_MIN(b->used + keel_align_up(bytes, SPAN_ALIGN), b->bytes);
                return KEEL_OK;
            }
        }
        if (pass == 0) {
            const keel_status st = grow(heap, bytes, false);
            if (st != KEEL_OK) {
                return st;
            }
        }
    }
    return KEEL_ERR_NO_MEMORY;
}

void keel_heap_reset(keel_heap *heap)
{
    for (struct keel_block *b = heap->blocks; b; b = b->next) {
        b->used = 0;
    }
}

void keel_heap_destroy(keel_heap **pheap)
{
    keel_heap *h = pheap ? *pheap : NULL;
    if (!h) {
        return;
    }
    *pheap = NULL;
    keel_device *dev = h->dev;
    for (struct keel_block *b = h->blocks, *next; b; b = next) {
        next = b->next;
        free_block(dev, b);
    }
    if (is_counted(dev, h->kind)) {
        dev->bytes_now -= h->bytes;
    }
    for (keel_heap **link = &dev->heaps; *link; link = &(*link)->next) {
        if (*link == h) {
            *link = h->next;
            break;
        }
    }
    free(h);
}

void keel_memory_free_all(keel_device *dev)
{
    while (dev->heaps) {
        keel_heap *h = dev->heaps;
        KEEL_WARN(dev->log, "the heap of %s (%" PRIu64 " bytes) outlived its device", h->label, h->bytes);
        keel_heap_destroy(&h);
    }
}

uint64_t keel_heap_bytes(const keel_heap *heap)
{
    return heap->bytes;
}

// --- spans ---------------------------------------------------------------------------------------

void *keel_span_host(struct keel_span s)
{
    return s.block && s.block->host ? (uint8_t *)s.block->host + s.offset : NULL;
}

// The range in whole atoms, as non-coherent memory wants it; the end of the memory may cut the last one.
static VkMappedMemoryRange atoms_of(const keel_device *dev, struct keel_span s)
{
    const uint64_t lo = s.offset / dev->atom * dev->atom, hi = keel_align_up(s.offset + s.bytes, dev->atom);
    return (VkMappedMemoryRange){.sType = VK_STRUCTURE_TYPE_MAPPED_MEMORY_RANGE, .memory = s.block->memory, .offset = lo,
                                 .size = hi >= s.block->bytes ? VK_WHOLE_SIZE : hi - lo};
}

void keel_span_flush(keel_device *dev, struct keel_span s)
{
    if (s.block && s.block->host && !s.block->coherent && s.bytes > 0) {
        const VkMappedMemoryRange range = atoms_of(dev, s);
        const VkResult r = dev->vk.vkFlushMappedMemoryRanges(dev->handle, 1, &range);
        if (r != VK_SUCCESS) {
            (void)keel_vk_failed(dev, r, "flushing host memory");
        }
    }
}

void keel_span_fetch(keel_device *dev, struct keel_span s)
{
    if (s.block && s.block->host && !s.block->coherent && s.bytes > 0) {
        const VkMappedMemoryRange range = atoms_of(dev, s);
        const VkResult r = dev->vk.vkInvalidateMappedMemoryRanges(dev->handle, 1, &range);
        if (r != VK_SUCCESS) {
            (void)keel_vk_failed(dev, r, "fetching host memory");
        }
    }
}

struct keel_span keel_span_sub(struct keel_span s, uint64_t offset, uint64_t bytes)
{
    KEEL_ASSERT(offset <= s.bytes && bytes <= s.bytes - offset);
    return (struct keel_span){.block = s.block, .offset = s.offset + offset, .bytes = bytes};
}

// --- texel views ---------------------------------------------------------------------------------

keel_status keel_texel_view(keel_device *dev, struct keel_span s, bool is_float, VkBufferView *out)
{
    // Up to a whole texel: spans are cut in units of 256 bytes, so what follows belongs to nobody else.
    const uint64_t bytes = KEEL_MIN(keel_align_up(s.bytes, TEXEL_BYTES), (s.block->bytes - s.offset) / TEXEL_BYTES * TEXEL_BYTES);
    for (const struct texel_view *v = s.block->views; v; v = v->next) {
        if (v->offset == s.offset && v->bytes == bytes && v->is_float == is_float) {
            *out = v->handle;
            return KEEL_OK;
        }
    }
    struct texel_view *v = calloc(1, sizeof(*v));
    if (!v) {
        KEEL_ERROR(dev->log, "out of host memory for a view of a buffer");
        return KEEL_ERR_NO_MEMORY;
    }
    const VkBufferViewCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_BUFFER_VIEW_CREATE_INFO, .buffer = s.block->buffer, .offset = s.offset, .range = bytes,
        .format = is_float ? VK_FORMAT_R32G32B32A32_SFLOAT : VK_FORMAT_R32G32B32A32_UINT};
    const VkResult r = dev->vk.vkCreateBufferView(dev->handle, &info, NULL, &v->handle);
    if (r != VK_SUCCESS) {
        free(v);
        return keel_vk_failed(dev, r, "making a view of a buffer");
    }
    *v = (struct texel_view){.next = s.block->views, .handle = v->handle, .offset = s.offset, .bytes = bytes, .is_float = is_float};
    s.block->views = v;
    *out = v->handle;
    return KEEL_OK;
}
